"""The native store: keys and values, rotated by a randomized Hadamard matrix and quantised, into pages in one launch.

What is compiled depends on the device, the head dimension, dtypes, the scale, and whether keys have offsets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from turboquant_vllm.cuda.runtime import Kernel, aligned, compile_for, launch, load_kernel
from turboquant_vllm.cuda.sources import STORE_PARAMS, store_source
from turboquant_vllm.cuda.variants import STORING_WARPS, Stored, device_limits, team_bytes
from turboquant_vllm.paged import slots_per_page

__all__ = [
    "THREADS",
    "Kernels",
    "New",
    "TeamDivision",
    "TokenWriter",
    "defines",
    "packed_teams",
    "store",
    "teams_per_multiprocessor",
]  # fmt: skip

THREADS = 32 * STORING_WARPS  # of a team
_MOST_TOKENS = 64  # whose runs one team looks for


def defines(head_dim: int, stored: Stored, has_offsets: bool, teams: int, blocks: int) -> dict[str, int | str]:
    """Macros of the source, for ``teams`` teams of a block and ``blocks`` blocks of a multiprocessor."""
    own = {"HEAD_DIM": head_dim, "OFFSETS": int(has_offsets), "TEAMS": teams, "BLOCKS": blocks}
    return {**stored.defines, **own, "TEAM_BYTES": team_bytes(head_dim, has_offsets)}


def teams_per_multiprocessor(head_dim: int, major: int, has_offsets: bool) -> int:
    """Teams that the registers of a multiprocessor of compute capability ``major`` have room for, without spills."""
    if has_offsets:
        return {64: 5 if major > 8 else 4, 128: 4, 256: 3}[head_dim]
    return {64: 8 if major < 10 else 7, 128: 5 if major < 10 else 4, 256: 3}[head_dim]


@dataclass(frozen=True)
class Kernels:
    """What is compiled of the store for a device.

    Attributes:
        alone: of blocks of one team.
        at_once: how many teams of these run at once.
        packed: of blocks of several teams, for few tokens; before compute capability 9.0, where no kernel starts beside
            another, ``alone``.
        teams: of such a block.
    """

    alone: Kernel
    at_once: int
    packed: Kernel
    teams: int


def packed_teams(head_dim: int, has_offsets: bool, shared_limit: int) -> int:
    """Teams that share a block: up to four, if registers and ``shared_limit`` bytes of shared memory have room for these."""
    room = shared_limit // max(1, team_bytes(head_dim, has_offsets))
    return min(3 if head_dim == 256 else 4, room)


@cache
def _kernels(index: int, head_dim: int, stored: Stored, has_offsets: bool) -> Kernels:
    (multiprocessors, shared_limit), (major, _) = device_limits(index), torch.cuda.get_device_capability(index)
    blocks = teams_per_multiprocessor(head_dim, major, has_offsets)
    teams = packed_teams(head_dim, has_offsets, shared_limit) if major >= 9 else 1
    macros = [defines(head_dim, stored, has_offsets, 1, blocks), defines(head_dim, stored, has_offsets, teams, 1)]
    macros = macros[: 1 if teams == 1 else 2]
    compile_for(index, "tq4_store", [(store_source(), some) for some in macros])
    found = [load_kernel(store_source(), "tq4_store", device=index, params=STORE_PARAMS, defines=some) for some in macros]
    return Kernels(found[0], multiprocessors * blocks, found[-1], teams)


@cache
def _inverse(divisor: int) -> tuple[int, int]:
    """``(inverse, shift)`` such that ``x * inverse >> shift`` is ``x // divisor`` for x below 2^31; both fit 32 bits."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


def _steps(x: torch.Tensor) -> tuple[int, int]:
    """Bytes from one token to the next, and from one head to the next; 0 where there is no next."""
    (tokens, heads, _), (token, head, _) = x.shape, x.stride()
    return (2 * token if tokens > 1 else 0), (2 * head if heads > 1 else 0)


