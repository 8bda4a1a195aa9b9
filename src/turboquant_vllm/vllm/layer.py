"""Attention of one layer over its pages: what the vLLM backend does, without vLLM."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from turboquant_vllm import ops, reference
from turboquant_vllm.checks import check_masks, check_shape, check_sm_scale
from turboquant_vllm.codec import TQ4Codec
from turboquant_vllm.limits import MANY_PAIRS, MANY_ROWS, most_rows_over_pages
from turboquant_vllm.paged import PagedTQ4Cache, chunk_bytes
from turboquant_vllm.paged_attention import tq4_paged_attention
from turboquant_vllm.prefill import SCRATCH_BYTES
from turboquant_vllm.records import GROUP, NO_TABLES, Masks, Operand
from turboquant_vllm.store import tq4_store
from turboquant_vllm.vllm.batch import Kind, Run

__all__ = ["Exact", "LayerShape", "PagedLayer", "codec_for", "exact_attention", "place_of"]

_MANY_SPLITS = 16

# (layer, q, k, v, run, out): causal attention of a run's tokens to their own keys and values, into out. All [tokens, heads, D].
Exact = Callable[["LayerShape", torch.Tensor, torch.Tensor, torch.Tensor, Run, torch.Tensor], None]


@cache
def codec_for(head_dim: int, device: torch.device) -> TQ4Codec:
    """The codec of all layers of this head dimension on ``device``: the same on every rank and in every process."""
    with torch.inference_mode(False):
        return TQ4Codec(head_dim, seed=0, device=device)


def place_of(head_dim: int, key_offsets: bool) -> tuple[int, int]:
    """Tokens that vLLM's cache has in one place of a head of a page, and bytes of such a place: what cannot be divided."""
    tokens = GROUP if key_offsets else 1
    return tokens, chunk_bytes(tokens, head_dim, key_offsets)


def exact_attention(layer: LayerShape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run, out: torch.Tensor) -> None:
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


