"""The public function of attention over pages: check, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch

from turboquant_vllm import ops
from turboquant_vllm.attention import BACKENDS
from turboquant_vllm.checks import (
    PagedShape,
    check_count,
    check_flag,
    check_key_scales,
    check_masks,
    check_paged_attention,
    check_paged_contents,
    check_sm_scale,
    check_windows,
)
from turboquant_vllm.codec import TQ4Codec
from turboquant_vllm.environment import checks_contents
from turboquant_vllm.lengths import HostLengths
from turboquant_vllm.limits import most_rows_over_pages, why_not_decode_pages
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.pieces import NativeCall, cut_sequences, native_calls, rows_left
from turboquant_vllm.records import Sequences
from turboquant_vllm.store import check_store, tq4_store
from turboquant_vllm.store import why_not_backend as why_not_store_by

__all__ = ["choose_paged_backend", "tq4_paged_attention", "why_not_paged"]

PAGED_BACKENDS = ("cuda", "triton", "reference")  # in the order of "auto"


@overload
def tq4_paged_attention(
    q: torch.Tensor,
    cache: PagedTQ4Cache,
    codec: TQ4Codec,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    sliding_window: int | torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    seq_lens_cpu: Sequence[int] | torch.Tensor | None = None,
    cu_seqlens_q_cpu: Sequence[int] | torch.Tensor | None = None,
    backend: str = "auto",
    out: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    previous_slots: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
def tq4_paged_attention(
    q: torch.Tensor,
    cache: PagedTQ4Cache,
    codec: TQ4Codec,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    sliding_window: int | torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[True],
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    seq_lens_cpu: Sequence[int] | torch.Tensor | None = None,
    cu_seqlens_q_cpu: Sequence[int] | torch.Tensor | None = None,
    backend: str = "auto",
    out: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    previous_slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def tq4_paged_attention(
    q: torch.Tensor,
    cache: PagedTQ4Cache,
    codec: TQ4Codec,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    sliding_window: int | torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    seq_lens_cpu: Sequence[int] | torch.Tensor | None = None,
    cu_seqlens_q_cpu: Sequence[int] | torch.Tensor | None = None,
    backend: str = "auto",
    out: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    previous_slots: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch of sequences over a paged cache: decode, prefill, continued prefixes, verification, in any order.

    The new tokens' keys and values are in the cache already, or are given and stored first. Nothing waits for the GPU, and
    grids follow from shapes and from ``max_query_len`` and ``max_seq_len`` alone: a CUDA graph may be replayed with other
    contents within these bounds. With ``seq_lens_cpu`` and ``cu_seqlens_q_cpu`` the work follows from these: long prompts are
    faster, and a graph may be replayed with these lengths only.

    Args:
        q: ``[T, H_q, D]``, fp16, bf16 or fp32, any strides: the query tokens of all sequences one after the other.
        cache: pages of D-dimensional vectors for H_kv heads, written with ``codec``; H_q a multiple of H_kv.
        codec: gives the rotation and the levels; on q's device.
        block_table: int32 ``[S, max_pages]``; token t of sequence s is in page ``block_table[s, t // page_size]``.
        seq_lens: int32 ``[S]``, keys of each sequence, its query tokens among them.
        cu_seqlens_q: int32 ``[S + 1]``, ascending from 0 to at most T; sequence s has the query tokens
            ``cu_seqlens_q[s] .. cu_seqlens_q[s + 1]``, none if these are equal.
        causal: query i of ``q_len`` sees keys ``0 .. seq_len - q_len + i`` of its sequence.
        sm_scale, sliding_window, softcap, sinks: as in :func:`turboquant_vllm.tq4_attention`; ``sliding_window`` may also be
            int32 ``[S]``, not negative: one for each sequence, which hides what comes first in some of them, such as padding.
        return_lse: also return the log-sum-exp.
        max_query_len: no sequence has more query tokens; None means T.
        max_seq_len: no sequence has more keys; None means ``max_pages * page_size``. The closer these two, the less is
            launched in vain.
        seq_lens_cpu, cu_seqlens_q_cpu: what ``seq_lens`` and ``cu_seqlens_q`` hold, for the host: int32 tensors on the CPU or
            ints (ints where torch.compile follows), both or neither. They imply both bounds. For a sequence of at most 256
            query rows (tokens x heads of a group) ``seq_lens_cpu`` may be more than the truth.
        backend: "auto", "cuda", "triton" or "reference"; a named backend that cannot run raises and never falls back.
        out: where the result goes, ``[T, H_q, D]`` in q's dtype, any strides.
        k, v, slot_mapping, previous_slots: as for :func:`turboquant_vllm.tq4_store`, which is called with them first. Where
            the native kernels do both, attention begins while the store runs: a step costs two launches, or four or five that
            overlap.

    Returns:
        ``[T, H_q, D]`` in q's dtype, ``out`` if that was given; with ``return_lse`` also float32 ``[T, H_q]``, natural
        logarithm. A query that sees no key gives zeros, and its sink or -inf. Rows from ``cu_seqlens_q[-1]`` on hold anything.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, what was expected and what came.
        RuntimeError: the named backend cannot run here.

    The contents of ``block_table``, ``seq_lens`` and ``cu_seqlens_q`` are looked at only where the environment variable
    ``TURBOQUANT_DEBUG`` is 1 or true, which waits for the GPU: then an entry out of range raises ValueError. Otherwise such an
    entry is taken for the nearest that is in range, so the result is of no use but nothing outside the tensors is read or
    written.
    """
    if not isinstance(cache, PagedTQ4Cache):
        raise TypeError(f"cache must be a PagedTQ4Cache, got {type(cache).__name__}")
    if not isinstance(codec, TQ4Codec):
        raise TypeError(f"codec must be a TQ4Codec, got {type(codec).__name__}")
    if codec.head_dim != cache.head_dim:
        raise ValueError(f"codec must have the cache's head_dim {cache.head_dim}, got {codec.head_dim}")
    shape = check_paged_attention(
        q, cache.page_size, cache.num_kv_heads, cache.head_dim, cache.device, block_table, seq_lens, cu_seqlens_q, out
    )
    if codec.device != q.device:
        raise ValueError(f"codec must be on {q.device} like q, got {codec.device}")
    tables, offsets = codec.tables, {}
    if cache.has_offsets:
        check_key_scales(codec.key_scales, shape.num_kv_heads, shape.head_dim)
        tables, offsets = codec.key_tables, {"has_offsets": True, "key_scales": codec.key_scales}
    scale = check_sm_scale(sm_scale, shape.head_dim)
    check_flag("return_lse", return_lse)
    one_window = None if isinstance(sliding_window, torch.Tensor) else sliding_window
    masks = check_masks(causal, one_window, softcap, sinks, shape.num_heads, q.device, causal_name="causal")
    if isinstance(sliding_window, torch.Tensor):
        masks["windows"] = check_windows(sliding_window, causal, shape.num_seqs, q.device)
    lengths = HostLengths.check(seq_lens_cpu, cu_seqlens_q_cpu, shape)
    bounds = []
    for name, bound, limit in (
        ("max_query_len", max_query_len, shape.total_tokens),
        ("max_seq_len", max_seq_len, shape.max_pages * shape.page_size),
    ):
        if bound is not None:
            check_count(name, bound, 0)
        bounds.append(limit if bound is None else min(bound, limit))
    if not torch.compiler.is_compiling() and checks_contents():
        check_paged_contents(shape, cache.num_pages, block_table, seq_lens, cu_seqlens_q, *bounds)
        if lengths is not None:
            lengths.check_contents(seq_lens, cu_seqlens_q, shape.group)
    if lengths is not None:
        bounds = [max(lengths.query_lens, default=0), max(lengths.seq_lens, default=0)]
    name, reason = choose_paged_backend(q, shape, backend, bounds[0])
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    calls = list(native_calls(shape, bounds[0], lengths)) if name == "cuda" else []
    stored = _store_first(cache, codec, calls, k=k, v=v, slot_mapping=slot_mapping, previous_slots=previous_slots)

    host = (None, None) if lengths is None else (lengths.seq_lens, lengths.cu_seqlens_q)
    sequences = Sequences(block_table, seq_lens, cu_seqlens_q, bounds[0], bounds[1], *host)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    pages, how = (cache.buffer, cache.page_size, cache.num_kv_heads), (*tables[:2], scale, causal)
    if name == "reference":
        torch.ops.turboquant.reference_paged(q, *pages, *sequences[:3], *how, *bounds, out, lse, **masks, **offsets)
    else:
        least = 1  # rows of a sequence that is Triton's
        if name == "cuda":
            least, native = rows_left(shape, bounds[0], lengths), {**offsets, "hadamard": codec.rotation_kind == "hadamard"}
            for call in calls:
                some = slice(call.first, call.stop)
                where = (block_table[some], seq_lens[some], cu_seqlens_q[call.first : call.stop + 1])
                windows = masks.get("windows")
                own = masks if windows is None else {**masks, "windows": windows[some].repeat_interleave(call.pieces)}
                if call.pieces > 1:
                    where = cut_sequences(*where, call.tokens, call.pieces, causal, cache.page_size)
                arguments = (q, *pages, *where, *how, call.tokens, bounds[1], out, lse)
                if stored and call is calls[0]:
                    torch.ops.turboquant.cuda_store_paged(*arguments, **own, **offsets, **stored)
                else:
                    torch.ops.turboquant.cuda_paged(*arguments, **own, **native)
        if bounds[0] * shape.group >= least:
            more = {"min_rows": least, "seq_lens_cpu": host[0], "cu_seqlens_q_cpu": host[1]}
            torch.ops.turboquant.triton_paged(q, *pages, *sequences[:3], *how, *bounds, out, lse, **masks, **offsets, **more)
    return (out, lse) if return_lse else out


