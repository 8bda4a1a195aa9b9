"""Lengths of a batch over pages that the host knows as well: what ``seq_lens`` and ``cu_seqlens_q`` hold."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from turboquant_vllm.checks import PagedShape, check_shape
from turboquant_vllm.limits import MANY_ROWS

__all__ = ["HostLengths"]


@dataclass(frozen=True)
class HostLengths:
    """Keys of each sequence, or a bound where it has few query rows, and where its query tokens begin and end."""

    seq_lens: list[int]
    cu_seqlens_q: list[int]

    @classmethod
    def check(
        cls, seq_lens: Sequence[int] | torch.Tensor | None, cu_seqlens_q: Sequence[int] | torch.Tensor | None, shape: PagedShape
    ) -> HostLengths | None:
        """What a caller gave as ``seq_lens_cpu`` and ``cu_seqlens_q_cpu``; None where neither was given.

        Raises:
            TypeError, ValueError: one is missing, or does not fit; names it, what was expected and what came.
        """
        if seq_lens is None and cu_seqlens_q is None:
            return None
        if seq_lens is None or cu_seqlens_q is None:
            here, missing = ("seq_lens_cpu", "cu_seqlens_q_cpu")[:: -1 if seq_lens is None else 1]
            raise ValueError(f"{missing} must come with {here}, got None")
        lens = _integers("seq_lens_cpu", seq_lens, shape.num_seqs)
        starts = _integers("cu_seqlens_q_cpu", cu_seqlens_q, shape.num_seqs + 1)
        room = shape.max_pages * shape.page_size
        if starts[0] != 0:
            raise ValueError(f"cu_seqlens_q_cpu[0] must be 0, got {starts[0]}")
        for i, length in enumerate(lens):
            if not starts[i] <= starts[i + 1] <= shape.total_tokens:
                span = f"from {starts[i]} to {shape.total_tokens}"
                raise ValueError(f"cu_seqlens_q_cpu[{i + 1}] must be {span}, got {starts[i + 1]}")
            if not 0 <= length <= room:
                raise ValueError(f"seq_lens_cpu[{i}] must be from 0 to {room}, got {length}")
        return cls(lens, starts)

    @property
    def query_lens(self) -> list[int]:
        """Query tokens of each sequence."""
        return [stop - first for first, stop in zip(self.cu_seqlens_q, self.cu_seqlens_q[1:], strict=False)]

    def check_contents(self, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor, group: int) -> None:
        """The tensors must hold the same, which waits for their device; of keys, few rows need no more than a bound.

        Raises:
            ValueError: naming the first entry that is wrong, what was expected and what came.
        """
        for i, (have, got) in enumerate(zip(cu_seqlens_q.tolist(), self.cu_seqlens_q, strict=True)):
            if have != got:
                raise ValueError(f"cu_seqlens_q_cpu[{i}] must be cu_seqlens_q[{i}], which is {have}, got {got}")
        for i, (have, got, count) in enumerate(zip(seq_lens.tolist(), self.seq_lens, self.query_lens, strict=True)):
            if got < have or (got > have and count * group >= MANY_ROWS):
                least = "" if count * group >= MANY_ROWS else "at least "
                raise ValueError(f"seq_lens_cpu[{i}] must be {least}seq_lens[{i}], which is {have}, got {got}")


def _integers(name: str, values: Sequence[int] | torch.Tensor, count: int) -> list[int]:
    if isinstance(values, torch.Tensor):
        if values.dtype != torch.int32:
            raise TypeError(f"{name} must be torch.int32, got {values.dtype}")
        if values.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {values.device}")
        check_shape(name, values, (count,))
        return values.tolist()
    try:
        numbers = [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name} must be an int32 tensor on the CPU or hold ints, got {type(values).__name__}") from None
    if len(numbers) != count:
        raise ValueError(f"{name} must have {count} entries, got {len(numbers)}")
    return numbers
