"""The five operations a masked autoencoder spends its memory traffic on, each behind one public function.

One family a file: the plain reference, the kernels, the autograd Function, the public function. In a kernel, a name says what
it is by its prefix, and comments give shapes above the tiles that have them:

    p_  a pointer, or a tile of pointers        m_  a mask: which places of a tile exist, or are read
    b_  a tile of values, on the chip           i_  an index of this program: its image, head or block
    o_  offsets or indices along a tile         stride_  elements between neighbours along a dimension

Capitals are sizes; those that are tl.constexpr are known to the compiler. B images, N rows (tokens), H heads, D columns (of a
head, of a token), L patches, K visible patches, C channels, P pixels along a patch's side.
"""

from .attention import attention
from .backend import current, use
from .loss import patch_loss
from .patches import gather_patches
from .tokens import scatter_tokens, select_patches

__all__ = ["attention", "current", "gather_patches", "patch_loss", "scatter_tokens", "select_patches", "use"]
