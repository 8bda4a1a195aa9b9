"""The native decode on a GPU: accuracy, the contract, what it refuses, graphs, torch.compile, and invariance of its bits."""

from __future__ import annotations

import pytest
import torch

from attention_cases import check, check_replays, compare, expected, poisoned_memory, random_case, skip_if_refused
from attention_contract import AttentionContract, check_causal_sizes
from mask_contract import MaskContract
from turboquant_vllm import TQ4Codec, tq4_attention
from turboquant_vllm.attention import why_not
from turboquant_vllm.checks import AttentionShape

pytestmark = pytest.mark.gpu

HALF, BF16 = torch.float16, torch.bfloat16
LENGTHS = (1, 15, 16, 17, 255, 513, 1021, 2000)


@pytest.fixture(autouse=True)
def needs_nvidia():
    reason = why_not("cuda", torch.device("cuda"), HALF, AttentionShape(1, 8, 2, 1, 100, 128))
    if reason:
        pytest.skip(reason)


@pytest.fixture
def device():
    return "cuda"


def decode(*args, **options):
    from turboquant_vllm.cuda.decode import decode

    with poisoned_memory():
        return decode(*args, **options)


@pytest.fixture
def run():
    return decode


def decode_where_it_can(*args):
    skip_if_refused(*args)
    return decode(*args)


class TestContract(AttentionContract):
    @pytest.fixture(params=[HALF, BF16], ids=["fp16", "bf16"])
    def dtype(self, request):
        return request.param

    @pytest.fixture
    def run(self):
        return decode_where_it_can


class TestMasks(MaskContract):
    @pytest.fixture
    def dtype(self):
        return HALF

    @pytest.fixture
    def run(self):
        return decode_where_it_can


