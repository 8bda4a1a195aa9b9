"""The quantiser's bisection, its PTX run by a small emulator: every coordinate falls into the cell that the reference gives."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from turboquant_vllm import lloyd_max

pytest.importorskip("triton")
compress = pytest.importorskip("turboquant_vllm.triton.compress")


def single(x: float) -> float:
    """``x`` rounded to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def literal(text: str) -> float:
    """A PTX float32 literal, ``0f`` and eight hexadecimal digits."""
    return struct.unpack(">f", bytes.fromhex(text[2:]))[0]


INSTRUCTIONS = {
    "abs.f32": abs,
    "setp.gt.f32": lambda a, b: a > b,
    "selp.f32": lambda a, b, p: a if p else b,
    "add.f32": lambda a, b: single(a + b),
    # PTX: the sign of the first operand, the magnitude of the second.
    "copysign.f32": lambda a, b: math.copysign(b, a),
    "fma.rn.f32": lambda a, b, c: single(a * b + c),
}


def run(ptx: str, operands: dict[str, float]) -> dict[str, float]:
    """The registers after a block of PTX; ``operands`` holds those that it reads."""
    registers = dict(operands)
    for line in ptx.strip("{}\n").split("\n"):
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        name, arguments = rest.rstrip(";").split(" ", 1)
        if name == ".reg" or (guard and not registers[guard[1:]]):
            continue
        target, *sources = (argument.strip() for argument in arguments.split(","))
        values = [literal(source) if source.startswith("0f") else registers[source] for source in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return registers


@pytest.mark.parametrize("head_dim", [16, 128, 256])
def test_every_coordinate_falls_into_its_cell(head_dim):
    boundaries = torch.tensor(lloyd_max(head_dim).boundaries, dtype=torch.float32)
    assert torch.equal(boundaries, -boundaries.flip(0)), "the kernel relies on mirrored boundaries"
    positive = {f"${i + 2}": boundary for i, boundary in enumerate(boundaries[8:].tolist())}
    inside = torch.randn(500) / head_dim**0.5
    # On both sides of every boundary, one unit in the last place away; on it, either neighbour is right.
    near = torch.cat([torch.nextafter(boundaries, torch.full_like(boundaries, side)) for side in (-1.0, 1.0)])
    y = torch.cat([inside, near, torch.tensor([-1.0, 1.0])])
    want = torch.bucketize(y, boundaries)
    for value, cell in zip(y.tolist(), want.tolist(), strict=True):
        registers = run(compress._CELL_ASM.value, {"$1": value, **positive})
        assert registers["$0"] == cell, f"coordinate {value!r}"
