"""Flash attention over dense keys and values, by the same loop as the packed kernels.

Attributes:
    triton_flash_attention (function): the kernel's entry point, the only public name of this module.
"""

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

    Example:
        ```python
        import torch
        from turboquant_vllm.triton.flash_attention import triton_flash_attention

        q = torch.randn(1, 32, 64, 128, device="cuda", dtype=torch.float16)
        k, v = torch.randn(2, 1, 8, 4096, 128, device="cuda", dtype=torch.float16)
        out = triton_flash_attention(q, k, v, is_causal=True)
        ```

    See also:
        - :func:`turboquant_vllm.triton.flash_attention_tq4_kv.triton_flash_attention_tq4_kv`: keys and values packed.
    """
    shape, _, _ = check_attention(q, k, None, v, None, None, None, packed=(False, False))
    scale = check_sm_scale(sm_scale, shape.head_dim)
    check_flag("is_causal", is_causal)
    return torch.ops.turboquant.triton_attention(q, k, None, v, None, None, None, scale, is_causal)[0]
