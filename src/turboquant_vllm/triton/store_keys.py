"""Storing keys with offsets into pages in one launch: :func:`turboquant_vllm.reference_keys.store_keys`, group by group.

What a call writes of one group, its *run*, is one program's for each head: a tile whose rows are the places of the group, of
which those without a token are empty. A program finds the runs that begin among ``block`` rows by reading the slots around
them: back to the last row before them that is not left out, and forward to the end of each run. Rows that are left out are
passed over, 64 at a time and however many: each stretch of them is read by the program that comes upon its end and by the one
whose run it follows, so that all reading together grows with the number of rows.

Columns are in the order of :func:`turboquant_vllm.triton.quantise.product_columns`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turboquant_vllm.paged import PagedTQ4Cache, chunk_bytes
from turboquant_vllm.reference_keys import PRIOR_WEIGHT as _PRIOR_WEIGHT
from turboquant_vllm.triton.config import device_guard, uses_prmt
from turboquant_vllm.triton.quantise import (
    curve_of,
    encode_rotated,
    level_bytes,
    matrix_parts,
    matrix_unit,
    measure,
    product_columns,
    words_of,
)
from turboquant_vllm.triton.tiles import GROUP
from turboquant_vllm.triton.unpack import processors

__all__ = ["chunk_of", "layout_of", "parts_of", "store_keys"]

PRIOR_WEIGHT = tl.constexpr(float(_PRIOR_WEIGHT))
CHUNK = tl.constexpr(16)  # coordinates of keys that are multiplied at once
TINY = tl.constexpr(2.0**-96)  # below it keys are multiplied to, where their parts would end in subnormals
_PROGRAMS = 8  # per processor, at most about so many
# With fewer, products are those of Blackwell's tensor memory, which has no room for all of them where D is 256. At 512 a tile
# is more than the registers hold: with 16 warps Triton 3.6 loses sums of products of parts on Hopper, with 8 or 32 it does not.
_WARPS, _WARPS_OF_WIDE = 16, 8


@triton.jit
def _slots_of(slots, row, live):
    """The slots, int64 and -1 of what is left out, of rows; ``slots`` is ``(slot mapping, its stride, number of slots)``."""
    mapping, stride, num_slots = slots
    slot = tl.load(mapping + row.to(tl.int64) * stride, mask=live, other=-1).to(tl.int64)
    return tl.where((slot >= 0) & (slot < num_slots), slot, -1)


@triton.jit
def _last_before(slots, row):
    """The last row before ``row`` that is not left out; -1 if there is none."""
    found = tl.full([], -1, tl.int32)
    while (found < 0) & (row > 0):
        row -= 64
        index = row + tl.arange(0, 64)
        found = tl.max(tl.where(_slots_of(slots, index, index >= 0) >= 0, index, -1), 0)
    return found


@triton.jit
def _rows_of(slots, row, group, tokens, STEP: tl.constexpr):
    """The rows that write the places of ``group``, int32 ``[64]``, -1 where none does; and the first row of another group.

    They are looked for from ``row`` on, 64 rows after 64, or with a negative STEP 64 before 64, until another group's, among
    the first ``tokens``. That of another group is ``tokens`` if there is none.
    """
    places = tl.arange(0, 64)
    rows = tl.full([64], -1, tl.int32)
    other = tl.full([], 0, tl.int32) + tokens
    while (other == tokens) & (row < tokens) & (row > -64):
        index = row + tl.arange(0, 64)
        slot = _slots_of(slots, index, (index >= 0) & (index < tokens))
        own = (slot >= 0) & (slot // GROUP == group)
        place = tl.where(own, slot % GROUP, -1).to(tl.int32)
        rows = tl.maximum(rows, tl.max(tl.where(place[:, None] == places[None, :], index[:, None], -1), 0))
        other = tl.min(tl.where((slot >= 0) & (slot // GROUP != group), index, tokens), 0)
        row += STEP
    return rows, other


# What a matrix product gives is reduced to one number over two axes: see quantise.measure.
@triton.jit
def _count(x):
    """How many of ``x [64]``, which are of rows, are true; float32."""
    return tl.sum(tl.sum(x.to(tl.float32)[None, :], 0), 0)


@triton.jit
def _farthest(x):
    """The largest of ``x [64]``, which are of rows, and the first place of it."""
    largest = tl.max(tl.max(x[None, :], 0), 0)
    return largest, tl.min(tl.min(tl.where(x == largest, tl.arange(0, 64), 64)[None, :], 0), 0)


@triton.jit
def _is_finite(x):
    """Whether all coordinates of vectors ``[n, DP]`` are finite, ``[n]``."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1) == 0


