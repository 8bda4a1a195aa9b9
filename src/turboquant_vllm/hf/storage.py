"""Storage of one layer's packed keys and values: a buffer that grows in steps, and the part of it that is in use.

The buffer is laid out as one page of a :class:`turboquant_vllm.paged.PagedTQ4Cache` for each sequence, as long as the buffer
has room for tokens. So the native kernel that writes pages writes it, too: keys and values in one launch, straight to their
places.
"""

from __future__ import annotations

from typing import Any

import torch

from turboquant_vllm import ops
from turboquant_vllm.codec import TQ4Codec, TQ4Keys, TQ4Tensor
from turboquant_vllm.cuda.decode import Operands
from turboquant_vllm.cuda.store import TokenWriter, store
from turboquant_vllm.fakes import keep_real
from turboquant_vllm.limits import DECODE_HEAD_DIMS, why_not_store, why_not_store_triton
from turboquant_vllm.paged import chunk_bytes, page_views, slots_per_page
from turboquant_vllm.records import GROUP, Operand

__all__ = ["HALVES", "PackedStorage", "check_sizes", "codec_for", "natively_stored", "store_backend", "store_tokens"]

HALVES = (torch.float16, torch.bfloat16)

# Room beyond what is needed: a share of it, so that long buffers are seldom copied, and where tokens are added to others up to
# a number as large as theirs, so that short ones are not copied often either.
_SPARE_SHARE, _SPARE_TOKENS = 32, 256
_WHOLE = 4  # capacities are multiples of this: parts of a page begin on 16-byte boundaries if head_dim is a multiple of 8
# Up to this many new tokens, keys and values are compressed in one call, on a copy.
_FEW_TOKENS = 64


@keep_real()
def _shared_codec(head_dim: int, seed: int, device: torch.device) -> TQ4Codec:
    with torch.inference_mode(False):
        return TQ4Codec(head_dim, seed=seed, device=device)


def codec_for(head_dim: int, seed: int, device: torch.device, key_scales: torch.Tensor | None = None) -> TQ4Codec:
    """The codec that all layers of that head dimension on that device share, with scales that have been checked."""
    codec = _shared_codec(head_dim, seed, device)
    if key_scales is None:
        return codec
    with torch.inference_mode(False):
        return codec.with_checked_scales(key_scales)


@keep_real(4)
def _slots(batch: int, count: int, device: torch.device) -> torch.Tensor:
    """Slots of the tokens of all sequences, ``count`` each, int32 ``[count, batch]``; layers of the same size share it."""
    with torch.inference_mode(False):
        first = torch.arange(batch, dtype=torch.int32, device=device) * count
        return first + torch.arange(count, dtype=torch.int32, device=device)[:, None]


def _layout(keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, ...]:
    """All that decides how a token's keys and values are stored, but for their addresses."""
    return (
        keys.dtype, keys.shape, keys.stride(), keys.get_device(), keys.requires_grad,
        values.dtype, values.shape, values.stride(), values.get_device(), values.requires_grad,
    )  # fmt: skip