@pytest.mark.parametrize("group", [1, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])
def test_accuracy(run, generator, dtype, head_dim, group):
    for q_len in range(1, min(8, 32 // group) + 1):
        for kv_len in (LENGTHS[q_len % 8], LENGTHS[(q_len + 4) % 8]):
            case = random_case(
                generator, dtype=dtype, device="cuda", batch=2, group=group, q_len=q_len, kv_len=kv_len, head_dim=head_dim,
                is_causal=bool(q_len % 2),
            )  # fmt: skip
            check(run, case)
            check(run, case.replace(is_causal=not case.is_causal))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_long_context(run, generator, head_dim):
    check(run, random_case(generator, dtype=HALF, device="cuda", group=4, kv_len=33001, head_dim=head_dim, num_kv_heads=1))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_strides(run, generator, head_dim, layout):
    case = random_case(
        generator, dtype=BF16, device="cuda", batch=2, group=4, q_len=3, kv_len=613, head_dim=head_dim, layout=layout,
        is_causal=True,
    )  # fmt: skip
    check(run, case)


def test_norms_in_any_layout(run, generator):
    case = random_case(generator, dtype=HALF, device="cuda", batch=2, group=4, kv_len=613, layout="strided")
    check(run, case.replace(k=case.k.contiguous(), v=case.v.contiguous()))


def test_codes_that_begin_anywhere(run, generator):
    case = random_case(generator, dtype=HALF, device="cuda", batch=2, group=4, kv_len=77)

    def moved(codes):
        return torch.cat([codes.new_zeros(3), codes.flatten()])[3:].view(codes.shape)

    check(run, case.replace(k=moved(case.k), v=moved(case.v)))


def test_causal_sizes(run, generator):
    check_causal_sizes(run, generator, HALF, "cuda", list(range(1, 17)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [4, 16])
def test_batch_changes_no_bits(run, generator, head_dim, group):
    sizes = {"batch": 70, "num_kv_heads": 4, "group": group, "kv_len": 1100, "head_dim": head_dim}
    case = random_case(generator, dtype=HALF, device="cuda", **sizes)
    out, lse = run(*case.arguments, split_len=512)
    for _ in range(5):
        again, lse_again = run(*case.arguments, split_len=512)
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)
    for i in (0, 33, 69):
        alone, lse_alone = run(*case.batch_entry(i).arguments, split_len=512)
        assert torch.equal(alone, out[i : i + 1])
        assert torch.equal(lse_alone, lse[i : i + 1])


@pytest.mark.parametrize(("batch", "kv_len"), [(64, 1000), (32, 2100), (5, 300), (200, 333), (300, 5)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", [4, 7, 12])
def test_many_sequences(run, generator, head_dim, group, batch, kv_len):
    sizes = {"batch": batch, "num_kv_heads": 8, "group": group, "kv_len": kv_len, "head_dim": head_dim}
    case = random_case(generator, dtype=HALF, device="cuda", **sizes)
    out, lse = run(*case.arguments)
    for i in (0, batch // 2, batch - 1):
        want, want_lse = expected(case.batch_entry(i))
        compare(out[i : i + 1], want, HALF)
        compare(lse[i : i + 1], want_lse, HALF, at_least=1.0, what="lse")
    again, lse_again = run(*case.arguments)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("split_len", [None, 48])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=["fp16", "bf16"])
def test_rotation_folded_into_the_weights(run, generator, dtype, head_dim, split_len):
    case = random_case(generator, dtype=dtype, device="cuda", batch=2, group=4, q_len=2, kv_len=333, head_dim=head_dim)
    rotation = case.rotation.double()
    rotated = case.replace(q=(case.q.double() @ rotation.T).to(dtype))
    plain = rotated.replace(q=rotated.q.double() @ rotation)  # what the rotated queries stand for
    want, want_lse = expected(plain)
    out, lse = run(*rotated.arguments, pre_rotated=True, rotated_output=True, split_len=split_len)
    compare(out, want.double() @ rotation.T, dtype)
    compare(lse, want_lse, dtype, at_least=1.0, what="lse")
    again, _ = torch.ops.turboquant.cuda_decode(*rotated.operator_arguments, pre_rotated=True, rotated_output=True)
    compare(again, want.double() @ rotation.T, dtype)


@pytest.mark.parametrize("split_len", [0, 8, 24, -16])
def test_split_length_that_does_not_fit(run, generator, split_len):
    case = random_case(generator, dtype=HALF, device="cuda")
    with pytest.raises(ValueError, match="split_len must be a positive multiple of 16"):
        run(*case.arguments, split_len=split_len)


@pytest.mark.parametrize("q_len", [1, 5])
def test_graph_replays_with_other_contents(generator, q_len):
    sizes = {"dtype": HALF, "device": "cuda", "batch": 2, "group": 4, "q_len": q_len, "kv_len": 1299, "is_causal": True}
    case, other = random_case(generator, **sizes), random_case(generator, **sizes)
    check_replays(torch.ops.turboquant.cuda_decode, case, other)


def test_operator_is_registered_right(generator):
    case = random_case(generator, dtype=HALF, device="cuda")
    torch.library.opcheck(torch.ops.turboquant.cuda_decode.default, case.operator_arguments)


def _call(head_dim: int = 128, dtype: torch.dtype = HALF, q_len: int = 1):
    codec = TQ4Codec(head_dim, device="cuda")
    q = torch.randn(1, 8, q_len, head_dim, device="cuda", dtype=dtype)
    k, v = (codec.compress(torch.randn(1, 2, 300, head_dim, device="cuda")) for _ in range(2))
    return q, k, v, codec


def test_compiles_into_one_graph():
    q, k, v, codec = _call()
    torch._dynamo.reset()
    step = torch.compile(lambda q: tq4_attention(q * 2, k, v, codec), fullgraph=True)
    want = tq4_attention(q * 2, k, v, codec, backend="cuda")
    assert torch.equal(step(q), want)


def test_auto_takes_it_where_it_can():
    q, k, v, codec = _call()
    assert torch.equal(tq4_attention(q, k, v, codec), tq4_attention(q, k, v, codec, backend="cuda"))
    for changed in (_call(96), _call(dtype=torch.float32), _call(q_len=9)):
        tq4_attention(*changed)
        with pytest.raises(RuntimeError, match="backend='cuda' cannot run: the CUDA kernels take"):
            tq4_attention(*changed, backend="cuda")
    with pytest.raises(RuntimeError, match="packed"):
        tq4_attention(q, k, torch.randn(1, 2, 300, 128, device="cuda", dtype=HALF), codec, backend="cuda")
