"""Attention of many query rows over packed keys and values: a slice decompressed, PyTorch's dense attention, the next slice.

Fused kernels look every level up once for each tile of queries. Here each is looked up once, at the price of writing the
slice and reading it back, and the matrix work runs in the fastest kernels there are. See :mod:`turboquant_vllm.prefill`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from turboquant_vllm.prefill import MOST_PARTS, Dense, Part, attention_over_slices, dense_attention
from turboquant_vllm.triton.config import device_guard, uses_prmt
from turboquant_vllm.triton.unpack import Packed, unpack

__all__ = ["MANY_ROWS", "SCRATCH_BYTES", "attention", "merge", "paged_attention", "serves"]

SCRATCH_BYTES = 64 << 20
# From this many query rows of a key/value head on, decompressing the keys first beats looking their levels up in place.
MANY_ROWS = 257
_BLOCK = 16  # rows that one program joins


@triton.jit
def _take(part, lse, rows, first, batch_head, row, live, column, top, total, acc, D: tl.constexpr):
    """Take rows ``first + row`` of one part into the running softmax over parts."""
    at = batch_head * rows + first + row  # [BM]
    x = tl.load(part + at[:, None] * D + column[None, :], mask=live[:, None] & (column[None, :] < D), other=0.0)  # [BM, DP]
    log = tl.load(lse + at, mask=live, other=float("-inf"))
    x = tl.where((log == float("-inf"))[:, None], 0.0, x)  # without a weight: whatever it is, NaN included
    new_top = tl.maximum(top, log)
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    keep, weight = tl.exp(top - anchor), tl.exp(log - anchor)
    acc = acc * keep[:, None] + x.to(tl.float32) * weight[:, None]
    return new_top, total * keep + weight, acc


# Arguments that change with a length are not specialised: a new length must never compile anything.
_LENGTHS = ["count", "used", "rows", "first", *(f"{name}{i}" for name in ("rows", "first") for i in range(MOST_PARTS))]


@triton.jit(do_not_specialize=_LENGTHS)
def merge_kernel(count, used, part0, lse0, rows0, first0, part1, lse1, rows1, first1, part2, lse2, rows2, first2, part3, lse3,
                 rows3, first3, out, lse, rows, first, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """Join ``count`` rows of the first ``used`` parts ``[batch * heads, rows, D]``, each from its ``first`` on, into out's."""
    n = tl.program_id(1) * BM + tl.arange(0, BM)  # [BM]
    live, row = n < count, n.to(tl.int64)
    batch_head = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DP], tl.float32)
    top, total, acc = _take(part0, lse0, rows0, first0, batch_head, row, live, column, top, total, acc, D)
    top, total, acc = _take(
        part1, lse1, rows1, first1, batch_head, row, n < tl.where(used > 1, count, 0), column, top, total, acc, D
    )
    top, total, acc = _take(
        part2, lse2, rows2, first2, batch_head, row, n < tl.where(used > 2, count, 0), column, top, total, acc, D
    )
    top, total, acc = _take(
        part3, lse3, rows3, first3, batch_head, row, n < tl.where(used > 3, count, 0), column, top, total, acc, D
    )
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    # Out may be one of the parts, and several threads read the same number.
    tl.debug_barrier()
    at = batch_head * rows + first + row
    x = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] * D + column[None, :], x, mask=live[:, None] & (column[None, :] < D))
    tl.store(lse + at, tl.where(empty, float("-inf"), top + tl.log(total)), mask=live)


def serves(q: torch.Tensor, k_norms: torch.Tensor | None, v_norms: torch.Tensor | None, group: int, sm_scale: float) -> bool:
    """Whether :func:`attention` is the faster way for a call, and can serve it; ``group``: query heads per key/value head."""
    if k_norms is None or v_norms is None or not sm_scale > 0:
        return False
    many = q.shape[2] * group >= MANY_ROWS
    return many and uses_prmt(q.device.type) and dense_attention(q.device, q.dtype, q.shape[3]) is not None


