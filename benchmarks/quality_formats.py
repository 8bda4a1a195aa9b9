"""What docs/quality.md compares TQ4 with, and what it does to TQ4's keys to make them hard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from turboquant_vllm.quality.formats import Format, TQ4Format

__all__ = ["FormatCache", "Halves", "Outliers", "exact", "fp8", "int4"]


def exact(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as they are."""
    return key, value


def _both(again: Callable[[torch.Tensor], torch.Tensor]) -> Format:
    return lambda layer, key, value: (again(key), again(value))


def _fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)  # its largest number; the cast does not saturate


def _int4(x: torch.Tensor) -> torch.Tensor:
    low, high = x.amin(-1, keepdim=True).float(), x.amax(-1, keepdim=True).float()
    step = ((high - low) / 15).half().float().clamp(min=2.0**-24)
    low = low.half().float()
    return (((x.float() - low) / step).round().clamp(0, 15) * step + low).to(x.dtype)


# 8 bits a coordinate, no scale; and 16 even steps between each vector's own extremes, with two fp16 numbers a vector.
fp8, int4 = _both(_fp8), _both(_int4)


@dataclass(frozen=True)
class Halves:
    """Each vector as two of half the head dimension, each with a scale of its own: another D, the same model."""

    cached: Format

    def __call__(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``cached``, on halves."""
        key_again, value_again = self.cached(layer, *(x.unflatten(-1, (2, -1)).flatten(-3, -2) for x in (key, value)))
        return key_again.reshape(key.shape), value_again.reshape(value.shape)


@dataclass(frozen=True)
class Outliers:
    """Some channels of the keys larger by a factor, and those of the queries smaller: the same model, harder keys."""

    cached: Format
    factor: float
    channels: int
    seed: int = 0

    def __call__(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``cached``, on the larger keys; brought back to the queries' scale."""
        generator = torch.Generator().manual_seed(1000 * self.seed + layer)
        scale = torch.ones(key.shape[-1])
        scale[torch.randperm(key.shape[-1], generator=generator)[: self.channels]] = self.factor
        scale = scale.to(key.device)
        again, value_again = self.cached(layer, (key.float() * scale).to(key.dtype), value)
        return (again.float() / scale).to(key.dtype), value_again


class FormatCache(DynamicCache):
    """A transformers cache that holds what a format returns: each vector goes through it once, when it is written."""

    def __init__(self, cached: Format) -> None:
        super().__init__()
        self._cached = cached

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As DynamicCache's."""
        found: tuple[torch.Tensor, torch.Tensor] = super().update(
            *self._cached(layer_idx, key_states, value_states), layer_idx, *args, **kwargs
        )
        return found


def describe(cached: Format) -> dict[str, Any]:
    """The fields of a result row that say which format it is about."""
    if isinstance(cached, Outliers):
        return {**describe(cached.cached), "outliers": {"factor": cached.factor, "channels": cached.channels}}
    if isinstance(cached, Halves):
        return {**describe(cached.cached), "halves": True}
    if isinstance(cached, TQ4Format):
        return {
            "format": "tq4",
            "key_scale": cached.key_scale,
            "value_scale": cached.value_scale,
            "rotation": cached.rotation,
            "seed": cached.seed,
            "dense_layers": sorted(cached.dense_layers),
        }
    return {"format": {exact: "exact", fp8: "fp8", int4: "int4"}[cached]}