@triton.jit
def _scaled_keys(keys, rows, head, inner, D: tl.constexpr):
    """``w * k [64, n]`` of coordinates ``inner [n]``, as :func:`_rotate_keys` takes the rest; as they are without scales."""
    k, _, scales, k_n, k_h, k_d = keys
    at = (k + rows.to(tl.int64) * k_n + head * k_h)[:, None] + inner.to(tl.int64)[None, :] * k_d
    x = tl.load(at, mask=(rows >= 0)[:, None] & (inner < D)[None, :], other=0.0)
    if scales is not None:
        x = x.to(tl.float32) * tl.load(scales + head * D + inner, mask=inner < D, other=0.0)[None, :]
    return x


@triton.jit
def _rotate_keys(keys, rows, head, outer, D: tl.constexpr, DP: tl.constexpr, K_PARTS: tl.constexpr,
                 PARTS: tl.constexpr, HADAMARD: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """``(w * k) @ rotation.T`` of the keys of ``rows [64]``, float32 ``[64, DP]``; zeros where a row is -1.

    Keys and the rotation are each the sum of some numbers of DTYPE, K_PARTS and PARTS of them, so that products are exact.
    """
    y = tl.zeros([64, DP], tl.float32)
    lift = tl.full([64], 1.0, tl.float32)
    if K_PARTS > 1:  # what is left of tiny numbers, bfloat16 has no bits for
        largest = tl.zeros([64], tl.float32)
        for first in range(0, D, CHUNK):
            x = _scaled_keys(keys, rows, head, first + tl.arange(0, CHUNK), D)
            largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), 1))
        lift = tl.where(largest < TINY, 1 / TINY, 1.0)
    for first in range(0, D, CHUNK):
        inner = first + tl.arange(0, CHUNK)
        x = _scaled_keys(keys, rows, head, inner, D)
        matrix = matrix_parts(keys[1], inner, outer, 1, D, D, HADAMARD, DTYPE, PARTS)  # [CHUNK, DP]
        pieces = ()
        if K_PARTS > 1:
            x = x.to(tl.float32) * lift[:, None]
        for _ in tl.static_range(K_PARTS):
            piece = x.to(DTYPE)
            pieces = pieces + (piece,)
            if K_PARTS > 1:
                x -= piece.to(tl.float32)
        # The smallest products come first, and those below what float32 resolves not at all.
        LAST: tl.constexpr = (K_PARTS if K_PARTS > PARTS else PARTS) - 1
        for i in tl.static_range(LAST + 1):
            for j in tl.static_range(K_PARTS):
                if 0 <= LAST - i - j and LAST - i - j < PARTS:
                    y = tl.dot(pieces[j], matrix[LAST - i - j], y, input_precision="ieee")
    y *= matrix_unit(D, HADAMARD)
    if K_PARTS > 1:
        y /= lift[:, None]
    return y


@triton.jit
def _lengths(x, live):
    """Lengths of vectors ``[64, DP]``; no square leaves the range."""
    _, length, shift = measure((x,), (x,), live, 64, 1, True)
    return length / shift


@triton.jit
def _sum_but_outlier(y, live):
    """Sum ``[DP]`` and number of the finite ones of ``y [64, DP]`` that are ``live``, but for that farthest from their mean."""
    good = live & _is_finite(y)
    y = tl.where(good[:, None], y, 0.0)
    mean = tl.sum(y, 0) / tl.maximum(_count(good), 1.0)
    _, far = _farthest(tl.where(good, _lengths(y - mean[None, :], good), -1.0))
    kept = good & (tl.arange(0, 64) != far)
    return tl.sum(tl.where(kept[:, None], y, 0.0), 0), _count(kept)


