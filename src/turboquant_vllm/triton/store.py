"""Storing keys and values into pages in one launch: normalise, rotate, quantise, pack.

Where a rotation takes more shared memory than there is, and norms are made of whole vectors, vectors are compressed first.
Keys with offsets have a launch of their own: :mod:`turboquant_vllm.triton.store_keys`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.triton.compress import compress, plan_tiles
from turboquant_vllm.triton.config import device_guard, uses_prmt
from turboquant_vllm.triton.quantise import (
    curve_of,
    encode_tile,
    level_bytes,
    load_pieces,
    matrix_unit,
    piece_matrices,
    product_columns,
    words_of,
)
from turboquant_vllm.triton.store_keys import chunk_of, layout_of, parts_of, store_keys

__all__ = ["store"]

_BLOCK = 16  # vectors that one program of place_kernel copies


@triton.jit
def _store_tensor(x, slots, pages, matrices, unit, curve, levels, tile, tiles, rows, num_slots, layout, x_n, x_h, x_d, s_n,
                  IS_V: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
                  PIECES: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, PRMT: tl.constexpr,
                  SCALE: tl.constexpr):  # fmt: skip
    """Store tiles ``tile``, ``tile + programs``, ... of BM rows (token, head) of keys or of values."""
    page_slots = layout[0]
    codes_at, norms_at = parts_of(layout, IS_V, D)
    for index in range(tile, tiles, tl.num_programs(0)):
        row = index * BM + tl.arange(0, BM)  # [BM]
        live = row < rows
        token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
        slot = tl.load(slots + token * s_n, mask=live, other=-1).to(tl.int64)
        v = load_pieces(x + token * x_n + head * x_h, x_d, live, tl.arange(0, DP), D, DP, PIECES)  # [BM, DP]
        words, norm = encode_tile(v, live, matrices, unit, curve, levels, BM, D, CHUNK, PARTS, PIECES, PRMT, SCALE)
        live = live & (slot >= 0) & (slot < num_slots)
        chunk = chunk_of(pages, slot, head, layout)
        to = (chunk + codes_at + slot % page_slots * (D // 2)).to(tl.pointer_type(tl.int16))
        start = 0 if CHUNK * PIECES >= D else tl.program_id(1) * CHUNK
        for i in tl.static_range(PIECES):
            place = words_of(i * DP + start, CHUNK)[None, :, :]
            mask = live[:, None, None]
            mask = mask if PIECES * DP == D else mask & (place < D // 4)
            tl.store(to[:, None, None] + place, words[i], mask=mask)
        if tl.program_id(1) == 0:
            tl.store((chunk + norms_at + slot % page_slots * 4).to(tl.pointer_type(tl.float32)), norm, mask=live)


@triton.jit(do_not_specialize=["rows", "num_slots"])
def store_kernel(k, v, slots, pages, rotation, companding, centroids, rows, num_slots, page_slots, page_size,
                 chunk_bytes, page_stride, k_n, k_h, k_d, v_n, v_h, v_d, s_n, HEADS: tl.constexpr, D: tl.constexpr,
                 DP: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr, HADAMARD: tl.constexpr,
                 BM: tl.constexpr, PRMT: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """Rows (token, head) of ``k, v [tokens, HEADS, D]`` to their slots; a program makes CHUNK coordinates of each piece.

    ``k`` is None where values alone are stored. Layout of pages: see :func:`chunk_of`.
    """
    outer = product_columns(0 if CHUNK * PIECES >= D else tl.program_id(1) * CHUNK, CHUNK)
    matrices = piece_matrices(rotation, tl.arange(0, DP), outer, 1, D, DP, 0, D, HADAMARD, v.dtype.element_ty, PARTS, PIECES)
    unit = matrix_unit(D, HADAMARD)
    curve = curve_of(companding)
    layout = (page_slots, page_size, chunk_bytes, page_stride)
    levels = centroids
    if PRMT and SCALE != "norm":
        levels = level_bytes(centroids)
    tiles = tl.cdiv(rows, BM)
    tile = tl.program_id(0)
    if k is not None:
        _store_tensor(k, slots, pages, matrices, unit, curve, levels, tile, tiles, rows, num_slots, layout, k_n, k_h, k_d,
                      s_n, False, HEADS, D, DP, CHUNK, PIECES, PARTS, BM, PRMT, SCALE)  # fmt: skip
        # Values go on where keys end: the first tile of values that is this program's.
        tile += tl.cdiv(tl.maximum(tiles - tile, 0), tl.num_programs(0)) * tl.num_programs(0) - tiles
    _store_tensor(v, slots, pages, matrices, unit, curve, levels, tile, tiles, rows, num_slots, layout, v_n, v_h, v_d, s_n,
                  True, HEADS, D, DP, CHUNK, PIECES, PARTS, BM, PRMT, SCALE)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "num_slots"])
def place_kernel(codes, norms, slots, pages, rows, num_slots, page_slots, page_size, chunk_bytes, page_stride, s_n,
                 FIRST: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Vectors that are compressed already, ``codes [n, rows, D // 2]`` and ``norms [n, rows]``, to their slots.

    They are keys and values, or where FIRST is 1 values alone.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    is_v = tl.program_id(1) + FIRST
    token, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    slot = tl.load(slots + token * s_n, mask=row < rows, other=-1).to(tl.int64)
    live = (row < rows) & (slot >= 0) & (slot < num_slots)
    source = tl.program_id(1).to(tl.int64) * rows + row  # [BM]
    byte = tl.arange(0, DP // 2)
    mask = live[:, None] & (byte[None, :] < D // 2)
    x = tl.load(codes + source[:, None] * (D // 2) + byte[None, :], mask=mask, other=0)  # [BM, DP // 2]
    layout = (page_slots, page_size, chunk_bytes, page_stride)
    codes_at, norms_at = parts_of(layout, is_v, D)
    chunk = chunk_of(pages, slot, head, layout)
    tl.store((chunk + codes_at + slot % page_slots * (D // 2))[:, None] + byte[None, :], x, mask=mask)
    norm = tl.load(norms + source, mask=live, other=0.0)
    tl.store((chunk + norms_at + slot % page_slots * 4).to(tl.pointer_type(tl.float32)), norm, mask=live)


def store(
    k: torch.Tensor,
    v: torch.Tensor,
    buffer: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor,
    companding: torch.Tensor,
    hadamard: bool,
    centroids: torch.Tensor,
    scale: str,
    page_size: int,
    has_offsets: bool = False,
    key_scales: torch.Tensor | None = None,
    previous_slots: torch.Tensor | None = None,
) -> None:
    """As :func:`turboquant_vllm.reference.store`, with the boundaries as :func:`turboquant_vllm.codebook.companding`.

    ``buffer`` is that of a :class:`turboquant_vllm.PagedTQ4Cache`; ``hadamard`` as in
    :func:`turboquant_vllm.triton.compress.compress`.
    """
    tokens, heads, head_dim = k.shape
    rows = tokens * heads
    rotation, companding, centroids = rotation.contiguous(), companding.contiguous(), centroids.contiguous()
    cache, some = PagedTQ4Cache.of_checked(buffer, page_size, heads, head_dim, has_offsets), [k, v]
    if has_offsets:
        some = [v]
        key_scales = None if key_scales is None else key_scales.contiguous()
        how = (rotation, key_scales, companding, hadamard, centroids, scale)
        store_keys(k, cache, slot_mapping, previous_slots, *how)
    shape = torch.Size((1, len(some), rows, head_dim))
    plan = plan_tiles(shape, head_dim, k.dtype, hadamard, k.device, writes=True, scale=scale)
    place = (cache.num_slots, *layout_of(cache))
    sizes = {"HEADS": heads, "D": head_dim}
    if scale != "norm" and plan.grid[1] > 1:  # such a scale is of whole vectors, and no program sees one
        codes, norms = compress(torch.stack(some), rotation, companding, hadamard, centroids, scale)
        with device_guard(k.device):
            place_kernel[(triton.cdiv(rows, _BLOCK), len(some))](
                codes, norms, slot_mapping, buffer, rows, *place, *slot_mapping.stride(), FIRST=2 - len(some), **sizes,
                DP=triton.next_power_of_2(head_dim), BM=_BLOCK,
            )  # fmt: skip
        return
    with device_guard(k.device):
        store_kernel[plan.grid](
            None if has_offsets else k, v, slot_mapping, buffer, rotation, companding, centroids, rows, *place, *k.stride(),
            *v.stride(), *slot_mapping.stride(), **sizes, HADAMARD=hadamard, PRMT=uses_prmt(k.device.type), SCALE=scale,
            **plan.constants,
        )  # fmt: skip
