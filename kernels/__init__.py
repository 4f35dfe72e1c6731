"""The five operations a masked autoencoder spends its memory traffic on, each behind one public function."""

from .attention import attention
from .backend import use
from .loss import patch_loss
from .patches import gather_patches
from .tokens import scatter_tokens, select_patches

__all__ = ["attention", "gather_patches", "patch_loss", "scatter_tokens", "select_patches", "use"]
