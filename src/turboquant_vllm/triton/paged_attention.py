"""Paged attention: how one call over a mixed batch becomes a few kernel launches, whatever the batch holds.

Every grid follows from sizes that are known on the host, so nothing waits for the GPU, and a captured graph can be replayed
with other contents and lengths.
"""

from __future__ import annotations

import torch
import triton

from turboquant_vllm.checks import DECODE_MAX_ROWS
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.records import Masks, Sequences, Tables
from turboquant_vllm.reference_keys import rotate_queries
from turboquant_vllm.triton.config import (
    LOG2_E,
    MIN_SPLIT,
    SPLITS,
    WIDE,
    WIDEST,
    Config,
    choose_config,
    choose_parts,
    device_guard,
    padded,
    uses_prmt,
)
from turboquant_vllm.triton.kernels import query_kernel
from turboquant_vllm.triton.paged_kernels import paged_attention_kernel, paged_merge_kernel

__all__ = ["paged_attention"]


def paged_attention(
    q: torch.Tensor,
    cache: PagedTQ4Cache,
    sequences: Sequences,
    tables: Tables,
    sm_scale: float,
    masks: Masks,
    out: torch.Tensor,
    lse: torch.Tensor,
    min_rows: int = 1,
    many: tuple[int, int] | None = None,
) -> None:
    """Fill ``out`` and ``lse``; arguments as :func:`turboquant_vllm.reference.paged_attention`, and checked.

    Args:
        sequences, tables: contiguous.
        min_rows: leave the sequences with fewer query rows per key/value head to others; their rows of ``out`` and ``lse`` are
            not touched.
        many: leave those with at least so many rows and so many pairs of a row and a key to others.
    """
    pages, page_size, num_kv_heads = cache.buffer, cache.page_size, cache.num_kv_heads
    block_table, seq_lens, cu_seqlens_q, max_query_len, max_seq_len, *_ = sequences
    centroids, rotation, key_scales = tables
    assert rotation is not None
    total_tokens, num_heads, head_dim = q.shape
    num_seqs, max_pages = block_table.shape
    group = num_heads // num_kv_heads
    max_rows = min(max_query_len, total_tokens) * group
    many_rows, many_pairs = (max_rows + 1, 0) if many is None else many
    if out.numel() == 0 or num_seqs == 0 or max_rows == 0:
        return
    max_keys = min(max_seq_len, max_pages * page_size) if pages.shape[0] else 0
    causal, sliding_window, softcap, sinks, windows = masks
    sinks = None if sinks is None else sinks.contiguous()
    one_window = None if sliding_window is None else min(sliding_window, WIDEST)
    window = one_window if windows is None else windows.contiguous()
    cap = None if softcap is None else softcap * LOG2_E
    nvidia = uses_prmt(q.device.type)
    # As in dense attention, float32 queries and results are rotated in float64 by PyTorch.
    exact = q.dtype == torch.float32
    if exact:
        q = rotate_queries(q.transpose(0, 1)[None].double(), num_kv_heads, tables)[0].transpose(0, 1).float()
    rotated = torch.empty_like(out) if exact else out

    few_rows = min(max_rows, DECODE_MAX_ROWS)
    few = choose_config(few_rows if few_rows <= 16 else min(group, 16), head_dim, q.dtype.itemsize, True, nvidia)
    # One order of coordinates for all rows, that of the elements in which codes are read where rows are few.
    order = choose_parts(head_dim, (4, 2))
    rows = total_tokens * group
    queries = torch.empty((num_kv_heads, rows, head_dim), dtype=q.dtype, device=q.device)
    query_scale = torch.empty((num_kv_heads, rows), dtype=torch.float32, device=q.device)
    width = max(16, triton.next_power_of_2(head_dim))
    # The size of a chunk decides the order of a sum, so it may not depend on the batch.
    rotate = {
        "D": head_dim,
        "DP": width,
        "PARTS": order,
        "ROTATE": not exact,
        "CHUNK": min(32 if head_dim <= WIDE else 16, width),
        "HALF": nvidia and not exact,
    }

    def attend(config: Config, is_few: bool) -> None:
        """Serve the sequences of one kind: attend, merge the splits, rotate back."""
        tiles = triton.cdiv(few_rows, config.block_m) if is_few else 1
        count = num_seqs * tiles if is_few else rows // config.block_m + num_seqs
        splits, row_step, slots = 1, 0, rows
        if is_few:
            span = max_keys if sliding_window is None else min(max_keys, sliding_window + few_rows + 64)
            splits = max(1, min(SPLITS, triton.cdiv(span, MIN_SPLIT)))
            if num_seqs * few_rows < rows:
                row_step, slots = few_rows, num_seqs * few_rows
        partial = torch.empty((splits, num_kv_heads, slots, head_dim), dtype=torch.float32, device=q.device)
        partial_lse = torch.empty((splits, num_kv_heads, slots), dtype=torch.float32, device=q.device)
        kind = {"FEW": is_few, "SPLITS": SPLITS if is_few else 1, "MIN_SPLIT": MIN_SPLIT}
        least, most = (min_rows, few_rows) if is_few else (max(min_rows, DECODE_MAX_ROWS + 1), max_rows)
        served = (least, most, many_rows, many_pairs)
        parts = order if config.swap or exact else 2
        paged_attention_kernel[(count, num_kv_heads, splits)](
            queries, query_scale, pages.view(torch.int16 if parts == 4 else torch.uint8), pages.view(torch.float32), centroids,
            block_table, seq_lens, cu_seqlens_q, partial, partial_lse, total_tokens, num_seqs, pages.shape[0], max_keys,
            pages.stride(0) // 16, block_table.stride(0), slots, row_step, tiles, *served, window, cap, group, num_kv_heads,
            D=head_dim, PAGE=page_size, OFFSETS=cache.has_offsets, Q_PARTS=order, PARTS=parts, DP=padded(head_dim, parts),
            CAUSAL=causal, SWAP=config.swap, BM=config.block_m, BN=config.block_n, STAGES=config.num_stages,
            PRMT=nvidia and not exact, num_warps=config.num_warps, **kind,
        )  # fmt: skip
        block = 16 if is_few or head_dim > WIDE else 64
        tiles = triton.cdiv(few_rows, block) if is_few else 1
        count = num_seqs * tiles if is_few else rows // block + num_seqs
        paged_merge_kernel[(count, num_kv_heads)](
            partial, partial_lse, sinks, rotation, seq_lens, cu_seqlens_q, rotated, lse, total_tokens, num_seqs, max_keys,
            slots, row_step, tiles, *served, window, group, num_kv_heads, *rotated.stride(), *lse.stride(), BM=block,
            UNROLL=4 if is_few else 1, num_warps=4 if is_few and head_dim <= 128 else 8, **kind, **rotate,
        )  # fmt: skip

    with device_guard(q.device):
        block = 16 if rows <= 64 or head_dim > WIDE else 64
        query_kernel[(num_kv_heads * triton.cdiv(rows, block),)](
            q, rotation, key_scales, queries, query_scale, rows, group, num_kv_heads, sm_scale * LOG2_E, 0, q.stride(1),
            q.stride(0), q.stride(2), BM=block, num_warps=4 if block == 16 and head_dim <= 128 else 8, **rotate,
        )  # fmt: skip
        if min_rows <= DECODE_MAX_ROWS:
            attend(few, True)
        if max_rows > DECODE_MAX_ROWS:
            attend(choose_config(2 * DECODE_MAX_ROWS, head_dim, q.dtype.itemsize, True, nvidia), False)
    if exact:
        out.copy_(rotated.double() @ rotation.double())
