"""The kernel that finds previous slots, in Triton's interpreter and compiled for every architecture; no GPU is needed."""

from __future__ import annotations

import contextlib

import pytest
import torch

from test_triton_compile import TARGETS, _Kernel, compiled, target, triton  # noqa: F401  (fixtures)
from turboquant_vllm.vllm.previous import PreviousSlots

CPU = torch.device("cpu")


def random_batch(generator, page_size):
    """Sequences of a step, some without tokens, some whose page another one writes, and tokens and sequences that pad."""

    def random(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    table = torch.randperm(64, generator=generator).int().view(8, 8)
    totals, counts, slots = [], [], []
    for sequence in range(6):
        total = random(0, 8 * page_size)
        count = random(0, min(total, 1100)) if random(0, 3) else min(total, 1)
        if sequence == 3:  # begins where the page ends that the one before writes
            table[3, : total // page_size] = table[2, : total // page_size]
        totals.append(total)
        counts.append(count)
        positions = torch.arange(total - count, total)
        slots.append(table[sequence, positions // page_size].long() * page_size + positions % page_size)
    starts = torch.tensor([0, *counts, 0, 0]).cumsum(0).int()
    slots.append(torch.full((5,), -1))
    return starts, torch.tensor([*totals, 0, 0], dtype=torch.int32), table, torch.cat(slots)


@pytest.mark.triton_interpreter
@pytest.mark.parametrize("page_size", [64, 192])
def test_it_finds_what_pytorch_finds(generator, interpreter, page_size):
    for _ in range(4):
        batch = random_batch(generator, page_size)
        count = int(batch[0][-1])
        found = PreviousSlots(len(batch[3]), page_size, CPU).find(*batch)
        out = torch.full((len(batch[3]) + 1,), -7)
        interpreter.call("triton.previous:previous_slots", *batch, page_size, out)
        assert torch.equal(out[:count], found[:count])
        assert (out[count:] == -7).all()


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize("target", TARGETS, indirect=True)
def test_it_compiles_once_for_all_steps(generator, compiled, monkeypatch):  # noqa: F811
    from turboquant_vllm.triton import previous

    monkeypatch.setattr(previous, "previous_slots_kernel", _Kernel(previous.previous_slots_kernel, compiled))
    monkeypatch.setattr(previous, "device_guard", lambda device: contextlib.nullcontext())
    for some in ((2, 8, 3), (5, 7, 16), (1, 1, 1)):
        sequences, pages, tokens = some
        starts, lengths = torch.zeros(sequences + 1, dtype=torch.int32), torch.zeros(sequences, dtype=torch.int32)
        table = torch.zeros(sequences, pages, dtype=torch.int32)
        previous.previous_slots(starts, lengths, table, torch.zeros(tokens, dtype=torch.int64), 64, torch.zeros(99).long())
    assert len({id(kernel) for _, kernel in compiled}) == 1
