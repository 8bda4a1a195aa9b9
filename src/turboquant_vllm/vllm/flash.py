"""Attention to keys and values that are not packed, by the FlashAttention that vLLM ships: whole prompts, and dense pages."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from vllm.platforms import current_platform

from turboquant_vllm.vllm.batch import Run
from turboquant_vllm.vllm.dense import DenseOps, reference_ops, split_pages
from turboquant_vllm.vllm.layer import Exact, LayerShape, exact_attention

__all__ = ["choose_dense", "choose_exact"]


def choose_exact(head_dim: int, has_sinks: bool) -> Exact:
    """vLLM's FlashAttention where it serves such a layer on this platform, else this library's own kernels."""
    fa_version = _version(head_dim, has_sinks)
    if fa_version is None:
        return exact_attention
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    def attend(layer: LayerShape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run, out: torch.Tensor) -> None:
        flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            cu_seqlens_q=run.cu_seqlens_q,
            cu_seqlens_k=run.cu_seqlens_q,
            max_seqlen_q=run.max_query_len,
            max_seqlen_k=run.max_query_len,
            softmax_scale=layer.sm_scale,
            causal=True,
            fa_version=fa_version,
            out=out,
            **_masks(layer, q.dtype),
        )

    return attend


def choose_dense(head_dim: int, has_sinks: bool) -> DenseOps:
    """vLLM's FlashAttention over pages; on CPUs plain PyTorch.

    Raises:
        ValueError: FlashAttention does not serve such a layer on this platform.
    """
    if not current_platform.is_cuda_alike():
        return reference_ops()
    fa_version = _version(head_dim, has_sinks)
    if fa_version is None:
        raise ValueError(
            "layers left dense need vLLM's FlashAttention, which does not serve "
            f"head size {head_dim}{' with sinks' if has_sinks else ''} on {current_platform.device_name}: "
            "take the layer off --kv-cache-dtype-skip-layers"
        )
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, reshape_and_cache_flash

    def write(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        one = _one(kv_cache.device)
        reshape_and_cache_flash(k, v, *split_pages(kv_cache), slot_mapping, "auto", one, one)

    def read(layer: LayerShape, q: torch.Tensor, kv_cache: torch.Tensor, run: Run, out: torch.Tensor) -> None:
        keys, values = split_pages(kv_cache)
        flash_attn_varlen_func(
            q=q,
            k=keys,
            v=values,
            cu_seqlens_q=run.cu_seqlens_q,
            seqused_k=run.seq_lens,
            block_table=run.block_table,
            max_seqlen_q=run.max_query_len,
            max_seqlen_k=run.max_seq_len,
            softmax_scale=layer.sm_scale,
            causal=True,
            fa_version=fa_version,
            out=out,
            **_masks(layer, q.dtype),
        )

    return DenseOps(write, read)


@cache
def _one(device: torch.device) -> torch.Tensor:
    """The scale of a cache that has none."""
    return torch.ones((), dtype=torch.float32, device=device)


def _version(head_dim: int, has_sinks: bool) -> int | None:
    """Of the FlashAttention that serves such a layer; None where none does."""
    if not current_platform.is_cuda() or head_dim > 256:
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    fa_version: int | None = get_flash_attn_version(head_size=head_dim, has_sinks=has_sinks)
    return None if has_sinks and fa_version == 2 else fa_version


def _masks(layer: LayerShape, dtype: torch.dtype) -> dict[str, Any]:
    """A layer's masks in FlashAttention's words."""
    masks: dict[str, Any] = {}
    if layer.sliding_window is not None:
        masks["window_size"] = [layer.sliding_window - 1, 0]
    if layer.softcap is not None:
        masks["softcap"] = layer.softcap
    if layer.sinks is not None:
        masks["s_aux"] = layer.sinks.to(dtype)
    return masks
