"""Attention of many query rows, one slice of the keys at a time: dense attention to each slice, joined by log-sum-exp.

Each slice of keys and values is made dense in a scratch that the next slice uses again, so the memory needed does not
grow with the context. PyTorch's dense attention knows one causal mask that all its kernels agree on, the triangle over as
many queries as keys. So each slice falls into pieces that are either such a square or seen by all of their queries:

                             slice
                       first ........ stop
    first queries        C   C   C  A  .  .        A   the square on the diagonal
                         C   C   C  A  A  .        C   keys before the first query's own, if the slice has any
                         C   C   C  A  A  A        B   the whole slice, for queries whose own keys come later
    later queries        B   B   B  B  B  B
                         B   B   B  B  B  B

Where dense keys and values come from, what attends to them and what joins the results are arguments; this module is the
schedule, and a table of PyTorch's operators.

cuDNN plans every new shape for some 40 ms. A *grain* keeps shapes few: with a causal mask, both the first query's own key
and the end of the keys are brought to multiples of it, by queries that stand before and after the others and by keys that
only the last of these see. Without one keys are cut at a multiple, and what remains is read by kernels that plan nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

__all__ = [
    "MOST_PARTS",
    "SCRATCH_BYTES",
    "Dense",
    "Merge",
    "Operator",
    "Part",
    "Piece",
    "Queries",
    "Unpack",
    "attention_over_slices",
    "dense_attention",
    "pieces",
    "slices",
]

SCRATCH_BYTES = 64 << 20  # of the slices of the sequences that share them

# (first, stop) -> dense keys and values first .. stop, each [B, H_kv, stop - first, D], zeros where a sequence has no such
# key. They need not outlive the next call.
Unpack = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]

# (q, k, v, is_causal, sm_scale) -> out [B, H_q, N_q, D], last stride 1, and lse [B, H_q, N_q], natural and contiguous;
# is_causal only where N_q = N_kv.
Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float], tuple[torch.Tensor, torch.Tensor]]

# (first, stop) -> queries first .. stop, [B, H_q, stop - first, D]. Those before 0, and those that a sequence does not have,
# may be anything.
Queries = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Dense:
    """An operator of dense attention, and the multiple that numbers of queries and keys should be of for its sake."""

    run: Operator
    grain: int = 1


@dataclass(frozen=True)
class Part:
    """Attention of queries ``first_row ..`` to some of the keys.

    Attributes:
        out: ``[B, H_q, n, D]``.
        lse: float32 ``[B, H_q, n]``.
        first_row: the query that row 0 is of.
    """

    out: torch.Tensor
    lse: torch.Tensor
    first_row: int


# (parts, first_row, stop_row, target, is_last): join the parts, MOST_PARTS at most and all over disjoint keys, for queries
# first_row .. stop_row, into the rows of target that are theirs, and in its dtype. Target may be one of the parts. is_last: the
# parts are all that the queries see.
Merge = Callable[[Sequence[Part], int, int, Part, bool], None]
MOST_PARTS = 4


@dataclass(frozen=True)
class Piece:
    """One call of dense attention: queries ``first_row .. stop_row`` attend to keys ``first_key .. stop_key``.

    Attributes:
        is_causal: a square, in which query i sees keys 0 .. i; else every query sees every key.
        ends: whether these are the last keys that the queries see.
    """

    first_row: int
    stop_row: int
    first_key: int
    stop_key: int
    is_causal: bool
    ends: bool


def slices(kv_len: int, offset: int, slice_len: int) -> Iterator[tuple[int, int]]:
    """First key and end of each slice; ``offset``: where squares begin, so that no slice but a lone one straddles it."""
    stop = kv_len if kv_len <= slice_len else offset % slice_len or slice_len
    first = 0
    while first < kv_len:
        yield first, min(stop, kv_len)
        first, stop = stop, stop + slice_len


def pieces(q_len: int, kv_len: int, is_causal: bool, first: int, stop: int, grain: int = 1) -> Iterator[Piece]:
    """Dense calls for the slice of keys ``first .. stop``, in ascending order of keys; causal needs ``q_len <= kv_len``."""
    offset = kv_len - q_len if is_causal else kv_len  # query i's own key is offset + i
    corner = min(max(first, offset), stop)
    top, bottom = max(corner - offset, 0), max(stop - offset, 0)

    def whole(first_row: int, stop_row: int, first: int, stop: int) -> Iterator[Piece]:
        cut = first + (stop - first) // grain * grain
        for i, j in ((first, cut), (cut, stop)):
            if i < j and first_row < stop_row:
                yield Piece(first_row, stop_row, i, j, False, not is_causal and j == kv_len)

    yield from whole(0, bottom, first, corner)
    if top < bottom:
        yield Piece(top, bottom, corner, stop, True, True)
    yield from whole(bottom, q_len, first, stop)


def attention_over_slices(
    queries: Queries,
    q_len: int,
    kv_len: int,
    sm_scale: float,
    is_causal: bool,
    *,
    slice_len: int,
    unpack: Unpack,
    dense: Dense,
    merge: Merge,
    target: Part | None = None,
) -> Part:
    """Attention of all queries to ``kv_len`` keys, about ``slice_len`` of them at a time.

    Args:
        queries: gives ``[B, H_q, n, D]``.
        q_len: number of queries.
        kv_len: number of keys.
        sm_scale: factor on the scores.
        is_causal: query i sees keys ``0 .. kv_len - N_q + i``.
        slice_len: keys per call of ``unpack``, a multiple of ``dense.grain``.
        unpack, dense, merge: see their types.
        target: where queries ``0 .. q_len`` go; None: into a new part, or one that dense attention has made.

    Returns:
        The result; zeros and -inf, or what ``merge`` makes of no part, for a query that sees no key.
    """
    grain = dense.grain
    unseeing = max(0, q_len - kv_len) if is_causal else 0 if kv_len else q_len
    seeing = q_len - unseeing
    front = (kv_len - seeing) % grain if is_causal and seeing else 0
    base = unseeing - front  # the query that row 0 is of
    rows = _rounded_up(front + seeing, grain)
    fewest = _rounded_up(seeing, grain)  # rows of a call that may begin anywhere
    keys = kv_len + (base + rows - q_len if is_causal else 0)
    q = queries(base, base + rows)

    def new(dtype: torch.dtype) -> Part:
        out = torch.empty((*q.shape[:2], q_len, q.shape[3]), dtype=dtype, device=q.device)
        return Part(out, torch.empty(out.shape[:3], dtype=torch.float32, device=q.device), 0)

    result, joined = target, None
    if unseeing:
        result = result or new(q.dtype)
        merge((), 0, unseeing, result, True)
    waiting: list[Part] = []  # of queries that see more keys: all from the last one's first_row on
    for first, stop in slices(keys, keys - rows if is_causal else 0, slice_len) if seeing else ():
        k, v = unpack(first, stop)
        for piece in pieces(rows, keys, is_causal, first, stop, grain):
            top, bottom = piece.first_row, piece.stop_row
            if bottom - top == rows and not piece.is_causal and front + fewest <= rows:
                top, bottom = front, front + fewest
            some = (slice(None), slice(None), slice(piece.first_key - first, piece.stop_key - first))
            part = Part(*dense.run(q[:, :, top:bottom], k[some], v[some], piece.is_causal, sm_scale), base + top)
            first_row, stop_row = max(base + top, unseeing), min(base + bottom, q_len)
            if piece.ends:
                if result is None and not waiting and part.out.shape[2] == q_len and base == 0:
                    return part
                result = result or new(q.dtype)
                merge([*waiting, part], first_row, stop_row, result, True)
            else:
                waiting.append(part)
            if len(waiting) == MOST_PARTS:
                joined = joined or new(torch.float32)
                merge(waiting, first_row, stop_row, joined, False)
                waiting = [joined]
    return result or new(q.dtype)


def _rounded_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@cache
def dense_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Dense | None:
    """PyTorch's fastest dense attention that returns the log-sum-exp and takes grouped heads; None where there is none.

    On a GPU its kernels take a positive scale, and queries, keys and values whose rows are contiguous on 16-byte boundaries.
    """
    if device.type == "cpu":
        return Dense(_cpu)
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16):
        return None
    if head_dim % 8 or head_dim > _FLASH_HEAD_DIM:
        return None
    major = torch.cuda.get_device_properties(device).major
    if major < 8:
        return None
    if head_dim <= _CUDNN_HEAD_DIM.get(major, 0) and torch.backends.cudnn.is_available():
        return Dense(_cudnn, _CUDNN_GRAIN)
    return Dense(_flash)


# The largest head dimension for which cuDNN is the fastest, by major compute capability: 1.5 to 2.2 times flash attention's
# speed on Hopper (measured, docs/performance.md); on data-centre Blackwell by what NVIDIA says (not measured).
_CUDNN_HEAD_DIM = {9: 256, 10: 128}
_CUDNN_GRAIN = 128
_FLASH_HEAD_DIM = 256  # the largest that PyTorch's flash attention takes


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if k.shape[2] % _CUDNN_GRAIN:  # what is left of a cut
        return _flash(q, k, v, is_causal, sm_scale)
    run = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = run(q, k, v, None, True, 0.0, is_causal, False, scale=sm_scale)
    return out, lse.view(out.shape[:-1])


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    run = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, *_ = run(q, k, v, 0.0, is_causal, False, scale=sm_scale)
    # Its maximum passes over a NaN, and so does the log-sum-exp. Out has q's strides, and torch.where those of out.
    return out, torch.where(out[..., 0].isnan(), float("nan"), lse).contiguous()


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=sm_scale)
    return out, lse.contiguous()
