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

cuDNN plans every new shape for some 40 ms. A *grain* keeps shapes few: queries are padded to a multiple of it, with keys
that only the padding sees, and keys are cut at multiples of it. What remains of a cut is short, and read by kernels
that plan nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

__all__ = [
    "MOST_PARTS",
    "Dense",
    "Merge",
    "Operator",
    "Part",
    "Piece",
    "Unpack",
    "attention_over_slices",
    "dense_attention",
    "pieces",
    "slices",
]

# (first, stop) -> dense keys and values first .. stop, each [B, H_kv, stop - first, D], zeros where a sequence has no such
# key. They need not outlive the next call.
Unpack = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]

# (q, k, v, is_causal, sm_scale) -> out [B, H_q, N_q, D], lse [B, H_q, N_q] (natural); is_causal only where N_q = N_kv.
Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, float], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Dense:
    """An operator of dense attention, and the multiple that numbers of queries and keys should be of for its sake."""

    run: Operator
    grain: int = 1


@dataclass(frozen=True)
class Part:
    """Attention of queries ``first_row ..`` to some of the keys.

    Attributes:
        out: ``[B, H_q, n, D]``, contiguous.
        lse: float32 ``[B, H_q, n]``, contiguous.
        first_row: the query that row 0 is of.
    """

    out: torch.Tensor
    lse: torch.Tensor
    first_row: int


# (parts, first_row, stop_row, target): join the parts, MOST_PARTS at most and all over disjoint keys, for queries
# first_row .. stop_row, into the rows of target that are theirs, and in its dtype. Target may be one of the parts.
Merge = Callable[[Sequence[Part], int, int, Part], None]
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
    q: torch.Tensor,
    kv_len: int,
    sm_scale: float,
    is_causal: bool,
    *,
    slice_len: int,
    unpack: Unpack,
    dense: Dense,
    merge: Merge,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all queries to ``kv_len`` keys, about ``slice_len`` of them at a time.

    Args:
        q: ``[B, H_q, N_q, D]``.
        kv_len: number of keys.
        sm_scale: factor on the scores.
        is_causal: query i sees keys ``0 .. kv_len - N_q + i``.
        slice_len: keys per call of ``unpack``, a multiple of ``dense.grain``.
        unpack, dense, merge: see their types.

    Returns:
        out ``[B, H_q, N_q, D]`` in q's dtype and lse float32 ``[B, H_q, N_q]``, contiguous; zeros and -inf for a query
        that sees no key.
    """
    batch, num_heads, q_len, head_dim = q.shape
    unseeing = max(0, q_len - kv_len) if is_causal or not kv_len else 0
    q = q[:, :, unseeing:]
    seeing = q.shape[2]
    if padding := -seeing % dense.grain:
        q = torch.nn.functional.pad(q, (0, 0, 0, padding))
        kv_len += padding if is_causal else 0
    room = _Room(batch, num_heads, q_len, head_dim, q.dtype, q.device)
    waiting: list[Part] = []  # of queries that see more keys: all from the last one's first_row on
    offset = kv_len - q.shape[2] if is_causal else 0
    for first, stop in slices(kv_len, offset, slice_len) if q.numel() else ():
        keys, values = unpack(first, stop)
        for piece in pieces(q.shape[2], kv_len, is_causal, first, stop, dense.grain):
            some = (slice(None), slice(None), slice(piece.first_key - first, piece.stop_key - first))
            rows = (slice(None), slice(None), slice(piece.first_row, piece.stop_row))
            out, lse = dense.run(q[rows], keys[some], values[some], piece.is_causal, sm_scale)
            part = Part(out.contiguous(), lse.contiguous(), piece.first_row)
            stop_row = min(piece.stop_row, seeing)
            if piece.ends:
                if not waiting and out.shape[2] == seeing == q_len:
                    return part.out, part.lse
                merge([*waiting, part], piece.first_row, stop_row, room.result(unseeing))
            else:
                waiting.append(part)
            if len(waiting) == MOST_PARTS:
                joined = room.joined(seeing)
                merge(waiting, piece.first_row, stop_row, joined)
                waiting = [joined]
    result = room.result(unseeing)
    return result.out, result.lse


class _Room:
    """Tensors of one call, made when they are first needed."""

    def __init__(self, batch: int, num_heads: int, q_len: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = (batch, num_heads, q_len, head_dim), dtype, device
        self._result: Part | None = None
        self._joined: Part | None = None

    def _part(self, rows: int, dtype: torch.dtype, first_row: int) -> Part:
        shape = (*self._shape[:2], rows, self._shape[3])
        out = torch.empty(shape, dtype=dtype, device=self._device)
        return Part(out, torch.empty(shape[:3], dtype=torch.float32, device=self._device), first_row)

    def result(self, unseeing: int) -> Part:
        """All queries, the first ``unseeing`` of which, before row 0, see no key."""
        if self._result is None:
            self._result = self._part(self._shape[2], self._dtype, -unseeing)
            self._result.out[:, :, :unseeing] = 0.0
            self._result.lse[:, :, :unseeing] = float("-inf")
        return self._result

    def joined(self, rows: int) -> Part:
        """What is joined on the way, in float32."""
        if self._joined is None:
            self._joined = self._part(rows, torch.float32, 0)
        return self._joined


@cache
def dense_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Dense | None:
    """PyTorch's fastest dense attention that returns the log-sum-exp and takes grouped heads; None where there is none.

    On a GPU its kernels take a positive scale, and queries, keys and values whose rows are contiguous on 16-byte boundaries.
    """
    if device.type == "cpu":
        return Dense(_cpu)
    if device.type != "cuda" or torch.version.hip or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8:
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
    # Its maximum passes over a NaN, and so does the log-sum-exp.
    return out, torch.where(out[..., 0].isnan(), float("nan"), lse)


def _cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=sm_scale)
