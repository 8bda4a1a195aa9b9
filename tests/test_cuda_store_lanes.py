"""The native store's source, run lane by lane on a CPU: codes and norms in their slots, every other byte untouched."""

from __future__ import annotations

import pytest
import torch

from group_store_contract import GroupStoreContract
from kernel_lanes import emulated_store, few_objects, needs_compiler  # noqa: F401
from store_cases import StoreCase, check_store, random_store
from turboquant_vllm.cuda import store

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
    def run(case: StoreCase) -> None:
        rotation, _, companding, _, *scaling = case.codec.writing
        rotation = torch.empty(head_dim**2 + 1)[1:].view(head_dim, head_dim).copy_(rotation)  # which begins anywhere
        store.store(case.k, case.v, case.cache.buffer, case.slot_mapping, rotation, companding, *scaling, case.cache.page_size)

    for tokens, heads, page_size in ((1, 1, 16), (41, 5, 48)):
        case = random_store(
            generator, tokens=tokens, heads=heads, head_dim=head_dim, dtype=dtype, page_size=page_size, layout=layout,
            slot_dtype=slot_dtype, scale=scale,
        )  # fmt: skip
        check_store(run, case)


class TestGroups(GroupStoreContract):
    """Keys with offsets."""

    @pytest.fixture
    def device(self):
        return "cpu"

    @pytest.fixture
    def store(self):
        return native_store


def native_store(k, v, cache, codec, slots, previous):
    """The native store's caller, as the operator calls it."""
    rotation, _, companding, _, centroids, scale = codec.writing
    tables = (rotation, companding, centroids, scale, cache.page_size, True, codec.key_scales, previous)
    store.store(k, v, cache.buffer, slots, *tables)
