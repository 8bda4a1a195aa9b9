"""Flash attention over packed keys and dense values.

Attributes:
    triton_flash_attention_tq4 (function): the kernel's entry point, the only public name of this module.
"""

from __future__ import annotations

import torch

from turboquant_vllm.checks import check_attention, check_flag, check_sm_scale

__all__ = ["triton_flash_attention_tq4"]


def triton_flash_attention_tq4(
    q: torch.Tensor,
    k_packed: torch.Tensor,
    k_norms: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Attention whose keys are TQ4 codes, looked up inside the kernel, and whose values are dense.

    Args:
        q: ``[B, H_q, N_q, D]``, fp16, bf16 or fp32, D even and at most 512, in the original coordinates.
        k_packed: uint8 ``[B, H_kv, N_kv, D // 2]``; H_q is a multiple of H_kv. Byte i of a vector holds the code of
            coordinate 2i in its high nibble and of 2i + 1 in its low nibble.
        k_norms: float32 ``[B, H_kv, N_kv]`` or ``[B, H_kv, N_kv, 1]``.
        centroids: float32 ``[16]``, any values in any order.
        rotation: float32 ``[D, D]``, orthogonal; a key is ``norm * centroids[codes] @ rotation``.
        v: ``[B, H_kv, N_kv, D]`` in q's dtype.
        sm_scale: factor on the scores; None means ``1 / sqrt(D)``.
        is_causal: query i sees keys ``0 .. N_kv - N_q + i`` (aligned to the bottom right).

    Returns:
        ``[B, H_q, N_q, D]`` in q's dtype. A query that sees no key gives zeros.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, what was expected and what came.
        RuntimeError: the tensors are not on a GPU that Triton supports.

    All tensors may have any strides and must be on one device. Source: TurboQuant, arXiv 2504.19874.

    Example:
        ```python
        import torch
        from turboquant_vllm import TQ4Codec
        from turboquant_vllm.triton.flash_attention_tq4 import triton_flash_attention_tq4

        codec = TQ4Codec(128, device="cuda")
        q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.float16)
        k = codec.compress(torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.float16))
        v = torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.float16)
        out = triton_flash_attention_tq4(q, k.codes, k.norms, codec.centroids, codec.rotation, v)
        ```

    See also:
        - :func:`turboquant_vllm.tq4_attention`: picks a backend; takes dense values, too.
        - :func:`turboquant_vllm.triton.flash_attention_tq4_kv.triton_flash_attention_tq4_kv`: packed values.
    """
    shape, norms, _ = check_attention(
        q, k_packed, k_norms, v, None, centroids, rotation, names=("k_packed", "v"), packed=(True, False)
    )
    scale = check_sm_scale(sm_scale, shape.head_dim)
    check_flag("is_causal", is_causal)
    run = torch.ops.turboquant.triton_attention
    return run(q, k_packed, norms, v, None, centroids, rotation, scale, is_causal)[0]
