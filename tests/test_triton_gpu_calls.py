"""The public Triton functions, compiling, and the compress and decompress kernels on a GPU."""

from __future__ import annotations

import pytest
import torch

from attention_cases import check_gate, expected, lay_out, poisoned_memory, pytorch_attention, random_case
from compression_checks import check_compress, check_decompress, special_vectors
from turboquant_vllm import TQ4Codec, reference, tq4_attention
from turboquant_vllm.codec import SCALES

pytestmark = pytest.mark.gpu

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


def test_public_functions(generator):
    from turboquant_vllm.triton.flash_attention import triton_flash_attention
    from turboquant_vllm.triton.flash_attention_tq4 import triton_flash_attention_tq4
    from turboquant_vllm.triton.flash_attention_tq4_kv import triton_flash_attention_tq4_kv

    for packed in ((True, True), (True, False), (False, False)):
        case = random_case(generator, dtype=HALF, device="cuda", q_len=3, packed=packed, is_causal=True)
        levels = (case.centroids, case.rotation)
        if packed == (True, True):
            k_norms, v_norms = case.k_norms.unsqueeze(-1), case.v_norms.unsqueeze(-1)
            out = triton_flash_attention_tq4_kv(case.q, case.k, k_norms, case.v, v_norms, *levels, is_causal=True)
        elif packed == (True, False):
            out = triton_flash_attention_tq4(case.q, case.k, case.k_norms, *levels, case.v, is_causal=True)
        else:
            out = triton_flash_attention(case.q, case.k, case.v, is_causal=True)
        check_gate(out, expected(case)[0], pytorch_attention(case), out.dtype)


@pytest.fixture
def compilations(monkeypatch):
    """Names of the kernels that Triton compiles during the test."""
    import triton

    names: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **info: names.append(info["fn"].name))
    return names


@pytest.mark.parametrize("packed", [(True, True), (False, False)], ids=["packed", "dense"])
def test_new_length_compiles_nothing_in_decode(generator, compilations, packed):
    sizes = {"dtype": HALF, "device": "cuda", "group": 4, "packed": packed}
    run = torch.ops.turboquant.triton_attention
    run(*random_case(generator, kv_len=100, head_dim=128, **sizes).operator_arguments)
    whole = random_case(generator, kv_len=300, head_dim=128, **sizes)
    compilations.clear()
    for kv_len in range(1, 301):
        short = {
            name: None if x is None else x[:, :, :kv_len].contiguous()
            for name, x in (("k", whole.k), ("k_norms", whole.k_norms), ("v", whole.v), ("v_norms", whole.v_norms))
        }
        run(*whole.replace(**short).operator_arguments)
    assert not compilations, f"compiled again: {compilations}"


def test_new_length_compiles_nothing_in_prefill(generator, compilations):
    run = torch.ops.turboquant.triton_attention
    sizes = {"dtype": HALF, "device": "cuda", "head_dim": 64, "is_causal": True}
    for q_len in (3, 7, 15, 31, 99, 199):  # one of each size class
        run(*random_case(generator, q_len=q_len, kv_len=q_len, **sizes).operator_arguments)
    compilations.clear()
    for q_len in range(1, 301):
        run(*random_case(generator, q_len=q_len, kv_len=q_len, **sizes).operator_arguments)
    assert not compilations, f"compiled again: {compilations}"


def test_hook_sees_compilations(generator, compilations):
    # The two tests above would pass with a hook that Triton never calls.
    case = random_case(generator, dtype=HALF, device="cuda", head_dim=38)
    torch.ops.turboquant.triton_attention(*case.operator_arguments)
    assert any("attention_kernel" in name for name in compilations)


def test_compiled_function(generator):
    codec = TQ4Codec(128, device="cuda")
    keys, values = (torch.randn(2, 2, 77, 128, generator=generator).cuda().to(HALF) for _ in range(2))
    q = torch.randn(2, 8, 3, 128, generator=generator).cuda().to(HALF)

    def step(q, keys, values):
        k, v = codec.compress(keys), codec.compress(values)
        return tq4_attention(q + 1, k, v, codec, is_causal=True) * 2

    out = torch.compile(step, fullgraph=True)(q, keys, values)
    torch.testing.assert_close(out, step(q, keys, values), rtol=0, atol=0)


def test_attention_refuses_gradients(generator):
    case = random_case(generator, dtype=HALF, device="cuda")
    out, _ = torch.ops.turboquant.triton_attention(*case.replace(q=case.q.requires_grad_()).operator_arguments)
    with pytest.raises(NotImplementedError, match="inference"):
        out.sum().backward()


@pytest.fixture
def compress():
    from turboquant_vllm.triton.compress import compress

    return _poisoned(compress)


@pytest.fixture
def decompress():
    from turboquant_vllm.triton.compress import decompress

    return _poisoned(decompress)


def _poisoned(function):
    def call(*args):
        with poisoned_memory():
            return function(*args)

    return call


CODECS = [(64, "hadamard"), (80, "haar"), (128, "hadamard"), (128, "haar"), (256, "hadamard"), (256, "haar")]


@pytest.mark.parametrize(("head_dim", "rotation"), CODECS)
@pytest.mark.parametrize("dtype", [HALF, BF16, FULL], ids=["fp16", "bf16", "fp32"])
def test_compress(compress, generator, dtype, head_dim, rotation):
    x = torch.randn(2, 3, 501, head_dim, generator=generator).cuda().to(dtype)
    for scale in SCALES:
        codec = TQ4Codec(head_dim, rotation=rotation, scale=scale, device="cuda")
        check_compress(compress, lay_out(x, "transposed"), codec)
        check_compress(compress, special_vectors(head_dim, dtype, generator).cuda(), codec)


@pytest.mark.parametrize(("head_dim", "rotation"), CODECS)
@pytest.mark.parametrize("dtype", [HALF, BF16, FULL], ids=["fp16", "bf16", "fp32"])
def test_decompress(decompress, generator, dtype, head_dim, rotation):
    codec = TQ4Codec(head_dim, rotation=rotation, device="cuda")
    check_decompress(decompress, codec, dtype, generator, 501, "transposed")


@pytest.mark.parametrize(("head_dim", "rotation"), CODECS)
def test_compress_subnormal_vectors(compress, generator, head_dim, rotation):
    x = (torch.randn(1000, head_dim, generator=generator) * 2.0**-24).to(HALF)
    x *= 2 ** torch.randint(11, (1000, 1), generator=generator)  # up to normal numbers
    for scale in SCALES:
        check_compress(compress, x.cuda(), TQ4Codec(head_dim, rotation=rotation, scale=scale, device="cuda"))


def test_compress_beyond_32_bits(compress, decompress, generator):
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    codec = TQ4Codec(128, device="cuda")
    tokens = 2**31 // 128 + 1000
    x = torch.zeros(tokens, 128, dtype=HALF, device="cuda")
    x[-1000:] = torch.randn(1000, 128, generator=generator).to(HALF)
    rotation, _, companding, hadamard, *scaling = codec.writing
    codes, norms = compress(x, rotation, companding, hadamard, *scaling)
    last = check_compress(compress, x[-1000:], codec)
    assert torch.equal(codes[-1000:], last[0])
    assert torch.equal(norms[-1000:], last[1])
    assert (norms[:-1000] == 0).all()
    out = decompress(codes, norms, codec.centroids, codec.rotation, True, HALF)
    want = reference.decompress(*last, codec.centroids, codec.rotation, torch.float64)
    torch.testing.assert_close(out[-1000:].double(), want, rtol=2e-3, atol=2e-3)
    torch.cuda.empty_cache()
