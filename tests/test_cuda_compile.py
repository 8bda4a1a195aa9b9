"""The native decode compiles for every architecture within its registers and shared memory; no GPU is needed."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from turboquant_vllm.cuda import cluster, decode, nvrtc, paged
from turboquant_vllm.cuda.sources import source
from turboquant_vllm.cuda.usage import ResourceUsage, resource_usage
from turboquant_vllm.cuda.variants import (
    ALWAYS,
    MOST_BLOCKS,
    Cluster,
    Division,
    Even,
    Stored,
    Variant,
    choose_cluster,
    choose_variant,
    cluster_variants,
    fits_clusters,
)
from turboquant_vllm.limits import MAX_SEQUENCES

pytest.importorskip("cuda.core")
bindings = pytest.importorskip("cuda.bindings.nvrtc")

# Bytes of shared memory that one block may ask for.
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}
REGISTERS = 65536
STATIC_SHARED = 49152
# Two values of 4 bytes: the compiler of CUDA 13.0, which torch 2.13 asks for, is that much over the 128 registers that each of
# a block's 512 threads can have; that of 13.5 is not.
SPILLED = 8 if tuple(bindings.nvrtcVersion()[1:]) < (13, 5) else 0


def stays_in_registers(kernel: str, used: ResourceUsage) -> bool:
    """Whether nothing that a thread keeps is in memory, but for what an older compiler finds no register for."""
    if kernel == "tq4_decode" and used.registers == 128:
        return max(used.stack_frame, used.spill_stores) <= SPILLED and used.spill_loads <= 2 * SPILLED
    return used.spill_stores == used.spill_loads == used.stack_frame == 0


# sm_86 and sm_89 have the variants of sm_120: one head dimension is enough of these.
GATES = [*itertools.product(("sm_80", "sm_90", "sm_100", "sm_120"), (64, 128, 256)), ("sm_86", 128), ("sm_89", 128)]


@pytest.mark.parametrize(("arch", "head_dim"), GATES)
def test_compiles_without_spills(arch, head_dim):
    for rows in (4, 8, 16, 32) if arch in ("sm_80", "sm_90") else (4, 16):
        variant = choose_variant(head_dim, rows, SHARED[arch])
        assert variant.shared_bytes <= SHARED[arch], variant
        compiled = nvrtc.compile_cubin(source(), arch=arch, name="decode.cu", defines=variant.defines)
        usage = resource_usage(compiled)
        for kernel, threads in (("tq4_decode", 32 * variant.warps), ("tq4_combine", 256 if head_dim == 64 else 512)):
            used = usage[kernel]
            assert stays_in_registers(kernel, used), (kernel, variant, used)
            assert used.registers * threads <= REGISTERS, (kernel, variant, used)
            assert used.static_shared <= STATIC_SHARED, (kernel, variant, used)
        assert usage["tq4_decode"].static_shared == 0


@pytest.mark.parametrize(("arch", "head_dim"), GATES)
def test_compiles_for_pages_without_spills(arch, head_dim):
    for rows in (4, 16):
        variant = choose_variant(head_dim, rows, SHARED[arch])
        assert variant.shared_bytes_without_query + 12 * MAX_SEQUENCES <= SHARED[arch], variant
        assert variant.rotated_bytes <= SHARED[arch], variant
        defines = {**variant.defines, "PAGED": 1}
        usage = resource_usage(nvrtc.compile_cubin(source(), arch=arch, name="decode.cu", defines=defines))
        for kernel in ("tq4_rotate", "tq4_decode", "tq4_combine"):
            used = usage[kernel]
            assert stays_in_registers(kernel, used), (kernel, variant, used)


@pytest.mark.parametrize(
    ("arch", "head_dim"), [*((arch, 128) for arch in ("sm_80", "sm_90", "sm_100", "sm_120")), ("sm_90", 64), ("sm_90", 256)]
)
def test_compiles_with_masks_without_spills(arch, head_dim):
    for rows in (4, 16):
        variant = choose_variant(head_dim, rows, SHARED[arch], masked=True)
        for pages in (0, 1):
            defines = {**variant.defines, "PAGED": pages}
            usage = resource_usage(nvrtc.compile_cubin(source(), arch=arch, name="decode.cu", defines=defines))
            for kernel, used in usage.items():
                assert stays_in_registers(kernel, used), (kernel, variant, used)


@pytest.mark.parametrize(
    ("arch", "head_dim", "pages", "masked"),
    [*((arch, 128, 0, False) for arch in SHARED), ("sm_90", 64, 0, False), ("sm_90", 256, 1, False), ("sm_90", 128, 1, True)],
)
def test_compiles_with_offsets_without_spills(arch, head_dim, pages, masked):
    variant = choose_variant(head_dim, 4, SHARED[arch], masked=masked, offsets=True)
    assert variant.shared_bytes_without_query + pages * 12 * MAX_SEQUENCES <= SHARED[arch], variant
    defines = {**variant.defines, "PAGED": pages}
    usage = resource_usage(nvrtc.compile_cubin(source(), arch=arch, name="decode.cu", defines=defines))
    for kernel, used in usage.items():
        assert stays_in_registers(kernel, used), (kernel, variant, used)


@pytest.mark.parametrize(
    ("arch", "head_dim", "rows", "pages", "masked", "offsets"),
    [
        *(("sm_90", head_dim, rows, 0, False, False) for head_dim in (64, 128, 256) for rows in (4, 8, 16, 32)),
        ("sm_100", 128, 4, 0, False, False),
        *(("sm_90", 128, 4, *options) for options in ((1, False, False), (0, False, True), (1, False, True), (1, True, True))),
        ("sm_90", 128, 8, 1, False, True),
        ("sm_100", 128, 4, 1, False, True),
        ("sm_90", 64, 8, 1, True, False),
    ],
)
def test_compiles_as_a_cluster_without_spills(arch, head_dim, rows, pages, masked, offsets):
    alone = choose_variant(head_dim, rows, SHARED[arch], masked, offsets, hadamard=True, cluster=True)
    some = cluster_variants(alone)
    variants = [variant for variant in some if variant is not None]
    if pages:
        stored = Stored(torch.bfloat16, torch.int64, "unbiased")
        variants += [dataclasses.replace(variant, stores=stored) for variant in (some.alone, some.few) if variant is not None]
    for variant in variants:
        assert variant.cluster_bytes(MOST_BLOCKS) <= SHARED[arch], variant
        defines, stores = {**variant.defines, "PAGED": pages}, variant.stores is not None
        usage = resource_usage(nvrtc.compile_cubin(source(True, stores), arch=arch, name="decode.cu", defines=defines))
        (used,) = usage.values()
        assert stays_in_registers("tq4_decode", used), (variant, used)
        assert used.registers * 32 * variant.warps * variant.resident <= REGISTERS, (variant, used)
        assert variant.resident * (variant.cluster_bytes(1) + 1024) <= SHARED[arch] + 1024, variant
        assert used.static_shared == 0


@pytest.mark.parametrize(
    ("arch", "head_dim", "rows", "pages", "masked", "offsets"),
    [
        *((arch, 128, 4, 0, False, False) for arch in SHARED),
        *(("sm_90", head_dim, rows, 0, False, False) for head_dim, rows in ((64, 4), (128, 8), (128, 16), (256, 4))),
        *(("sm_90", 128, 4, *options) for options in ((1, False, False), (0, False, True), (1, True, True))),
    ],
)
def test_compiles_with_rotations_by_additions_without_spills(arch, head_dim, rows, pages, masked, offsets):
    variant = choose_variant(head_dim, rows, SHARED[arch], masked, offsets, hadamard=True)
    defines = {**variant.defines, "PAGED": pages}
    usage = resource_usage(nvrtc.compile_cubin(source(), arch=arch, name="decode.cu", defines=defines))
    for kernel, used in usage.items():
        assert stays_in_registers(kernel, used), (kernel, variant, used)


@pytest.mark.parametrize(
    ("pages", "stored", "count"), [(False, None, 6), (True, None, 6), (True, Stored(torch.float16, torch.int32, "norm"), 8)]
)
def test_what_is_compiled_ahead_is_what_is_loaded(monkeypatch, pages, stored, count):
    """All that calls of other lengths may take, compiled side by side before any of it is loaded."""
    ahead, loaded = [], []

    def load_kernel(text, name, *, device, params, defines):
        assert len(ahead) == count
        loaded.append((text, sorted(defines.items())))

    def compile_for(device, name, wanted):
        ahead.extend((text, sorted(defines.items())) for text, defines in wanted)

    monkeypatch.setattr(cluster, "compile_for", compile_for)
    for module in (cluster, decode, paged):
        monkeypatch.setattr(module, "load_kernel", load_kernel)
    line, alone = (choose_variant(128, 4, SHARED["sm_90"], offsets=True, hadamard=True, cluster=one) for one in (False, True))
    cluster._load_all(-count, alone, line, pages, paged._kernels if pages else decode._kernels, stored)
    assert all(one in loaded for one in ahead)
    assert all(one in ahead for one in loaded)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("arch", SHARED)
def test_variants_are_the_compiled_ones(arch, head_dim):
    tested = {choose_variant(head_dim, rows, SHARED[arch]) for rows in (4, 8, 16, 32)}
    for rows in range(1, 33):
        variant = choose_variant(head_dim, rows, SHARED[arch])
        assert variant in tested
        assert variant.stages >= 2
        assert head_dim == 256 or 4 * variant.row_tiles >= rows


@pytest.mark.parametrize(
    ("passes", "tiles", "blocks", "warps", "resident"),
    [
        (8, 64, 8, 8, 1),  # 1 x 1024
        (8, 512, 8, 16, 1),  # 1 x 8192
        (16, 64, 4, 8, 1),
        (64, 256, 2, 16, 1),
        (128, 2048, 0, 0, 0),  # 16 x 32768
        (256, 256, 1, 8, 2),  # 32 x 4096
        (512, 64, 1, 8, 2),  # 64 x 1024
        (300, 64, 0, 0, 0),  # the second wave would be short
        (256, 2048, 0, 0, 0),
    ],
)
def test_which_calls_are_one_launch(passes, tiles, blocks, warps, resident):
    found = choose(passes, tiles)
    assert (found is None) == (blocks == 0)
    if found is not None:
        assert (found.blocks, found.variant.warps, found.variant.resident) == (blocks, warps, resident)
        assert found.even is ALWAYS
        assert not found.variant.spread


@pytest.mark.parametrize(
    ("passes", "tiles", "blocks"),
    [
        (8, 768, 0),  # 1 x 12288: eight blocks of a cluster, a tile a warp more than sixteen and the time to join these
        (8, 769, 16),
        (8, 8192, 16),  # 1 x 131072
        (8, 65536, 0),  # 1 x 2^20: the line, which has four multiprocessors more
        (16, 512, 8),  # 2 x 8192
        (40, 512, 3),  # 5 x 8192
        (48, 512, 0),  # 6 x 8192: no more blocks than clusters have
        (4, 2048, 32),
        (2, 4096, 0),  # more than 32 are not joined, and so few are too few
    ],
)
def test_where_blocks_are_spread(passes, tiles, blocks):
    found = choose(passes, tiles)
    assert (found is not None and found.variant.spread) == (blocks > 0)
    if blocks:
        assert (found.blocks, found.even) == (blocks, ALWAYS)


@pytest.mark.parametrize(
    ("sequences", "tiles", "blocks", "warps", "even"),
    [
        (1, 64, 8, 8, ALWAYS),
        (1, 2048, 8, 16, ALWAYS),  # 32768: 16 tiles a warp where a warp of the line has 7
        (1, 8192, 16, 16, ALWAYS),  # spread
        (2, 64, 4, 8, ALWAYS),  # 2 tiles a warp, whatever the other sequence's length
        (2, 2048, 8, 16, ALWAYS),
        (2, 8192, 8, 16, Even(128, 1, 2112, 10)),
        (5, 2048, 3, 16, Even(48, 1, 2112, 10)),
        (6, 2048, 2, 16, Even(32, 1, 2112, 10)),
        (8, 2048, 2, 16, Even(32, 1, 2112, 10)),
        (16, 64, 1, 16, ALWAYS),
        (16, 512, 1, 16, Even(16, 1, 2112, 10)),
        (32, 512, 1, 8, Even(8, 1, 2112, 10)),
        (64, 512, 1, 8, Even(8, 2, 2112, 10)),
        (67, 512, 0, 0, None),  # a third wave
    ],
)
def test_which_calls_over_pages_may_be_one_launch(sequences, tiles, blocks, warps, even):
    found = choose(8 * sequences, tiles, sequences)
    assert (found is None) == (blocks == 0)
    if found is None:
        return
    assert (found.blocks, found.variant.warps, found.even) == (blocks, warps, even)
    assert (found.even is ALWAYS) == (even is ALWAYS)
    assert found.variant.spread == (blocks * sequences * 8 > 64 and sequences <= 5)


@pytest.mark.parametrize(
    ("sequences", "tiles", "served"),
    [(4, 2048, True), (8, 2048, True), (16, 2048, False), (12, 512, True), (32, 512, True), (64, 512, False)],
)
def test_which_even_lengths_clusters_serve(sequences, tiles, served):
    """From some work on the line of tiles is faster."""
    found = choose(8 * sequences, tiles, sequences)
    assert found is not None
    assert found.even is not ALWAYS
    assert found.even.holds(tiles, 8 * sequences) == served


@pytest.mark.parametrize(
    ("head_dim", "rows", "masked", "offsets"),
    [(128, 4, False, True), (128, 8, True, True), (256, 4, False, False)],
)
def test_no_addition_for_each_value_that_is_looked_up(tmp_path, head_dim, rows, masked, offsets):
    """Over pages, where a cluster's warps may wait for a store: the table's address is in a register that all threads share,
    which a load adds itself."""
    tool = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not tool.exists():
        pytest.skip("this triton has no nvdisasm")
    alone = choose_variant(head_dim, rows, SHARED["sm_90"], masked, offsets, hadamard=True, cluster=True)
    for variant in filter(None, cluster_variants(alone)):
        defines = {**variant.defines, "PAGED": 1}
        (tmp_path / "cubin").write_bytes(nvrtc.compile_cubin(source(True), arch="sm_90", name="x", defines=defines).cubin)
        text = subprocess.run([tool, "-c", tmp_path / "cubin"], capture_output=True, text=True, check=True).stdout
        assert len(re.findall(r"\bLDS R\d+, \[R\d+\+UR\d+", text)) >= head_dim // 2, variant


@pytest.mark.parametrize(
    ("passes", "tiles", "sequences", "in_twos", "warps", "resident", "even"),
    [
        (256, 512, 0, True, 16, 1, ALWAYS),  # 8 x 8192 of 32 heads: two passes a block, all at once
        (256, 512, 0, False, 8, 2, ALWAYS),  # a block's passes might be of two sequences
        (264, 512, 32, True, 16, 1, Even(8, 1, 2112, 10)),
        (272, 512, 34, True, 8, 2, Even(8, 2, 2112, 10)),  # more than run at once: a block's end lies beside another's keys
    ],
)
def test_where_a_block_has_two_passes(passes, tiles, sequences, in_twos, warps, resident, even):
    found = choose(passes, tiles, sequences, in_twos)
    assert found is not None
    assert (found.blocks, found.variant.warps, found.variant.resident, found.even) == (1, warps, resident, even)
    assert found.variant.passes == 3 - resident
    assert found.variant.team_warps == 8


def choose(passes: int, tiles: int, sequences: int = 0, in_twos: bool = False) -> Cluster | None:
    """On an H200, whose 132 multiprocessors are in groups of 10 to 18."""
    variant, at_once = choose_variant(128, 4, SHARED["sm_90"], hadamard=True, cluster=True), {1: 132, 2: 66, 4: 30, 8: 15}

    def fit(variant: Variant, blocks: int) -> int:
        return at_once[blocks] * variant.resident

    found = choose_cluster(passes, tiles, variant, 132, fit, sequences, in_twos)
    if found is not None:
        assert found.variant.resident * (found.variant.cluster_bytes(found.blocks) + 1024) <= SHARED["sm_90"] + 1024
    return found


@pytest.mark.parametrize("shared", sorted(set(SHARED.values())))
def test_every_call_has_a_variant(shared):
    for head_dim, rows, masked, offsets in itertools.product((64, 128, 256), (1, 4, 8, 16, 32), *[(False, True)] * 2):
        sizes = (head_dim, rows, shared, masked, offsets)
        for hadamard in (False, True):
            assert choose_variant(*sizes, hadamard).shared_bytes <= shared
        if fits_clusters(*sizes):
            assert choose_variant(*sizes, True, True).cluster_bytes(MOST_BLOCKS) <= shared
        else:
            assert shared < 120_000


@pytest.mark.parametrize("passes", [1, 7, 8, 128, 231, 512, 640, 924, 925, 3000, 70_000])
@pytest.mark.parametrize("multiprocessors", [58, 108, 132, 170])
def test_ranges(passes, multiprocessors):
    """No block of the first kernel touches more passes than it has room for."""
    for head_dim, rows, shared in itertools.product((64, 128, 256), (4, 8, 16, 32), set(SHARED.values())):
        variant = choose_variant(head_dim, rows, shared)
        for kv_len, split_len in itertools.product((1, 16, 17, 100, 400, 1000, 32768), (None, 16, 512, 1 << 20)):
            plan = Division.choose(passes, kv_len, multiprocessors, variant, split_len)
            pieces = -(-kv_len // (split_len or 16))  # of a pass
            assert 1 <= plan.blocks <= passes * pieces
            assert 1 <= plan.warps <= variant.warps
            share, more = divmod(passes * pieces, plan.blocks * plan.warps)
            workers = np.arange(plan.blocks + 1) * plan.warps  # the first of each block, and where the last ends
            first = workers * share + np.minimum(workers, more)
            assert first[-1] == passes * pieces
            first, end = first[:-1], first[1:]
            assert ((end - 1) // pieces - first // pieces).max() < variant.passes, (variant, plan, kv_len, split_len)
