"""The Triton attention kernels on a GPU: accuracy, the contract, and what only a real device shows.

Every distinct (dtype, head_dim, packing, size class, causality) is one more kernel to compile, so the lists are short.
"""

from __future__ import annotations

import pytest
import torch

from attention_cases import check, check_replays, poisoned_memory, random_case
from attention_contract import AttentionContract, check_causal_sizes
from mask_contract import MaskContract
from offset_contract import OffsetContract
from turboquant_vllm import ops

pytestmark = pytest.mark.gpu

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
PACKED, PACKED_KEYS, DENSE = (True, True), (True, False), (False, False)

# dtype, head_dim, group, q_len, packed, is_causal. Rows of one key/value head: group * q_len.
DECODE = [
    (HALF, 32, 1, 1, PACKED, False),
    (HALF, 64, 4, 1, PACKED, True),
    (HALF, 80, 5, 1, PACKED, False),
    (HALF, 96, 7, 1, PACKED, False),
    (HALF, 128, 4, 1, PACKED, False),
    (HALF, 192, 8, 1, PACKED, False),
    (HALF, 256, 4, 1, PACKED, False),
    (BF16, 64, 7, 1, PACKED, False),
    (BF16, 128, 8, 1, PACKED, False),
    (BF16, 128, 16, 1, PACKED, False),
    (BF16, 256, 5, 1, PACKED, False),
    (BF16, 512, 8, 1, PACKED, False),
    (HALF, 512, 16, 1, PACKED, False),
    (HALF, 320, 4, 1, PACKED_KEYS, False),
    (FULL, 128, 4, 1, PACKED, False),
    (HALF, 128, 4, 1, PACKED_KEYS, False),
    (BF16, 96, 4, 1, PACKED_KEYS, False),
    (BF16, 128, 4, 1, DENSE, False),
]
SOME_ROWS = [
    (HALF, 96, 7, 3, PACKED, True),
    (BF16, 128, 4, 17, PACKED, True),
    (HALF, 256, 4, 5, PACKED, True),
    (BF16, 512, 4, 17, PACKED, True),
    (FULL, 512, 4, 3, PACKED, True),
    (BF16, 192, 1, 70, PACKED, False),
    (FULL, 80, 4, 3, PACKED, True),
    (BF16, 128, 4, 17, PACKED_KEYS, True),
]
MANY_ROWS = [
    (HALF, 64, 4, 70, PACKED, True),
    (HALF, 128, 1, 300, PACKED, False),
    (HALF, 256, 8, 40, PACKED, True),
    (BF16, 512, 4, 300, PACKED, True),
    (BF16, 512, 4, 300, DENSE, True),
    (BF16, 80, 5, 70, PACKED, True),
    (BF16, 128, 4, 300, PACKED, True),
    (FULL, 64, 4, 70, PACKED, True),
    (HALF, 128, 4, 300, PACKED_KEYS, True),
    (BF16, 128, 4, 300, DENSE, True),
]


def _name(value: object) -> str | None:
    names = {PACKED: "packed", PACKED_KEYS: "packed-keys", DENSE: "dense"}
    return names.get(value) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.fixture
def device():
    return "cuda"


@pytest.fixture
def run():
    from turboquant_vllm.triton.launch import attention

    def poisoned(*args):
        with poisoned_memory():
            return attention(*args)

    return poisoned


class TestContract(AttentionContract):
    @pytest.fixture
    def dtype(self):
        return BF16


class TestMasks(MaskContract):
    @pytest.fixture
    def dtype(self):
        return HALF


class TestOffsets(OffsetContract):
    @pytest.fixture(params=[HALF, FULL], ids=["fp16", "fp32"])
    def dtype(self, request):
        return request.param


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "q_len"),
    [
        (HALF, 128, 4, 1),
        (BF16, 128, 8, 1),
        (BF16, 256, 16, 1),
        (HALF, 96, 5, 1),
        (BF16, 80, 4, 17),
        (HALF, 256, 4, 70),
        (BF16, 512, 8, 1),
        (HALF, 512, 4, 70),
    ],
)
def test_accuracy_of_keys_with_offsets(run, generator, dtype, head_dim, group, q_len):
    for batch, kv_len in ((2, 299), (1, 5003)):
        sizes = {"batch": batch, "kv_len": kv_len, "head_dim": head_dim, "group": group, "q_len": q_len}
        check(run, random_case(generator, dtype=dtype, device="cuda", is_causal=True, offsets=True, **sizes))


@pytest.mark.parametrize(("dtype", "head_dim", "group", "q_len", "packed", "is_causal"), DECODE, ids=_name)
def test_accuracy_of_decode(run, generator, dtype, head_dim, group, q_len, packed, is_causal):
    for batch, kv_len in ((3, 33), (1, 299), (2, 1021), (1, 9001)):
        case = random_case(
            generator, dtype=dtype, device="cuda", batch=batch, group=group, q_len=q_len, kv_len=kv_len,
            head_dim=head_dim, packed=packed, is_causal=is_causal,
        )  # fmt: skip
        check(run, case)


@pytest.mark.parametrize(("dtype", "head_dim", "group", "q_len", "packed", "is_causal"), SOME_ROWS + MANY_ROWS, ids=_name)
def test_accuracy_of_prefill(run, generator, dtype, head_dim, group, q_len, packed, is_causal):
    for batch, kv_len in ((2, q_len - 2), (3, q_len), (1, 1021), (2, 3001)):
        case = random_case(
            generator, dtype=dtype, device="cuda", batch=batch, group=group, q_len=q_len, kv_len=max(kv_len, 3),
            head_dim=head_dim, packed=packed, is_causal=is_causal,
        )  # fmt: skip
        check(run, case)


