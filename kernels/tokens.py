"""Choose patches by probability, and put tokens back in their places."""

import torch

from .backend import Function, jit, launch, runs_triton, tile, tl, triton


def select_patches_reference(prob, keep):
    order = prob.detach().argsort(dim=1, stable=True)  # [B, L]: NaN last
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    restore = torch.zeros_like(order).scatter(1, order, places)  # [B, L]: the rank of each patch
    return order[:, :keep], restore, (restore >= keep).to(prob.dtype)


def scatter_tokens_reference(tokens, mask_token, pos, restore):
    batch, visible, width = tokens.shape
    hidden = mask_token.expand(batch, restore.shape[1] + 1 - visible, width)
    shuffled = torch.cat([tokens[:, 1:], hidden], dim=1)  # [B, L, D]
    patches = shuffled.gather(1, restore[..., None].expand(-1, -1, width))
    return torch.cat([tokens[:, :1], patches], dim=1) + pos  # [B, 1+L, D]


@jit
def select_patches_kernel(
    p_prob, p_kept, p_restore, p_mask, L, keep, stride_b, stride_l, ROWS: tl.constexpr, COLS: tl.constexpr
):
    blocks = tl.cdiv(L, ROWS)
    i_b, o_l = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    m_l = o_l < L
    p_row = p_prob + i_b * stride_b
    # [ROWS, 1]
    b_mine = tl.load(p_row + o_l * stride_l, mask=m_l, other=0).to(tl.float32)[:, None]
    # [ROWS]
    b_rank = tl.zeros([ROWS], tl.int32)
    for j in range(0, L, COLS):
        o_j = j + tl.arange(0, COLS)
        # [1, COLS], and then [ROWS, COLS]
        b_other = tl.load(p_row + o_j * stride_l, mask=o_j < L, other=0).to(tl.float32)[None, :]
        m_nan, m_other_nan = b_mine != b_mine, b_other != b_other  # NaN ranks last, so ranks stay a permutation
        m_tie = (b_other == b_mine) | (m_nan & m_other_nan)
        m_before = (b_other < b_mine) | (m_nan & (m_other_nan == 0)) | (m_tie & (o_j[None, :] < o_l[:, None]))
        b_rank += tl.sum((m_before & (o_j < L)[None, :]).to(tl.int32), axis=1)
    tl.store(p_restore + i_b * L + o_l, b_rank, mask=m_l)
    tl.store(p_mask + i_b * L + o_l, (b_rank >= keep).to(tl.float32), mask=m_l)
    tl.store(p_kept + i_b * keep + b_rank, o_l, mask=m_l & (b_rank < keep))