@triton.jit
def _eight_bits(x):
    """``x [DP]`` as whole numbers, float32 too, and one step; zeros have the step 0."""
    step = tl.div_rn(tl.max(tl.max(tl.abs(x)[:, None], 1), 0), tl.full([], 127.0, tl.float32))
    units = x / tl.where(step == 0, 1.0, step)
    units = (units + 12582912.0) - 12582912.0  # to the nearest, of two the even one: 1.5 * 2^23 has no room for fractions
    return tl.minimum(tl.maximum(units, -127.0), 127.0), step


@triton.jit
def chunk_of(pages, slot, head, layout):
    """Where the bytes of heads begin in the pages of slots.

    ``layout``: slots from a page to the next, tokens in a page, bytes of a head's codes and norms, bytes between
    pages. They are no constants of a kernel, since a growing cache is one page for each sequence.
    """
    page_slots, _, chunk_bytes, page_stride = layout
    return pages + slot // page_slots * page_stride + head * chunk_bytes


@triton.jit
def parts_of(layout, is_v, D: tl.constexpr):
    """Where codes and norms of the keys, or if ``is_v`` of the values, begin in a head of a page."""
    page_size = tl.cast(layout[1], tl.int64)
    return page_size * (D // 2) * is_v, page_size * (D + 4 * is_v)


@triton.jit
def _group_at(pages, slot, head, layout, D: tl.constexpr):
    """Where the bytes of a slot's group are: codes and norms of its first key, int8 rows and steps. A program for each head."""
    chunk, group = chunk_of(pages, slot, head, layout), slot % layout[0] // GROUP
    behind, heads = chunk_of(pages, slot, tl.num_programs(1).to(tl.int64), layout), tl.num_programs(1).to(tl.int64)
    of_head = layout[0] // GROUP
    shared = head * of_head + group  # groups of the heads before, and of this one
    norms = (chunk + parts_of(layout, 0, D)[1] + group * (GROUP * 4)).to(tl.pointer_type(tl.float32))
    rows = (behind + shared * (2 * D)).to(tl.pointer_type(tl.int8))
    steps = (behind + heads * of_head * (2 * D) + shared * 16).to(tl.pointer_type(tl.float32))
    return chunk + group * (GROUP * D // 2), norms, rows, steps


@triton.jit
def _offset_of(rows, steps, outer, D: tl.constexpr):
    """The offset ``[DP]`` of a group that is begun."""
    return tl.load(rows + outer, mask=outer < D, other=0).to(tl.float32) * tl.load(steps)


@triton.jit
def _mean_as_read(at, count, centroids, outer, D: tl.constexpr):
    """The mean ``[DP]`` of a group's first ``count`` keys as they read back, but for outliers and what is not finite."""
    codes, norms, rows, steps = at
    place = tl.arange(0, 64)
    norm = tl.load(norms + place, mask=place < count, other=-1.0)
    mask = (place < count)[:, None] & (outer < D)[None, :]
    byte = tl.load(codes + place[:, None] * (D // 2) + (outer // 2)[None, :], mask=mask, other=0).to(tl.int32)
    level = tl.load(centroids + tl.where((outer % 2 == 0)[None, :], byte >> 4, byte & 15))
    x = tl.where(mask, level * norm[:, None] + _offset_of(rows, steps, outer, D)[None, :], 0.0)
    good = (norm >= 0) & _is_finite(x)
    return tl.sum(tl.where(good[:, None], x, 0.0), 0) / tl.maximum(_count(good), 1.0)


@triton.jit
def _prior(keys, slots, previous, p_n, pages, layout, centroids, row, before, slot, tokens, head, outer,
           D: tl.constexpr, DP: tl.constexpr, K_PARTS: tl.constexpr,
           PARTS: tl.constexpr, HADAMARD: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The mean ``[DP]`` of the group before that of ``row``, whose first key that writes at ``slot``, and its weight.

    ``before`` is the last row before that is not left out, or -1.
    """
    prior = tl.zeros([DP], tl.float32)
    weight = tl.full([], 0.0, tl.float32)
    if previous is not None:
        last = tl.load(previous + row.to(tl.int64) * p_n).to(tl.int64)
    else:
        last = tl.where(slot % layout[0] > 0, slot - 1, -1)
    if (last >= 0) & (last < slots[2]):
        weight += PRIOR_WEIGHT
        at = _group_at(pages, last, head, layout, D)
        if _slots_of(slots, before, before >= 0) == last:
            rows, _ = _rows_of(slots, row - 64, last // GROUP, tokens, -64)
            if tl.max(tl.where(tl.arange(0, 64) == 0, rows, -1), 0) >= 0:
                y = _rotate_keys(keys, rows, head, outer, D, DP, K_PARTS, PARTS, HADAMARD, DTYPE)
                total, count = _sum_but_outlier(y, rows >= 0)
                prior += total / tl.maximum(count, 1.0)
            else:  # it began before: its keys there have made its offset
                prior += _offset_of(at[2], at[3], outer, D)
        else:
            prior += _mean_as_read(at, last % GROUP + 1, centroids, outer, D)
    return prior, weight


@triton.jit(do_not_specialize=["tokens", "block", "num_slots"])
def store_keys_kernel(k, slot_mapping, previous, pages, rotation, key_scales, companding, centroids, tokens, block, num_slots,
                      page_slots, page_size, chunk_bytes, page_stride, k_n, k_h, k_d, s_n, p_n, D: tl.constexpr,
                      DP: tl.constexpr, K_PARTS: tl.constexpr, PARTS: tl.constexpr, HADAMARD: tl.constexpr,
                      DTYPE: tl.constexpr, PRMT: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """The runs of ``k [tokens, heads, D]`` that begin among ``block`` rows, of one head, to their slots.

    ``previous`` and ``key_scales`` may be None; see :func:`turboquant_vllm.reference_keys.store_keys`.
    """
    head = tl.program_id(1).to(tl.int64)
    slots, keys = (slot_mapping, s_n, num_slots), (k, rotation, key_scales, k_n, k_h, k_d)
    layout = (page_slots, page_size, chunk_bytes, page_stride)
    outer = product_columns(0, DP)
    place = tl.arange(0, 64)
    curve = curve_of(companding)
    levels = centroids
    if PRMT and SCALE != "norm":
        levels = level_bytes(centroids)
    stop = tl.minimum((tl.program_id(0) + 1) * block, tokens)
    index = tl.program_id(0) * block + place
    own = _slots_of(slots, index, index < stop)
    first = tl.min(tl.where(own >= 0, index, stop), 0)
    before = _last_before(slots, tl.where(first < stop, first, 0))
    begun = _slots_of(slots, before, before >= 0)
    # What the first rows write of a group that a row before writes of, too, is another program's.
    row = tl.min(tl.where((own >= 0) & ((begun < 0) | (own // GROUP != begun // GROUP)), index, stop), 0)
    before = tl.maximum(before, tl.max(tl.where((own >= 0) & (index < row), index, -1), 0))
    while row < stop:
        slot = _slots_of(slots, row, row < tokens)
        rows, following = _rows_of(slots, row, slot // GROUP, tokens, 64)
        live = rows >= 0
        start = tl.min(tl.where(live, place, 64), 0)
        codes, norms, shared, steps = _group_at(pages, slot, head, layout, D)
        y = _rotate_keys(keys, rows, head, outer, D, DP, K_PARTS, PARTS, HADAMARD, DTYPE)
        if start == 0:
            total, count = _sum_but_outlier(y, live)
            if tl.sum(live.to(tl.int32), 0) < 64:
                prior, weight = _prior(keys, slots, previous, p_n, pages, layout, centroids, row, before, slot, tokens,
                                       head, outer, D, DP, K_PARTS, PARTS, HADAMARD, DTYPE)  # fmt: skip
                total, count = total + prior * weight, count + weight
            units, step = _eight_bits(total / tl.maximum(count, 1.0))
            tl.store(shared + outer, units.to(tl.int8), mask=outer < D)
            tl.store(steps, step)
            tl.store(steps + 3, 0.0)
            offset = units * step
        else:
            offset = _offset_of(shared, steps, outer, D)
        y -= offset[None, :]
        y, length, shift = measure((y,), (y,), live, 64, 1, True)
        words, norm = encode_rotated(y, length, shift, 1.0, curve, levels, 64, D, DP, 1, PRMT, SCALE)

        # The key that lies farthest from the offset, unless one that is written already lies farther.
        y = y[0] / shift[:, None]
        length = tl.where(live & _is_finite(y), length / shift, 0.0)
        distance, far = _farthest(length)
        units, step = _eight_bits(tl.sum(tl.where((place == far)[:, None] & (length > 0)[:, None], y, 0.0), 0))
        old = tl.load(norms + place, mask=place < start, other=0.0)
        known = tl.where(tl.min(old, 0) < 0, tl.load(steps + 2), -1.0)
        is_farther = distance > known
        tl.debug_barrier()  # several threads read the same numbers, which are written now
        tl.store(norms + place, tl.abs(old), mask=place < tl.where(is_farther, start, 0))
        tl.store(shared + D + outer, units.to(tl.int8), mask=outer < tl.where(is_farther, D, 0))
        tl.store(steps + 1, step, mask=is_farther)
        tl.store(steps + 2, distance, mask=is_farther)
        norm = tl.where(place == tl.where(is_farther & (distance > 0), far, -1), -norm, norm)
        tl.store(norms + place, norm, mask=live)
        word = words_of(0, DP)[None, :, :]
        to = (codes + place * (D // 2)).to(tl.pointer_type(tl.int16))
        tl.store(to[:, None, None] + word, words[0], mask=live[:, None, None] & (word < D // 4))
        before = tl.max(rows, 0)
        row = following


@dataclass(frozen=True)
class _Split:
    """In which numbers keys and the rotation are multiplied: their dtype, and how many are one of either."""

    dtype: tl.dtype
    keys: int
    rotation: int


def _split(dtype: torch.dtype, is_scaled: bool, hadamard: bool, nvidia: bool) -> _Split:
    """Such that products are as exact as in float32."""
    if dtype == torch.float32 or not nvidia:
        return _Split(tl.float32, 1, 1)
    if is_scaled:  # three times 8 bits hold float32's
        return _Split(tl.bfloat16, 3, 1 if hadamard else 3)
    if hadamard:
        return _Split(tl.float16 if dtype == torch.float16 else tl.bfloat16, 1, 1)
    # float16 in two numbers of a wider range: sums of products of its subnormals would lose bits.
    return _Split(tl.bfloat16, 2 if dtype == torch.float16 else 1, 3)


def layout_of(cache: PagedTQ4Cache) -> tuple[int, int, int, int]:
    """The numbers of :func:`chunk_of`."""
    bytes_of_head = chunk_bytes(cache.page_size, cache.head_dim, False)
    return cache.slots_per_page, cache.page_size, bytes_of_head, cache.buffer.stride(0)


def store_keys(
    k: torch.Tensor,
    cache: PagedTQ4Cache,
    slot_mapping: torch.Tensor,
    previous_slots: torch.Tensor | None,
    rotation: torch.Tensor,
    key_scales: torch.Tensor | None,
    companding: torch.Tensor,
    hadamard: bool,
    centroids: torch.Tensor,
    scale: str,
) -> None:
    """As :func:`turboquant_vllm.reference_keys.store_keys`, with the boundaries as a curve; all but strides contiguous.

    Rows of a group must stand one behind the other, in the order of their slots, and where a call goes on from one group of a
    sequence to the next, that one's rows next: only then is the mean of the group before that of its keys as they came.
    """
    tokens, heads, head_dim = k.shape
    padded = max(32, triton.next_power_of_2(head_dim))
    split = _split(k.dtype, key_scales is not None, hadamard, uses_prmt(k.device.type))
    # Few rows are a program's each, for the sake of sequences that all go on by one; of many, most begin no run.
    block = min(64, triton.cdiv(tokens * heads, _PROGRAMS * processors(k.device)))
    with device_guard(k.device):
        store_keys_kernel[(triton.cdiv(tokens, block), heads)](
            k, slot_mapping, previous_slots, cache.buffer, rotation, key_scales, companding, centroids, tokens, block,
            cache.num_slots, *layout_of(cache), *k.stride(), slot_mapping.stride(0),
            None if previous_slots is None else previous_slots.stride(0), D=head_dim, DP=padded,
            K_PARTS=split.keys, PARTS=split.rotation, HADAMARD=hadamard, DTYPE=split.dtype, PRMT=uses_prmt(k.device.type),
            SCALE=scale, num_warps=_WARPS if head_dim <= 256 else _WARPS_OF_WIDE, num_stages=1,
        )  # fmt: skip
