"""The public store function: check, choose a backend, compress keys and values into their slots."""

from __future__ import annotations

import torch

from turboquant_vllm import ops
from turboquant_vllm.checks import QUERY_DTYPES, SLOT_DTYPES, check_device, check_dtype, check_key_scales, check_shape
from turboquant_vllm.codec import TQ4Codec
from turboquant_vllm.limits import why_not_store, why_not_store_triton
from turboquant_vllm.paged import PagedTQ4Cache

__all__ = ["check_store", "tq4_store", "why_not_backend"]

BACKENDS = ("cuda", "triton", "reference")  # in the order of "auto"


def tq4_store(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedTQ4Cache,
    codec: TQ4Codec,
    slot_mapping: torch.Tensor,
    *,
    previous_slots: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Compress new keys and values straight into the slots of a paged cache, in one launch.

    Nothing is allocated or waited for, and a CUDA graph can capture it once a call of the same kind has run: the backends
    "cuda" and "triton" compile at first use. (Where a rotation takes more shared memory than the GPU has, as Haar's does at
    head_dim 192, "triton" compresses into memory of its own first, in several launches, unless the scale is "norm".)

    Args:
        k, v: ``[tokens, num_kv_heads, head_dim]``, fp16, bf16 or fp32, both of one dtype, any strides.
        cache: what is written to; bytes of other slots are left alone.
        codec: of the cache's head_dim, on its device.
        slot_mapping: int32 or int64 ``[tokens]``, ``page * page_size + place``. A token whose slot is not in the cache is left
            out: -1 marks padding. No two tokens may have the same slot: what it holds then may be a part of each.
        previous_slots: where the cache has offsets, int32 or int64 ``[tokens]``: the slot of the token before each in its
            sequence, negative where there is none. A key that begins a group is coded around the mean of the group before; None
            finds that in the same page alone. Tokens of one group of 64 must stand one behind the other, in the order of their
            slots, and a group's first token be written before its others; tokens that are left out may stand anywhere. A call
            that begins a group has of the group before nothing, or all from some place on; the offset is not defined else.
        backend: "cuda" (randomized Hadamard, head_dim 64, 128 or 256, fp16 and bf16), "triton", "reference", or "auto", the
            first of these that can serve the call. "reference" waits for the GPU.

    Codes and norms are those of :meth:`TQ4Codec.compress`, but for coordinates within rounding of a boundary. A vector
    with a NaN or Inf gets norm NaN.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, what was expected and what came.
        RuntimeError: ``backend`` cannot serve the call; says why.
    """
    check_store(k, v, cache, codec, slot_mapping, previous_slots)
    if backend == "auto":
        backend = next(name for name in BACKENDS if not why_not_backend(name, k, v, cache, codec))
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    elif reason := why_not_backend(backend, k, v, cache, codec):
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    offsets = (True, codec.key_scales, previous_slots) if cache.has_offsets else ()
    torch.ops.turboquant.store(k, v, cache.buffer, slot_mapping, *codec.writing, cache.page_size, backend, *offsets)


def check_store(
    k: torch.Tensor,
    v: torch.Tensor,
    cache: PagedTQ4Cache,
    codec: TQ4Codec,
    slot_mapping: torch.Tensor,
    previous_slots: torch.Tensor | None = None,
) -> None:
    """TypeError or ValueError unless these are the arguments of :func:`tq4_store`."""
    if not isinstance(cache, PagedTQ4Cache):
        raise TypeError(f"cache must be a PagedTQ4Cache, got {type(cache).__name__}")
    if not isinstance(codec, TQ4Codec):
        raise TypeError(f"codec must be a TQ4Codec, got {type(codec).__name__}")
    if codec.head_dim != cache.head_dim:
        raise ValueError(f"codec must have the cache's head_dim {cache.head_dim}, got {codec.head_dim}")
    check_dtype("k", k, QUERY_DTYPES)
    check_dtype("v", v, (k.dtype,))
    check_shape("k", k, ("tokens", cache.num_kv_heads, cache.head_dim))
    check_shape("v", v, tuple(k.shape))
    check_dtype("slot_mapping", slot_mapping, SLOT_DTYPES)
    check_shape("slot_mapping", slot_mapping, (k.shape[0],))
    if previous_slots is not None:
        check_dtype("previous_slots", previous_slots, SLOT_DTYPES)
        check_shape("previous_slots", previous_slots, (k.shape[0],))
        check_device("previous_slots", previous_slots, cache.device, "the cache")
    if cache.has_offsets:
        check_key_scales(codec.key_scales, cache.num_kv_heads, cache.head_dim)
    for name, device in (("k", k.device), ("v", v.device), ("slot_mapping", slot_mapping.device), ("codec", codec.device)):
        if device != cache.device:
            raise ValueError(f"{name} must be on the cache's device {cache.device}, got {device}")


def why_not_backend(backend: str, k: torch.Tensor, v: torch.Tensor, cache: PagedTQ4Cache, codec: TQ4Codec) -> str:
    """Why ``backend`` cannot serve such a call of :func:`tq4_store`; empty where it can."""
    if backend == "cuda":
        return ops.why_not_cuda(k.device) or why_not_store(k, v, codec.rotation_kind == "hadamard", cache.num_slots)
    if backend == "triton":
        return ops.why_not_triton(k.device) or why_not_store_triton(k.device, k.shape[-1], cache.has_offsets)
    return ""
