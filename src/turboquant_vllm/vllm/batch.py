"""What a step's batch asks of attention: runs of neighbouring sequences that are served alike.

A prompt whose tokens are all in this step attends to the keys and values just computed, exactly; every other sequence reads its
pages, where those of its own new tokens are already. Which is which is decided for each sequence by its own lengths: one
sequence's query length may well be another's total. vLLM puts sequences that decode first, so that they are mostly one run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

__all__ = ["Kind", "Run", "plan_runs"]


class Kind(IntEnum):
    """How a sequence is served."""

    DECODE = 0  # few query tokens, behind keys in the pages
    EXACT = 1  # all of its keys and values are among the step's own
    CONTINUED = 2  # many query tokens, behind keys in the pages


@dataclass(frozen=True)
class Run:
    """Neighbouring sequences of a step.

    Attributes:
        kind: how they are served.
        tokens: their query tokens among the step's.
        block_table: int32 ``[S, max_pages]``.
        seq_lens: int32 ``[S]``, keys of each.
        cu_seqlens_q: int32 ``[S + 1]``, from 0.
        max_query_len: no sequence has more query tokens.
        seq_lens_cpu, cu_seqlens_q_cpu: the same for the host, which does not know them where sequences decode.
        max_seq_len: no sequence has more keys; given where a layer is dense.
    """

    kind: Kind
    tokens: slice
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_query_len: int
    seq_lens_cpu: tuple[int, ...] | None = None
    cu_seqlens_q_cpu: tuple[int, ...] | None = None
    max_seq_len: int | None = None


def plan_runs(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    starts: np.ndarray,
    lengths: np.ndarray,
    decode_len: int,
) -> list[Run]:
    """Divide a step's sequences into runs.

    Args:
        cu_seqlens_q: int32 ``[S + 1]`` from 0, on the device.
        seq_lens: int32 ``[S]`` on the device.
        block_table: int32 ``[S, max_pages]`` on the device.
        starts: ``cu_seqlens_q`` as the host knows it.
        lengths: ``seq_lens`` as the host knows it; may be more than there are where a sequence decodes.
        decode_len: a sequence with at most so many query tokens decodes, unless it is a whole prompt.
    """
    query_lens = np.diff(starts)
    kinds = np.where(query_lens > decode_len, Kind.CONTINUED, Kind.DECODE)
    kinds[(query_lens == lengths) & (query_lens > 0)] = Kind.EXACT
    runs = []
    for first, stop in _alike(kinds):
        own, begin, kind = cu_seqlens_q[first : stop + 1], int(starts[first]), Kind(kinds[first])
        known = kind != Kind.DECODE
        runs.append(
            Run(
                kind=kind,
                tokens=slice(begin, int(starts[stop])),
                block_table=block_table[first:stop],
                seq_lens=seq_lens[first:stop],
                cu_seqlens_q=own - begin if begin else own,
                max_query_len=int(query_lens[first:stop].max()),
                seq_lens_cpu=tuple(lengths[first:stop].tolist()) if known else None,
                cu_seqlens_q_cpu=tuple((starts[first : stop + 1] - begin).tolist()) if known else None,
            )
        )
    return runs


def _alike(kinds: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ends ``(first, stop)`` of the longest runs of equal kinds."""
    ends = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    return itertools.pairwise(ends) if len(kinds) else iter(())
