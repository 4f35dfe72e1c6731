"""Multi-head self-attention on a packed qkv."""

import torch

from .backend import ByFormula, apply_fused, jit, launch, pushforward, runs_triton, tl, triton

WIDEST_HEAD = 128  # beyond it the backward's tiles outgrow the registers
LOG2_E = 1.4426950408889634  # the kernels' softmax runs on exp2, so the scale carries this factor


def attention_reference(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
    q = q * q.shape[-1] ** -0.5  # here rather than on the N x N scores, which are larger
    weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, H, N, N]
    return (weights @ v).transpose(1, 2).flatten(2)  # [B, N, H*d]


@jit
def load_rows(p_head, start, N, stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows start.. of one head, [ROWS, COLS]; zeros beyond N and D."""
    o_n, o_d = tl.arange(0, ROWS), tl.arange(0, COLS)
    p_head += tl.full([], start, tl.int64) * stride  # the tile itself is small: 32-bit offsets spare registers
    m = (start + o_n < N)[:, None] & (o_d < D)[None, :]
    return tl.load(p_head + o_n[:, None] * stride + o_d[None, :], mask=m, other=0)


@jit
def store_rows(p_head, start, b_x, N, stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    o_n, o_d = tl.arange(0, ROWS), tl.arange(0, COLS)
    p_head += tl.full([], start, tl.int64) * stride  # the tile itself is small: 32-bit offsets spare registers
    m = (start + o_n < N)[:, None] & (o_d < D)[None, :]
    tl.store(p_head + o_n[:, None] * stride + o_d[None, :], b_x, mask=m)


@jit
def dot(b_a, b_b):
    """a @ b in float32; float32 operands without TF32."""
    return tl.dot(b_a, b_b, input_precision="ieee")


@jit
def attention_forward_kernel(
    p_qkv, p_out, p_lse, N, H, scale,
    WHOLE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, ROWS)
    i_row, start = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS  # row: an image's head
    i_b, i_h = i_row // H, i_row % H
    p_q = p_qkv + (i_b * N * 3 * H + i_h) * D
    p_k, p_v = p_q + H * D, p_q + 2 * H * D
    b_q = load_rows(p_q, start, N, 3 * H * D, D, ROWS, COLS)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, COLS], tl.float32)
    for j in range(0, ROWS if WHOLE else N, ROWS):
        b_k = load_rows(p_k, j, N, 3 * H * D, D, ROWS, COLS)
        b_v = load_rows(p_v, j, N, 3 * H * D, D, ROWS, COLS)
        b_s = tl.where((j + tl.arange(0, ROWS) < N)[None, :], dot(b_q, tl.trans(b_k)) * scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_p, b_shrink = tl.exp2(b_s - b_new[:, None]), tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        b_out = b_out * b_shrink[:, None] + dot(b_p.to(b_v.dtype), b_v)
        b_max = b_new
    store_rows(p_out + (i_b * N * H + i_h) * D, start, b_out / b_sum[:, None], N, H * D, D, ROWS, COLS)
    o_n = start + tl.arange(0, ROWS)
    tl.store(p_lse + i_row * N + o_n, b_max + tl.log2(b_sum), mask=o_n < N)


@jit
def attention_jvp_kernel(
    p_qkv, p_tangent, p_out, p_out_tangent, N, H, scale,
    WHOLE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, ROWS)
    i_row, start = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS
    i_b, i_h = i_row // H, i_row % H
    o_head = (i_b * N * 3 * H + i_h) * D
    p_q, p_tq = p_qkv + o_head, p_tangent + o_head
    b_q = load_rows(p_q, start, N, 3 * H * D, D, ROWS, COLS)
    b_tq = load_rows(p_tq, start, N, 3 * H * D, D, ROWS, COLS)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)  # of p = exp(s)
    b_mean = tl.zeros([ROWS], tl.float32)  # of ts, the tangent of s, weighted by p
    b_out = tl.zeros([ROWS, COLS], tl.float32)  # sum of p v
    b_tout = tl.zeros([ROWS, COLS], tl.float32)  # sum of p ((ts - mean) v + tv)
    for j in range(0, ROWS if WHOLE else N, ROWS):
        b_k = load_rows(p_q + H * D, j, N, 3 * H * D, D, ROWS, COLS)
        b_tk = load_rows(p_tq + H * D, j, N, 3 * H * D, D, ROWS, COLS)
        b_v = load_rows(p_q + 2 * H * D, j, N, 3 * H * D, D, ROWS, COLS)
        b_tv = load_rows(p_tq + 2 * H * D, j, N, 3 * H * D, D, ROWS, COLS)
        b_s = tl.where((j + tl.arange(0, ROWS) < N)[None, :], dot(b_q, tl.trans(b_k)) * scale, float("-inf"))
        b_ts = (dot(b_tq, tl.trans(b_k)) + dot(b_q, tl.trans(b_tk))) * (scale / LOG2_E)  # zero at overrunning keys
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        b_p, b_shrink = tl.exp2(b_s - b_new[:, None]), tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        b_step = tl.sum(b_p * (b_ts - b_mean[:, None]), axis=1) / b_sum
        b_mean += b_step  # taken off before rounding: off the final sums, large tangents would cancel
        b_tp = (b_p * (b_ts - b_mean[:, None])).to(b_v.dtype)
        b_p = b_p.to(b_v.dtype)
        b_tout = (b_tout - b_step[:, None] * b_out) * b_shrink[:, None]
        b_out = b_out * b_shrink[:, None] + dot(b_p, b_v)
        b_tout += dot(b_tp, b_v)
        b_tout += dot(b_p, b_tv)
        b_max = b_new
    o_head = (i_b * N * H + i_h) * D
    store_rows(p_out + o_head, start, b_out / b_sum[:, None], N, H * D, D, ROWS, COLS)
    store_rows(p_out_tangent + o_head, start, b_tout / b_sum[:, None], N, H * D, D, ROWS, COLS)


@jit
def attention_backward_kernel(
    p_qkv, p_out, p_grad, p_lse, p_grad_qkv, N, H, scale,
    WHOLE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, keys and values of this program's own block: no two programs write one place."""
    blocks = tl.cdiv(N, ROWS)
    i_row, start = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * ROWS
    i_b, i_h = i_row // H, i_row % H
    o_head, o_heads = (i_b * N * H + i_h) * D, (i_b * N * 3 * H + i_h) * D
    p_q, p_k, p_v = p_qkv + o_heads, p_qkv + o_heads + H * D, p_qkv + o_heads + 2 * H * D
    p_o, p_do, p_lse = p_out + o_head, p_grad + o_head, p_lse + i_row * N
    o_n = tl.arange(0, ROWS)
    m_mine = (start + o_n < N)[None, :]
    b_k = load_rows(p_k, start, N, 3 * H * D, D, ROWS, COLS)
    b_v = load_rows(p_v, start, N, 3 * H * D, D, ROWS, COLS)
    b_dq = tl.zeros([ROWS, COLS], tl.float32)
    b_dk = tl.zeros([ROWS, COLS], tl.float32)
    b_dv = tl.zeros([ROWS, COLS], tl.float32)
    for j in range(0, ROWS if WHOLE else N, ROWS):  # all queries meet my keys
        b_q = load_rows(p_q, j, N, 3 * H * D, D, ROWS, COLS)
        b_do = load_rows(p_do, j, N, H * D, D, ROWS, COLS)
        b_lse = tl.load(p_lse + j + o_n, mask=j + o_n < N, other=0)  # beyond N, q = do = 0 add nothing
        b_s = tl.where(m_mine, dot(b_q, tl.trans(b_k)) * scale, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[:, None])  # [queries, keys]
        if WHOLE:  # all keys are here: no rounding of b_lse need stay, and no output be read
            b_p /= tl.sum(b_p, axis=1)[:, None]
            b_dp = dot(b_do, tl.trans(b_v))
            b_delta = tl.sum(b_p * b_dp, axis=1)
        else:
            b_o = load_rows(p_o, j, N, H * D, D, ROWS, COLS)
            b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
            b_dp = dot(b_do, tl.trans(b_v))  # after b_o: the other way round, sm_80 spills
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q.dtype)
        b_dv += dot(tl.trans(b_p.to(b_do.dtype)), b_do)
        b_dk += dot(tl.trans(b_ds), b_q)
        if WHOLE:  # one block holds the row, and these are all the keys as well
            b_dq += dot(b_ds, b_k)
    p_dq = p_grad_qkv + o_heads
    store_rows(p_dq + H * D, start, b_dk * (scale / LOG2_E), N, 3 * H * D, D, ROWS, COLS)  # now, to free their registers
    store_rows(p_dq + 2 * H * D, start, b_dv, N, 3 * H * D, D, ROWS, COLS)
    if not WHOLE:
        b_q = load_rows(p_q, start, N, 3 * H * D, D, ROWS, COLS)
        b_do = load_rows(p_do, start, N, H * D, D, ROWS, COLS)
        b_o = load_rows(p_o, start, N, H * D, D, ROWS, COLS)
        b_lse = tl.load(p_lse + start + o_n, mask=start + o_n < N, other=0)
        b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
        for j in range(0, N, ROWS):  # my queries meet all keys
            b_k = load_rows(p_k, j, N, 3 * H * D, D, ROWS, COLS)
            b_v = load_rows(p_v, j, N, 3 * H * D, D, ROWS, COLS)
            b_s = tl.where((j + o_n < N)[None, :], dot(b_q, tl.trans(b_k)) * scale, float("-inf"))
            b_p = tl.exp2(b_s - b_lse[:, None])
            b_ds = (b_p * (dot(b_do, tl.trans(b_v)) - b_delta[:, None])).to(b_q.dtype)
            b_dq += dot(b_ds, b_k)
    store_rows(p_dq, start, b_dq * (scale / LOG2_E), N, 3 * H * D, D, ROWS, COLS)


