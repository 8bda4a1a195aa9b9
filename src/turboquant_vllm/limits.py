"""Which calls the native kernels serve, on a device that runs them. Loads neither ``cuda.core`` nor a compiler."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from turboquant_vllm.checks import DECODE_MAX_ROWS

__all__ = ["most_rows_over_pages", "why_not_decode", "why_not_decode_pages", "why_not_store", "why_not_store_triton"]

DECODE_HEAD_DIMS = (64, 128, 256)
# From this many query rows of a key/value head on, decompressing the keys first beats looking their levels up in place.
MANY_ROWS = 257
# Over pages the fused kernels take all sequences in one launch, and need not make any dense: from so many pairs of a query row
# and a key on, a sequence is worth launches of its own.
MANY_PAIRS = 1 << 22
MAX_SEQUENCES = 512  # of a batch over pages: what is known of each lies in shared memory


def why_not_decode(
    dtype: torch.dtype,
    head_dim: int,
    rows: int,
    operands: Sequence[torch.Tensor] = (),
) -> str:
    """Why the native CUDA kernels cannot serve a call on a device that runs them; empty where they can.

    Args:
        dtype: of the queries.
        head_dim: coordinates of a vector.
        rows: query rows (tokens x heads of the group) per key/value head.
        operands: keys and values ``[B, H_kv, N_kv, ...]``; their addresses are not looked at, as torch.compile knows none.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernels take queries in fp16 or bf16, got {dtype}"
    if head_dim not in DECODE_HEAD_DIMS:
        return f"the CUDA kernels take head_dim 64, 128 or 256, got {head_dim}"
    if rows > DECODE_MAX_ROWS:
        return f"the CUDA kernels take up to {DECODE_MAX_ROWS} query rows per key/value head, got {rows}"
    for x in operands:
        if x.dtype != torch.uint8:
            return f"the CUDA kernels take packed keys and values, got {x.dtype}"
        a, b, c, last = x.stride()
        if last != 1 or ((a | b | c) % 16 and any(x.stride(i) % 16 and x.shape[i] > 1 for i in range(3))):
            return f"the CUDA kernels take codes in whole rows, 16-byte multiples apart, got strides {tuple(x.stride())}"
    return ""


def most_rows_over_pages(head_dim: int) -> int:
    """Query rows per key/value head up to which the native kernels serve a sequence over pages."""
    return 16 if head_dim == 256 else DECODE_MAX_ROWS


def why_not_decode_pages(dtype: torch.dtype, head_dim: int, group: int, num_seqs: int) -> str:
    """As :func:`why_not_decode`, for the sequences over pages that have few rows; ``group``: rows of one query token."""
    if reason := why_not_decode(dtype, head_dim, group):
        return reason
    if group > most_rows_over_pages(head_dim):
        return f"the CUDA kernels take up to {most_rows_over_pages(head_dim)} query heads per key/value head, got {group}"
    if num_seqs > MAX_SEQUENCES:
        return f"the CUDA kernels take up to {MAX_SEQUENCES} sequences, got {num_seqs}"
    return ""


def why_not_store_triton(device: torch.device, head_dim: int, has_offsets: bool) -> str:
    """Why Triton cannot store vectors in a cache on a device that it runs on; empty where it can."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    if has_offsets and head_dim > 256 and device.type != "cpu" and not is_nvidia:
        # A group's keys are one tile, of 128 KiB at 512 coordinates.
        return f"Triton stores keys with offsets of head_dim up to 256 on GPUs that are not NVIDIA's, got {head_dim}"
    return ""


def why_not_store(k: torch.Tensor, v: torch.Tensor, hadamard: bool, num_slots: int) -> str:
    """Why the native CUDA kernel cannot store ``k, v [tokens, H_kv, D]`` on a device that runs it; empty where it can.

    Args:
        k, v: keys and values; their addresses are not looked at, as torch.compile knows none.
        hadamard: whether the rotation is a randomized Hadamard matrix.
        num_slots: of the cache.
    """
    if k.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernels store fp16 or bf16, got {k.dtype}"
    if not hadamard or k.shape[-1] not in DECODE_HEAD_DIMS:
        kind = "hadamard" if hadamard else "haar"
        return f"the CUDA kernels store with rotation 'hadamard' and head_dim 64, 128 or 256, got {kind!r} and {k.shape[-1]}"
    if max(num_slots, k.shape[0] * k.shape[1]) >= 2**31:
        return f"the CUDA kernels store fewer than 2^31 vectors, got {k.shape[0] * k.shape[1]} into {num_slots} slots"
    for x in (k, v):
        token, head, last = x.stride()
        if last == 1 and not (token | head) % 8 and max(token, head) < 2**31:
            continue
        apart = [stride for stride, size in zip(x.stride()[:2], x.shape[:2], strict=True) if size > 1]
        if x.stride(-1) != 1 or any(stride % 8 or stride >= 2**31 for stride in apart):
            return f"the CUDA kernels store whole vectors, 16-byte multiples apart, got strides {tuple(x.stride())}"
    return ""
