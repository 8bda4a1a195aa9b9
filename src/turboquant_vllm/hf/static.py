"""The layers of a cache of fixed size, for torch.compile and CUDA graphs: pages that never move, and lengths on the device.

A layer's tokens are pages of a :class:`turboquant_vllm.paged.PagedTQ4Cache`, which its attention reads, under a block table
that never changes: page p of a sequence is its p-th. A sliding window needs few pages, which its block table uses in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from turboquant_vllm.checks import check_key_scales
from turboquant_vllm.codec import TQ4Codec, TQ4Keys, TQ4Tensor
from turboquant_vllm.fakes import has_elements
from turboquant_vllm.hf.layers import check_states, to_remove
from turboquant_vllm.hf.pages import PAGE_SIZE, PagedTensor, cache_of, packed_places, put_places
from turboquant_vllm.hf.storage import check_sizes, codec_for, natively_stored, store_backend, store_tokens
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.records import GROUP

__all__ = ["DenseStaticLayer", "PagedLayer"]

# Tokens that one call may append to a window that is in use.
MAX_CHUNK = 256


def whole_pages(tokens: int) -> int:
    """``tokens`` rounded up to whole pages."""
    return -(-tokens // PAGE_SIZE) * PAGE_SIZE


def _is_there(first: int, length: int, window: int) -> bool:
    """Whether the window of ``length`` tokens ends before the tokens that come before ``first``, which are gone."""
    return length == 0 or first <= max(0, length - window + 1)


def check_room(layer: PagedLayer | DenseStaticLayer, count: int, *, wait: bool) -> None:
    """Whether ``count`` more tokens fit into a layer; where its length is on a GPU, only if that may be waited for.

    Raises:
        ValueError: they do not.
    """
    if torch.compiler.is_compiling() or not has_elements(layer.cumulative_length):
        return
    length, seen = layer.cumulative_length, 0
    if not layer.empty:
        if length.is_cuda and not (wait and not torch.cuda.is_current_stream_capturing()):
            return
        seen = int(length)
    if seen + count > layer.max_cache_len:
        raise ValueError(
            f"layer {layer.index}: the cache is full: expected at most {layer.max_cache_len} tokens in all (max_cache_len), "
            f"got {seen} and {count} more"
        )


class PagedLayer(CacheLayerMixin):
    """A layer with room for ``max_cache_len`` tokens in 4 bits.

    Args:
        index: of the layer in the model, for messages.
        max_cache_len: tokens that fit, rounded up to whole pages.
        window: how many tokens a query sees, itself included; None for all.
        seed: of the rotation.
        exact_prefill: whether the first call's own tokens are seen exactly by that call.
        key_offsets: whether keys have offsets.
        key_scales: with offsets, ``[H_kv, D]``, or None for ones.
    """

    is_compileable = True
    is_croppable = True

    def __init__(
        self,
        index: int,
        max_cache_len: int,
        *,
        window: int | None = None,
        seed: int,
        exact_prefill: bool = True,
        key_offsets: bool = False,
        key_scales: torch.Tensor | None = None,
    ) -> None:
        # Whole pages: a token too many is then outside of the block table, which no device overlooks.
        self.index, self.max_cache_len, self.window = index, whole_pages(max_cache_len), window
        self.seed, self.exact_prefill = seed, exact_prefill
        self.key_offsets, self.key_scales = key_offsets, key_scales
        self.empty = True
        self.first = 0  # tokens before this one were never here: they had left the window of the cache that was restored
        self.cumulative_length = torch.zeros((), dtype=torch.long)
        self.codec: TQ4Codec | None = None
        self.buffer: torch.Tensor | None = None
        self.dtype: torch.dtype = torch.float32
        self.device = torch.device("cpu")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.max_cache_len} tokens, {self.nbytes} bytes)"

    # What update keeps and returns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make pages for states like these, ``[B, H_kv, n, D]``."""
        check_states(self.index, key_states, value_states)
        batch, num_heads, _, head_dim = key_states.shape
        if head_dim % 16:
            raise ValueError(
                f"layer {self.index}: expected a head dimension that is a multiple of 16 for a static cache, got {head_dim}; "
                f"keep the layer dense: skip_layers=({self.index},)"
            )
        self._allocate(batch, num_heads, head_dim, key_states.dtype, key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``[B, H_kv, n, D]`` states behind the last, and return the keys and values that their queries may see.

        The first call returns the states as they came, later calls all ``max_cache_len`` places, of which the mask hides those
        that are not in use.
        """
        if self.buffer is None:
            self.lazy_initialization(key_states, value_states)
        elif self.buffer.device != key_states.device:
            self._move(key_states.device)
        check_states(self.index, key_states, value_states)
        value_states = value_states.to(key_states.dtype)
        assert self.codec is not None
        batch, num_heads, count, head_dim = key_states.shape
        check_sizes((batch, num_heads, head_dim), (self.block_table.shape[0], self.num_heads, self.codec.head_dim))
        first = self.empty
        check_room(self, count, wait=False)
        self._check_chunk(count, first and self.exact_prefill)
        skipped = max(0, count - self._places) if first and self.exact_prefill else 0
        if self.key_offsets:  # a group is written from its beginning on
            skipped = -(-skipped // GROUP) * GROUP
        positions = torch.arange(skipped, count, device=self.device) + self.cumulative_length
        self._write(key_states[:, :, skipped:], value_states[:, :, skipped:], positions)
        self.cumulative_length.add_(count)
        self.empty = False
        if first and self.exact_prefill:
            return key_states, value_states
        return self._paged(0), self._paged(1)

    def _check_chunk(self, count: int, fresh: bool) -> None:
        if self.window is not None and not fresh and count > MAX_CHUNK and self._places < self.max_cache_len:
            raise ValueError(
                f"layer {self.index}: expected at most {MAX_CHUNK} tokens at a time behind a sliding window in use, got {count}"
            )

    def _write(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        assert self.codec is not None
        assert self.buffer is not None
        backend = store_backend(keys, self._native, self.key_offsets)
        slots, previous = self._slots(positions), None
        if self.key_offsets:
            before = positions - 1
            previous = torch.where(before[:, None] >= 0, self._slots(before.clamp(min=0)), -1)
        store_tokens(keys, values, slots, self.buffer, self.codec, PAGE_SIZE, backend, self.key_offsets, previous)

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        """Of tokens ``[n]`` of each sequence, int64 ``[n, B]``."""
        return self.block_table.T[positions // PAGE_SIZE] * PAGE_SIZE + (positions % PAGE_SIZE)[:, None]

    def _paged(self, which: int) -> PagedTensor:
        assert self.buffer is not None
        assert self.codec is not None
        return PagedTensor.of(
            self.buffer, self.block_table, self.cumulative_length, self.codec, which, self.num_heads, self.max_cache_len,
            self.dtype, self.key_offsets,
        )  # fmt: skip

    def _pages(self) -> PagedTQ4Cache:
        assert self.buffer is not None
        assert self.codec is not None
        return cache_of(self.buffer, self.num_heads, self.codec.head_dim, self.key_offsets)

    def _allocate(self, batch: int, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        needed = self.max_cache_len if self.window is None else min(self.max_cache_len, self.window + MAX_CHUNK)
        self._places = whole_pages(needed)  # tokens of a sequence that there are pages for
        pages, table_pages = self._places // PAGE_SIZE, self.max_cache_len // PAGE_SIZE
        width = PagedTQ4Cache.page_bytes(PAGE_SIZE, num_heads, head_dim, self.key_offsets)
        self.num_heads = num_heads
        check_key_scales(self.key_scales, num_heads, head_dim)
        with torch.inference_mode(False):
            self.buffer = torch.zeros((batch * pages, width), dtype=torch.uint8, device=device)
            turns = torch.arange(table_pages, dtype=torch.int32, device=device) % pages
            self.block_table = turns + torch.arange(batch, dtype=torch.int32, device=device)[:, None] * pages
            self.cumulative_length = torch.zeros((), dtype=torch.long, device=device)
        self.dtype = dtype
        self.codec = codec_for(head_dim, self.seed, device, self.key_scales)
        self._settle(device)

    def _settle(self, device: torch.device) -> None:
        """Say that these tensors stay where they are, which CUDA graphs need to know."""
        assert self.codec is not None
        self.device, self._native = device, natively_stored(self.codec)
        if not torch.compiler.is_compiling():
            for x in (self.buffer, self.block_table, self.cumulative_length, self.codec.key_scales):
                if x is not None:
                    torch._dynamo.mark_static_address(x)

    def _move(self, device: torch.device) -> None:
        assert self.buffer is not None
        assert self.codec is not None
        self.buffer = self.buffer.to(device, non_blocking=True)
        self.block_table, self.cumulative_length = self.block_table.to(device), self.cumulative_length.to(device)
        self.codec = codec_for(self.codec.head_dim, self.seed, device, self.codec.key_scales)
        self._settle(device)

    # What there is

    @property
    def is_sliding(self) -> bool:
        """Whether queries see a window."""
        return self.window is not None

    @property
    def is_initialized(self) -> bool:
        """Whether there are pages."""
        return self.buffer is not None

    @property
    def keys(self) -> PagedTensor | None:
        """All places for keys, ``[B, H_kv, max_cache_len, D]``, in 4 bits."""
        return None if self.buffer is None else self._paged(0)

    @property
    def values(self) -> PagedTensor | None:
        """All places for values, ``[B, H_kv, max_cache_len, D]``, in 4 bits."""
        return None if self.buffer is None else self._paged(1)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages."""
        return 0 if self.buffer is None else self.buffer.nbytes

    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens seen: 0, or a tensor on the layer's device."""
        return 0 if self.empty else self.cumulative_length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next call of ``query_length`` tokens returns, and the position of the first.

        Raises:
            ValueError: there is no room for so many tokens. Masks are asked for outside of what is compiled, so this, which may
                wait for a GPU, is where a full cache is found.
        """
        check_room(self, query_length, wait=True)
        return (query_length if self.empty and self.exact_prefill else self.max_cache_len), 0

    def export(self) -> tuple[TQ4Tensor | TQ4Keys, TQ4Tensor, int]:
        """Keys and values ``[B, H_kv, n, D]`` that later calls can see, keys with offsets from where a group begins, and how
        many tokens there were; waits for a GPU."""
        length = int(self.cumulative_length)
        first = 0 if self.window is None else self._first_seen(length)
        cache, tokens = self._pages(), slice(first, length)
        keys, values = (packed_places(part, self.block_table) for part in (cache.keys, cache.values))
        if isinstance(keys, TQ4Keys):
            groups = slice(first // GROUP, -(-length // GROUP))
            own = (*(x[:, :, tokens] for x in keys[:2]), *(x[:, :, groups] for x in keys[2:]))
            return TQ4Keys(*own), TQ4Tensor(*(x[:, :, tokens] for x in values)), length
        return TQ4Tensor(*(x[:, :, tokens] for x in keys)), TQ4Tensor(*(x[:, :, tokens] for x in values)), length

    def _first_seen(self, length: int) -> int:
        """The first token that is read behind ``length`` tokens, where there is a window."""
        assert self.window is not None
        first = max(0, length - (self.window - 1))
        return first // GROUP * GROUP if self.key_offsets else first

    # What changes it

    def restore(self, keys: TQ4Tensor | TQ4Keys, values: TQ4Tensor, dtype: torch.dtype, length: int) -> None:
        """Take over keys and values ``[B, H_kv, n, D]`` that are what is left of ``length`` tokens."""
        if length > self.max_cache_len:
            raise ValueError(f"layer {self.index}: expected at most {self.max_cache_len} tokens, got {length}")
        batch, num_heads, count = values.norms.shape
        self._allocate(batch, num_heads, values.head_dim, dtype, values.device)
        positions = torch.arange(length - count, length, device=values.device)
        put_places(self._pages(), self.block_table, positions, keys, values)
        self.cumulative_length.fill_(length)
        self.empty, self.first = length == 0, length - count

    def reset(self) -> None:
        """Forget all tokens; the pages stay where they are."""
        self.empty, self.first = True, 0
        if self.buffer is not None:
            self.cumulative_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens, or all beyond the first ``tokens_to_remove`` if that is positive.

        Raises:
            RuntimeError: tokens that a window would show again are gone.
        """
        if self.empty:
            return
        length = int(self.cumulative_length)
        count = to_remove(tokens_to_remove, length)
        if self.window is not None:
            reused = self._first_seen(length - count) + self._places < length  # their pages hold others
            if reused or not _is_there(self.first, length - count, self.window):
                raise RuntimeError(f"layer {self.index}: cannot remove {count} tokens behind a window of {self.window}")
        self.first = min(self.first, length - count)
        self.cumulative_length.sub_(count)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace sequence i by sequence ``beam_idx[i]``."""
        PagedLayer.batch_select_indices(self, beam_idx)  # not that of a class which selects more

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences of an index, int64 ``[n]``, or of a mask, bool ``[B]``; as many as there were stay in place."""
        if self.buffer is None:
            return
        sequences = self.buffer.unflatten(0, (self.block_table.shape[0], -1))
        chosen = sequences[torch.as_tensor(indices, device=self.device)]
        if chosen.shape == sequences.shape:
            sequences.copy_(chosen)
            return
        assert self.codec is not None
        length = self.cumulative_length
        self._allocate(chosen.shape[0], self.num_heads, self.codec.head_dim, self.dtype, self.device)
        self.buffer.copy_(chosen.flatten(0, 1))
        self.cumulative_length.copy_(length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times, one behind the other."""
        if self.buffer is not None:
            sequences = torch.arange(self.block_table.shape[0], device=self.device)
            PagedLayer.batch_select_indices(self, sequences.repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: the pages must stay where they are."""

    def prefetch(self) -> None:
        """Nothing: the pages stay where they are."""


class DenseStaticLayer(StaticLayer):
    """A dense layer beside packed ones, whose first call returns what theirs does.

    Args:
        index, max_cache_len, exact_prefill: as for :class:`PagedLayer`.
        window: how many tokens a query sees, itself included; None for all. The layer has room for all in any case.
    """

    def __init__(self, index: int, max_cache_len: int, *, window: int | None = None, exact_prefill: bool = True) -> None:
        super().__init__(max_cache_len=whole_pages(max_cache_len))
        self.cumulative_length = torch.zeros((), dtype=torch.long, device="cpu")  # whatever the default device is
        self.index, self.window, self.exact_prefill = index, window, exact_prefill
        self.empty = True
        self.first = 0  # as of a PagedLayer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_room(self, key_states.shape[2], wait=False)
        first, self.empty = self.empty, False
        returned = super().update(key_states, value_states, *args, **kwargs)
        return (key_states, value_states) if first and self.exact_prefill else returned

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        check_room(self, query_length, wait=True)
        return (query_length, 0) if self.empty and self.exact_prefill else super().get_mask_sizes(query_length)

    def get_seq_length(self) -> Any:
        return 0 if self.empty else super().get_seq_length()

    def restore(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Take over keys and values ``[B, H_kv, n, D]`` that are what is left of ``length`` tokens."""
        self.lazy_initialization(keys, values)
        self.first = length - keys.shape[2]
        self.keys[:, :, self.first : length] = keys
        self.values[:, :, self.first : length] = values
        self.cumulative_length.fill_(length)
        self.empty = length == 0

    def crop(self, tokens_to_remove: int) -> None:
        """As for the layers of transformers.

        Raises:
            RuntimeError: tokens that a window would show again are gone.
        """
        if not self.is_initialized:
            return
        length = int(self.cumulative_length)
        count = to_remove(tokens_to_remove, length)
        if self.window is not None and self.first > 0:
            if not _is_there(self.first, length - count, self.window):
                raise RuntimeError(f"cannot remove {count} tokens behind a window of {self.window}")
            self.first = min(self.first, length - count)
        self.cumulative_length.sub_(count)

    def reset(self) -> None:
        super().reset()
        self.empty, self.first = True, 0