def _config(qkv, light):
    """Tile sizes by shape: the largest that spill no registers (`python -m kernels.cross_compile` shows them).

    65 to 96 rows waste less in tiles of 32. The forward is light and takes half the warps, but for wide heads in float32,
    which would spill on sm_100.
    """
    N, D, single = qkv.shape[1], qkv.shape[4], qkv.dtype == torch.float32
    if single:
        ROWS = 32 if D <= 64 else 16
    else:
        ROWS = 32 if D > 64 or N <= 32 or 64 < N <= 96 else 64
    small = not single and ROWS == 32 and D <= 64
    COLS = max(16, triton.next_power_of_2(D))
    warps = 4 if small else 8
    if light and not (single and D > 64):
        warps //= 2
    return {"WHOLE": N <= ROWS, "D": D, "ROWS": ROWS, "COLS": COLS, "num_warps": warps, "num_stages": 2}


def _arguments(qkv, ROWS):
    """Number of programs, and the kernels' common scalars."""
    B, N, _, H, D = qkv.shape
    return B * H * triton.cdiv(N, ROWS), (N, H, LOG2_E * D**-0.5)


def forward_triton(qkv):
    B, N, _, H, D = qkv.shape
    qkv, config = qkv.contiguous(), _config(qkv, light=True)
    out = torch.empty(B, N, H * D, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(B, H, N, device=qkv.device, dtype=torch.float32)
    programs, scalars = _arguments(qkv, config["ROWS"])
    launch(attention_forward_kernel, programs, qkv, out, lse, *scalars, **config)
    return out, lse


def backward_triton(out, lse, qkv, grad):
    qkv, config = qkv.contiguous(), _config(qkv, light=False)
    grad_qkv = torch.empty_like(qkv)
    programs, scalars = _arguments(qkv, config["ROWS"])
    launch(
        attention_backward_kernel, programs, qkv, out, grad.contiguous(), lse, grad_qkv, *scalars,
        LOG2_E=LOG2_E, **config,
    )  # fmt: skip
    return grad_qkv


def jvp_triton(qkv, tangent):
    B, N, _, H, D = qkv.shape
    qkv, config = qkv.contiguous(), _config(qkv, light=False)
    out, out_tangent = (torch.empty(B, N, H * D, device=qkv.device, dtype=qkv.dtype) for _ in range(2))
    programs, scalars = _arguments(qkv, config["ROWS"])
    launch(
        attention_jvp_kernel, programs, qkv, tangent.contiguous(), out, out_tangent, *scalars,
        LOG2_E=LOG2_E, **config,
    )  # fmt: skip
    return out, out_tangent


def backward_formula(out, lse, qkv, grad):
    return torch.func.vjp(attention_reference, qkv)[1](grad)[0]


def jvp_formula(qkv, tangent):
    return pushforward(attention_reference, (qkv,), (tangent,))


def with_tangent(qkv, tangent):
    return ByFormula.apply(jvp_triton, jvp_formula, 0, qkv, tangent)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(qkv):
        return forward_triton(qkv)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*outputs, *inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad, _):
        out, lse, qkv = ctx.saved_tensors
        return ByFormula.apply(backward_triton, backward_formula, 2, out, lse, qkv, grad)

    @staticmethod
    def jvp(ctx, tangent):
        return with_tangent(ctx.saved_tensors[-1], tangent)[1], None


def attention(qkv):
    """softmax(q k' / sqrt(d)) v of every head, with no N x N matrix in memory on the Triton path.

    qkv     [B, N, 3, H, d]  any N; d up to 128 on the Triton path
    returns [B, N, H*d]      heads side by side

    Raises ValueError for another shape. Second derivatives are those of the plain formula, at its cost.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention: qkv must be [B, N, 3, H, d], got {tuple(qkv.shape)}")
    device = qkv.device.type
    autocasts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocasts and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype(device))  # as autocast does to the matrix products of the reference
    d = qkv.shape[-1]
    if runs_triton("attention", qkv, limit=f"head dim {d} exceeds {WIDEST_HEAD}" if d > WIDEST_HEAD else None):
        return apply_fused(lambda x: Attention.apply(x)[0], with_tangent, qkv)
    return attention_reference(qkv)
