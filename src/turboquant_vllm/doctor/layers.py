"""What a model's attention layers are, seen without its weights: one call of two tokens on the device "meta"."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Found", "Layer", "find_layers"]

_NAME = "turboquant_doctor"


@dataclass(frozen=True)
class Layer:
    """An attention layer.

    Attributes:
        num_heads, num_kv_heads: of queries, and of keys and values.
        head_dim, value_dim: coordinates of a key, and of a value.
        window: keys that a query sees at most.
        sinks, softcap: whether scores have them.
        dense: what it has that caches for transformers do not keep in 4 bits; empty where they do.
        own: whether the model computes its attention by itself, and so never asks for "tq4".
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    sinks: bool = False
    softcap: bool = False
    dense: str = ""
    own: bool = False


@dataclass
class Found:
    """A model's layers.

    Attributes:
        layers: number of a layer -> what it is; without those that have no keys and values, or take another layer's.
        others: what such layers have -> their numbers.
        refused: why attention "tq4" refuses the model; empty where it does not.
        source: how that was found out.
    """

    layers: dict[int, Layer] = field(default_factory=dict)
    others: dict[str, list[int]] = field(default_factory=dict)
    refused: str = ""
    source: str = "a call without weights"


def find_layers(config: Any, *, trust_remote_code: bool = False) -> Found:
    """The layers of the language model that ``config`` describes.

    Raises:
        ValueError: it describes none.
    """
    from transformers import DynamicCache

    from turboquant_vllm.hf import CACHE_ARGUMENT
    from turboquant_vllm.hf.packing import why_dense

    text = config.get_text_config(decoder=True)
    reasons = why_dense(config)
    found, cache = Found(), DynamicCache(config=config)
    seen: dict[int, dict[str, Any]] = {}
    with _quiet(), torch.inference_mode():
        model = _build(config, text, seen, trust_remote_code)
        tokens = torch.zeros((1, 2), dtype=torch.long, device="meta")
        try:
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **{CACHE_ARGUMENT: cache})
        except ValueError as error:
            found.refused = str(error).splitlines()[0]
        except Exception:  # what cannot run without numbers is no fault of the model's
            found.source = "its configuration"
    for index, (layer, reason) in enumerate(zip(cache.layers, reasons, strict=True)):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        has_none = keys is None or values is None or not keys.numel()
        if has_none and (seen or reason):
            found.others.setdefault(reason or "no keys and values", []).append(index)
            continue
        asked = seen.get(index, {})
        if keys is not None and values is not None and keys.numel():
            sizes = keys.shape[1], keys.shape[-1], values.shape[-1]
        else:
            sizes = asked["sizes"] if asked else _sizes(text)
        is_own = not asked and found.source == Found.source
        masks = {name: asked.get(name, False) for name in ("sinks", "softcap")}
        heads, window = asked.get("num_heads", text.num_attention_heads), getattr(layer, "sliding_window", None)
        found.layers[index] = Layer(heads, *sizes, window=window, **masks, dense=reason, own=is_own)
    return found


def _build(config: Any, text: Any, seen: dict[int, dict[str, Any]], trust_remote_code: bool) -> Any:
    """The model without weights, whose attention puts what it is asked for into ``seen``, by layer."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoModelForCausalLM

    from turboquant_vllm.hf.attention import check_options

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object, **options: Any
    ) -> tuple[torch.Tensor, None]:
        check_options(options)
        sizes = {
            "num_heads": query.shape[1],
            "num_kv_heads": key.shape[1],
            "head_dim": key.shape[3],
            "value_dim": value.shape[3],
        }
        masks = {"sinks": options.get("s_aux") is not None, "softcap": options.get("softcap") is not None}
        seen[module.layer_idx] = {**sizes, **masks, "own": False}
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    # Some look attentions up among their own, and a model that sees has a decoder that may have no head.
    kinds = ((AutoModelForCausalLM, config), (AutoModelForCausalLM, text), (AutoModel, text))
    for kind, one in kinds:
        for name in (_NAME, "eager"):
            options = {"dtype": torch.bfloat16, "trust_remote_code": trust_remote_code, "attn_implementation": name}
            try:
                with torch.device("meta"):
                    return kind.from_config(one, **options).eval()
            except Exception as error:  # code of the model's own raises whatever it likes
                failed = error
    raise ValueError(f"model: expected a language model, got {type(config).__name__}: {str(failed).splitlines()[0]}")


def _sizes(text: Any) -> tuple[int, int, int]:
    """Key/value heads and coordinates of keys and values, as most configurations name them."""
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, head_dim, head_dim


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block transformers says nothing of kernels that it lacks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