def _store_first(
    cache: PagedTQ4Cache, codec: TQ4Codec, calls: Sequence[NativeCall], **new: torch.Tensor | None
) -> dict[str, object]:
    """Store a step's own keys and values, if there are any; or what the first of ``calls`` takes in order to do it."""
    k, v, slot_mapping, previous_slots = (new[name] for name in ("k", "v", "slot_mapping", "previous_slots"))
    if k is None or v is None or slot_mapping is None:
        if given := ", ".join(name for name, x in new.items() if x is not None):
            raise ValueError(f"k, v and slot_mapping must come together, got {given} alone")
        return {}
    check_store(k, v, cache, codec, slot_mapping, previous_slots)
    if not calls or calls[0].pieces > 1 or k.numel() == 0 or why_not_store_by("cuda", k, v, cache, codec):
        tq4_store(k, v, cache, codec, slot_mapping, previous_slots=previous_slots)
        return {}
    return {**new, "companding": codec.companding, "scale": codec.scale}


def choose_paged_backend(q: torch.Tensor, shape: PagedShape, backend: str = "auto", max_query_len: int = 1) -> tuple[str, str]:
    """The backend that serves a call over pages, and why it cannot (an empty string where it can).

    Args:
        q: the queries.
        shape: sizes of the call.
        backend: "auto" or a name from :data:`turboquant_vllm.attention.BACKENDS`.
        max_query_len: no sequence has more query tokens.

    Raises:
        ValueError: ``backend`` is no backend's name.
    """
    call = (q.device, q.dtype, shape, max_query_len)
    if backend == "auto":
        return next((name, "") for name in PAGED_BACKENDS if not why_not_paged(name, *call))
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *BACKENDS)}, got {backend!r}")
    return backend, why_not_paged(backend, *call)


def why_not_paged(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: PagedShape,
    max_query_len: int = 1,
) -> str:
    """Why ``backend`` cannot serve such a call over pages; empty where it can. Arguments as in :func:`choose_paged_backend`.

    "cuda" serves the sequences of few query rows itself and leaves the others to Triton.
    """
    if backend == "cuda":
        if reason := ops.why_not_cuda(device):
            return reason
        if reason := why_not_decode_pages(dtype, shape.head_dim, shape.group, shape.num_seqs):
            return reason
        if max_query_len * shape.group <= most_rows_over_pages(shape.head_dim):
            return ""
        backend = "triton"
    if backend == "triton":
        return ops.why_not_triton(device)
    return ""
