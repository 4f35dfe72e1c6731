"""Multi-head self-attention on a packed qkv.

A ViT's row is short and odd: a square of patches and the class token. The kernels waste little on what is odd. Queries meet
whole tiles of keys without masks, and the keys that are left in the smallest tile that holds them, which comes first, to
start the running sums. Queries left over have a program with a small tile of its own. Where the chip has room, the backward
keeps all queries of a row in one program, so that every product is made once; a class token left over then meets the keys
in products of vectors, beside the tensor cores.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as fwAD

from .backend import (
    ByFormula,
    Function,
    apply_fused,
    architecture,
    current,
    in_turn,
    jit,
    launch,
    pushforward,
    runs_triton,
    tl,
    triton,
)

WIDEST_HEAD = 128  # beyond it the backward's tiles outgrow the registers
SCORES = 2**26  # elements of the N x N matrices that a CPU holds at once where a tangent is wanted
LOG2_E = 1.4426950408889634  # the kernels' softmax runs on exp2, so the scale carries this factor


def heads_first(qkv):
    """Queries, keys and values, each [B, H, N, d]."""
    return qkv.permute(2, 0, 3, 1, 4)


def attention_reference(qkv):
    q, k, v = heads_first(qkv)
    q = q * q.shape[-1] ** -0.5  # here rather than on the N x N scores, which are larger
    weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)  # [B, H, N, N]
    return (weights @ v).transpose(1, 2).flatten(2)  # [B, N, H*d]


@jit
def load_rows(p_head, start, N, stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WITHIN: tl.constexpr):
    """Rows start.. of one head, [ROWS, COLS]; zeros beyond D, and beyond N unless all rows are WITHIN it."""
    o_n, o_d = tl.arange(0, ROWS), tl.arange(0, COLS)  # [ROWS], [COLS]
    p_head += tl.full([], start, tl.int64) * stride  # the tile itself is small: 32-bit offsets spare registers
    p_rows = p_head + o_n[:, None] * stride + o_d[None, :]
    if not WITHIN:
        b_x = tl.load(p_rows, mask=(start + o_n < N)[:, None] & (o_d < D)[None, :], other=0)
    elif D < COLS:
        b_x = tl.load(p_rows, mask=(o_d < D)[None, :], other=0)
    else:
        b_x = tl.load(p_rows)
    return b_x


@jit
def store_rows(p_head, start, b_x, N, stride, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, WITHIN: tl.constexpr):
    o_n, o_d = tl.arange(0, ROWS), tl.arange(0, COLS)  # [ROWS], [COLS]
    p_head += tl.full([], start, tl.int64) * stride  # the tile itself is small: 32-bit offsets spare registers
    p_rows = p_head + o_n[:, None] * stride + o_d[None, :]
    if not WITHIN:
        tl.store(p_rows, b_x, mask=(start + o_n < N)[:, None] & (o_d < D)[None, :])
    elif D < COLS:
        tl.store(p_rows, b_x, mask=(o_d < D)[None, :])
    else:
        tl.store(p_rows, b_x)


@jit
def dot(b_a, b_b):
    """a @ b in float32; float32 operands without TF32."""
    return tl.dot(b_a, b_b, input_precision="ieee")


# -- forward, and with a tangent --------------------------------------------------------------------------------------


@jit
def load_both(
    p_x,
    p_tx,
    start,
    N,
    stride,
    TANGENT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WITHIN: tl.constexpr,
):
    """`load_rows` of queries, keys or values, and of their tangents where there are any."""
    b_x = load_rows(p_x, start, N, stride, D, ROWS, COLS, WITHIN)
    if TANGENT:
        b_tx = load_rows(p_tx, start, N, stride, D, ROWS, COLS, WITHIN)
    else:
        b_tx = b_x  # not read
    return b_x, b_tx


@jit
def attend(
    b_q,
    b_tq,
    b_k,
    b_tk,
    b_v,
    b_tv,
    m_k,
    scale,
    slope,
    running,
    FIRST: tl.constexpr,
    TANGENT: tl.constexpr,
):
    """The online softmax of some queries meets a tile of keys and values. Running: maximum, sum of weights, (mean,) output.

    With a TANGENT also ts, the tangents of the scores: their running mean, weighted by p, and the output's tangent, the sum
    of p ((ts - mean) v + tv). The mean is taken off before rounding: off the final sums, large tangents would cancel.

    The FIRST tile sets the running values, and may hold rows that are no keys: m_k says which are."""
    # [queries, keys]: b_s, b_ts, b_p, b_tp
    b_s = dot(b_q, tl.trans(b_k))
    if TANGENT:
        b_ts = (dot(b_tq, tl.trans(b_k)) + dot(b_q, tl.trans(b_tk))) * slope  # zero where there is no key
    # [queries]: b_max, b_new, b_sum, b_shrink, b_mean, b_step; [queries, COLS]: b_out, b_tout
    if FIRST:
        b_mean, b_tout = 0.0, 0.0  # not read without a TANGENT
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_new = tl.max(b_s, axis=1) * scale
        b_p = tl.exp2(b_s * scale - b_new[:, None])
        b_sum = tl.sum(b_p, axis=1)
        b_out = dot(b_p.to(b_v.dtype), b_v)
        if TANGENT:
            b_mean = tl.sum(b_p * b_ts, axis=1) / b_sum
            b_tp = b_p * (b_ts - b_mean[:, None])
            b_tout = dot(b_tp.to(b_v.dtype), b_v)
    else:
        b_max, b_sum, b_mean, b_out, b_tout = running
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1) * scale)
        b_p, b_shrink = tl.exp2(b_s * scale - b_new[:, None]), tl.exp2(b_max - b_new)
        b_sum = b_sum * b_shrink + tl.sum(b_p, axis=1)
        if TANGENT:
            b_ts -= b_mean[:, None]
            b_step = tl.sum(b_p * b_ts, axis=1) / b_sum
            b_mean += b_step
            b_tp = b_p * (b_ts - b_step[:, None])
            b_tout = (b_tout - b_step[:, None] * b_out) * b_shrink[:, None] + dot(b_tp.to(b_v.dtype), b_v)
        b_out = b_out * b_shrink[:, None] + dot(b_p.to(b_v.dtype), b_v)
    if TANGENT:
        b_tout += dot(b_p.to(b_v.dtype), b_tv)
    return b_new, b_sum, b_mean, b_out, b_tout


@jit
def attention_rows(
    tensors,
    start,
    numbers,
    TANGENT: tl.constexpr,
    ROWS: tl.constexpr,
    WITHIN: tl.constexpr,
    WHOLE: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
):
    """Queries start.. past all keys."""
    p_q, p_tq, p_out, p_tout, p_lse = tensors
    N, H, scale, slope = numbers
    p_k, p_v, stride, last = p_q + H * D, p_q + 2 * H * D, 3 * H * D, (N - 1) // KEYS * KEYS
    if TANGENT:
        p_tk, p_tv = p_tq + H * D, p_tq + 2 * H * D
    else:
        p_tk, p_tv = None, None
    # [ROWS, COLS]
    b_q, b_tq = load_both(p_q, p_tq, start, N, stride, TANGENT, D, ROWS, COLS, WITHIN)
    # [LAST, COLS], and which of these rows are keys
    b_k_last, b_tk_last = load_both(p_k, p_tk, last, N, stride, TANGENT, D, LAST, COLS, False)
    b_v_last, b_tv_last = load_both(p_v, p_tv, last, N, stride, TANGENT, D, LAST, COLS, False)
    m_k = last + tl.arange(0, LAST) < N
    running = attend(b_q, b_tq, b_k_last, b_tk_last, b_v_last, b_tv_last, m_k, scale, slope, None, True, TANGENT)
    if not WHOLE:
        for j in range(0, last, KEYS):
            # [KEYS, COLS]
            b_k, b_tk = load_both(p_k, p_tk, j, N, stride, TANGENT, D, KEYS, COLS, True)
            b_v, b_tv = load_both(p_v, p_tv, j, N, stride, TANGENT, D, KEYS, COLS, True)
            running = attend(b_q, b_tq, b_k, b_tk, b_v, b_tv, None, scale, slope, running, False, TANGENT)
    b_max, b_sum, _, b_out, b_tout = running
    b_share = tl.div_rn(1.0, b_sum)[:, None]
    store_rows(p_out, start, b_out * b_share, N, H * D, D, ROWS, COLS, WITHIN)
    if TANGENT:
        store_rows(p_tout, start, b_tout * b_share, N, H * D, D, ROWS, COLS, WITHIN)
    else:
        o_n = start + tl.arange(0, ROWS)
        tl.store(p_lse + o_n, b_max + tl.log2(b_sum), mask=o_n < N)


@jit
def attention_kernel(
    p_qkv,
    p_tangent,
    p_out,
    p_tout,
    p_lse,
    N,
    H,
    scale,
    slope,
    parts,
    TANGENT: tl.constexpr,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    WHOLE: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
):
    """Output and log-sum-exps; with a TANGENT, output and its tangent."""
    i_row, start = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * ROWS  # row: an image's head
    i_b, i_h = i_row // H, i_row % H
    p_qkv, p_out = p_qkv + (i_b * N * 3 * H + i_h) * D, p_out + (i_b * N * H + i_h) * D
    if TANGENT:
        p_tangent, p_tout = p_tangent + (i_b * N * 3 * H + i_h) * D, p_tout + (i_b * N * H + i_h) * D
    else:
        p_lse += i_row * N
    tensors, numbers = (p_qkv, p_tangent, p_out, p_tout, p_lse), (N, H, scale, slope)
    if not REST:
        attention_rows(tensors, start, numbers, TANGENT, ROWS, False, WHOLE, KEYS, LAST, D, COLS)
    elif start + ROWS <= N:
        attention_rows(tensors, start, numbers, TANGENT, ROWS, True, WHOLE, KEYS, LAST, D, COLS)
    else:
        attention_rows(tensors, start, numbers, TANGENT, REST, False, WHOLE, KEYS, LAST, D, COLS)


# -- backward ---------------------------------------------------------------------------------------------------------


@jit
def load_queries(
    p_q,
    p_out,
    p_grad,
    p_lse,
    start,
    N,
    H,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WITHIN: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Queries start.., cotangents of their outputs, log-sum-exps, and (not for a WHOLE row) delta = <cotangent, output>."""
    # [ROWS, COLS]: b_q, b_do, b_o; [ROWS]: b_lse, b_delta
    b_q = load_rows(p_q, start, N, 3 * H * D, D, ROWS, COLS, WITHIN)
    b_do = load_rows(p_grad, start, N, H * D, D, ROWS, COLS, WITHIN)
    o_n = start + tl.arange(0, ROWS)
    b_lse = tl.load(p_lse + o_n, mask=o_n < N, other=0)
    if WHOLE:
        b_delta = b_lse  # not read
    else:
        b_o = load_rows(p_out, start, N, H * D, D, ROWS, COLS, WITHIN)
        b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
    return b_q, b_do, b_lse, b_delta


