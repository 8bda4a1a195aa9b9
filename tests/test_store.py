"""The paged store: its reference, what the public function refuses, and the operator; and the Triton kernel's compiling."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from store_cases import StoreCase, check_store, random_store
from turboquant_vllm import PagedTQ4Cache, TQ4Codec, ops, tq4_store
from turboquant_vllm.limits import why_not_store, why_not_store_triton
from turboquant_vllm.store import why_not_backend

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
SIZES = {"tokens": 21, "heads": 3, "head_dim": 64, "dtype": HALF}


def store(case: StoreCase, backend: str = "auto") -> None:
    tq4_store(case.k, case.v, case.cache, case.codec, case.slot_mapping, backend=backend)


@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 40),
    heads=st.integers(1, 5),
    head_dim=st.sampled_from([16, 64, 80, 96, 128, 192, 256, 512]),
    dtype=st.sampled_from([HALF, BF16, FULL]),
    page_size=st.sampled_from([16, 48, 256]),
    layout=st.sampled_from(["contiguous", "transposed", "odd"]),
    scale=st.sampled_from(["norm", "least_squares", "unbiased"]),
    slot_dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_reference(seed, **sizes):
    check_store(store, random_store(torch.Generator().manual_seed(seed), **sizes))


def test_nothing_to_store(generator):
    case = random_store(generator, **(SIZES | {"tokens": 0}))
    store(case)
    case = random_store(generator, **SIZES)
    case.slot_mapping.fill_(-1)
    check_store(store, case)


def test_operator_is_registered_right(generator):
    case = random_store(generator, **SIZES)
    operator = torch.ops.turboquant.store.default
    checks = torch.library.opcheck(operator, (*case.arguments, "reference"))
    assert set(checks.values()) == {"SUCCESS"}
    assert operator._schema.arguments[2].alias_info.is_write


def test_compiles_into_one_graph(generator):
    case = random_store(generator, **SIZES)
    step = torch.compile(
        lambda k, v: tq4_store(1 * k, v, case.cache, case.codec, case.slot_mapping), fullgraph=True, backend="eager"
    )
    check_store(lambda case: step(case.k, case.v), case)


def test_compiles_into_one_graph_where_triton_serves_it(generator, monkeypatch):
    monkeypatch.setattr(ops, "why_not_triton", lambda device: "")
    case, calls = random_store(generator, **SIZES, scale="unbiased"), []

    def keep(graph, inputs):
        calls.extend(node for node in graph.graph.nodes if node.op == "call_function" and "turboquant" in str(node.target))
        return lambda *args: (args[0],)

    def step(k, v):
        tq4_store(k, v, case.cache, case.codec, case.slot_mapping)
        return k + 1

    torch.compile(step, fullgraph=True, backend=keep)(case.k, case.v)
    assert [node.args[-1] for node in calls] == ["triton"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": None}, TypeError, "k must be a torch.Tensor, got NoneType"),
        ({"k": torch.zeros(21, 3, 64, dtype=torch.float64)}, TypeError, "k must be .* got torch.float64"),
        ({"k": torch.zeros(21, 2, 64, dtype=HALF)}, ValueError, r"k must have shape \[tokens, 3, 64\], got \[21, 2, 64\]"),
        ({"v": torch.zeros(21, 3, 64)}, TypeError, "v must be torch.float16, got torch.float32"),
        ({"v": torch.zeros(20, 3, 64, dtype=HALF)}, ValueError, r"v must have shape \[21, 3, 64\], got \[20, 3, 64\]"),
        ({"cache": None}, TypeError, "cache must be a PagedTQ4Cache, got NoneType"),
        ({"codec": None}, TypeError, "codec must be a TQ4Codec, got NoneType"),
        ({"codec": TQ4Codec(128)}, ValueError, "codec must have the cache's head_dim 64, got 128"),
        ({"codec": TQ4Codec(64, device="meta")}, ValueError, "codec must be on the cache's device cpu, got meta"),
        ({"slot_mapping": torch.zeros(21)}, TypeError, "slot_mapping must be torch.int32 or torch.int64, got torch.float32"),
        ({"slot_mapping": torch.zeros(22, dtype=torch.int64)}, ValueError, r"slot_mapping must have shape \[21\], got \[22\]"),
        ({"backend": "fast"}, ValueError, "backend must be one of .*, got 'fast'"),
        ({"backend": "cuda"}, RuntimeError, "backend='cuda' cannot run: .* cpu"),
        ({"backend": "triton"}, RuntimeError, "backend='triton' cannot run: Triton does not run on cpu|triton package"),
    ],
)
def test_refusals(generator, changes, error, message):
    case = random_store(generator, **SIZES)
    before = case.memory.clone()
    names = ("k", "v", "cache", "codec", "slot_mapping")
    arguments = {name: getattr(case, name) for name in names} | changes
    with pytest.raises(error, match=message):
        tq4_store(**arguments)
    assert torch.equal(case.memory, before)


WIDE = torch.zeros(4, 2, 2 * 128, dtype=HALF)


@pytest.mark.parametrize(
    ("x", "hadamard", "slots", "reason"),
    [
        (WIDE[..., :128], True, 100, ""),
        (WIDE[:1, :, :128], True, 100, ""),
        (WIDE[..., :128], True, 2**31, "store fewer than 2\\^31 vectors, got 8 into 2147483648 slots"),
        (WIDE[..., :128], False, 100, "with rotation 'hadamard' and head_dim 64, 128 or 256, got 'haar' and 128"),
        (WIDE[..., :32], True, 100, "got 'hadamard' and 32"),
        (WIDE[..., ::2], True, 100, "whole vectors, 16-byte multiples apart, got strides"),
        (torch.zeros(4, 2, 132, dtype=HALF)[..., :128], True, 100, "16-byte multiples apart, got strides"),
        (WIDE[..., :128].float(), True, 100, "store fp16 or bf16, got torch.float32"),
    ],
)
def test_what_the_native_kernel_stores(x, hadamard, slots, reason):
    got = why_not_store(x, x, hadamard, slots)
    assert re.search(reason, got) if reason else got == ""


def test_on_a_gpu_the_native_kernel_gets_what_it_stores(generator, monkeypatch):
    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    case = random_store(generator, **SIZES)
    said = [why_not_backend("cuda", case.k, case.v, case.cache, TQ4Codec(64, rotation=kind)) for kind in ("hadamard", "haar")]
    assert said[0] == ""
    assert "got 'haar' and 64" in said[1]


def test_a_cache_that_somebody_else_owns_is_written_in_place(generator):
    case = random_store(generator, **SIZES)
    view = PagedTQ4Cache(case.cache.buffer, page_size=16, num_kv_heads=3, head_dim=64)
    store(case)
    assert torch.equal(view.k_codes, case.cache.k_codes)


def test_where_triton_stores_no_wide_keys_with_offsets(monkeypatch):
    device = torch.device("cuda")
    assert not why_not_store_triton(device, 512, True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not why_not_store_triton(device, 256, True)
    assert not why_not_store_triton(device, 512, False)
    assert why_not_store_triton(device, 512, True).endswith("head_dim up to 256 on GPUs that are not NVIDIA's, got 512")
