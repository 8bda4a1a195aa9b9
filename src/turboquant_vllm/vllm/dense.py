"""Attention of a layer left dense, beside layers in 4 bits: over pages in the model's dtype, without vLLM.

A page has keys and values of each token side by side, ``[num_pages, H_kv, page_size, 2 * D]``, as for vLLM's own backends.
All of a step's sequences are one run, whole prompts among them: what a page holds is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from turboquant_vllm import reference
from turboquant_vllm.records import NO_TABLES, Masks, Operand
from turboquant_vllm.vllm.batch import Run
from turboquant_vllm.vllm.layer import LayerShape

__all__ = ["DenseLayer", "DenseOps", "reference_ops", "split_pages"]


class _Read(Protocol):
    def __call__(self, layer: LayerShape, q: torch.Tensor, kv_cache: torch.Tensor, run: Run, out: torch.Tensor) -> None: ...


class _Write(Protocol):
    def __call__(self, k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None: ...


class DenseOps(NamedTuple):
    """What serves such a layer.

    Attributes:
        write: puts ``k, v [n, H_kv, D]`` into the slots ``slot_mapping [n]`` of ``kv_cache``; -1 is no slot.
        read: causal attention of a run's tokens ``q [n, H_q, D]`` to the pages, into ``out``.
    """

    write: _Write
    read: _Read


class DenseLayer(LayerShape):
    """One layer's sizes and masks, and its attention over dense pages.

    Args:
        num_heads, num_kv_heads, head_dim, sm_scale, masks: as for :class:`turboquant_vllm.vllm.layer.LayerShape`.
        ops: what writes and reads its pages.
    """

    key_offsets = False  # nothing of its keys is shared

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sm_scale: float,
        *,
        ops: DenseOps,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        sizes = (num_heads, num_kv_heads, head_dim, sm_scale)
        super().__init__(*sizes, sliding_window=sliding_window, softcap=softcap, sinks=sinks)
        self.ops = ops

    def _check(self, kv_cache: torch.Tensor) -> None:
        if kv_cache.ndim != 4 or (kv_cache.shape[1], kv_cache.shape[3]) != (self.num_kv_heads, 2 * self.head_dim):
            expected = f"[num_pages, {self.num_kv_heads}, page_size, {2 * self.head_dim}]"
            raise ValueError(f"kv_cache must have shape {expected}, got {list(kv_cache.shape)}")

    def store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        previous_slots: torch.Tensor | None = None,
    ) -> None:
        """Put ``k, v [tokens, H_kv, D]`` into the slots of the first ``len(slot_mapping)`` tokens; -1 is no slot."""
        self._check(kv_cache)
        count = slot_mapping.shape[0]
        self.ops.write(k[:count], v[:count], kv_cache, slot_mapping)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        kv_cache: torch.Tensor,
        runs: Sequence[Run],
        out: torch.Tensor,
        *,
        slot_mapping: torch.Tensor | None = None,
        previous_slots: torch.Tensor | None = None,
    ) -> None:
        """Attention of a step's tokens ``q [T, H_q, D]`` into ``out``; ``k, v`` are in the pages already, or go into these
        slots first."""
        self._check(kv_cache)
        if slot_mapping is not None and k is not None and v is not None:
            self.store(k, v, kv_cache, slot_mapping)
        for run in runs:
            self.ops.read(self, q[run.tokens], kv_cache, run, out[run.tokens])

    def scratch_bytes(self, tokens: int, sequences: int) -> int:
        """As for packed layers: none of ours."""
        return 0


def split_pages(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views ``[num_pages, page_size, H_kv, D]`` of the keys and of the values."""
    keys, values = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return keys, values


def reference_ops() -> DenseOps:
    """In plain PyTorch, for CPUs: it waits for the device."""
    return DenseOps(_write, _read)


def _write(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    is_slot = slot_mapping >= 0
    slots, page_size = slot_mapping[is_slot], kv_cache.shape[2]
    for vectors, pages in zip((k, v), split_pages(kv_cache), strict=True):
        pages[slots // page_size, slots % page_size] = vectors[is_slot].to(pages.dtype)


def _read(layer: LayerShape, q: torch.Tensor, kv_cache: torch.Tensor, run: Run, out: torch.Tensor) -> None:
    keys, values = split_pages(kv_cache)
    masks = Masks(True, layer.sliding_window, layer.softcap, layer.sinks_now())
    starts, page_size = run.cu_seqlens_q.tolist(), kv_cache.shape[2]
    for row, length in enumerate(run.seq_lens.tolist()):
        own = slice(starts[row], starts[row + 1])
        if own.start == own.stop:
            continue
        table = run.block_table[row, : -(-length // page_size)].long()
        k, v = (Operand(pages[table].flatten(0, 1)[:length].transpose(0, 1)[None]) for pages in (keys, values))
        result, _ = reference.attention(q[own].transpose(0, 1)[None], k, v, NO_TABLES, layer.sm_scale, masks)
        out[own] = result[0].transpose(0, 1)
