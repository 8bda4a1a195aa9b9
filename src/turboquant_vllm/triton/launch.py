"""Grids and workspaces: how one attention call becomes three kernel launches."""

from __future__ import annotations

import torch
import triton

from turboquant_vllm.records import GROUP, NO_MASKS, Masks, Operand, Tables
from turboquant_vllm.reference_keys import rotate_queries
from turboquant_vllm.triton.config import (
    FEW_ROWS,
    LOG2_E,
    WIDE,
    WIDEST,
    choose_config,
    choose_parts,
    device_guard,
    padded,
    split_length,
    uses_prmt,
)
from turboquant_vllm.triton.kernels import attention_kernel, merge_kernel, query_kernel, unpack_kernel
from turboquant_vllm.triton.unpack import group_arguments

__all__ = ["attention"]

_SCRATCH_BYTES = 64 << 20
_ELEMENT = {2: torch.uint8, 4: torch.int16}


def attention(
    q: torch.Tensor, k: Operand, v: Operand, tables: Tables, sm_scale: float, masks: Masks = NO_MASKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed or dense keys and values; arguments and results as :func:`turboquant_vllm.reference.attention`.

    Arguments must have passed :func:`turboquant_vllm.checks.check_attention`, and the tables be contiguous.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse

    num_kv_heads, kv_len = k.data.shape[1:3]
    if masks.sliding_window is not None:
        # Keys before every query's window do not exist. By whole groups, codes and norms keep their alignment.
        begin = max(0, kv_len - q.shape[2] + 1 - masks.sliding_window) // GROUP * GROUP
        kv_len -= begin
        k, v = k.tokens(begin, kv_len), v.tokens(begin, kv_len)
        masks = masks._replace(sliding_window=min(masks.sliding_window, WIDEST))
    unpack = (k.is_packed or v.is_packed) and q.shape[1] // num_kv_heads * q.shape[2] > FEW_ROWS
    # Slices are as long as one sequence's scratch allows, and sequences share a scratch that has room for more: how long
    # a slice is must not depend on the batch.
    room = _SCRATCH_BYTES // (2 * num_kv_heads * q.shape[3] * q.dtype.itemsize)
    if k.groups is not None:
        room = max(room // GROUP, 1) * GROUP  # slices begin where groups do
    slice_len = min(max(room, 1), max(kv_len, 1))
    together = max(1, room // slice_len) if unpack else q.shape[0]
    if together >= q.shape[0]:
        _attention(q, k, v, tables, sm_scale, masks, out, lse, slice_len if unpack else None)
        return out, lse
    for first in range(0, q.shape[0], together):
        some = slice(first, first + together)
        operands = k.sequences(some), v.sequences(some)
        _attention(q[some], *operands, tables, sm_scale, masks, out[some], lse[some], slice_len)
    return out, lse


def _attention(
    q: torch.Tensor,
    k: Operand,
    v: Operand,
    tables: Tables,
    sm_scale: float,
    masks: Masks,
    out: torch.Tensor,
    lse: torch.Tensor,
    slice_len: int | None,
) -> None:
    """Fill ``out`` and ``lse``; with ``slice_len``, unpack that many keys at a time into a scratch."""
    batch, num_heads, q_len, head_dim = q.shape
    (centroids, rotation, key_scales), sinks = tables, masks.sinks
    num_kv_heads, kv_len = k.data.shape[1:3]
    group = num_heads // num_kv_heads
    rows, heads = q_len * group, batch * num_kv_heads
    both = k.is_packed and v.is_packed
    nvidia = uses_prmt(q.device.type)
    config = choose_config(rows, head_dim, q.dtype.itemsize, both, nvidia)
    widest = 4 if config.swap or slice_len or q.dtype == torch.float32 else 2
    k, k_parts = _elements(k, widest)
    v, v_parts = _elements(v, widest)
    split_len = slice_len or split_length(rows, kv_len)
    splits = max(1, triton.cdiv(kv_len, split_len))
    prmt = nvidia and q.dtype != torch.float32
    # A float32 sum over D would cost float32 queries more accuracy than everything else: PyTorch rotates them in float64.
    exact = q.dtype == torch.float32
    wide_rotation = rotation.double() if exact and rotation is not None else None
    if wide_rotation is not None and k.is_packed:
        q = rotate_queries(q.double(), num_kv_heads, tables).float()
    rotated = torch.empty_like(out) if exact and v.is_packed else out
    queries = torch.empty((heads, rows, head_dim), dtype=q.dtype, device=q.device)
    query_scale = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    partial = torch.empty((splits, heads, rows, head_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((splits, heads, rows), dtype=torch.float32, device=q.device)

    cap = None if masks.softcap is None else masks.softcap * LOG2_E
    sinks = None if sinks is None else sinks.contiguous()

    many, wide = rows > 64 and head_dim <= WIDE, head_dim > 128
    block = 64 if many else 16
    rotate = {
        "D": head_dim,
        "DP": max(16, triton.next_power_of_2(head_dim)),
        "BM": block,
        "CHUNK": min(64 if many and not wide else 32 if head_dim <= WIDE else 16, max(16, triton.next_power_of_2(head_dim))),
        "HALF": prmt,
        "num_warps": 8 if many or wide else 4,
    }
    row_tiles = (heads * triton.cdiv(rows, block),)

    def attend(k: Operand, v: Operand, first: int, count: int, k_parts: int, v_parts: int) -> None:
        """Attend to keys ``first .. first + count``, which k and v hold alone, into the splits from ``first`` on."""
        slot, shared = first // split_len, group_arguments(k, k_parts)
        grid = (heads * triton.cdiv(rows, config.block_m), max(1, triton.cdiv(count, split_len)))
        attention_kernel[grid](
            queries, query_scale, k.data, k.norms, *shared[:2], v.data, v.norms, centroids, partial[slot:], partial_lse[slot:],
            rows, count, kv_len - q_len - first, split_len, masks.sliding_window, cap, group, num_kv_heads, *_strides(k),
            *shared[2:], *_strides(v), D=head_dim, K_PARTS=k_parts, V_PARTS=v_parts, K_DP=padded(head_dim, k_parts),
            V_DP=padded(head_dim, v_parts), CAUSAL=masks.is_causal, SWAP=config.swap, BM=config.block_m, BN=config.block_n,
            STAGES=config.num_stages, PRMT=prmt, num_warps=config.num_warps,
        )  # fmt: skip

    with device_guard(q.device):
        query_kernel[row_tiles](
            q, rotation, key_scales, queries, query_scale, rows, group, num_kv_heads, sm_scale * LOG2_E, *q.stride(),
            PARTS=k_parts, ROTATE=k.is_packed and not exact, **rotate,
        )  # fmt: skip
        if slice_len:
            scratch = torch.empty((2, batch, num_kv_heads, split_len, head_dim), dtype=q.dtype, device=q.device)
            for first in range(0, kv_len, split_len):
                count = min(split_len, kv_len - first)
                some = k.tokens(first, count), v.tokens(first, count)
                keys = _unpack(some[0], some[1].norms, centroids, scratch[0], k_parts, False, prmt)
                values = _unpack(some[1], some[1].norms, centroids, scratch[1], v_parts, True, prmt)
                attend(keys, values, first, count, 1, 1)
        else:
            attend(k, v, 0, kv_len, k_parts, v_parts)
        merge_kernel[row_tiles](
            partial, partial_lse, sinks, rotation, rotated, lse, rows, splits, group, num_kv_heads, *rotated.stride(),
            *lse.stride(), PARTS=v_parts, ROTATE=v.is_packed and not exact, UNROLL=1 if many else 4, **rotate,
        )  # fmt: skip
    if wide_rotation is not None and v.is_packed:
        out.copy_(rotated.double() @ wide_rotation)


def _unpack(
    x: Operand,
    value_norms: torch.Tensor | None,
    centroids: torch.Tensor | None,
    scratch: torch.Tensor,
    parts: int,
    values: bool,
    prmt: bool,
) -> Operand:
    """Packed vectors, n a head, in ``scratch [B, H_kv, at least n, D]``; dense ones as they are."""
    if not x.is_packed:
        return x
    batch, num_kv_heads, capacity, head_dim = scratch.shape
    count, (groups, steps, *apart) = x.data.shape[2], group_arguments(x)
    unpack_kernel[(batch * num_kv_heads, triton.cdiv(count, 32))](
        x.data, x.norms, value_norms, groups, steps, centroids, scratch, count, capacity, num_kv_heads, *_strides(x),
        *_norm_strides(value_norms), *apart, VALUES=values, PARTS=parts, COLUMNS=head_dim // parts, DP=padded(head_dim, parts),
        BN=32, PRMT=prmt,
    )  # fmt: skip
    return Operand(scratch)


def _elements(x: Operand, widest: int) -> tuple[Operand, int]:
    """Codes as the widest elements that their size, strides and address allow, and the coordinates in one element."""
    if not x.is_packed:
        return x, 1
    codes = x.data
    head_dim = 2 * codes.shape[-1]
    parts = choose_parts(head_dim, (parts for parts in (4, 2) if parts <= widest and _fits(codes, parts)))
    return x._replace(data=codes.view(_ELEMENT[parts])), parts


def _fits(x: torch.Tensor, parts: int) -> bool:
    """Whether codes can be read as elements of ``parts // 2`` bytes."""
    size = parts // 2
    if size == 1:
        return True
    aligned = (x.data_ptr() | x.shape[-1]) % size == 0
    return aligned and x.stride(-1) == 1 and all(stride % size == 0 for stride in x.stride()[:-1])


def _strides(x: Operand) -> tuple[int, ...]:
    return (*x.data.stride(), *_norm_strides(x.norms))


def _norm_strides(norms: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if norms is None else norms.stride()
