"""Channel scales of a transformers model: from its weights, or from what its attention sees of a text."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch

from turboquant_vllm.calibration import KeyStatistics
from turboquant_vllm.hf.attention import attention_forward
from turboquant_vllm.hf.packing import why_dense
from turboquant_vllm.weights import key_scales_from_weights

__all__ = ["key_scales_from_model", "measure_key_scales"]

_NAME = "turboquant_calibration"


def key_scales_from_model(model: Any) -> dict[int, torch.Tensor]:
    """Scales from the weights of a transformers model: layer -> float32 ``[H_kv, D]``, on the CPU.

    Layers whose weights are not understood get ones, and the log names them; those without keys of their own are left out.
    """
    state = model.state_dict()
    return key_scales_from_weights(state, state.__getitem__, model.config)


@torch.inference_mode()
def measure_key_scales(
    model: Any, windows: torch.Tensor, advance: Callable[[], None] = lambda: None
) -> dict[int, torch.Tensor]:
    """Scales from the queries and keys of a text: layer -> float32 ``[H_kv, D]``, on the CPU.

    Args:
        model: a transformers model whose attention goes through transformers' attention interface.
        windows: token ids int64 ``[n, length]``, on the model's device, each read by itself.
        advance: called after each window.

    Raises:
        ValueError: no layer's cache can be kept in 4 bits; attention does not go through transformers' interface, or has an
            argument that "tq4" does not handle; queries or keys are not finite.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from turboquant_vllm.hf.masks import attention_mask

    name = type(model).__name__
    reasons = why_dense(model.config)
    if reasons and all(reasons):
        has = " and ".join(sorted(set(reasons)))
        raise ValueError(f"model: expected one whose cache can be kept in 4 bits, {name} has {has}")
    statistics = KeyStatistics()

    def attend(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        statistics.add(_whose_keys(model.config, int(module.layer_idx)), query, key)
        return attention_forward(module, query, key, *args, **kwargs)

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, attention_mask)
    options: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        for ids in windows.split(1):
            model(ids, **options)
            advance()
    finally:
        model.set_attn_implementation(before)
    scales = statistics.scales()
    if not scales:
        raise ValueError(f"model: expected one whose attention goes through transformers' attention interface, got {name}")
    return scales


def _whose_keys(config: Any, layer: int) -> int:
    """The layer whose keys ``layer`` reads: its own, or in some models those of the last layer of its kind that has any."""
    text = config.get_text_config(decoder=True)
    own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", None) or 0)
    if layer < own:
        return layer
    return max(index for index in range(own) if text.layer_types[index] == text.layer_types[layer])
