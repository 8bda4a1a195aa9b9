"""vLLM's engine with the TQ4 cache against transformers with ``TurboQuantCache``: the committed small model, and random ones.

The log-probabilities of all tokens at each place of an answer must be what transformers makes of the same tokens over the same
cache, up to what rounding does: :mod:`engine_gate` says how that is measured. That this notices what it should is tested with
engines that make a mistake.

Runs on a GPU, or where vLLM was built for CPUs: there the engine itself is the same, and attention is that of the reference.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", exc_type=ImportError)
pytest.importorskip("transformers")

import transformers
import vllm
from tokenizers import Tokenizer
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

import turboquant_vllm.vllm as plugin
from engine_gate import Answer, Gate
from hf_models import VOCABULARY, WINDOW, make_config
from turboquant_vllm.demo.compare import held_out_windows
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.hf import register
from turboquant_vllm.vllm.batch import Kind, Run
from turboquant_vllm.vllm.layer import PagedLayer, exact_attention

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

if not (torch.cuda.is_available() or current_platform.is_cpu()):
    pytest.skip("needs a GPU, or vLLM for CPUs", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEW_TOKENS = 24


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """What is tested is the engine, and a failure shows its own traceback."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    plugin.register()
    if DEVICE == "cpu":  # there vLLM takes one backend, whatever it is asked for
        register_backend(AttentionBackendEnum.CPU_ATTN, plugin.BACKEND)
    yield
    AttentionBackendEnum.CPU_ATTN.clear_override()


@pytest.fixture(scope="module")
def model():
    register()
    one = transformers.AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="tq4", dtype=torch.float16)
    return one.to(DEVICE).eval()


@pytest.fixture(scope="module")
def prompts():
    """Held-out text: ten prompts of 3 to 320 tokens."""
    windows = held_out_windows(Tokenizer.from_file(str(MODEL / "tokenizer.json")), 320, 10)
    lengths = (320, 3, 17, 210, 64, 65, 100, 33, 180, 7)
    return [window[:length].tolist() for window, length in zip(windows, lengths, strict=True)]


class Engine:
    """An engine over the small model; graphs of decoding, nothing compiled by torch."""

    def __init__(self, *, model=MODEL, dtype=torch.float16, exact_prefill=True, key_offsets=False, **options):
        given = {
            "max_num_batched_tokens": 8192,
            "enable_prefix_caching": False,
            "max_num_seqs": 16,
            "block_size": None if key_offsets else 16,
            "max_model_len": 400,
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY" if DEVICE == "cuda" else "NONE",
                "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
            },
            "kv_cache_memory_bytes": 2**28,
            "max_logprobs": -1,
            "gpu_memory_utilization": 0.1,  # must be free at the start; others may use the card
            **options,
        }
        self.llm = vllm.LLM(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=dtype,
            attention_backend="CUSTOM",
            additional_config={"turboquant": {"exact_prefill": exact_prefill, "key_offsets": key_offsets}},
            disable_log_stats=False,
            seed=0,
            **given,
        )

    def answers(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """Greedy answers, all prompts at once."""
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=-1, flat_logprobs=True
        )
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [_answer(output.outputs[0]) for output in outputs]

    def counter(self, name):
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()


def _answer(output: Any) -> Answer:
    tokens, flat = list(output.token_ids), output.logprobs
    assert len(tokens) == len(flat) == NEW_TOKENS
    # The token chosen, then all tokens.
    ids = torch.tensor(flat.token_ids).view(NEW_TOKENS, -1)[:, 1:]
    log_probs = torch.tensor(flat.logprobs).view(NEW_TOKENS, -1)[:, 1:]
    return Answer(tokens, torch.full_like(log_probs, float("nan")).scatter(1, ids, log_probs))


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


# No windows; windows in all layers; in every other, and soft caps (vLLM refuses this model in float16).
FAMILIES = {"llama": torch.float16, "mistral": torch.float16, "gemma2": torch.bfloat16}


def random_model(family: str) -> Any:
    """What is seen decides what it says, each key as much as any other."""
    register()
    config = make_config(family)
    config.initializer_range = 0.3
    torch.manual_seed(0)
    build = transformers.AutoModelForCausalLM.from_config
    model = build(config, attn_implementation="tq4", dtype=FAMILIES[family]).to(DEVICE).eval()
    model.get_input_embeddings().weight.data.mul_(0.05)  # tied, or not: a token must not just repeat itself
    return model


