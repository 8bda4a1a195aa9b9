"""Which of this backend's two ways serves an attention call: fused kernels, or slices and PyTorch's dense attention."""

from __future__ import annotations

import itertools

import torch

from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.records import NO_MASKS, Masks, Operand, Sequences, Tables
from turboquant_vllm.triton import launch, paged_attention, prefill
from turboquant_vllm.triton.unpack import Packed

__all__ = ["attention", "attention_over_pages"]


def attention(
    q: torch.Tensor, k: Operand, v: Operand, tables: Tables, sm_scale: float, masks: Masks = NO_MASKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed or dense keys and values; arguments and results as :func:`turboquant_vllm.reference.attention`.

    Arguments must have passed :func:`turboquant_vllm.checks.check_attention`.
    """
    uncut = masks.hides_nothing and k.is_packed and v.is_packed
    many = q.shape[2] * (q.shape[1] // k.data.shape[1]) >= prefill.MANY_ROWS
    serve = prefill if uncut and many and prefill.serves(q, sm_scale) else launch
    return serve.attention(q, k, v, tables.contiguous(), sm_scale, masks)


def attention_over_pages(
    q: torch.Tensor,
    cache: PagedTQ4Cache,
    sequences: Sequences,
    tables: Tables,
    sm_scale: float,
    masks: Masks,
    out: torch.Tensor,
    lse: torch.Tensor,
    min_rows: int = 1,
) -> None:
    """Fill ``out`` and ``lse``; arguments as :func:`turboquant_vllm.reference.paged_attention`, and checked.

    Args:
        sequences: with lengths that the host knows, sequences of many rows go by slices.
        min_rows: leave the sequences with fewer query rows per key/value head to another backend; their rows of ``out`` and
            ``lse`` are not touched.
    """
    tables, sequences = tables.contiguous(), sequences.contiguous()
    if sequences.seq_lens_cpu is None or sequences.cu_seqlens_q_cpu is None:
        paged_attention.paged_attention(q, cache, sequences, tables, sm_scale, masks, out, lse, min_rows)
        return
    group = q.shape[1] // cache.num_kv_heads
    lens = sequences.seq_lens_cpu if cache.num_pages else [0] * len(sequences.seq_lens_cpu)
    uncut = masks.hides_nothing and prefill.serves(q, sm_scale)
    sliced: list[tuple[int, int, int, int]] = []
    others: list[int] = []  # rows of the sequences that are left to the fused kernels
    for index, ((first, stop), keys) in enumerate(zip(itertools.pairwise(sequences.cu_seqlens_q_cpu), lens, strict=True)):
        rows = (stop - first) * group
        if rows < min_rows:
            continue
        if uncut and rows >= prefill.MANY_ROWS and rows * keys >= prefill.MANY_PAIRS:
            sliced.append((index, first, stop, keys))
        else:
            others.append(rows)
    # A few launches for all others come first: they run while those of the slices are prepared.
    if others:
        many = (prefill.MANY_ROWS, prefill.MANY_PAIRS) if uncut else None
        those = sequences._replace(max_query_len=max(others) // group)
        paged_attention.paged_attention(q, cache, those, tables, sm_scale, masks, out, lse, min(others), many)
    for index, first, stop, keys in sliced:
        packed = Packed(cache.keys, cache.values, tables, sequences.block_table[index])
        prefill.paged_attention(q, first, stop, packed, keys, sm_scale, masks, out, lse)
