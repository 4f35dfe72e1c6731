"""The reconstruction error of each hidden patch."""

from .patches import gather_patches_reference


def patch_loss_reference(pred, images, mask):
    patch = int((pred.shape[-1] // images.shape[1]) ** 0.5)
    target = gather_patches_reference(images, None, patch)  # [B, L, p*p*C]
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True, unbiased=True)
    target = (target - mean) / (var + 1e-6).sqrt()
    return (pred - target).square().mean(-1) * mask  # [B, L]


def patch_loss(pred, images, mask):
    """[B, L, p*p*C], [B, C, H, W], [B, L] -> [B, L], zero where the patch is visible."""
    return patch_loss_reference(pred, images, mask)
