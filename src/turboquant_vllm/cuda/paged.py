"""The native decode over pages: attention of sequences with few query rows, in one launch, three or four.

The kernels are those of :mod:`turboquant_vllm.cuda.decode`, compiled with PAGED. Of three, one rotates the queries of all
sequences before, and the line of work is planned on the device from the sequences' lengths, so that a CUDA graph may be
replayed with others. Where lengths decide whether clusters serve (:class:`turboquant_vllm.cuda.variants.Even`), all four are
launched, the three first: then what they cost for nothing is in the shadow of a step's store.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from turboquant_vllm.cuda import cluster
from turboquant_vllm.cuda.decode import mask_args
from turboquant_vllm.cuda.runtime import Kernel, aligned, launch, load_kernel
from turboquant_vllm.cuda.sources import params_of, source
from turboquant_vllm.cuda.store import New
from turboquant_vllm.cuda.variants import (
    ALWAYS,
    COMBINE_THREADS,
    NEVER,
    Variant,
    choose_variant,
    device_limits,
    divisor,
    rows_at_once,
)
from turboquant_vllm.paged import PagedTQ4Cache, chunk_bytes
from turboquant_vllm.records import GROUP, Masks, Sequences, Tables

__all__ = ["Call", "decode_pages", "store_and_decode_pages"]


@cache
def _kernels(index: int, variant: Variant) -> tuple[Kernel, Kernel, Kernel]:
    defines, params = {**variant.defines, "PAGED": 1}, params_of(variant, True)
    first, second, third = (
        load_kernel(source(), name, device=index, params=codes, defines=defines) for name, codes in params.items()
    )
    return first, second, third


@dataclass(frozen=True)
class Call:
    """What of a call follows from its sizes alone; the layers of a model share it.

    Attributes:
        kernels: the three that are launched.
        grids: blocks of each.
        blocks: threads of each block.
        shared_bytes: dynamic shared memory of each block.
        places: where the workspace holds results of parts, rotated queries, row scales, the line of work.
        workspace_bytes: of the workspace.
        attend, combine: the numbers that the last two kernels take behind what is known of single sequences.
        workers: warps that share the keys.
    """

    kernels: tuple[Kernel, Kernel, Kernel]
    grids: tuple[int, int, int]
    blocks: tuple[int, int, int]
    shared_bytes: tuple[int, int, int]
    places: tuple[int, ...]
    workspace_bytes: int
    attend: tuple[int, ...]
    combine: tuple[int, ...]
    workers: int

    @classmethod
    @lru_cache(maxsize=1024)
    def plan(
        cls,
        index: int,
        sequences: int,
        num_heads: int,
        num_kv_heads: int,
        rows: int,
        kv_len: int,
        head_dim: int,
        masked: bool = False,
        offsets: bool = False,
        hadamard: bool = False,
    ) -> Call:
        """For ``rows`` query rows and ``kv_len`` keys at most per sequence and key/value head, on device ``index``."""
        group, heads = num_heads // num_kv_heads, sequences * num_kv_heads
        multiprocessors, shared_limit = device_limits(index)
        variant = choose_variant(head_dim, rows, shared_limit, masked, offsets, hadamard)
        line = 12 * sequences
        shared = variant.shared_bytes_without_query + line
        if shared > shared_limit:
            raise ValueError(f"block_table must have at most {(shared_limit - shared + line) // 12} sequences, got {sequences}")
        tiles = heads * -(-kv_len // 16)
        blocks = max(1, min(multiprocessors, tiles))
        active = max(1, min(variant.warps, -(-tiles // blocks)))
        part_rows, query_rows = (heads + blocks * active) * 4 * variant.row_tiles, heads * 4 * variant.row_tiles
        sizes = (4 * (head_dim + 4) * part_rows, heads * variant.fragment_bytes, 4 * query_rows, line)
        *places, workspace_bytes = itertools.accumulate((-(-size // 16) * 16 for size in sizes), initial=0)
        at_once = rows_at_once(head_dim, heads * rows, multiprocessors)
        layout = (num_kv_heads, group, rows, 1, *divisor(num_kv_heads), *divisor(group), *divisor(1))
        threads = 32 * variant.warps
        return cls(
            kernels=_kernels(index, variant),
            grids=(-(-heads // variant.passes_rotated), blocks, -(-heads * rows // at_once)),
            blocks=(threads, threads, COMBINE_THREADS[head_dim]),
            shared_bytes=(variant.rotated_bytes, shared, 0),
            places=tuple(places),
            workspace_bytes=workspace_bytes,
            attend=(*layout, active),
            combine=(*layout, *divisor(rows), heads * rows, num_heads, at_once),
            workers=blocks * active,
        )

    def launch(self, i: int, args: tuple[int | float, ...], *, pdl: bool) -> None:
        """Enqueue kernel ``i`` on PyTorch's current stream; ``pdl``: to start while the one before runs."""
        shared = self.shared_bytes[i]
        launch(self.kernels[i], (self.grids[i], 1, 1), (self.blocks[i], 1, 1), shared, None, args, pdl=pdl)


