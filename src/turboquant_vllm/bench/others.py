"""Attention of other libraries, where they are installed and serve the call: only what agrees with PyTorch's is offered."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional

__all__ = ["other_attentions"]

# Relative distance from PyTorch's own attention; half precision loses a tenth of that.
_AGREES = 1e-2


def other_attentions(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool) -> dict[str, Callable[[], Any]]:
    """Calls on dense ``q [B, H_q, N_q, D]``, ``k, v [B, H_kv, N_kv, D]``, by the name of the library.

    A library that is not installed, refuses the call or gives another answer than PyTorch is left out. ``is_causal`` is for
    whole prompts alone, since masks of shorter ones are aligned to different corners.
    """
    if not q.is_cuda:
        return {}
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1])
    found: dict[str, Callable[[], Any]] = {}
    for name, (module, make) in _LIBRARIES.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            call = make(importlib.import_module(module), q, k, v, is_causal)
            answer = None if call is None else call()
        except Exception:  # of a library that does not take such a call
            continue
        if call is not None and answer is not None and _distance(answer, expected) < _AGREES:
            found[name] = call
    return found


def _distance(answer: torch.Tensor, expected: torch.Tensor) -> float:
    """Between results ``[B, N_q, H_q, D]``, or without the batch if that is 1, and PyTorch's; infinite for another shape."""
    want = expected.transpose(1, 2)
    if answer.numel() != want.numel():
        return float("inf")
    return float((answer.reshape(want.shape).double() - want.double()).norm() / want.double().norm())


def _flash_attn(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
) -> Callable[[], torch.Tensor] | None:
    states = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return lambda: module.flash_attn_func(*states, causal=is_causal)


def _flashinfer(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool
) -> Callable[[], torch.Tensor] | None:
    """Of one sequence: batches need plans of their own."""
    if q.shape[0] != 1:
        return None
    queries, keys, values = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    if q.shape[2] == 1:
        return lambda: module.single_decode_with_kv_cache(queries[0], keys, values)
    return lambda: module.single_prefill_with_kv_cache(queries, keys, values, causal=is_causal)


_LIBRARIES: dict[str, tuple[str, Callable[..., Callable[[], torch.Tensor] | None]]] = {
    "flash-attn": ("flash_attn", _flash_attn),
    "FlashInfer": ("flashinfer", _flashinfer),
}