def attention(
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
    """Attention over packed keys and values; arguments and results as :func:`turboquant_vllm.reference.attention`.

    A key or value with a coordinate beyond the range of q's dtype counts as infinite, as in a dense cache of that dtype.
    ``sm_scale`` must be positive. Which bits come out depends on the sizes of a sequence, not on the batch.
    """
    grain = _dense(q).grain
    slice_len = _slice_len(q, k.shape[1], grain)
    # Short sequences share a scratch. How long a slice is must not depend on the batch.
    together = max(1, slice_len // ((k.shape[2] // grain + 2) * grain))
    results = []
    with device_guard(q.device):
        for start in range(0, max(q.shape[0], 1), together):
            some = slice(start, start + together)
            packed = Packed(k[some], k_norms[some], v[some], v_norms[some], centroids, rotation)
            results.append(_attention(q[some], packed, k.shape[2], sm_scale, is_causal))
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs), torch.cat(lses)


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    k_norms: torch.Tensor,
    v: torch.Tensor,
    v_norms: torch.Tensor,
    block_table: torch.Tensor,
    kv_len: int,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    sm_scale: float,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence's queries over its pages, otherwise as :func:`attention`.

    Args:
        q: ``[1, H_q, N_q, D]``.
        k, v: uint8 pages ``[num_pages, H_kv, page_size, D // 2]``, last stride 1.
        k_norms, v_norms: float32 ``[num_pages, H_kv, page_size]``.
        block_table: int32 ``[at least ceil(kv_len / page_size)]``: token t is in page ``block_table[t // page_size]``, at
            place ``t % page_size``. A number that is no page's is taken for the nearest that is.
        kv_len: tokens of the sequence, known on the host: the schedule depends on it.
        centroids, rotation, sm_scale, is_causal: as in :func:`attention`.
    """
    with device_guard(q.device):
        packed = Packed(k, k_norms, v, v_norms, centroids, rotation, block_table)
        return _attention(q, packed, kv_len, sm_scale, is_causal)


def _attention(
    q: torch.Tensor, packed: Packed, kv_len: int, sm_scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some sequences that share a scratch."""
    batch, num_kv_heads, head_dim = q.shape[0], packed.k.shape[1], q.shape[3]
    dense = _dense(q)
    slice_len = min(_slice_len(q, num_kv_heads, dense.grain), (kv_len // dense.grain + 2) * dense.grain)
    scratch = torch.empty((2, batch, num_kv_heads, slice_len, head_dim), dtype=q.dtype, device=q.device)

    def dense_slice(first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = scratch[:, :, :, : stop - first].unbind()
        unpack(packed, first, min(stop, kv_len) - first, keys, values)
        return keys, values

    return attention_over_slices(
        q.contiguous(), kv_len, sm_scale, is_causal, slice_len=slice_len, unpack=dense_slice, dense=dense, merge=merge
    )


def _dense(q: torch.Tensor) -> Dense:
    dense = dense_attention(q.device, q.dtype, q.shape[3])
    assert dense is not None
    return dense


def _slice_len(q: torch.Tensor, num_kv_heads: int, grain: int) -> int:
    """Keys that one sequence's scratch has room for."""
    return max(SCRATCH_BYTES // (2 * num_kv_heads * q.shape[3] * q.dtype.itemsize * grain), 1) * grain


def merge(parts: Sequence[Part], first_row: int, stop_row: int, target: Part) -> None:
    """See :data:`turboquant_vllm.prefill.Merge`."""
    batch, num_heads, rows, head_dim = target.out.shape
    assert len(parts) <= MOST_PARTS
    given: list[object] = []
    # Parts that are not there are not read; one kernel serves any number.
    for i in range(MOST_PARTS):
        part = parts[min(i, len(parts) - 1)]
        given += [part.out, part.lse, part.out.shape[2], first_row - part.first_row]
    count = stop_row - first_row
    merge_kernel[(batch * num_heads, -(-count // _BLOCK))](
        count, len(parts), *given, target.out, target.lse, rows, first_row - target.first_row, D=head_dim,
        DP=1 << (head_dim - 1).bit_length(), BM=_BLOCK,
    )  # fmt: skip
