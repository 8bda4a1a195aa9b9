"""The public attention function: check, choose a backend, call it."""

from __future__ import annotations

from typing import Literal, overload

import torch

from turboquant_vllm import ops, reference
from turboquant_vllm.checks import (
    AttentionShape,
    check_attention,
    check_device,
    check_flag,
    check_groups,
    check_key_scales,
    check_masks,
    check_sm_scale,
    check_states,
)
from turboquant_vllm.codec import TQ4Codec, TQ4Keys, TQ4Tensor
from turboquant_vllm.limits import why_not_decode
from turboquant_vllm.records import Masks, Operand

__all__ = ["BACKENDS", "choose_backend", "merge_attention_states", "tq4_attention"]

BACKENDS = ("cuda", "triton", "reference")


@overload
def tq4_attention(
    q: torch.Tensor,
    k: TQ4Tensor | TQ4Keys,
    v: TQ4Tensor | torch.Tensor,
    codec: TQ4Codec,
    *,
    sm_scale: float | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> torch.Tensor: ...


@overload
def tq4_attention(
    q: torch.Tensor,
    k: TQ4Tensor | TQ4Keys,
    v: TQ4Tensor | torch.Tensor,
    codec: TQ4Codec,
    *,
    sm_scale: float | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]: ...


def tq4_attention(
    q: torch.Tensor,
    k: TQ4Tensor | TQ4Keys,
    v: TQ4Tensor | torch.Tensor,
    codec: TQ4Codec,
    *,
    sm_scale: float | None = None,
    is_causal: bool = False,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over a compressed cache, which is never written out decompressed.

    Args:
        q: ``[B, H_q, N_q, D]``, fp16, bf16 or fp32; any strides.
        k: compressed keys of shape ``[B, H_kv, N_kv, D]``, H_q a multiple of H_kv; made by ``codec``, with offsets
            (``codec.compress_keys``, whose key scales ``codec`` must have) or without (``codec.compress``).
        v: compressed values of the same shape, or dense values ``[B, H_kv, N_kv, D]`` in q's dtype.
        codec: gives the rotation and the levels; on q's device.
        sm_scale: factor on the scores; None means ``1 / sqrt(D)``.
        is_causal: query i sees keys ``0 .. N_kv - N_q + i`` (aligned to the bottom right).
        sliding_window: with is_causal, of those the last ``sliding_window`` alone, the query's own position among them.
        softcap: scores, times sm_scale, become ``softcap * tanh(score / softcap)``.
        sinks: float32 ``[H_q]``, for each head a logit that is added to the denominator of its softmax; neither scaled nor
            capped.
        return_lse: also return the log-sum-exp.
        backend: "auto" (the best that can run, see ``turboquant info``), "cuda", "triton" or "reference"; a named
            backend that cannot run raises and never falls back.

    Returns:
        ``[B, H_q, N_q, D]`` in q's dtype; with ``return_lse`` also float32 ``[B, H_q, N_q]``, natural logarithm.
        With sinks it is that of all logits, the sink among them: of parts to be merged, one alone may get the sinks.
        A query that sees no key gives zeros, and its sink or -inf as its log-sum-exp.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, what was expected and what came.
        RuntimeError: the named backend cannot run here.
    """
    if not isinstance(codec, TQ4Codec):
        raise TypeError(f"codec must be a TQ4Codec, got {type(codec).__name__}")
    if not isinstance(k, (TQ4Tensor, TQ4Keys)):
        raise TypeError(f"k must be a TQ4Tensor or TQ4Keys, got {type(k).__name__}")
    if not isinstance(v, (TQ4Tensor, torch.Tensor)):
        raise TypeError(f"v must be a TQ4Tensor or a torch.Tensor, got {type(v).__name__}")
    values, value_norms = (v.codes, v.norms) if isinstance(v, TQ4Tensor) else (v, None)
    packed_values = isinstance(v, TQ4Tensor)
    shape, k_norms, v_norms = check_attention(
        q,
        k.codes,
        k.norms,
        values,
        value_norms,
        codec.centroids,
        codec.rotation,
        names=("k.codes", "v.codes" if packed_values else "v"),
        packed=(True, packed_values),
    )
    keys, tables, offsets = Operand(k.codes, k_norms), codec.tables, {}
    if isinstance(k, TQ4Keys):
        keys, tables = keys._replace(groups=k.groups, steps=k.steps), codec.key_tables
        check_groups("k", k.groups, k.steps, (shape.batch, shape.num_kv_heads, shape.kv_len), shape.head_dim)
        check_key_scales(tables.key_scales, shape.num_kv_heads, shape.head_dim)
        for what, x in (("k.groups", k.groups), ("k.steps", k.steps)):
            check_device(what, x, q.device, "q")
        offsets = {"k_groups": k.groups, "k_steps": k.steps, "key_scales": tables.key_scales}
    scale = check_sm_scale(sm_scale, shape.head_dim)
    check_flag("return_lse", return_lse)
    masks = check_masks(is_causal, sliding_window, softcap, sinks, shape.num_heads, q.device)
    name, reason = choose_backend(q, shape, backend, (k.codes, values))
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    if name == "reference":
        out, lse = reference.attention(q, keys, Operand(values, v_norms), tables, scale, Masks(is_causal, **masks))
    else:
        args = (q, k.codes, k_norms, values, v_norms, *tables[:2], scale, is_causal)
        if name == "cuda":
            hadamard = codec.rotation_kind == "hadamard"
            out, lse = torch.ops.turboquant.cuda_decode(*args, **masks, **offsets, hadamard=hadamard)
        else:
            out, lse = torch.ops.turboquant.triton_attention(*args, **masks, **offsets)
    return (out, lse) if return_lse else out


def merge_attention_states(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention over disjoint sets of keys into attention over their union, on any device.

    So a context can be split over calls or over machines: each part gives what :func:`tq4_attention` returns with
    ``return_lse``, and the parts in any order give the whole. Sums are float32 (float64 for float64 log-sum-exps).

    Args:
        outs: ``[S, ..., D]``, any floating dtype: the S partial results.
        lses: ``[S, ...]``, floating: their log-sum-exps (natural logarithm); -inf marks a part that saw no key, whose
            ``outs`` are not looked at.

    Returns:
        out ``[..., D]`` in ``outs``' dtype, and lse ``[...]`` in ``lses``' dtype. Where no part saw a key: zeros and -inf.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, what was expected and what came.
    """
    check_states(outs, lses)
    return reference.merge_attention_states(outs, lses)


def choose_backend(
    q: torch.Tensor,
    shape: AttentionShape,
    backend: str = "auto",
    operands: tuple[torch.Tensor, ...] = (),
) -> tuple[str, str]:
    """The backend that serves a call, and why it cannot (an empty string where it can).

    Args:
        q: the queries.
        shape: sizes of the call.
        backend: "auto" or a name from :data:`BACKENDS`.
        operands: keys and values, packed or dense; packed and well aligned where not given.

    Raises:
        ValueError: ``backend`` is no backend's name.
    """
    if backend == "auto":
        return next((name, "") for name in BACKENDS if not why_not(name, q.device, q.dtype, shape, operands))
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    return backend, why_not(backend, q.device, q.dtype, shape, operands)


def why_not(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: AttentionShape,
    operands: tuple[torch.Tensor, ...] = (),
) -> str:
    """Why ``backend`` cannot serve such a call; empty where it can. Arguments as in :func:`choose_backend`."""
    if backend == "cuda":
        return ops.why_not_cuda(device) or why_not_decode(dtype, shape.head_dim, shape.q_len * shape.group, operands)
    if backend == "triton":
        return ops.why_not_triton(device)
    return ""
