"""The kernels of paged attention: which rows and keys a program has, around the loop that all attention shares.

Each launch serves the sequences whose numbers of query rows and keys are in its range. Those with few rows are split over
their keys, at places that follow from their own length alone; each has a fixed number of programs for its rows, mostly one.
Those with many are split over their rows: the programs form one list of tiles, in which a program finds its sequence by
bisection. Grids depend on neither lengths nor contents; a program without work returns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_vllm.triton.kernels import attend_rows, merge_rows
from turboquant_vllm.triton.tiles import GROUP

# Splits begin at multiples of this many keys: of every tile's length.
_ALIGN = tl.constexpr(64)


@triton.jit
def _first_token(sequence, cu_seqlens_q, total_tokens):
    """Where a sequence's tokens begin; a token that exists, or the end, whatever the tensor holds."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence), 0), total_tokens)


@triton.jit
def _find_tile(program, cu_seqlens_q, total_tokens, num_seqs, group, row_tiles, FEW: tl.constexpr,
               BM: tl.constexpr):  # fmt: skip
    """The sequence of a program, and its tile of BM rows there.

    With FEW, every sequence has ``row_tiles`` tiles. Without, sequence s has those from ``cu_seqlens_q[s] * group // BM + s``
    on: at least as many as it needs, since each begins one tile of its own.
    """
    if FEW:
        return program // row_tiles, program % row_tiles
    else:
        low, high = tl.full([], 0, tl.int32), num_seqs  # the sequence is in low .. high
        while high - low > 1:
            middle = (low + high) // 2
            found = _first_token(middle, cu_seqlens_q, total_tokens) * group // BM + middle <= program
            low = tl.where(found, middle, low)
            high = tl.where(found, high, middle)
        return low, program - (_first_token(low, cu_seqlens_q, total_tokens) * group // BM + low)


@triton.jit
def _measure(sequence, seq_lens, cu_seqlens_q, total_tokens, max_keys):
    """First token, number of tokens and of keys of a sequence."""
    begin = _first_token(sequence, cu_seqlens_q, total_tokens)
    end = tl.maximum(_first_token(sequence + 1, cu_seqlens_q, total_tokens), begin)
    return begin, end - begin, tl.minimum(tl.maximum(tl.load(seq_lens + sequence), 0), max_keys)


@triton.jit
def _window_of(sequence, window):
    """The sliding window of a sequence: one for all, or one of its own, at most ``config.WIDEST``."""
    if window.dtype.is_ptr():
        return tl.minimum(tl.load(window + sequence), 1 << 30)
    else:
        return window


@triton.jit
def _not_here(row, rows, keys, min_rows, max_rows, many_rows, many_pairs):
    """Whether a sequence has no such row, or its numbers of rows and keys make it another launch's."""
    many = (rows >= many_rows) & (rows.to(tl.int64) * keys >= many_pairs)
    return (rows < min_rows) | (rows > max_rows) | many | (row >= rows) | (row < 0)


@triton.jit
def _divide(q_len, kv_len, window, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """The first key that any query sees, keys per split and the number of splits, from a sequence's own sizes alone."""
    first = 0
    if window is not None:
        first = tl.maximum(kv_len - q_len + 1 - window, 0) // _ALIGN * _ALIGN
    keys = kv_len - first
    length = tl.maximum(keys, 1)
    if SPLITS > 1:
        # The power of two from MIN_SPLIT up that makes at most SPLITS of them.
        length = tl.maximum((keys + SPLITS - 1) // SPLITS, MIN_SPLIT) - 1
        for shift in tl.static_range(5):
            length |= length >> (1 << shift)
        length += 1
    return first, length, (keys + length - 1) // length


@triton.jit
def _slot(split, head, num_kv_heads, sequence, begin, group, slots, row_step):
    """Where the rows of a sequence begin among the partial results ``[splits, num_kv_heads, slots]``.

    Every sequence has ``row_step`` slots, or, where that is 0, as many as it has rows.
    """
    base = tl.where(row_step > 0, sequence * row_step, begin * group)
    return (split * num_kv_heads + head).to(tl.int64) * slots + base


@triton.jit(do_not_specialize=["total_tokens", "num_seqs", "num_pages", "max_keys", "page_step", "table_step", "slots",
                               "row_step", "row_tiles", "min_rows", "max_rows", "many_rows", "many_pairs",
                               "window"])  # fmt: skip
def paged_attention_kernel(q, q_scale, codes, norms, centroids, block_table, seq_lens, cu_seqlens_q, out, lse, total_tokens,
                           num_seqs, num_pages, max_keys, page_step, table_step, slots, row_step, row_tiles, min_rows,
                           max_rows, many_rows, many_pairs, window, softcap, group, num_kv_heads, D: tl.constexpr,
                           PAGE: tl.constexpr, OFFSETS: tl.constexpr, Q_PARTS: tl.constexpr, PARTS: tl.constexpr,
                           DP: tl.constexpr, CAUSAL: tl.constexpr, FEW: tl.constexpr, SPLITS: tl.constexpr,
                           MIN_SPLIT: tl.constexpr, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                           STAGES: tl.constexpr, PRMT: tl.constexpr):  # fmt: skip
    """Attend BM query rows of one key/value head of one sequence to one split of its keys.

    ``codes`` and ``norms`` are the buffer of a :class:`turboquant_vllm.paged.PagedTQ4Cache` in elements of PARTS codes and in
    float32; its pages are ``page_step`` times 16 bytes apart, their keys with OFFSETS or without. Queries are packed rows
    ``[num_kv_heads, total_tokens * group, D]`` in the order of Q_PARTS parts, and so are the float32 results, ``[splits,
    num_kv_heads, slots, D]``.
    """
    program = tl.program_id(0)
    if not FEW:
        program = tl.num_programs(0) - 1 - program  # causal work grows with the row: the longest tiles start first
    sequence, tile = _find_tile(program, cu_seqlens_q, total_tokens, num_seqs, group, row_tiles, FEW, BM)
    begin, q_len, kv_len = _measure(sequence, seq_lens, cu_seqlens_q, total_tokens, max_keys)
    if window is not None:
        window = _window_of(sequence, window)
    first, length, splits = _divide(q_len, kv_len, window, SPLITS, MIN_SPLIT)
    head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = q_len * group
    if _not_here(tile * BM, rows, kv_len, min_rows, max_rows, many_rows, many_pairs) | (split >= splits):
        return

    ELEMENT: tl.constexpr = PARTS // 2  # bytes of an element of codes
    CHUNK: tl.constexpr = PAGE * (D + 8)  # bytes of codes and norms of a head in a page
    k_codes = codes + head * (CHUNK // ELEMENT)
    k_norms = norms + head * (CHUNK // 4) + PAGE * D // 4
    step = page_step.to(tl.int64)
    groups = None
    if OFFSETS:
        GROUPS: tl.constexpr = PAGE // GROUP
        behind = tl.cast(num_kv_heads, tl.int64)  # the codes and norms of all heads
        shared = codes.to(tl.pointer_type(tl.int32 if PARTS == 4 else tl.int16))
        shared += behind * (CHUNK // PARTS) + head * (GROUPS * 2 * D // PARTS)
        steps = norms + behind * ((CHUNK + GROUPS * 2 * D) // 4) + head * (GROUPS * 4)
        groups = (shared, 2 * D // PARTS, step * (16 // PARTS), steps, 4, step * 4)
    keys = (k_codes, D // PARTS, 1, step * (16 // ELEMENT), k_norms, 1, step * 4)
    values = (k_codes + PAGE * D // PARTS, D // PARTS, 1, step * (16 // ELEMENT), k_norms + PAGE, 1, step * 4)
    row = tile * BM + tl.arange(0, BM)  # [BM]
    start = first + split * length
    attend_rows(
        start, tl.minimum(start + length, kv_len), kv_len, kv_len - q_len, window, softcap, q, q_scale,
        head * total_tokens * group + begin * group + row, tile * BM, rows, group, keys, values,
        groups, block_table + sequence.to(tl.int64) * table_step, num_pages, centroids, out, lse,
        _slot(split, head, num_kv_heads, sequence, begin, group, slots, row_step) + row, D, Q_PARTS, Q_PARTS, PARTS, PARTS, DP,
        DP, PAGE, CAUSAL, SWAP, BM, BN, STAGES, PRMT)  # fmt: skip


@triton.jit(do_not_specialize=["total_tokens", "num_seqs", "max_keys", "slots", "row_step", "row_tiles", "min_rows",
                               "max_rows", "many_rows", "many_pairs", "window", "o_n", "l_n"])  # fmt: skip
def paged_merge_kernel(partial, partial_lse, sinks, rotation, seq_lens, cu_seqlens_q, out, lse, total_tokens, num_seqs,
                       max_keys, slots, row_step, row_tiles, min_rows, max_rows, many_rows, many_pairs, window, group,
                       num_kv_heads, o_n, o_h, o_d, l_n, l_h, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr,
                       ROTATE: tl.constexpr, FEW: tl.constexpr, SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
                       BM: tl.constexpr, UNROLL: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """Merge the splits of BM rows of one sequence, rotate back and unpack to ``out [total_tokens, H_q, D]`` and ``lse``."""
    sequence, tile = _find_tile(tl.program_id(0), cu_seqlens_q, total_tokens, num_seqs, group, row_tiles, FEW, BM)
    begin, q_len, kv_len = _measure(sequence, seq_lens, cu_seqlens_q, total_tokens, max_keys)
    if window is not None:
        window = _window_of(sequence, window)
    _, _, splits = _divide(q_len, kv_len, window, SPLITS, MIN_SPLIT)
    head = tl.program_id(1).to(tl.int64)
    rows = q_len * group
    if _not_here(tile * BM, rows, kv_len, min_rows, max_rows, many_rows, many_pairs):
        return

    row = tile * BM + tl.arange(0, BM)  # [BM]
    token = (begin + row // group).to(tl.int64)
    q_head = head * group + row % group
    logits = None
    if sinks is not None:
        logits = sinks + q_head
    merge_rows(
        partial, partial_lse, _slot(0, head, num_kv_heads, sequence, begin, group, slots, row_step) + row,
        tl.num_programs(1).to(tl.int64) * slots, splits, row, rows, logits, rotation, out + token * o_n + q_head * o_h, o_d,
        lse + token * l_n + q_head * l_h, D, DP, PARTS, ROTATE, BM, UNROLL, CHUNK, HALF)  # fmt: skip
