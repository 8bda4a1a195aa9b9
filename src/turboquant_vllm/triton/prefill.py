"""Attention of many query rows over packed keys and values: a slice decompressed, PyTorch's dense attention, the next slice.

Fused kernels look every level up once for each tile of queries. Here each is looked up once, at the price of writing the
slice and reading it back, and the matrix work runs in the fastest kernels there are. See :mod:`turboquant_vllm.prefill`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from turboquant_vllm.limits import MANY_PAIRS, MANY_ROWS
from turboquant_vllm.prefill import (
    MOST_PARTS,
    SCRATCH_BYTES,
    Dense,
    Part,
    Queries,
    attention_over_slices,
    dense_attention,
)
from turboquant_vllm.records import NO_MASKS, Masks, Operand, Tables
from turboquant_vllm.triton.config import device_guard, uses_prmt
from turboquant_vllm.triton.kernels import head_and_tile
from turboquant_vllm.triton.unpack import Packed, unpack

__all__ = ["MANY_PAIRS", "MANY_ROWS", "SCRATCH_BYTES", "attention", "merge", "paged_attention", "serves"]

_BLOCK = 16  # rows that one program joins


@triton.jit
def _take(part, count, batch, head, heads, n, column, state, D: tl.constexpr):
    """Take ``count`` rows of one part, of which this program has ``n [BM]``, into the running softmax over parts."""
    x, lse, x_b, x_h, x_n, rows, first = part
    top, total, acc = state
    live, row = n < count, first + n
    x = tl.load(x + (batch * x_b + head * x_h + row * x_n)[:, None] * D + column[None, :],
                mask=live[:, None] & (column[None, :] < D), other=0.0)  # fmt: skip  # [BM, DP]
    log = tl.load(lse + (batch * heads + head) * rows + row, mask=live, other=float("-inf"))
    x = tl.where((log == float("-inf"))[:, None], 0.0, x)  # without a weight: whatever it is, NaN included
    new_top = tl.maximum(top, log)
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep, weight = tl.exp(top - anchor), tl.exp(log - anchor)
    return new_top, total * keep + weight, acc * keep[:, None] + x.to(tl.float32) * weight[:, None]


# Arguments that change with a length are not specialised: a new length must never compile anything.
_LENGTHS = ["count", "used", "first", "x_b", "x_h", "x_n", "l_b", "l_h"]
_LENGTHS += [f"{name}{i}" for name in ("x_b", "x_h", "x_n", "rows", "first") for i in range(MOST_PARTS)]


@triton.jit(do_not_specialize=_LENGTHS)
def merge_kernel(count, used, heads, sinks, part0, lse0, x_b0, x_h0, x_n0, rows0, first0, part1, lse1, x_b1, x_h1, x_n1, rows1,
                 first1, part2, lse2, x_b2, x_h2, x_n2, rows2, first2, part3, lse3, x_b3, x_h3, x_n3, rows3, first3, out, lse,
                 x_b, x_h, x_n, x_d, l_b, l_h, l_n, first, UNIT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                 BM: tl.constexpr):  # fmt: skip
    """Join ``count`` rows of the first ``used`` parts ``[batch, heads, rows, D]``, each from its ``first`` on, into out's.

    Strides are in units of D for parts and of UNIT for out, but for its last. A part's log-sum-exps are contiguous. ``sinks``
    is None or holds one logit more for each head, whose value is zero.
    """
    batch_head, tile, _ = head_and_tile(count, BM)
    n = (tile * BM + tl.arange(0, BM)).to(tl.int64)  # [BM]
    batch, head = batch_head // heads, batch_head % heads
    column = tl.arange(0, DP)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head) + tl.zeros([BM], tl.float32)  # NaN, too: a maximum passes over it
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    state = (top, total, tl.zeros([BM, DP], tl.float32))
    part = (part0, lse0, x_b0, x_h0, x_n0, rows0, first0)
    state = _take(part, tl.where(used > 0, count, 0), batch, head, heads, n, column, state, D)
    part = (part1, lse1, x_b1, x_h1, x_n1, rows1, first1)
    state = _take(part, tl.where(used > 1, count, 0), batch, head, heads, n, column, state, D)
    part = (part2, lse2, x_b2, x_h2, x_n2, rows2, first2)
    state = _take(part, tl.where(used > 2, count, 0), batch, head, heads, n, column, state, D)
    part = (part3, lse3, x_b3, x_h3, x_n3, rows3, first3)
    top, total, acc = _take(part, tl.where(used > 3, count, 0), batch, head, heads, n, column, state, D)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    # Out may be one of the parts, and several threads read the same number.
    tl.debug_barrier()
    row, live = first + n, n < count
    x = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (batch * x_b + head * x_h + row * x_n)[:, None] * UNIT + column.to(tl.int64)[None, :] * x_d, x,
             mask=live[:, None] & (column[None, :] < D))  # fmt: skip
    tl.store(lse + batch * l_b + head * l_h + row * l_n, tl.where(empty, float("-inf"), top + tl.log(total)), mask=live)


def serves(q: torch.Tensor, sm_scale: float) -> bool:
    """Whether these functions can serve queries ``[..., D]`` over packed keys and values."""
    return sm_scale > 0 and uses_prmt(q.device.type) and dense_attention(q.device, q.dtype, q.shape[-1]) is not None


def attention(
    q: torch.Tensor, k: Operand, v: Operand, tables: Tables, sm_scale: float, masks: Masks = NO_MASKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed keys and values; arguments and results as :func:`turboquant_vllm.reference.attention`.

    A key or value with a coordinate beyond the range of q's dtype counts as infinite, as in a dense cache of that dtype.
    ``sm_scale`` must be positive, and no mask
    but the causal one hide a key. Which bits come out depends on the sizes of a sequence, not on the batch.
    """
    grain = _dense(q).grain
    q_len, (num_kv_heads, kv_len) = q.shape[2], k.data.shape[1:3]
    needed = (kv_len // grain + 2) * grain
    slice_len = min(_slice_len(q, num_kv_heads, grain), needed)
    # Short sequences share a scratch. How long a slice is must not depend on the batch.
    together = max(1, _slice_len(q, num_kv_heads, grain) // needed)
    q, results = _aligned(q), []
    with device_guard(q.device):
        for start in range(0, max(q.shape[0], 1), together):
            some = slice(start, start + together)
            queries, packed = q[some], Packed(k.sequences(some), v.sequences(some), tables)

            def rows(first: int, stop: int, queries: torch.Tensor = queries) -> torch.Tensor:
                return _rows(queries, first, stop)

            results.append(_attention(rows, q_len, queries, packed, kv_len, slice_len, sm_scale, masks))
    outs, lses = [part.out for part in results], [part.lse for part in results]
    return (torch.cat(outs), torch.cat(lses)) if len(results) > 1 else (outs[0].contiguous(), lses[0])


def paged_attention(
    q: torch.Tensor,
    first: int,
    stop: int,
    pages: Packed,
    kv_len: int,
    sm_scale: float,
    masks: Masks,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Attention of one sequence's query tokens ``first .. stop`` over its pages, into their rows of ``out`` and ``lse``.

    Args:
        q: ``[T, H_q, D]``, the queries of all sequences.
        first, stop: which of them are the sequence's.
        pages: the sequence's.
        kv_len: keys of the sequence, known on the host: the schedule depends on it.
        sm_scale, masks: as in :func:`attention`.
        out: like q, any strides.
        lse: float32 ``[T, H_q]``.
    """
    queries = _aligned(q).transpose(0, 1)[None]

    def rows(begin: int, end: int) -> torch.Tensor:
        """Rows that are not the sequence's are mostly those of others, which saves a copy."""
        return _rows(queries, first + begin, first + end)

    some = slice(first, stop)
    target = Part(out[some].transpose(0, 1)[None], lse[some].T[None], 0)
    slice_len = _slice_len(q, pages.k.data.shape[1], _dense(q).grain)
    with device_guard(q.device):
        _attention(rows, stop - first, target.out, pages, kv_len, slice_len, sm_scale, masks, target)


def _attention(
    queries: Queries,
    q_len: int,
    like: torch.Tensor,
    packed: Packed,
    kv_len: int,
    slice_len: int,
    sm_scale: float,
    masks: Masks,
    target: Part | None = None,
) -> Part:
    """Attention of some sequences that share a scratch; ``like`` has the batch size, dtype and device of the queries."""
    is_causal, sinks = masks.is_causal, masks.sinks
    shape = (2, like.shape[0], packed.k.data.shape[1], slice_len, like.shape[3])
    scratch = torch.empty(shape, dtype=like.dtype, device=like.device)
    if sinks is not None:
        sinks = sinks.contiguous()
        if target is None:  # what dense attention makes knows of no sinks
            out = torch.empty((like.shape[0], like.shape[1], q_len, like.shape[3]), dtype=like.dtype, device=like.device)
            target = Part(out, torch.empty(out.shape[:3], dtype=torch.float32, device=like.device), 0)

    def dense_slice(first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = scratch[:, :, :, : stop - first].unbind()
        unpack(packed, first, min(stop, kv_len) - first, keys, values)
        return keys, values

    def join(parts: Sequence[Part], first_row: int, stop_row: int, target: Part, is_last: bool) -> None:
        merge(parts, first_row, stop_row, target, sinks if is_last else None)

    return attention_over_slices(
        queries, q_len, kv_len, sm_scale, is_causal, slice_len=slice_len, unpack=dense_slice, dense=_dense(like), merge=join,
        target=target,
    )  # fmt: skip


def _dense(q: torch.Tensor) -> Dense:
    dense = dense_attention(q.device, q.dtype, q.shape[-1])
    assert dense is not None
    return dense


def _slice_len(q: torch.Tensor, num_kv_heads: int, grain: int) -> int:
    """Keys that one sequence's scratch has room for."""
    return max(SCRATCH_BYTES // (2 * num_kv_heads * q.shape[-1] * q.dtype.itemsize * grain), 1) * grain


def _rows(q: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """Rows ``first .. stop`` of ``[B, H, N, D]``, zeros where there are none."""
    before, after = max(-first, 0), max(stop - q.shape[2], 0)
    inside = q[:, :, first + before : stop]
    return torch.nn.functional.pad(inside, (0, 0, before, after)) if before or after else inside


def _aligned(q: torch.Tensor) -> torch.Tensor:
    """Queries whose rows are contiguous, on 16-byte boundaries: as they are, or a copy."""
    apart = [stride * q.dtype.itemsize for stride, size in zip(q.stride()[:-1], q.shape[:-1], strict=True) if size > 1]
    if q.stride(-1) == 1 and all(apart) and not any(x % 16 for x in (*apart, q.data_ptr())):
        return q
    return q.clone(memory_format=torch.contiguous_format)


def merge(parts: Sequence[Part], first_row: int, stop_row: int, target: Part, sinks: torch.Tensor | None = None) -> None:
    """See :data:`turboquant_vllm.prefill.Merge`; ``sinks``, float32 ``[H_q]``, hold for each head a logit of one more key."""
    batch, num_heads, _, head_dim = target.out.shape
    assert len(parts) <= MOST_PARTS
    given: list[object] = []
    # Parts that are not there are not read; one kernel serves any number.
    for i in range(MOST_PARTS):
        part = parts[min(i, len(parts) - 1)] if parts else target
        *strides, last = part.out.stride()
        apart = [stride for stride, size in zip(strides, part.out.shape[:-1], strict=True) if size > 1]
        assert not parts or (last == 1 and not any(stride % head_dim for stride in apart))
        given += [
            part.out,
            part.lse,
            *(stride // head_dim for stride in strides),
            part.out.shape[2],
            first_row - part.first_row,
        ]
    *strides, last = target.out.stride()
    unit = 1 if any(stride % head_dim for stride in strides) else head_dim  # says how loads and stores are aligned
    count = stop_row - first_row
    merge_kernel[(batch * num_heads * -(-count // _BLOCK),)](
        count, len(parts), num_heads, sinks, *given, target.out, target.lse, *(stride // unit for stride in strides), last,
        *target.lse.stride(), first_row - target.first_row, UNIT=unit, D=head_dim, DP=1 << (head_dim - 1).bit_length(),
        BM=_BLOCK,
    )  # fmt: skip
