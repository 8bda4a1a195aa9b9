"""The native store compiles for every architecture within its registers, and divides as it should; no GPU is needed."""

from __future__ import annotations

import random

import pytest
import torch

from cuda_sources import ARCHS
from turboquant_vllm.cuda import nvrtc, store
from turboquant_vllm.cuda.sources import store_source
from turboquant_vllm.cuda.usage import resource_usage
from turboquant_vllm.cuda.variants import Stored, team_bytes

pytest.importorskip("cuda.core")

REGISTERS = 65536
# Bytes of shared memory that one block may ask for.
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}

HALF, BF16 = torch.float16, torch.bfloat16
# Every architecture with what takes most registers, one of them with all else.
VARIANTS = [
    *((arch, head_dim, BF16, torch.int64, "unbiased") for arch in ARCHS for head_dim in (64, 128, 256)),
    *(("sm_90", 128, HALF, slots, scale) for slots in (torch.int32, torch.int64) for scale in ("norm", "least_squares")),
    ("sm_90", 64, HALF, torch.int32, "unbiased"),
    ("sm_90", 256, HALF, torch.int32, "norm"),
]


@pytest.mark.parametrize(("arch", "head_dim", "dtype", "slot_dtype", "scale"), VARIANTS)
@pytest.mark.parametrize("has_offsets", [False, True], ids=["plain", "offsets"])
def test_compiles_without_spills(arch, head_dim, dtype, slot_dtype, scale, has_offsets):
    major = int(arch[3:]) // 10
    kernels = [(1, store.teams_per_multiprocessor(head_dim, major, has_offsets))]
    if major >= 9:
        kernels.append((store.packed_teams(head_dim, has_offsets, SHARED[arch]), 1))
    for teams, blocks in kernels:
        defines = store.defines(head_dim, Stored(dtype, slot_dtype, scale), has_offsets, teams, blocks)
        compiled = nvrtc.compile_cubin(store_source(), arch=arch, name="store.cu", defines=defines)
        used = resource_usage(compiled)["tq4_store"]
        assert used.spill_stores == used.spill_loads == used.stack_frame == 0, used
        assert used.registers * store.THREADS * teams * blocks <= REGISTERS, used
        assert used.static_shared + teams * team_bytes(head_dim, has_offsets) <= SHARED[arch], used


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
