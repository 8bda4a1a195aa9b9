"""What a step's batch asks of attention: runs of neighbouring sequences that are served alike.

vLLM puts sequences that decode first; behind them come prompts and chunks of prompts in any order. A prompt whose tokens are
all in this step attends to the keys and values just computed, exactly; every other sequence reads its pages, where those of
its own new tokens are already. Which is which is decided for each sequence by its own lengths: one sequence's query length
may well be another's total.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Run", "plan_runs"]


@dataclass(frozen=True)
class Run:
    """Neighbouring sequences of a step.

    Attributes:
        exact: all keys and values of each are among the step's own.
        tokens: their query tokens among the step's.
        block_table: int32 ``[S, max_pages]``.
        seq_lens: int32 ``[S]``, keys of each.
        cu_seqlens_q: int32 ``[S + 1]``, from 0.
        max_query_len, max_seq_len: no sequence has more query tokens or keys.
        lengths: (query tokens, keys) of each, where the host knows them: of all but decoding sequences.
    """

    exact: bool
    tokens: slice
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_query_len: int
    max_seq_len: int
    lengths: tuple[tuple[int, int], ...] = ()


def plan_runs(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    starts: np.ndarray,
    lengths: np.ndarray,
    *,
    max_query_len: int,
    max_seq_len: int,
    decode_len: int,
    captured: bool = False,
) -> list[Run]:
    """Divide a step's sequences into runs.

    Args:
        cu_seqlens_q: int32 ``[S + 1]`` from 0, on the device.
        seq_lens: int32 ``[S]`` on the device.
        block_table: int32 ``[S, max_pages]`` on the device.
        starts: ``cu_seqlens_q`` as the host knows it.
        lengths: ``seq_lens`` as the host knows it; may be more than a sequence has where that decodes.
        max_query_len: no sequence has more query tokens.
        max_seq_len: no sequence has more keys.
        decode_len: a sequence with at most so many query tokens decodes, unless it is a whole prompt.
        captured: for a CUDA graph, which will be replayed with other lengths: all sequences decode.
    """
    query_lens = np.diff(starts)
    exact = (query_lens == lengths) & (query_lens > 0)
    decodes = len(query_lens)
    if not captured:
        others = exact | (query_lens > decode_len)
        decodes = int(others.argmax()) if others.any() else decodes
    runs = []
    if decodes:
        runs.append(
            Run(
                exact=False,
                tokens=slice(0, int(starts[decodes])),
                block_table=block_table[:decodes],
                seq_lens=seq_lens[:decodes],
                cu_seqlens_q=cu_seqlens_q[: decodes + 1],
                max_query_len=max_query_len if captured else min(max_query_len, decode_len),
                max_seq_len=max_seq_len,
            )
        )
    for first, stop in _alike(exact, decodes):
        own = cu_seqlens_q[first : stop + 1]
        runs.append(
            Run(
                exact=bool(exact[first]),
                tokens=slice(int(starts[first]), int(starts[stop])),
                block_table=block_table[first:stop],
                seq_lens=seq_lens[first:stop],
                cu_seqlens_q=own - int(starts[first]) if starts[first] else own,
                max_query_len=int(query_lens[first:stop].max()),
                max_seq_len=int(lengths[first:stop].max()),
                lengths=tuple(zip(query_lens[first:stop].tolist(), lengths[first:stop].tolist(), strict=True)),
            )
        )
    return runs


def _alike(kinds: np.ndarray, first: int) -> Iterator[tuple[int, int]]:
    """Ends ``(first, stop)`` of the longest runs of equal kinds, from ``first`` on."""
    while first < len(kinds):
        other = kinds[first:] != kinds[first]
        stop = first + int(other.argmax()) if other.any() else len(kinds)
        yield first, stop
        first = stop
