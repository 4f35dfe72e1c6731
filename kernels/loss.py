"""The reconstruction error of each hidden patch."""

import math

import torch

from .backend import ByFormula, Function, apply_fused, jit, launch, pushforward, runs_triton, tl, triton
from .patches import addressable, gather_patches_reference, image_offsets, load_pixels, patch_tiles, patch_values

LONGEST_PATCH = 8192  # values: a program holds at least one whole patch, 64 values a thread of 4 warps


def _side(values, channels):
    return math.isqrt(values // channels)  # of a patch, in pixels


def patch_loss_reference(pred, images, mask):
    dtype = torch.promote_types(torch.promote_types(pred.dtype, images.dtype), torch.float32)
    target = gather_patches_reference(images.detach(), None, _side(pred.shape[-1], images.shape[1])).to(dtype)  # [B, L, p*p*C]
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True, unbiased=True)
    target = (target - mean) / (var + 1e-6).sqrt()
    error = (pred - target).masked_fill(mask[..., None] == 0, 0)  # not a product: 0 * NaN would leak from visible patches
    return error.square().mean(-1)  # [B, L]


@jit
def patch_error(
    p_pred,
    p_images,
    p_mask,
    L,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The difference prediction - target of this program's patches, [ROWS, VALUES], read where hidden and else zero.

    Also returns the offsets of these values in pred and of these patches in mask, which values were read, which patches
    there are, and which of a patch's values.
    """
    blocks = tl.cdiv(L, ROWS)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    # [ROWS], [VALUES]
    o_l, o_padded = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS), tl.arange(0, VALUES)
    o_v, m_v = patch_values(o_padded, C, P, CHANNELS)
    o_patch = i_b * L + o_l
    # [ROWS], [ROWS, VALUES]
    m_hidden = tl.load(p_mask + o_patch, mask=o_l < L, other=0) != 0
    m = m_hidden[:, None] & m_v[None, :]
    o_image = image_offsets(o_l, o_padded, columns, stride_c, stride_h, stride_w, P, CHANNELS)
    # [ROWS, VALUES]: b_x, b_pred; [ROWS]: b_mean, b_var
    b_x = load_pixels(p_images + i_b * stride_b + o_image, m)
    b_mean = tl.div_rn(tl.sum(b_x, axis=1), 1.0 * P * P * C)
    b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
    b_var = tl.div_rn(tl.sum(b_x * b_x, axis=1), 1.0 * P * P * C - 1)
    o_pred = o_patch[:, None] * (P * P * C) + o_v[None, :]
    b_pred = tl.load(p_pred + o_pred, mask=m, other=0).to(tl.float32)
    return b_pred - tl.div_rn(b_x, tl.sqrt_rn(b_var + 1e-6)[:, None]), o_pred, o_patch, m, o_l < L, m_v


@jit
def patch_loss_kernel(
    p_pred,
    p_tangent,
    p_images,
    p_mask,
    p_loss,
    p_loss_tangent,
    L,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    TANGENT: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    b_error, o_pred, o_patch, m, m_l, _ = patch_error(
        p_pred, p_images, p_mask, L, columns, stride_b, stride_c, stride_h, stride_w, C, P, CHANNELS, ROWS, VALUES
    )
    tl.store(p_loss + o_patch, tl.div_rn(tl.sum(b_error * b_error, axis=1), 1.0 * P * P * C), mask=m_l)
    if TANGENT:
        # [ROWS, VALUES]
        b_tangent = tl.load(p_tangent + o_pred, mask=m, other=0).to(tl.float32)
        tl.store(p_loss_tangent + o_patch, tl.sum(b_error * b_tangent, axis=1) * (2 / (P * P * C)), mask=m_l)


@jit
def patch_loss_backward_kernel(
    p_grad,
    p_pred,
    p_images,
    p_mask,
    p_grad_pred,
    L,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    b_error, o_pred, o_patch, m_hidden, m_l, m_v = patch_error(
        p_pred, p_images, p_mask, L, columns, stride_b, stride_c, stride_h, stride_w, C, P, CHANNELS, ROWS, VALUES
    )
    # [ROWS]
    b_grad = tl.load(p_grad + o_patch, mask=m_l, other=0).to(tl.float32) * (2 / (P * P * C))
    m = m_l[:, None] & m_v[None, :]  # visible patches too: their gradient is an exact zero
    tl.store(p_grad_pred + o_pred, tl.where(m_hidden, b_error * b_grad[:, None], 0.0), mask=m)


def _launch(kernel, tensors, images, mask, outputs, pred_shape, **flags):
    (B, L, values), (_, C, _, W), images = pred_shape, images.shape, addressable(images)
    config = patch_tiles(L, _side(values, C), C, LONGEST_PATCH)  # whole patches: their statistics stay on chip
    launch(
        kernel,
        B * triton.cdiv(L, config["ROWS"]),
        *tensors,
        images,
        mask.contiguous(),
        *outputs,
        L,
        W // config["P"],
        *images.stride(),
        **config,
        **flags,
    )


def loss_triton(images, mask, pred):
    loss = torch.empty(mask.shape, device=pred.device, dtype=torch.float32)
    _launch(patch_loss_kernel, [pred.contiguous(), None], images, mask, [loss, None], pred.shape, TANGENT=False)
    return loss


def loss_jvp_triton(images, mask, pred, tangent):
    # Two tensors: autograd copies a tangent that does not lie in its memory as its primal does.
    loss, loss_tangent = (torch.empty(mask.shape, device=pred.device, dtype=torch.float32) for _ in range(2))
    tensors, outputs = [pred.contiguous(), tangent.contiguous()], [loss, loss_tangent]
    _launch(patch_loss_kernel, tensors, images, mask, outputs, pred.shape, TANGENT=True)
    return loss, loss_tangent


def loss_backward_triton(images, mask, pred, grad):
    grad_pred = torch.empty(pred.shape, device=pred.device, dtype=pred.dtype)
    _launch(patch_loss_backward_kernel, [grad.contiguous(), pred.contiguous()], images, mask, [grad_pred], pred.shape)
    return grad_pred


def _of_pred(images, mask):
    return lambda pred: patch_loss_reference(pred, images, mask)


def loss_backward_formula(images, mask, pred, grad):
    return torch.func.vjp(_of_pred(images, mask), pred)[1](grad)[0]


def loss_jvp_formula(images, mask, pred, tangent):
    return pushforward(_of_pred(images, mask), (pred,), (tangent,))


def loss_with_tangent(pred, tangent, images, mask):
    return ByFormula.apply(loss_jvp_triton, loss_jvp_formula, 2, images, mask, pred, tangent)


class PatchLoss(Function):
    @staticmethod
    def forward(pred, images, mask):
        return loss_triton(images, mask, pred)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        pred, images, mask = ctx.saved_tensors
        return ByFormula.apply(loss_backward_triton, loss_backward_formula, 2, images, mask, pred, grad), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        pred, images, mask = ctx.saved_tensors
        return loss_with_tangent(pred, tangent, images, mask)[1]


def patch_loss(pred, images, mask):
    """Mean squared error of each hidden patch against its pixels, which are first brought to mean 0 and variance 1.

    pred    [B, L, p*p*C]  predicted pixels, in the order (p q c) of gather_patches
    images  [B, C, H, W]   the target; data: no derivative reaches it
    mask    [B, L]         nonzero = hidden; no derivative reaches it
    returns [B, L] float32 (float64 for float64 inputs), exactly 0 where visible; differentiable in pred, whose gradient
            is exactly 0 at visible patches. Statistics are float32, variances unbiased, with 1e-6 added under the root.

    Raises ValueError for shapes that do not fit.
    """
    B, C, H, W = images.shape
    side = _side(pred.shape[-1], C)
    whole = side > 0 and H % side == W % side == 0
    if not whole or pred.shape != (B, mask.shape[-1], side * side * C) or mask.shape != (B, (H // side) * (W // side)):
        shapes = ", ".join(str(tuple(t.shape)) for t in (pred, images, mask))
        raise ValueError(f"patch_loss: want [B, L, p*p*C], [B, C, H, W], [B, L], L = H/p * W/p, got {shapes}")
    padded = side * side * 2 ** (C - 1).bit_length()  # channels up to a power of two
    limit = f"patches of {padded} values, padding included, exceed {LONGEST_PATCH}" if padded > LONGEST_PATCH else None
    if runs_triton("patch_loss", pred, images, mask, limit=limit):
        return apply_fused(PatchLoss.apply, loss_with_tangent, pred, images.detach(), mask.detach())
    return patch_loss_reference(pred, images, mask)