def test_causal_sizes(run, generator):
    check_causal_sizes(run, generator, HALF, "cuda", list(range(1, 41)))


@pytest.mark.parametrize("slice_len", [48, 100])
def test_slices_of_the_scratch(run, generator, monkeypatch, slice_len):
    from turboquant_vllm.triton import launch

    case = random_case(generator, dtype=BF16, device="cuda", q_len=140, kv_len=300, is_causal=True)
    monkeypatch.setattr(launch, "_SCRATCH_BYTES", slice_len * 2 * 2 * 64 * 2)  # K and V, heads, head_dim, bytes
    check(run, case)


def test_batch_changes_no_bits_where_the_scratch_is_short(run, generator, monkeypatch):
    from turboquant_vllm.triton import launch

    case = random_case(generator, dtype=BF16, device="cuda", batch=4, q_len=140, kv_len=300, is_causal=True)
    monkeypatch.setattr(launch, "_SCRATCH_BYTES", 300 * 2 * 2 * 64 * 2)
    out, _ = run(*case.arguments)
    alone, _ = run(*case.batch_entry(2).arguments)
    assert torch.equal(alone, out[2:3])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=_name)
def test_levels_are_rounded_little(run, generator, dtype, head_dim):
    # One key has one level everywhere, so that its score is that level: queries are ones, and nothing is rotated.
    sizes = {"batch": 16, "num_kv_heads": 1, "group": 1, "kv_len": 1, "head_dim": head_dim, "sm_scale": 1 / head_dim}
    case = random_case(generator, dtype=dtype, device="cuda", **sizes)
    k = 17 * torch.arange(16, dtype=torch.uint8, device="cuda").view(16, 1, 1, 1).expand_as(case.k).contiguous()
    ones = {"q": torch.ones_like(case.q), "k_norms": torch.ones_like(case.k_norms), "rotation": torch.eye(head_dim).cuda()}
    _, lse = run(*case.replace(k=k, **ones).arguments)
    errors = lse.flatten().double() / case.centroids.double() - 1
    # Errors of numbers spread evenly between two powers of two: 0.2 units in the last place of the lower one, in the mean.
    assert errors.square().mean().sqrt() < (0.19 if dtype == BF16 else 0.25) * torch.finfo(dtype).eps


def _far_apart(x: torch.Tensor, buffer: torch.Tensor, at: int, strides: tuple[int, ...]) -> torch.Tensor:
    """The values of x in ``buffer`` (bytes), from byte ``at`` on, with these strides in elements."""
    view = buffer.view(x.dtype).as_strided(x.shape, strides, at // x.itemsize)
    return view.copy_(x)


@pytest.fixture(scope="module")
def ten_gigabytes():
    size = 10 << 30
    if torch.cuda.mem_get_info()[0] < size + (4 << 30):
        pytest.skip("needs 14 GiB of free GPU memory")
    yield torch.empty(size, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()


@pytest.mark.parametrize("packed", [PACKED, DENSE], ids=_name)
@pytest.mark.parametrize("far", ["heads", "tokens"])
@pytest.mark.parametrize("q_len", [1, 70])
def test_offsets_beyond_32_bits(run, generator, ten_gigabytes, packed, far, q_len):
    case = random_case(generator, dtype=HALF, device="cuda", batch=1, group=4, q_len=q_len, kv_len=150, packed=packed)

    def spread(x: torch.Tensor | None, at: int) -> torch.Tensor | None:
        if x is None:
            return None
        rest = x.shape[3:].numel()
        strides = (2**31 + 64, rest) if far == "heads" else (rest, 2**24 + 64)
        if far == "tokens":
            assert 149 * strides[1] > 2**31
        return _far_apart(x, ten_gigabytes, at, (strides[0], *strides, *(1,) * len(x.shape[3:])))

    places = {"k": 0, "v": 1 << 16, "k_norms": 2 << 16, "v_norms": 3 << 16}
    check(run, case.replace(**{name: spread(getattr(case, name), at) for name, at in places.items()}))


def test_queries_with_offsets_beyond_32_bits(run, generator, ten_gigabytes):
    case = random_case(generator, dtype=HALF, device="cuda", group=4, q_len=3, kv_len=33, is_causal=True)
    q = _far_apart(case.q, ten_gigabytes, 0, (1, 2**29 + 64, 64, 1))  # seven heads away: 7 * 2^29 > 2^31
    check(run, case.replace(q=q))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_device_that_is_not_current(run, generator):
    case = random_case(generator, dtype=HALF, device="cuda:1", q_len=3, is_causal=True)
    with torch.cuda.device(0):
        out, lse = check(run, case)
    assert out.device == lse.device == torch.device("cuda:1")


@pytest.mark.parametrize("q_len", [1, 70])
def test_graph_replays_with_other_contents(generator, q_len):
    sizes = {"dtype": HALF, "device": "cuda", "batch": 2, "group": 4, "q_len": q_len, "kv_len": 299, "is_causal": True}
    case, other = random_case(generator, **sizes), random_case(generator, **sizes)
    check_replays(torch.ops.turboquant.triton_attention, case, other)


@pytest.mark.parametrize("packed", [PACKED, PACKED_KEYS, DENSE], ids=_name)
def test_operator_is_registered_right(generator, packed):
    assert ops.has_triton()
    case = random_case(generator, dtype=HALF, device="cuda", q_len=1, packed=packed)
    torch.library.opcheck(torch.ops.turboquant.triton_attention.default, case.operator_arguments)
