"""vLLM's engine with the TQ4 cache against transformers with ``TurboQuantCache``: the committed small model.

Each token that the engine gives must be the one that transformers would choose after the same tokens, up to what rounding does
to the logits: then whole answers agree, and an answer that differs does so where two tokens are as good.

Runs on a GPU, or where vLLM was built for CPUs: there the engine itself is the same, and attention is that of the reference.
"""

from __future__ import annotations

import gc
import itertools

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
from hf_models import VOCABULARY, make_config
from turboquant_vllm.demo.compare import held_out_windows
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, register
from turboquant_vllm.hf.calibration import key_scales_from_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

if not (torch.cuda.is_available() or current_platform.is_cpu()):
    pytest.skip("needs a GPU, or vLLM for CPUs", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
NEW_TOKENS = 24
# A logit's rounding, in units in the last place of float16 of the largest: two stacks of six layers, each rounded its own way.
ULPS = 6


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
    one = transformers.AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="tq4", dtype=DTYPE)
    return one.to(DEVICE).eval()


@pytest.fixture(scope="module")
def prompts():
    """Held-out text: ten prompts of 3 to 320 tokens."""
    windows = held_out_windows(Tokenizer.from_file(str(MODEL / "tokenizer.json")), 320, 10)
    lengths = (320, 3, 17, 210, 64, 65, 100, 33, 180, 7)
    return [window[:length].tolist() for window, length in zip(windows, lengths, strict=True)]


class Engine:
    """An engine over the small model; graphs of decoding, nothing compiled by torch."""

    def __init__(self, *, model=MODEL, exact_prefill=True, key_offsets=False, **options):
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
            "gpu_memory_utilization": 0.1,  # must be free at the start; others may use the card
            **options,
        }
        self.llm = vllm.LLM(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=DTYPE,
            attention_backend="CUSTOM",
            additional_config={"turboquant": {"exact_prefill": exact_prefill, "key_offsets": key_offsets}},
            disable_log_stats=False,
            seed=0,
            **given,
        )

    def answers(self, prompts):
        params = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def counter(self, name):
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()


@torch.inference_mode()
def check(model, prompts, answers, *, exact_prefill, cuts=lambda length: (), key_offsets=False):
    """Every token is greedy in transformers, whose prompt is read in pieces that end at ``cuts(length)``."""
    formats = {"key_offsets": True, "key_scales": key_scales_from_model(model)} if key_offsets else {"key_offsets": False}
    same = count = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == NEW_TOKENS
        cache = TurboQuantCache(model.config, exact_prefill=exact_prefill, **formats)
        ends = [0, *cuts(len(prompt)), len(prompt)]
        for first, stop in itertools.pairwise(ends):
            logits = model(torch.tensor([prompt[first:stop]], device=DEVICE), **{CACHE_ARGUMENT: cache}).logits[0, -1:]
        # A group's offset follows from the call that begins it: the engine's are of one token.
        pieces = [[token] for token in answer[:-1]] if key_offsets else [answer[:-1]]
        rest = [model(torch.tensor([piece], device=DEVICE), **{CACHE_ARGUMENT: cache}).logits[0] for piece in pieces]
        logits = torch.cat([logits, *rest]).float()
        best, chosen = logits.amax(-1), logits.gather(-1, torch.tensor(answer, device=DEVICE)[:, None])[:, 0]
        behind = best - chosen
        allowed = ULPS * 2.0**-10 * logits.abs().amax(-1)
        assert (behind <= allowed).all(), (
            len(prompt),
            behind.max().item(),
            allowed[behind.argmax()].item(),
            int(behind.argmax()),
        )
        same, count = same + int((behind == 0).sum()), count + len(answer)
    assert same >= 0.98 * count, (same, count)
    print(f"{same} of {count} tokens are transformers' own choice", end=" ")


