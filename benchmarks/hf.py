"""Decoding a model of 8B shape with caches of transformers and with ours: `python benchmarks/hf.py [--out FOLDER]`.

Random weights in bf16. Caches are filled with random keys and values through their own `update`, and `generate` is timed from
there: "eager" is DynamicCache with sdpa against TurboQuantCache with tq4, "compiled" is StaticCache with sdpa against
TurboQuantStaticCache with tq4, both compiled by `generate`. "memory" is a real prefill of one long prompt and a few tokens.

A row says how many of the model's layers ran: fewer where bf16's cache of all would not fit, or where compiling all would take
too long. The logits of one step on each cache are compared: a row of ours whose logits are wrong has no times, and the command
fails in the end. The file is written after every row, the most important rows first.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, StoppingCriteria

from common import RESULTS, environment, write_results
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, register

DTYPE = torch.bfloat16
WARMUP = 4  # tokens, compiling among them
CASES = [(8, 32768), (1, 8192), (8, 8192), (1, 32768), (1, 131072), (8, 131072)]
MEMORY_TOKENS = 131072
DENSE_BYTES = 75e9  # of bf16's cache at most: attention over a StaticCache repeats a layer's keys and values for every head
LARGEST_ERROR = 0.5  # of logits, relative to their spread: 4 bits move them by a fifth of it, a wrong cache by all of it


def make_model(layers: int) -> Any:
    """A LlamaForCausalLM of 8B shape with random weights."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=2 * MEMORY_TOKENS,
        tie_word_embeddings=False,
    )
    register()
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()


def use_layers(model: Any, all_layers: Any, count: int) -> None:
    """Leave the model its first ``count`` layers."""
    model.model.layers, model.config.num_hidden_layers = all_layers[:count], count


