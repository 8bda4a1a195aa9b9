"""The slot of the token before each token of a step (:mod:`turboquant_vllm.vllm.previous`), in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from turboquant_vllm.triton.config import device_guard

__all__ = ["previous_slots"]

_BLOCK = 1024


@triton.jit(do_not_specialize=["tokens", "max_pages", "table_stride"])
def previous_slots_kernel(cu_seqlens_q, seq_lens, block_table, slot_mapping, out, tokens, max_pages, table_stride,
                          PAGE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program for each sequence: its tokens' predecessors' slots, int64, into ``out``."""
    sequence = tl.program_id(0)
    first, stop = tl.load(cu_seqlens_q + sequence), tl.load(cu_seqlens_q + sequence + 1)
    if first < stop:
        position = tl.load(seq_lens + sequence) - (stop - first) - 1  # of the token before the first
        page = tl.minimum(tl.maximum(position, 0) // PAGE, max_pages - 1)
        at = tl.load(block_table + sequence.to(tl.int64) * table_stride + page).to(tl.int64)
        slot = at * PAGE + tl.maximum(position, 0) % PAGE
        if position < 0:
            slot = slot * 0 - 1
        offset = tl.arange(0, BLOCK)
        if slot >= 0:
            for start in range(0, tokens, BLOCK):
                written = tl.load(slot_mapping + start + offset, mask=start + offset < tokens, other=-1)
                if tl.max((written == slot).to(tl.int32)) > 0:
                    slot = slot * 0 - 1
        tl.store(out + first, slot)
        for start in range(first + 1, stop, BLOCK):
            row = start + offset
            own = row < stop
            tl.store(out + row, tl.load(slot_mapping + row - 1, mask=own), mask=own)


def previous_slots(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_size: int,
    out: torch.Tensor,
) -> None:
    """As :meth:`turboquant_vllm.vllm.previous.PreviousSlots.find`, into ``out``, int64 ``[n]``."""
    with device_guard(slot_mapping.device):
        previous_slots_kernel[(seq_lens.shape[0],)](
            cu_seqlens_q, seq_lens, block_table, slot_mapping, out, slot_mapping.shape[0], block_table.shape[1],
            block_table.stride(0), PAGE=page_size, BLOCK=_BLOCK,
        )  # fmt: skip
