"""What the logits of `benchmarks/hf.py` must be: those of attention in float32 over vectors after compress and decompress.

A dense cache and ours hold the same keys and values there, and the rest of the model is the same in bf16. So both differ from
this by rounding alone, which layers of random weights amplify for both alike.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from turboquant_vllm import PagedTQ4Cache, TQ4Codec
from turboquant_vllm.codec import TQ4Keys
from turboquant_vllm.hf import CACHE_ARGUMENT
from turboquant_vllm.records import GROUP
from turboquant_vllm.reference_keys import store_keys

__all__ = ["LARGEST_RATIO", "exact_logits", "relative_error", "round_trips"]

# How many times the dense cache's error ours may be. Both are norms over 10^5 and more logits of differences that the same
# layers have amplified, so if attention rounded alike, they would be equal within percents. Ours rounds what sdpa does
# (weights, results) and rotated queries and levels besides: twice PyTorch's error is what the kernels' own tests allow.
LARGEST_RATIO = 2.0
_NAME = "float32"


def round_trip(x: torch.Tensor, codec: TQ4Codec) -> torch.Tensor:
    """Vectors ``[..., D]`` after compress and decompress, in float32."""
    return codec.decompress(codec.compress(x), torch.float32)


def round_trips(keys: torch.Tensor, values: torch.Tensor, codec: TQ4Codec) -> list[torch.Tensor]:
    """Keys and values ``[B, H_kv, N, D]`` as our caches keep them, whole and from token 0 on; in float32."""
    # Sequence by sequence, for plain PyTorch writes the keys out in float32 several times.
    some = [codec.decompress(codec.compress_keys(k), torch.float32) for k in keys.split(1)]
    return [torch.cat(some), round_trip(values, codec)]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference of logits ``[..., vocabulary]``, relative to how far ``want`` spreads around its means."""
    return float((got - want).norm() / (want - want.mean(-1, keepdim=True)).norm())


def exact_logits(
    model: Any, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor, codec: TQ4Codec, packed: bool
) -> torch.Tensor:
    """Logits float32 ``[B, S, vocabulary]`` of tokens ``ids [B, S]``, one by one behind ``keys, values [B, H_kv, N, D]``.

    All layers have these keys and values after ``codec``'s round trip. What ``ids`` add is ``packed``, as in our caches, or
    left as it is.
    """
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    room = torch.nn.functional.pad
    k, v = (room(x, (0, 0, 0, ids.shape[1])) for x in round_trips(keys, values, codec))
    cache = DynamicCache(config=model.config)
    count = keys.shape[2]
    cache.layers = [
        _SharedLayer(k, v, count, codec, _LastKeys(keys, ids.shape[1], codec) if packed else None) for _ in cache.layers
    ]
    found = [model(one, **{CACHE_ARGUMENT: cache}).logits[:, -1].float() for one in ids.split(1, 1)]
    model.set_attn_implementation(before)
    return torch.stack(found, 1)


class _SharedLayer(DynamicLayer):
    """Tokens that all layers share, and behind them those of this layer, written there again by every call."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, count: int, codec: TQ4Codec, packed: _LastKeys | None) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.count, self.codec, self.packed = keys, values, count, codec, packed
        self.own = keys.new_empty((2, *keys.shape[:2], 0, keys.shape[3]))

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        added = value_states.float() if self.packed is None else round_trip(value_states, self.codec)
        self.own = torch.cat((self.own, torch.stack((key_states.float(), added))), 3)
        stop = self.count + self.own.shape[3]
        for shared, own in zip((self.keys, self.values), self.own, strict=True):
            shared[:, :, self.count : stop] = own
        if self.packed is not None:
            self.packed.append(key_states)
            self.keys[:, :, self.packed.first : stop] = self.packed.read()
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        return self.count + self.own.shape[3]


class _LastKeys:
    """The last groups of keys ``[B, H_kv, N, D]``, whose outliers later keys may replace, with room for ``more`` keys."""

    def __init__(self, keys: torch.Tensor, more: int, codec: TQ4Codec) -> None:
        count = keys.shape[2]
        self.first = max(0, count // GROUP - 1) * GROUP  # a group's offset depends on the group before
        self.codec, self.stop = codec, 0
        size = -(-(count - self.first + more) // GROUP) * GROUP
        self.pages = PagedTQ4Cache.allocate(
            keys.shape[0],
            page_size=size,
            num_kv_heads=keys.shape[1],
            head_dim=keys.shape[3],
            has_offsets=True,
            device=keys.device,
        )
        self.append(keys[:, :, self.first :])

    def append(self, keys: torch.Tensor) -> None:
        """Code ``[B, H_kv, n, D]`` keys behind those that there are."""
        places = torch.arange(self.stop, self.stop + keys.shape[2])
        slots = torch.arange(keys.shape[0])[:, None] * self.pages.page_size + places
        codec = self.codec
        k = keys.transpose(1, 2).flatten(0, 1)
        store_keys(k, self.pages, slots.flatten(), None, codec.key_tables, codec.boundaries, codec.scale)
        self.stop += keys.shape[2]

    def read(self) -> torch.Tensor:
        """What they read back as, float32."""
        keys = self.pages.keys.tokens(0, self.stop)
        return self.codec.decompress(TQ4Keys(*keys), torch.float32)  # type: ignore[arg-type]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query a sequence, ``[B, H_q, 1, D]``, to all keys, float32 ``[B, H_kv, N, D]``: ``[B, 1, H_q, D]``."""
    grouped = query.float().unflatten(1, (key.shape[1], -1)).squeeze(3)  # [B, H_kv, G, D]
    weights = (grouped @ key.mT * scaling).softmax(-1)
    return (weights @ value).flatten(1, 2).unsqueeze(1).to(query.dtype), None
