"""Ways to find channel scales, for the study of the key format."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from turboquant_vllm.calibration import KeyStatistics, channel_scales
from turboquant_vllm.hf.calibration import key_scales_from_model
from turboquant_vllm.quality.attention import Model

__all__ = ["all_scales", "measured_scales"]

Scales = dict[str, dict[int, torch.Tensor]]


def measured_scales(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scales ``[H_kv, D]`` of queries and keys ``[B, H, N, D]``, as the library measures them."""
    statistics = KeyStatistics()
    statistics.add(0, query, key)
    return statistics.scales()[0].to(key.device)


class _Variances:
    """Mean squares of queries, and variances of keys about the mean of all keys, and about that of each group."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, Any]] = {}

    def add(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        k, q = key[:, :, 8:].double(), query[:, :, 8:].double().unflatten(1, (key.shape[1], -1))
        groups = key[:, :, : key.shape[2] // 64 * 64].double().unflatten(2, (-1, 64))
        found = {
            "n": k.shape[0] * k.shape[2],
            "k": k.sum((0, 2)),
            "kk": k.square().sum((0, 2)),
            "qq": q.square().mean(2).sum((0, 2)),
            "groups": (groups - groups.mean(3, keepdim=True)).square().sum((0, 2, 3)) / 63 * 64,
        }
        sums = self.sums.setdefault(layer, dict.fromkeys(found, 0))
        for name, x in found.items():
            sums[name] = sums[name] + x


def _pairs(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).mean(-2).repeat(*[1] * (x.dim() - 1), 2)


def _halves_averaged(layer: Any, heads: int, dim: int) -> torch.Tensor:
    """Scales from the norms of queries and keys, or else from their projections, the same for both channels of a pair."""
    attention = layer.self_attn
    one = 1.0 if "Gemma3RMS" in type(layer.input_layernorm).__name__ else 0.0
    if hasattr(attention, "q_norm"):
        q, k = ((one + x.weight.double()).square().expand(heads, dim) for x in (attention.q_norm, attention.k_norm))
    else:
        gain = one + layer.input_layernorm.weight.double()
        q = (attention.q_proj.weight.double() * gain).square().sum(1).unflatten(0, (heads, -1, dim)).mean(1)
        k = (attention.k_proj.weight.double() * gain).square().sum(1).unflatten(0, (heads, dim))
    return channel_scales(_pairs(q), _pairs(k))


def all_scales(model: Model, windows: torch.Tensor, reading: Callable[[Any], AbstractContextManager[None]]) -> Scales:
    """Every way, from windows ``[n, length]`` of a text or from the model's weights."""
    few, many, others = KeyStatistics(), KeyStatistics(), _Variances()

    def count(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        others.add(layer, query, key)
        many.add(layer, query, key)
        if seen == 0:
            few.add(layer, query, key)
        return query, key, value

    for seen, ids in enumerate(windows.split(1)):  # noqa: B007  (count reads it)
        with reading(count):
            model(ids, use_cache=False, logits_to_keep=1)
    found: Scales = {"text": many.scales(), "text, one window": few.scales(), "weights": key_scales_from_model(model)}
    found |= {name: {} for name in ("text, all keys", "text, groups", "text, halves averaged", "weights, halves averaged")}
    for layer, x in others.sums.items():
        qq, total = x["qq"] / x["n"], x["kk"] / x["n"] - (x["k"] / x["n"]).square()
        found["text, all keys"][layer] = channel_scales(qq, total)
        found["text, groups"][layer] = channel_scales(qq, x["groups"] / x["n"])
        found["text, halves averaged"][layer] = channel_scales(_pairs(qq), _pairs(x["groups"]))
        found["weights, halves averaged"][layer] = _halves_averaged(model.get_decoder().layers[layer], *total.shape)
    return {name: {layer: w.to(model.device) for layer, w in layers.items()} for name, layers in found.items()}
