"""Packed keys or values as dense vectors, for kernels that know nothing of codes: look up, rotate back, scale.

Unlike the codec's decompress this reads any part of a cache, pages included, into a scratch that is used again, marks
what must not reach rows that do not see it, and rounds the rotation to half precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from turboquant_vllm.records import Operand, Tables
from turboquant_vllm.triton.config import uses_prmt
from turboquant_vllm.triton.levels import level_scale, level_table, look_up
from turboquant_vllm.triton.rotate import LIFT, half_parts
from turboquant_vllm.triton.tiles import GROUP

__all__ = ["Packed", "group_arguments", "unpack"]

_ELEMENT = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Programs per multiprocessor, each of which keeps its columns of the rotation and walks over tiles of _BLOCK tokens.
_PROGRAMS, _BLOCK, _WARPS, _STAGES, _REGISTERS = 4, 64, 4, 1, 128


@triton.jit
def _matrix(rotation, inner, outer, inverse, D: tl.constexpr, DTYPE: tl.constexpr):
    """``LIFT * inverse * rotation[inner, outer]`` in ``DTYPE``, ``[inner, outer]``."""
    mask = (inner[:, None] < D) & (outer[None, :] < D)
    matrix = tl.load(rotation + inner[:, None] * D + outer[None, :], mask=mask, other=0.0)
    return half_parts(matrix * inverse, DTYPE, 1)[0]


@triton.jit
def _read_group(rows, steps, even, odd, byte, unit, D: tl.constexpr, DTYPE: tl.constexpr):
    """Offset and outlier ``[CHUNK]`` of one group, rotated back: ``rows`` and ``steps`` point at int8 ``[2, D]``, exact in
    every dtype, and at the two float32 steps; ``unit`` is the matrices'."""
    row = tl.arange(0, 16)[:, None]  # as many as a matrix instruction takes
    pointers = rows + row * D + 2 * byte[None, :]
    mask = (row < 2) & (byte[None, :] < D // 2)
    y = tl.dot(tl.load(pointers, mask=mask, other=0).to(DTYPE), even, input_precision="ieee")
    y = tl.dot(tl.load(pointers + 1, mask=mask, other=0).to(DTYPE), odd, y, input_precision="ieee")  # [16, CHUNK]
    offset = tl.sum(tl.where(row == 0, y, 0.0), 0) * (tl.load(steps) * unit)
    return offset, tl.sum(tl.where(row == 1, y, 0.0), 0) * (tl.load(steps + 1) * unit)


@triton.jit
def _store(packed, norm, shared, live, even, odd, centroids, inverse, table, out, mask, DTYPE: tl.constexpr,
           PRMT: tl.constexpr):  # fmt: skip
    """Vectors ``[BM, CHUNK]`` of packed codes ``[BM, DP // 2]`` times ``norm [BM]`` to pointers ``out``.

    ``shared`` is None, or ``(offset, outlier, factor)`` of a tile of keys of one group, zeros where they are not ``live``.
    """
    high, low = look_up(packed, centroids, inverse, table, DTYPE, PRMT)
    y = tl.dot(high, even, input_precision="ieee")
    y = tl.dot(low, odd, y, input_precision="ieee") * norm[:, None]  # [BM, CHUNK]
    if shared is not None:
        offset, outlier, factor = shared
        y = tl.where(norm[:, None] < 0, outlier[None, :], y) + offset[None, :]
        y = tl.where(live[:, None], y * factor, 0.0)
    tl.store(out, y.to(out.dtype.element_ty), mask=mask)


# Arguments that change with a length are not specialised: a new length must never compile anything.
@triton.jit(do_not_specialize=["tiles", "tokens", "filled", "capacity", "first", "num_pages", "kn_b", "kn_h", "vn_b", "vn_h",
                               "g_b", "g_h", "s_b", "s_h"])  # fmt: skip
def unpack_both_kernel(k, k_norms, groups, steps, v, v_norms, centroids, rotation, key_scales, block_table, keys, values, tiles,
                       heads, tokens, filled, capacity, first, num_pages, k_b, k_h, k_n, k_d, kn_b, kn_h, kn_n, g_b, g_h, g_n,
                       s_b, s_h, s_n, v_b, v_h, v_n, v_d, vn_b, vn_h, vn_n, PAGE: tl.constexpr, D: tl.constexpr,
                       DP: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, DTYPE: tl.constexpr, PRMT: tl.constexpr,
                       STAGES: tl.constexpr):  # fmt: skip
    """Vectors ``first .. first + tokens`` of each head to ``[batch * heads, capacity, D]``, then zeros up to ``filled``.

    A program makes CHUNK coordinates of keys and values. With ``block_table`` these are pages of one sequence, of PAGE.
    ``groups`` and ``steps`` are those of keys with offsets, else None.
    """
    byte = tl.arange(0, DP // 2)
    inner = tl.arange(0, DP)
    outer = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    # Over its entries' magnitude, a matrix whose entries differ in sign alone is exact in half precision.
    size = tl.maximum(tl.max(tl.abs(tl.load(rotation + inner, mask=inner < D, other=0.0)), 0), 1e-30)
    even = _matrix(rotation, 2 * byte, outer, 1.0 / size, D, DTYPE)  # [DP // 2, CHUNK]
    odd = _matrix(rotation, 2 * byte + 1, outer, 1.0 / size, D, DTYPE)
    scale = level_scale(centroids, DTYPE)
    inverse = 1.0 / scale
    unit = size * scale * (1 / LIFT)
    table = ()
    if PRMT:
        table = level_table(centroids, inverse, DTYPE)
    tiles_of_head = tl.cdiv(filled, BM)
    if groups is not None:
        tl.static_assert(BM == GROUP, "a tile is a group")
        before = first % GROUP
        tiles_of_head = tl.cdiv(filled + before, BM)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        batch_head = (tile // tiles_of_head).to(tl.int64)
        token = (tile % tiles_of_head) * BM + tl.arange(0, BM).to(tl.int64)  # [BM]
        if groups is not None:
            token -= before
        live = token < tokens
        if groups is not None:
            live = live & (token >= 0)
        page, head, place = batch_head // heads, batch_head % heads, first + token
        if block_table is not None:
            page = tl.load(block_table + place // PAGE, mask=live, other=0).to(tl.int64)  # [BM]
            # A number that is no page's reads another page, and never outside the buffer.
            page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
            place %= PAGE
        mask = live[:, None] & (byte[None, :] < D // 2)
        k_rows, v_rows = page * k_b + head * k_h + place * k_n, page * v_b + head * v_h + place * v_n  # [BM]
        k_packed = tl.load(k + k_rows[:, None] + byte.to(tl.int64)[None, :] * k_d, mask=mask, other=0)  # [BM, DP // 2]
        v_packed = tl.load(v + v_rows[:, None] + byte.to(tl.int64)[None, :] * v_d, mask=mask, other=0)
        k_norm = tl.load(k_norms + page * kn_b + head * kn_h + place * kn_n, mask=live, other=0.0)
        v_norm = tl.load(v_norms + page * vn_b + head * vn_h + place * vn_n, mask=live, other=0.0)
        # Dense attention would add 0 * NaN to rows that do not see a value: NaN comes by the key, whose score is masked.
        good = tl.abs(v_norm) < float("inf")
        k_norm = tl.where(good, k_norm, float("nan")) * unit
        v_norm = tl.where(good, v_norm, 0.0) * unit
        target = (batch_head * capacity + token)[:, None] * D + outer[None, :]
        mask = (token < filled)[:, None] & (outer[None, :] < D)
        shared = None
        if groups is not None:
            mask = mask & (token >= 0)[:, None]
            # The group's first key; of tiles of zeros some key that exists.
            begin = tl.minimum(first - before + (tile % tiles_of_head) * BM, tl.maximum(first + tokens - 1, 0))
            at, head = batch_head // heads, batch_head % heads
            if block_table is not None:
                at = tl.load(block_table + begin // PAGE).to(tl.int64)
                at = tl.minimum(tl.maximum(at, 0), num_pages - 1)
                begin %= PAGE
            group = (begin // GROUP).to(tl.int64)
            factor = 1.0
            if key_scales is not None:
                factor = (1.0 / tl.load(key_scales + head * D + outer, mask=outer < D, other=1.0))[None, :]
            shared = _read_group(groups + at * g_b + head * g_h + group * g_n, steps + at * s_b + head * s_h + group * s_n,
                                 even, odd, byte, size * (1 / LIFT), D, DTYPE) + (factor,)  # fmt: skip
        _store(k_packed, k_norm, shared, live, even, odd, centroids, inverse, table, keys + target, mask, DTYPE, PRMT)
        _store(v_packed, v_norm, None, live, even, odd, centroids, inverse, table, values + target, mask, DTYPE, PRMT)


@dataclass(frozen=True)
class Packed:
    """Packed keys and values: of some sequences, or pages and the block table of one.

    Attributes:
        k, v: of some sequences, or with ``block_table`` pages for sequences and places for tokens.
        tables: what reads them.
        block_table: int32 ``[pages of the sequence]``, any numbers where no token is wanted. One that is no page's is
            taken for the nearest that is.
    """

    k: Operand
    v: Operand
    tables: Tables
    block_table: torch.Tensor | None = None


def unpack(packed: Packed, first: int, tokens: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Keys and values ``first .. first + tokens`` as dense vectors, followed by zeros, on the current device.

    A value whose norm is NaN or Inf becomes zero and its key NaN: so it reaches the rows that see it through their scores,
    and no others. The rotation is rounded to half precision, exactly for a Hadamard matrix.

    Args:
        packed: where they are.
        first, tokens: which.
        keys, values: ``[B, H, n, D]`` (B = 1 with a block table), n at least ``tokens``, of equal strides: heads of contiguous
            tokens at equal distances; fp16, bf16 or fp32. A vector beyond the range of that becomes infinite.
    """
    batch, heads, filled, head_dim = keys.shape
    exact = keys.dtype == torch.float32
    padded = max(32, 1 << (head_dim - 1).bit_length())
    chunk = min(padded, 128)
    (k, k_norms, *_), (v, v_norms, *_), (centroids, rotation, key_scales) = packed.k, packed.v, packed.tables
    groups, steps, *apart = group_arguments(packed.k)
    before = 0 if groups is None else first % _BLOCK
    tiles, chunks = batch * heads * -(-(filled + before) // _BLOCK), -(-head_dim // chunk)
    if not filled or not tiles:
        return
    table = packed.block_table
    assert k_norms is not None
    assert v_norms is not None
    prmt = uses_prmt(keys.device.type) and not exact
    limit = {"maxnreg": _REGISTERS} if prmt and padded <= 128 else {}
    unpack_both_kernel[(min(tiles, max(1, _PROGRAMS * processors(keys.device) // chunks)), chunks)](
        k, k_norms, groups, steps, v, v_norms, centroids, rotation, key_scales, table, keys, values, tiles, heads, tokens,
        filled, keys.stride(1) // head_dim, first, k.shape[0], *k.stride(), *k_norms.stride(), *apart, *v.stride(),
        *v_norms.stride(), PAGE=1 if table is None else k.shape[2], D=head_dim, DP=padded, CHUNK=chunk, BM=_BLOCK,
        # float16 holds levels better than bfloat16, whatever the result is rounded to.
        DTYPE=tl.float32 if exact else tl.float16, PRMT=prmt, STAGES=_STAGES, num_warps=_WARPS, **limit,
    )  # fmt: skip


def group_arguments(k: Operand, size: int = 1) -> tuple[Any, ...]:
    """What keys share, int8 ``[B, H_kv, groups, 2, D]``, its float32 steps, and both's first three strides; Nones without.

    Each group's rows are one behind the other, its steps too, and rows in elements of ``size`` bytes; copied where they cannot.
    """
    groups, steps = k.groups, k.steps
    if groups is None or steps is None:
        return (None,) * 8
    *apart, row, last = groups.stride()
    if (row, last) != (groups.shape[-1], 1) or any(x % size for x in (*apart, groups.data_ptr())):
        groups = groups.clone(memory_format=torch.contiguous_format)
    if steps.stride(-1) != 1:
        steps = steps.contiguous()
    groups = groups.view(_ELEMENT[size])
    return groups, steps, *groups.stride()[:3], *steps.stride()[:3]


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a guess elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
