"""Attention over dense keys and values with everything that models ask for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from turboquant_vllm import ops, reference
from turboquant_vllm.checks import MAX_HEAD_DIM, check_masks, check_sm_scale
from turboquant_vllm.records import NO_TABLES, Masks, Operand

__all__ = ["dense_attention"]


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    sm_scale: float | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention, ``[B, H_q, N_q, D_v]``, over ``key [B, H_kv, N_kv, D]`` and ``value [B, H_kv, N_kv, D_v]``.

    Args:
        query: ``[B, H_q, N_q, D]``.
        sm_scale: factor on the scores; None means ``1 / sqrt(D)``.
        is_causal: query i sees keys ``0 .. N_kv - N_q + i``.
        sliding_window: and of these only the last ``sliding_window``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: float32 ``[H_q]``, logits that take part in the softmax and have no value.
        mask: instead of ``is_causal`` and ``sliding_window``; bool or additive, broadcast to ``[B, H_q, N_q, N_kv]``.
    """
    q_len, kv_len, head_dim = query.shape[2], key.shape[2], query.shape[3]
    given = check_masks(is_causal, sliding_window, softcap, sinks, query.shape[1], query.device)
    scale = check_sm_scale(sm_scale, head_dim)
    if mask is None and not given and (not is_causal or q_len == kv_len):
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, scale=sm_scale, is_causal=is_causal, enable_gqa=grouped)
    if mask is None and value.shape[-1] == head_dim:
        masks = Masks(is_causal, **given)
        if query.dtype != torch.float64 and head_dim <= MAX_HEAD_DIM and head_dim % 2 == 0 and ops.triton_runs_on(query.device):
            run: Any = torch.ops.turboquant.triton_attention
            return run(query, key, None, value, None, None, None, scale, *masks[:4])[0]
        return reference.attention(query, Operand(key), Operand(value), NO_TABLES, scale, masks)[0]
    if mask is None and is_causal:
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len)
        if sliding_window is not None:
            mask = mask.triu(kv_len - q_len - given["sliding_window"] + 1)
    return _masked(query, key, value, mask, sm_scale=scale, softcap=softcap, sinks=sinks)


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    sm_scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`dense_attention`, with any mask."""
    group = query.shape[1] // key.shape[1]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=sm_scale, enable_gqa=group > 1)
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
    scores = (query @ key.mT) * sm_scale
    if query.dtype != torch.float64:
        scores = scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    lse = torch.logsumexp(scores, -1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, None])
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse))
    return weights.to(value.dtype) @ value
