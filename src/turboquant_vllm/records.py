"""What an attention call is made of: the records that its implementations pass on, from the operators down to the kernels.

Operators of ``torch.library`` take flat arguments; behind them a call is ``(q, k, v, tables, sm_scale, masks)``, or over
pages ``(q, cache, sequences, tables, sm_scale, masks, out, lse)``. A field that a format adds is added here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

__all__ = ["GROUP", "NO_MASKS", "NO_TABLES", "Masks", "Operand", "Sequences", "Tables"]


GROUP = 64  # keys that share an offset and an outlier


class Tables(NamedTuple):
    """What reads the vectors of a cache.

    Attributes:
        centroids: float32 ``[16]``, in any order.
        rotation: float32 ``[D, D]``, orthogonal.
        key_scales: float32 ``[H_kv, D]``, positive, what keys were multiplied by before they were rotated; None: ones. Only
            keys with offsets have any.
    """

    centroids: torch.Tensor | None = None
    rotation: torch.Tensor | None = None
    key_scales: torch.Tensor | None = None

    def contiguous(self) -> Tables:
        """The same tables without gaps, as kernels read them."""
        return Tables(*(None if x is None else x.contiguous() for x in self))


class Operand(NamedTuple):
    """Keys or values of a call, packed or dense.

    Attributes:
        data: codes uint8 ``[B, H_kv, N_kv, D // 2]`` where there are norms, else dense vectors ``[B, H_kv, N_kv, D]``.
        norms: float32 ``[B, H_kv, N_kv]``, or None.
        groups: of keys with offsets, int8 ``[B, H_kv, ceil(N_kv / 64), 2, D]``: offset and outlier of each group of 64, counted
            from token 0, in the rotated basis. Else None.
        steps: of keys with offsets, float32 ``[B, H_kv, ceil(N_kv / 64), 4]``: what these are multiples of, the outlier's
            distance from the offset, which only writers look at, and one number to spare.
    """

    data: torch.Tensor
    norms: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    steps: torch.Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether ``data`` holds codes."""
        return self.norms is not None

    def tokens(self, first: int, count: int) -> Operand:
        """Tokens ``first .. first + count``, as views; keys with offsets are cut where a group begins."""
        data, norms, groups, steps = self
        data, norms = data.narrow(2, first, count), None if norms is None else norms.narrow(2, first, count)
        if groups is not None and steps is not None:
            assert first % GROUP == 0, first
            groups, steps = (x.narrow(2, first // GROUP, -(-count // GROUP)) for x in (groups, steps))
        return Operand(data, norms, groups, steps)

    def sequences(self, some: slice) -> Operand:
        """Some sequences of the batch, as views."""
        return self.each(lambda x: x[some])

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Operand:
        """``change`` of each tensor that there is."""
        data, *others = self
        return Operand(change(data), *(None if x is None else change(x) for x in others))


class Masks(NamedTuple):
    """What hides keys from queries or changes scores; :func:`turboquant_vllm.reference.attention` defines each.

    Attributes:
        is_causal: query i sees keys ``0 .. N_kv - N_q + i``.
        sliding_window: with is_causal, of those the last ``sliding_window`` alone.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: float32 ``[H_q]``, one more logit for each head.
        windows: int32 ``[S]``, over pages: a sliding window for each sequence, instead of one for all.
    """

    is_causal: bool = False
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    windows: torch.Tensor | None = None

    @property
    def hides_nothing(self) -> bool:
        """Whether every score counts as it is, but for those that the causal mask hides."""
        return self.sliding_window is None and self.softcap is None and self.windows is None

    @property
    def only_causal(self) -> bool:
        """Whether there is none but perhaps the causal one."""
        return self.hides_nothing and self.sinks is None


class Sequences(NamedTuple):
    """Where the sequences of a mixed batch lie in pages and in the queries ``[T, H_q, D]``.

    Attributes:
        block_table: int32 ``[S, max_pages]``; token t of sequence s is in page ``block_table[s, t // page_size]``.
        seq_lens: int32 ``[S]``, keys of each sequence, its query tokens among them.
        cu_seqlens_q: int32 ``[S + 1]``; sequence s has the query tokens ``cu_seqlens_q[s] .. cu_seqlens_q[s + 1]``.
        max_query_len, max_seq_len: no sequence has more query tokens or keys.
        seq_lens_cpu, cu_seqlens_q_cpu: what these tensors hold, where the host knows.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_query_len: int
    max_seq_len: int
    seq_lens_cpu: Sequence[int] | None = None
    cu_seqlens_q_cpu: Sequence[int] | None = None

    def contiguous(self) -> Sequences:
        """The same without gaps within a row, as kernels read them."""
        table = self.block_table if self.block_table.stride(1) == 1 else self.block_table.contiguous()
        return self._replace(
            block_table=table, seq_lens=self.seq_lens.contiguous(), cu_seqlens_q=self.cu_seqlens_q.contiguous()
        )


NO_TABLES = Tables()  # of calls whose operands are dense
NO_MASKS = Masks()
