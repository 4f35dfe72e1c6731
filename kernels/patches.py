"""Cut images into patches and keep some of them."""

from einops import rearrange


def gather_patches_reference(images, keep, patch):
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)  # [B, L, p*p*C]
    if keep is not None:
        patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))  # [B, K, p*p*C]
    return patches


def gather_patches(images, keep, patch):
    """[B, C, H, W], [B, K] or None (all patches, in order) -> [B, K, p*p*C]."""
    return gather_patches_reference(images, keep, patch)
