"""Cache formats, as functions on what a layer would keep: keys and values in, what a reader of the cache gets out.

Reading a compressed cache and attending to what its vectors decompress to are the same thing (docs/architecture.md), so
a model's quality under a format needs no kernel for that format, and formats of others can be measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from turboquant_vllm.codec import TQ4Codec
from turboquant_vllm.fakes import keep_real

__all__ = ["Format", "TQ4Format"]

# layer, key [B, H_kv, N, D_k], value [B, H_kv, N, D_v] -> key and value of the same shapes and dtype
Format = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@keep_real()
def _codec(head_dim: int, seed: int, rotation: str, scale: str, device: torch.device) -> TQ4Codec:
    return TQ4Codec(head_dim, seed=seed, rotation=rotation, scale=scale, device=device)


@dataclass(frozen=True)
class TQ4Format:
    """TQ4 for keys and values, or for one of them, in all layers but some.

    Attributes:
        key_scale, value_scale: as in :class:`TQ4Codec`; None leaves the keys, or the values, exact.
        seed, rotation: as in :class:`TQ4Codec`.
        dense_layers: layers whose cache stays exact.
    """

    key_scale: str | None = "unbiased"
    value_scale: str | None = "unbiased"
    seed: int = 0
    rotation: str = "auto"
    dense_layers: Collection[int] = field(default_factory=frozenset)

    def __call__(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer as they come back from the cache."""
        if layer in self.dense_layers:
            return key, value
        return self._again(key, self.key_scale), self._again(value, self.value_scale)

    def _again(self, x: torch.Tensor, scale: str | None) -> torch.Tensor:
        if scale is None:
            return x
        codec = _codec(x.shape[-1], self.seed, self.rotation, scale, x.device)
        return codec.decompress(codec.compress(x), x.dtype)
