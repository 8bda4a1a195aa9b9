"""An engine of vLLM over the committed small model or a random one, and what its answers are compared with.

On a GPU, or where vLLM was built for CPUs: there the engine itself is the same, and attention is that of the reference.
"""

from __future__ import annotations

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
from engine_gate import Answer
from hf_models import VOCABULARY, make_config
from turboquant_vllm.demo.compare import held_out_windows
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.hf import register
from turboquant_vllm.vllm.batch import Run
from turboquant_vllm.vllm.layer import PagedLayer

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


@pytest.fixture(scope="module", name="model")
def small_model():
    register()
    one = transformers.AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="tq4", dtype=torch.float16)
    return one.to(DEVICE).eval()


@pytest.fixture(scope="module", name="prompts")
def held_out_prompts():
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
            "skip_tokenizer_init": True,
            **options,
        }
        try:
            self.llm = vllm.LLM(
                model=str(model),
                dtype=dtype,
                attention_backend="CUSTOM",
                additional_config={"turboquant": {"exact_prefill": exact_prefill, "key_offsets": key_offsets}},
                disable_log_stats=False,
                seed=0,
                **given,
            )
        except Exception:  # what has started would be in the next engine's way
            cleanup_dist_env_and_memory()
            raise

    def answers(self, prompts: Sequence[list[int] | dict[str, Any]]) -> list[Answer]:
        """Greedy answers, all prompts at once: tokens, or what else vLLM takes for a prompt."""
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False, logprobs=-1, flat_logprobs=True
        )
        given = [prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(given, params, use_tqdm=False)
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


# What is wrong in attention: of its layer's right attention, layer, q, k, v, kv_cache, runs, out, and where k and v go.
Fault = Callable[..., None]


def one_head_of_another(right: Fault, layer: PagedLayer, q, k, v, kv_cache, runs: Sequence[Run], out, **where) -> None:
    """The last head reads the pages of the first one."""
    right(layer, q, k, v, kv_cache, runs, out, **where)
    group = layer.num_heads // layer.num_kv_heads
    other = torch.empty_like(out)
    right(layer, q.roll(group, 1), k, v, kv_cache, runs, other)
    out[:, -group:] = other[:, :group]
