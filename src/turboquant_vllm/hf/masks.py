"""The mask function of the "tq4" attention: transformers' description of a mask, kept short where it is causal.

transformers describes a mask as a function of query and key positions. Causal, sliding-window and chunked ones are told
apart by what those functions are made of, so none that is not understood can pass for causal: any other is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
from transformers import masking_utils
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from turboquant_vllm.fakes import has_elements
from turboquant_vllm.hf.pages import find_spans
from turboquant_vllm.hf.tensors import CausalMask, additive

__all__ = ["attention_mask"]

# Functions that narrow a causal mask: what they make of it, and their argument.
_OVERLAYS = {"sliding_window_overlay": ("sliding", "sliding_window"), "chunked_overlay": ("chunked", "chunk_size")}


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask for :func:`turboquant_vllm.hf.attention.attention_forward`; arguments as ``eager_mask`` takes them.

    Returns:
        A :class:`CausalMask` for causal and sliding-window attention, and for one query whatever the mask; an additive mask
        ``[B, 1, q_length, kv_length]`` of ``dtype`` for caches of fixed size, for chunked attention longer than a chunk, and
        for any other mask: blocks of images that see one another, packed sequences, functions that a model adds; for
        bidirectional attention that or None. For one query on a cache of fixed size, a
        :class:`turboquant_vllm.hf.pages.SpanMask` where that can be.
    """
    if device is None:
        device = "cpu" if attention_mask is None else attention_mask.device
    device = torch.device(device)
    sizes = {"q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    write = partial(sdpa_mask, batch_size, **sizes, mask_function=mask_function, attention_mask=attention_mask, device=device)
    if mask_function is bidirectional_mask_function:
        mask = write(**{**kwargs, "allow_is_causal_skip": False})
        return None if mask is None else additive(mask, dtype)
    write = partial(write, allow_is_causal_skip=False, **{name: kwargs[name] for name in ("use_vmap",) if name in kwargs})
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_offset + kv_length:
        # A cache of fixed size in use: its keys do not end with the last query.
        mask = write()
        one = q_length == 1 and not torch.compiler.is_compiling() and has_elements(mask)
        spans = find_spans(mask, dtype, windows=mask_function is not causal_mask_function) if one else None
        return additive(mask, dtype) if spans is None else spans
    kind, size = _kind(mask_function)
    if kind == "other" or (size is not None and kind == "chunked" and kv_length + kv_offset > size):
        if q_length > 1:
            return additive(write(), dtype)
        # One query: which keys it sees is all there is to know.
        return CausalMask((batch_size, 1, 1, kv_length), device, _unless_all(write()[:, 0, 0]), None, dtype, write)
    window = size if kind == "sliding" else None
    visible = None if attention_mask is None else _visible(attention_mask, kv_length, kv_offset)
    return CausalMask((batch_size, 1, q_length, kv_length), device, visible, window, dtype, write)


def _visible(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor | None:
    """Bool ``[B, kv_length]``, or None where nothing is padding (finding that out waits for the device)."""
    visible = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    missing = kv_length - visible.shape[1]
    if missing > 0:
        visible = torch.nn.functional.pad(visible, (0, missing))
    return _unless_all(visible)


def _unless_all(visible: torch.Tensor) -> torch.Tensor | None:
    return None if has_elements(visible) and bool(visible.all()) else visible


def _kind(function: Callable[..., Any]) -> tuple[str, int | None]:
    """The pattern of a mask: "causal", "sliding" with its window, "chunked" with its size, or "other"."""
    if function is causal_mask_function:
        return "causal", None
    if _made_by(function, "and_masks"):
        overlay, *others = getclosurevars(function).nonlocals["mask_functions"]
        if others == [causal_mask_function]:
            for name, (kind, size) in _OVERLAYS.items():
                if _made_by(overlay, name):
                    return kind, int(getclosurevars(overlay).nonlocals[size])
    return "other", None


def _made_by(function: Callable[..., Any], maker: str) -> bool:
    """Whether a function was returned by ``transformers.masking_utils.maker``."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return module == masking_utils.__name__ and name.startswith(f"{maker}.<locals>.")
