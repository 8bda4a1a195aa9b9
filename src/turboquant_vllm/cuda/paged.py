"""The native decode over pages: attention of sequences with few query rows, in three launches.

The kernels are those of :mod:`turboquant_vllm.cuda.decode`, compiled with PAGED: one rotates the queries of all sequences
before, and the line of work is planned on the device from the sequences' lengths, so that a CUDA graph may be replayed with
others.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from turboquant_vllm.cuda.decode import DIVISOR, HEADS, Variant, choose_variant, device_limits, divisor, source
from turboquant_vllm.cuda.runtime import Kernel, launch, load_kernel

__all__ = ["PAGED_COMBINE_PARAMS", "PAGED_PARAMS", "decode_pages"]

PAGED_PARAMS = "P" * 9 + "q" * 16 + "P" * 6 + "q" + "i" * 5 + DIVISOR + HEADS + "i" * 6 + "f"
PAGED_COMBINE_PARAMS = "P" * 7 + "q" * 2 + "i" * 3 + HEADS + DIVISOR + "i" * 5


@cache
def _kernels(index: int, variant: Variant) -> tuple[Kernel, Kernel, Kernel]:
    defines = {**variant.defines, "PAGED": 1}
    params = {"tq4_rotate": PAGED_PARAMS, "tq4_decode": PAGED_PARAMS, "tq4_combine": PAGED_COMBINE_PARAMS}
    first, second, third = (
        load_kernel(source(), name, device=index, params=codes, defines=defines) for name, codes in params.items()
    )
    return first, second, third


def decode_pages(
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
) -> None:
    """Fill the rows of ``out`` and ``lse`` of sequences with at most 32 query rows per key/value head; leave the others alone.

    Args as in :func:`turboquant_vllm.tq4_paged_attention`, which has checked them: q fp16 or bf16 ``[T, H_q, D]``, D 64, 128 or
    256 (at D 256 no sequence may have 17 to 32 rows), out like q, lse float32 ``[T, H_q]`` contiguous.
    """
    tokens, num_heads, head_dim = q.shape
    sequences, max_pages = block_table.shape
    group = num_heads // num_kv_heads
    if tokens == 0 or sequences == 0:
        return
    index = q.get_device()
    multiprocessors, shared_limit = device_limits(index)
    rows = min(max(min(max_query_len, tokens), 1) * group, 32)
    variant = choose_variant(head_dim, rows, shared_limit)
    rotate, attend, combine = _kernels(index, variant)
    heads = sequences * num_kv_heads
    line = 12 * sequences
    shared = variant.shared_bytes_without_query + line
    if shared > shared_limit:
        raise ValueError(f"block_table must have at most {(shared_limit - shared + line) // 12} sequences, got {sequences}")

    room = max_pages * page_size if pages.shape[0] else 0
    tiles = heads * -(-min(max_seq_len, room) // 16)
    blocks = max(1, min(multiprocessors, tiles))
    active = max(1, min(variant.warps, -(-tiles // blocks)))
    workers, slots = blocks * active, heads + blocks * active
    parts = torch.empty((slots, 4 * variant.row_tiles, head_dim), dtype=torch.float32, device=q.device)
    parts_lse = torch.empty((slots, 4 * variant.row_tiles), dtype=torch.float32, device=q.device)
    fragments = torch.empty((heads, variant.fragment_bytes), dtype=torch.uint8, device=q.device)
    row_scales = torch.empty((heads, 4 * variant.row_tiles), dtype=torch.float32, device=q.device)
    plan = torch.empty(3 * sequences, dtype=torch.int32, device=q.device)
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    seq_lens, cu_seqlens_q = seq_lens.contiguous(), cu_seqlens_q.contiguous()
    result = out if out.stride(2) == 1 and not (out.stride(0) | out.stride(1)) % 2 else torch.empty_like(q)
    codes = pages.data_ptr()
    values, norms = codes + page_size * head_dim // 2, codes + page_size * head_dim
    chunk = page_size * (head_dim + 8)
    layout = (num_kv_heads, group, rows, 1, *divisor(num_kv_heads), *divisor(group), *divisor(1))
    bf16 = int(q.dtype == torch.bfloat16)
    args = (
        q.data_ptr(), codes, norms, values, norms + 4 * page_size, centroids.data_ptr(), rotation.data_ptr(),
        parts.data_ptr(), parts_lse.data_ptr(), 0, q.stride(1), q.stride(0), q.stride(2), pages.stride(0), chunk,
        head_dim // 2, 0, 0, 1, pages.stride(0), chunk, head_dim // 2, 0, 0, 1, block_table.data_ptr(), seq_lens.data_ptr(),
        cu_seqlens_q.data_ptr(), fragments.data_ptr(), row_scales.data_ptr(), plan.data_ptr(), block_table.stride(0),
        sequences, tokens, pages.shape[0], page_size // 16, room, *divisor(page_size // 16), *layout, active, 0, 0,
        int(causal), bf16, 0, sm_scale / math.log(2),
    )  # fmt: skip
    threads, block = 256 if head_dim == 64 else 512, (32 * variant.warps, 1, 1)
    at_once = 1
    while at_once < 4 * threads // head_dim and at_once * multiprocessors < heads * rows:
        at_once *= 2
    combine_args = (
        parts.data_ptr(), parts_lse.data_ptr(), rotation.data_ptr(), result.data_ptr(), lse.data_ptr(), plan.data_ptr(),
        cu_seqlens_q.data_ptr(), result.stride(0), result.stride(1), sequences, tokens, workers, *layout, *divisor(rows),
        heads * rows, num_heads, at_once, bf16, 0,
    )  # fmt: skip
    launch(rotate, (-(-heads // variant.passes_rotated), 1, 1), block, variant.rotated_bytes, None, args)
    launch(attend, (blocks, 1, 1), block, shared, None, args, pdl=True)
    launch(combine, (-(-heads * rows // at_once), 1, 1), (threads, 1, 1), 0, None, combine_args, pdl=True)
    if result is not out:
        out.copy_(result)
