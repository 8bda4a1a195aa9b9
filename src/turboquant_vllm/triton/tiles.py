"""Pieces that all attention kernels share: loading a tile of keys or values, and the online-softmax loop.

Operands differ in two places. ``locate`` finds their rows, in whole tensors or in pages. ``load_tile`` returns a tile as a
tuple of *parts*, tensors ``[BN, DP]`` that together hold the tile's ``D`` coordinates. A dense tile is one part. Part j of
a packed tile holds coordinates ``PARTS * w + j`` (see :mod:`turboquant_vllm.triton.levels`), so queries and accumulators
are kept in the same order, and a product over D is a sum of products over parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_vllm.records import GROUP as _GROUP
from turboquant_vllm.triton.levels import look_up

GROUP = tl.constexpr(_GROUP)  # keys that share an offset and an outlier
TOGETHER = tl.constexpr(8)  # groups whose offsets and outliers, 16 rows, are one product


@triton.jit
def find_keys(n0, n, n_end, pages, num_pages, PAGE: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):
    """The page (int64, of the tile or ``[BN]``) and the place in it (int64 ``[BN]``) of keys ``n = n0 .. n0 + BN``.

    ``pages`` points to the sequence's row of the block table. An entry that names no page is taken for the nearest that
    exists, so that nothing outside the pages is ever read.
    """
    if PAGE % BN == 0:  # tiles begin at multiples of BN
        page = tl.load(pages + n0 // PAGE)
    elif MASKED:
        page = tl.load(pages + n // PAGE, mask=n < n_end, other=0)
    else:
        page = tl.load(pages + n // PAGE)
    return tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64), (n % PAGE).to(tl.int64)


@triton.jit
def locate(base, stride, page_stride, page, place):
    """Pointers ``[BN]`` to rows of keys or values; ``page`` is None where they are in no pages."""
    if page is not None:
        base += page * page_stride
    return base + place * stride


@triton.jit
def load_tile(rows, stride_d, n, n_end, columns, levels, DP: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
              DTYPE: tl.constexpr, PRMT: tl.constexpr):  # fmt: skip
    """Keys or values ``n``, at pointers ``rows``, as a tuple of parts ``[BN, DP]``.

    Those from ``n_end`` on, and padding, are zeros. ``levels`` is ``(centroids, inverse, table)`` of
    :func:`turboquant_vllm.triton.levels.look_up`.
    """
    pointers = rows[:, None] + columns[None, :] * stride_d  # [BN, DP]
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
        return look_up(tile, levels[0], levels[1], levels[2], DTYPE, PRMT)
    else:
        return (tile.to(DTYPE),)


@triton.jit
def load_norms(pointers, n, n_end, MASKED: tl.constexpr):
    """Norms ``[BN]`` of keys or values ``n``; zero from ``n_end`` on."""
    if MASKED:
        return tl.load(pointers, mask=n < n_end, other=0.0)
    else:
        return tl.load(pointers)


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
        # A sum of short sums rounds less than one long sum. Triton would make one of them: not with a limit on imprecise sums,
        # which says nothing where float32 is exact.
        return acc + tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        return tl.dot(left, right, acc)


@triton.jit
def score_groups(first, n_end, q, unit, groups, pages, num_pages, columns, K_COLUMNS: tl.constexpr, K_PARTS: tl.constexpr,
                 PAGE: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Scores, times ``unit``, of what groups ``first .. first + TOGETHER`` share: ``[BM, 2 * TOGETHER]``.

    Column 2 i is of the offset of the i-th of them, the next of its outlier; zeros of groups that no key before ``n_end`` is
    in. ``groups`` is ``(rows, stride, page stride, steps, their stride, their page stride)``: int8 rows, in elements of as
    many bytes as there are parts, offset and outlier one behind the other, and the float32 steps that they are multiples of.
    Other arguments, and SWAP, as in :func:`attend`.
    """
    rows, stride, page_stride, steps, step_stride, step_page_stride = groups
    index = tl.arange(0, 2 * TOGETHER)
    n = (first + index // 2) * GROUP  # the first key of each
    page, place = None, n.to(tl.int64)
    if pages is not None:
        page, place = find_keys(0, n, n_end, pages, num_pages, PAGE, 2 * PAGE, True)  # no page has all of them
    place = place // GROUP
    there = n < n_end
    pointers = locate(rows, stride, page_stride, page, place) + index % 2 * K_COLUMNS  # [2 * TOGETHER]
    mask = there[:, None] & (columns[None, :] < K_COLUMNS)
    x = tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0).to(tl.int32)
    score = tl.zeros([2 * TOGETHER, BM] if SWAP else [BM, 2 * TOGETHER], tl.float32)
    for j in tl.static_range(K_PARTS):
        part = (x << (24 - 8 * j)) >> 24  # byte j and its sign: exact in every dtype
        score = product(q[j], tl.trans(part.to(DTYPE)), score, SWAP)
    step = tl.load(locate(steps, step_stride, step_page_stride, page, place) + index % 2, mask=there, other=0.0) * unit
    return score * per_row(step, not SWAP)


