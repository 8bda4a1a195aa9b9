"""A model's own attention, over keys and values as a cache format returns them.

Works for every transformers model whose attention goes through `AttentionInterface` and runs with "sdpa": masks, windows
and scaling stay the model's own, only the keys and values differ.

    with cache_format(model, TQ4Format()):
        logits = model(ids).logits
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch

from turboquant_vllm.quality.formats import Format

__all__ = [
    "ATTENTION_NAME",
    "LayerErrors",
    "Model",
    "cache_format",
    "cached_logits",
    "cached_output",
    "keeps_cache",
    "no_loading_bar",
]

ATTENTION_NAME = "turboquant_quality"

# A transformers model, whose own annotations do not fit its calls.
Model: TypeAlias = Any


class LayerErrors:
    """Relative errors |got - exact| / |exact| by layer and by what is compared, over everything that was added."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[int, torch.Tensor]] = {}

    def add(self, what: str, layer: int, got: torch.Tensor, exact: torch.Tensor) -> None:
        """Count in one tensor of one layer."""
        exact = exact.float()
        squares = torch.stack([(got.float() - exact).square().sum(), exact.square().sum()]).double()
        layers = self._sums.setdefault(what, {})
        layers[layer] = layers[layer] + squares if layer in layers else squares

    def relative(self, what: str) -> dict[int, float]:
        """Layer -> |got - exact| / |exact|; empty where nothing was added."""
        layers = self._sums.get(what, {})
        return {layer: _ratio(*layers[layer].tolist()) for layer in sorted(layers)}


def _ratio(difference: float, exact: float) -> float:
    """Of the lengths whose squares these are; no difference is no error, whatever it is an error of."""
    return math.sqrt(difference / exact) if exact else math.inf if difference else 0.0


_format: ContextVar[tuple[Format, LayerErrors | None]] = ContextVar("cache format")


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: "sdpa" over the keys and values of the current format."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    cached, errors = _format.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    key_again, value_again = cached(layer, key, value)
    output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key_again, value_again, attention_mask, **kwargs)
    if errors is not None:
        exact = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        errors.add("keys", layer, key_again, key)
        errors.add("values", layer, value_again, value)
        errors.add("attention", layer, output[0], exact[0])
    return output


@contextmanager
def cache_format(model: Model, cached: Format, errors: LayerErrors | None = None) -> Iterator[None]:
    """Within the block, ``model`` attends to keys and values as ``cached`` returns them.

    Args:
        model: a transformers model that runs with the attention implementation "sdpa".
        cached: from exact to cached keys and values.
        errors: counts, per layer, what the format does to "keys", to "values" and to the "attention" output of the same
            query, keys and values; costs a second attention call per layer.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION_NAME, _attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    before = model.config._attn_implementation
    token = _format.set((cached, errors))
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _format.reset(token)


def cached_logits(model: Model, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits ``[batch, length, vocabulary]`` of token ids ``[batch, length]``, read through an empty cache; None: without one.

    Works for every model of transformers that takes a cache, whatever its attention.
    """
    logits: torch.Tensor = (model(ids, use_cache=False) if cache is None else cached_output(model, ids, cache)).logits
    return logits


def cached_output(model: Model, ids: torch.Tensor, cache: Any) -> Any:
    """What a model returns for token ids ``[batch, length]`` and a cache.

    Code that comes with a model may know the cache by the name that transformers has given up.
    """
    return model(ids, use_cache=True, **{_cache_argument(model): cache})


def keeps_cache(model: Model, output: Any) -> bool:
    """Whether a model returned the cache that it was given: an encoder does not, whatever it wrote there."""
    return getattr(output, _cache_argument(model), None) is not None


def _cache_argument(model: Model) -> str:
    from turboquant_vllm.hf import CACHE_ARGUMENT

    takes = inspect.signature(model.forward).parameters
    return "past_key_values" if CACHE_ARGUMENT not in takes and "past_key_values" in takes else CACHE_ARGUMENT


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Within the block, transformers loads models without a progress bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
