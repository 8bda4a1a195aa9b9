"""The cache dtype "tq4" as vLLM sees it, from the release on that takes names of others."""

from __future__ import annotations

import torch
from vllm.v1.kv_cache_interface import KVQuantMode

from turboquant_vllm.vllm import CACHE_DTYPE

__all__ = ["TQ4CacheDType"]


class TQ4CacheDType:
    """Bytes, which no kernel of vLLM's own touches: the backend's ``customize_spec`` says how many."""

    name = CACHE_DTYPE

    def torch_dtype(self) -> torch.dtype:
        """What the cache's tensors hold."""
        return torch.uint8

    def quant_mode(self) -> KVQuantMode:
        """None that vLLM knows. CUSTOM has the number of another mode in 0.33."""
        return KVQuantMode.NONE
