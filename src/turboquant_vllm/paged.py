"""PagedTQ4Cache: keys and values of many sequences as pages in a buffer that somebody else owns.

    cache = PagedTQ4Cache(buffer, page_size=16, num_kv_heads=8, head_dim=128)   # buffer uint8 [num_pages, page_bytes]
    cache.k_codes, cache.k_norms                                                # views into it, nothing is copied

A page holds ``page_size`` tokens, and for each key/value head one contiguous chunk of ``page_size * (head_dim + 8)`` bytes:

    K codes [page_size, head_dim / 2] | V codes [page_size, head_dim / 2] | K norms [page_size] | V norms [page_size]

With offsets of keys (:mod:`turboquant_vllm.reference_keys`) a page is a multiple of 64 tokens, and behind the chunks of all
heads are, head by head,

    offset and outlier of each group of 64 tokens, int8 [H_kv, page_size / 64, 2, head_dim] | steps [H_kv, page_size / 64, 4]

so that a chunk is a multiple of 128 bytes: reading codes that lie across sectors of memory takes a tenth longer.

Norms and steps are float32. Nothing else is padded: 136 bytes per token and key/value head at head_dim 128, with offsets
140.25. Since page sizes and head dimensions are multiples of 16, every row of codes begins on an 8-byte boundary and each of
the parts on a 16-byte one.

Token t of a sequence is in page ``block_table[sequence, t // page_size]``, at place ``t % page_size``; its *slot* is
``page * page_size + place``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turboquant_vllm.checks import MAX_HEAD_DIM, check_count, check_dtype, check_flag, check_shape
from turboquant_vllm.records import GROUP, Operand

__all__ = ["PagedTQ4Cache", "chunk_bytes", "page_views", "slots_per_page"]

MIN_PAGE_SIZE, MAX_PAGE_SIZE = 16, 256
_ALIGNMENT = 16
_NORM_BYTES = 4
_STEP_BYTES = 16  # of a group: two steps, a distance, four bytes to spare


@dataclass(frozen=True, eq=False, repr=False)
class PagedTQ4Cache:
    """A view of a buffer as pages of compressed keys and values. The buffer stays its owner's; nothing is copied.

    Args:
        buffer: uint8 ``[num_pages, page_bytes(...)]``; bytes of a page contiguous, pages any multiple of 16 bytes apart,
            the first on a 16-byte boundary. Its contents may be anything: unused slots are never read into a result.
        page_size: tokens in a page, a multiple of 16 from 16 to 256.
        num_kv_heads: key/value heads.
        head_dim: coordinates of a vector, a multiple of 16 from 16 to 512.
        has_offsets: whether keys have offsets; then page_size is a multiple of 64.

    Raises:
        TypeError, ValueError: an argument does not fit; names it, what was expected and what came.
    """

    buffer: torch.Tensor
    page_size: int
    num_kv_heads: int
    head_dim: int
    has_offsets: bool = False

    def __post_init__(self) -> None:
        width = self.page_bytes(self.page_size, self.num_kv_heads, self.head_dim, self.has_offsets)
        check_dtype("buffer", self.buffer, (torch.uint8,))
        check_shape("buffer", self.buffer, ("num_pages", width))
        pages, last = self.buffer.stride()
        if last != 1:
            raise ValueError(f"buffer must have the bytes of a page contiguous, got stride {last}")
        if self.num_pages > 1 and (pages < width or pages % _ALIGNMENT):
            raise ValueError(
                f"buffer must have its pages a multiple of {_ALIGNMENT} bytes apart and at least {width}, got {pages}"
            )
        if torch.compiler.is_compiling():
            return  # a tensor that is traced has no address
        try:
            address = self.buffer.data_ptr()
        except RuntimeError:  # nor has a fake one
            return
        for what, place in (("address", address), ("storage offset", self.buffer.storage_offset())):
            if place % _ALIGNMENT:
                raise ValueError(f"buffer must begin on a {_ALIGNMENT}-byte boundary, got {what} {place % _ALIGNMENT} past one")

    def __repr__(self) -> str:
        return (
            f"PagedTQ4Cache(num_pages={self.num_pages}, page_size={self.page_size}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, has_offsets={self.has_offsets}, device={str(self.device)!r})"
        )

    @staticmethod
    def page_bytes(page_size: int, num_kv_heads: int, head_dim: int, has_offsets: bool = False) -> int:
        """Bytes of one page: ``num_kv_heads * page_size * (head_dim + 8)``, with offsets ``num_kv_heads * page_size *
        (head_dim + 8 + (2 * head_dim + 16) / 64)``. Raises as the constructor does."""
        check_flag("has_offsets", has_offsets)
        check_count("page_size", page_size, MIN_PAGE_SIZE, MAX_PAGE_SIZE, multiple=GROUP if has_offsets else 16)
        check_count("num_kv_heads", num_kv_heads, 1)
        check_count("head_dim", head_dim, 16, MAX_HEAD_DIM, multiple=16)
        return num_kv_heads * chunk_bytes(page_size, head_dim, has_offsets)

    @classmethod
    def allocate(
        cls,
        num_pages: int,
        *,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        has_offsets: bool = False,
        device: torch.device | str | None = None,
    ) -> PagedTQ4Cache:
        """A cache in a new buffer of its own, whose contents are arbitrary."""
        check_count("num_pages", num_pages, 0)
        width = cls.page_bytes(page_size, num_kv_heads, head_dim, has_offsets)
        buffer = torch.empty((num_pages, width), dtype=torch.uint8, device=device)
        return cls(buffer, page_size=page_size, num_kv_heads=num_kv_heads, head_dim=head_dim, has_offsets=has_offsets)

    @classmethod
    def of_checked(
        cls, buffer: torch.Tensor, page_size: int, num_kv_heads: int, head_dim: int, has_offsets: bool = False
    ) -> PagedTQ4Cache:
        """As the constructor, for a buffer that a cache was made of before."""
        cache = object.__new__(cls)
        values = (buffer, page_size, num_kv_heads, head_dim, has_offsets)
        for name, value in zip(cls.__dataclass_fields__, values, strict=True):
            object.__setattr__(cache, name, value)
        return cache

    @property
    def num_pages(self) -> int:
        """Pages in the buffer."""
        return self.buffer.shape[0]

    @property
    def slots_per_page(self) -> int:
        """How far the slots of a page are from those of the next: ``page_size``."""
        return slots_per_page(self.page_size, self.has_offsets)

    @property
    def num_slots(self) -> int:
        """Tokens that the buffer has room for."""
        return self.num_pages * self.slots_per_page

    @property
    def device(self) -> torch.device:
        """Where the buffer is."""
        return self.buffer.device

    @property
    def keys(self) -> Operand:
        """Views of the keys, with pages for sequences and places for tokens."""
        return page_views(self.buffer, self.page_size, self.num_kv_heads, self.head_dim, self.has_offsets)[0]

    @property
    def values(self) -> Operand:
        """As :attr:`keys`, of the values."""
        return page_views(self.buffer, self.page_size, self.num_kv_heads, self.head_dim, self.has_offsets)[1]

    @property
    def k_codes(self) -> torch.Tensor:
        """Codes of the keys, a uint8 view ``[num_pages, num_kv_heads, page_size, head_dim // 2]``."""
        return self.keys.data

    @property
    def v_codes(self) -> torch.Tensor:
        """Codes of the values, a uint8 view ``[num_pages, num_kv_heads, page_size, head_dim // 2]``."""
        return self.values.data

    @property
    def k_norms(self) -> torch.Tensor:
        """Norms of the keys, a float32 view ``[num_pages, num_kv_heads, page_size]``."""
        norms = self.keys.norms
        assert norms is not None
        return norms

    @property
    def v_norms(self) -> torch.Tensor:
        """Norms of the values, a float32 view ``[num_pages, num_kv_heads, page_size]``."""
        norms = self.values.norms
        assert norms is not None
        return norms


def slots_per_page(page_size: int, has_offsets: bool) -> int:
    """How far the slots of a page of any size are from those of the next: whole groups, of which the last may lack places."""
    return -(-page_size // GROUP) * GROUP if has_offsets else page_size


def chunk_bytes(page_size: int, head_dim: int, has_offsets: bool) -> int:
    """Bytes of one head of a page of any size; without offsets, of codes and norms: how far one head's are from the next's."""
    groups = -(-page_size // GROUP) if has_offsets else 0
    return page_size * (head_dim + 2 * _NORM_BYTES) + groups * (2 * head_dim + _STEP_BYTES)


def page_views(
    buffer: torch.Tensor, page_size: int, num_kv_heads: int, head_dim: int, has_offsets: bool
) -> tuple[Operand, Operand]:
    """Keys and values of pages ``[num_pages, page_bytes]`` of any size, as views with places for tokens."""
    groups = -(-page_size // GROUP) if has_offsets else 0
    codes, norms = page_size * head_dim // 2, page_size * _NORM_BYTES
    sizes = (2 * (codes + norms), groups * 2 * head_dim, groups * _STEP_BYTES)
    parts = buffer.split([num_kv_heads * size for size in sizes], -1)
    chunks = parts[0].unflatten(-1, (num_kv_heads, -1))
    k, v, k_norms, v_norms = chunks.split((codes, codes, norms, norms), -1)
    keys, values = (
        Operand(x.unflatten(-1, (page_size, head_dim // 2)), n.view(torch.float32)) for x, n in ((k, k_norms), (v, v_norms))
    )
    if has_offsets:
        shared, steps = parts[1].view(torch.int8), parts[2].view(torch.float32)
        keys = keys._replace(
            groups=shared.unflatten(-1, (num_kv_heads, groups, 2, head_dim)),
            steps=steps.unflatten(-1, (num_kv_heads, groups, 4)),
        )
    return keys, values
