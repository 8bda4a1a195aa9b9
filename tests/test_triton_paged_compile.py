"""The paged kernels compile for every architecture, within its shared memory, and once for all lengths; no GPU is needed."""

from __future__ import annotations

import contextlib

import pytest
import torch

from paged_cases import random_batch
from test_triton_compile import TARGETS, _Kernel, check_shared_memory, compiled, target, triton  # noqa: F401  (fixtures)

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
CALLS = {
    "page-16": {"dtype": HALF, "head_dim": 128, "group": 4},
    "page-64": {"dtype": BF16, "head_dim": 64, "group": 16, "page_size": 64},
    "page-48": {"dtype": BF16, "head_dim": 96, "group": 7, "page_size": 48},
    "wide": {"dtype": BF16, "head_dim": 256, "group": 8},
    "float32": {"dtype": FULL, "head_dim": 128, "group": 4},
    "offsets": {"dtype": BF16, "head_dim": 128, "group": 4, "page_size": 128, "offsets": True},
    "wide-offsets": {"dtype": BF16, "head_dim": 256, "group": 8, "page_size": 64, "offsets": True},
    "wide-512": {"dtype": BF16, "head_dim": 512, "group": 8, "page_size": 64, "offsets": True},
    "windows": {"dtype": HALF, "windows": torch.tensor([3, 4], dtype=torch.int32)},
    "masks": {"dtype": HALF, "head_dim": 192, "group": 4, "sliding_window": 100, "softcap": 30.0, "sinks": torch.zeros(8)},
}
FITS = {
    "sm_80": ["page-16"],
    "sm_90": ["page-48", "float32", "offsets"],
    "sm_100": ["page-64", "offsets"],
    "sm_120": ["page-16", "wide", "masks", "windows", "wide-offsets", "wide-512"],
    "gfx942": ["wide", "float32", "offsets"],
}


@pytest.fixture
def call(compiled, target, monkeypatch):  # noqa: F811
    """Runs a batch, compiling the kernels that it should launch."""
    from turboquant_vllm.triton import paged_attention

    for name, value in list(vars(paged_attention).items()):
        if name.endswith("_kernel"):
            monkeypatch.setattr(paged_attention, name, _Kernel(value, compiled))
    monkeypatch.setattr(paged_attention, "device_guard", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(paged_attention, "uses_prmt", lambda device_type: TARGETS[target][0] == "cuda")

    def run(batch):
        out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2])
        paged_attention.paged_attention(*batch.arguments, out, lse)

    return run


@pytest.mark.parametrize(("target", "name"), [(at, name) for at, names in FITS.items() for name in names], indirect=["target"])
def test_paged_attention_fits(generator, target, compiled, call, name):  # noqa: F811
    call(random_batch(generator, [(1, 70), (40, 60)], **CALLS[name]))
    names = [kernel for kernel, _ in compiled]
    assert names == ["query_kernel", *["paged_attention_kernel", "paged_merge_kernel"] * 2]
    check_shared_memory(target, compiled)
    if name == "page-16":
        assert all(kernel.asm["ptx"].count("prmt.b32") > 40 for name, kernel in compiled if name == "paged_attention_kernel")


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(("window", "offsets"), [(False, False), (True, False), (True, True)])
def test_new_lengths_compile_nothing(generator, compiled, call, window, offsets):  # noqa: F811
    def run(lengths, spare):
        options = {"sliding_window": 1 + spare} if window else {}
        options |= {"page_size": 64, "offsets": True} if offsets else {}
        call(random_batch(generator, lengths, dtype=HALF, group=4, spare_tokens=spare, **options))

    # More than 32 rows, and more than 64; up to 8 rows, up to 16 and more.
    for lengths in ([(1, 9)], [(4, 9)], [(9, 9)], [(40, 80)], [(1, 5), (40, 80)]):
        run(lengths, 0)
    known = {id(kernel) for _, kernel in compiled}
    for count in range(1, 24):
        for lengths in ([(1, 37 * count)] * count, [(count, 3 * count), (1, 2)], [(11 * count, 300)]):
            run(lengths, count)
            new = [function for function, kernel in compiled if id(kernel) not in known]
            assert not new, f"compiled again for {lengths}: {new}"
