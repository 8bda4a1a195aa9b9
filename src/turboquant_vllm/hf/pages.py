"""Keys and values in pages: the tensor that stands for them, and the operators that read them."""

from __future__ import annotations

from typing import Any

import torch

from turboquant_vllm import reference
from turboquant_vllm.checks import check_sm_scale
from turboquant_vllm.codec import TQ4Codec, TQ4Keys, TQ4Tensor
from turboquant_vllm.hf.tensors import DeferredTensor, additive
from turboquant_vllm.ops import define_operator, open_library
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.paged_attention import tq4_paged_attention
from turboquant_vllm.records import GROUP, Masks, Operand, Sequences, Tables
from turboquant_vllm.rotation import RotationKind

__all__ = [
    "PAGE_SIZE",
    "PagedTensor",
    "SpanMask",
    "attend_pages",
    "cache_of",
    "find_spans",
    "packed_places",
    "put_places",
]

PAGE_SIZE = GROUP  # a page holds one group of keys with offsets


class PagedTensor(DeferredTensor):
    """Keys or values ``[B, H_kv, N, D]`` of a cache of fixed size, in pages; made of tensors and constants alone, as
    :class:`turboquant_vllm.hf.tensors.PackedTensor` is.

    Attributes:
        buffer: uint8 ``[pages, page_bytes]``, of a :class:`turboquant_vllm.paged.PagedTQ4Cache`.
        block_table: int32 ``[B, pages]``.
        length: int64 scalar, the tokens of each sequence that are in use.
        which: 0 for keys, 1 for values.
        heads: H_kv.
        has_offsets: whether the pages' keys have offsets.
        key_scales: of such keys, ``[H_kv, D]``, or None.
    """

    buffer: torch.Tensor
    block_table: torch.Tensor
    length: torch.Tensor
    rotation: torch.Tensor
    centroids: torch.Tensor
    key_scales: torch.Tensor | None
    kind: RotationKind
    which: int
    heads: int
    has_offsets: bool

    @staticmethod
    def __new__(
        cls,
        buffer: torch.Tensor,
        block_table: torch.Tensor,
        length: torch.Tensor,
        rotation: torch.Tensor,
        centroids: torch.Tensor,
        kind: RotationKind,
        which: int,
        heads: int,
        tokens: int,
        dtype: torch.dtype,
        has_offsets: bool = False,
        key_scales: torch.Tensor | None = None,
    ) -> PagedTensor:
        shape = (block_table.shape[0], heads, tokens, rotation.shape[0])
        self: PagedTensor = cls._make(shape, dtype, buffer.device)
        self.buffer, self.block_table, self.length = buffer, block_table, length
        self.rotation, self.centroids, self.kind = rotation, centroids, kind
        self.which, self.heads, self.has_offsets, self.key_scales = which, heads, has_offsets, key_scales
        return self

    @staticmethod
    def of(
        buffer: torch.Tensor,
        block_table: torch.Tensor,
        length: torch.Tensor,
        codec: TQ4Codec,
        which: int,
        heads: int,
        tokens: int,
        dtype: torch.dtype,
        has_offsets: bool,
    ) -> PagedTensor:
        """The first ``tokens`` places of each sequence, to be read in ``dtype``."""
        tables, scales = (codec.rotation, codec.centroids, codec.rotation_kind), codec.key_scales
        return PagedTensor(buffer, block_table, length, *tables, which, heads, tokens, dtype, has_offsets, scales)

    def dense(self) -> torch.Tensor:
        """The vectors decompressed, ``[B, H_kv, n, D]``; places that no token has may hold anything."""
        tables = (self.rotation, self.centroids, self.kind == "hadamard", self.has_offsets, self.key_scales)
        read = torch.ops.turboquant.read_pages
        return read(self.buffer, self.block_table, self.heads, self.which, self.shape[2], *tables, self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["buffer", "block_table", "length", "rotation", "centroids"]
        names += [] if self.key_scales is None else ["key_scales"]
        return names, (self.kind, self.which, self.heads, self.shape[2], self.dtype, self.has_offsets)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> PagedTensor:
        own = (inner["buffer"], inner["block_table"], inner["length"])
        return PagedTensor(*own, inner["rotation"], inner["centroids"], *(*context, inner.get("key_scales")))


def attend_pages(
    query: torch.Tensor,
    key: PagedTensor,
    mask: SpanMask,
    *,
    sm_scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of one query a sequence, ``[B, H_q, 1, D]``, to the places that the mask shows."""
    tables = (key.rotation, key.centroids, key.kind == "hadamard", key.has_offsets, key.key_scales)
    where = (key.buffer, key.block_table, key.heads, mask.spans)
    return torch.ops.turboquant.attend_pages(query, *where, *tables, sm_scale, softcap, sinks)


class SpanMask(DeferredTensor):
    """An additive mask ``[B, 1, 1, N]`` of one query a sequence, whose visible keys are next to one another; made of a tensor
    and constants alone, as :class:`PagedTensor` is.

    Attributes:
        spans: int32 ``[3, B, 2]``, room for B + 1 numbers each: where the visible keys end, the numbers 0 to B, and how many
            they are. Without the last, ``[2, B, 2]``, where all sequences show their keys from the first on. (No size is
            B + 1: torch.compile would have to work B out of it.)
    """

    spans: torch.Tensor

    @staticmethod
    def __new__(cls, spans: torch.Tensor, tokens: int, dtype: torch.dtype) -> SpanMask:
        self: SpanMask = cls._make((spans.shape[1], 1, 1, tokens), dtype, spans.device)
        self.spans = spans
        return self

    def written(self) -> torch.Tensor:
        """The mask as bools, True where a query sees a key."""
        stops, _, counts = read_spans(self.spans)
        place = torch.arange(self.shape[3], device=self.spans.device)
        first = 0 if counts is None else (stops - counts)[:, None, None, None]
        return (place < stops[:, None, None, None]) & (place >= first)

    def dense(self) -> torch.Tensor:
        """The mask's elements, to be added to scores."""
        return additive(self.written(), self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["spans"], (self.shape[3], self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> SpanMask:
        return SpanMask(inner["spans"], *context)


def find_spans(mask: torch.Tensor, dtype: torch.dtype, *, windows: bool = True) -> SpanMask | None:
    """What stands for a bool mask ``[B, 1, 1, N]``, or None where visible keys have gaps between them; waits for the device.

    Args:
        mask: what the one query of each sequence sees.
        dtype: of the additive mask that the result stands for.
        windows: whether a later step may hide first keys that are visible now: then the shape of the spans stays the same.
    """
    visible = mask[:, 0, 0].int()
    count = visible.sum(-1)
    stop = torch.where(count > 0, visible.shape[1] - visible.flip(-1).argmax(-1), 0)
    together = ((count == 0) | (stop - visible.argmax(-1) == count)).all()
    whole, no_counts = torch.stack((together, (stop == count).all())).tolist()
    if not whole:
        return None
    batch = visible.shape[0]
    rows = torch.arange(2 * batch, device=mask.device)
    columns = [torch.nn.functional.pad(x, (0, batch)) for x in (stop, count)]
    spans = torch.stack((columns[0], rows) if no_counts and not windows else (columns[0], rows, columns[1])).int()
    return SpanMask(spans.unflatten(1, (batch, 2)), visible.shape[1], dtype)


def read_spans(spans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of the spans of a :class:`SpanMask`: where visible keys end, ``[B]``, the numbers 0 to B, and how many keys, or None."""
    batch = spans.shape[1]
    stops, rows, *counts = spans.flatten(1)
    rows = rows[: batch + 1] if batch else spans.new_zeros(1)  # of no sequence there is no room for a number
    return stops[:batch], rows, counts[0][:batch] if counts else None


def packed_places(part: Operand, block_table: torch.Tensor) -> TQ4Tensor | TQ4Keys:
    """Keys or values ``[B, H_kv, N, D]`` of all places of all sequences, from the pages' ``part``: a copy."""
    table = block_table.long()
    found = [x[table].transpose(1, 2).flatten(2, 3) for x in part if x is not None]
    return TQ4Tensor(*found) if part.groups is None else TQ4Keys(*found)


def put_places(
    cache: PagedTQ4Cache, block_table: torch.Tensor, positions: torch.Tensor, keys: TQ4Tensor | TQ4Keys, values: TQ4Tensor
) -> None:
    """Write keys and values ``[B, H_kv, n, D]`` to places ``positions [n]`` of all sequences.

    Where keys have offsets the first of them begins a group, and they are one behind the other.
    """
    where = block_table[:, positions // PAGE_SIZE].long(), slice(None), positions % PAGE_SIZE
    groups = block_table[:, positions[::GROUP] // PAGE_SIZE].long(), slice(None), positions[::GROUP] % GROUP
    for part, given in zip((cache.keys, cache.values), (keys, values), strict=True):
        for i, (to, x) in enumerate(zip(part, given, strict=False)):
            assert to is not None
            to[where if i < 2 else groups] = x.transpose(1, 2)


def cache_of(buffer: torch.Tensor, heads: int, head_dim: int, has_offsets: bool) -> PagedTQ4Cache:
    """The pages of a layer, ``buffer [pages, page_bytes]``."""
    return PagedTQ4Cache(buffer, page_size=PAGE_SIZE, num_kv_heads=heads, head_dim=head_dim, has_offsets=has_offsets)


# The operators, opaque to torch.compile


def _read_pages(
    buffer: torch.Tensor,
    block_table: torch.Tensor,
    heads: int,
    which: int,
    tokens: int,
    rotation: torch.Tensor,
    centroids: torch.Tensor,
    signs: bool,
    has_offsets: bool,
    key_scales: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    cache = cache_of(buffer, heads, rotation.shape[0], has_offsets)
    packed = packed_places((cache.keys, cache.values)[which], block_table)
    codec = TQ4Codec.reader(rotation, centroids, "hadamard" if signs else "haar", key_scales)
    return codec.decompress(packed, dtype)[:, :, :tokens]


def _read_pages_fake(*args: Any) -> torch.Tensor:
    buffer, block_table, heads, _, tokens, rotation, _, _, _, _, dtype = args
    return buffer.new_empty((block_table.shape[0], heads, tokens, rotation.shape[0]), dtype=dtype)


def _attend_pages(
    query: torch.Tensor,
    buffer: torch.Tensor,
    block_table: torch.Tensor,
    heads: int,
    spans: torch.Tensor,
    rotation: torch.Tensor,
    centroids: torch.Tensor,
    signs: bool,
    has_offsets: bool,
    key_scales: torch.Tensor | None,
    sm_scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    cache = cache_of(buffer, heads, rotation.shape[0], has_offsets)
    stops, rows, counts = read_spans(spans)
    q = query[:, :, 0]
    if query.dtype == torch.float64:  # which no kernel takes
        scale = check_sm_scale(sm_scale, query.shape[-1])
        sequences = Sequences(block_table, stops, rows, 1, block_table.shape[1] * cache.page_size)
        masks = Masks(True, softcap=softcap, sinks=sinks, windows=counts)
        tables = Tables(centroids, rotation, key_scales)
        return reference.paged_attention(q, cache, sequences, tables, scale, masks)[0].unsqueeze(2)
    codec = TQ4Codec.reader(rotation, centroids, "hadamard" if signs else "haar", key_scales)
    options: dict[str, Any] = {"sliding_window": counts, "softcap": softcap, "sinks": sinks}
    out = tq4_paged_attention(q, cache, codec, block_table, stops, rows, sm_scale=sm_scale, max_query_len=1, **options)
    return out.unsqueeze(2)


def _attend_pages_fake(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


_LIBRARY = open_library(globals())
define_operator(
    _LIBRARY,
    "attend_pages",
    "(Tensor query, Tensor buffer, Tensor block_table, int heads, Tensor spans, Tensor rotation, Tensor centroids, "
    "bool signs, bool has_offsets, Tensor? key_scales, float? sm_scale, float? softcap, Tensor? sinks) -> Tensor",
    _attend_pages,
    _attend_pages_fake,
)
define_operator(
    _LIBRARY,
    "read_pages",
    "(Tensor buffer, Tensor block_table, int heads, int which, int tokens, Tensor rotation, Tensor centroids, bool signs, "
    "bool has_offsets, Tensor? key_scales, ScalarType dtype) -> Tensor",
    _read_pages,
    _read_pages_fake,
)
