"""Pieces that all attention kernels share: loading a tile of keys or values, and the online-softmax loop.

Dense and packed operands differ in one place, ``load_tile``: it returns a tile as a tuple of *parts*, tensors ``[BN, DP]``
that together hold the tile's ``D`` coordinates. A dense tile is one part. Part j of a packed tile holds coordinates
``PARTS * w + j`` (see :mod:`turboquant_vllm.triton.levels`), so queries and accumulators are kept in the same order,
and a product over D is a sum of products over parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_vllm.triton.levels import look_up


@triton.jit
def load_tile(base, stride_n, stride_d, n, n_end, columns, centroids, inverse, table, DP: tl.constexpr,
              COLUMNS: tl.constexpr, MASKED: tl.constexpr, DTYPE: tl.constexpr, PRMT: tl.constexpr):  # fmt: skip
    """Rows ``n`` of keys or values as a tuple of parts ``[BN, DP]``; rows from ``n_end`` on, and padding, are zeros."""
    pointers = base + n[:, None] * stride_n + columns[None, :] * stride_d  # [BN, DP]
    if MASKED:
        mask = n[:, None] < n_end
        if DP != COLUMNS:
            mask = mask & (columns[None, :] < COLUMNS)
        tile = tl.load(pointers, mask=mask, other=0)
    elif DP != COLUMNS:
        tile = tl.load(pointers, mask=columns[None, :] < COLUMNS, other=0)
    else:
        tile = tl.load(pointers)
    if tile.dtype.is_int():
        return look_up(tile, centroids, inverse, table, DTYPE, PRMT)
    else:
        return (tile.to(DTYPE),)


@triton.jit
def load_norms(base, stride_n, n, n_end, MASKED: tl.constexpr):
    """Norms ``[BN]`` of rows ``n``; zero from ``n_end`` on."""
    if MASKED:
        return tl.load(base + n * stride_n, mask=n < n_end, other=0.0)
    else:
        return tl.load(base + n * stride_n)


@triton.jit
def exp2(x, PRMT: tl.constexpr):
    """``2 ** x`` in float32; on NVIDIA the bare instruction, since results below 2^-126 need no care here."""
    if PRMT:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def soft_cap(x, cap, PRMT: tl.constexpr):
    """``cap * tanh(x / cap)`` in float32; a power series near zero, where the quotient of exponentials cancels."""
    y = x * (1.0 / cap)
    size = tl.abs(y)
    e = exp2(size * -2.8853900817779268, PRMT)
    square = y * y
    series = size * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    t = tl.where(size < 0.25, series, (1 - e) / (1 + e))
    return cap * tl.where(y < 0, -t, t)


@triton.jit
def per_row(x, SWAP: tl.constexpr):
    """A vector over query rows, ready to broadcast against a tile of rows and anything, in either orientation."""
    if SWAP:
        return x[None, :]
    else:
        return x[:, None]


@triton.jit
def product(a, b, acc, SWAP: tl.constexpr):
    """``acc + a @ b``, computed as its transpose ``acc + b.T @ a.T`` (and so given and returned) where SWAP."""
    if SWAP:
        left, right = tl.trans(b), a
    else:
        left, right = a, b
    if a.dtype == tl.float32:
        # A sum of short sums rounds less than one long sum.
        return acc + tl.dot(left, right, input_precision="ieee")
    else:
        return tl.dot(left, right, acc)


@triton.jit
def attend(start, stop, q, row_scale, first, last, softcap, top, total, value_scale, acc, n_end,
           k_base, k_stride_n, k_stride_d, k_norms, k_norms_stride, v_base, v_stride_n, v_stride_d, v_norms, v_norms_stride,
           centroids, inverse, table,
           K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, K_DP: tl.constexpr, V_DP: tl.constexpr,
           K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, SWAP: tl.constexpr,
           BN: tl.constexpr, STAGES: tl.constexpr, PRMT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Take keys ``start .. stop`` into the running softmax of BM query rows: the loop of every attention kernel.

    Scores are in units of ``row_scale`` (float32 ``[BM]``, in log2), which makes the queries fit half precision at no
    cost: it multiplies inside the exponent. ``top`` is the largest so far, in log2. Values are in units of ``value_scale``,
    the largest value norm so far, which makes the weights fit. ``last`` is the last key that each row sees, and with
    WINDOW ``first`` the first; only MASKED steps look at them. ``softcap`` is None, or caps the scores, in log2.

    SWAP turns every tile over: keys, then coordinates, take the long side of the matrix instruction, and query rows the
    short side of 8. That halves the work where a group has few heads. Shapes below are those without SWAP; ``q`` comes
    as ``[K_DP, BM]`` with SWAP.
    """
    BM: tl.constexpr = row_scale.shape[0]
    KEYS: tl.constexpr = 0 if SWAP else 1  # the axis of keys in a tile of scores
    unit = row_scale
    if softcap is not None:
        unit = tl.full([BM], 1.0, tl.float32)  # capped scores are in log2 already
    k_columns = tl.arange(0, K_DP).to(tl.int64)
    v_columns = tl.arange(0, V_DP).to(tl.int64)
    for n0 in tl.range(start, stop, BN, num_stages=STAGES):
        n = n0 + tl.arange(0, BN)  # [BN]
        n64 = n.to(tl.int64)
        k = load_tile(k_base, k_stride_n, k_stride_d, n64, n_end, k_columns, centroids, inverse, table, K_DP, K_COLUMNS,
                      MASKED, DTYPE, PRMT)  # fmt: skip
        score = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
        for j in tl.static_range(K_PARTS):
            score = product(q[j], tl.trans(k[j]), score, SWAP)
        if k_norms is not None:
            score *= per_row(load_norms(k_norms, k_norms_stride, n64, n_end, MASKED), not SWAP)
        if softcap is not None:
            score = soft_cap(score * per_row(row_scale, SWAP), softcap, PRMT)
        if MASKED:
            visible = per_row(n, not SWAP) <= per_row(last, SWAP)
            if WINDOW:
                visible = visible & (per_row(n, not SWAP) >= per_row(first, SWAP))
            score = tl.where(visible, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, KEYS) * unit)  # [BM]
        # A row that has seen nothing yet subtracts zero, not -inf.
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = exp2(score * per_row(unit, SWAP) - per_row(anchor, SWAP), PRMT)  # [BM, BN]
        keep = exp2(top - anchor, PRMT)
        total = total * keep + tl.sum(p, KEYS)
        top = new_top

        v = load_tile(v_base, v_stride_n, v_stride_d, n64, n_end, v_columns, centroids, inverse, table, V_DP, V_COLUMNS,
                      MASKED, DTYPE, PRMT)  # fmt: skip
        if v_norms is not None:
            norms = load_norms(v_norms, v_norms_stride, n64, n_end, MASKED)  # [BN]
            # NaN and Inf are left out here: they reach only the rows that see them, through the weight.
            largest = tl.max(tl.where(tl.abs(norms) < float("inf"), tl.abs(norms), 0.0), 0)
            new_scale = tl.maximum(value_scale, largest)
            shrink = 1.0 / new_scale
            keep *= value_scale * shrink
            value_scale = new_scale
            p *= per_row(norms * shrink, not SWAP)
            if MASKED:
                # A hidden value's norm never enters, not even as 0 * NaN.
                p = tl.where(visible, p, 0.0)
        weight = p.to(DTYPE)
        new_acc = ()
        for j in tl.static_range(V_PARTS):
            new_acc = new_acc + (product(weight, v[j], acc[j] * per_row(keep, SWAP), SWAP),)  # [BM, V_DP]
        acc = new_acc
    return top, total, value_scale, acc