@jit
def weigh(queries, b_k, b_v, m_k, scale, MASKED: tl.constexpr, WHOLE: tl.constexpr):
    """The weights of keys for queries, [queries, keys], and the cotangents of their scores."""
    b_q, b_do, b_lse, b_delta = queries
    # [queries, keys]
    b_p = tl.exp2(dot(b_q, tl.trans(b_k)) * scale - b_lse[:, None])
    b_dp = dot(b_do, tl.trans(b_v))
    if MASKED:
        b_p = tl.where(m_k[None, :], b_p, 0.0)
    if WHOLE:  # all keys are here: no rounding of b_lse need stay, and no output be read
        b_p *= tl.div_rn(1.0, tl.sum(b_p, axis=1))[:, None]
        b_delta = tl.sum(b_p * b_dp, axis=1)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return b_p.to(b_q.dtype), b_ds.to(b_q.dtype)


@jit
def meet_keys(
    p_qkv,
    p_grad_qkv,
    j,
    queries,
    token,
    b_dq,
    b_dq_token,
    N,
    H,
    scale,
    slope,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    TOKEN: tl.constexpr,
    WHOLE: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
):
    """All queries of a row meet keys j..: add to the queries' gradients, write the keys' and values'."""
    # [KEYS, COLS], and which of these rows are keys
    b_k = load_rows(p_qkv + H * D, j, N, 3 * H * D, D, KEYS, COLS, not MASKED)
    b_v = load_rows(p_qkv + 2 * H * D, j, N, 3 * H * D, D, KEYS, COLS, not MASKED)
    m_k = j + tl.arange(0, KEYS) < N
    # [ROWS, KEYS]
    b_p, b_ds = weigh(queries, b_k, b_v, m_k, scale, MASKED, WHOLE)
    b_dq += dot(b_ds, b_k)  # [ROWS, COLS]
    # [COLS, KEYS]: sm_100's tensor cores want 64 rows, and KEYS may be 32
    b_dk = dot(tl.trans(queries[0]), b_ds)
    b_dv = dot(tl.trans(queries[1]), b_p)
    if TOKEN:
        b_q, b_do, lse, delta = token  # [COLS], [COLS], and two numbers
        # [KEYS]: b_p, b_ds
        b_p = tl.exp2(tl.sum(b_k * b_q[None, :], axis=1) * scale - lse)
        if MASKED:
            b_p = tl.where(m_k, b_p, 0.0)
        b_ds = b_p * (tl.sum(b_v * b_do[None, :], axis=1) - delta)
        b_dq_token += b_ds[:, None] * b_k  # [KEYS, COLS], summed at the end
        b_dk += b_q[:, None] * b_ds[None, :]
        b_dv += b_do[:, None] * b_p[None, :]
    store_rows(p_grad_qkv + H * D, j, tl.trans(b_dk) * slope, N, 3 * H * D, D, KEYS, COLS, not MASKED)
    store_rows(p_grad_qkv + 2 * H * D, j, tl.trans(b_dv), N, 3 * H * D, D, KEYS, COLS, not MASKED)
    return b_dq, b_dq_token


