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

__all__ = ["Variant", "choose_split", "choose_variant", "decode", "prepare"]

SOURCE = Path(__file__).with_name("decode.cu")
DECODE_PARAMS = "P" * 9 + "q" * 20 + "i" * 12 + "f"
COMBINE_PARAMS = "P" * 5 + "i" * 7

_TABLE_BYTES = 65536
_MAX_SPLITS, _SPLIT_STEP = 128, 256
# Microseconds: a key at head_dim 128 on one multiprocessor, the fixed part of a unit, and one more split to join.
_TOKEN_US, _UNIT_US, _SPLIT_US = 0.0041, 3.0, 0.1
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
    def max_gangs(self) -> int:
        """Into how many gangs the warps of a block may be divided, each with its own part of the keys."""
        return self.warps // 4 if self.row_tiles <= 2 and self.warps >= 8 else 1

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block of the first kernel: table, rings, merge area, query, state."""
        columns = (self.row_tiles + 1) // 2
        ring = self.warps * self.stages * (16 * self.head_dim + 128)
        merge = self.warps * 16 * self.head_dim
        query = self.max_gangs * columns * (16 * self.head_dim + 32)
        return _TABLE_BYTES + ring + merge + query + self.warps * self.row_tiles * 32


@cache
def choose_variant(head_dim: int, rows: int, shared_limit: int) -> Variant:
    """The variant for ``rows`` rows per key/value head, within ``shared_limit`` bytes of shared memory per block."""
    most = 4 if head_dim == 256 else 8  # the sums of more rows do not fit the registers
    row_tiles = next(n for n in (1, 2, 4, 8) if n == most or 4 * n >= rows)
    in_registers = row_tiles <= 2 or (row_tiles == 4 and head_dim == 128)
    many_warps = 16 if head_dim <= 128 and row_tiles * head_dim <= 256 else 8
    candidates = (
        Variant(head_dim, row_tiles, warps, stages, in_registers)
        for warps in (16, 8, 4, 2)
        if warps <= many_warps
        for stages in range(max(3, 96 // warps * 64 // head_dim), 1, -1)
    )
    return next(variant for variant in candidates if variant.shared_bytes <= shared_limit)


@cache
def choose_split(passes: int, kv_len: int, multiprocessors: int, variant: Variant) -> tuple[int, int]:
    """Keys per split and warps per gang that should take the least time.

    Args:
        passes: (sequence, key/value head, chunk of rows) triples.
        kv_len: keys of a sequence.
        multiprocessors: of the device; each runs one block.
        variant: what is compiled.
    """
    token = _TOKEN_US * variant.head_dim / 128 * {1: 1.0, 2: 1.15}.get(variant.row_tiles, variant.row_tiles / 2)
    best = (math.inf, kv_len, variant.warps)
    for gangs in (1, 2, 4):
        for splits in range(1, _MAX_SPLITS + 1):
            length = -(-kv_len // (splits * _SPLIT_STEP)) * _SPLIT_STEP
            if gangs > variant.max_gangs or -(-kv_len // length) != splits:
                continue
            rounds = -(-passes * splits // (multiprocessors * gangs))
            time = rounds * (min(length, kv_len) * gangs * token + _UNIT_US) + _SPLIT_US * splits
            best = min(best, (time, length, variant.warps // gangs))
    return best[1:]


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


def _aligned(codes: torch.Tensor) -> torch.Tensor:
    """Codes that begin on a 16-byte boundary: as they are, or a copy."""
    return codes.clone(memory_format=torch.contiguous_format) if codes.data_ptr() % 16 else codes


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
    *,
    split_len: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed keys and values; arguments that :func:`turboquant_vllm.checks.check_attention` accepted.

    Args:
        q: fp16 or bf16 ``[B, H_q, N_q, D]``, D 64, 128 or 256, ``N_q * H_q / H_kv`` at most 32.
        k, v: uint8 ``[B, H_kv, N_kv, D // 2]``, rows contiguous and 16-byte multiples apart; copied if they do
            not begin on a 16-byte boundary.
        k_norms, v_norms: float32 ``[B, H_kv, N_kv]``, any strides.
        centroids: float32 ``[16]``.
        rotation: float32 ``[D, D]``.
        sm_scale: factor on the scores.
        is_causal: query i sees keys ``0 .. N_kv - N_q + i``.
        split_len: keys per split, a multiple of 16 that makes at most 128 splits; None lets :func:`choose_split` decide
            from the sizes of the call.

    The same call gives the same bits on the same model of GPU. A sequence in a batch gives the bits it gives alone where
    split_len is given; without it, where the same split is chosen for both.

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
    attend, combine = prepare(
        q, k, k_norms, v, v_norms, centroids, rotation, sm_scale, is_causal, out, lse, split_len=split_len
    )
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
    *,
    split_len: int | None = None,
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
    k, v = _aligned(k), _aligned(v)
    index = q.get_device()
    multiprocessors, shared_limit = _limits(index)
    variant = choose_variant(head_dim, rows, shared_limit)
    first, second = _kernels(index, variant)

    chunks = -(-rows // (4 * variant.row_tiles))
    split, gang_warps = choose_split(heads * chunks, kv_len, multiprocessors, variant)
    if split_len is not None:
        split, gang_warps = split_len, variant.warps
        if split < 16 or split % 16 or split * _MAX_SPLITS < kv_len:
            raise ValueError(f"split_len must be a multiple of 16 and at least kv_len / {_MAX_SPLITS}, got {split_len}")
    splits = -(-kv_len // split)
    units = heads * chunks * splits
    parts = torch.empty((heads, splits, rows, head_dim), dtype=torch.float32, device=q.device)
    parts_lse = torch.empty((heads, splits, rows), dtype=torch.float32, device=q.device)
    centroids, rotation = centroids.contiguous(), rotation.contiguous()
    bf16 = int(q.dtype == torch.bfloat16)
    step = 16 * gang_warps
    attend_args = (
        q.data_ptr(), k.data_ptr(), k_norms.data_ptr(), v.data_ptr(), v_norms.data_ptr(), centroids.data_ptr(),
        rotation.data_ptr(), parts.data_ptr(), parts_lse.data_ptr(), *q.stride(), *k.stride()[:3], *k_norms.stride(),
        *v.stride()[:3], *v_norms.stride(), step * k.stride(2), step * v.stride(2), 4 * step * k_norms.stride(2),
        4 * step * v_norms.stride(2), units, splits, split, kv_len, num_kv_heads, group, rows, chunks, kv_len - q_len,
        int(is_causal), bf16, gang_warps, sm_scale * _LOG2_E,
    )  # fmt: skip
    at_once = min(2 if head_dim == 256 else 4, -(-heads * rows // multiprocessors))
    combine_args = (
        parts.data_ptr(), parts_lse.data_ptr(), rotation.data_ptr(), out.data_ptr(), lse.data_ptr(), heads, splits, group,
        rows, q_len, at_once, bf16,
    )  # fmt: skip
    keep = (q, k, k_norms, v, v_norms, centroids, rotation, parts, parts_lse, out, lse)

    def attend() -> None:
        _ = keep
        grid = (min(-(-units * gang_warps // variant.warps), multiprocessors), 1, 1)
        launch(first, grid, (32 * variant.warps, 1, 1), variant.shared_bytes, None, attend_args)

    def combine() -> None:
        _ = keep
        grid = (min(-(-heads * rows // at_once), multiprocessors), 1, 1)
        launch(second, grid, (4 * head_dim, 1, 1), 0, None, combine_args, pdl=True)

    return attend, combine
