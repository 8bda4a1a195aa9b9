"""The three kernels of an attention call: prepare the queries, attend, merge the splits.

Query rows of one key/value head are packed: row ``position * GROUP + head`` of ``[batch * num_kv_heads, rows, D]``, so that
one tile serves all heads of a group and each key is read once. Between the kernels, coordinates are in parts order:
index ``j * (D // PARTS) + w`` holds coordinate ``PARTS * w + j``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_vllm.triton.config import WIDE as _WIDE
from turboquant_vllm.triton.levels import level_scale, level_table, power_of_two
from turboquant_vllm.triton.rotate import LIFT, rotate
from turboquant_vllm.triton.tiles import GROUP, attend, load_norms, load_tile, per_row

WIDE = tl.constexpr(_WIDE)


@triton.jit
def _coordinate(index, D: tl.constexpr, PARTS: tl.constexpr):
    """The coordinate at ``index`` of parts order."""
    return (index % (D // PARTS)) * PARTS + index // (D // PARTS)


@triton.jit
def _place(column, part: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, ORDER: tl.constexpr):
    """Where, in the order of ORDER parts, coordinate ``PARTS * column + part`` is."""
    if ORDER == PARTS:
        return part * (D // PARTS) + column
    else:
        coordinate = PARTS * column + part
        return (coordinate % ORDER) * (D // ORDER) + coordinate // ORDER


@triton.jit
def _row_offset(row, group, stride_h, stride_n, head):
    """Offset of packed row ``row`` of key/value head ``head`` in a ``[H_q, N_q, D]`` tensor."""
    return (head * group + row % group) * stride_h + (row // group) * stride_n


@triton.jit
def head_and_tile(rows, BM: tl.constexpr):
    """A program's head (int64) and tile of its ``rows``, and how many heads there are.

    All tiles of all heads are in the first axis of the grid, neighbouring heads side by side: the other axes end at 65535.
    """
    heads = tl.num_programs(0) // tl.cdiv(rows, BM)
    return (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads, heads.to(tl.int64)


@triton.jit
def _rotate_chunk(x, first, source, q_d, rotation, key_scales, live, coordinate, D: tl.constexpr, CHUNK: tl.constexpr,
                  HALF: tl.constexpr):  # fmt: skip
    """``x [BM, DP]``, and what coordinates ``first .. first + CHUNK`` of queries ``source [BM]`` add to their rotation."""
    inner = first + tl.arange(0, CHUNK)
    mask = live[:, None] & (inner[None, :] < D)
    part = tl.load(source[:, None] + inner.to(tl.int64)[None, :] * q_d, mask=mask, other=0.0)  # [BM, CHUNK]
    if key_scales is not None:
        part = part.to(tl.float32) / tl.load(key_scales + inner, mask=inner < D, other=1.0)[None, :]
    mask = (inner[:, None] < D) & (tl.arange(0, x.shape[1])[None, :] < D)
    matrix = tl.load(rotation + coordinate[None, :] * D + inner[:, None], mask=mask, other=0.0)  # [CHUNK, DP]
    return rotate(part, matrix, x, HALF)


# Arguments that change with a length are not specialised: a new length must never compile anything.
@triton.jit(do_not_specialize=["rows", "q_b", "q_h"])
def query_kernel(q, rotation, key_scales, out, out_scale, rows, group, num_kv_heads, factor, q_b, q_h, q_n, q_d,
                 D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, ROTATE: tl.constexpr, BM: tl.constexpr,
                 CHUNK: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Rotate, scale and pack queries: ``out * out_scale = factor * ((q / key_scales) @ rotation.T)``, in parts order.

    ``out_scale`` is a power of two near each row's largest magnitude, so that ``out`` fits half precision.
    """
    batch_head, tile, _ = head_and_tile(rows, BM)
    row = tile * BM + tl.arange(0, BM)  # [BM]
    batch, head = batch_head // num_kv_heads, batch_head % num_kv_heads
    source = q + batch * q_b + _row_offset(row.to(tl.int64), group, q_h, q_n, head)
    index = tl.arange(0, DP)
    coordinate = _coordinate(index, D, PARTS)
    live = (row[:, None] < rows) & (index[None, :] < D)
    if ROTATE:
        if key_scales is not None:
            key_scales += head * D
        x = tl.zeros([BM, DP], tl.float32)
        if DP <= WIDE:
            # Unrolled, the widest takes compilers for some devices most of a minute.
            for first in tl.range(0, DP, CHUNK, num_stages=1, loop_unroll_factor=1 if DP > 128 else DP // CHUNK):
                x = _rotate_chunk(x, first, source, q_d, rotation, key_scales, row < rows, coordinate, D, CHUNK, HALF)
        else:
            for first in tl.range(0, D, CHUNK, num_stages=1):
                x = _rotate_chunk(x, first, source, q_d, rotation, key_scales, row < rows, coordinate, D, CHUNK, HALF)
        x *= 1 / LIFT
    else:
        x = tl.load(source[:, None] + coordinate.to(tl.int64)[None, :] * q_d, mask=live, other=0.0).to(tl.float32)
    # Only the sign of the factor touches the queries: a power of two is all that may, exactly.
    x = tl.where(factor < 0, -x, x)
    scale = power_of_two(tl.maximum(tl.max(tl.abs(x), 1), 1e-30))  # [BM]
    target = batch_head * rows + row  # [BM]
    tl.store(out + target[:, None] * D + index[None, :], (x / scale[:, None]).to(out.dtype.element_ty), mask=live)
    # Never zero: a hidden key's -inf times this must stay -inf.
    tl.store(out_scale + target, tl.maximum(scale * tl.abs(factor), 1e-30), mask=row < rows)


@triton.jit(do_not_specialize=["tokens", "capacity", "n_b", "n_h", "v_b", "v_h", "g_b", "g_h", "s_b", "s_h"])
def unpack_kernel(codes, norms, value_norms, groups, steps, centroids, out, tokens, capacity, num_kv_heads, c_b, c_h, c_n, c_d,
                  n_b, n_h, n_n, v_b, v_h, v_n, g_b, g_h, g_n, s_b, s_h, s_n, VALUES: tl.constexpr, PARTS: tl.constexpr,
                  COLUMNS: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, PRMT: tl.constexpr):  # fmt: skip
    """Packed vectors in the rotated basis: ``out [batch * num_kv_heads, capacity, D]``, in parts order.

    ``groups`` and ``steps`` are those of keys with offsets, else None.

    A value whose norm is NaN or Inf must reach the rows that see it and no other, but a dense product would add 0 * NaN to
    all. So it becomes zero, and its key, whose score is masked where it is hidden, becomes NaN. For keys, ``value_norms``
    are the norms of the values, or None where those are dense; for values they are ``norms`` themselves.
    """
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)  # [BN]
    batch_head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, DP)
    DTYPE: tl.constexpr = out.dtype.element_ty
    scale = level_scale(centroids, DTYPE)
    inverse = 1.0 / scale
    batch, head = batch_head // num_kv_heads, batch_head % num_kv_heads
    base = codes + batch * c_b + head * c_h
    norm = load_norms(norms + batch * n_b + head * n_h + n * n_n, n, tokens, True) * scale  # [BN]
    if value_norms is not None:
        partner = load_norms(value_norms + batch * v_b + head * v_h + n * v_n, n, tokens, True)  # [BN]
        norm = tl.where(tl.abs(partner) < float("inf"), norm, 0.0 if VALUES else float("nan"))
    table = ()
    if PRMT:
        table = level_table(centroids, inverse, DTYPE)
    parts = load_tile(base + n * c_n, c_d, n, tokens, columns, (centroids, inverse, table), DP, COLUMNS, True, DTYPE, PRMT)
    target = out + (batch_head * capacity + n[:, None]) * (COLUMNS * PARTS) + columns[None, :]
    live = (n[:, None] < tokens) & (columns[None, :] < COLUMNS)
    if groups is not None:
        tl.static_assert(GROUP % BN == 0, "a tile is of one group")
        group = (tl.program_id(1) * BN // GROUP).to(tl.int64)
        groups += batch * g_b + head * g_h + group * g_n
        steps += batch * s_b + head * s_h + group * s_n
    for j in tl.static_range(PARTS):
        x = parts[j].to(tl.float32) * norm[:, None]
        if groups is not None:
            shared = groups + columns * PARTS + j
            offset = tl.load(shared, mask=columns < COLUMNS, other=0).to(tl.float32) * tl.load(steps)
            outlier = tl.load(shared + COLUMNS * PARTS, mask=columns < COLUMNS, other=0).to(tl.float32) * tl.load(steps + 1)
            x = tl.where(norm[:, None] < 0, outlier[None, :], x) + offset[None, :]
        tl.store(target + j * COLUMNS, x.to(DTYPE), mask=live)


@triton.jit
def attend_rows(start, stop, kv_len, offset, window, softcap, q, q_scale, source, row, rows, group, keys, values, groups,
                pages, num_pages, centroids, out, lse, target, D: tl.constexpr, Q_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr,
                K_PARTS: tl.constexpr, V_PARTS: tl.constexpr, K_DP: tl.constexpr, V_DP: tl.constexpr, PAGE: tl.constexpr,
                CAUSAL: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
                PRMT: tl.constexpr):  # fmt: skip
    """Attend BM query rows of one key/value head to those of keys ``start .. stop`` that they see.

    Rows ``row .. row + BM`` of the ``rows`` of a sequence are packed rows ``source`` of the queries, and go to rows
    ``target`` of the result: float32 ``out``, normalised, in the values' basis, and ``lse`` in log2. Coordinates of q are in
    the order of Q_PARTS parts, those of out of OUT_PARTS. With CAUSAL, query position i sees keys up to ``offset + i``, and
    with a window the last of these. Other arguments as in :func:`turboquant_vllm.triton.tiles.attend`.
    """
    DTYPE: tl.constexpr = q.dtype.element_ty
    WINDOW: tl.constexpr = window is not None
    K_COLUMNS: tl.constexpr = D // K_PARTS
    V_COLUMNS: tl.constexpr = D // V_PARTS
    index = row + tl.arange(0, BM)  # [BM]
    last = tl.zeros([BM], tl.int32) + (kv_len - 1)  # [BM]
    whole = stop  # keys before this are seen by every row
    if CAUSAL:
        last = tl.minimum(last, offset + index // group)
        stop = tl.minimum(stop, offset + (tl.minimum(row + BM, rows) - 1) // group + 1)
        whole = tl.minimum(stop, offset + row // group + 1)
    first, cut = last, start
    if WINDOW:  # tiles before the window are skipped; those that it cuts, up to ``cut``, are masked
        first = offset + index // group - window + 1
        begin = start
        start += tl.maximum(offset + row // group - window + 1 - begin, 0) // BN * BN
        full = offset + (tl.minimum(row + BM, rows) - 1) // group - window + 1
        cut = tl.minimum(begin + tl.cdiv(tl.maximum(full - begin, 0), BN) * BN, stop)
    whole = cut + tl.maximum(whole - cut, 0) // BN * BN

    row_scale = tl.load(q_scale + source, mask=index < rows, other=1.0)
    columns = tl.arange(0, K_DP)
    live = (per_row(index, SWAP) < rows) & (per_row(columns, not SWAP) < K_COLUMNS)
    queries = ()
    for j in tl.static_range(K_PARTS):
        q_offsets = per_row(source * D, SWAP) + per_row(_place(columns, j, D, K_PARTS, Q_PARTS), not SWAP)  # [BM, K_DP]
        queries = queries + (tl.load(q + q_offsets, mask=live, other=0.0),)

    level_unit = 1.0
    table = ()
    if keys[4] is not None or values[4] is not None:
        level_unit = level_scale(centroids, DTYPE)
        if PRMT and (keys[0].dtype.element_ty.is_int() or values[0].dtype.element_ty.is_int()):
            table = level_table(centroids, 1.0 / level_unit, DTYPE)
    if keys[4] is not None:
        row_scale *= level_unit
    levels = (centroids, 1.0 / level_unit, table)

    acc = ()
    for _ in tl.static_range(V_PARTS):
        acc = acc + (tl.zeros([V_DP, BM] if SWAP else [BM, V_DP], tl.float32),)
    state = (tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), 1e-30, acc)
    if WINDOW:
        state = attend(
            start, cut, kv_len, queries, row_scale, first, last, softcap, state, keys, values, groups, pages, num_pages, levels,
            K_COLUMNS, V_COLUMNS, K_DP, V_DP, K_PARTS, V_PARTS, PAGE, True, True, SWAP, BN, STAGES, PRMT, DTYPE)  # fmt: skip
    state = attend(
        cut, whole, kv_len, queries, row_scale, first, last, softcap, state, keys, values, groups, pages, num_pages, levels,
        K_COLUMNS, V_COLUMNS, K_DP, V_DP, K_PARTS, V_PARTS, PAGE, False, False, SWAP, BN, STAGES, PRMT, DTYPE)  # fmt: skip
    state = attend(
        whole, stop, kv_len, queries, row_scale, first, last, softcap, state, keys, values, groups, pages, num_pages, levels,
        K_COLUMNS, V_COLUMNS, K_DP, V_DP, K_PARTS, V_PARTS, PAGE, WINDOW, True, SWAP, BN, STAGES, PRMT, DTYPE)  # fmt: skip
    top, total, value_scale, acc = state

    empty = total == 0.0
    factor = 1.0 / tl.where(empty, 1.0, total)
    if values[4] is not None:
        factor = factor * value_scale * level_unit
    v_columns = tl.arange(0, V_DP)
    live = (per_row(index, SWAP) < rows) & (per_row(v_columns, not SWAP) < V_COLUMNS)
    for j in tl.static_range(V_PARTS):
        out_offsets = per_row(target * D, SWAP) + per_row(_place(v_columns, j, D, V_PARTS, OUT_PARTS), not SWAP)
        tl.store(out + out_offsets, acc[j] * per_row(factor, SWAP), mask=live)
    log = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse + target, log, mask=index < rows)


@triton.jit(do_not_specialize=["rows", "kv_len", "offset", "split_len", "window", "kn_b", "kn_h", "vn_b", "vn_h", "g_b", "g_h",
                               "s_b", "s_h"])  # fmt: skip
def attention_kernel(q, q_scale, k, k_norms, k_groups, k_steps, v, v_norms, centroids, out, lse, rows, kv_len, offset,
                     split_len, window, softcap, group, num_kv_heads, k_b, k_h, k_n, k_d, kn_b, kn_h, kn_n, g_b, g_h, g_n, s_b,
                     s_h, s_n, v_b, v_h, v_n, v_d, vn_b, vn_h, vn_n, D: tl.constexpr, K_PARTS: tl.constexpr,
                     V_PARTS: tl.constexpr, K_DP: tl.constexpr, V_DP: tl.constexpr, CAUSAL: tl.constexpr, SWAP: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRMT: tl.constexpr):  # fmt: skip
    """Attend BM packed query rows of one key/value head to one split of its keys.

    Keys and values are packed codes with norms, or dense without norms; packed keys may have offsets.
    Writes float32 ``out [splits, batch * num_kv_heads, rows, D]``, normalised, in the values' basis and parts order, and
    ``lse [splits, batch * num_kv_heads, rows]`` in log2. ``softcap`` is in log2 too.
    """
    batch_head, tile, heads = head_and_tile(rows, BM)
    # Causal work grows with the row: the longest tiles start first.
    first_row = (tl.cdiv(rows, BM) - 1 - tile) * BM
    split = tl.program_id(1)
    batch, head = batch_head // num_kv_heads, batch_head % num_kv_heads
    start = split * split_len
    row = first_row + tl.arange(0, BM)  # [BM]
    kn_base, vn_base = k_norms, v_norms
    if k_norms is not None:
        kn_base = k_norms + batch * kn_b + head * kn_h
    if v_norms is not None:
        vn_base = v_norms + batch * vn_b + head * vn_h
    groups = None
    if k_groups is not None:
        groups = (k_groups + batch * g_b + head * g_h, g_n, 0, k_steps + batch * s_b + head * s_h, s_n, 0)
    attend_rows(
        start, tl.minimum(start + split_len, kv_len), kv_len, offset, window, softcap, q, q_scale, batch_head * rows + row,
        first_row, rows, group, (k + batch * k_b + head * k_h, k_n, k_d, 0, kn_base, kn_n, 0),
        (v + batch * v_b + head * v_h, v_n, v_d, 0, vn_base, vn_n, 0), groups, None, 0, centroids, out, lse,
        (split * heads + batch_head) * rows + row, D, K_PARTS, V_PARTS, K_PARTS, V_PARTS, K_DP,
        V_DP, 0, CAUSAL, SWAP, BM, BN, STAGES, PRMT)  # fmt: skip


@triton.jit
def merge_rows(partial, partial_lse, at, step, splits, row, rows, sinks, rotation, out, o_d, lse, D: tl.constexpr,
               DP: tl.constexpr, PARTS: tl.constexpr, ROTATE: tl.constexpr, BM: tl.constexpr, UNROLL: tl.constexpr,
               CHUNK: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Merge the splits of BM rows by their log-sum-exp, and rotate back. What ``partial`` holds may be lost.

    Split s of the rows is at rows ``at + s * step`` of ``partial`` and ``partial_lse`` (log2). ``out`` and ``lse`` are
    pointers ``[BM]`` to where the rows go; ``sinks`` pointers ``[BM]`` to one more logit each (natural), or None. Only those
    below ``rows`` of the rows ``row [BM]`` are read and written.
    """
    live = row < rows
    index = tl.arange(0, DP)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if sinks is not None:
        top = tl.load(sinks, mask=live, other=float("-inf")) * 1.4426950408889634
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BM, DP], tl.float32)
    for first in range(0, splits, UNROLL):
        for j in tl.static_range(UNROLL):  # loads of several splits in flight
            source = (first + j) * step + at
            there = row < tl.where(first + j < splits, rows, 0)
            log = tl.load(partial_lse + source, mask=there, other=float("-inf"))
            x = tl.load(partial + source[:, None] * D + index[None, :], mask=there[:, None] & (index < D)[None, :], other=0.0)
            new_top = tl.maximum(top, log)
            anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
            keep = tl.exp2(top - anchor)
            weight = tl.exp2(log - anchor)
            total = total * keep + weight
            acc = acc * keep[:, None] + x * weight[:, None]
            top = new_top
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    coordinate = _coordinate(index, D, PARTS)
    if ROTATE and DP > WIDE:
        # Through memory of its own, from where less than a row can be read: that of its rows' first split.
        own = partial + at[:, None] * D
        tl.store(own + index[None, :], acc, mask=live[:, None] & (index < D)[None, :])
        tl.debug_barrier()
        y = tl.zeros([BM, DP], tl.float32)
        for first in tl.range(0, D, CHUNK, num_stages=1):
            inner = first + tl.arange(0, CHUNK)
            x = tl.load(own + inner[None, :], mask=live[:, None] & (inner < D)[None, :], other=0.0)  # [BM, CHUNK]
            mask = (inner[:, None] < D) & (index[None, :] < D)
            matrix = tl.load(rotation + _coordinate(inner, D, PARTS)[:, None] * D + index[None, :], mask=mask, other=0.0)
            y = rotate(x, matrix, y, HALF)
        pointers = out[:, None] + index.to(tl.int64)[None, :] * o_d
        tl.store(pointers, (y * (1 / LIFT)).to(out.dtype.element_ty), mask=live[:, None] & (index < D)[None, :])
    elif ROTATE:
        for first in tl.range(0, DP, CHUNK, num_stages=1, loop_unroll_factor=1 if DP > 128 else DP // CHUNK):
            outer = first + tl.arange(0, CHUNK)
            mask = (index[:, None] < D) & (outer[None, :] < D)
            matrix = tl.load(rotation + coordinate[:, None] * D + outer[None, :], mask=mask, other=0.0)  # [DP, CHUNK]
            x = rotate(acc, matrix, tl.zeros([BM, CHUNK], tl.float32), HALF) * (1 / LIFT)  # [BM, CHUNK]
            pointers = out[:, None] + outer.to(tl.int64)[None, :] * o_d
            tl.store(pointers, x.to(out.dtype.element_ty), mask=live[:, None] & (outer[None, :] < D))
    else:
        pointers = out[:, None] + coordinate.to(tl.int64)[None, :] * o_d
        tl.store(pointers, acc.to(out.dtype.element_ty), mask=live[:, None] & (index[None, :] < D))
    log = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    tl.store(lse, log, mask=live)


@triton.jit(do_not_specialize=["rows", "splits", "o_b", "o_h", "l_b", "l_h"])
def merge_kernel(partial, partial_lse, sinks, rotation, out, lse, rows, splits, group, num_kv_heads, o_b, o_h, o_n, o_d, l_b,
                 l_h, l_n, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, ROTATE: tl.constexpr, BM: tl.constexpr,
                 UNROLL: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Merge the splits, rotate back and unpack the rows to ``out [B, H_q, N_q, D]`` and ``lse``; ``sinks [H_q]`` or None."""
    batch_head, tile, heads = head_and_tile(rows, BM)
    row = tile * BM + tl.arange(0, BM)  # [BM]
    batch, head = batch_head // num_kv_heads, batch_head % num_kv_heads
    row64 = row.to(tl.int64)
    logits = None
    if sinks is not None:
        logits = sinks + head * group + row % group
    merge_rows(
        partial, partial_lse, batch_head * rows + row, heads * rows, splits, row, rows, logits,
        rotation, out + batch * o_b + _row_offset(row64, group, o_h, o_n, head), o_d,
        lse + batch * l_b + _row_offset(row64, group, l_h, l_n, head), D, DP, PARTS, ROTATE, BM, UNROLL, CHUNK,
        HALF)  # fmt: skip
