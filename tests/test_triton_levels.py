"""The look-up by byte permutes, its PTX run by a small emulator: every packed byte gives its two levels, bit for bit."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton")
levels = pytest.importorskip("turboquant_vllm.triton.levels")

MASK = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ``prmt.b32``: byte i of the result is the byte of b:a that nibble i of the selector names, or its sign."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        if nibble & 8:
            byte = 255 * (byte >> 7)
        result |= byte << 8 * i
    return result


def lop3(a: int, b: int, c: int, table: int) -> int:
    """PTX ``lop3.b32``: bit ``4a + 2b + c`` of the table, for every bit."""
    result = 0
    for i in range(32):
        index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        result |= (table >> index & 1) << i
    return result


INSTRUCTIONS = {
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "shl.b32": lambda a, n: a << n & MASK,
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
}


def run(ptx: str, operands: dict[str, int]) -> dict[str, int]:
    """The registers after a block of PTX; ``operands`` holds those that it reads."""
    registers = dict(operands)
    for line in ptx.strip("{}\n").split("\n"):
        name, arguments = line.rstrip(";").split(" ", 1)
        if name == ".reg":
            continue
        target, *sources = (argument.strip() for argument in arguments.split(","))
        values = [int(source, 0) if source[0].isdigit() else registers[source] for source in sources]
        registers[target] = INSTRUCTIONS[name](*values)
    return registers


def test_emulator():
    # From the definition of prmt in the PTX manual: a permutation, and the replicated sign of byte 3 of a.
    assert prmt(0x33221100, 0x77665544, 0x7410) == 0x77441100
    assert prmt(0x80000000, 0, 0xB3B0) == 0xFF80FF00
    assert lop3(0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0xCA) == 0xCACACACA


@pytest.mark.parametrize(("elements", "bits"), [(4, 8), (2, 16)])
def test_every_byte_gives_its_two_levels(elements, bits):
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    ptx = levels._lookup_asm(elements, bits)
    for first in range(0, 256, 4):
        packed = [(first + i * 65) % 256 for i in range(4)]  # over the loop, every byte at every place
        level = [draw.getrandbits(16) for _ in range(16)]
        operands = {"$4": int.from_bytes(bytes(packed), "little")}
        for word in range(8):  # low bytes of levels 0-3, 4-7, 8-11, 12-15, then high bytes
            plane, quarter = divmod(word, 4)
            table = int.from_bytes(bytes(level[4 * quarter + i] >> 8 * plane & 255 for i in range(4)), "little")
            operands |= {f"${5 + elements * word + copy}": table for copy in range(elements)}
        registers = run(ptx, operands)
        values = [level[nibble] for byte in packed for nibble in (byte >> 4, byte & 15)]
        parts = 8 // elements
        # Output words: part by part, the elements in order, two 16-bit values a word.
        order = [values[parts * element + part] for part in range(parts) for element in range(elements)]
        for word in range(4):
            assert registers[f"${word}"] == order[2 * word] | order[2 * word + 1] << 16, f"bytes {packed}, word {word}"
