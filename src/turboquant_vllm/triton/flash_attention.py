"""Flash attention over dense keys and values, by the same loop as the packed kernels."""

from __future__ import annotations

import torch

from turboquant_vllm.checks import check_attention, check_flag, check_sm_scale

__all__ = ["triton_flash_attention"]


def triton_flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float | None = None, is_causal: bool = False
) -> torch.Tensor:
    """Attention over dense keys and values.

    Args:
        q: ``[B, H_q, N_q, D]``, fp16, bf16 or fp32, D even and at most 512.
        k, v: ``[B, H_kv, N_kv, D]`` in q's dtype; H_q is a multiple of H_kv.
        sm_scale: factor on the scores; None means ``1 / sqrt(D)``.
        is_causal: query i sees keys ``0 .. N_kv - N_q + i`` (aligned to the bottom right).

    Returns:
        ``[B, H_q, N_q, D]`` in q's dtype. A query that sees no key gives zeros.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, what was expected and what came.
        RuntimeError: the tensors are not on a GPU that Triton supports.

    All tensors may have any strides and must be on one device. Source: FlashAttention-2, arXiv 2307.08691.
    """
    shape, _, _ = check_attention(q, k, None, v, None, None, None, packed=(False, False))
    scale = check_sm_scale(sm_scale, shape.head_dim)
    check_flag("is_causal", is_causal)
    return torch.ops.turboquant.triton_attention(q, k, None, v, None, None, None, scale, is_causal)[0]
