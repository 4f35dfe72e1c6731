"""Cut images into patches and keep some of them."""

import torch
from einops import rearrange

from .backend import Function, jit, launch, runs_triton, tile, tl, triton


def gather_patches_reference(images, keep, patch):
    if images.dtype == torch.uint8:
        images = images.float() / 255
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)  # [B, L, p*p*C]
    if keep is not None:
        patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))  # [B, K, p*p*C]
    return patches


# Tiles count CHANNELS >= C values a pixel, a power of two: then neighbouring threads take neighbouring pixels of one channel,
# which lie side by side in the image, and nearly so in the patch.


@jit
def patch_values(o_padded, C: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr):
    """Places of a tile's values in a patch of (p q c), and which of them exist."""
    o_c, o_pixel = o_padded % CHANNELS, o_padded // CHANNELS
    return o_pixel * C + o_c, (o_c < C) & (o_pixel < P * P)


@jit
def image_offsets(o_patch, o_padded, columns, stride_c, stride_h, stride_w, P: tl.constexpr, CHANNELS: tl.constexpr):
    """Where a tile's values [V] of patches o_patch [R] lie within one image: [R, V]."""
    o_c, o_q, o_p = o_padded % CHANNELS, o_padded // CHANNELS % P, o_padded // (CHANNELS * P)
    corner = (o_patch // columns) * (P * stride_h) + (o_patch % columns) * (P * stride_w)
    return corner[:, None] + (o_p * stride_h + o_q * stride_w + o_c * stride_c)[None, :]


@jit
def load_pixels(pointers, mask):
    """Pixels in float32; uint8 ones scaled to 0..1."""
    b_x = tl.load(pointers, mask=mask, other=0)
    if b_x.dtype == tl.uint8:
        return tl.div_rn(b_x.to(tl.float32), 255.0)
    else:
        return b_x.to(tl.float32)


@jit
def gather_patches_kernel(
    p_images,
    p_keep,
    p_out,
    K,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    ALL: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
):
    blocks = tl.cdiv(K, ROWS) * tl.cdiv(P * P * CHANNELS, VALUES)
    i_b, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_k = i_block % tl.cdiv(K, ROWS) * ROWS + tl.arange(0, ROWS)
    o_padded = i_block // tl.cdiv(K, ROWS) * VALUES + tl.arange(0, VALUES)
    o_v, m_v = patch_values(o_padded, C, P, CHANNELS)
    m = (o_k < K)[:, None] & m_v[None, :]
    if ALL:
        o_patch = o_k
    else:
        o_patch = tl.load(p_keep + i_b * K + o_k, mask=o_k < K, other=0).to(tl.int32)
    # [ROWS, VALUES]
    o_image = image_offsets(o_patch, o_padded, columns, stride_c, stride_h, stride_w, P, CHANNELS)
    b_x = load_pixels(p_images + i_b * stride_b + o_image, m)
    tl.store(p_out + i_b * K * (P * P * C) + o_k[:, None] * (P * P * C) + o_v[None, :], b_x, mask=m)


@jit
def spread_patches_kernel(
    p_patches,
    p_keep,
    p_images,
    K,
    L,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    ALL: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(L, ROWS) * tl.cdiv(P * P * CHANNELS, VALUES)
    i_b, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_l = i_block % tl.cdiv(L, ROWS) * ROWS + tl.arange(0, ROWS)
    o_padded = i_block // tl.cdiv(L, ROWS) * VALUES + tl.arange(0, VALUES)
    o_v, m_v = patch_values(o_padded, C, P, CHANNELS)
    m = (o_l < L)[:, None] & m_v[None, :]
    # [ROWS, VALUES]: b_x
    p_row = p_patches + i_b * K * (P * P * C) + o_v[None, :]
    if ALL:
        b_x = tl.load(p_row + o_l[:, None] * (P * P * C), mask=m, other=0).to(tl.float32)
    else:
        b_x = tl.zeros([ROWS, VALUES], tl.float32)
        # [ROWS]: b_k, b_next
        b_k, some = tl.full([ROWS], -1, tl.int32), 1
        while some > 0:  # as often as the most repeated patch: each collects its copies in order, so atomics are not needed
            b_next = tl.full([ROWS], K, tl.int32)  # the copy after b_k
            for j in range(0, K, BLOCK):
                o_k = j + tl.arange(0, BLOCK)
                # [BLOCK]; [ROWS, BLOCK]
                b_id = tl.load(p_keep + i_b * K + o_k, mask=o_k < K, other=-1).to(tl.int32)
                m_copy = (b_id[None, :] == o_l[:, None]) & (o_k[None, :] > b_k[:, None])
                b_next = tl.minimum(b_next, tl.min(tl.where(m_copy, o_k[None, :], K), axis=1))
            b_x += tl.load(p_row + b_next[:, None] * (P * P * C), mask=m & (b_next < K)[:, None], other=0).to(tl.float32)
            b_k, some = b_next, tl.max((b_next < K).to(tl.int32), axis=0)
    # [ROWS, VALUES]
    o_image = image_offsets(o_l, o_padded, columns, stride_c, stride_h, stride_w, P, CHANNELS)
    tl.store(p_images + i_b * stride_b + o_image, b_x, mask=m)


def patch_tiles(rows, patch, channels, widest=1024):
    """The configuration of tiles of `rows` patches of `patch` x `patch` pixels: half of `tile`, since these offsets and masks
    take registers, and at most 64 patches, or a small batch of small patches leaves multiprocessors idle."""
    CHANNELS = triton.next_power_of_2(channels)
    ROWS, VALUES = tile(rows, patch * patch * CHANNELS, widest)
    return {"C": channels, "P": patch, "CHANNELS": CHANNELS, "ROWS": min(64, max(1, ROWS // 2)), "VALUES": VALUES}


def _programs(images, rows, patch, config):
    return images * triton.cdiv(rows, config["ROWS"]) * triton.cdiv(patch * patch * config["CHANNELS"], config["VALUES"])


def addressable(images):
    """The images, copied where an offset within one of them would not fit 32 bits (the batch lies innermost, and is large)."""
    reach = sum((size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:]))
    return images if reach < 2**31 else images.contiguous()


def gather_triton(images, keep, patch):
    (B, C, H, W), images = images.shape, addressable(images)
    K = (H // patch) * (W // patch) if keep is None else keep.shape[1]
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    out, config = torch.empty(B, K, patch * patch * C, device=images.device, dtype=dtype), patch_tiles(K, patch, C)
    launch(
        gather_patches_kernel,
        _programs(B, K, patch, config),
        images,
        None if keep is None else keep.contiguous(),
        out,
        K,
        W // patch,
        *images.stride(),
        ALL=keep is None,
        **config,
    )
    return out


def spread_triton(patches, keep, patch, shape):
    B, C, H, W = shape
    L, K = (H // patch) * (W // patch), patches.shape[1]
    images, config = torch.empty(shape, device=patches.device, dtype=patches.dtype), patch_tiles(L, patch, C)
    launch(
        spread_patches_kernel,
        _programs(B, L, patch, config),
        patches.contiguous(),
        None if keep is None else keep.contiguous(),
        images,
        K,
        L,
        W // patch,
        *images.stride(),
        ALL=keep is None,
        BLOCK=min(triton.next_power_of_2(max(K, 1)), 2048 // config["ROWS"]),
        **config,
    )
    return images


class GatherPatches(Function):
    """Linear in the images; its transpose is SpreadPatches, so derivatives of any order stay on the kernels."""

    @staticmethod
    def forward(images, keep, patch):
        return gather_triton(images, keep, patch)

    @staticmethod
    def setup_context(ctx, inputs, output):
        images, keep, ctx.patch = inputs
        ctx.shape = images.shape
        ctx.save_for_backward(keep)
        ctx.save_for_forward(keep)

    @staticmethod
    def backward(ctx, grad):
        return SpreadPatches.apply(grad, *ctx.saved_tensors, ctx.patch, ctx.shape), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return GatherPatches.apply(tangent, *ctx.saved_tensors, ctx.patch)


class SpreadPatches(Function):
    """Patches [B, K, p*p*C] summed into their places in images of zeros."""

    @staticmethod
    def forward(patches, keep, patch, shape):
        return spread_triton(patches, keep, patch, shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, keep, ctx.patch, ctx.shape = inputs
        ctx.save_for_backward(keep)
        ctx.save_for_forward(keep)

    @staticmethod
    def backward(ctx, grad):
        return GatherPatches.apply(grad, *ctx.saved_tensors, ctx.patch), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return SpreadPatches.apply(tangent, *ctx.saved_tensors, ctx.patch, ctx.shape)


def gather_patches(images, keep, patch):
    """The patches `keep` of each image, flattened in the order (p q c).

    images  [B, C, H, W]  float, or uint8, which is read as value / 255 in float32
    keep    [B, K] int64  which patches, each in 0..L-1, L = H/p * W/p in raster order; None = all of them in order
    patch   int           p, the side of a patch in pixels; divides H and W
    returns [B, K, p*p*C] in the images' dtype, differentiable in the images

    Raises ValueError for shapes that do not fit. Ids out of range are not looked for on a GPU.
    """
    if images.ndim != 4 or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(f"gather_patches: images {tuple(images.shape)} do not divide into patches of {patch} x {patch}")
    if keep is not None and (keep.ndim != 2 or len(keep) != len(images) or keep.dtype != torch.int64):
        raise ValueError(f"gather_patches: keep must be int64 [{len(images)}, K], got {keep.dtype} {tuple(keep.shape)}")
    if runs_triton("gather_patches", images, *[] if keep is None else [keep]):
        return GatherPatches.apply(images, keep, patch)
    return gather_patches_reference(images, keep, patch)
