"""Compress and decompress in one launch each: normalise, rotate, quantise, pack; and the inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turboquant_vllm.triton.config import WIDE, device_guard, uses_prmt
from turboquant_vllm.triton.levels import level_scale, level_table, look_up
from turboquant_vllm.triton.quantise import (
    butterfly,
    curve_of,
    encode_tile,
    level_bytes,
    load_pieces,
    matrix_unit,
    piece_matrices,
    product,
    product_columns,
    words_of,
)

__all__ = ["compress", "decompress"]

# Programs per processor, each of which walks over tiles.
_PROGRAMS = 8
# Shared memory left to tiles of vectors; the rest may hold a program's columns of the rotation.
_TILE_BYTES = 64 << 10
_ELSEWHERE = (1 << 30, 16)  # room for columns and processors, where the device does not say


@triton.jit
def _rows_of(tile, tokens, heads, stride_b, stride_h, BM: tl.constexpr):
    """Tokens of one tile of one head: ``token [BM]``, the row before the head's first, and the head's offset."""
    tiles = tl.cdiv(tokens, BM)
    head = tile // tiles
    token = (tile % tiles) * BM + tl.arange(0, BM).to(tl.int64)  # [BM]
    base = (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    return token, head.to(tl.int64) * tokens, base


@triton.jit(do_not_specialize=["tiles", "heads", "tokens"])
def compress_kernel(x, rotation, companding, centroids, codes, norms, tiles, heads, tokens, x_b, x_h, x_n, x_d,
                    D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr,
                    HADAMARD: tl.constexpr, BM: tl.constexpr, PRMT: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """Vectors ``x [batch, heads, tokens, D]`` to ``codes [rows, D // 2]`` and ``norms [rows]``.

    A program makes CHUNK coordinates of every piece of a vector; DP is the padded length of a piece.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    inner = tl.arange(0, DP)
    # Known to be zero where a program sees all columns, for the sake of registers.
    start = 0 if CHUNK * PIECES >= D else tl.program_id(1) * CHUNK
    outer = product_columns(start, CHUNK)
    matrices = piece_matrices(rotation, inner, outer, 1, D, DP, 0, D, HADAMARD, DTYPE, PARTS, PIECES)  # [DP, CHUNK]
    unit = matrix_unit(D, HADAMARD)
    curve = curve_of(companding)
    levels = centroids
    if PRMT and SCALE != "norm":
        levels = level_bytes(centroids)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token, first, base = _rows_of(tile, tokens, heads, x_b, x_h, BM)
        live = token < tokens
        v = load_pieces(x + base + token * x_n, x_d, live, inner, D, DP, PIECES)  # [BM, DP]
        words, norm = encode_tile(v, live, matrices, unit, curve, levels, BM, D, CHUNK, PARTS, PIECES, PRMT, SCALE)
        for i in tl.static_range(PIECES):
            word = words[i]
            place = words_of(i * DP + start, CHUNK)[None, :, :]
            to = codes + (first + token)[:, None, None] * (D // 2)
            mask = live[:, None, None]
            if D % 4 == 0:
                mask = mask if PIECES * DP == D else mask & (place < D // 4)
                tl.store(to.to(tl.pointer_type(tl.int16)) + place, word, mask=mask)
            else:
                for byte in tl.static_range(2):
                    tl.store(to + 2 * place + byte, (word >> (8 * byte)).to(tl.uint8), mask=mask & (2 * place + byte < D // 2))
        if tl.program_id(1) == 0:
            tl.store(norms + first + token, norm, mask=live)


@triton.jit
def _levels(packed, centroids, inverse, table, PIECES: tl.constexpr, DTYPE: tl.constexpr, PRMT: tl.constexpr):
    """Levels times ``inverse`` of the high nibbles of each piece, and of the low ones."""
    high = ()
    low = ()
    for i in tl.static_range(PIECES):
        levels = look_up(packed[i], centroids, inverse, table, DTYPE, PRMT)
        high = high + (levels[0],)
        low = low + (levels[1],)
    return high, low


@triton.jit(do_not_specialize=["tiles", "heads", "tokens"])
def decompress_kernel(codes, norms, centroids, rotation, out, tiles, heads, tokens, c_b, c_h, c_n, c_d, n_b, n_h, n_n,
                      D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr,
                      HADAMARD: tl.constexpr, BM: tl.constexpr, PRMT: tl.constexpr,
                      DTYPE: tl.constexpr):  # fmt: skip
    """Codes ``[batch, heads, tokens, D // 2]`` and norms to vectors ``out [rows, D]``; CHUNK coordinates of every piece."""
    byte = tl.arange(0, DP // 2)
    outer = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    even = piece_matrices(rotation, 2 * byte, outer, D, 1, 0, DP, D, HADAMARD, DTYPE, PARTS, PIECES)  # [DP // 2, CHUNK]
    odd = piece_matrices(rotation, 2 * byte + 1, outer, D, 1, 0, DP, D, HADAMARD, DTYPE, PARTS, PIECES)
    scale = level_scale(centroids, DTYPE)
    unit = matrix_unit(D, HADAMARD) * scale
    table = ()
    if PRMT:
        table = level_table(centroids, 1.0 / scale, DTYPE)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token, first, base = _rows_of(tile, tokens, heads, c_b, c_h, BM)
        live = token < tokens
        packed = load_pieces(codes + base + token * c_n, c_d, live, byte, D // 2, DP // 2, PIECES)  # [BM, DP // 2]
        high, low = _levels(packed, centroids, 1.0 / scale, table, PIECES, DTYPE, PRMT)
        token, first, base = _rows_of(tile, tokens, heads, n_b, n_h, BM)
        factor = tl.load(norms + base + token * n_n, mask=live, other=0.0) * unit
        # Sums of levels: each addition rounds as the levels were rounded, relative to its result.
        high, low = butterfly(high, PIECES), butterfly(low, PIECES)
        for i in tl.static_range(PIECES):
            y = product(high[i], even[i], tl.zeros([BM, CHUNK], tl.float32), PARTS)
            y = product(low[i], odd[i], y, PARTS) * factor[:, None]  # [BM, CHUNK]
            column = i * DP + outer[None, :]
            mask = live[:, None] if PIECES * DP == D else live[:, None] & (column < D)
            tl.store(out + (first + token)[:, None] * D + column, y.to(out.dtype.element_ty), mask=mask)


def compress(
    x: torch.Tensor,
    rotation: torch.Tensor,
    companding: torch.Tensor,
    hadamard: bool,
    centroids: torch.Tensor | None = None,
    scale: str = "norm",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`turboquant_vllm.reference.compress`, with the boundaries as :func:`turboquant_vllm.codebook.companding`.

    Centroids mirror each other, as the boundaries do: ``c[15 - i] = -c[i]``.

    ``hadamard`` says that rotation is a Sylvester-Hadamard matrix times signs of its columns, over sqrt(D).
    """
    head_dim = x.shape[-1]
    codes = torch.empty((*x.shape[:-1], head_dim // 2), dtype=torch.uint8, device=x.device)
    norms = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rotation, companding = rotation.contiguous(), companding.contiguous()  # which kernels read without strides
    centroids = None if centroids is None else centroids.contiguous()
    if norms.numel():
        x = _as_4d(x.float() if x.dtype == torch.float64 else x)
        plan = plan_tiles(x.shape, head_dim, x.dtype, hadamard, x.device, writes=True, scale=scale)
        whole = plan.grid[1] == 1  # each program sees all coordinates of its vectors
        with device_guard(x.device):
            compress_kernel[plan.grid](
                x, rotation, companding, companding if centroids is None else centroids, codes, norms,
                plan.tiles, x.shape[1], x.shape[2], *x.stride(),
                D=head_dim, HADAMARD=hadamard, PRMT=uses_prmt(x.device.type),
                SCALE=scale if whole else "norm", **plan.constants,
            )  # fmt: skip
        if scale != "norm" and not whole:
            assert centroids is not None
            norms = rescaled(x.reshape(*norms.shape, head_dim), codes, norms, centroids, rotation, hadamard, scale)
    return codes, norms


def rescaled(
    x: torch.Tensor,
    codes: torch.Tensor,
    lengths: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    hadamard: bool,
    scale: str,
) -> torch.Tensor:
    """Norms of a scale other than "norm", of vectors ``x [..., D]`` whose codes and lengths are known."""
    again = decompress(codes, torch.ones_like(lengths), centroids, rotation, hadamard, torch.float32)
    units = x.float() / torch.where(lengths == 0, 1.0, lengths).unsqueeze(-1)
    dot = (units * again).sum(-1)
    if scale == "least_squares":
        return lengths * dot / again.square().sum(-1)
    return lengths / torch.where(lengths == 0, 1.0, dot)


def decompress(
    codes: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    hadamard: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`turboquant_vllm.reference.decompress`; ``hadamard`` as in :func:`compress`."""
    head_dim = 2 * codes.shape[-1]
    out = torch.empty((*codes.shape[:-1], head_dim), dtype=dtype, device=codes.device)
    centroids, rotation = centroids.contiguous(), rotation.contiguous()
    if norms.numel():
        codes, norms = _as_4d(codes.contiguous()), _as_4d(norms.contiguous().unsqueeze(-1))
        # float16 holds levels better than bfloat16, whatever the result is rounded to.
        compute = torch.float32 if dtype == torch.float32 else torch.float16
        plan = plan_tiles(codes.shape, head_dim, compute, hadamard, codes.device, writes=False)
        with device_guard(codes.device):
            decompress_kernel[plan.grid](
                codes, norms, centroids, rotation, out, plan.tiles, codes.shape[1], codes.shape[2], *codes.stride(),
                *norms.stride()[:3], D=head_dim, HADAMARD=hadamard,
                PRMT=uses_prmt(codes.device.type) and compute != torch.float32,
                DTYPE=tl.float32 if compute == torch.float32 else tl.float16, **plan.constants,
            )  # fmt: skip
    return out


@dataclass(frozen=True)
class Plan:
    """A launch: its grid, the tiles that programs walk over, compile-time constants."""

    grid: tuple[int, int]
    tiles: int
    constants: dict[str, int]


def plan_tiles(
    shape: torch.Size,
    head_dim: int,
    dtype: torch.dtype,
    hadamard: bool,
    device: torch.device,
    *,
    writes: bool,
    scale: str = "norm",
) -> Plan:
    """The launch over ``shape [batch, heads, tokens, _]``: a program keeps its columns of the matrix, walks over tiles.

    ``writes`` says that vectors become codes, with norms of such a ``scale``, and not codes vectors.
    """
    exact = dtype == torch.float32
    room, processors = _ELSEWHERE
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        room = properties.shared_memory_per_block_optin - _TILE_BYTES
        processors = properties.multi_processor_count
    pieces = 1
    if hadamard and head_dim > 128 and not exact:
        # The fewest of which a program keeps all columns; where none fit, it keeps some columns of the whole.
        fit = (n for n in ((2, 4) if writes else (4,)) if head_dim * head_dim // n * dtype.itemsize <= room)
        pieces = next(fit, 1)
    padded = max(32, triton.next_power_of_2(head_dim // pieces))
    # With so little work in a tile, two at once are better; with so many coordinates, fewer vectors.
    block = 16 if exact else 128 if pieces * padded <= 64 else 64 if head_dim <= WIDE else 32
    parts = 1 if hadamard or exact else (3 if dtype == torch.bfloat16 else 2)
    chunk = padded
    while chunk > 16 and pieces * parts * padded * chunk * dtype.itemsize > room:
        chunk //= 2
    chunks = triton.cdiv(head_dim // pieces, chunk)
    assert chunks == 1 or pieces == 1
    tiles = shape[0] * shape[1] * triton.cdiv(shape[2], block)
    programs = _PROGRAMS * processors
    constants = {
        "DP": padded,
        "CHUNK": chunk,
        "PIECES": pieces,
        "PARTS": parts,
        "BM": block,
        "num_warps": 4 if chunks == 1 and head_dim <= WIDE else 8,
        "num_stages": 1,
    }
    if uses_prmt(device.type) and not exact and head_dim <= 128 and (hadamard or not writes):
        constants["maxnreg"] = 96 if writes and scale == "norm" else 128
    return Plan((min(tiles, max(1, programs // chunks)), chunks), tiles, constants)


def _as_4d(x: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, D]`` with the same elements in the same order; copied only where strides demand it."""
    if x.is_contiguous() or x.dim() > 4:
        return x.reshape(1, 1, -1, x.shape[-1])
    return x[(None,) * (4 - x.dim())]
