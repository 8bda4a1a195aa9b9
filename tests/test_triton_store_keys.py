"""Triton's writer of keys with offsets, in its interpreter (which rounds bfloat16 wrongly)."""

from __future__ import annotations

import pytest
import torch

from group_store_cases import GroupedPages
from group_store_contract import GroupStoreContract, keys_like_a_models
from triton_interpreter import in_interpreter
from turboquant_vllm import TQ4Codec

pytestmark = in_interpreter

HALF, FULL = torch.float16, torch.float32


@pytest.fixture
def device():
    return "cpu"


def one(device: torch.device) -> int:
    """Of a program for every 64 rows, since each takes the interpreter long."""
    return 1


@pytest.fixture
def store(interpreter, monkeypatch):
    monkeypatch.setattr(GroupedPages, "repeats", False)  # nothing runs side by side here

    def call(k, v, cache, codec, slots, previous, **patch):
        rotation, _, *how = codec.writing
        args = (k, v, cache.buffer, slots, rotation, *how, cache.page_size, True, codec.key_scales, previous)
        few = {"triton.store_keys:_PROGRAMS": 1, "triton.store_keys:processors": one}
        interpreter.call("triton.store:store", *args, patch=patch.get("patch", few))

    return call


class TestContract(GroupStoreContract):
    @pytest.fixture
    def dtype(self):
        return HALF

    @pytest.fixture
    def wide_dtype(self):
        return FULL

    # Those of the contract that differ most: each takes the interpreter long.
    @pytest.mark.parametrize(
        ("head_dim", "is_wide", "scale", "slot_dtype", "scaled"),
        [(80, False, "norm", torch.int64, False), (128, True, "unbiased", torch.int32, True)],
    )
    def test_a_batch(self, store, device, generator, wide_dtype, head_dim, is_wide, scale, slot_dtype, scaled):
        args = (store, device, generator, wide_dtype, head_dim, is_wide, scale, "sliced", slot_dtype, scaled)
        super().test_a_batch(*args)

    def untouched(self, size, device):
        # Shared from the start: what goes to the interpreter's process would be copied else, all of it.
        return torch.tensor([], dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))

    @pytest.mark.parametrize("page_size", [2**26])
    def test_places_beyond_32_bits(self, store, device, generator, dtype, page_size):
        super().test_places_beyond_32_bits(store, device, generator, dtype, page_size)


def test_wide_keys(store, generator):
    pages = GroupedPages(generator, TQ4Codec(512, scale="unbiased"), [66], page_size=64, dtype=HALF)
    for chunk in keys_like_a_models(generator, 66, 512).split(65, 1):
        pages.write(store, chunk)


@pytest.mark.parametrize("programs", [1, 8])
def test_runs_are_found_by_programs_of_few_rows(store, generator, programs):
    """A run begins in one program's rows alone; the rows before and behind it, and those of no slot, are others'."""
    codec = TQ4Codec(64)
    pages = GroupedPages(generator, codec, [150, 3], page_size=64, dtype=HALF)
    first, second = keys_like_a_models(generator, 150, 64), keys_like_a_models(generator, 3, 64)

    def among_many(*call):
        store(*call, patch={"triton.store_keys:_PROGRAMS": programs})

    pages.write(among_many, first[:, :30], second, pad=0.3)
    pages.write(among_many, first[:, 30:], None, pad=0.3)
