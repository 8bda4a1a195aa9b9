"""Attention of one layer over its pages: what the vLLM backend does, without vLLM."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import cache

import torch

from turboquant_vllm import ops, reference
from turboquant_vllm.checks import check_masks, check_sm_scale
from turboquant_vllm.codec import TQ4Codec
from turboquant_vllm.limits import MANY_PAIRS, MANY_ROWS, most_rows_over_pages
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.paged_attention import tq4_paged_attention
from turboquant_vllm.prefill import SCRATCH_BYTES
from turboquant_vllm.records import NO_TABLES, Masks, Operand
from turboquant_vllm.store import tq4_store
from turboquant_vllm.vllm.batch import Kind, Run

__all__ = ["SLOT_NORM_BYTES", "Exact", "PagedLayer", "codec_for", "exact_attention"]

SLOT_NORM_BYTES = 8  # one float32 for a key and one for a value
_MANY_SPLITS = 16

# (layer, q, k, v, run, out): causal attention of a run's tokens to their own keys and values, into out. All [tokens, heads, D].
Exact = Callable[["PagedLayer", torch.Tensor, torch.Tensor, torch.Tensor, Run, torch.Tensor], None]


@cache
def codec_for(head_dim: int, device: torch.device) -> TQ4Codec:
    """The codec of all layers of this head dimension on ``device``: the same on every rank and in every process."""
    return TQ4Codec(head_dim, seed=0, device=device)


def exact_attention(layer: PagedLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run, out: torch.Tensor) -> None:
    """:data:`Exact` on any device, one sequence after the other."""
    assert run.cu_seqlens_q_cpu is not None
    for first, stop in itertools.pairwise(run.cu_seqlens_q_cpu):
        own = slice(first, stop)
        queries, keys, values = (x[own].transpose(0, 1)[None] for x in (q, k, v))
        masks = Masks(True, layer.sliding_window, layer.softcap, layer.sinks_now())
        if ops.triton_runs_on(q.device):
            run_triton = torch.ops.turboquant.triton_attention
            result, _ = run_triton(queries, keys, None, values, None, None, None, layer.sm_scale, *masks[:4])
        else:
            operands = Operand(keys), Operand(values)
            result, _ = reference.attention(queries, *operands, NO_TABLES, layer.sm_scale, masks)
        out[own] = result[0].transpose(0, 1)


def chunks_of_all_kinds(group: int, head_dim: int) -> list[tuple[int, int]]:
    """Query tokens and keys of chunks, one for each way in which attention over pages serves them."""
    most = max(most_rows_over_pages(head_dim) // group, 1)
    few = sorted({min(-(-rows // group), most) for rows in (4, 8, 16, 32)})
    many = -(-MANY_ROWS // group)
    return [*((tokens, tokens + 1) for tokens in (*few, most + 1, many)), (many, -(-MANY_PAIRS // (many * group)))]


class PagedLayer:
    """One layer's sizes and masks, its pages once they are known, and its attention.

    Args:
        num_heads, num_kv_heads: of queries, and of keys and values.
        head_dim: a multiple of 16 from 16 to 256.
        sm_scale: factor on the scores.
        sliding_window, softcap: as in :func:`turboquant_vllm.tq4_attention`.
        sinks: as there, in any dtype; read at each call, since a server may change its weights in place.
        exact: attends to dense keys and values; None: whole prompts read the pages like all others.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sm_scale: float,
        *,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        exact: Exact | None = exact_attention,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        masks = check_masks(True, sliding_window, softcap, None, num_heads, torch.device("cpu"))
        self.sliding_window, self.softcap = masks.get("sliding_window"), masks.get("softcap")
        self.sm_scale, self.sinks = check_sm_scale(sm_scale, head_dim), sinks
        self.exact = exact
        self._pages: tuple[weakref.ref[torch.Tensor], PagedTQ4Cache] | None = None

    def pages(self, kv_cache: torch.Tensor) -> PagedTQ4Cache:
        """``kv_cache``, uint8 ``[num_pages, H_kv, page_size, D + 8]`` with contiguous pages, as a paged cache.

        Nothing is copied, and nothing kept: once ``kv_cache`` is gone, its memory is free.

        Raises:
            TypeError, ValueError: it is no such tensor.
        """
        if self._pages is not None and self._pages[0]() is kv_cache:
            return self._pages[1]
        num_pages, heads, page_size, slot = kv_cache.shape
        if (heads, slot) != (self.num_kv_heads, self.head_dim + SLOT_NORM_BYTES):
            expected = f"[num_pages, {self.num_kv_heads}, page_size, {self.head_dim + SLOT_NORM_BYTES}]"
            raise ValueError(f"kv_cache must have shape {expected}, got {list(kv_cache.shape)}")
        if not kv_cache[:1].is_contiguous():
            raise ValueError(f"kv_cache must have contiguous pages, got strides {kv_cache.stride()}")
        # Detached, or the view would keep the tensor that it is of.
        buffer = kv_cache.detach().view(num_pages, heads * page_size * slot)
        cache = PagedTQ4Cache(buffer, page_size=page_size, num_kv_heads=heads, head_dim=self.head_dim)
        self._pages = (weakref.ref(kv_cache, self._forget), cache)
        return cache

    def _forget(self, kv_cache: weakref.ref[torch.Tensor]) -> None:
        if self._pages is not None and self._pages[0] is kv_cache:
            self._pages = None

    def sinks_now(self) -> torch.Tensor | None:
        """The sinks in float32."""
        return None if self.sinks is None else self.sinks.detach().float()

    def store(self, k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Compress ``k, v [tokens, H_kv, D]`` into the slots of the first ``len(slot_mapping)`` tokens; -1 is no slot."""
        cache = self.pages(kv_cache)
        count = slot_mapping.shape[0]
        tq4_store(k[:count], v[:count], cache, codec_for(self.head_dim, cache.device), slot_mapping)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        kv_cache: torch.Tensor,
        runs: Sequence[Run],
        out: torch.Tensor,
    ) -> None:
        """Attention of a step's tokens into ``out``; rows that belong to no sequence are left alone.

        Args:
            q, out: ``[T, H_q, D]``.
            k, v: ``[T, H_kv, D]``, stored already; None: read all from the pages.
            kv_cache: as in :meth:`pages`.
            runs: of all sequences.
        """
        cache = self.pages(kv_cache)
        codec = codec_for(self.head_dim, cache.device)
        for run in runs:
            rows = run.tokens
            if run.kind == Kind.EXACT and self.exact is not None and k is not None and v is not None:
                self.exact(self, q[rows], k[rows], v[rows], run, out[rows])
                continue
            tq4_paged_attention(
                q[rows],
                cache,
                codec,
                run.block_table,
                run.seq_lens,
                run.cu_seqlens_q,
                sm_scale=self.sm_scale,
                sliding_window=self.sliding_window,
                softcap=self.softcap,
                sinks=self.sinks_now(),
                max_query_len=run.max_query_len,
                seq_lens_cpu=run.seq_lens_cpu,
                cu_seqlens_q_cpu=run.cu_seqlens_q_cpu,
                out=out[rows],
            )

    @property
    def kind(self) -> tuple[object, ...]:
        """Layers of the same kind are served by the same kernels."""
        masks = (self.sliding_window, self.softcap, self.sinks)
        return (self.num_heads, self.num_kv_heads, self.head_dim, *(mask is None for mask in masks))

    def warm_up(self, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile what chunks behind a prefix will need, few tokens or many: or a server's first long prompts would wait."""
        group = self.num_heads // self.num_kv_heads
        for tokens, keys in chunks_of_all_kinds(group, self.head_dim):
            count = -(-keys // page_size)
            shape = (count, self.num_kv_heads, page_size, self.head_dim + SLOT_NORM_BYTES)
            kv_cache = torch.zeros(shape, dtype=torch.uint8, device=device)
            q = torch.zeros(tokens, self.num_heads, self.head_dim, dtype=dtype, device=device)
            run = Run(
                kind=Kind.CONTINUED,
                tokens=slice(0, tokens),
                block_table=torch.arange(count, dtype=torch.int32, device=device)[None],
                seq_lens=torch.tensor([keys], dtype=torch.int32, device=device),
                cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32, device=device),
                max_query_len=tokens,
                seq_lens_cpu=(keys,),
                cu_seqlens_q_cpu=(0, tokens),
            )
            self.attend(q, None, None, kv_cache, [run], torch.empty_like(q))

    def scratch_bytes(self, tokens: int, sequences: int) -> int:
        """A bound on the scratch memory that :meth:`attend` takes for ``tokens`` tokens of at most ``sequences`` sequences."""
        vectors = tokens * self.num_heads
        splits = _MANY_SPLITS * min(vectors, 32 * sequences * self.num_kv_heads)
        fused = (splits + 2 * vectors) * (self.head_dim + 1) * 4
        # A slice of keys and values; the queries, results of four slices, and their sum in float32.
        slices = SCRATCH_BYTES + vectors * (14 * self.head_dim + 24)
        return max(fused, slices)
