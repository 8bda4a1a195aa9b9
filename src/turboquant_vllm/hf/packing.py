"""Which layers of a model are kept in 4 bits: one answer for the caches, and for whoever measures them or counts bytes."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import DynamicCache, cache_utils
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

__all__ = ["PACKED", "SHARED", "warn_if_all_dense", "why_dense"]

SHARED = "no keys and values of their own"

# Classes of layers whose keys and values are packed; the last two have a recurrent state beside them.
PACKED = (
    DynamicLayer, DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer,
)  # fmt: skip
# What holds for any other class, where the installed release has one of that name; the first that fits.
_KINDS = (
    ("LinearAttentionLayer", "linear attention"),
    ("DynamicIndexedLayer", "indexed attention"),
    ("DummyLayer", SHARED),
)


def why_dense(config: Any) -> list[str]:
    """Of each layer of a growing cache for the model, what it has that is not kept in 4 bits; empty for those that are.

    Args:
        config: of the model, ``model.config``.
    """
    layers = DynamicCache(config=config).layers
    if getattr(config.get_text_config(decoder=True), "kv_lora_rank", None) is not None:
        return ["multi-head latent attention"] * len(layers)
    return ["" if type(layer) in PACKED else _kind(layer) for layer in layers]


def warn_if_all_dense(reasons: list[str], name: str) -> None:
    """Warn, where a cache is made, if :func:`why_dense` found no layer that the cache called ``name`` could pack."""
    if reasons and all(reasons):
        has = " and ".join(sorted(set(reasons)))
        warnings.warn(f"{name} keeps nothing in 4 bits: the layers of this model have {has}", UserWarning, stacklevel=3)


def _kind(layer: Any) -> str:
    for name, kind in _KINDS:
        if isinstance(layer, getattr(cache_utils, name, ())):
            return kind
    return f"a cache of the class {type(layer).__name__}"
