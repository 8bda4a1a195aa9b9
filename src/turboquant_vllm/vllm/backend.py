"""The attention backend as vLLM sees it: what it serves, how large its cache is, which classes do the work."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from turboquant_vllm.paged import MAX_PAGE_SIZE, MIN_PAGE_SIZE
from turboquant_vllm.records import GROUP
from turboquant_vllm.vllm import CACHE_DTYPE, why_not_layer
from turboquant_vllm.vllm.connectors import why_not_connectors
from turboquant_vllm.vllm.impl import TQ4Impl, current_settings, latest_impls
from turboquant_vllm.vllm.layer import place_of
from turboquant_vllm.vllm.metadata import TQ4MetadataBuilder

__all__ = ["TQ4Backend"]


class TQ4Backend(AttentionBackend):
    """Keys and values in 4 bits per coordinate: ``(head_size + 8) * 33 / 32`` bytes per token and head, without padding;
    ``head_size + 8`` without offsets of keys."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", CACHE_DTYPE]
    forward_includes_kv_cache_update = True  # in one call, attention begins while the store runs

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
        step = GROUP if not _is_dense(kv_cache_spec) and _has_offsets(kv_cache_spec) else MIN_PAGE_SIZE
        return list(range(step, MAX_PAGE_SIZE + 1, step))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those in which a layer's page is contiguous, head by head.

        Raises:
            ValueError: layers are left dense that vLLM cannot group with others.
        """
        impls = latest_impls()
        layers = [impl.layer for impl in impls]
        windows: dict[int | None, set[tuple[object, ...]]] = {layer.sliding_window: set() for layer in layers}
        for layer in layers:
            windows[layer.sliding_window].add((type(layer), layer.num_kv_heads, layer.head_dim))
        # Layers that share a cache vLLM finds in groups of one page size only.
        if len(windows) == 1 or len(set.union(*windows.values(), set())) < 2 or any(impl.shares_cache for impl in impls):
            return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
        mixed = [window for window, pages in windows.items() if window is not None and len(pages) > 1]
        if mixed and current_settings().leaves_dense:
            raise ValueError(
                f"of the layers with a sliding window of {mixed[0]}, all or none must be left dense where other layers have "
                "none or another, got some: change --kv-cache-dtype-skip-layers, which takes sliding_window for all with one"
            )
        # Where layers are in groups of their own, vLLM pads all pages to the largest, unless a block has those of all layers.
        return (KVCacheLayout.BLHNC, KVCacheLayout.LBHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Pages of codes and norms in place of keys and values; with offsets of keys 64 tokens are one state for vLLM. A layer
        left dense has vLLM's own pages."""
        if spec.state_content_bytes is not None or _is_dense(spec):
            return spec
        if reason := why_not_layer(spec.head_size, spec.head_size_v):
            raise ValueError(reason)
        tokens, width = place_of(spec.head_size, _has_offsets(spec))
        if spec.block_size == 1:
            # vLLM asks what a token takes, for blocks as large as another kind of state: rounded down, none is too small. But
            # a size is never that of the other format. For a dense token the answer is the same: vLLM would make blocks of 4
            # bits as large as dense ones, but pages of both sizes fit into one block.
            least = spec.head_size + 8 + (tokens > 1)
            return replace(spec, dtype=torch.uint8, state_content_bytes=max(width // tokens, least))
        if reason := _why_not_block_size(spec.block_size):
            raise ValueError(reason)
        return replace(spec, dtype=torch.uint8, state_content_bytes=width, tokens_per_state=tokens)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return not why_not_layer(head_size, head_size)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # those that move whole blocks: see supports_combination

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supports_combination(cls, *args: Any, **options: Any) -> str | None:
        """Block sizes and KV connectors are looked at: what vLLM says of them does not tell what to set."""
        names = list(signature(AttentionBackend.supports_combination).parameters)
        block_size = {**dict(zip(names, args, strict=False)), **options}["block_size"]
        config = get_current_vllm_config_or_none()
        reasons = [
            "" if block_size is None else _why_not_block_size(block_size),
            "" if config is None else why_not_connectors(config.kv_transfer_config),
        ]
        return "; ".join(filter(None, reasons)) or None


def _is_dense(spec: object) -> bool:
    """Whether this is the cache of a layer left dense, of blocks that have their size already."""
    return (
        isinstance(spec, AttentionSpec)
        and spec.state_content_bytes is None
        and spec.block_size > 1
        and spec.dtype != torch.uint8
        and current_settings().leaves_dense
    )


def _has_offsets(spec: object = None) -> bool:
    """Whether keys have offsets in such a cache; where it is not known yet, by the options."""
    if isinstance(spec, AttentionSpec) and spec.state_content_bytes is not None:
        return spec.state_content_bytes != place_of(spec.head_size, False)[1]
    return current_settings().options.key_offsets


def _why_not_block_size(block_size: int) -> str:
    """Why pages cannot have so many tokens, and what to set; empty where they can."""
    if block_size % MIN_PAGE_SIZE:
        return f"expected a block size that is a multiple of {MIN_PAGE_SIZE}, got {block_size}"
    if block_size % GROUP and current_settings().options.key_offsets:
        return (
            f"keys with offsets need a block size that is a multiple of {GROUP}, got {block_size}: set --block-size {GROUP} or "
            """leave it out, or --additional-config '{"turboquant": {"key_offsets": false}}'"""
        )
    return ""
