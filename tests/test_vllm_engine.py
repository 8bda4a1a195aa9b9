"""vLLM's engine with the TQ4 cache against transformers with ``TurboQuantCache``: the committed small model, and random ones.

The log-probabilities of all tokens at each place of an answer must be what transformers makes of the same tokens over the same
cache, up to what rounding does: :mod:`engine_gate` says how that is measured. That this notices what it should is tested with
engines that make a mistake.

Runs on a GPU, or where vLLM was built for CPUs: there the engine itself is the same, and attention is that of the reference.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from vllm_engine_cases import (  # isort: skip  (skips where there is no engine)
    DEVICE,
    FAMILIES,
    Engine,
    Fault,
    noticed,
    held_out_prompts,  # noqa: F401  (fixture "prompts")
    one_head_of_another,
    one_process,  # noqa: F401  (fixture)
    random_model,
    random_prompts,
    small_model,  # noqa: F401  (fixture "model")
)
from engine_gate import Gate
from hf_models import WINDOW
from turboquant_vllm import PagedTQ4Cache
from turboquant_vllm.vllm.batch import Kind, Run
from turboquant_vllm.vllm.dense import DenseLayer
from turboquant_vllm.vllm.layer import PagedLayer, exact_attention

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_prompts_alone_and_together(model, prompts):
    gate = Gate(model, exact_prefill=True)
    with Engine() as engine:
        gate.check(prompts, engine.answers(prompts))
        gate.check(prompts[:3], [engine.answers([prompt])[0] for prompt in prompts[:3]])


def test_prefix_hits_beside_prompts_of_equal_length(model, prompts):
    gate = Gate(model, exact_prefill=False)
    with Engine(exact_prefill=False, enable_prefix_caching=True) as engine:
        for _ in range(2):
            gate.check(prompts, engine.answers(prompts))
        # Cached prefixes with new ends, among new prompts whose lengths are the totals of others.
        mixed = [prompts[0][:96] + prompts[3][:4], prompts[6][::-1], prompts[3][:100], prompts[8][:48] + prompts[7], prompts[2]]
        gate.check(mixed, engine.answers(mixed))
        assert engine.counter("vllm:prefix_cache_hits") > 500


@pytest.mark.parametrize("exact_prefill", [True, False])
def test_keys_with_offsets(model, prompts, exact_prefill):
    """Offsets and the scales of the model's weights: prompts together, and in chunks."""
    form = {"exact_prefill": exact_prefill, "key_offsets": True}
    gate = Gate(model, **form)
    with Engine(**form) as engine:
        assert engine.llm.llm_engine.vllm_config.cache_config.block_size == (64 if DEVICE == "cuda" else 128)
        gate.check(prompts, engine.answers(prompts))
    with Engine(**form, max_num_batched_tokens=40) as engine:
        some = [prompts[index] for index in (0, 3, 6)]
        alone = [engine.answers([prompt])[0] for prompt in some]
        gate.check(some, alone, cuts=lambda length: range(40, length, 40))


@pytest.mark.parametrize("chunk", [16, 64])
def test_chunks(model, prompts, chunk):
    with Engine(max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 16)) as engine:
        some = prompts[2:6]
        alone = [engine.answers([prompt])[0] for prompt in some]
        Gate(model, exact_prefill=True).check(some, alone, cuts=lambda length: range(chunk, length, chunk))
    with Engine(exact_prefill=False, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 16)) as engine:
        Gate(model, exact_prefill=False).check(prompts, engine.answers(prompts))


def test_preemption(model, prompts):
    longest = [prompts[index] for index in (0, 3, 6, 8)]
    with Engine(exact_prefill=False, num_gpu_blocks_override=56) as engine:
        Gate(model, exact_prefill=False).check(longest, engine.answers(longest))
        assert engine.counter("vllm:num_preemptions") > 0


def test_drafts_from_the_prompt(model, prompts):
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    with Engine(speculative_config=drafts) as engine:
        Gate(model, exact_prefill=True).check(prompts, engine.answers(prompts))
        assert engine.counter("vllm:spec_decode_num_accepted_tokens") > 10


@pytest.mark.parametrize("wrong_by", [0, -1, 1])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_and_soft_caps(family, wrong_by, tmp_path, generator, monkeypatch):
    model = random_model(family)
    model.save_pretrained(tmp_path)
    prompts = random_prompts(generator, 40, 5, 60, 17, 33)
    if wrong_by:
        right = PagedLayer.attend

        def attend(layer: PagedLayer, *args: Any, **where: Any) -> None:
            layer = copy.copy(layer)
            if layer.sliding_window is not None:
                assert layer.sliding_window == WINDOW
                layer.sliding_window += wrong_by
            right(layer, *args, **where)

        monkeypatch.setattr(PagedLayer, "attend", attend)
    with Engine(model=tmp_path, dtype=FAMILIES[family], exact_prefill=False, max_model_len=128) as engine:
        answers = engine.answers(prompts)
    with noticed(wrong_by):
        Gate(model, exact_prefill=False).check(prompts, answers)


