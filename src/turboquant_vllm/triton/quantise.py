"""From vectors to codes: the pieces that every Triton kernel which writes a cache shares.

A tile of BM vectors is rotated by a product, its columns ordered such that one thread ends up with the four coordinates
of each of its 16-bit words of codes. What is left takes registers alone: the length, a polynomial for each coordinate
whose integer part is the code (:func:`turboquant_vllm.codebook.companding`), and joining four codes to a word.

A Sylvester-Hadamard matrix is a Kronecker product, H_2P = H_P x H_2. So with a vector cut into P pieces, its rotation is
P products with matrices of 1 / P^2 the size, and log2(P) additions for each coordinate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turboquant_vllm.triton.rotate import LIFT, half_parts


def _word_asm() -> str:
    """PTX that makes two words of four codes each: $0 from coordinates $1 ... $8, the same part of both words side by side.

    $9 and $10 hold the scale of either word's vector, $11 ... $20 five coefficients twice. Rounding towards zero drops the
    fraction of a code, and what it is added to, 2^23, leaves it in the low bits.
    """
    lines = [".reg .f32 u, w, q;", ".reg .b32 n, high, first, second;"]
    for word in range(2):
        for part in range(4):
            lines += [
                f"fma.rn.sat.f32 u, ${1 + 2 * part + word}, ${9 + word}, 0f3F000000;",  # + 1/2, clamped to [0, 1]; NaN is 0
                "add.f32 u, u, 0fBF000000;",
                "mul.f32 w, u, u;",
                f"fma.rn.f32 q, ${19 + word}, w, ${17 + word};",
                *(f"fma.rn.f32 q, q, w, ${place + word};" for place in (15, 13, 11)),
                "fma.rz.f32 q, u, q, 0f4B000008;",
                "mov.b32 n, q;",
            ]
            byte = ("first", "second")[part // 2]
            lines.append("mov.b32 high, n;" if part % 2 == 0 else f"mad.lo.u32 {byte}, high, 16, n;")
        lines.append("prmt.b32 $0, first, second, 0x0040;" if word == 0 else "prmt.b32 first, first, second, 0x0040;")
    lines.append("prmt.b32 $0, $0, first, 0x5410;")
    return "{\n" + "\n".join(lines) + "\n}"


# Early clobber: the output is written before the last coefficient is read.
WORD_ASM, WORD_CONSTRAINTS = tl.constexpr(_word_asm()), tl.constexpr("=&r," + ",".join(["f"] * 20))


def _levels_asm() -> str:
    """PTX that makes $0 ... $7, magnitudes of levels, of the two words of codes in $8: part 0 of both words, part 1, ...

    $9, $11, ... $23 hold :func:`level_bytes` (each twice). Levels mirror each other, so codes 0 to 7 are 15 to 8, with a sign
    that is not needed here. The three low bits of each of four codes select four bytes at once, of one place in a float32.
    """
    lines = [
        ".reg .b32 s, n, low0, low1, high0, high1, a, b, c, d;",
        "shr.u32 s, $8, 3;",
        "and.b32 s, s, 0x11111111;",
        "mad.lo.u32 s, s, 0xfffffff9, 0x77777777;",  # 7 in the place of a code below 8, 0 elsewhere
        "xor.b32 n, $8, s;",
        "and.b32 n, n, 0x77777777;",
    ]
    for word in range(2):
        if word:
            lines.append("shr.u32 n, n, 16;")
        lines += [f"prmt.b32 {place}, ${9 + 4 * i}, ${11 + 4 * i}, n;" for i, place in enumerate("abcd")]
        for half, order in enumerate(("0x5140", "0x7362")):
            lines += [f"prmt.b32 low{half}, a, b, {order};", f"prmt.b32 high{half}, c, d, {order};"]
        for nibble, part in enumerate((1, 0, 3, 2)):
            half, order = nibble // 2, ("0x5410", "0x7632")[nibble % 2]
            lines.append(f"prmt.b32 ${2 * part + word}, low{half}, high{half}, {order};")
    return "{\n" + "\n".join(lines) + "\n}"


LEVEL_ASM, LEVEL_CONSTRAINTS = tl.constexpr(_levels_asm()), tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 17))


@triton.jit
def product_columns(first, COUNT: tl.constexpr):
    """The coordinates ``[COUNT]`` that columns of a product stand for, of the COUNT ones from ``first`` on.

    In a tile that a matrix instruction leaves, a thread has columns ``2 c``, ``2 c + 1`` of each 8, c being 0 to 3.
    """
    column = tl.arange(0, COUNT)
    word = (column >> 1) % 4 * (COUNT // 16) + (column >> 4)
    return first + 4 * word + (column >> 3) % 2 * 2 + column % 2


@triton.jit
def words_of(first, COUNT: tl.constexpr):
    """The words ``[COUNT // 16, 4]`` in the order in which :func:`encode` gives them, for coordinates from ``first`` on."""
    return first // 4 + tl.arange(0, 4)[None, :] * (COUNT // 16) + tl.arange(0, COUNT // 16)[:, None]


@triton.jit
def matrix_parts(rotation, inner, outer, inner_stride, outer_stride, D: tl.constexpr, HADAMARD: tl.constexpr,
                 DTYPE: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """The matrix ``[inner, outer]`` of rotation's entries as a tuple of COUNT tensors of ``DTYPE`` which sum to it.

    With HADAMARD the entries are +-1 / sqrt(D), and the one tensor holds their signs, exact in half precision.
    """
    mask = (inner[:, None] < D) & (outer[None, :] < D)
    matrix = tl.load(rotation + inner[:, None] * inner_stride + outer[None, :] * outer_stride, mask=mask, other=0.0)
    if HADAMARD:
        return (tl.where(mask, tl.where(matrix > 0, 1.0, -1.0), 0.0).to(DTYPE),)
    else:
        return half_parts(matrix, DTYPE, COUNT)


@triton.jit
def piece_matrices(rotation, inner, outer, inner_stride, outer_stride, inner_step, outer_step, D: tl.constexpr,
                   HADAMARD: tl.constexpr, DTYPE: tl.constexpr, COUNT: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """:func:`matrix_parts` of each piece: ``inner_step`` and ``outer_step`` further along rotation than the one before."""
    matrices = ()
    for i in tl.static_range(PIECES):
        rows, columns = inner + i * inner_step, outer + i * outer_step
        matrices = matrices + (matrix_parts(rotation, rows, columns, inner_stride, outer_stride, D, HADAMARD, DTYPE, COUNT),)
    return matrices


@triton.jit
def load_pieces(rows, stride, live, column, D: tl.constexpr, DP: tl.constexpr, PIECES: tl.constexpr):
    """Vectors cut into PIECES tiles ``[BM, columns]``, ``rows [BM]`` pointing at them; zeros where a row is not live.

    ``column [columns]`` counts elements of the first piece, of which a piece has DP and a vector D.
    """
    pieces = ()
    for i in tl.static_range(PIECES):
        place = (i * DP + column)[None, :]
        mask = live[:, None] if PIECES * DP == D else live[:, None] & (place < D)
        pieces = pieces + (tl.load(rows[:, None] + place.to(tl.int64) * stride, mask=mask, other=0),)
    return pieces


@triton.jit
def product(x, matrix, acc, PARTS: tl.constexpr):
    """``acc + x @ sum(matrix)`` in float32.

    The smallest part comes first: matrix units cut sums off instead of rounding them, each time by up to an ulp of the sum.
    """
    for i in tl.static_range(PARTS):
        acc = tl.dot(x, matrix[PARTS - 1 - i], acc, input_precision="ieee")
    return acc


@triton.jit
def matrix_unit(D: tl.constexpr, HADAMARD: tl.constexpr):
    """What one unit of :func:`matrix_parts` stands for."""
    if HADAMARD:
        return 1.0 / tl.sqrt_rn(tl.full([], D, tl.float32))
    else:
        return 1.0 / LIFT


@triton.jit
def butterfly(y, PIECES: tl.constexpr):
    """Pieces times the Sylvester-Hadamard matrix of as many rows."""
    if PIECES == 2:
        return (y[0] + y[1], y[0] - y[1])
    elif PIECES == 4:
        sums = (y[0] + y[2], y[1] + y[3], y[0] - y[2], y[1] - y[3])
        return (sums[0] + sums[1], sums[0] - sums[1], sums[2] + sums[3], sums[2] - sums[3])
    else:
        return y


@triton.jit
def products(x, matrices, BM: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, PIECES: tl.constexpr):
    """Each piece times its matrix, a tuple of ``[BM, COLUMNS]``."""
    y = ()
    for i in tl.static_range(PIECES):
        y = y + (product(x[i], matrices[i], tl.zeros([BM, COLUMNS], tl.float32), PARTS),)
    return y


@triton.jit
def times(y, factor, PIECES: tl.constexpr):
    """Pieces ``[BM, columns]`` times ``factor [BM]``."""
    scaled = ()
    for i in tl.static_range(PIECES):
        scaled = scaled + (y[i] * factor[:, None],)
    return scaled


@triton.jit
def _squares(y, PIECES: tl.constexpr):
    squares = y[0] * y[0]
    for i in tl.static_range(1, PIECES):
        squares += y[i] * y[i]
    return tl.sum(squares, 1)


@triton.jit
def power_of_two_shift(largest):
    """The power of two that brings vectors whose largest magnitude is ``largest [BM]`` into a range safe to square."""
    small = tl.where(largest < 1e-15, 1.2676506002282294e30, 1.0)
    return tl.where(largest > 1e15, 7.888609052210118e-31, small)


@triton.jit
def lift_subnormals(x):
    """Vectors ``x [BM, D]`` of float16, those of subnormals alone 2^10 times as large, and these factors ``[BM]``.

    Matrix units line products up by the exponents that factors are stored with, which is that of normal numbers for
    subnormals, too: sums of these lose as many bits as the largest has leading zeros. Nothing is rounded here.
    """
    wide = x.to(tl.float32)
    factor = tl.where(tl.max(tl.abs(wide), 1) < 6.103515625e-05, 1024.0, 1.0)  # 2^-14, the smallest normal number
    return (wide * factor[:, None]).to(tl.float16), factor


@triton.jit
def measure(x, y, live, BM: tl.constexpr, PIECES: tl.constexpr, WIDE: tl.constexpr):
    """Lengths ``[BM]`` of vectors ``x`` in pieces: y, the lengths, and the power of two that multiplies both.

    The factor, 1, 2^-100 or 2^100, keeps the squares of extreme vectors in range, and changes no bits; only dtypes of a
    WIDE range need one. Rows that are not ``live`` may be anything.
    """
    squares = _squares(x, PIECES)
    shift = tl.full([BM], 1.0, tl.float32)
    if WIDE:
        usual = (squares > 1e-30) & (squares < 1e30)  # false for NaN
        # Over two axes: Triton up to 3.7 follows what Blackwell's matrix units leave from one reduction to the next, as far as
        # here, and fails where the last is of one axis.
        if tl.min(tl.min((usual | ~live).to(tl.int32)[None, :], 0), 0) == 0:
            largest = tl.abs(x[0])
            for i in tl.static_range(1, PIECES):
                largest = tl.maximum(largest, tl.abs(x[i]))
            shift = power_of_two_shift(tl.max(largest, 1))
            squares = _squares(times(x, shift, PIECES), PIECES)
            y = times(y, shift, PIECES)
    return y, tl.sqrt_rn(squares), shift


@triton.jit
def curve_of(companding):
    """The six numbers of :func:`turboquant_vllm.codebook.companding` from memory."""
    curve = ()
    for i in tl.static_range(6):
        curve = curve + (tl.load(companding + i),)
    return curve


@triton.jit
def _four_parts(y, BM: tl.constexpr, COUNT: tl.constexpr):
    """The four coordinates ``[BM, COUNT // 16, 4]`` of each word, of ``y [BM, COUNT]`` in :func:`product_columns`' order."""
    y = tl.permute(tl.reshape(y, [BM, COUNT // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    even, odd = tl.split(y)
    part0, part2 = tl.split(even)
    part1, part3 = tl.split(odd)
    return part0, part1, part2, part3


@triton.jit
def level_bytes(centroids):
    """The eight positive levels, for :func:`_magnitudes`: their lowest bytes in two int32, and so on to the highest ones."""
    table = ()
    for byte in tl.static_range(4):
        for half in tl.static_range(2):
            word = 0
            for i in tl.static_range(4):
                bits = tl.load(centroids + 8 + 4 * half + i).to(tl.int32, bitcast=True)
                word = word | (((bits >> (8 * byte)) & 255) << (8 * i))
            table = table + (word,)
    return table


@triton.jit
def _magnitudes(word, levels, PRMT: tl.constexpr):
    """Magnitudes of the levels of each word's four codes, as :func:`_four_parts` has the coordinates.

    ``levels`` are :func:`level_bytes` with PRMT, else a pointer to the centroids.
    """
    if PRMT:
        return tl.inline_asm_elementwise(
            LEVEL_ASM,
            LEVEL_CONSTRAINTS,
            (word,) + levels,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=2,
        )
    else:
        sizes = ()
        for i in tl.static_range(4):
            code = (word.to(tl.int32) >> (i // 2 * 8 + (1 - i % 2) * 4)) & 15
            sizes = sizes + (tl.load(levels + tl.maximum(code, 15 - code)),)
        return sizes


@triton.jit
def _scale(y, words, length, unit, levels, BM: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr,
           PIECES: tl.constexpr, PRMT: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """The scale ``[BM]`` that SCALE asks for, of whole vectors ``y`` in pieces whose words and lengths are known."""
    if SCALE == "norm":
        return length
    else:
        dots = tl.zeros([BM, COUNT // 16, 4], tl.float32)  # y times levels: both have the same sign
        squares = tl.zeros([BM, COUNT // 16, 4], tl.float32)  # of levels
        for i in tl.static_range(PIECES):
            parts = _four_parts(y[i], BM, COUNT)
            sizes = _magnitudes(words[i], levels, PRMT)
            for j in tl.static_range(4):
                level = sizes[j]
                if D % COUNT != 0:
                    level = tl.where(4 * words_of(i * COUNT, COUNT)[None, :, :] + j < D, level, 0.0)
                dots += tl.abs(parts[j]) * level
                squares += level * level
        dot = tl.sum(tl.sum(dots, 2), 1) * unit
        if SCALE == "least_squares":
            return dot / tl.sum(tl.sum(squares, 2), 1)
        else:
            return length * (length / tl.where(length == 0, 1.0, dot))


@triton.jit
def _cell(y, factor, curve):
    """The cell of ``y * factor`` as an int32."""
    u = tl.minimum(tl.maximum(y * factor + 0.5, 0.0), 1.0) - 0.5
    w = u * u
    place = u * (curve[1] + w * (curve[2] + w * (curve[3] + w * (curve[4] + w * curve[5])))) + 8.0
    return tl.where(place > 0.0, place, 0.0).to(tl.int32)  # zero for NaN


@triton.jit
def encode(y, length, unit, curve, BM: tl.constexpr, COUNT: tl.constexpr, PRMT: tl.constexpr):
    """Words of codes, int16 ``[BM, COUNT // 16, 4]`` in :func:`words_of`'s order, of ``y [BM, COUNT]`` over its length.

    ``y`` is in units of ``unit``, its columns in the order of :func:`product_columns`.
    """
    factor = curve[0] * unit / tl.where(length == 0, 1.0, length)  # NaN stays
    part0, part1, part2, part3 = _four_parts(y, BM, COUNT)
    factor = tl.broadcast_to(factor[:, None, None], [BM, COUNT // 16, 4])
    if PRMT:
        arguments = (part0, part1, part2, part3, factor, curve[1], curve[2], curve[3], curve[4], curve[5])
        return tl.inline_asm_elementwise(WORD_ASM, WORD_CONSTRAINTS, arguments, dtype=tl.int16, is_pure=True, pack=2)
    else:
        first = _cell(part0, factor, curve) * 16 + _cell(part1, factor, curve)
        return (first + (_cell(part2, factor, curve) * 16 + _cell(part3, factor, curve)) * 256).to(tl.int16)


@triton.jit
def encode_rotated(y, length, shift, unit, curve, levels, BM: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
                   PIECES: tl.constexpr, PRMT: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """Words of codes and norms as :func:`encode_tile`, of vectors that are rotated and measured: see :func:`measure`."""
    words = ()
    for i in tl.static_range(PIECES):
        words = words + (encode(y[i], length, unit, curve, BM, CHUNK, PRMT),)
    norm = _scale(y, words, length, unit, levels, BM, D, CHUNK, PIECES, PRMT, SCALE) / shift
    # A vector that is not finite must be seen wherever it is attended to: NaN, never an infinity.
    return words, tl.where((norm < float("inf")) & (length < float("inf")), norm, float("nan"))


@triton.jit
def encode_tile(v, live, matrices, unit, curve, levels, BM: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
                PARTS: tl.constexpr, PIECES: tl.constexpr, PRMT: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """Words of codes, one tensor of :func:`encode` for each piece, and norms ``[BM]``, of vectors ``v`` cut into pieces.

    The words are those of the CHUNK coordinates of each piece that ``matrices`` have; norms of a SCALE other than "norm"
    need all coordinates, and ``levels`` as :func:`_magnitudes`. Rows that are not ``live`` may be anything.
    """
    DTYPE: tl.constexpr = v[0].dtype
    lift = 1.0
    if PARTS > 1 and DTYPE == tl.float16:  # sums of signs are exact, whatever is lost below
        tl.static_assert(PIECES == 1, "pieces are those of Hadamard matrices")
        lifted, lift = lift_subnormals(v[0])
        v = (lifted,)
    y = butterfly(products(v, matrices, BM, CHUNK, PARTS, PIECES), PIECES)  # [BM, CHUNK]
    WIDE: tl.constexpr = DTYPE != tl.float16
    WHOLE: tl.constexpr = CHUNK * PIECES >= D  # all of y is here
    tl.static_assert(WHOLE or SCALE == "norm", "this scale is made of all coordinates")
    if WHOLE and PARTS == 1:  # |x| = unit * |y|; the sums of several parts are not exact enough for that
        y, length, shift = measure(y, y, live, BM, PIECES, WIDE)
        length *= unit
    else:
        y, length, shift = measure((v[0].to(tl.float32),), y, live, BM, PIECES, WIDE)
    return encode_rotated(y, length, shift * lift, unit, curve, levels, BM, D, CHUNK, PIECES, PRMT, SCALE)