def fitting_layers(model: Any, batch: int, tokens: int, most: int) -> int:
    """Layers whose cache in bf16 takes no more than ``DENSE_BYTES``."""
    config = model.config
    layer_bytes = 4 * batch * tokens * config.num_key_value_heads * config.head_dim
    return max(1, min(most, int(DENSE_BYTES // layer_bytes)))


def fill(cache: Any, model: Any, batch: int, tokens: int) -> None:
    """Fill a new cache with random keys and values, the same in every call with the same sizes.

    Values are large, so that what a layer attends to outweighs what it passes on, and logits say whether attention is right.
    """
    config = model.config
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=DTYPE) for _ in range(2))
    v *= 8
    for layer in range(config.num_hidden_layers):
        cache.update(k, v, layer)


def bytes_of(cache: Any) -> int:
    """Bytes of all keys and values."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def generate(model: Any, cache: Any, batch: int, length: int, count: int, **options: Any) -> Any:
    """``count`` greedy tokens behind ``length``, of which the last is not in the cache yet."""
    ids = torch.ones((batch, length), dtype=torch.long, device="cuda")
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": count, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, **how)


class Clock(StoppingCriteria):
    """Never stops; notes when each step ended, which `generate` waits for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def tokens_per_second(model: Any, cache: Any, batch: int, tokens: int, steps: int) -> tuple[float, torch.Tensor]:
    """Tokens a second of `generate` on a full cache, all sequences together, and the first's logits ``[B, vocabulary]``.

    From the second step on: the first is a prefill to `generate`, which compiles none.
    """
    first = generate(model, cache, batch, tokens + 1, WARMUP, return_dict_in_generate=True, output_logits=True)
    clock = Clock()
    generate(model, cache, batch, tokens + 1 + WARMUP, steps + 1, stopping_criteria=[clock])
    return batch * steps / (clock.times[-1] - clock.times[0]), first.logits[0].float()


def measure(
    model: Any, attention: str, make: Any, batch: int, tokens: int, steps: int
) -> tuple[float | None, torch.Tensor | None, dict[str, Any]]:
    """Tokens a second, logits, and what else a row says of a cache; None where memory does not suffice.

    With and without cuDNN's attention, whichever is faster: it makes a plan for each new length, which can take longer than all
    else, so that a few steps show it.
    """
    model.set_attn_implementation(attention)
    best: tuple[float | None, torch.Tensor | None, dict[str, Any]] = (None, None, {})
    for cudnn in (False, True) if attention == "sdpa" else (True,):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch._dynamo.reset()
        cache = None
        try:
            torch.cuda.reset_peak_memory_stats()
            cache = make(tokens)
            fill(cache, model, batch, tokens)
            speed, logits = tokens_per_second(model, cache, batch, tokens, steps if not best[0] else min(steps, 8))
            peak = torch.cuda.max_memory_allocated()
            more = {"cudnn": cudnn, "bytes": bytes_of(cache), "peak_bytes": peak}
            best = max(best, (speed, logits, more), key=lambda found: found[0] or 0.0)
        except torch.OutOfMemoryError:
            pass
        del cache
        release()
    torch.backends.cuda.enable_cudnn_sdp(True)
    return best


def decode_rows(
    model: Any, caches: dict[str, tuple[str, Any]], steps: int, cases: list[tuple[int, int]], most_layers: int
) -> Iterator[dict[str, Any]]:
    """A row for each case: tokens a second with the dense cache and with ours."""
    all_layers = model.model.layers
    for batch, tokens in cases:
        layers = fitting_layers(model, batch, tokens, min(most_layers, len(all_layers)))
        use_layers(model, all_layers, layers)
        found = [measure(model, attention, make, batch, tokens, steps) for attention, make in caches.values()]
        (dense, want, dense_more), (ours, got, our_more) = found
        error = None
        if got is not None and want is not None:
            error = float((got - want).norm() / (want - want.mean(-1, keepdim=True)).norm())
        if error is not None and not error < LARGEST_ERROR:
            ours = None
        yield {
            "id": f"{'-'.join(caches)}-{batch}x{tokens}",
            "batch": batch,
            "context": tokens,
            "layers": layers,
            "caches": list(caches),
            "dense_with_cudnn": dense_more.get("cudnn"),
            "dense_tokens_per_s": dense and round(dense, 2),
            "ours_tokens_per_s": ours and round(ours, 2),
            "ratio": round(ours / dense, 3) if ours and dense else None,
            "logits_error": error and round(error, 4),
            **{f"{name}_{key}": more.get(key) for key in ("bytes", "peak_bytes") for name, more in
               (("dense", dense_more), ("ours", our_more))},
        }  # fmt: skip
    use_layers(model, all_layers, len(all_layers))


@torch.inference_mode()
def memory_rows(model: Any, tokens: int) -> Iterator[dict[str, Any]]:
    """Bytes of the cache and peaks of a real prefill and of decoding, for both caches; the peaks without the weights."""
    dense: dict[str, Any] = {}
    for name, attention, make in (("dynamic", "sdpa", DynamicCache), ("turboquant", "tq4", TurboQuantCache)):
        model.set_attn_implementation(attention)
        cache = make(config=model.config)
        release()
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ids = torch.ones((1, tokens), dtype=torch.long, device="cuda")
        model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        prefill = torch.cuda.max_memory_allocated() - weights
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            model(ids[:, :1], **{CACHE_ARGUMENT: cache})
        decode = torch.cuda.max_memory_allocated() - weights
        row = {
            "id": f"memory-{name}",
            "context": tokens,
            "layers": len(cache.layers),
            "cache_bytes": bytes_of(cache),
            "prefill_peak_bytes": prefill,
            "decode_peak_bytes": decode,
        }
        for key in ("cache_bytes", "prefill_peak_bytes", "decode_peak_bytes") if dense else ():
            row[f"{key}_share"] = round(row[key] / dense[key], 4)
        dense = row
        del cache
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--compiled-layers", type=int, default=8, help="of the compiled pair")
    parser.add_argument("--memory-tokens", type=int, default=MEMORY_TOKENS, help="of the prompt of the part on memory")
    parser.add_argument("--steps", type=int, default=24, help="tokens that are timed")
    parser.add_argument("--parts", default="memory,compiled,eager", help="of memory, compiled and eager, in their order")
    parser.add_argument("--cases", default=",".join(f"{b}x{n}" for b, n in CASES), help="batch x context, separated by commas")
    options = parser.parse_args()
    cases = [(int(b), int(n)) for b, n in (case.split("x") for case in options.cases.split(","))]
    torch.manual_seed(0)
    model = make_model(options.layers)
    config, room = model.config, options.steps + WARMUP + 8
    eager = {
        "dynamic": ("sdpa", lambda tokens: DynamicCache(config=config)),
        "turboquant": ("tq4", lambda tokens: TurboQuantCache(config)),
    }
    compiled = {
        "static": ("sdpa", lambda tokens: StaticCache(config=config, max_cache_len=tokens + room)),
        "turboquant-static": ("tq4", lambda tokens: TurboQuantStaticCache(config, max_cache_len=tokens + room)),
    }
    parts: dict[str, Callable[[], Any]] = {
        "memory": lambda: memory_rows(model, options.memory_tokens),
        "eager": lambda: decode_rows(model, eager, options.steps, cases, options.layers),
        "compiled": lambda: decode_rows(model, compiled, options.steps, cases, options.compiled_layers),
    }
    env, rows = environment(transformers=transformers.__version__), []
    for part in options.parts.split(","):
        for row in parts[part]():
            rows.append(row)
            print(row, flush=True)
            write_results(options.out / "hf-h200.json", env, rows)
    if wrong := [row["id"] for row in rows if not (row.get("logits_error") or 0) < LARGEST_ERROR]:
        raise SystemExit(f"logits differ by {LARGEST_ERROR} of their spread or more: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
