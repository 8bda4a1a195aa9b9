"""Compress and decompress in one launch each: normalise, rotate, quantise, pack; and the inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from turboquant_vllm.triton.launch import device_guard, uses_prmt
from turboquant_vllm.triton.levels import level_scale, level_table, look_up
from turboquant_vllm.triton.rotate import LIFT, half_parts

__all__ = ["compress", "decompress"]

# Programs per processor, each of which walks over tiles.
_PROGRAMS = 8
# Shared memory left to tiles of vectors; the rest may hold a program's columns of the rotation.
_TILE_BYTES = 64 << 10


@triton.jit
def _matrix(rotation, inner, outer, inner_stride, outer_stride, D: tl.constexpr, SIGNS: tl.constexpr, DTYPE: tl.constexpr,
            COUNT: tl.constexpr):  # fmt: skip
    """The matrix ``[inner, outer]`` of rotation's entries as a tuple of COUNT tensors of ``DTYPE`` which sum to it.

    With SIGNS the entries are +-1 / sqrt(D), and the one tensor holds their signs, exact in half precision.
    """
    mask = (inner[:, None] < D) & (outer[None, :] < D)
    matrix = tl.load(rotation + inner[:, None] * inner_stride + outer[None, :] * outer_stride, mask=mask, other=0.0)
    if SIGNS:
        return (tl.where(mask, tl.where(matrix > 0, 1.0, -1.0), 0.0).to(DTYPE),)
    else:
        return half_parts(matrix, DTYPE, COUNT)


@triton.jit
def _product(x, matrix, acc, PARTS: tl.constexpr):
    """``acc + x @ sum(matrix)`` in float32."""
    for i in tl.static_range(PARTS):
        acc = tl.dot(x, matrix[i], acc, input_precision="ieee")
    return acc


@triton.jit
def _unit(D: tl.constexpr, SIGNS: tl.constexpr):
    """What one unit of :func:`_matrix` stands for."""
    if SIGNS:
        return 1.0 / tl.sqrt_rn(tl.full([], D, tl.float32))
    else:
        return 1.0 / LIFT


# Bisection with predicates, adding where true; in float32, whose units have twice the throughput of the integer ones.
# Cells mirror each other: with index 0..7 by magnitude, 8 + index above zero and 7 - index below, 7.5 + sign * (index + 0.5).
_CELL_ASM = tl.constexpr("""
{
.reg .pred p1, p2, p3;
.reg .f32 m, a, b, t, i, s;
abs.f32 m, $1;
setp.gt.f32 p1, m, $5;
selp.f32 t, $7, $3, p1;
setp.gt.f32 p2, m, t;
selp.f32 a, $8, $6, p2;
selp.f32 b, $4, $2, p2;
selp.f32 t, a, b, p1;
setp.gt.f32 p3, m, t;
selp.f32 i, 0f40900000, 0f3F000000, p1;
@p2 add.f32 i, i, 0f40000000;
@p3 add.f32 i, i, 0f3F800000;
copysign.f32 s, $1, 0f3F800000;
fma.rn.f32 $0, s, i, 0f40F00000;
}
""")


@triton.jit
def _cell(y, b, PRMT: tl.constexpr):
    """The cell of ``y`` as a float32, given the 7 positive boundaries ``b`` of 16 cells that mirror each other."""
    if PRMT:
        return tl.inline_asm_elementwise(_CELL_ASM, "=f,f,f,f,f,f,f,f,f", (y,) + b, dtype=tl.float32, is_pure=True, pack=1)
    size = tl.abs(y)
    up = size > b[3]
    up2 = size > tl.where(up, b[5], b[1])
    up3 = size > tl.where(up, tl.where(up2, b[6], b[4]), tl.where(up2, b[2], b[0]))
    index = tl.where(up, 4.5, 0.5) + tl.where(up2, 2.0, 0.0) + tl.where(up3, 1.0, 0.0)
    return 7.5 + tl.where(y > 0, index, -index)


@triton.jit
def _shift(largest):
    """The power of two that brings vectors whose largest magnitude is ``largest [BM]`` into a range safe to square."""
    small = tl.where(largest < 1e-15, 1.2676506002282294e30, 1.0)
    return tl.where(largest > 1e15, 7.888609052210118e-31, small)


@triton.jit
def _rows_of(tile, tokens, heads, stride_b, stride_h, BM: tl.constexpr):
    """Tokens of one tile of one head: ``token [BM]``, the row before the head's first, and the head's offset."""
    tiles = tl.cdiv(tokens, BM)
    head = tile // tiles
    token = (tile % tiles) * BM + tl.arange(0, BM).to(tl.int64)  # [BM]
    base = (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    return token, head.to(tl.int64) * tokens, base


@triton.jit(do_not_specialize=["tiles", "heads", "tokens"])
def compress_kernel(x, rotation, boundaries, codes, norms, tiles, heads, tokens, x_b, x_h, x_n, x_d, D: tl.constexpr,
                    DP: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, SIGNS: tl.constexpr, BM: tl.constexpr,
                    PRMT: tl.constexpr):  # fmt: skip
    """Vectors ``x [batch, heads, tokens, D]`` to ``codes [rows, D // 2]`` and ``norms [rows]``; CHUNK bytes of each code."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    WHOLE: tl.constexpr = 2 * CHUNK >= D
    inner = tl.arange(0, DP)
    byte = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    even = _matrix(rotation, inner, 2 * byte, 1, D, D, SIGNS, DTYPE, PARTS)  # [DP, CHUNK]
    odd = _matrix(rotation, inner, 2 * byte + 1, 1, D, D, SIGNS, DTYPE, PARTS)
    unit = _unit(D, SIGNS)
    b = ()
    for i in tl.static_range(8, 15):
        b = b + (tl.load(boundaries + i),)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token, first, base = _rows_of(tile, tokens, heads, x_b, x_h, BM)
        source = x + base + token[:, None] * x_n + inner.to(tl.int64)[None, :] * x_d
        v = tl.load(source, mask=(token[:, None] < tokens) & (inner[None, :] < D), other=0.0)  # [BM, DP]
        zero = tl.zeros([BM, CHUNK], tl.float32)
        y_even = _product(v, even, zero, PARTS)  # [BM, CHUNK]
        y_odd = _product(v, odd, zero, PARTS)
        # A power of two, 2^-100 or 2^100, keeps the squares of extreme vectors in range, and changes no bits.
        shift = tl.full([BM], 1.0, tl.float32)
        if WHOLE:  # all of y is here: |x| = unit * |y|
            squares = tl.sum(y_even * y_even, 1) + tl.sum(y_odd * y_odd, 1)
            usual = (squares > 1e-30) & (squares < 1e30)  # false for NaN
            if tl.min((usual | (token >= tokens)).to(tl.int32), 0) == 0:
                shift = _shift(tl.maximum(tl.max(tl.abs(y_even), 1), tl.max(tl.abs(y_odd), 1)))
                y_even *= shift[:, None]
                y_odd *= shift[:, None]
                squares = tl.sum(y_even * y_even, 1) + tl.sum(y_odd * y_odd, 1)
            length = tl.sqrt_rn(squares) * unit  # [BM], of x * shift
        else:
            wide = v.to(tl.float32)
            shift = _shift(tl.max(tl.abs(wide), 1))
            wide *= shift[:, None]
            length = tl.sqrt_rn(tl.sum(wide * wide, 1))
            y_even *= shift[:, None]
            y_odd *= shift[:, None]
        factor = (unit / tl.where(length > 0, length, 1.0))[:, None]
        high = _cell(y_even * factor, b, PRMT)
        low = _cell(y_odd * factor, b, PRMT)
        code = high * 16 + low  # [BM, CHUNK], a byte in float32
        if D % 4 == 0:  # two bytes a store
            pair = tl.reshape(code * tl.where(byte % 2 == 0, 1.0, 256.0)[None, :], [BM, CHUNK // 2, 2])
            word = tl.sum(pair, 2).to(tl.int32).to(tl.int16)  # [BM, CHUNK // 2]
            column = tl.program_id(1) * (CHUNK // 2) + tl.arange(0, CHUNK // 2)
            target = codes.to(tl.pointer_type(tl.int16)) + (first + token)[:, None] * (D // 4) + column[None, :]
            tl.store(target, word, mask=(token[:, None] < tokens) & (column[None, :] < D // 4))
        else:
            target = codes + (first + token)[:, None] * (D // 2) + byte[None, :]
            live = (token[:, None] < tokens) & (byte[None, :] < D // 2)
            tl.store(target, code.to(tl.int32).to(tl.uint8), mask=live)
        if tl.program_id(1) == 0:
            tl.store(norms + first + token, length / shift, mask=token < tokens)


@triton.jit(do_not_specialize=["tiles", "heads", "tokens"])
def decompress_kernel(codes, norms, centroids, rotation, out, tiles, heads, tokens, c_b, c_h, c_n, c_d, n_b, n_h, n_n,
                      D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, SIGNS: tl.constexpr,
                      BM: tl.constexpr, PRMT: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """Codes ``[batch, heads, tokens, D // 2]`` and norms to vectors ``out [rows, D]``; CHUNK coordinates of each."""
    byte = tl.arange(0, DP // 2)
    outer = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    even = _matrix(rotation, 2 * byte, outer, D, 1, D, SIGNS, DTYPE, PARTS)  # [DP // 2, CHUNK]
    odd = _matrix(rotation, 2 * byte + 1, outer, D, 1, D, SIGNS, DTYPE, PARTS)
    scale = level_scale(centroids)
    unit = _unit(D, SIGNS) * scale
    table = ()
    if PRMT:
        table = level_table(centroids, 1.0 / scale, DTYPE)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token, first, base = _rows_of(tile, tokens, heads, c_b, c_h, BM)
        source = codes + base + token[:, None] * c_n + byte.to(tl.int64)[None, :] * c_d
        packed = tl.load(source, mask=(token[:, None] < tokens) & (byte[None, :] < D // 2), other=0)  # [BM, DP // 2]
        token, first, base = _rows_of(tile, tokens, heads, n_b, n_h, BM)
        norm = tl.load(norms + base + token * n_n, mask=token < tokens, other=0.0)
        high, low = look_up(packed, centroids, 1.0 / scale, table, DTYPE, PRMT)
        y = _product(high, even, tl.zeros([BM, CHUNK], tl.float32), PARTS)
        y = _product(low, odd, y, PARTS) * unit * norm[:, None]  # [BM, CHUNK]
        target = out + (first + token)[:, None] * D + outer[None, :]
        tl.store(target, y.to(out.dtype.element_ty), mask=(token[:, None] < tokens) & (outer[None, :] < D))


def compress(
    x: torch.Tensor, rotation: torch.Tensor, boundaries: torch.Tensor, signs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`turboquant_vllm.reference.compress`, for boundaries that mirror each other, ``b[14 - i] = -b[i]``.

    ``signs`` says that rotation's entries are +-1 / sqrt(D).
    """
    head_dim = x.shape[-1]
    codes = torch.empty((*x.shape[:-1], head_dim // 2), dtype=torch.uint8, device=x.device)
    norms = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if norms.numel():
        x = _as_4d(x.float() if x.dtype == torch.float64 else x)
        plan = _plan(x.shape, head_dim, head_dim // 2, x.dtype, signs, x.device)
        with device_guard(x.device):
            compress_kernel[plan.grid](
                x, rotation, boundaries, codes, norms, plan.tiles, x.shape[1], x.shape[2], *x.stride(),
                D=head_dim, SIGNS=signs, PRMT=uses_prmt(x.device.type), **plan.constants,
            )  # fmt: skip
    return codes, norms


def decompress(
    codes: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    signs: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As :func:`turboquant_vllm.reference.decompress`; ``signs`` says that rotation's entries are +-1 / sqrt(D)."""
    head_dim = 2 * codes.shape[-1]
    out = torch.empty((*codes.shape[:-1], head_dim), dtype=dtype, device=codes.device)
    if norms.numel():
        codes, norms = _as_4d(codes.contiguous()), _as_4d(norms.contiguous().unsqueeze(-1))
        # float16 holds levels better than bfloat16, whatever the result is rounded to.
        compute = torch.float32 if dtype == torch.float32 else torch.float16
        plan = _plan(codes.shape, head_dim, head_dim, compute, signs, codes.device)
        with device_guard(codes.device):
            decompress_kernel[plan.grid](
                codes, norms, centroids, rotation, out, plan.tiles, codes.shape[1], codes.shape[2], *codes.stride(),
                *norms.stride()[:3], D=head_dim, SIGNS=signs, PRMT=uses_prmt(codes.device.type) and compute != torch.float32,
                DTYPE=tl.float32 if compute == torch.float32 else tl.float16, **plan.constants,
            )  # fmt: skip
    return out


@dataclass(frozen=True)
class _Plan:
    """A launch: its grid, the tiles that programs walk over, compile-time constants."""

    grid: tuple[int, int]
    tiles: int
    constants: dict[str, int]


def _plan(shape: torch.Size, head_dim: int, columns: int, dtype: torch.dtype, signs: bool, device: torch.device) -> _Plan:
    """The launch over ``shape [batch, heads, tokens, _]``: a program keeps its columns of the matrix, walks over tiles."""
    exact = dtype == torch.float32
    block = 16 if exact else 64
    padded = max(32, triton.next_power_of_2(head_dim))
    parts = 1 if signs or exact else (3 if dtype == torch.bfloat16 else 2)
    chunk = max(16, triton.next_power_of_2(columns))
    room, processors = 1 << 30, 16
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        room = properties.shared_memory_per_block_optin - _TILE_BYTES
        processors = properties.multi_processor_count
    while chunk > 16 and 2 * parts * padded * chunk * dtype.itemsize > room:
        chunk //= 2
    chunks = triton.cdiv(columns, chunk)
    tiles = shape[0] * shape[1] * triton.cdiv(shape[2], block)
    programs = _PROGRAMS * processors
    constants = {
        "DP": padded,
        "CHUNK": chunk,
        "PARTS": parts,
        "BM": block,
        "num_warps": 8 if padded > 128 else 4,
        "num_stages": 1,
    }
    if uses_prmt(device.type) and not exact and padded <= 128:
        constants["maxnreg"] = 128
    return _Plan((min(tiles, max(1, programs // chunks)), chunks), tiles, constants)


def _as_4d(x: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, tokens, D]`` with the same elements in the same order; copied only where strides demand it."""
    if x.is_contiguous() or x.dim() > 4:
        return x.reshape(1, 1, -1, x.shape[-1])
    return x[(None,) * (4 - x.dim())]
