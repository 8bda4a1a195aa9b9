"""Decoding a model of 8B shape with caches of transformers and with ours: `python benchmarks/hf.py [--out FOLDER]`.

Random weights in bf16. Caches are filled with random keys and values through their own `update`, and `generate` is timed from
there: "eager" is DynamicCache with sdpa against TurboQuantCache with tq4, "compiled" is StaticCache with sdpa against
TurboQuantStaticCache with tq4, both compiled by `generate`. "memory" is a real prefill of one long prompt and a few tokens.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from common import RESULTS, environment, write_results
from turboquant_vllm.hf import TurboQuantCache, TurboQuantStaticCache, register

DTYPE = torch.bfloat16
CASES = [(1, 8192), (1, 32768), (1, 131072), (8, 8192), (8, 32768), (8, 131072)]
MEMORY_TOKENS = 131072


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


def fill(cache: Any, model: Any, batch: int, tokens: int) -> None:
    """Fill a new cache with random keys and values."""
    config = model.config
    shape = (batch, config.num_key_value_heads, tokens, config.head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))
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


@torch.inference_mode()
def tokens_per_second(model: Any, cache: Any, batch: int, tokens: int, steps: int, warmup: int) -> float:
    """Tokens a second of `generate` on a full cache, all sequences together."""
    elapsed = 0.0
    length = tokens + 1
    for count in (warmup, steps):
        ids = torch.ones((batch, length), dtype=torch.long, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        length += count
    return batch * steps / elapsed


def measure(
    model: Any, attention: str, make: Any, batch: int, tokens: int, steps: int
) -> tuple[float | None, int | None, bool | None]:
    """Tokens a second, bytes of the cache, and whether cuDNN's attention was allowed; None where memory does not suffice.

    With and without cuDNN's, whichever is faster: it makes a plan for each new length, which can take longer than all else.
    """
    model.set_attn_implementation(attention)
    best: tuple[float | None, int | None, bool | None] = (None, None, None)
    for allowed in (True, False) if attention == "sdpa" else (True,):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        torch._dynamo.reset()
        cache = None
        try:
            cache = make(tokens)
            fill(cache, model, batch, tokens)
            speed = tokens_per_second(model, cache, batch, tokens, steps, warmup=4)
            best = max(best, (speed, bytes_of(cache), allowed), key=lambda found: found[0] or 0.0)
        except torch.OutOfMemoryError:
            pass
        del cache
        release()
    torch.backends.cuda.enable_cudnn_sdp(True)
    return best


def decode_rows(
    model: Any, caches: dict[str, tuple[str, Any]], steps: int, cases: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """A row for each case: tokens a second with the dense cache and with ours."""
    rows = []
    for batch, tokens in cases:
        found = [measure(model, attention, make, batch, tokens, steps) for attention, make in caches.values()]
        (dense, dense_bytes, cudnn), (ours, our_bytes, _) = found
        row = {
            "id": f"{'-'.join(caches)}-{batch}x{tokens}",
            "batch": batch,
            "context": tokens,
            "caches": list(caches),
            "dense_with_cudnn": cudnn,
            "dense_tokens_per_s": dense and round(dense, 2),
            "ours_tokens_per_s": ours and round(ours, 2),
            "ratio": round(ours / dense, 3) if ours and dense else None,
            "dense_bytes": dense_bytes,
            "ours_bytes": our_bytes,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


@torch.inference_mode()
def memory_rows(model: Any, tokens: int) -> list[dict[str, Any]]:
    """Bytes of the cache and peaks of a real prefill and of decoding, for both caches."""
    rows: list[dict[str, Any]] = []
    for name, attention, cache in (
        ("dynamic", "sdpa", DynamicCache(config=model.config)),
        ("turboquant", "tq4", TurboQuantCache(model.config)),
    ):
        model.set_attn_implementation(attention)
        release()
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ids = torch.ones((1, tokens), dtype=torch.long, device="cuda")
        model(ids, past_key_values=cache, logits_to_keep=1)
        prefill = torch.cuda.max_memory_allocated() - weights
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            model(ids[:, :1], past_key_values=cache)
        decode = torch.cuda.max_memory_allocated() - weights
        row = {
            "id": f"memory-{name}",
            "context": tokens,
            "cache_bytes": bytes_of(cache),
            "prefill_peak_bytes": prefill,
            "decode_peak_bytes": decode,
        }
        rows.append(row)
        print(row, flush=True)
        del cache
    for key in ("cache_bytes", "prefill_peak_bytes", "decode_peak_bytes"):
        rows[1][f"{key}_share"] = round(rows[1][key] / rows[0][key], 4)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16, help="tokens that are timed")
    parser.add_argument("--parts", default="eager,compiled,memory", help="of eager, compiled and memory")
    parser.add_argument("--cases", default=",".join(f"{b}x{n}" for b, n in CASES), help="batch x context, separated by commas")
    options = parser.parse_args()
    parts = options.parts.split(",")
    cases = [(int(b), int(n)) for b, n in (case.split("x") for case in options.cases.split(","))]
    torch.manual_seed(0)
    model = make_model(options.layers)
    rows: list[dict[str, Any]] = []
    if "eager" in parts:
        caches = {
            "dynamic": ("sdpa", lambda tokens: DynamicCache(config=model.config)),
            "turboquant": ("tq4", lambda tokens: TurboQuantCache(model.config)),
        }
        rows += decode_rows(model, caches, options.steps, cases)
    if "memory" in parts:
        rows += memory_rows(model, MEMORY_TOKENS)
    if "compiled" in parts:
        room = options.steps + 16
        caches = {
            "static": ("sdpa", lambda tokens: StaticCache(config=model.config, max_cache_len=tokens + room)),
            "turboquant-static": ("tq4", lambda tokens: TurboQuantStaticCache(model.config, max_cache_len=tokens + room)),
        }
        rows += decode_rows(model, caches, options.steps, cases)
    env = environment(transformers=transformers.__version__, layers=options.layers)
    write_results(options.out / "hf-h200.json", env, rows)


if __name__ == "__main__":
    main()