def check_sizes(got: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    """Whether states have the batch, heads and head dimension of those before: kernels take that for granted."""
    if got != expected:
        names = "sequences, heads and head dimension"
        raise ValueError(f"keys: expected {names} {list(expected)}, as the cache holds, got {list(got)}")


def natively_stored(codec: TQ4Codec) -> bool:
    """Whether the native kernel stores vectors of half precision for ``codec``, on its device."""
    return codec.rotation_kind == "hadamard" and codec.head_dim in DECODE_HEAD_DIMS and not ops.why_not_cuda(codec.device)


def store_backend(states: torch.Tensor, native: bool, has_offsets: bool) -> str:
    """What writes states ``[..., D]``; ``native``: whether the native kernel may."""
    if native and states.dtype in HALVES:
        return "cuda"
    serves = ops.triton_runs_on(states.device) and not why_not_store_triton(states.device, states.shape[-1], has_offsets)
    return "triton" if serves and states.dtype != torch.float64 else "reference"


def store_tokens(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    buffer: torch.Tensor,
    codec: TQ4Codec,
    page_size: int,
    backend: str,
    has_offsets: bool = False,
    previous_slots: torch.Tensor | None = None,
) -> None:
    """Compress ``[B, H_kv, n, D]`` keys and values into pages, in one launch, or in one for each sequence if n is not 1.

    ``slots`` and ``previous_slots`` are ``[n, B]``, or ``[B]`` for one token; the rest as the operator ``turboquant::store``
    takes it.
    """
    if keys.shape[2] == 1:
        calls: Any = [(keys.select(2, 0), values.select(2, 0), slots.view(-1))]
        before: Any = [None if previous_slots is None else previous_slots.view(-1)]
    else:
        calls = list(zip(keys.transpose(1, 2), values.transpose(1, 2), slots.unbind(1), strict=True))
        before = [None] * len(calls) if previous_slots is None else previous_slots.unbind(1)
    if backend == "cuda" and why_not_store(
        calls[0][0], calls[0][1], True, 0
    ):  # vectors that do not lie as the kernel needs them
        keys, values = keys.contiguous(), values.contiguous()
        return store_tokens(keys, values, slots, buffer, codec, page_size, backend, has_offsets, previous_slots)
    for (k, v, to), previous in zip(calls, before, strict=True):
        offsets = (True, codec.key_scales, previous) if has_offsets else ()
        if backend == "cuda" and not torch.compiler.is_compiling():  # the operator would take longer than its kernel
            store(k, v, buffer, to, codec.rotation, codec.companding, codec.centroids, codec.scale, page_size, *offsets)
            continue
        torch.ops.turboquant.store.default(k, v, buffer, to, *codec.writing, page_size, backend, *offsets)


class PackedStorage:
    """Keys and values in 4 bits: tokens ``start`` to ``stop`` of a buffer with room for more.

    Attributes:
        codec: of keys and values.
        has_offsets: whether keys have offsets; then ``start`` is always where a group begins.
        buffer: uint8 ``[B, H_kv * chunk]``.
        capacity: tokens of each sequence that the buffer has room for.
        keys, values: views of it, with room for more tokens.
        operands: of attention over it, where the native kernels run; else None.
        start, stop: the tokens in use.
    """

    # What writes a token that lies as the last one did, and how that lay, if the native kernel does.
    _writer: TokenWriter | None
    _layout: tuple[Any, ...] | None

    def __init__(self, codec: TQ4Codec, batch: int, num_heads: int, has_offsets: bool = False) -> None:
        self.codec, self.num_heads, self.has_offsets = codec, num_heads, has_offsets
        self.start = self.stop = 0
        self._allocate(batch, _WHOLE)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of, by ``copy.deepcopy`` or pickle: views and addresses are of this buffer alone."""
        names = ("num_heads", "has_offsets", "start", "stop", "capacity", "buffer")
        codec = (self.codec.head_dim, self.codec.seed)
        return {"codec": codec, "key_scales": self.codec.key_scales, **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("num_heads", "has_offsets", "start", "stop"):
            setattr(self, name, state[name])
        buffer = state["buffer"]
        head_dim, seed = state["codec"]
        self.codec = codec_for(head_dim, seed, buffer.device, state["key_scales"])
        with torch.inference_mode(False):
            self._use(buffer.clone() if buffer.is_inference() else buffer, state["capacity"])

    @property
    def device(self) -> torch.device:
        """Where the buffer is."""
        return self.buffer.device

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer, whether in use or not."""
        return self.buffer.nbytes

    def repeats(self, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """Whether these are a token that lies as the last one did, which has been checked, and there is room for it."""
        return (
            self._writer is not None
            and self.stop < self.capacity
            and _layout(keys, values) == self._layout
            and not (keys.data_ptr() | values.data_ptr()) % 16
        )

    def append(self, keys: torch.Tensor, values: torch.Tensor, again: bool = False) -> None:
        """Compress ``[B, H_kv, n, D]`` keys and values behind the last token; ``again``: what :meth:`repeats` says of them."""
        if again:  # in the least time
            assert self._writer is not None
            self._writer(keys.data_ptr(), values.data_ptr(), self.stop)
            self.stop += 1
            return
        batch, num_heads, count, head_dim = keys.shape
        check_sizes((batch, num_heads, head_dim), (self.buffer.shape[0], self.num_heads, self.codec.head_dim))
        first = self._take(count)
        if count == 1 and self._native:
            self._expect_more(keys, values)
        if self.has_offsets:
            slots = self._slots()[first : self.stop]
            backend = store_backend(keys, self._native, True)
            store_tokens(keys, values, slots, self.buffer, self.codec, self.capacity, backend, True)
        elif self._native and keys.dtype in HALVES:
            slots = self._slots()
            slots = slots[first] if count == 1 else slots[first : self.stop]
            store_tokens(keys, values, slots, self.buffer, self.codec, self.capacity, "cuda")
        elif count <= _FEW_TOKENS:
            self._put(first, *self.codec.compress(torch.stack((keys, values))))
        else:
            for part, states in enumerate((keys, values)):  # one after the other, so that the codes of one alone exist twice
                self._put_part(part, first, *self.codec.compress(states))

    def put(self, keys: TQ4Tensor | TQ4Keys, values: TQ4Tensor) -> None:
        """Append keys and values ``[B, H_kv, n, D]`` that are packed already; the first of keys with offsets begins a group."""
        count = values.norms.shape[2]
        self._take(count)
        for part, given in zip(self.last(count), (keys, values), strict=True):
            for to, x in zip(part, given, strict=False):
                assert to is not None
                to.copy_(x)

    def last(self, count: int) -> tuple[Operand, Operand]:
        """Keys and values of the last ``count`` tokens, a number of :meth:`readable`; views, to be read before the next
        change."""
        first = self.stop - count
        return self.keys.tokens(first, count), self.values.tokens(first, count)

    def readable(self, count: int) -> int:
        """The least number of last tokens, ``count`` or more, that can be read by themselves."""
        return self.stop - (self.stop - count) // GROUP * GROUP if self.has_offsets else count

    def keep_last(self, count: int) -> None:
        """Forget all but the last ``count`` tokens, and those of their groups."""
        self.start = max(self.start, self.stop - self.readable(count))

    def remove_last(self, count: int) -> None:
        """Forget the last ``count`` tokens, or all there are."""
        self.stop = max(self.start, self.stop - count)

    def select(self, sequences: torch.Tensor) -> None:
        """Replace the batch by the sequences of an index, int64 ``[n]``."""
        with torch.inference_mode(False):
            self._use(self.buffer.index_select(0, sequences.to(self.device)), self.capacity)

    def move(self, device: torch.device) -> None:
        """Bring the buffer to ``device``; copies to or from a GPU are queued, not waited for."""
        if device != self.buffer.device:
            self.codec = codec_for(self.codec.head_dim, self.codec.seed, device, self.codec.key_scales)
            with torch.inference_mode(False):
                self._use(self.buffer.to(device, non_blocking=True), self.capacity)

    def _slots(self) -> torch.Tensor:
        """Of all tokens that there may be room for, int32 ``[tokens, B]``; some behind the last are places of no token."""
        count = slots_per_page(self.capacity, self.has_offsets)
        return _slots(self.buffer.shape[0], count, self.buffer.device)

    def _take(self, count: int) -> int:
        """The first of ``count`` more places; they are in use from now on."""
        if self.stop + count > self.capacity:
            self._make_room(count)
        first, self.stop = self.stop, self.stop + count
        return first

    def _make_room(self, count: int) -> None:
        """Move what is in use to the front of a larger buffer, with room to spare beyond ``count`` more tokens."""
        needed = len(self) + count
        spare = needed // _SPARE_SHARE
        if len(self):
            spare = max(spare, min(needed, _SPARE_TOKENS))
        old = self.last(len(self))
        whole = max(-(-needed // _WHOLE), (needed + spare) // _WHOLE)
        self._allocate(self.buffer.shape[0], whole * _WHOLE)
        self.start, self.stop = 0, len(self)
        for part, x in zip(self.last(self.stop), old, strict=True):
            for to, tensor in zip(part, x, strict=True):
                if to is not None and tensor is not None:
                    to.copy_(tensor)

    def _expect_more(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Get ready for tokens that lie as this one does."""
        k, v = keys.select(2, 0), values.select(2, 0)
        self._writer, self._layout = None, _layout(keys, values)
        graph = keys.requires_grad or values.requires_grad
        if keys.dtype in HALVES and not graph and not why_not_store(k, v, True, 0):
            slots, codec = self._slots(), self.codec
            how = (codec.rotation, codec.companding, codec.centroids, codec.scale, self.capacity)
            offsets = (True, codec.key_scales) if self.has_offsets else ()
            self._writer = TokenWriter(k, v, slots, self.buffer, *how, *offsets)

    def _put(self, first: int, codes: torch.Tensor, norms: torch.Tensor) -> None:
        for part in (0, 1):
            self._put_part(part, first, codes[part], norms[part])

    def _put_part(self, part: int, first: int, codes: torch.Tensor, norms: torch.Tensor) -> None:
        to = (self.keys, self.values)[part].tokens(first, codes.shape[2])
        to.data.copy_(codes)
        assert to.norms is not None
        to.norms.copy_(norms)

    def _allocate(self, batch: int, capacity: int) -> None:
        width = self.num_heads * chunk_bytes(capacity, self.codec.head_dim, self.has_offsets)
        # A tensor born in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self._use(torch.empty((batch, width), dtype=torch.uint8, device=self.codec.device), capacity)

    def _use(self, buffer: torch.Tensor, capacity: int) -> None:
        """Use this buffer from now on."""
        self.buffer, self.capacity = buffer, capacity
        self.keys, self.values = page_views(buffer, capacity, self.num_heads, self.codec.head_dim, self.has_offsets)
        # The native kernel counts the bytes of a page, and all slots, in 32 bits.
        small = buffer.shape[0] * slots_per_page(capacity, self.has_offsets) < 2**31 and buffer.shape[1] < 2**32
        self._native = small and natively_stored(self.codec)
        whole = self._native and not buffer.data_ptr() % 16  # a copy that begins on a boundary would miss later tokens
        tables = self.codec.key_tables if self.has_offsets else self.codec.tables
        self.operands = Operands(self.keys, self.values, tables, hadamard=True) if whole else None
        self._layout = self._writer = None