@triton.jit
def attend(start, stop, n_end, q, row_scale, first, last, softcap, state, keys, values, groups, pages, num_pages, levels,
           K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, K_DP: tl.constexpr, V_DP: tl.constexpr, K_PARTS: tl.constexpr,
           V_PARTS: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, MASKED: tl.constexpr, SWAP: tl.constexpr,
           BN: tl.constexpr, STAGES: tl.constexpr, PRMT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Take keys ``start .. stop`` into the running softmax of BM query rows: the loop of every attention kernel.

    ``state`` is ``(top, total, value_scale, acc)``, and so is the result. Scores are in units of ``row_scale`` (float32
    ``[BM]``, in log2), which makes the queries fit half precision at no cost: it multiplies inside the exponent. ``top`` is
    the largest so far, in log2. Values are in units of ``value_scale``, the largest value norm so far, which makes the
    weights fit. ``last`` is the last key that each row sees, and with WINDOW ``first`` the first; only MASKED steps look at
    them. ``softcap`` is None, or caps the scores, in log2.

    ``keys`` and ``values`` are ``(base, stride, column stride, page stride, norms, norm stride, norm page stride)``, norms
    None where they are dense. ``groups`` is None, or of keys with offsets what :func:`score_groups` takes. ``pages`` is None,
    or the sequence's row of the block table; pages have PAGE keys.

    SWAP turns every tile over: keys, then coordinates, take the long side of the matrix instruction, and query rows the
    short side of 8. That halves the work where a group has few heads. Shapes below are those without SWAP; ``q`` comes
    as ``[K_DP, BM]`` with SWAP.
    """
    BM: tl.constexpr = row_scale.shape[0]
    KEYS: tl.constexpr = 0 if SWAP else 1  # the axis of keys in a tile of scores
    top, total, value_scale, acc = state
    k_base, k_stride, k_column, k_page, k_norms, kn_stride, kn_page = keys
    v_base, v_stride, v_column, v_page, v_norms, vn_stride, vn_page = values
    unit = row_scale
    if softcap is not None:
        unit = tl.full([BM], 1.0, tl.float32)  # capped scores are in log2 already
    k_columns = tl.arange(0, K_DP).to(tl.int64)
    v_columns = tl.arange(0, V_DP).to(tl.int64)
    if groups is not None:
        tl.static_assert(GROUP % BN == 0, "a tile is of one group")  # tiles begin at multiples of BN
        shared = tl.zeros([2 * TOGETHER, BM] if SWAP else [BM, 2 * TOGETHER], tl.float32)
        which = per_row(tl.arange(0, 2 * TOGETHER), not SWAP)
    for n0 in tl.range(start, stop, BN, num_stages=STAGES):
        n = n0 + tl.arange(0, BN)  # [BN]
        page, place = None, n.to(tl.int64)
        if pages is not None:
            page, place = find_keys(n0, n, n_end, pages, num_pages, PAGE, BN, MASKED)
        k = load_tile(locate(k_base, k_stride, k_page, page, place), k_column, n, n_end, k_columns, levels, K_DP, K_COLUMNS,
                      MASKED, DTYPE, PRMT)  # fmt: skip
        score = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
        for j in tl.static_range(K_PARTS):
            score = product(q[j], tl.trans(k[j]), score, SWAP)
        if k_norms is not None:
            norms = load_norms(locate(k_norms, kn_stride, kn_page, page, place), n, n_end, MASKED)  # [BN]
            score *= per_row(norms, not SWAP)
        if groups is not None:
            block = n0 // (TOGETHER * GROUP)
            within = n0 - block * (TOGETHER * GROUP)
            if (n0 == start) | (within == 0):
                shared = score_groups(block * TOGETHER, n_end, q, levels[1], groups, pages, num_pages, k_columns, K_COLUMNS,
                                      K_PARTS, PAGE, SWAP, BM, DTYPE)  # fmt: skip
            at = within // GROUP * 2
            offset = tl.sum(tl.where(which == at, shared, 0.0), KEYS)  # [BM]; what other groups share may be NaN
            outlier = tl.sum(tl.where(which == at + 1, shared, 0.0), KEYS)
            score = tl.where(per_row(norms, not SWAP) < 0, per_row(outlier, SWAP), score) + per_row(offset, SWAP)
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

        v = load_tile(locate(v_base, v_stride, v_page, page, place), v_column, n, n_end, v_columns, levels, V_DP, V_COLUMNS,
                      MASKED, DTYPE, PRMT)  # fmt: skip
        if v_norms is not None:
            norms = load_norms(locate(v_norms, vn_stride, vn_page, page, place), n, n_end, MASKED)  # [BN]
            # NaN and Inf are left out here: they reach only the rows that see them, through the weight.
            largest = tl.max(tl.where(tl.abs(norms) < float("inf"), tl.abs(norms), 0.0), 0)
            new_scale = tl.maximum(value_scale, largest)
            shrink = 1.0 / new_scale
            # One, and not a number near it, where the scale stays: else what is summed would shrink a little with every tile.
            keep *= tl.where(new_scale > value_scale, value_scale * shrink, 1.0)
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
