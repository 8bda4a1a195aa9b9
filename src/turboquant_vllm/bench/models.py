"""Measurements of whole models: a step of decoding with caches of transformers, formats on a text, a layer as vLLM has it."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from turboquant_vllm.bench.kernels import Row, Shape, WrongAnswerError, paged_row
from turboquant_vllm.bench.machine import Machine, median_ms

__all__ = ["hf", "quality", "vllm"]

_SIZES = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "cpu": {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2},
}


def hf(machine: Machine, quick: bool) -> Iterator[tuple[str, Any]]:
    """A step of a model with random weights: DynamicCache with sdpa, and TurboQuantCache with tq4."""
    contexts = ((1, 512), (2, 2048)) if machine.device == "cpu" else ((1, 8192), (8, 8192), (8, 32768))
    for batch, context in contexts[:2] if quick else contexts:
        yield f"{batch} x {context}", lambda batch=batch, context=context: _hf_row(machine, batch, context, 2 if quick else 4)


def quality(machine: Machine, quick: bool) -> Iterator[tuple[str, Any]]:
    """What formats lose of the small trained model of the demo, on this Python's standard library."""
    found: dict[str, Row] = {}

    def row(name: str) -> Row:
        if not found:
            from turboquant_vllm.demo.run import MODEL
            from turboquant_vllm.verify import run_verify

            figures = run_verify(str(MODEL), context=256, count=1 if quick else 4, device=machine.device)
            model, bf16 = figures["model"].rstrip("/").rsplit("/", 1)[-1], figures["bytes_per_token"]["bf16"]
            for measured in figures["formats"]:
                kept = ("format", "bytes_per_token", "kl", "tvd", "increase_percent", "agreement")
                found[measured["format"]] = {
                    "model": model,
                    "bf16_bytes_per_token": bf16,
                    **{key: measured[key] for key in kept},
                }
        return found[name]

    for name in ("plain", "offsets", "tq4"):
        yield name, lambda name=name: row(name)


def vllm(machine: Machine, quick: bool) -> Iterator[tuple[str, Any]]:
    """A layer's step as the vLLM plugin computes it, against vLLM's own attention over pages in the model's dtype."""
    if importlib.util.find_spec("vllm") is None:
        raise LookupError("vLLM is not installed")
    if machine.device != "cuda":
        raise LookupError("vLLM's attention needs a GPU")
    for batch, context in ((32, 8192),) if quick else ((1, 32768), (32, 1024), (32, 8192), (8, 32768)):
        yield f"{batch} x {context}", lambda batch=batch, context=context: _vllm_row(machine, batch, context)


@torch.inference_mode()
def _hf_row(machine: Machine, batch: int, context: int, layers: int) -> Row:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, register

    register()
    dtype = torch.bfloat16 if machine.device == "cuda" else torch.float32
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=1024, max_position_embeddings=2 * context, **_SIZES[machine.device]
    )
    with torch.device(machine.device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    ours, dense = TurboQuantCache(model), DynamicCache(config=config)
    for layer in range(layers):
        k, v = (torch.randn(shape, dtype=dtype, device=machine.device) for _ in range(2))
        ours.update(k, v, layer)
        dense.update(k, v, layer)
    token = torch.full((batch, 1), 7, device=machine.device)

    def step(cache: Any, attention: str) -> torch.Tensor:
        model.set_attn_implementation(attention)
        return model(token, **{CACHE_ARGUMENT: cache}).logits

    # The same codes, decompressed for another attention.
    want, got = step(copy.deepcopy(ours), "sdpa"), step(copy.deepcopy(ours), "tq4")
    error = ((got - want).float().norm() / want.float().norm()).item()
    limit = 0.05 if dtype == torch.bfloat16 else 1e-4
    if not error <= limit:
        raise WrongAnswerError(f"logits are off by {error:.1e}, at most {limit:.1e} was expected")
    times = {}
    for name, cache, attention in (("dense", dense, "sdpa"), ("ours", ours, "tq4")):
        model.set_attn_implementation(attention)
        times[name] = median_ms(partial(model, token, **{CACHE_ARGUMENT: cache}), machine.rep, machine.device)
    return {
        "shape": {"batch": batch, "context": context, "layers": layers},
        "dtype": str(dtype).removeprefix("torch."),
        "ours_ms": round(times["ours"], 4),
        "best_dense_ms": round(times["dense"], 4),
        "best_dense": "DynamicCache, sdpa",
        "ratio": round(times["dense"] / times["ours"], 3),
        "error": error,
    }


@torch.inference_mode()
def _vllm_row(machine: Machine, batch: int, context: int) -> Row:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    row = paged_row(machine, Shape(batch, 32, 8, 1, context, 128))
    q = torch.randn(batch, 32, 128, dtype=machine.dtype, device=machine.device)
    count = -(-context // 16)
    k, v = (torch.randn(batch * count, 16, 8, 128, dtype=machine.dtype, device=machine.device) for _ in range(2))
    table = torch.randperm(batch * count, device=machine.device).int().view(batch, count)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=machine.device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=machine.device)
    out = torch.empty_like(q)

    def theirs() -> None:
        flash_attn_varlen_func(
            q=q, k=k, v=v, cu_seqlens_q=starts, seqused_k=lengths, max_seqlen_q=1, max_seqlen_k=context, block_table=table,
            softmax_scale=128**-0.5, causal=True, fa_version=get_flash_attn_version(head_size=128), out=out,
        )  # fmt: skip

    ms = machine.median_ms(theirs)
    return row | {"best_dense_ms": round(ms, 5), "best_dense": "vLLM's FlashAttention", "ratio": round(ms / row["ours_ms"], 3)}
