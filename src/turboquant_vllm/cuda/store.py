"""The native store: keys and values, rotated by a randomized Hadamard matrix and quantised, into pages in one launch.

What is compiled depends on the device, the head dimension, dtypes, the scale, and whether keys have offsets.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from turboquant_vllm.cuda.runtime import Kernel, aligned, launch, load_kernel
from turboquant_vllm.cuda.variants import device_limits
from turboquant_vllm.paged import slots_per_page

__all__ = ["THREADS", "TokenWriter", "defines", "source", "store", "teams_per_multiprocessor"]

SOURCES = tuple(Path(__file__).with_name(name) for name in ("store.cuh", "key_rows.cuh", "store_keys.cuh", "store.cu"))
PARAMS = "P" * 9 + "q" + "I" * 15 + "i" * 3
THREADS = 128  # of a team
_SCALES = ("norm", "least_squares", "unbiased")
_WARPS = THREADS // 32
_ROWS = 8 * _WARPS  # of a team at a time
_MOST_TOKENS = 64  # whose runs one team looks for


@cache
def source() -> str:
    """The text of the kernel."""
    return "".join(f'#line 1 "{path.name}"\n{path.read_text(encoding="utf-8")}' for path in SOURCES)


def defines(
    head_dim: int, dtype: torch.dtype, slot_dtype: torch.dtype, scale: str, has_offsets: bool, most_teams: int
) -> dict[str, int | str]:
    """Macros of the source."""
    return {
        "HEAD_DIM": head_dim,
        "BF16": int(dtype == torch.bfloat16),
        "SLOT": "int" if slot_dtype == torch.int32 else "long long",
        "SCALE": _SCALES.index(scale),
        "OFFSETS": int(has_offsets),
        "MOST_TEAMS": most_teams,
        "TEAM_BYTES": team_bytes(head_dim, has_offsets),
    }


def team_bytes(head_dim: int, has_offsets: bool) -> int:
    """Dynamic shared memory of a team: ``Shared`` of ``key_rows.cuh``."""
    return (64 * 2 + 9 * 4) * head_dim + 1216 if has_offsets else 0


def teams_per_multiprocessor(head_dim: int, major: int, has_offsets: bool) -> int:
    """Teams that the registers of a multiprocessor of compute capability ``major`` have room for, without spills."""
    if has_offsets:
        return {64: 4, 128: 4, 256: 3}[head_dim]
    return {64: 8 if major < 10 else 7, 128: 5 if major < 10 else 4, 256: 3}[head_dim]


@cache
def _kernel(
    index: int, head_dim: int, dtype: torch.dtype, slot_dtype: torch.dtype, scale: str, has_offsets: bool
) -> tuple[Kernel, int, int]:
    """The kernel, how many teams run at once, and how many may share a block."""
    (multiprocessors, shared_limit), (major, _) = device_limits(index), torch.cuda.get_device_capability(index)
    teams = teams_per_multiprocessor(head_dim, major, has_offsets)
    macros = defines(head_dim, dtype, slot_dtype, scale, has_offsets, teams)
    kernel = load_kernel(source(), "tq4_store", device=index, params=PARAMS, defines=macros)
    room = shared_limit // max(1, team_bytes(head_dim, has_offsets))
    of_block = min(teams, room) if major >= 9 else 1  # before that no kernel starts beside another
    return kernel, multiprocessors * teams, of_block


@cache
def _inverse(divisor: int) -> tuple[int, int]:
    """``(inverse, shift)`` such that ``x * inverse >> shift`` is ``x // divisor`` for x below 2^31; both fit 32 bits."""
    shift = 31 + (divisor - 1).bit_length()
    return (1 << shift) // divisor + 1, shift