@jit
def scatter_tokens_kernel(p_tokens, p_mask_token, p_pos, p_restore, p_out, K, L, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    blocks = tl.cdiv(1 + L, ROWS)
    i_d, i_block = tl.program_id(0) % tl.cdiv(D, COLS), tl.program_id(0) // tl.cdiv(D, COLS)
    i_b = (i_block // blocks).to(tl.int64)
    o_n, o_d = i_block % blocks * ROWS + tl.arange(0, ROWS), i_d * COLS + tl.arange(0, COLS)
    m_n, m_d = o_n < 1 + L, o_d < D
    o_rank = tl.load(p_restore + i_b * L + o_n - 1, mask=m_n & (o_n > 0), other=-1).to(tl.int32)  # -1: the class token
    m_visible = (o_rank < K) & (o_rank >= -1)  # a rank out of range must not be an address
    o_out, m = o_n[:, None] * D + o_d[None, :], m_n[:, None] & m_d[None, :]
    o_token = (1 + o_rank)[:, None] * D + o_d[None, :]
    # [ROWS, COLS]: b_token, b_pos, b_out; [COLS]: b_mask
    b_token = tl.load(p_tokens + i_b * (1 + K) * D + o_token, mask=m & m_visible[:, None], other=0).to(tl.float32)
    b_mask = tl.load(p_mask_token + o_d, mask=m_d, other=0).to(tl.float32)
    b_pos = tl.load(p_pos + o_out, mask=m, other=0).to(tl.float32)
    b_out = tl.where(m_visible[:, None], b_token, b_mask[None, :]) + b_pos
    tl.store(p_out + i_b * (1 + L) * D + o_out, b_out, mask=m)


@jit
def collect_tokens_kernel(
    p_grad, p_restore, p_tokens, p_mask_token, p_pos, B, K, L, D, ROWS: tl.constexpr, COLS: tl.constexpr
):
    i_d, i_n = tl.program_id(0) % tl.cdiv(D, COLS), tl.program_id(0) // tl.cdiv(D, COLS)
    o_d = i_d * COLS + tl.arange(0, COLS)
    m_d = o_d < D
    # [COLS]
    b_pos, b_mask = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    for i in range(0, B, ROWS):  # one position, all images: its sums over the batch need no atomics
        o_b = i + tl.arange(0, ROWS).to(tl.int64)
        m_b = o_b < B
        m = m_b[:, None] & m_d[None, :]
        o_rank = tl.load(p_restore + o_b * L + i_n - 1, mask=m_b & (i_n > 0), other=-1)
        m_visible = ((o_rank < K) & (o_rank >= -1))[:, None]
        # [ROWS, COLS]
        b_grad = tl.load(p_grad + (o_b * (1 + L) + i_n)[:, None] * D + o_d[None, :], mask=m, other=0)
        o_token = (o_b * (1 + K) + 1 + o_rank)[:, None] * D + o_d[None, :]
        tl.store(p_tokens + o_token, b_grad, mask=m & m_visible)
        b_grad = b_grad.to(tl.float32)
        b_pos += tl.sum(b_grad, axis=0)
        b_mask += tl.sum(tl.where(m_visible, 0.0, b_grad), axis=0)
    tl.store(p_pos + i_n * D + o_d, b_pos, mask=m_d)
    tl.store(p_mask_token + i_n * D + o_d, b_mask, mask=m_d)


def select_triton(prob, keep):
    B, L = prob.shape
    kept = torch.empty(B, keep, device=prob.device, dtype=torch.int64)
    restore = torch.empty(B, L, device=prob.device, dtype=torch.int64)
    mask = torch.empty(B, L, device=prob.device, dtype=prob.dtype)
    ROWS = COLS = 64  # 4096 comparisons at a time, 32 a thread of 4 warps
    launch(
        select_patches_kernel,
        B * triton.cdiv(L, ROWS),
        prob,
        kept,
        restore,
        mask,
        L,
        keep,
        *prob.stride(),
        ROWS=ROWS,
        COLS=COLS,
    )
    return kept, restore, mask


def scatter_triton(tokens, mask_token, pos, restore):
    (B, visible, D), L = tokens.shape, restore.shape[1]
    dtype = torch.promote_types(torch.promote_types(tokens.dtype, mask_token.dtype), pos.dtype)
    out = torch.empty(B, 1 + L, D, device=tokens.device, dtype=dtype)
    ROWS, COLS = tile(1 + L, D, 256)
    launch(
        scatter_tokens_kernel,
        B * triton.cdiv(1 + L, ROWS) * triton.cdiv(D, COLS),
        *[t.contiguous() for t in (tokens, mask_token, pos, restore)],
        out,
        visible - 1,
        L,
        D,
        ROWS=ROWS,
        COLS=COLS,
    )
    return out


def collect_triton(grad, restore, visible, dtypes):
    B, N, D = grad.shape
    tokens = torch.empty(B, visible, D, device=grad.device, dtype=dtypes[0])
    mask_tokens = torch.empty(N, D, device=grad.device, dtype=torch.float32)  # of each position, summed below
    pos = torch.empty(1, N, D, device=grad.device, dtype=dtypes[2])
    ROWS, COLS = tile(B, D, 128)
    launch(
        collect_tokens_kernel,
        N * triton.cdiv(D, COLS),
        grad.contiguous(),
        restore.contiguous(),
        tokens,
        mask_tokens,
        pos,
        B,
        visible - 1,
        N - 1,
        D,
        ROWS=ROWS,
        COLS=COLS,
    )
    return tokens, mask_tokens.sum(0).view(1, 1, D).to(dtypes[1]), pos


class SelectPatches(Function):
    """No derivative passes; a Function only so that torch.func hands the kernel plain tensors."""

    @staticmethod
    def forward(prob, keep):
        return select_triton(prob, keep)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(*outputs)

    @staticmethod
    def backward(ctx, *_):
        return None, None

    @staticmethod
    def jvp(ctx, *_):
        return None, None, None


class ScatterTokens(Function):
    """Linear in its three float inputs; its transpose is CollectTokens, so derivatives of any order stay on the kernels."""

    @staticmethod
    def forward(tokens, mask_token, pos, restore):
        return scatter_triton(tokens, mask_token, pos, restore)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *floats, restore = inputs
        ctx.like = [(t.shape, t.dtype) for t in floats]
        ctx.save_for_backward(restore)
        ctx.save_for_forward(restore)

    @staticmethod
    def backward(ctx, grad):
        (shape, _), *_ = ctx.like
        return *CollectTokens.apply(grad, *ctx.saved_tensors, shape[1], [dtype for _, dtype in ctx.like]), None

    @staticmethod
    def jvp(ctx, *tangents):
        (restore,) = ctx.saved_tensors
        missing = [torch.zeros(s, dtype=d, device=restore.device) for s, d in ctx.like]
        return ScatterTokens.apply(*[m if t is None else t for t, m in zip(tangents, missing)], restore)


class CollectTokens(Function):
    """grad [B, 1+L, D] -> what falls on the tokens [B, 1+K, D], on the mask token [1, 1, D], on the positions [1, 1+L, D]."""

    @staticmethod
    def forward(grad, restore, visible, dtypes):
        return collect_triton(grad, restore, visible, dtypes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, restore, ctx.visible, ctx.dtypes = inputs
        ctx.save_for_backward(restore)
        ctx.save_for_forward(restore)

    @staticmethod
    def backward(ctx, *cotangents):
        return ScatterTokens.apply(*cotangents, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        return CollectTokens.apply(tangent, *ctx.saved_tensors, ctx.visible, ctx.dtypes)


def select_patches(prob, keep):
    """Keep the `keep` least probable patches of each image; ties go to the lower index, NaN counts as most probable.

    prob    [B, L] float  masking probability of each patch; no derivative passes
    keep    int           how many stay visible, 0..L
    returns kept [B, keep] int64, ids of the visible patches by ascending probability; restore [B, L] int64, the rank
            of each patch; mask [B, L] in the dtype of prob, 1 = hidden

    Raises ValueError for shapes that do not fit.
    """
    if prob.ndim != 2 or not 0 <= keep <= prob.shape[1]:
        raise ValueError(f"select_patches: cannot keep {keep} patches with probabilities {tuple(prob.shape)}")
    if runs_triton("select_patches", prob):
        return SelectPatches.apply(prob, keep)
    return select_patches_reference(prob, keep)


def scatter_tokens(tokens, mask_token, pos, restore):
    """Unshuffle the visible tokens, put the mask token where a patch is hidden, add the position embedding.

    tokens     [B, 1+K, D]  class token, then visible patches by rank
    mask_token [1, 1, D]
    pos        [1, 1+L, D]
    restore    [B, L] int64 the rank of each patch, a permutation of 0..L-1; ranks >= K are hidden
    returns    [B, 1+L, D]  in the floats' promoted dtype, differentiable in all three floats

    Raises ValueError for shapes that do not fit.
    """
    B, L, D = len(tokens), restore.shape[-1], tokens.shape[-1]
    if (
        tokens.ndim != 3
        or not 1 <= tokens.shape[1] <= 1 + L
        or restore.shape != (B, L)
        or mask_token.shape != (1, 1, D)
        or pos.shape != (1, 1 + L, D)
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (tokens, mask_token, pos, restore))
        raise ValueError(f"scatter_tokens: want [B, 1+K, D], [1, 1, D], [1, 1+L, D], [B, L] with K <= L, got {shapes}")
    if runs_triton("scatter_tokens", tokens, mask_token, pos, restore):
        return ScatterTokens.apply(tokens, mask_token, pos, restore)
    return scatter_tokens_reference(tokens, mask_token, pos, restore)