class TeamDivision(NamedTuple):
    """How a store's work is divided.

    Attributes:
        span: tokens whose runs of keys with offsets a team looks for.
        vector_teams: that have values, and as many have keys without offsets.
        is_few: whether no warp of these has more vectors than it holds at once.
        teams: in all.
    """

    span: int
    vector_teams: int
    is_few: bool
    teams: int

    @classmethod
    def choose(cls, tokens: int, heads: int, head_dim: int, has_offsets: bool, at_once: int) -> TeamDivision:
        """Half of the ``at_once`` teams that run together for keys, half for values; or for values, and teams without end for
        keys with offsets."""
        rows, half, few_rows = tokens * heads, max(1, at_once // 2), 256 // head_dim * STORING_WARPS
        is_few = rows <= few_rows * half
        vector_teams = min(-(-rows // (few_rows if is_few else 8 * STORING_WARPS)), half)
        span = min(_MOST_TOKENS, STORING_WARPS * -(-rows // (STORING_WARPS * at_once)))
        return cls(span, vector_teams, is_few, vector_teams + (-(-tokens // span) * heads if has_offsets else vector_teams))


class Sizes(NamedTuple):
    """Of a launch: blocks, threads of each, and its bytes of dynamic shared memory."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


@dataclass(frozen=True)
class New:
    """Keys and values to be stored, where, and what writes them: arguments of :func:`store`."""

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    buffer: torch.Tensor
    rotation: torch.Tensor
    companding: torch.Tensor
    centroids: torch.Tensor
    scale: str
    page_size: int
    has_offsets: bool = False
    key_scales: torch.Tensor | None = None
    previous_slots: torch.Tensor | None = None

    def laid_out(self) -> New:
        """The same as the kernel reads it: copies of what does not lie so."""
        scales, previous = self.key_scales, self.previous_slots
        return replace(
            self,
            k=aligned(self.k),
            v=aligned(self.v),
            slots=self.slots.contiguous(),
            rotation=aligned(self.rotation.contiguous()),
            companding=self.companding.contiguous(),
            centroids=self.centroids.contiguous(),
            key_scales=None if scales is None else scales.contiguous(),
            previous_slots=None if previous is None else previous.to(self.slots.dtype).contiguous(),
        )

    @property
    def stored(self) -> Stored:
        """What is compiled for them."""
        return Stored(self.k.dtype, self.slots.dtype, self.scale)

    def arguments(self, division: TeamDivision, of_block: int) -> tuple[int, ...]:
        """Of the kernel, in blocks of ``of_block`` teams."""
        tokens, heads, _ = self.k.shape
        page_slots = slots_per_page(self.page_size, self.has_offsets)
        (head_inverse, head_shift), (page_inverse, page_shift) = _inverse(heads), _inverse(page_slots)
        previous, scales = (0 if x is None else x.data_ptr() for x in (self.previous_slots, self.key_scales))
        tables = (self.rotation.data_ptr(), self.companding.data_ptr(), self.centroids.data_ptr(), scales)
        return (
            self.k.data_ptr(), self.v.data_ptr(), self.slots.data_ptr(), previous, self.buffer.data_ptr(), *tables,
            self.buffer.stride(0), *_steps(self.k), *_steps(self.v), tokens * heads, heads, self.page_size, page_slots,
            self.buffer.shape[0] * page_slots, head_inverse, page_inverse, tokens, division.span, division.vector_teams,
            of_block, head_shift, page_shift, int(division.is_few),
        )  # fmt: skip

    def prepare(self, leaves_room: bool = False) -> tuple[Kernel, Sizes, tuple[int, ...]]:
        """The store's kernel, the sizes of its launch and its arguments. ``leaves_room``: teams share blocks where tokens are
        few, so that a kernel which starts beside this one finds multiprocessors of its own."""
        tokens, heads, head_dim = self.k.shape
        kernels = _kernels(self.k.get_device(), head_dim, self.stored, self.has_offsets)
        division = TeamDivision.choose(tokens, heads, head_dim, self.has_offsets, kernels.at_once)
        kernel, of_block = (kernels.packed, kernels.teams) if leaves_room and division.is_few else (kernels.alone, 1)
        shared_bytes = of_block * team_bytes(head_dim, self.has_offsets)
        sizes = Sizes((-(-division.teams // of_block), 1, 1), (of_block * THREADS, 1, 1), shared_bytes)
        return kernel, sizes, self.arguments(division, of_block)

    def store(self, leaves_room: bool = False) -> None:
        """Launch the store."""
        kernel, sizes, arguments = self.prepare(leaves_room)
        launch(kernel, *sizes, None, arguments)


def store(
    k: torch.Tensor,
    v: torch.Tensor,
    buffer: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor,
    companding: torch.Tensor,
    centroids: torch.Tensor,
    scale: str,
    page_size: int,
    has_offsets: bool = False,
    key_scales: torch.Tensor | None = None,
    previous_slots: torch.Tensor | None = None,
) -> None:
    """As :func:`turboquant_vllm.reference.store`, with the boundaries as :func:`turboquant_vllm.codebook.companding`.

    Arguments must have passed :func:`turboquant_vllm.limits.why_not_store`.

    Args:
        k, v: fp16 or bf16 ``[tokens, H_kv, D]``, D 64, 128 or 256, rows contiguous and 16-byte multiples apart; copied if
            they do not begin on a 16-byte boundary.
        buffer: of a :class:`turboquant_vllm.PagedTQ4Cache` with fewer than 2^31 slots.
        slot_mapping: int32 or int64 ``[tokens]``.
        rotation: float32 ``[D, D]``, a Sylvester-Hadamard matrix times signs of its columns, over sqrt(D).
        companding: float32 ``[6]``.
        centroids: float32 ``[16]``.
        scale: "norm", "least_squares" or "unbiased".
        page_size: tokens in a page.
        has_offsets: whether keys have offsets; then the slots of a page begin at a multiple of 64.
        key_scales: of such keys, float32 ``[H_kv, D]``, or None.
        previous_slots: of such keys, int32 or int64 ``[tokens]``, or None.

    Raises:
        RuntimeError: compiling or launching failed.
    """
    how = (scale, page_size, has_offsets, key_scales, previous_slots)
    New(k, v, slot_mapping, buffer, rotation, companding, centroids, *how).laid_out().store()


class TokenWriter:
    """Stores one token of each sequence after the other into the same pages, where the host's time is what it takes.

    Args:
        k, v: ``[B, H_kv, D]``: those to come have their dtype, shape and strides.
        slots: int32 or int64 ``[calls, B]``, contiguous: where the tokens of each call go.
        buffer, rotation, companding, centroids, scale, page_size: as for :func:`store`, tables contiguous.
        has_offsets, key_scales: likewise.
        previous_slots: as ``slots``, in dtype and strides, or None.
    """

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        buffer: torch.Tensor,
        rotation: torch.Tensor,
        companding: torch.Tensor,
        centroids: torch.Tensor,
        scale: str,
        page_size: int,
        has_offsets: bool = False,
        key_scales: torch.Tensor | None = None,
        previous_slots: torch.Tensor | None = None,
    ) -> None:
        how = (scale, page_size, has_offsets, key_scales, previous_slots)
        new = New(k, v, slots, buffer, rotation, companding, centroids, *how)
        self._kernel, self._sizes, (_, _, self._slots, self._previous, *self._others) = new.prepare()
        self._row_bytes = slots.stride(0) * slots.element_size()
        self._previous_row_bytes = self._row_bytes if previous_slots is not None else 0
        self._keep = (slots, buffer, rotation, companding, centroids, key_scales, previous_slots)

    def __call__(self, k: int, v: int, call: int) -> None:
        """Store the vectors at these addresses, multiples of 16, in the slots of call number ``call``."""
        slots, previous = self._slots + call * self._row_bytes, self._previous + call * self._previous_row_bytes
        arguments = (k, v, slots, previous, *self._others)
        launch(self._kernel, *self._sizes, None, arguments)
