"""Attention of whole prompts to their exact keys and values, by the FlashAttention that vLLM ships."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform

from turboquant_vllm.vllm.batch import Run
from turboquant_vllm.vllm.layer import Exact, PagedLayer, exact_attention

__all__ = ["choose_exact"]


def choose_exact(head_dim: int, has_sinks: bool) -> Exact:
    """vLLM's FlashAttention where it serves such a layer on this platform, else this library's own kernels."""
    if not current_platform.is_cuda() or head_dim > 256:
        return exact_attention
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    fa_version = get_flash_attn_version(head_size=head_dim, has_sinks=has_sinks)
    if fa_version is None or (has_sinks and fa_version == 2):
        return exact_attention

    def attend(layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run, out: torch.Tensor) -> None:
        masks: dict[str, Any] = {}
        if layer.sliding_window is not None:
            masks["window_size"] = [layer.sliding_window - 1, 0]
        if layer.softcap is not None:
            masks["softcap"] = layer.softcap
        if layer.sinks is not None:
            masks["s_aux"] = layer.sinks.to(q.dtype)
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
            **masks,
        )

    return attend