def one_page_of_another(right: Fault, layer: PagedLayer, q, k, v, kv_cache, runs: Sequence[Run], out, **where) -> None:
    """The first two sequences of a run have each other's second page."""

    def swapped(run: Run) -> Run:
        table = run.block_table.clone()
        table[:2, 1:2] = run.block_table[:2, 1:2].flip(0)
        return dataclasses.replace(run, block_table=table)

    right(layer, q, k, v, kv_cache, [swapped(run) for run in runs], out, **where)


def one_chunk_without_prefix(right: Fault, layer: PagedLayer, q, k, v, kv_cache, runs: Sequence[Run], out, **where) -> None:
    """The last chunk of a prompt of more than 64 tokens is taken for a whole prompt."""

    def alone(run: Run) -> Run:
        is_last = run.kind == Kind.CONTINUED and max(run.seq_lens_cpu or (0,)) > 64
        return dataclasses.replace(run, kind=Kind.EXACT) if is_last else run

    layer = copy.copy(layer)
    layer.exact = exact_attention
    whole = [run if run.kind != Kind.EXACT else dataclasses.replace(run, kind=Kind.CONTINUED) for run in runs]
    right(layer, q, k, v, kv_cache, [alone(run) for run in whole], out, **where)


@pytest.mark.parametrize("key_offsets", [False, True])
@pytest.mark.parametrize("fault", [None, one_page_of_another, one_head_of_another, one_chunk_without_prefix])
def test_faults_are_noticed(fault, key_offsets, tmp_path, generator, monkeypatch):
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    prompts = random_prompts(generator, 100, 80, 90, 70)
    if fault is not None:
        right = PagedLayer.attend
        monkeypatch.setattr(PagedLayer, "attend", lambda *args, **where: fault(right, *args, **where))
    form = {"exact_prefill": False, "key_offsets": key_offsets}
    # Keys with offsets depend on where a prompt is cut, so those that are cut are read alone.
    alone = key_offsets and fault is one_chunk_without_prefix
    options = {"max_num_batched_tokens": 8192 if key_offsets and not alone else 32, "block_size": 64 if key_offsets else 16}
    with Engine(model=tmp_path, max_model_len=128, **form, **options) as engine:
        answers = [engine.answers([prompt])[0] for prompt in prompts] if alone else engine.answers(prompts)
    with noticed(fault):
        Gate(model, **form).check(prompts, answers, cuts=lambda length: range(32, length, 32) if alone else ())


@pytest.mark.parametrize(
    ("family", "left", "fault"),
    [("llama", "1", None), ("llama", "1", one_head_of_another), ("gemma2", "sliding_window", None)],
)
def test_layers_left_dense(family, left, fault, tmp_path, generator, monkeypatch):
    """One of two, by number or by its window, behind prefixes and in chunks."""
    model = random_model(family)
    model.save_pretrained(tmp_path)
    prompts = random_prompts(generator, 100, 80, 70)
    if fault is not None:
        right = DenseLayer.attend
        monkeypatch.setattr(DenseLayer, "attend", lambda *args, **where: fault(right, *args, **where))
    form = {"exact_prefill": False, "key_offsets": True}
    names = {"kv_cache_dtype": "tq4", "kv_cache_dtype_skip_layers": [left]}
    options = {"max_model_len": 128, "block_size": 64, "kv_cache_memory_bytes": 2**24, "enable_prefix_caching": True}
    with Engine(model=tmp_path, dtype=FAMILIES[family], **form, **names, **options, max_num_batched_tokens=64) as engine:
        heads, dim = model.config.num_key_value_heads, model.config.head_dim
        packed, dense = PagedTQ4Cache.page_bytes(64, heads, dim, True), 2 * 64 * heads * dim * 2
        # Of a block, layers with a window have what those without have in another block.
        block = packed + dense if family == "llama" else max(packed, dense)
        assert engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == 2**24 // block
        gate = Gate(model, **form, skip_layers=[1 if family == "llama" else 0])
        with noticed(fault):
            for _ in range(1 if fault else 2):
                answers = [engine.answers([prompt])[0] for prompt in prompts]
                gate.check(prompts, answers, cuts=lambda length: range(64, length, 64))
        assert fault or engine.counter("vllm:prefix_cache_hits") == 64 * len(prompts)
