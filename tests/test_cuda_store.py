"""The native store compiles for every architecture within its registers, and divides as it should; no GPU is needed."""

from __future__ import annotations

import random

import pytest
import torch

from cuda_sources import ARCHS
from turboquant_vllm.cuda import runtime, store

pytest.importorskip("cuda.core")

REGISTERS = 65536


@pytest.mark.parametrize(
    ("slot_dtype", "scale"),
    [(torch.int32, "norm"), (torch.int64, "norm"), (torch.int64, "unbiased"), (torch.int32, "least_squares")],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("has_offsets", [False, True], ids=["plain", "offsets"])
def test_compiles_without_spills(arch, head_dim, dtype, slot_dtype, scale, has_offsets):
    blocks = store.blocks_per_multiprocessor(head_dim, int(arch[3:]) // 10, has_offsets)
    defines = store.defines(head_dim, dtype, slot_dtype, scale, has_offsets, blocks)
    compiled = runtime.compile_cubin(store.source(), arch=arch, name="store.cu", defines=defines)
    used = runtime.resource_usage(compiled)["tq4_store"]
    assert used.spill_stores == used.spill_loads == used.stack_frame == 0, used
    assert used.registers * store.THREADS * blocks <= REGISTERS, used


def test_division_by_multiplication(generator):
    seed = int(torch.randint(2**31, (), generator=generator))
    draw = random.Random(seed)
    divisors = [*range(1, 300), 2**31 - 1, 2**30 + 1, *(draw.randrange(1, 2**31) for _ in range(300))]
    for divisor in divisors:
        inverse, shift = store._inverse(divisor)
        assert inverse < 2**32
        near = [divisor * k + d for k in (1, 2, 2**31 // divisor) for d in (-1, 0, 1)]
        for x in [0, 1, 2**31 - 1, *near, *(draw.randrange(2**31) for _ in range(20))]:
            if 0 <= x < 2**31:
                assert x * inverse >> shift == x // divisor, (x, divisor)