def test_prompts_alone_and_together(model, prompts):
    with Engine() as engine:
        check(model, prompts, engine.answers(prompts), exact_prefill=True)
        check(model, prompts[:3], [engine.answers([prompt])[0] for prompt in prompts[:3]], exact_prefill=True)


def test_prefix_hits_beside_prompts_of_equal_length(model, prompts):
    with Engine(exact_prefill=False, enable_prefix_caching=True) as engine:
        for _ in range(2):
            check(model, prompts, engine.answers(prompts), exact_prefill=False)
        # Cached prefixes with new ends, among new prompts whose lengths are the totals of others.
        mixed = [prompts[0][:96] + prompts[3][:4], prompts[6][::-1], prompts[3][:100], prompts[8][:48] + prompts[7], prompts[2]]
        check(model, mixed, engine.answers(mixed), exact_prefill=False)
        assert engine.counter("vllm:prefix_cache_hits") > 500


@pytest.mark.parametrize("exact_prefill", [True, False])
def test_keys_with_offsets(model, prompts, exact_prefill):
    """Offsets and the scales of the model's weights: prompts together, and one in chunks."""
    form = {"exact_prefill": exact_prefill, "key_offsets": True}
    with Engine(**form) as engine:
        assert engine.llm.llm_engine.vllm_config.cache_config.block_size == (64 if DEVICE == "cuda" else 128)
        check(model, prompts, engine.answers(prompts), **form)
    with Engine(**form, max_num_batched_tokens=40) as engine:
        check(model, prompts[:1], engine.answers(prompts[:1]), **form, cuts=lambda length: range(40, length, 40))


@pytest.mark.parametrize("chunk", [16, 64])
def test_chunks(model, prompts, chunk):
    with Engine(max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 16)) as engine:
        some = prompts[2:6]
        alone = [engine.answers([prompt])[0] for prompt in some]
        check(model, some, alone, exact_prefill=True, cuts=lambda length: range(chunk, length, chunk))
    with Engine(exact_prefill=False, max_num_batched_tokens=chunk, max_num_seqs=min(chunk, 16)) as engine:
        check(model, prompts, engine.answers(prompts), exact_prefill=False)


def test_preemption(model, prompts):
    longest = [prompts[index] for index in (0, 3, 6, 8)]
    with Engine(exact_prefill=False, num_gpu_blocks_override=56) as engine:
        check(model, longest, engine.answers(longest), exact_prefill=False)
        assert engine.counter("vllm:num_preemptions") > 0


@pytest.mark.parametrize("family", ["mistral", "gemma2"])  # windows in all layers; in every other, and soft caps
def test_windows_and_soft_caps(family, tmp_path, generator):
    register()
    config = make_config(family)
    config.initializer_range = 0.3  # so that what is seen decides what is said
    torch.manual_seed(0)
    build = transformers.AutoModelForCausalLM.from_config
    model = build(config, attn_implementation="tq4", dtype=DTYPE).to(DEVICE).eval()
    model.get_input_embeddings().weight.data.mul_(0.05)  # tied, or not: a token must not just repeat itself
    model.save_pretrained(tmp_path)
    prompts = [torch.randint(3, VOCABULARY, (count,), generator=generator).tolist() for count in (40, 5, 60, 17, 33)]
    with Engine(model=tmp_path, exact_prefill=False, max_model_len=128) as engine:
        answers = engine.answers(prompts)
    check(model, prompts, answers, exact_prefill=False)
    # The test would notice another window.
    config.sliding_window *= 2
    other = build(config, attn_implementation="tq4", dtype=DTYPE).to(DEVICE).eval()
    other.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError):
        check(other, prompts, answers, exact_prefill=False)


def test_drafts_from_the_prompt(model, prompts):
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    with Engine(speculative_config=drafts) as engine:
        check(model, prompts, engine.answers(prompts), exact_prefill=True)
        assert engine.counter("vllm:spec_decode_num_accepted_tokens") > 10
