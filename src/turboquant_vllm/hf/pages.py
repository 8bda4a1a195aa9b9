"""Keys and values in pages: the tensor that stands for them, and the operators that read and write them."""

from __future__ import annotations

from typing import Any

import torch
from torch.library import Library

from turboquant_vllm.codec import TQ4Codec, TQ4Tensor
from turboquant_vllm.hf.tensors import DeferredTensor
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.rotation import RotationKind

__all__ = ["PAGE_SIZE", "PagedTensor", "packed_places", "put_places"]

PAGE_SIZE = 64


class PagedTensor(DeferredTensor):
    """Keys or values ``[B, H_kv, N, D]`` of a cache of fixed size, in pages; made of tensors and constants alone, as
    :class:`turboquant_vllm.hf.tensors.PackedTensor` is.

    Attributes:
        buffer: uint8 ``[pages, page_bytes]``, of a :class:`turboquant_vllm.paged.PagedTQ4Cache`.
        block_table: int32 ``[B, pages]``.
        length: int64 scalar, the tokens of each sequence that are in use.
        which: 0 for keys, 1 for values.
        heads: H_kv.
    """

    buffer: torch.Tensor
    block_table: torch.Tensor
    length: torch.Tensor
    rotation: torch.Tensor
    centroids: torch.Tensor
    kind: RotationKind
    which: int
    heads: int

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
    ) -> PagedTensor:
        shape = (block_table.shape[0], heads, tokens, rotation.shape[0])
        make: Any = torch.Tensor._make_wrapper_subclass
        self: PagedTensor = make(cls, shape, dtype=dtype, device=buffer.device)
        self.buffer, self.block_table, self.length = buffer, block_table, length
        self.rotation, self.centroids, self.kind = rotation, centroids, kind
        self.which, self.heads = which, heads
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
    ) -> PagedTensor:
        """The first ``tokens`` places of each sequence, to be read in ``dtype``."""
        tables = (codec.rotation, codec.centroids, codec.rotation_kind)
        return PagedTensor(buffer, block_table, length, *tables, which, heads, tokens, dtype)

    def dense(self) -> torch.Tensor:
        tables = (self.rotation, self.centroids, self.kind == "hadamard")
        read = torch.ops.turboquant.read_pages
        return read(self.buffer, self.block_table, self.heads, self.which, self.shape[2], *tables, self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["buffer", "block_table", "length", "rotation", "centroids"]
        return names, (self.kind, self.which, self.heads, self.shape[2], self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> PagedTensor:
        own = (inner["buffer"], inner["block_table"], inner["length"])
        return PagedTensor(*own, inner["rotation"], inner["centroids"], *context)


def packed_places(buffer: torch.Tensor, block_table: torch.Tensor, heads: int, which: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes ``[B, H_kv, N, D // 2]`` and norms ``[B, H_kv, N]`` of all places of all sequences: a copy."""
    cache = _cache(buffer, heads)
    codes, norms = ((cache.k_codes, cache.k_norms), (cache.v_codes, cache.v_norms))[which]
    table = block_table.long()
    return codes[table].transpose(1, 2).flatten(2, 3), norms[table].transpose(1, 2).flatten(2, 3)


def put_places(buffer: torch.Tensor, block_table: torch.Tensor, positions: torch.Tensor, packed: TQ4Tensor) -> None:
    """Write keys and values ``[2, B, H_kv, n, D]`` to places ``positions [n]`` of all sequences."""
    cache = _cache(buffer, packed.codes.shape[2])
    pages, places = block_table[:, positions // PAGE_SIZE].long(), positions % PAGE_SIZE
    for which, (codes, norms) in enumerate(((cache.k_codes, cache.k_norms), (cache.v_codes, cache.v_norms))):
        codes[pages, :, places] = packed.codes[which].transpose(1, 2)
        norms[pages, :, places] = packed.norms[which].transpose(1, 2)


def _cache(buffer: torch.Tensor, heads: int) -> PagedTQ4Cache:
    head_dim = buffer.shape[1] // (heads * PAGE_SIZE) - 8
    return PagedTQ4Cache(buffer, page_size=PAGE_SIZE, num_kv_heads=heads, head_dim=head_dim)


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
    dtype: torch.dtype,
) -> torch.Tensor:
    codes, norms = (x[:, :, :tokens] for x in packed_places(buffer, block_table, heads, which))
    return torch.ops.turboquant.decompress(codes, norms, centroids, rotation, signs, dtype)


def _read_pages_fake(
    buffer: torch.Tensor,
    block_table: torch.Tensor,
    heads: int,
    which: int,
    tokens: int,
    rotation: torch.Tensor,
    centroids: torch.Tensor,
    signs: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return buffer.new_empty((block_table.shape[0], heads, tokens, rotation.shape[0]), dtype=dtype)


def _write_pages(
    codes: torch.Tensor, norms: torch.Tensor, buffer: torch.Tensor, block_table: torch.Tensor, positions: torch.Tensor
) -> None:
    put_places(buffer, block_table, positions, TQ4Tensor(codes, norms))


def _write_pages_fake(*_: Any) -> None:
    pass


_LIBRARY = Library("turboquant", "FRAGMENT")
_LIBRARY.define(
    "read_pages(Tensor buffer, Tensor block_table, int heads, int which, int tokens, Tensor rotation, Tensor centroids, "
    "bool signs, ScalarType dtype) -> Tensor"
)
_LIBRARY.define("write_pages(Tensor codes, Tensor norms, Tensor(a!) buffer, Tensor block_table, Tensor positions) -> ()")
for _name, _run, _fake in (
    ("read_pages", _read_pages, _read_pages_fake),
    ("write_pages", _write_pages, _write_pages_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"turboquant::{_name}", _fake, lib=_LIBRARY)
