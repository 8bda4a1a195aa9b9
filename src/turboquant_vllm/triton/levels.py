"""Looking levels up: from packed codes to half-precision values.

NVIDIA has a byte permute, PRMT, which picks four bytes out of eight by four selector nibbles. Sixteen 16-bit levels are
four such tables: low bytes and high bytes, levels 0-7 and 8-15. The packed codes themselves are the selectors; a
nibble's top bit chooses between the two halves. That is 2.75 integer operations a value, for any 16 levels, exact.
Elsewhere (other vendors, float32, the interpreter) levels are gathered from memory.

An element of packed codes is a byte or a pair of bytes, and gives 2 or 4 values, its *parts*. The lookup returns
one tensor per part, so that values never change places between threads.
"""

from __future__ import annotations

import triton
import triton.language as tl


def _lookup_asm(elements: int, bits: int) -> str:
    """PTX that looks ``elements`` packed elements of ``bits`` bits up, 32 bits in all.

    Operands: the outputs, each two 16-bit values; the codes; eight table words, ``elements`` times each. Each output
    holds the same part of two neighbouring elements, which is how a tensor of 16-bit values lies in registers: pairs of
    16-bit elements are interleaved byte by byte first.
    """
    codes, table = 4, 5
    low = [f"${table + elements * i}" for i in range(4)]
    high = [f"${table + elements * i}" for i in range(4, 8)]
    lines = [".reg .b32 x, y, s, m, a, b, l, h;"]
    lines.append(f"prmt.b32 x, ${codes}, ${codes}, {'0x3120' if bits == 16 else '0x3210'};")
    lines += ["shl.b32 y, x, 4;", "and.b32 s, x, 0x77777777;"]
    for half in range(2):  # a selector is 16 bits: two bytes of codes at a time
        if half:
            lines.append("shr.u32 s, s, 16;")
        # Each byte of m is all ones where a nibble's top bit is set: that value comes from levels 8-15.
        lines.append(f"prmt.b32 m, y, x, {'0xFBEA' if half else '0xD9C8'};")
        for plane, register in ((low, "l"), (high, "h")):
            lines += [
                f"prmt.b32 a, {plane[0]}, {plane[1]}, s;",
                f"prmt.b32 b, {plane[2]}, {plane[3]}, s;",
                f"lop3.b32 {register}, m, b, a, 0xCA;",
            ]
        # Outputs are ordered by part, then by element; the high nibble is the first of its byte's two parts.
        first, second = (2 * half, 2 * half + 1) if bits == 16 else (half, half + 2)
        lines += [f"prmt.b32 ${first}, l, h, 0x7351;", f"prmt.b32 ${second}, l, h, 0x6240;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _lookup_constraints(elements: int) -> str:
    # Early clobber: an output may be written before the last table word is read.
    return ",".join(["=&r"] * 4 + ["r"] * (1 + 8 * elements))


BYTE_ASM, BYTE_CONSTRAINTS = tl.constexpr(_lookup_asm(4, 8)), tl.constexpr(_lookup_constraints(4))
HALF_ASM, HALF_CONSTRAINTS = tl.constexpr(_lookup_asm(2, 16)), tl.constexpr(_lookup_constraints(2))


@triton.jit
def power_of_two(x):
    """The largest power of two that is at most ``x > 0`` (float32), so that dividing by it is exact."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def level_scale(centroids, DTYPE: tl.constexpr):
    """What tables of ``DTYPE`` hold levels over, which fit half precision then: a power of two near the largest magnitude.

    bfloat16 rounds a level by up to 2^-8 of it, and alike wherever it is, so that no sum over keys or coordinates averages that
    out. Of sixteen scales from the power of two to twice it, that is taken which rounds the levels least.
    """
    values = tl.abs(tl.load(centroids + tl.arange(0, 16)))
    scale = power_of_two(tl.maximum(tl.max(values, 0), 1e-30))
    if DTYPE == tl.bfloat16:
        step = tl.arange(0, 16)
        scales = scale * tl.exp2(step.to(tl.float32) * (1 / 16))
        ratios = values[None, :] * (1.0 / scales)[:, None]  # [16, 16]
        relative = ratios.to(DTYPE).to(tl.float32) / tl.maximum(ratios, 1e-30) - 1.0
        best = tl.argmin(tl.sum(tl.where(ratios == 0.0, 0.0, relative * relative), 1), 0)
        scale = tl.sum(tl.where(step == best, scales, 0.0), 0)
    return scale


@triton.jit
def _table_word(centroids, inverse, first: tl.constexpr, byte: tl.constexpr, DTYPE: tl.constexpr):
    """Byte ``byte`` of levels ``first .. first + 3`` in ``DTYPE``, as one int32."""
    word = tl.full([], 0, tl.int32)
    for i in tl.static_range(4):
        level = (tl.load(centroids + first + i) * inverse).to(DTYPE)
        bits = level.to(tl.int16, bitcast=True).to(tl.int32)
        word |= ((bits >> (8 * byte)) & 255) << (8 * i)
    return word


@triton.jit
def level_table(centroids, inverse, DTYPE: tl.constexpr):
    """The table words of the byte permutes, of levels times ``inverse``: low bytes of levels 0-3 ... 12-15, high bytes."""
    table = ()
    for byte in tl.static_range(2):
        for quarter in tl.static_range(4):
            table = table + (_table_word(centroids, inverse, 4 * quarter, byte, DTYPE),)
    return table


@triton.jit
def look_up(codes, centroids, inverse, table, DTYPE: tl.constexpr, PRMT: tl.constexpr):
    """Levels times ``inverse`` of packed codes: a tuple of 2 or 4 tensors of ``DTYPE``, each of codes' shape.

    Part j of element w is coordinate ``parts * w + j``.
    """
    PARTS: tl.constexpr = codes.dtype.primitive_bitwidth // 4
    parts = ()
    if PRMT:
        arguments = (codes,) + table
        if PARTS == 2:
            bits = tl.inline_asm_elementwise(
                BYTE_ASM, BYTE_CONSTRAINTS, arguments, dtype=(tl.int16, tl.int16), is_pure=True, pack=4
            )
        else:
            bits = tl.inline_asm_elementwise(
                HALF_ASM,
                HALF_CONSTRAINTS,
                arguments,
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True,
                pack=2,
            )
        for j in tl.static_range(PARTS):
            parts = parts + (bits[j].to(DTYPE, bitcast=True),)
    else:
        for j in tl.static_range(PARTS):
            nibble = codes.to(tl.int32) >> (8 * (j // 2) + 4 - 4 * (j % 2))
            level = tl.load(centroids + (nibble & 15))
            parts = parts + ((level * inverse).to(DTYPE),)
    return parts
