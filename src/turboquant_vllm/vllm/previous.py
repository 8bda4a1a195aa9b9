"""Where the token before each token of a step is: what a group of keys that begins takes its first offset from.

A token stands behind another one of its sequence in the step, whose slot the step has, or it is the sequence's first there;
then the block table has the page of the token before. One launch finds both, once a step for all layers, and waits for
nothing. A graph's replay finds those of the next step in the same memory.
"""

from __future__ import annotations

import torch

from turboquant_vllm import ops

__all__ = ["PreviousSlots"]


class PreviousSlots:
    """Memory for ``previous_slots`` of :func:`turboquant_vllm.tq4_store`, which stays where it is.

    Args:
        tokens: that a step may have.
        page_size: tokens in a page.
        device: of the cache.
    """

    def __init__(self, tokens: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        # One more place, where the slots of sequences go that have no token.
        self._slots = torch.full((tokens + 1,), -1, dtype=torch.int64, device=device)

    def warm_up(self) -> None:
        """Compile what a step needs: or a server's first one would wait."""
        none = torch.zeros(2, dtype=torch.int32, device=self._slots.device)
        self.find(none, none[:1], none[None], none[:1].long() - 1)

    def find(
        self, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> torch.Tensor | None:
        """The slots ``[tokens]`` of a step, of which those behind its own tokens hold anything.

        Args:
            cu_seqlens_q: int32 ``[S + 1]``, where the query tokens of each sequence begin and end.
            seq_lens: int32 ``[S]``, keys of each, its query tokens among them.
            block_table: int32 ``[S, max_pages]``, rows contiguous.
            slot_mapping: int64 ``[n]``, contiguous, at least of the query tokens; -1 for no slot.

        Returns:
            For each token the slot of the one before it in its sequence, -1 where there is none; also where another
            sequence of the step writes that one, since it cannot be told which is first: a block that requests share is known
            to vLLM before its tokens are. None if there is no room for so many tokens.
        """
        if slot_mapping.shape[0] >= self._slots.shape[0]:
            return None
        if ops.triton_runs_on(slot_mapping.device):
            from turboquant_vllm.triton.previous import previous_slots

            previous_slots(cu_seqlens_q, seq_lens, block_table, slot_mapping, self.page_size, self._slots)
        else:
            _previous_slots(cu_seqlens_q, seq_lens, block_table, slot_mapping, self.page_size, self._slots)
        return self._slots


def _previous_slots(
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    page_size: int,
    out: torch.Tensor,
) -> None:
    """:meth:`PreviousSlots.find` in plain PyTorch, into ``out``."""
    out[1 : slot_mapping.shape[0]] = slot_mapping[:-1]
    first, stop = cu_seqlens_q[:-1].long(), cu_seqlens_q[1:].long()
    position = seq_lens - (stop - first) - 1  # of the token before the first
    page = (position // page_size).clamp(0, block_table.shape[1] - 1)
    slot = block_table.gather(1, page[:, None])[:, 0].long() * page_size + position % page_size
    is_written = (slot[:, None] == slot_mapping).any(1)
    out[torch.where(stop > first, first, len(out) - 1)] = torch.where((position < 0) | is_written, -1, slot)
