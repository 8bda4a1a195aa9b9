"""A step that stores its own keys and values and attends in one call, run lane by lane on a CPU: it writes and gives what two
calls do, and attention waits for the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import kernel_lanes
from kernel_lanes import LaneError, emulated_decode, emulated_store, few_objects, needs_compiler  # noqa: F401
from turboquant_vllm import ops, tq4_paged_attention
from turboquant_vllm.cuda import cluster, store
from turboquant_vllm.cuda.variants import Cluster, Even, Variant
from turboquant_vllm.vllm.layer import PagedLayer
from vllm_cases import Step, random_step

pytestmark = [pytest.mark.slow, needs_compiler, pytest.mark.usefixtures("emulated_store", "emulated_decode")]

LENGTHS = [(1, 70), (2, 65), (1, 2), (3, 130)]  # query tokens, keys


_LINE, _CLUSTERS = ["tq4_rotate", "tq4_decode", "tq4_combine"], ["tq4_decode"]
# What may serve, and the kernels behind the store.
CHOICES: dict[str, tuple[Callable[[Variant], Cluster | None], list[str]]] = {
    "line": (lambda _: None, _LINE),
    "clusters": (lambda variant: Cluster(2, variant), _CLUSTERS),
    "one launch": (lambda variant: Cluster(2, dataclasses.replace(variant, warps=4)), _CLUSTERS),
    "one launch of blocks": (lambda variant: Cluster(1, dataclasses.replace(variant, warps=8)), _CLUSTERS),
    "spread": (lambda variant: Cluster(5, dataclasses.replace(variant, spread=True)), _CLUSTERS),
    "clusters if even": (lambda variant: Cluster(2, variant, Even(4, 1, 24, 4)), _LINE + _CLUSTERS),
    "line if uneven": (lambda variant: Cluster(2, variant, Even(1, 1, 24, 4)), _LINE + _CLUSTERS),
}


@pytest.fixture(params=CHOICES, autouse=True)
def launches(
    request: pytest.FixtureRequest,
    emulated_store: None,  # noqa: F811
    emulated_decode: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """Names of the kernels that have run."""
    chosen = CHOICES[request.param][0]
    if "one launch" in request.param:  # the device has room for all blocks
        monkeypatch.setattr(cluster, "_fit", lambda *_: 1000)
        # As many teams as there store alone, too: values of few tokens are rotated in another order than those of many.
        monkeypatch.setattr(store, "_kernels", kernel_lanes.store_kernels(100))
    monkeypatch.setattr(cluster, "choose_cluster", lambda passes, tiles, variant, *_: chosen(variant))
    return kernel_lanes.names_of_launches(monkeypatch)


def step_of(
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    key_offsets: bool,
    head_dim: int = 64,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
) -> Step:
    """Its earlier tokens are stored by the reference; from then on the native kernels say that they run here."""
    layer = PagedLayer(4, 2, head_dim, head_dim**-0.5, exact=None, key_offsets=key_offsets)
    if key_offsets:
        layer.use_key_scales(torch.exp(0.4 * torch.randn(2, head_dim, generator=generator)), torch.device("cpu"))
    step = random_step(generator, lengths, layer, dtype=torch.float16)
    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    return step


def attend(step: Step, at_once: bool, slots: torch.dtype = torch.int64) -> torch.Tensor:
    if not at_once:
        step.store()
    where = {name: x.to(slots) for name, x in step.where.items()} if at_once else {}
    out = torch.full_like(step.q, float("nan"))
    step.layer.attend(step.q, step.k, step.v, step.kv_cache, step.runs(decode_len=3), out, **where)
    return out


@pytest.mark.parametrize(("key_offsets", "head_dim"), [(False, 64), (True, 64), (True, 128)])
def test_the_same_as_two_calls(generator, monkeypatch, launches, request, key_offsets, head_dim):
    step = step_of(generator, monkeypatch, key_offsets, head_dim)
    before = step.kv_cache.clone()
    want = attend(step, at_once=False)
    stored = step.kv_cache.clone()
    step.kv_cache.copy_(before)
    first = len(launches)
    got = attend(step, at_once=True)
    assert not got.isnan().any()
    assert torch.equal(got, want)
    assert torch.equal(step.kv_cache, stored)
    assert not torch.equal(stored, before)
    chosen = request.node.callspec.params["launches"]
    assert launches[:first] == ["tq4_store", *CHOICES[chosen][1]]
    assert launches[first:] == (launches[1:first] if "one launch" in chosen else launches[:first])
    assert not cluster._counters[-1]._zeros.any()


@pytest.mark.parametrize("key_offsets", [False, True])
@pytest.mark.parametrize("slots", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_a_page_that_another_sequence_reads(generator, monkeypatch, launches, key_offsets, slots):
    """As where a prefix is shared whose last page this very step fills."""
    step = step_of(generator, monkeypatch, key_offsets, lengths=[(1, 400), (1, 70), (1, 128)])
    page = 127 // step.page_size  # the last of the third sequence, and one of the first two
    step.block_table[0, page] = step.block_table[1, page if page < 2 else 3] = step.block_table[2, page]
    before = step.kv_cache.clone()
    want = attend(step, at_once=False)
    step.kv_cache.copy_(before)
    assert torch.equal(attend(step, at_once=True, slots=slots), want)
    assert not want.isnan().any()


def test_more_tokens_than_a_warp_has_lanes(generator, monkeypatch, launches):
    step = step_of(generator, monkeypatch, key_offsets=False, lengths=[(1, 2 + n % 3) for n in range(33)])
    before = step.kv_cache.clone()
    want = attend(step, at_once=False)
    step.kv_cache.copy_(before)
    assert torch.equal(attend(step, at_once=True), want)


@pytest.mark.parametrize("key_offsets", [False, True])
@pytest.mark.parametrize("launches", [name for name in CHOICES if "one launch" not in name], indirect=True)
def test_attention_waits_for_the_store(generator, monkeypatch, launches, key_offsets):
    attend_without(generator, monkeypatch, key_offsets, "wait_for_previous();  // the store of the step's own keys and values")


@pytest.mark.parametrize("key_offsets", [False, True])
@pytest.mark.parametrize("launches", ["one launch", "one launch of blocks"], indirect=True)
@pytest.mark.parametrize("sound", ["wait_for_count(p.stored, p.store_blocks);", "__syncthreads();  // all lanes have written"])
def test_attention_waits_for_blocks_that_store(generator, monkeypatch, launches, key_offsets, sound):
    attend_without(generator, monkeypatch, key_offsets, sound, "that another block wrote")


@pytest.mark.parametrize("launches", ["line if uneven"], indirect=True)
def test_a_kernel_that_leaves_ends_after_the_one_before(generator, monkeypatch, launches):
    attend_without(generator, monkeypatch, False, "if (blockIdx.x == 0) wait_for_previous();")


def attend_without(
    generator: Any,
    monkeypatch: pytest.MonkeyPatch,
    key_offsets: bool,
    sound: str,
    found: str = "a kernel before wrote, without having waited",
) -> None:
    """Where no kernel waits so, it is noticed that attention reads what the store has yet to write."""
    text = kernel_lanes.decode_source
    assert sound in text(True, True)
    monkeypatch.setattr(kernel_lanes, "decode_source", lambda *kind: text(*kind).replace(sound, ";  // "))
    step = step_of(generator, monkeypatch, key_offsets)
    attend(step, at_once=False)
    with pytest.raises(LaneError, match=found):
        attend(step, at_once=True)


def test_a_step_without_sequences_is_stored(generator, monkeypatch, launches):
    step = step_of(generator, monkeypatch, key_offsets=True)
    cache, before = step.layer.pages(step.kv_cache), step.kv_cache.clone()
    starts, slots = torch.zeros(1, dtype=torch.int32), step.where["slot_mapping"]
    sequences = (step.block_table[:0], starts[:0], starts)
    tq4_paged_attention(step.q, cache, step.layer.codec_on(cache.device), *sequences, k=step.k, v=step.v, slot_mapping=slots)
    assert launches == ["tq4_store"]
    assert not torch.equal(step.kv_cache, before)


def test_it_compiles_into_one_graph(generator, monkeypatch, launches):
    step = step_of(generator, monkeypatch, key_offsets=True)
    cache = step.layer.pages(step.kv_cache)
    codec, (run,), before = step.layer.codec_on(cache.device), step.runs(decode_len=3), step.kv_cache.clone()
    want = attend(step, at_once=True)
    step.kv_cache.copy_(before)
    expected, launches[:] = launches[:], []

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v, slot_mapping, previous_slots):
        sequences = (run.block_table, run.seq_lens, run.cu_seqlens_q)
        new = {"k": k, "v": v, "slot_mapping": slot_mapping, "previous_slots": previous_slots[:-1]}
        return tq4_paged_attention(1 * q, cache, codec, *sequences, sm_scale=64**-0.5, max_query_len=3, **new)

    assert torch.equal(call(step.q, step.k, step.v, **step.where), want)
    assert launches == expected
