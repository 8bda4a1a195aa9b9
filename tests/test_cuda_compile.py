"""The native decode compiles for every architecture within its registers and shared memory; no GPU is needed."""

from __future__ import annotations

import pytest

from turboquant_vllm.cuda import runtime
from turboquant_vllm.cuda.decode import SOURCE, choose_split, choose_variant

pytest.importorskip("cuda.core")

# Bytes of shared memory that one block may ask for.
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
REGISTERS = 65536
STATIC_SHARED = 49152


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", SHARED)
def test_compiles_without_spills(arch, head_dim):
    for rows in (4, 8, 16, 32):
        variant = choose_variant(head_dim, rows, SHARED[arch])
        assert variant.shared_bytes <= SHARED[arch], variant
        compiled = runtime.compile_cubin(SOURCE.read_text(), arch=arch, name="decode.cu", defines=variant.defines)
        usage = runtime.resource_usage(compiled)
        for kernel, threads in (("tq4_decode", 32 * variant.warps), ("tq4_combine", 4 * head_dim)):
            used = usage[kernel]
            assert used.spill_stores == used.spill_loads == used.stack_frame == 0, (kernel, variant, used)
            assert used.registers * threads <= REGISTERS, (kernel, variant, used)
            assert used.static_shared <= STATIC_SHARED, (kernel, variant, used)
        assert usage["tq4_decode"].static_shared == 0


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", SHARED)
def test_variants_are_the_compiled_ones(arch, head_dim):
    tested = {choose_variant(head_dim, rows, SHARED[arch]) for rows in (4, 8, 16, 32)}
    for rows in range(1, 33):
        variant = choose_variant(head_dim, rows, SHARED[arch])
        assert variant in tested
        assert variant.stages >= 2
        assert head_dim == 256 or 4 * variant.row_tiles >= rows


@pytest.mark.parametrize("passes", [1, 7, 8, 128, 256, 512, 3000])
def test_splits(passes):
    for kv_len in (1, 255, 256, 257, 4096, 32768, 131072, 1_000_000):
        for rows in (4, 8, 16, 32):
            for shared in SHARED.values():
                variant = choose_variant(128, rows, shared)
                length, gang_warps = choose_split(passes, kv_len, 132, variant)
                assert length % 256 == 0
                assert 1 <= -(-kv_len // length) <= 128  # what the second kernel has room for
                assert variant.warps % gang_warps == 0
                assert variant.warps // gang_warps <= variant.max_gangs
