"""The native store's source, run lane by lane on a CPU: codes and norms in their slots, every other byte untouched."""

from __future__ import annotations

import functools

import pytest
import torch

from group_store_cases import GroupedPages
from group_store_contract import HEADS, GroupStoreContract, keys_like_a_models
from kernel_lanes import emulated_store, few_objects, needs_compiler, store_kernels  # noqa: F401
from store_cases import StoreCase, check_store, random_store
from turboquant_vllm import ops, tq4_store
from turboquant_vllm.cuda.store import New, TokenWriter

pytestmark = [pytest.mark.slow, needs_compiler, pytest.mark.usefixtures("emulated_store")]

HALF, BF16 = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("head_dim", "dtype", "scale", "layout", "slot_dtype"),
    [
        (64, BF16, "unbiased", "contiguous", torch.int64),
        (128, HALF, "norm", "sliced", torch.int64),
        (128, BF16, "least_squares", "transposed", torch.int32),
        (256, BF16, "norm", "contiguous", torch.int32),
        (256, HALF, "unbiased", "contiguous", torch.int64),
    ],
)
def test_every_byte(generator, head_dim, dtype, scale, layout, slot_dtype):
    def run(case: StoreCase, **options: bool) -> None:
        rotation, _, companding, _, *scaling = case.codec.writing
        rotation = torch.empty(head_dim**2 + 1)[1:].view(head_dim, head_dim).copy_(rotation)  # which begins anywhere
        where = (case.slot_mapping, case.cache.buffer)
        New(case.k, case.v, *where, rotation, companding, *scaling, case.cache.page_size).laid_out().store(**options)

    for tokens, heads, page_size in ((1, 1, 16), (3, 2, 48), (41, 5, 48)):
        case = random_store(
            generator, tokens=tokens, heads=heads, head_dim=head_dim, dtype=dtype, page_size=page_size, layout=layout,
            slot_dtype=slot_dtype, scale=scale,
        )  # fmt: skip
        check_store(run, case)
        case.memory.random_(generator=generator)
        check_store(functools.partial(run, leaves_room=True), case)


class TestGroups(GroupStoreContract):
    """Keys with offsets."""

    @pytest.fixture
    def device(self):
        return "cpu"

    @pytest.fixture
    def store(self, monkeypatch):
        monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
        return native_store

    @pytest.mark.parametrize(("teams", "of_block"), [(1, 1), (1000, 1), (1000, 4)])
    def test_bits_do_not_depend_on_the_grid(self, store, codec, generator, dtype, monkeypatch, teams, of_block):
        pages, other = (GroupedPages(torch.Generator().manual_seed(5), codec, [200, 90, 90], dtype=dtype) for _ in range(2))
        left = [keys_like_a_models(generator, n, 64) for n in (200, 90, 90)]
        for counts in ((70, 20, 64), (3, 50, 1), (100, 1, 20)):
            chunks = [k[:, :n] for k, n in zip(left, counts, strict=True)]
            left = [k[:, n:] for k, n in zip(left, counts, strict=True)]
            state = generator.get_state()
            for some, sizes in ((pages, (4, 3)), (other, (teams, of_block))):
                some.generator = generator.set_state(state)
                monkeypatch.setattr("turboquant_vllm.cuda.store._kernels", store_kernels(*sizes))
                some.write(store if of_block == 1 else store_beside, *chunks, check=False)
        if teams == 1000:  # values of few tokens, by that grid, are rotated in another order
            for some in (pages, other):
                cache = some.cache_in(some.memory)
                cache.v_codes.zero_()
                cache.v_norms.zero_()
        assert torch.equal(pages.memory, other.memory)

    @pytest.mark.parametrize("has_previous", [True, False])
    def test_one_token_after_the_other(self, store, codec, generator, dtype, has_previous):
        # As a growing cache lays them out: one page for each sequence.
        batch, tokens, page_size = 3, 70, 128
        first, second = (
            GroupedPages(generator, codec, [page_size] * batch, page_size=page_size, dtype=dtype) for _ in range(2)
        )
        second.tables = first.tables
        k, v = (torch.randn(tokens, batch, HEADS, 64, generator=generator).to(dtype) for _ in range(2))
        slots = torch.tensor([[first.slot(i, t) for i in range(batch)] for t in range(tokens)])
        previous = torch.where(torch.arange(tokens)[:, None] % page_size > 0, slots - 1, -1) if has_previous else None
        rotation, _, companding, _, centroids, scale = codec.writing
        cache = first.cache_in(first.memory)
        tables = (rotation, companding, centroids, scale, page_size, True, codec.key_scales, previous)
        writer = TokenWriter(k[0], v[0], slots, cache.buffer, *tables)
        for t in (*range(60, 70), 64, 0, 1):
            writer(k[t].data_ptr(), v[t].data_ptr(), t)
            before = None if previous is None else previous[t]
            store(k[t], v[t], second.cache_in(second.memory), codec, slots[t], before)
        assert torch.equal(first.memory, second.memory)

    def test_slots_of_different_types(self, store, codec, generator, dtype):
        pages, other = (GroupedPages(generator, codec, [100], dtype=dtype) for _ in range(2))
        other.tables = pages.tables
        k = keys_like_a_models(generator, 100, 64).transpose(0, 1).to(dtype)
        slots, previous = (torch.tensor([pages.slot(0, i - back) for i in range(100)]) for back in (0, 1))
        pages.check(store, k, k, slots.int(), previous)
        store(k, k, other.cache_in(other.memory), codec, slots, previous.int())
        assert torch.equal(pages.memory, other.memory)


def native_store(k, v, cache, codec, slots, previous):
    """The public function, with the native kernel."""
    tq4_store(k, v, cache, codec, slots, previous_slots=previous, backend="cuda")


def store_beside(k, v, cache, codec, slots, previous):
    """The same, with room left for a kernel behind it."""
    rotation, _, companding, _, centroids, scale = codec.writing
    how = (companding, centroids, scale, cache.page_size, True, codec.key_scales, previous)
    New(k, v, slots, cache.buffer, rotation, *how).laid_out().store(leaves_room=True)