def decode_pages(
    q: torch.Tensor,
    cache: PagedTQ4Cache,
    sequences: Sequences,
    tables: Tables,
    sm_scale: float,
    masks: Masks,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    hadamard: bool = False,
    new: New | None = None,
) -> None:
    """Fill the rows of ``out`` and ``lse`` of sequences with at most 32 query rows per key/value head; leave the others alone.

    Args as in :func:`turboquant_vllm.tq4_paged_attention`, which has checked them: q fp16 or bf16 ``[T, H_q, D]``, D 64, 128 or
    256 (there up to 16 rows), out like q, lse float32 ``[T, H_q]`` contiguous. ``hadamard``: as in
    :func:`turboquant_vllm.cuda.decode.decode`. ``new`` is stored first, in the same launch or in one before, of which the next
    starts while that runs; what attends waits where it would read pages that this writes.
    """
    tokens, num_heads, head_dim = q.shape
    pages, page_size, num_kv_heads = cache.buffer, cache.page_size, cache.num_kv_heads
    count, max_pages = sequences.block_table.shape
    group = num_heads // num_kv_heads
    if tokens == 0 or count == 0:
        if new is not None:
            new.store()
        return
    block_table, seq_lens, cu_seqlens_q, max_query_len, max_seq_len, *_ = sequences.contiguous()
    causal, sliding_window, softcap, sinks, windows = masks
    rows = min(max(min(max_query_len, tokens), 1) * group, 32)
    room = max_pages * page_size if pages.shape[0] else 0
    masked = not masks.only_causal
    longest = min(max_seq_len, room if sliding_window is None else sliding_window + max_query_len + 15, room)
    assert tables.centroids is not None
    assert tables.rotation is not None
    centroids, rotation = tables.centroids.contiguous(), aligned(tables.rotation.contiguous())
    in_pairs = out.stride(2) == 1 and not (out.stride(0) | out.stride(1) | out.data_ptr() // 2) % 2
    result = out if in_pairs else out.clone(memory_format=torch.contiguous_format)  # rows that are left alone among them
    codes, page_bytes = pages.data_ptr(), pages.stride(0)
    values, norms = codes + page_size * head_dim // 2, codes + page_size * head_dim
    chunk = chunk_bytes(page_size, head_dim, False)
    bf16 = int(q.dtype == torch.bfloat16)
    operands = (
        q.data_ptr(), codes, norms, values, norms + 4 * page_size, centroids.data_ptr(), rotation.data_ptr(),
    )  # fmt: skip
    strides = (
        0, q.stride(1), q.stride(0), q.stride(2), page_bytes, chunk, head_dim // 2, 0, 0, 1, page_bytes, chunk, head_dim // 2,
        0, 0, 1,
    )  # fmt: skip
    lie = (block_table.data_ptr(), seq_lens.data_ptr(), cu_seqlens_q.data_ptr())
    sizes = (
        block_table.stride(0), count, tokens, pages.shape[0], page_size // 16, room, *divisor(page_size // 16),
    )  # fmt: skip
    sinks, windows = (None if x is None else x.contiguous() for x in (sinks, windows))
    sinks_at = 0 if sinks is None else sinks.data_ptr()
    of_masks = mask_args(sliding_window, softcap, windows) if masked else ()
    how = (0, 0, int(causal), bf16, 0, sm_scale / math.log(2), *of_masks)
    if cache.has_offsets:
        groups, scales = codes + num_kv_heads * chunk, tables.key_scales
        scales = None if scales is None else scales.contiguous()
        steps = groups + num_kv_heads * (page_size // GROUP) * 2 * head_dim
        how = (*how, groups, steps, 0 if scales is None else scales.data_ptr())
    index, offsets, one = q.get_device(), cache.has_offsets, None
    if hadamard and longest:
        stored = () if new is None else (new.stored, new.k.shape[0])
        sizes_of_call = (count * num_kv_heads, num_kv_heads, group, rows, -(-longest // 16), head_dim, masked, offsets, True)
        one = cluster.plan(index, *sizes_of_call, _kernels, *stored)
    even = NEVER if one is None else one.cluster.even
    launches: list[Callable[..., None]] = []
    if even is not ALWAYS:
        call = Call.plan(index, count, num_heads, num_kv_heads, rows, longest, head_dim, masked, offsets, hadamard)
        workspace = torch.empty(call.workspace_bytes, dtype=torch.uint8, device=q.device)
        parts, fragments, row_scales, line = (workspace.data_ptr() + place for place in call.places)
        args = (*operands, parts, *strides, *lie, fragments, row_scales, line, *sizes, *even, *call.attend, *how)
        combine_args = (
            parts, rotation.data_ptr(), result.data_ptr(), lse.data_ptr(), line, cu_seqlens_q.data_ptr(), seq_lens.data_ptr(),
            result.stride(0), result.stride(1), count, tokens, call.workers, room, *even, *call.combine, bf16, 0,
            *((sinks_at, *of_masks[:2]) if masked else ()),
        )  # fmt: skip
        launches += [functools.partial(call.launch, i, x) for i, x in enumerate((args, args, combine_args))]
    if one is not None:
        of_out = (0, result.stride(1), result.stride(0), 0, 1, num_heads)
        _left, left_at, counters = one.to_join(q.device)
        places = (counters, result.data_ptr(), lse.data_ptr(), sinks_at)
        written = (0, 0, 0) if new is None else (new.slots.data_ptr(), new.slots.numel(), new.slots.element_size())
        own = (0, 0, 0, *sizes, *even, *one.layout, *how, *places, *of_out, *one.last, *written)
        if new is not None and one.storing is not None:
            own, new = (*own, *new.arguments(one.storing.division, one.storing.teams), *one.to_store()), None
        launches.append(functools.partial(one.launch, (*operands, left_at, *strides, *lie, *own)))
    if new is not None:
        new.store(leaves_room=True)
    for i, enqueue in enumerate(launches):
        enqueue(pdl=i > 0 or new is not None)
    if result is not out:
        out.copy_(result)


def store_and_decode_pages(
    q: torch.Tensor,
    cache: PagedTQ4Cache,
    sequences: Sequences,
    tables: Tables,
    sm_scale: float,
    masks: Masks,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    companding: torch.Tensor,
    scale: str,
    previous_slots: torch.Tensor | None = None,
) -> None:
    """:func:`turboquant_vllm.cuda.store.store`, and behind it :func:`decode_pages`, which finds what that wrote.

    One launch, two, four or five: attention begins while keys and values are stored, and waits for the end of that before it
    reads a page which is written, or, in the line of tiles or behind more than 32 tokens, any. Tables are of a rotation by a
    Hadamard matrix.
    """
    rotation, centroids = tables.rotation, tables.centroids
    assert rotation is not None
    assert centroids is not None
    how = (rotation, companding, centroids, scale, cache.page_size, cache.has_offsets, tables.key_scales, previous_slots)
    new = New(k, v, slot_mapping, cache.buffer, *how).laid_out()
    decode_pages(q, cache, sequences, tables, sm_scale, masks, out, lse, hadamard=True, new=new)
