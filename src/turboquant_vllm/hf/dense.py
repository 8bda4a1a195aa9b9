"""Attention over dense keys and values with everything that models ask for, in memory that grows with the keys alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["dense_attention"]

_BLOCK = 1024  # queries at a time, where a mask is needed


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    sm_scale: float | None = None,
    is_causal: bool = False,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention, ``[B, H_q, N_q, D_v]``, over ``key [B, H_kv, N_kv, D]`` and ``value [B, H_kv, N_kv, D_v]``.

    Args:
        query: ``[B, H_q, N_q, D]``.
        sm_scale: factor on the scores; None means ``1 / sqrt(D)``.
        is_causal: query i sees keys ``0 .. N_kv - N_q + i``.
        window: and of these only the last ``window``.
        mask: instead of the two, bool or additive, broadcast to ``[B, H_q, N_q, N_kv]``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[H_q]``, logits that take part in the softmax and have no value.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    options: dict[str, Any] = {"sm_scale": sm_scale, "softcap": softcap, "sinks": sinks}
    if mask is not None:
        return _masked(query, key, value, mask, **options)
    everything = not is_causal or q_len == 1
    if window is None and softcap is None and sinks is None and (everything or q_len == kv_len):
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, scale=sm_scale, is_causal=not everything, enable_gqa=grouped)
    if not is_causal:
        return _masked(query, key, value, None, **options)
    blocks = []
    for start in range(0, q_len, _BLOCK):
        stop = min(start + _BLOCK, q_len)
        last = torch.arange(kv_len - q_len + start, kv_len - q_len + stop, device=query.device)[:, None]
        first_key = max(0, kv_len - q_len + start + 1 - window) if window is not None else 0
        last_key = max(first_key, kv_len - q_len + stop)
        keys = slice(first_key, last_key)
        column = torch.arange(first_key, last_key, device=query.device)
        sees = column <= last
        if window is not None:
            sees &= column > last - window
        blocks.append(_masked(query[:, :, start:stop], key[:, :, keys], value[:, :, keys], sees, **options))
    return torch.cat(blocks, 2)


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    sm_scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As :func:`dense_attention`, with any mask."""
    group = query.shape[1] // key.shape[1]
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=sm_scale, enable_gqa=group > 1)
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    lse = torch.logsumexp(scores, -1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, None])
    weights = torch.exp(scores - torch.where(lse == float("-inf"), 0.0, lse))
    return weights.to(value.dtype) @ value
