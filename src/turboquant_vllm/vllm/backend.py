"""The attention backend as vLLM sees it: what it serves, how large its cache is, which classes do the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from turboquant_vllm.paged import MAX_PAGE_SIZE, MIN_PAGE_SIZE
from turboquant_vllm.vllm import CACHE_DTYPE
from turboquant_vllm.vllm.impl import TQ4Impl
from turboquant_vllm.vllm.layer import SLOT_NORM_BYTES
from turboquant_vllm.vllm.metadata import TQ4MetadataBuilder

__all__ = ["TQ4Backend"]


class TQ4Backend(AttentionBackend):
    """Keys and values in 4 bits per coordinate: ``head_size + 8`` bytes per token and head, without padding."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", CACHE_DTYPE]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TQ4Impl]:
        return TQ4Impl

    @staticmethod
    def get_builder_cls() -> type[TQ4MetadataBuilder]:
        return TQ4MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[Any]:
        return list(range(MIN_PAGE_SIZE, MAX_PAGE_SIZE + 1, 16))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those in which a layer's page is contiguous, head by head."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages of codes and norms in place of keys and values."""
        if spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"the TQ4 backend needs values as long as keys, got head sizes {spec.head_size} and {spec.head_size_v}"
            )
        return replace(spec, dtype=torch.uint8, state_content_bytes=spec.head_size + SLOT_NORM_BYTES)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return 16 <= head_size <= 256 and head_size % 16 == 0

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False  # not tried: a connector may take a page apart

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False
