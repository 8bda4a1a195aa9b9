"""The paged store on a GPU: both kernels against the reference, graphs, and offsets beyond 32 bits."""

from __future__ import annotations

import pytest
import torch

from group_store_contract import GroupStoreContract
from store_cases import StoreCase, check_store, random_store
from turboquant_vllm import PagedTQ4Cache, tq4_store
from turboquant_vllm.store import why_not_backend

pytestmark = pytest.mark.gpu

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def store(case: StoreCase, backend: str) -> None:
    if reason := why_not_backend(backend, case.k, case.v, case.cache, case.codec):
        pytest.skip(reason)
    tq4_store(case.k, case.v, case.cache, case.codec, case.slot_mapping, backend=backend)


@pytest.fixture
def device():
    return "cuda"


class TestKeysWithOffsets(GroupStoreContract):
    @pytest.fixture(params=["cuda", "triton"])
    def store(self, request):
        def call(k, v, cache, codec, slots, previous):
            if reason := why_not_backend(request.param, k, v, cache, codec):
                pytest.skip(reason)
            tq4_store(k, v, cache, codec, slots, previous_slots=previous, backend=request.param)

        return call

    def test_vectors_of_512_coordinates(self, store, device, generator, wide_dtype):
        self.test_a_batch(store, device, generator, wide_dtype, 512, True, "unbiased", "sliced", torch.int32, True)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_store(generator, backend, dtype, head_dim, layout):
    for tokens, heads, page_size, slot_dtype, scale in (
        (1, 1, 16, torch.int32, "norm"), (7, 3, 48, torch.int64, "unbiased"), (300, 8, 16, torch.int64, "norm"),
        (1031, 5, 256, torch.int32, "norm"), (333, 2, 16, torch.int64, "unbiased"), (200, 2, 16, torch.int64, "least_squares"),
    ):  # fmt: skip
        case = random_store(
            generator, tokens=tokens, heads=heads, head_dim=head_dim, dtype=dtype, page_size=page_size, layout=layout,
            slot_dtype=slot_dtype, scale=scale, device="cuda",
        )  # fmt: skip
        check_store(lambda case: store(case, backend), case)


@pytest.mark.parametrize(
    ("head_dim", "rotation", "dtype", "layout"),
    [
        (80, "haar", BF16, "contiguous"),
        (96, "haar", HALF, "odd"),
        (128, "haar", BF16, "contiguous"),
        (128, "hadamard", HALF, "odd"),
        (192, "haar", HALF, "contiguous"),
        (256, "haar", BF16, "contiguous"),
        (512, "hadamard", BF16, "contiguous"),
        (512, "haar", HALF, "odd"),
        (128, "hadamard", FULL, "transposed"),
    ],
)
def test_what_is_left_to_triton(generator, head_dim, rotation, dtype, layout):
    case = random_store(
        generator, tokens=101, heads=3, head_dim=head_dim, dtype=dtype, rotation=rotation, layout=layout, device="cuda"
    )
    assert why_not_backend("cuda", case.k, case.v, case.cache, case.codec)
    check_store(lambda case: store(case, "auto" if layout == "odd" else "triton"), case)


def test_vectors_that_begin_off_a_boundary(generator):
    case = random_store(generator, tokens=50, heads=2, head_dim=128, dtype=HALF, device="cuda")
    memory = torch.zeros(50 * 2 * 128 + 8, dtype=HALF, device="cuda")
    k = memory[1 : 1 + case.k.numel()].view_as(case.k).copy_(case.k)
    shifted = StoreCase(k, case.v, case.codec, case.slot_mapping, case.cache, case.memory)
    check_store(lambda case: store(case, "cuda"), shifted)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_replays_with_other_contents(generator, backend):
    sizes = {"tokens": 70, "heads": 4, "head_dim": 128, "dtype": BF16, "device": "cuda"}
    case, other = random_store(generator, **sizes), random_store(generator, **sizes)
    store(case, backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store(case, backend)
    for name in ("k", "v", "slot_mapping"):
        getattr(case, name).copy_(getattr(other, name))
    check_store(lambda case: graph.replay(), case)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_pages_beyond_32_bits(generator, backend):
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    case = random_store(generator, tokens=40, heads=2, head_dim=128, dtype=HALF, device="cuda")
    cache = PagedTQ4Cache.allocate(2**32 // 4352 + 4, page_size=16, num_kv_heads=2, head_dim=128, device="cuda")
    cache.buffer.zero_()
    slots = cache.num_slots - 1 - torch.randperm(64, generator=generator)[:40].cuda()
    last = PagedTQ4Cache(cache.buffer[-4:], page_size=16, num_kv_heads=2, head_dim=128)
    far = StoreCase(case.k, case.v, case.codec, slots, cache, case.memory)
    store(far, backend)
    got = last.buffer.clone()
    assert not cache.buffer[:-4].any()
    last.buffer.zero_()
    near = StoreCase(case.k, case.v, case.codec, slots - (cache.num_slots - 64), last, case.memory)
    store(near, backend)
    assert torch.equal(got, last.buffer)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_operator_is_registered_right(generator, backend):
    case = random_store(generator, tokens=20, heads=2, head_dim=128, dtype=HALF, device="cuda")
    checks = torch.library.opcheck(torch.ops.turboquant.store.default, (*case.arguments, backend))
    assert set(checks.values()) == {"SUCCESS"}
