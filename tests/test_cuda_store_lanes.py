"""The native store's source, run lane by lane on a CPU: codes and norms in their slots, every other byte untouched."""

from __future__ import annotations

import pytest
import torch

from compression_checks import check_compress
from kernel_lanes import emulated_store, few_objects, needs_compiler  # noqa: F401
from store_cases import StoreCase, check_store, random_store
from turboquant_vllm import TQ4Codec
from turboquant_vllm.cuda import store
from turboquant_vllm.hf.storage import page_views

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


def test_a_page_of_more_than_four_gib(generator):
    """As a cache has whose pages are whole sequences; no memory is used but where something is written."""
    heads, head_dim, page_size = 33, 64, 1_900_048
    k, v = torch.randn(2, 1, heads, head_dim, generator=generator).half()
    buffer = torch.empty(1, heads * page_size * (head_dim + 8), dtype=torch.uint8)
    codec = TQ4Codec(head_dim)
    rotation, _, companding, _, *scaling = codec.writing
    store.store(k, v, buffer, torch.tensor([page_size - 1]), rotation, companding, *scaling, page_size)
    keys, key_norms, values, value_norms = (x[0, :, -1] for x in page_views(buffer, heads, head_dim))
    check_compress(lambda *_: (keys, key_norms), k[0], codec)
    check_compress(lambda *_: (values, value_norms), v[0], codec)
