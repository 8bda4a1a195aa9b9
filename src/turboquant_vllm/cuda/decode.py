"""The native decode: attention of up to 32 query rows per key/value head over packed keys and values, in two launches.

The first kernel attends to parts of the keys, the second joins the parts; both are in ``decode.cu``. What is compiled
depends on the device, the head dimension and the number of rows, never on a length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from turboquant_vllm.checks import why_not_decode
from turboquant_vllm.cuda.runtime import Kernel, launch, load_kernel

__all__ = ["Variant", "choose_variant", "decode", "prepare", "split_length"]

SOURCE = Path(__file__).with_name("decode.cu")
DECODE_PARAMS = "P" * 9 + "q" * 16 + "i" * 11 + "f"
COMBINE_PARAMS = "P" * 5 + "i" * 6

_TABLE_BYTES = 65536
_SPLITS, _SPLIT_STEP, _MIN_SPLIT = 128, 256, 512
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class Variant:
    """Compile-time choices: tiles of four rows in one pass, warps of a block, tiles of 16 tokens in each warp's ring."""

    head_dim: int
    row_tiles: int
    warps: int
    stages: int
    query_in_registers: bool

    @property
    def defines(self) -> dict[str, int]:
        """Macros of ``decode.cu``."""
        return {
            "HEAD_DIM": self.head_dim,
            "NT": self.row_tiles,
            "WARPS": self.warps,
            "STAGES": self.stages,
            "Q_IN_REGISTERS": int(self.query_in_registers),
        }

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block of the first kernel: table, rings, merge area, query, state."""
        columns = (self.row_tiles + 1) // 2
        ring = self.warps * self.stages * (16 * self.head_dim + 128)
        merge = self.warps * 16 * self.head_dim
        query = columns * (16 * self.head_dim + 32)
        return _TABLE_BYTES + ring + merge + query + self.warps * self.row_tiles * 32


@cache
def choose_variant(head_dim: int, rows: int, shared_limit: int) -> Variant:
    """The variant for ``rows`` rows per key/value head, within ``shared_limit`` bytes of shared memory per block."""
    most = 8 if head_dim == 64 else 4  # the sums of more rows do not fit the registers: more passes
    row_tiles = next(n for n in (1, 2, 4, 8) if n == most or 4 * n >= rows)
    in_registers = row_tiles <= 2
    many_warps = 16 if head_dim <= 128 and row_tiles * head_dim <= 256 else 8
    candidates = (
        Variant(head_dim, row_tiles, warps, stages, in_registers)
        for warps in (16, 8, 4, 2)
        if warps <= many_warps
        for stages in range(max(3, 96 // warps * 64 // head_dim), 1, -1)
    )
    return next(variant for variant in candidates if variant.shared_bytes <= shared_limit)


def split_length(kv_len: int, num_kv_heads: int) -> int:
    """Keys per split: a function of one sequence's sizes alone, so that a batch changes no bits."""
    splits = -(-_SPLITS // num_kv_heads)
    length = -(-kv_len // splits)
    return max(_MIN_SPLIT, -(-length // _SPLIT_STEP) * _SPLIT_STEP)


@cache
def _limits(index: int) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one block may have."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@cache
def _kernels(index: int, variant: Variant) -> tuple[Kernel, Kernel]:
    first = load_kernel(SOURCE, "tq4_decode", device=index, params=DECODE_PARAMS, defines=variant.defines)
    second = load_kernel(SOURCE, "tq4_combine", device=index, params=COMBINE_PARAMS, defines=variant.defines)
    return first, second


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    k_norms: torch.Tensor,
    v: torch.Tensor,
    v_norms: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    sm_scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed keys and values; arguments that :func:`turboquant_vllm.checks.check_attention` accepted.

    Args:
        q: fp16 or bf16 ``[B, H_q, N_q, D]``, D 64, 128 or 256, ``N_q * H_q / H_kv`` at most 32.
        k, v: uint8 ``[B, H_kv, N_kv, D // 2]``, rows contiguous and on 16-byte boundaries.
        k_norms, v_norms: float32 ``[B, H_kv, N_kv]``, any strides.
        centroids: float32 ``[16]``.
        rotation: float32 ``[D, D]``.
        sm_scale: factor on the scores.
        is_causal: query i sees keys ``0 .. N_kv - N_q + i``.

    Returns:
        out ``[B, H_q, N_q, D]`` in q's dtype and lse float32 ``[B, H_q, N_q]``; zeros and -inf for a query that sees no key.

    Raises:
        ValueError: a size or an alignment that the kernels do not serve; see :func:`turboquant_vllm.checks.why_not_decode`.
        RuntimeError: compiling or launching failed.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    if k.shape[2] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    attend, combine = prepare(q, k, k_norms, v, v_norms, centroids, rotation, sm_scale, is_causal, out, lse)
    attend()
    combine()
    return out, lse


def prepare(
    q: torch.Tensor,
    k: torch.Tensor,
    k_norms: torch.Tensor,
    v: torch.Tensor,
    v_norms: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    sm_scale: float,
    is_causal: bool,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The two launches of a call that is not empty: attention to the parts of the keys, and their joining into out and lse.

    Arguments as in :func:`decode`; out and lse are contiguous. The first alone is what a benchmark of the kernel times.
    """
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, kv_len = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads
    rows, heads = q_len * group, batch * num_kv_heads
    if reason := why_not_decode(q.dtype, head_dim, rows, (k, v)):
        raise ValueError(reason)
    if (k.data_ptr() | v.data_ptr()) % 16:
        raise ValueError("codes must begin on a 16-byte boundary")
    index = q.get_device()
    multiprocessors, shared_limit = _limits(index)
    variant = choose_variant(head_dim, rows, shared_limit)
    first, second = _kernels(index, variant)

    split = split_length(kv_len, num_kv_heads)
    splits = -(-kv_len // split)
    chunks = -(-rows // (4 * variant.row_tiles))
    units = heads * chunks * splits
    parts = torch.empty((heads, splits, rows, head_dim), dtype=torch.float32, device=q.device)
    parts_lse = torch.empty((heads, splits, rows), dtype=torch.float32, device=q.device)
    centroids, rotation = centroids.contiguous(), rotation.contiguous()
    bf16 = int(q.dtype == torch.bfloat16)
    attend_args = (
        q.data_ptr(), k.data_ptr(), k_norms.data_ptr(), v.data_ptr(), v_norms.data_ptr(), centroids.data_ptr(),
        rotation.data_ptr(), parts.data_ptr(), parts_lse.data_ptr(), *q.stride(), *k.stride()[:3], *k_norms.stride(),
        *v.stride()[:3], *v_norms.stride(), units, splits, split, kv_len, num_kv_heads, group, rows, chunks,
        kv_len - q_len, int(is_causal), bf16, sm_scale * _LOG2_E,
    )  # fmt: skip
    # Few rows in all: one block each, so that they are joined at once.
    rows_each = 1 if heads * rows <= 2 * multiprocessors else 4
    combine_args = (
        parts.data_ptr(), parts_lse.data_ptr(), rotation.data_ptr(), out.data_ptr(), lse.data_ptr(), splits, group, rows,
        q_len, rows_each, bf16,
    )  # fmt: skip
    keep = (q, k, k_norms, v, v_norms, centroids, rotation, parts, parts_lse, out, lse)

    def attend() -> None:
        _ = keep
        grid = (min(units, multiprocessors), 1, 1)
        launch(first, grid, (32 * variant.warps, 1, 1), variant.shared_bytes, None, attend_args)

    def combine() -> None:
        _ = keep
        launch(second, (-(-rows // rows_each), heads, 1), (4 * head_dim, 1, 1), 0, None, combine_args, pdl=True)

    return attend, combine
