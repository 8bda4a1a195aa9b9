"""Which of this backend's two ways serves an attention call: fused kernels, or slices and PyTorch's dense attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.triton import launch, paged_attention, prefill
from turboquant_vllm.triton.unpack import Packed

__all__ = ["attention", "attention_over_pages"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    k_norms: torch.Tensor | None,
    v: torch.Tensor,
    v_norms: torch.Tensor | None,
    centroids: torch.Tensor | None,
    rotation: torch.Tensor | None,
    sm_scale: float,
    is_causal: bool,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed or dense keys and values; arguments and results as :func:`turboquant_vllm.reference.attention`.

    Arguments must have passed :func:`turboquant_vllm.checks.check_attention`.
    """
    uncut = sliding_window is None and softcap is None and k_norms is not None and v_norms is not None
    many = q.shape[2] * (q.shape[1] // k.shape[1]) >= prefill.MANY_ROWS
    if uncut and many and prefill.serves(q, sm_scale):
        assert k_norms is not None
        assert v_norms is not None
        assert centroids is not None
        assert rotation is not None
        return prefill.attention(q, k, k_norms, v, v_norms, centroids, rotation, sm_scale, is_causal, sinks)
    return launch.attention(q, k, k_norms, v, v_norms, centroids, rotation, sm_scale, is_causal, sliding_window, softcap, sinks)


def attention_over_pages(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_size: int,
    num_kv_heads: int,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    sm_scale: float,
    causal: bool,
    max_query_len: int,
    max_seq_len: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    windows: torch.Tensor | None = None,
    min_rows: int = 1,
    seq_lens_cpu: Sequence[int] | None = None,
    cu_seqlens_q_cpu: Sequence[int] | None = None,
) -> None:
    """Fill ``out`` and ``lse``; arguments as :func:`turboquant_vllm.reference.paged_attention`, and checked.

    Args:
        max_query_len, max_seq_len: no sequence has more query tokens or keys.
        min_rows: leave the sequences with fewer query rows per key/value head to another backend; their rows of ``out`` and
            ``lse`` are not touched.
        seq_lens_cpu, cu_seqlens_q_cpu: what these tensors hold. With them, sequences of many rows go by slices.
    """
    tensors = (q, pages, page_size, num_kv_heads, block_table, seq_lens, cu_seqlens_q, centroids, rotation, sm_scale, causal)
    masks = (sliding_window, softcap, sinks, windows)
    if seq_lens_cpu is None or cu_seqlens_q_cpu is None:
        paged_attention.paged_attention(*tensors, max_query_len, max_seq_len, out, lse, *masks, min_rows)
        return
    group = q.shape[1] // num_kv_heads
    lens = seq_lens_cpu if pages.shape[0] else [0] * len(seq_lens_cpu)
    uncut = sliding_window is None and softcap is None and windows is None and prefill.serves(q, sm_scale)
    sliced: list[tuple[int, int, int, int]] = []
    others: list[int] = []  # rows of the sequences that are left to the fused kernels
    for index, ((first, stop), keys) in enumerate(zip(itertools.pairwise(cu_seqlens_q_cpu), lens, strict=True)):
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
        longest = max(others) // group
        paged_attention.paged_attention(*tensors, longest, max_seq_len, out, lse, *masks, min(others), many)
    if not sliced:
        return
    cache = PagedTQ4Cache(pages, page_size, num_kv_heads, q.shape[2])
    tables = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    views = (cache.k_codes, cache.k_norms, cache.v_codes, cache.v_norms, centroids, rotation)
    for index, first, stop, keys in sliced:
        packed = Packed(*views, tables[index])
        prefill.paged_attention(q, first, stop, packed, keys, sm_scale, causal, out, lse, sinks)
