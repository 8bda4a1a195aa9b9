"""The quantiser's curve, its PTX run by a small emulator: every coordinate falls into the cell that the reference gives."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
import torch

from turboquant_vllm import lloyd_max
from turboquant_vllm.codebook import companding

pytest.importorskip("triton")
quantise = pytest.importorskip("turboquant_vllm.triton.quantise")


def bits(x: float | int) -> int:
    """What a register holds: the pattern of a float32, or an integer as it is."""
    return x if isinstance(x, int) else struct.unpack("I", struct.pack("f", x))[0]


def nearest(x: Fraction) -> float:
    """``x`` rounded to float32: first to float64, which is fine enough for the sums here never to meet a tie."""
    return struct.unpack("f", struct.pack("f", float(x)))[0]


def towards_zero(x: Fraction) -> float:
    """``x`` rounded to float32 with what does not fit cut off."""
    if x == 0:
        return 0.0
    unit = Fraction(2) ** (math.frexp(float(abs(x)))[1] - 24)
    return float(math.trunc(x / unit) * unit)


def literal(text: str) -> float:
    """A PTX float32 literal, ``0f`` and eight hexadecimal digits."""
    return struct.unpack(">f", bytes.fromhex(text[2:]))[0]


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ``prmt.b32`` for selectors without a sign: byte i is the byte of b:a that nibble i of the selector names."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


def saturated(x: float) -> float:
    """PTX ``.sat``: clamped to [0, 1]; NaN becomes 0."""
    return 0.0 if math.isnan(x) else min(max(x, 0.0), 1.0)


def exact(a: float, b: float, c: float) -> Fraction:
    return Fraction(a) * Fraction(b) + Fraction(c)


INSTRUCTIONS = {
    "fma.rn.sat.f32": lambda a, b, c: saturated(math.nan if math.isnan(a) else nearest(exact(a, b, c))),
    "fma.rn.f32": lambda a, b, c: nearest(exact(a, b, c)),
    "fma.rz.f32": lambda a, b, c: towards_zero(exact(a, b, c)),
    "add.f32": lambda a, b: nearest(Fraction(a) + Fraction(b)),
    "mul.f32": lambda a, b: nearest(Fraction(a) * Fraction(b)),
    "mov.b32": bits,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & 0xFFFFFFFF,
    "prmt.b32": prmt,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
}


def run(ptx: str, operands: dict[str, float]) -> dict[str, float]:
    """The registers after a block of PTX; ``operands`` holds those that it reads."""
    registers = dict(operands)
    for line in ptx.strip("{}\n").split("\n"):
        name, arguments = line.rstrip(";").split(" ", 1)
        if name == ".reg":
            continue
        target, *sources = (argument.strip() for argument in arguments.split(","))
        values = [literal(x) if x[:2] == "0f" else int(x, 0) if x[0].isdigit() else registers[x] for x in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return registers


def test_emulator():
    assert towards_zero(Fraction(8388615) + Fraction(9, 10)) == 8388615.0
    assert nearest(Fraction(8388615) + Fraction(9, 10)) == 8388616.0
    assert prmt(0x33221100, 0x77665544, 0x0040) == 0x00004400


@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_every_coordinate_falls_into_its_cell(head_dim):
    book = lloyd_max(head_dim)
    curve = [nearest(Fraction(x)) for x in companding(book.boundaries).tolist()]
    boundaries = torch.tensor(book.boundaries)
    # On both sides of every boundary, as near as the curve promises; on it, either neighbour is right.
    near = torch.cat([boundaries - 3e-7, boundaries + 3e-7])
    y = torch.cat([torch.randn(200).double() / head_dim**0.5, near, torch.tensor([-1.0, 1.0, 0.0, 1e-3])]).float()
    y = y[: len(y) // 8 * 8]
    want = torch.bucketize(y.double(), boundaries)
    want[y == 0] = 8  # the boundary between cells 7 and 8
    for values, cells in zip(y.view(-1, 8).tolist(), want.view(-1, 8).tolist(), strict=True):
        operands = {f"${1 + 2 * part + word}": values[4 * word + part] for word in range(2) for part in range(4)}
        operands |= {f"${9 + 2 * i + word}": curve[i] for i in range(6) for word in range(2)}
        packed = [16 * cells[i] + cells[i + 1] for i in range(0, 8, 2)]
        assert run(quantise.WORD_ASM.value, operands)["$0"] == int.from_bytes(bytes(packed), "little"), values


def test_every_code_finds_the_magnitude_of_its_level():
    patterns = [bits(x) for x in torch.tensor(lloyd_max(128).centroids[8:]).float().tolist()]
    table = [
        int.from_bytes(bytes(pattern >> 8 * place & 255 for pattern in patterns[first : first + 4]), "little")
        for place in range(4)
        for first in (0, 4)
    ]
    for _ in range(50):
        codes = torch.randint(16, (2, 4)).tolist()  # of two words, four parts each
        words = [code[0] << 4 | code[1] | code[2] << 12 | code[3] << 8 for code in codes]
        operands = {"$8": words[0] | words[1] << 16} | {f"${9 + 2 * i}": value for i, value in enumerate(table)}
        found = run(quantise.LEVEL_ASM.value, operands)
        for word, code in enumerate(codes):
            got = [found[f"${2 * part + word}"] for part in range(4)]
            assert got == [patterns[max(n, 15 - n) - 8] for n in code], code


def test_a_nan_gives_code_zero():
    operands = {f"${i}": math.nan for i in range(1, 9)} | {f"${i}": 1.0 for i in range(9, 21)}
    operands |= {f"${9 + 2 * i + word}": x for i, x in enumerate(companding(lloyd_max(64).boundaries)) for word in range(2)}
    assert run(quantise.WORD_ASM.value, operands)["$0"] == 0