@jit
def attention_backward_kernel(
    p_qkv,
    p_out,
    p_grad,
    p_lse,
    p_grad_qkv,
    N,
    H,
    scale,
    slope,
    ROWS: tl.constexpr,
    TOKEN: tl.constexpr,
    WHOLE: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program a row: it holds all queries, but for a TOKEN beyond ROWS, and meets the keys tile by tile."""
    N = ROWS + 1 if TOKEN else N  # the same, but known to the compiler
    i_row = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_row // H, i_row % H
    p_qkv, p_grad_qkv = p_qkv + (i_b * N * 3 * H + i_h) * D, p_grad_qkv + (i_b * N * 3 * H + i_h) * D
    p_out, p_grad, p_lse = p_out + (i_b * N * H + i_h) * D, p_grad + (i_b * N * H + i_h) * D, p_lse + i_row * N
    stride, last, o_d = 3 * H * D, (N - 1) // KEYS * KEYS, tl.arange(0, COLS)
    queries = load_queries(p_qkv, p_out, p_grad, p_lse, 0, N, H, D, ROWS, COLS, TOKEN, WHOLE)
    b_dq = tl.zeros([ROWS, COLS], tl.float32)
    # of the token: [COLS]
    token, b_dq_token, b_dq_token_last = None, 0.0, 0.0
    if TOKEN:
        b_q = tl.load(p_qkv + ROWS * stride + o_d, mask=o_d < D, other=0).to(tl.float32)
        b_do = tl.load(p_grad + ROWS * H * D + o_d, mask=o_d < D, other=0).to(tl.float32)
        b_o = tl.load(p_out + ROWS * H * D + o_d, mask=o_d < D, other=0).to(tl.float32)
        token = (b_q, b_do, tl.load(p_lse + ROWS), tl.sum(b_do * b_o, axis=0))
        b_dq_token, b_dq_token_last = tl.zeros([KEYS, COLS], tl.float32), tl.zeros([LAST, COLS], tl.float32)
    b_dq, b_dq_token_last = meet_keys(
        p_qkv, p_grad_qkv, last, queries, token, b_dq, b_dq_token_last, N, H, scale, slope, LAST, True, TOKEN, WHOLE, D, COLS
    )
    if not WHOLE:
        for j in range(0, last, KEYS):
            b_dq, b_dq_token = meet_keys(
                p_qkv, p_grad_qkv, j, queries, token, b_dq, b_dq_token, N, H, scale, slope, KEYS, False, TOKEN, WHOLE, D, COLS
            )
    store_rows(p_grad_qkv, 0, b_dq * slope, N, stride, D, ROWS, COLS, TOKEN)
    if TOKEN:
        b_dq = tl.sum(b_dq_token, axis=0) + tl.sum(b_dq_token_last, axis=0)
        tl.store(p_grad_qkv + ROWS * stride + o_d, b_dq * slope, mask=o_d < D)


@jit
def gradient_of_queries(
    p_qkv, j, queries, b_dq, N, H, scale, KEYS: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr
):
    """Add to the gradients of queries what keys j.. bring."""
    # [KEYS, COLS]
    b_k = load_rows(p_qkv + H * D, j, N, 3 * H * D, D, KEYS, COLS, not MASKED)
    b_v = load_rows(p_qkv + 2 * H * D, j, N, 3 * H * D, D, KEYS, COLS, not MASKED)
    # [ROWS, KEYS]
    _, b_ds = weigh(queries, b_k, b_v, j + tl.arange(0, KEYS) < N, scale, MASKED, False)
    return b_dq + dot(b_ds, b_k)


@jit
def gradient_of_keys(
    p_qkv,
    p_out,
    p_grad,
    p_lse,
    j,
    b_k,
    b_v,
    b_dk,
    b_dv,
    N,
    H,
    scale,
    ROWS: tl.constexpr,
    WITHIN: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add to the gradients of keys and values what queries j.. bring: nothing beyond N, where q = do = 0.

    `weigh` the other way round, so that no product needs the transpose of what was just computed."""
    b_q, b_do, b_lse, b_delta = load_queries(p_qkv, p_out, p_grad, p_lse, j, N, H, D, ROWS, COLS, WITHIN, False)
    # [keys, queries]
    b_p = tl.exp2(dot(b_k, tl.trans(b_q)) * scale - b_lse[None, :])
    b_ds = b_p * (dot(b_v, tl.trans(b_do)) - b_delta[None, :])
    return b_dk + dot(b_ds.to(b_q.dtype), b_q), b_dv + dot(b_p.to(b_q.dtype), b_do)


@jit
def backward_rows(
    p_qkv,
    p_out,
    p_grad,
    p_lse,
    p_grad_qkv,
    start,
    N,
    H,
    scale,
    slope,
    ROWS: tl.constexpr,
    WITHIN: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
):
    stride, last = 3 * H * D, (N - 1) // KEYS * KEYS
    queries = load_queries(p_qkv, p_out, p_grad, p_lse, start, N, H, D, ROWS, COLS, WITHIN, False)
    # [ROWS, COLS], of queries and then of the keys in their places
    b_dq = tl.zeros([ROWS, COLS], tl.float32)
    b_dq = gradient_of_queries(p_qkv, last, queries, b_dq, N, H, scale, LAST, True, D, COLS)
    for j in range(0, last, KEYS):
        b_dq = gradient_of_queries(p_qkv, j, queries, b_dq, N, H, scale, KEYS, False, D, COLS)
    store_rows(p_grad_qkv, start, b_dq * slope, N, stride, D, ROWS, COLS, WITHIN)
    b_k = load_rows(p_qkv + H * D, start, N, stride, D, ROWS, COLS, WITHIN)
    b_v = load_rows(p_qkv + 2 * H * D, start, N, stride, D, ROWS, COLS, WITHIN)
    b_dk = tl.zeros([ROWS, COLS], tl.float32)
    b_dv = tl.zeros([ROWS, COLS], tl.float32)
    b_dk, b_dv = gradient_of_keys(p_qkv, p_out, p_grad, p_lse, last, b_k, b_v, b_dk, b_dv, N, H, scale, LAST, False, D, COLS)
    for j in range(0, last, KEYS):
        b_dk, b_dv = gradient_of_keys(p_qkv, p_out, p_grad, p_lse, j, b_k, b_v, b_dk, b_dv, N, H, scale, KEYS, True, D, COLS)
    store_rows(p_grad_qkv + H * D, start, b_dk * slope, N, stride, D, ROWS, COLS, WITHIN)
    store_rows(p_grad_qkv + 2 * H * D, start, b_dv, N, stride, D, ROWS, COLS, WITHIN)


@jit
def attention_backward_parts_kernel(
    p_qkv,
    p_out,
    p_grad,
    p_lse,
    p_grad_qkv,
    N,
    H,
    scale,
    slope,
    parts,
    ROWS: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
):
    """Several programs a row: each takes some queries past all keys, and the keys in their places past all queries. So no
    two programs write one place, and no sum is left to atomics, whose order varies: two of the five products come twice."""
    i_row, start = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * ROWS
    i_b, i_h = i_row // H, i_row % H
    p_qkv, p_grad_qkv = p_qkv + (i_b * N * 3 * H + i_h) * D, p_grad_qkv + (i_b * N * 3 * H + i_h) * D
    p_out, p_grad, p_lse = p_out + (i_b * N * H + i_h) * D, p_grad + (i_b * N * H + i_h) * D, p_lse + i_row * N
    if not REST:
        backward_rows(p_qkv, p_out, p_grad, p_lse, p_grad_qkv, start, N, H, scale, slope, ROWS, False, KEYS, LAST, D, COLS)
    elif start + ROWS <= N:
        backward_rows(p_qkv, p_out, p_grad, p_lse, p_grad_qkv, start, N, H, scale, slope, ROWS, True, KEYS, LAST, D, COLS)
    else:
        backward_rows(p_qkv, p_out, p_grad, p_lse, p_grad_qkv, start, N, H, scale, slope, REST, False, KEYS, LAST, D, COLS)


class Tiles(NamedTuple):
    """How a kernel cuts its work."""

    queries: int  # a program
    keys: int  # a step
    warps: int  # a program
    alone: bool = False  # a backward's program holds all queries of a row, but for a token beyond these
    rest: bool = True  # a short rest of the queries gets a tile of its own size, where they are shared


def shared_tiles(qkv, direction):
    """The Tiles of programs that may share a row. On sm_90 the fastest that were measured, on NVIDIA's others the largest that
    spill no registers (`python -m kernels.cross_compile`); of float32 and of short rows the same on all."""
    N, D, chip = qkv.shape[1], qkv.shape[4], architecture(qkv.device)
    if qkv.dtype == torch.float32:  # outside the tensor cores, and in twice the registers
        ROWS, KEYS, warps = {"forward": (64, 32, 8), "jvp": (32, 32, 8), "backward": (64, 16, 8)}[direction]
        ROWS, KEYS = (ROWS, KEYS) if D <= 64 else (16, 16)
    elif D > 64:
        ROWS, KEYS, warps = 128 if direction == "forward" else 64, 32, 8
    elif N <= 32:
        ROWS, KEYS, warps = 32, 32, 2 if direction == "forward" else 4
    elif N <= 64 or N <= 80 and direction != "backward":
        narrow = chip == "cuda:90" and (direction == "backward" or direction == "jvp" and D <= 32)
        narrow |= chip == "cuda:100" and direction == "forward" and N > 64 and D <= 32
        ROWS, KEYS, warps = 64, 32 if narrow else 64, 4
    elif chip == "cuda:90" and D <= 32:
        ROWS, KEYS, warps = {"forward": (64, 32, 2), "jvp": (32, 32, 2), "backward": (128, 32, 4)}[direction]
    elif chip == "cuda:90":
        ROWS, KEYS, warps = {"forward": (128, 64, 4), "jvp": (64, 64, 4), "backward": (128, 32, 4)}[direction]
    else:
        ROWS, KEYS, warps = {"forward": (128, 32, 4), "jvp": (128, 32, 8), "backward": (64, 32, 4)}[direction]
    return Tiles(min(ROWS, max(16, triton.next_power_of_2(N))), KEYS, warps)


def tiles_in_use(qkv, direction):
    """The Tiles of "forward", "jvp" or "backward": alone where a program's registers suffice for all queries of a row."""
    tiles = shared_tiles(qkv, direction)
    if direction == "backward":
        N, D, half, chip = qkv.shape[1], qkv.shape[4], qkv.dtype != torch.float32, architecture(qkv.device)
        if N <= min(tiles.queries, tiles.keys) or half and N <= 64 and D <= 64:
            return tiles._replace(alone=True)
        if half and N == 65 and D <= 64 and chip in ("cuda:90", "cuda:100"):
            return Tiles(64, 32, 4, alone=True)
    return tiles


def _keys(qkv, tiles):
    """The part of a configuration that all kernels share."""
    N, D, KEYS = qkv.shape[1], qkv.shape[4], tiles.keys
    LAST = max(16, triton.next_power_of_2((N - 1) % KEYS + 1))
    return {
        "KEYS": KEYS,
        "LAST": LAST,
        "D": D,
        "COLS": max(16, triton.next_power_of_2(D)),
        "num_warps": tiles.warps,
        "num_stages": 2,
    }


def _parts(qkv, tiles):
    """Programs a row, and the configuration of a kernel that runs so."""
    N, ROWS = qkv.shape[1], tiles.queries
    rest = N % ROWS
    REST = max(16, triton.next_power_of_2(rest)) if tiles.rest and N > ROWS and 0 < rest <= ROWS // 4 else 0
    return triton.cdiv(N, ROWS), {"ROWS": ROWS, "REST": REST, **_keys(qkv, tiles)}


def _scalars(qkv):
    """N, H, and the factors of the scores before exp2, and of their derivatives."""
    return qkv.shape[1], qkv.shape[3], LOG2_E * qkv.shape[4] ** -0.5, qkv.shape[4] ** -0.5


def forward_triton(qkv, tiles=None):
    """Output and log-sum-exps. `tiles`, here and below: others than those in use."""
    B, N, _, H, D = qkv.shape
    qkv, (parts, config) = qkv.contiguous(), _parts(qkv, tiles or tiles_in_use(qkv, "forward"))
    out = torch.empty(B, N, H * D, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(B, H, N, device=qkv.device, dtype=torch.float32)
    tensors = qkv, None, out, None, lse
    launch(
        attention_kernel, B * H * parts, *tensors, *_scalars(qkv), parts, TANGENT=False, WHOLE=N <= config["KEYS"], **config
    )
    return out, lse


def jvp_triton(qkv, tangent, tiles=None):
    """Output and its tangent."""
    B, N, _, H, D = qkv.shape
    qkv, (parts, config) = qkv.contiguous(), _parts(qkv, tiles or tiles_in_use(qkv, "jvp"))
    out, out_tangent = (torch.empty(B, N, H * D, device=qkv.device, dtype=qkv.dtype) for _ in range(2))
    tensors = qkv, tangent.contiguous(), out, out_tangent, None
    launch(attention_kernel, B * H * parts, *tensors, *_scalars(qkv), parts, TANGENT=True, WHOLE=N <= config["KEYS"], **config)
    return out, out_tangent


def backward_triton(out, lse, qkv, grad, tiles=None):
    """The cotangent of qkv."""
    B, N, _, H, _ = qkv.shape
    qkv, tiles = qkv.contiguous(), tiles or tiles_in_use(qkv, "backward")
    grad_qkv = torch.empty_like(qkv)
    arguments = qkv, out, grad.contiguous(), lse, grad_qkv, *_scalars(qkv)
    if tiles.alone:
        config = {"ROWS": tiles.queries, "TOKEN": N > tiles.queries, "WHOLE": N <= tiles.keys}
        launch(attention_backward_kernel, B * H, *arguments, **config, **_keys(qkv, tiles))
    else:
        parts, config = _parts(qkv, tiles)
        launch(attention_backward_parts_kernel, B * H * parts, *arguments, parts, **config)
    return grad_qkv


def backward_formula(out, lse, qkv, grad):
    return torch.func.vjp(attention_reference, qkv)[1](grad)[0]


def jvp_formula(qkv, tangent):
    return pushforward(attention_reference, (qkv,), (tangent,))


# -- a CPU's tiles: torch has a forward and a backward, but no forward mode and no second derivatives -----------------


def forward_torch(qkv):
    """Output and log-sum-exps, [B, N, H*d] and as torch keeps them."""
    qkv = qkv.contiguous()  # the operation takes the numbers of a head to be side by side, without a look
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first(qkv))
    return out.transpose(1, 2).flatten(2), lse


def backward_torch(out, lse, qkv, grad):
    """The cotangent of qkv."""
    qkv, grad = qkv.contiguous(), grad.contiguous()
    out, grad = (x.unflatten(2, qkv.shape[3:]).transpose(1, 2) for x in (out, grad))  # [B, H, N, d]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return torch.stack(backward(grad, *heads_first(qkv), out, lse, 0.0, False)).permute(1, 3, 0, 2, 4)  # [B, N, 3, H, d]


def attention_on_a_cpu(qkv):
    """Without an N x N matrix but where a tangent is wanted: there it is of a few images at a time."""
    if not qkv.numel():
        return attention_reference(qkv)  # torch's own operation divides by the number of tokens
    if fwAD.unpack_dual(qkv).tangent is None:
        return Attention.apply(TORCH, qkv)[0]
    B, N, _, H, _ = qkv.shape
    return torch.cat([attention_reference(images) for images in qkv.split(max(1, SCORES // (H * N**2)))])


# -- the Function, and what chooses -----------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """Of one kind of device."""

    forward: Callable
    backward: Callable
    jvp: Callable


TRITON = Kernels(forward_triton, backward_triton, jvp_triton)
TORCH = Kernels(forward_torch, backward_torch, jvp_formula)


def with_tangent(kernels, qkv, tangent):
    return ByFormula.apply(kernels.jvp, jvp_formula, 0, qkv, tangent)


class Attention(Function):
    @staticmethod
    def forward(kernels, qkv):
        return kernels.forward(qkv)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.kernels, qkv = inputs
        ctx.mark_non_differentiable(outputs[1])
        ctx.save_for_backward(*outputs, qkv)
        ctx.save_for_forward(qkv)

    @staticmethod
    def backward(ctx, grad, _):
        return None, ByFormula.apply(ctx.kernels.backward, backward_formula, 2, *ctx.saved_tensors, grad)

    @staticmethod
    def jvp(ctx, _, tangent):
        return with_tangent(ctx.kernels, ctx.saved_tensors[-1], tangent)[1], None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return in_turn(Attention.apply, info, in_dims, *inputs)


def attention(qkv):
    """softmax(q k' / sqrt(d)) v of every head, with no N x N matrix in memory on the Triton path, nor on a CPU unless a
    tangent is wanted.

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
        return apply_fused(lambda x: Attention.apply(TRITON, x)[0], partial(with_tangent, TRITON), qkv)
    if qkv.is_cpu and current() != "reference":
        return attention_on_a_cpu(qkv)
    return attention_reference(qkv)