def random_prompts(generator: torch.Generator, *lengths: int) -> list[list[int]]:
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def noticed(fault: object) -> AbstractContextManager[object]:
    """Where a gate is to fail, if there is a fault."""
    return pytest.raises(AssertionError, match="of a right run's") if fault else nullcontext()


@pytest.mark.parametrize("wrong_by", [0, -1, 1])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_windows_and_soft_caps(family, wrong_by, tmp_path, generator, monkeypatch):
    model = random_model(family)
    model.save_pretrained(tmp_path)
    prompts = random_prompts(generator, 40, 5, 60, 17, 33)
    if wrong_by:
        right = PagedLayer.attend

        def attend(layer: PagedLayer, *args: Any) -> None:
            layer = copy.copy(layer)
            if layer.sliding_window is not None:
                assert layer.sliding_window == WINDOW
                layer.sliding_window += wrong_by
            right(layer, *args)

        monkeypatch.setattr(PagedLayer, "attend", attend)
    with Engine(model=tmp_path, dtype=FAMILIES[family], exact_prefill=False, max_model_len=128) as engine:
        answers = engine.answers(prompts)
    with noticed(wrong_by):
        Gate(model, exact_prefill=False).check(prompts, answers)


# What is wrong in an engine's attention: (its layer's right attention, layer, q, k, v, kv_cache, runs, out).
Fault = Callable[..., None]


def one_page_of_another(right: Fault, layer: PagedLayer, q, k, v, kv_cache, runs: Sequence[Run], out) -> None:
    """The first two sequences of a run have each other's second page."""

    def swapped(run: Run) -> Run:
        table = run.block_table.clone()
        table[:2, 1:2] = run.block_table[:2, 1:2].flip(0)
        return dataclasses.replace(run, block_table=table)

    right(layer, q, k, v, kv_cache, [swapped(run) for run in runs], out)


def one_head_of_another(right: Fault, layer: PagedLayer, q, k, v, kv_cache, runs: Sequence[Run], out) -> None:
    """The last head reads the pages of the first one."""
    right(layer, q, k, v, kv_cache, runs, out)
    group = layer.num_heads // layer.num_kv_heads
    other = torch.empty_like(out)
    right(layer, q.roll(group, 1), k, v, kv_cache, runs, other)
    out[:, -group:] = other[:, :group]


def one_chunk_without_prefix(right: Fault, layer: PagedLayer, q, k, v, kv_cache, runs: Sequence[Run], out) -> None:
    """The last chunk of a prompt of more than 64 tokens is taken for a whole prompt."""

    def alone(run: Run) -> Run:
        is_last = run.kind == Kind.CONTINUED and max(run.seq_lens_cpu or (0,)) > 64
        return dataclasses.replace(run, kind=Kind.EXACT) if is_last else run

    layer = copy.copy(layer)
    layer.exact = exact_attention
    whole = [run if run.kind != Kind.EXACT else dataclasses.replace(run, kind=Kind.CONTINUED) for run in runs]
    right(layer, q, k, v, kv_cache, [alone(run) for run in whole], out)


@pytest.mark.parametrize("key_offsets", [False, True])
@pytest.mark.parametrize("fault", [None, one_page_of_another, one_head_of_another, one_chunk_without_prefix])
def test_faults_are_noticed(fault, key_offsets, tmp_path, generator, monkeypatch):
    model = random_model("llama")
    model.save_pretrained(tmp_path)
    prompts = random_prompts(generator, 100, 80, 90, 70)
    if fault is not None:
        right = PagedLayer.attend
        monkeypatch.setattr(PagedLayer, "attend", lambda *args: fault(right, *args))
    form = {"exact_prefill": False, "key_offsets": key_offsets}
    # Keys with offsets depend on where a prompt is cut, so those that are cut are read alone.
    alone = key_offsets and fault is one_chunk_without_prefix
    options = {"max_num_batched_tokens": 8192 if key_offsets and not alone else 32, "block_size": 64 if key_offsets else 16}
    with Engine(model=tmp_path, max_model_len=128, **form, **options) as engine:
        answers = [engine.answers([prompt])[0] for prompt in prompts] if alone else engine.answers(prompts)
    with noticed(fault):
        Gate(model, **form).check(prompts, answers, cuts=lambda length: range(32, length, 32) if alone else ())
