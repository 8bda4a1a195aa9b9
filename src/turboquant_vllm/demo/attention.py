"""Attention over 4-bit keys and values as a transformers attention function, and what it does to each layer.

This is the whole path of a compressed cache in one function, to be read: keys and values arrive after the rotary
embedding, are compressed, and attention reads the codes. A model uses it when it is made with
`attn_implementation="tq4_demo"` after `register()`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from turboquant_vllm import TQ4Codec, TQ4Tensor, tq4_attention

ATTENTION_NAME = "tq4_demo"

# Arguments of transformers' attention interface that change the result and are not handled here.
_UNSUPPORTED = ("cache", "position_bias", "s_aux", "sliding_window", "softcap")


def register() -> None:
    """Make `attn_implementation="tq4_demo"` known to transformers, together with its mask function."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    # None for an unpadded batch, and the 2-D padding mask otherwise: without it, padding would go unnoticed.
    AttentionMaskInterface.register(ATTENTION_NAME, flash_attention_mask)


@cache
def codec_for(head_dim: int, device: torch.device) -> TQ4Codec:
    """The codec that all layers of that head dimension on that device share."""
    return TQ4Codec(head_dim, device=device)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    observer: Observer | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over keys and values in 4 bits, with the signature of transformers' attention interface.

    Args:
        module: the attention layer; its `layer_idx` tells the observer which.
        query: `[B, H_q, N_q, D]`, fp16, bf16 or fp32.
        key, value: `[B, H_kv, N_kv, D]`, after the rotary embedding, not repeated for grouped queries.
        attention_mask: None; the mask is causal, aligned to the bottom right.
        dropout: 0.
        scaling: factor on the scores; None means 1 / sqrt(D).
        is_causal: None (the module's own attribute decides) or True.
        observer: sees the call's inputs, codes and output.

    Returns:
        `[B, N_q, H_q, D]` in the query's dtype, and None for the weights, which are never formed.

    Raises:
        ValueError: a mask, dropout, bidirectional attention, or an argument of the interface that is not handled.
    """
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected None (unpadded causal text), got a mask of shape {shape}")
    if dropout != 0.0:
        raise ValueError(f"dropout: expected 0, got {dropout}")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        raise ValueError("is_causal: expected causal attention, got a bidirectional layer")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None, got {type(kwargs[name]).__name__}")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False (the weights are never formed), got True")

    codec = codec_for(key.shape[-1], key.device)
    compressed_key, compressed_value = codec.compress(key), codec.compress(value)
    output = tq4_attention(query, compressed_key, compressed_value, codec, sm_scale=scaling, is_causal=True)
    if observer is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        observer.see(layer, codec, query, (key, compressed_key), (value, compressed_value), output, scaling)
    return output.transpose(1, 2).contiguous(), None


class Observer:
    """Sums over attention calls: errors, bytes, and a histogram of what the quantiser sees.

    Args:
        bins: bins of the histogram.
        limit: the histogram covers rotated normalised coordinates in [-limit, limit].
    """

    def __init__(self, bins: int = 160, limit: float = 0.5) -> None:
        self.limit = limit
        self.histogram = {name: torch.zeros(bins, device="cpu") for name in ("keys", "values")}
        self.bytes = 0
        self._attention: dict[int, list[float]] = {}
        self._vectors: dict[str, list[float]] = {"keys": [0.0, 0.0], "values": [0.0, 0.0]}

    def see(
        self,
        layer: int,
        codec: TQ4Codec,
        query: torch.Tensor,
        keys: tuple[torch.Tensor, TQ4Tensor],
        values: tuple[torch.Tensor, TQ4Tensor],
        output: torch.Tensor,
        scaling: float | None,
    ) -> None:
        """Add one call with as many keys as queries: exact tensors, their codes, and `output` `[B, H_q, N, D]`."""
        key, value = keys[0].float(), values[0].float()
        exact = F.scaled_dot_product_attention(
            query.float(), key, value, scale=scaling, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        _add(self._attention.setdefault(layer, [0.0, 0.0]), (output - exact).square().sum(), exact.square().sum())
        self.bytes += keys[1].nbytes + values[1].nbytes
        for name, dense, packed in (("keys", key, keys[1]), ("values", value, values[1])):
            squares = dense.square().sum(-1)
            error = (dense - codec.decompress(packed)).square().sum(-1) / squares
            _add(self._vectors[name], error.sum(), torch.tensor(float(error.numel()), device="cpu"))
            coordinates = dense / squares.sqrt().unsqueeze(-1) @ codec.rotation.T
            bins = self.histogram[name].numel()
            self.histogram[name] += torch.histc(coordinates, bins, -self.limit, self.limit).cpu()

    @property
    def attention_error(self) -> list[float]:
        """Per layer: |output - exact| / |exact| over all calls, for the same query, keys and values."""
        return [(self._attention[layer][0] / self._attention[layer][1]) ** 0.5 for layer in sorted(self._attention)]

    @property
    def vector_error(self) -> dict[str, float]:
        """Mean of |x - x'|^2 / |x|^2 over all keys and over all values."""
        return {name: total / count for name, (total, count) in self._vectors.items()}


def _add(sums: list[float], first: torch.Tensor, second: torch.Tensor) -> None:
    sums[0] += first.item()
    sums[1] += second.item()
