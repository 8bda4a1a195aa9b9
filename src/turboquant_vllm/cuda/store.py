"""The native store: keys and values, rotated by a randomized Hadamard matrix and quantised, into pages in one launch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from turboquant_vllm.cuda.runtime import Kernel, aligned, launch, load_kernel

__all__ = ["SOURCE", "THREADS", "TokenWriter", "blocks_per_multiprocessor", "defines", "store"]

SOURCE = Path(__file__).with_name("store.cu")
PARAMS = "P" * 7 + "q" + "I" * 10 + "i" * 2
THREADS = 128
_SCALES = ("norm", "least_squares", "unbiased")
_ROWS = 8 * THREADS // 32  # of a block at a time


def defines(head_dim: int, dtype: torch.dtype, slot_dtype: torch.dtype, scale: str, blocks: int) -> dict[str, int | str]:
    """Macros of ``store.cu``."""
    return {
        "HEAD_DIM": head_dim,
        "BF16": int(dtype == torch.bfloat16),
        "SLOT": "int" if slot_dtype == torch.int32 else "long long",
        "SCALE": _SCALES.index(scale),
        "BLOCKS": blocks,
    }


def blocks_per_multiprocessor(head_dim: int, major: int) -> int:
    """Blocks that the registers of a multiprocessor of compute capability ``major`` have room for, without spills."""
    return {64: 8, 128: 5 if major < 10 else 4, 256: 3}[head_dim]


@cache
def _kernel(index: int, head_dim: int, dtype: torch.dtype, slot_dtype: torch.dtype, scale: str) -> tuple[Kernel, int]:
    """The kernel, and how many blocks run at once."""
    properties = torch.cuda.get_device_properties(index)
    blocks = blocks_per_multiprocessor(head_dim, properties.major)
    macros = defines(head_dim, dtype, slot_dtype, scale, blocks)
    kernel = load_kernel(SOURCE, "tq4_store", device=index, params=PARAMS, defines=macros)
    return kernel, properties.multi_processor_count * blocks


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

    Raises:
        RuntimeError: compiling or launching failed.
    """
    k, v, slots = aligned(k), aligned(v), slot_mapping.contiguous()
    rotation, companding, centroids = aligned(rotation.contiguous()), companding.contiguous(), centroids.contiguous()
    kernel, grid, arguments = _prepare(k, v, slots, buffer, rotation, companding, centroids, scale, page_size)
    launch(kernel, grid, (THREADS, 1, 1), 0, None, arguments)


class TokenWriter:
    """Stores one token of each sequence after the other into the same pages, where the host's time is what it takes.

    Args:
        k, v: ``[B, H_kv, D]``: those to come have their dtype, shape and strides.
        slots: int32 or int64 ``[calls, B]``, contiguous: where the tokens of each call go.
        buffer, rotation, companding, centroids, scale, page_size: as for :func:`store`, tables contiguous.
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
    ) -> None:
        found = _prepare(k, v, slots, buffer, rotation, companding, centroids, scale, page_size)
        self._kernel, self._grid, (_, _, self._slots, *self._others) = found
        self._row_bytes = slots.stride(0) * slots.element_size()
        self._keep = (slots, buffer, rotation, companding, centroids)

    def __call__(self, k: int, v: int, call: int) -> None:
        """Store the vectors at these addresses, multiples of 16, in the slots of call number ``call``."""
        arguments = (k, v, self._slots + call * self._row_bytes, *self._others)
        launch(self._kernel, self._grid, (THREADS, 1, 1), 0, None, arguments)


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
) -> tuple[Kernel, tuple[int, int, int], tuple[int, ...]]:
    """The kernel, its grid and its arguments."""
    tokens, heads, head_dim = k.shape
    rows = tokens * heads
    kernel, blocks = _kernel(k.get_device(), head_dim, k.dtype, slots.dtype, scale)
    (head_inverse, head_shift), (page_inverse, page_shift) = _inverse(heads), _inverse(page_size)
    arguments = (
        k.data_ptr(), v.data_ptr(), slots.data_ptr(), buffer.data_ptr(), rotation.data_ptr(), companding.data_ptr(),
        centroids.data_ptr(), buffer.stride(0), *_steps(k), *_steps(v), rows, heads, page_size,
        buffer.shape[0] * page_size, head_inverse, page_inverse, head_shift, page_shift,
    )  # fmt: skip
    # Half of the blocks for keys, half for values.
    return kernel, (min(-(-rows // _ROWS), max(1, blocks // 2)), 2, 1), arguments
