"""Choose patches by probability, and put tokens back in their places."""

import torch


def select_patches_reference(prob, keep):
    order = prob.argsort(dim=1, stable=True)  # [B, L]
    restore = order.argsort(dim=1)  # [B, L]: the rank of each patch
    mask = (restore >= keep).to(prob.dtype)  # [B, L]: 1 = hidden
    return order[:, :keep], restore, mask


def select_patches(prob, keep):
    """[B, L], int -> kept ids [B, K], restore ids [B, L], mask [B, L] (1 = hidden)."""
    return select_patches_reference(prob, keep)


def scatter_tokens_reference(tokens, mask_token, pos, restore):
    batch, visible, width = tokens.shape
    hidden = mask_token.expand(batch, restore.shape[1] + 1 - visible, width)
    shuffled = torch.cat([tokens[:, 1:], hidden], dim=1)  # [B, L, D]
    patches = shuffled.gather(1, restore[..., None].expand(-1, -1, width))
    return torch.cat([tokens[:, :1], patches], dim=1) + pos  # [B, 1+L, D]


def scatter_tokens(tokens, mask_token, pos, restore):
    """[B, 1+K, D], [1, 1, D], [1, 1+L, D], [B, L] -> [B, 1+L, D]."""
    return scatter_tokens_reference(tokens, mask_token, pos, restore)