def _steps(x: torch.Tensor) -> tuple[int, int]:
    """Bytes from one token to the next, and from one head to the next; 0 where there is no next."""
    (tokens, heads, _), (token, head, _) = x.shape, x.stride()
    return (2 * token if tokens > 1 else 0), (2 * head if heads > 1 else 0)


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
    leaves_room: bool = False,
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
        leaves_room: whether the kernel behind this one is to start beside it: few tokens then keep few multiprocessors.

    Raises:
        RuntimeError: compiling or launching failed.
    """
    k, v, slots = aligned(k), aligned(v), slot_mapping.contiguous()
    rotation, companding, centroids = aligned(rotation.contiguous()), companding.contiguous(), centroids.contiguous()
    if key_scales is not None:
        key_scales = key_scales.contiguous()
    if previous_slots is not None:
        previous_slots = previous_slots.to(slots.dtype).contiguous()
    how = (has_offsets, key_scales, previous_slots, leaves_room)
    kernel, sizes, arguments = _prepare(k, v, slots, buffer, rotation, companding, centroids, scale, page_size, *how)
    launch(kernel, *sizes, None, arguments)


class _Sizes(NamedTuple):
    """Of a launch: blocks, threads of each, and its bytes of dynamic shared memory."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


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
        how = (has_offsets, key_scales, previous_slots)
        found = _prepare(k, v, slots, buffer, rotation, companding, centroids, scale, page_size, *how)
        self._kernel, self._sizes, (_, _, self._slots, self._previous, *self._others) = found
        self._row_bytes = slots.stride(0) * slots.element_size()
        self._previous_row_bytes = self._row_bytes if previous_slots is not None else 0
        self._keep = (slots, buffer, rotation, companding, centroids, key_scales, previous_slots)

    def __call__(self, k: int, v: int, call: int) -> None:
        """Store the vectors at these addresses, multiples of 16, in the slots of call number ``call``."""
        slots, previous = self._slots + call * self._row_bytes, self._previous + call * self._previous_row_bytes
        arguments = (k, v, slots, previous, *self._others)
        launch(self._kernel, *self._sizes, None, arguments)


def _prepare(
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    buffer: torch.Tensor,
    rotation: torch.Tensor,
    companding: torch.Tensor,
    centroids: torch.Tensor,
    scale: str,
    page_size: int,
    has_offsets: bool,
    key_scales: torch.Tensor | None,
    previous_slots: torch.Tensor | None,
    leaves_room: bool = False,
) -> tuple[Kernel, _Sizes, tuple[int, ...]]:
    """The kernel, the sizes of its launch, and its arguments."""
    tokens, heads, head_dim = k.shape
    rows = tokens * heads
    kernel, teams, of_block = _kernel(k.get_device(), head_dim, k.dtype, slots.dtype, scale, has_offsets)
    page_slots = slots_per_page(page_size, has_offsets)
    (head_inverse, head_shift), (page_inverse, page_shift) = _inverse(heads), _inverse(page_slots)
    previous, scales = (0 if x is None else x.data_ptr() for x in (previous_slots, key_scales))
    # Half of the teams for keys, half for values; or for values, and teams without end for keys. Vectors are few if no
    # warp of a half takes more than it holds at once.
    half, few_rows = max(1, teams // 2), 256 // head_dim * _WARPS
    is_few = rows <= few_rows * half
    vector_teams = min(-(-rows // (few_rows if is_few else _ROWS)), half)
    span = min(_MOST_TOKENS, _WARPS * -(-rows // (_WARPS * teams)))
    all_teams = vector_teams + (-(-tokens // span) * heads if has_offsets else vector_teams)
    if not (is_few and leaves_room):
        of_block = 1
    arguments = (
        k.data_ptr(), v.data_ptr(), slots.data_ptr(), previous, buffer.data_ptr(), rotation.data_ptr(), companding.data_ptr(),
        centroids.data_ptr(), scales, buffer.stride(0), *_steps(k), *_steps(v), rows, heads, page_size, page_slots,
        buffer.shape[0] * page_slots, head_inverse, page_inverse, tokens, span, vector_teams, of_block, head_shift, page_shift,
        int(is_few),
    )  # fmt: skip
    grid = (-(-all_teams // of_block), 1, 1)
    return kernel, _Sizes(grid, (of_block * THREADS, 1, 1), of_block * team_bytes(head_dim, has_offsets)), arguments
