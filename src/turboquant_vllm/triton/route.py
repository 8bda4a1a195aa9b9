"""Which of this backend's two ways serves an attention call: fused kernels, or slices and PyTorch's dense attention."""

from __future__ import annotations

import torch

from turboquant_vllm.triton import launch, prefill

__all__ = ["attention"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    k_norms: torch.Tensor | None,
    v: torch.Tensor,
    v_norms: torch.Tensor | None,
    centroids: torch.Tensor | None,
    rotation: torch.Tensor | None,
    sm_scale: float,
    is_causal: bool,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed or dense keys and values; arguments and results as :func:`turboquant_vllm.reference.attention`.

    Arguments must have passed :func:`turboquant_vllm.checks.check_attention`.
    """
    plain = sliding_window is None and softcap is None and sinks is None
    if plain and prefill.serves(q, k_norms, v_norms, q.shape[1] // k.shape[1], sm_scale):
        assert k_norms is not None
        assert v_norms is not None
        assert centroids is not None
        assert rotation is not None
        return prefill.attention(q, k, k_norms, v, v_norms, centroids, rotation, sm_scale, is_causal)
    return launch.attention(q, k, k_norms, v, v_norms, centroids, rotation, sm_scale, is_causal, sliding_window, softcap, sinks)
