"""Sequences over pages that have more query rows than the native kernels take at once: cut into pieces, each a sequence.

A draft that is verified, or a short question behind a long prefix, is one tile of rows, whose keys Triton's kernels do not
split. Cut into pieces, such a sequence reads its keys once for each, but all multiprocessors share them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from turboquant_vllm.checks import PagedShape
from turboquant_vllm.lengths import HostLengths
from turboquant_vllm.limits import MANY_ROWS, MAX_SEQUENCES, most_rows_over_pages

__all__ = ["NativeCall", "cut_sequences", "native_calls", "rows_left"]

MOST_ROWS = MANY_ROWS - 1  # of a sequence that is cut


@dataclass(frozen=True)
class NativeCall:
    """A call of the native kernels: sequences ``first .. stop``, each in ``pieces`` of at most ``tokens`` query tokens."""

    first: int
    stop: int
    tokens: int
    pieces: int


def rows_left(shape: PagedShape, max_query_len: int, lengths: HostLengths | None) -> int:
    """Rows per key/value head from which on a sequence is in none of :func:`native_calls`, whatever comes after these rows."""
    most = most_rows_over_pages(shape.head_dim) // shape.group
    if lengths is not None:
        return max(MOST_ROWS // shape.group, most) * shape.group + 1
    return most * _pieces(shape, max_query_len) * shape.group + 1


def native_calls(shape: PagedShape, max_query_len: int, lengths: HostLengths | None) -> Iterator[NativeCall]:
    """Which sequences the native kernels serve; those of more rows in the same calls are left alone.

    With host lengths those that need no cutting are one call, whose kernels are as wide as these sequences, and neighbours
    that do are others. Without, all are one call.
    """
    most = most_rows_over_pages(shape.head_dim) // shape.group
    if lengths is None:
        yield NativeCall(0, shape.num_seqs, min(max_query_len, most), _pieces(shape, max_query_len))
        return
    counts = lengths.query_lens  # torch.compile follows what is below: no default of a generator, no key of groupby
    if longest := max([n for n in counts if n <= most], default=0):
        yield NativeCall(0, shape.num_seqs, longest, 1)
    first = 0
    for is_cut, run in itertools.groupby([most < n <= MOST_ROWS // shape.group for n in counts]):
        stop = first + len(list(run))
        if is_cut:
            pieces = -(-max(counts[first:stop]) // most)
            each = MAX_SEQUENCES // pieces
            yield from (NativeCall(i, min(i + each, stop), most, pieces) for i in range(first, stop, each))
        first = stop


def _pieces(shape: PagedShape, max_query_len: int) -> int:
    """Pieces of every sequence, where the host knows no more than a bound."""
    pieces = -(-max_query_len // (most_rows_over_pages(shape.head_dim) // shape.group))
    fit = max_query_len * shape.group <= MOST_ROWS and pieces * shape.num_seqs <= MAX_SEQUENCES
    return pieces if fit and pieces else 1


def cut_sequences(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    tokens: int,
    pieces: int,
    causal: bool,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch in which each sequence is ``pieces`` sequences, of ``tokens`` query tokens at most, over the same pages.

    With ``causal`` the keys of a piece end at its last query's own. A sequence of more than ``tokens * pieces`` query tokens
    stays in one piece. Nothing waits for the GPU.

    Args:
        block_table, seq_lens, cu_seqlens_q: as in :func:`turboquant_vllm.tq4_paged_attention`, of S sequences.

    Returns:
        The same for ``S * pieces`` sequences, of which some have no query tokens.
    """
    first, stop = cu_seqlens_q[:-1, None], cu_seqlens_q[1:, None]
    steps = torch.arange(1, pieces + 1, dtype=torch.int32, device=cu_seqlens_q.device) * tokens
    ends = torch.where(stop - first > tokens * pieces, stop, torch.minimum(first + steps, stop))  # [S, pieces]
    lens = seq_lens.clamp(0, block_table.shape[1] * page_size)[:, None].expand_as(ends)
    if causal:
        lens = lens - (stop - ends)
    starts = torch.cat([cu_seqlens_q[:1], ends.flatten()])
    return block_table.repeat_interleave(pieces, 0), lens.flatten(), starts