class LayerShape:
    """One layer's sizes and masks.

    Args:
        num_heads, num_kv_heads: of queries, and of keys and values.
        head_dim: a multiple of 16 from 16 to 512.
        sm_scale: factor on the scores.
        sliding_window, softcap: as in :func:`turboquant_vllm.tq4_attention`.
        sinks: as there, in any dtype; read at each call, since a server may change its weights in place.
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
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        masks = check_masks(True, sliding_window, softcap, None, num_heads, torch.device("cpu"))
        self.sliding_window, self.softcap = masks.get("sliding_window"), masks.get("softcap")
        self.sm_scale, self.sinks = check_sm_scale(sm_scale, head_dim), sinks

    def sinks_now(self) -> torch.Tensor | None:
        """The sinks in float32."""
        return None if self.sinks is None else self.sinks.detach().float()


class PagedLayer(LayerShape):
    """One layer's sizes and masks, its pages once they are known, and its attention.

    Args:
        num_heads, num_kv_heads, head_dim, sm_scale, sliding_window, softcap, sinks: as for :class:`LayerShape`.
        exact: attends to dense keys and values; None: whole prompts read the pages like all others.
        key_offsets: whether keys are kept around offsets of groups of 64 tokens.
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
        key_offsets: bool = True,
    ) -> None:
        sizes = (num_heads, num_kv_heads, head_dim, sm_scale)
        super().__init__(*sizes, sliding_window=sliding_window, softcap=softcap, sinks=sinks)
        self.exact, self.key_offsets = exact, key_offsets
        self._scaled: TQ4Codec | None = None  # the codec with the layer's key scales
        self._pages: tuple[weakref.ref[torch.Tensor], PagedTQ4Cache] | None = None

    def pages(self, kv_cache: torch.Tensor) -> PagedTQ4Cache:
        """``kv_cache``, uint8 ``[num_pages, H_kv, places, bytes]`` with contiguous pages, as a paged cache; a place has the
        tokens and bytes that :func:`place_of` says.

        Nothing is copied, and nothing kept: once ``kv_cache`` is gone, its memory is free.

        Raises:
            TypeError, ValueError: it is no such tensor.
        """
        if self._pages is not None and self._pages[0]() is kv_cache:
            return self._pages[1]
        num_pages, heads, places, width = kv_cache.shape
        tokens, expected_width = place_of(self.head_dim, self.key_offsets)
        if (heads, width) != (self.num_kv_heads, expected_width):
            per_page = "page_size" if tokens == 1 else f"page_size / {tokens}"
            expected = f"[num_pages, {self.num_kv_heads}, {per_page}, {expected_width}]"
            raise ValueError(f"kv_cache must have shape {expected}, got {list(kv_cache.shape)}")
        if not kv_cache[:1].is_contiguous():
            raise ValueError(f"kv_cache must have contiguous pages, got strides {kv_cache.stride()}")
        # Detached, or the view would keep the tensor that it is of.
        buffer = kv_cache.detach().view(num_pages, heads * places * width)
        sizes = {"page_size": places * tokens, "num_kv_heads": heads, "head_dim": self.head_dim}
        cache = PagedTQ4Cache(buffer, **sizes, has_offsets=self.key_offsets)
        self._pages = (weakref.ref(kv_cache, self._forget), cache)
        return cache

    def _forget(self, kv_cache: weakref.ref[torch.Tensor]) -> None:
        if self._pages is not None and self._pages[0] is kv_cache:
            self._pages = None

    def use_key_scales(self, key_scales: torch.Tensor | None, device: torch.device) -> None:
        """Scale keys with ``key_scales [H_kv, D]`` from now on, None for ones; before anything is stored or captured.

        Scales that were there before are written over in place, so that graphs find the new ones.

        Raises:
            TypeError, ValueError: they do not fit the layer.
        """
        codec = codec_for(self.head_dim, device)
        if key_scales is not None:
            check_shape("key_scales", key_scales, (self.num_kv_heads, self.head_dim))
        if self._scaled is None or self._scaled.key_scales is None or self._scaled.device != codec.device:
            with torch.inference_mode(False):  # else they could not be written over in place outside of that mode
                self._scaled = codec.with_key_scales(None if key_scales is None else key_scales.clone())
            return
        new = codec.with_key_scales(torch.ones(self.num_kv_heads, self.head_dim) if key_scales is None else key_scales)
        assert new.key_scales is not None
        self._scaled.key_scales.copy_(new.key_scales)

    def codec_on(self, device: torch.device) -> TQ4Codec:
        """What writes and reads the layer's keys and values."""
        return codec_for(self.head_dim, device) if self._scaled is None else self._scaled

    def store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        previous_slots: torch.Tensor | None = None,
    ) -> None:
        """Compress ``k, v [tokens, H_kv, D]`` into the slots of the first ``len(slot_mapping)`` tokens; -1 is no slot.

        ``previous_slots``: of those tokens or more, as for :func:`turboquant_vllm.tq4_store`; a cache without offsets does not
        look at them.
        """
        cache = self.pages(kv_cache)
        tq4_store(cache=cache, codec=self.codec_on(cache.device), **self._stored(k, v, slot_mapping, previous_slots))

    def _stored(
        self, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, previous_slots: torch.Tensor | None
    ) -> dict[str, Any]:
        """What a store takes of a step's tokens, padding left out."""
        count = slot_mapping.shape[0]
        before = previous_slots[:count] if self.key_offsets and previous_slots is not None else None
        return {"k": k[:count], "v": v[:count], "slot_mapping": slot_mapping, "previous_slots": before}

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
        """Attention of a step's tokens into ``out``; rows that belong to no sequence are left alone.

        Args:
            q, out: ``[T, H_q, D]``.
            k, v: ``[T, H_kv, D]``; None: read all from the pages.
            kv_cache: as in :meth:`pages`.
            runs: of all sequences.
            slot_mapping, previous_slots: as for :meth:`store`, which then comes first, in one call with the first run's
                attention if that reads the pages. None: k and v are stored already.
        """
        cache = self.pages(kv_cache)
        codec = self.codec_on(cache.device)
        exact = self.exact if k is not None and v is not None else None
        stored: dict[str, Any] = {}
        if slot_mapping is not None and k is not None and v is not None:
            stored = self._stored(k, v, slot_mapping, previous_slots)
            if not runs or (exact is not None and runs[0].kind == Kind.EXACT):
                tq4_store(cache=cache, codec=codec, **stored)
                stored = {}
        for run in runs:
            rows = run.tokens
            if run.kind == Kind.EXACT and exact is not None:
                assert k is not None
                assert v is not None
                exact(self, q[rows], k[rows], v[rows], run, out[rows])
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
                **stored,
            )
            stored = {}

    @property
    def kind(self) -> tuple[object, ...]:
        """Layers of the same kind are served by the same kernels."""
        masks = (self.sliding_window, self.softcap, self.sinks)
        scaled = self._scaled is not None and self._scaled.key_scales is not None
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.key_offsets, scaled)
        return (*sizes, *(mask is None for mask in masks))

    def warm_up(self, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile what chunks behind a prefix will need, few tokens or many: or a server's first long prompts would wait."""
        group = self.num_heads // self.num_kv_heads
        for tokens, keys in chunks_of_all_kinds(group, self.head_dim):
            count = -(-keys // page_size)
            tokens_of_place, width = place_of(self.head_dim, self.key_offsets)
            shape = (count, self.num_kv_heads, page_size // tokens_of_place, width)
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
