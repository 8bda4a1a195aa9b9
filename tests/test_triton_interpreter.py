"""The Triton kernels on a CPU, in Triton's interpreter: float32 and float16 (the interpreter rounds bfloat16 wrongly)."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from attention_cases import LAYOUTS, check, check_gate, expected, lay_out, pytorch_attention, random_case
from attention_contract import AttentionContract, check_causal_sizes
from compression_checks import check_compress, check_decompress, special_vectors
from mask_contract import MaskContract
from offset_contract import OffsetContract
from store_cases import check_store, random_store
from triton_interpreter import in_interpreter
from turboquant_vllm import TQ4Codec
from turboquant_vllm.codec import SCALES

pytestmark = in_interpreter

HALF, FULL = torch.float16, torch.float32
PACKED, PACKED_KEYS, PACKED_VALUES, DENSE = (True, True), (True, False), (False, True), (False, False)
both_dtypes = pytest.mark.parametrize("dtype", [HALF, FULL], ids=["fp16", "fp32"])


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def run(interpreter):
    return lambda *args: interpreter.call("triton.launch:attention", *args)


@both_dtypes
class TestContract(AttentionContract):
    pass


class TestMasks(MaskContract):
    @pytest.fixture
    def dtype(self):  # scores are float32 for both, and so are what masks do to them
        return HALF


class TestOffsets(OffsetContract):
    @pytest.fixture
    def dtype(self):
        return HALF


@pytest.mark.parametrize("packed_values", [True, False], ids=["packed", "packed-keys"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "q_len", "kv_len"), [(FULL, 64, 3, 150), (FULL, 20, 140, 70), (HALF, 80, 3, 600), (HALF, 512, 3, 150)]
)
def test_shapes_with_offsets(run, generator, dtype, head_dim, q_len, kv_len, packed_values):
    sizes = {"head_dim": head_dim, "q_len": q_len, "kv_len": kv_len, "packed": (True, packed_values)}
    check(run, random_case(generator, dtype=dtype, is_causal=True, offsets=True, **sizes))


@pytest.mark.parametrize("slice_len", [64, 100])
def test_slices_of_the_scratch_with_offsets(interpreter, generator, slice_len):
    patch = {"triton.launch:_SCRATCH_BYTES": slice_len * 2 * 2 * 64 * 2}  # keys; K and V; heads; head_dim; bytes
    case = random_case(generator, dtype=HALF, q_len=140, kv_len=150, is_causal=True, offsets=True)
    check(lambda *args: interpreter.call("triton.launch:attention", *args, patch=patch), case)


@both_dtypes
def test_causal_sizes(run, generator, dtype):
    check_causal_sizes(run, generator, dtype, "cpu", [1, 2, 7, 16, 17, 33])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "q_len", "kv_len", "packed", "is_causal"),
    [
        (HALF, 16, 4, 1, 33, PACKED, False),
        (HALF, 20, 5, 3, 33, PACKED, True),
        (FULL, 20, 1, 17, 5, PACKED, True),
        (HALF, 32, 1, 70, 300, PACKED_KEYS, True),
        (HALF, 80, 7, 1, 300, PACKED, False),
        (FULL, 80, 5, 3, 33, PACKED_KEYS, True),
        (HALF, 96, 8, 3, 33, PACKED_VALUES, True),
        (HALF, 96, 16, 17, 33, PACKED, True),  # more than 256 rows
        (HALF, 128, 16, 1, 300, PACKED, False),
        (HALF, 128, 4, 17, 33, PACKED, True),
        (HALF, 128, 4, 70, 33, PACKED_KEYS, True),
        (HALF, 192, 7, 3, 33, PACKED, True),
        (HALF, 192, 4, 70, 33, DENSE, False),
        (HALF, 256, 8, 1, 33, PACKED, False),
        (HALF, 256, 4, 17, 33, PACKED, True),
        (FULL, 256, 1, 3, 33, PACKED, True),
        (HALF, 320, 3, 1, 33, PACKED, False),
        (HALF, 512, 4, 1, 300, PACKED, False),
        (HALF, 512, 4, 17, 33, PACKED_KEYS, True),
        (HALF, 512, 16, 17, 33, PACKED, True),  # more than 256 rows
        (FULL, 512, 1, 3, 33, PACKED, True),
    ],
)
def test_shapes(run, generator, dtype, head_dim, group, q_len, kv_len, packed, is_causal):
    sizes = {"head_dim": head_dim, "group": group, "q_len": q_len, "kv_len": kv_len, "num_kv_heads": 1}
    check(run, random_case(generator, dtype=dtype, packed=packed, is_causal=is_causal, **sizes))


@hypothesis.given(data=st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_call(run, data):
    sizes = {
        "batch": data.draw(st.integers(1, 2)),
        "num_kv_heads": data.draw(st.integers(1, 2)),
        "group": data.draw(st.integers(1, 5)),
        "q_len": data.draw(st.integers(0, 6)),
        "kv_len": data.draw(st.integers(0, 40)),
        "head_dim": 2 * data.draw(st.integers(8, 35)),
        "packed": data.draw(st.sampled_from([PACKED, PACKED_KEYS, PACKED_VALUES, DENSE])),
        "is_causal": data.draw(st.booleans()),
        "layout": data.draw(st.sampled_from(LAYOUTS)),
        "dtype": data.draw(st.sampled_from([HALF, FULL])),
    }
    # Against a table of tolerances: PyTorch's luck on a handful of numbers is no measure.
    check(run, random_case(torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))), **sizes), gate=False)


@pytest.mark.parametrize("packed", [PACKED, PACKED_KEYS, PACKED_VALUES])
@pytest.mark.parametrize("slice_len", [48, 100])
def test_slices_of_the_scratch(interpreter, generator, packed, slice_len):
    scratch = slice_len * 2 * 2 * 64 * 2  # K and V, heads, head_dim, bytes
    patch = {"triton.launch:_SCRATCH_BYTES": scratch}
    case = random_case(generator, dtype=HALF, q_len=140, kv_len=150, packed=packed, is_causal=True)
    check(lambda *args: interpreter.call("triton.launch:attention", *args, patch=patch), case)


def test_batch_changes_no_bits_where_the_scratch_is_short(interpreter, generator):
    patch = {"triton.launch:_SCRATCH_BYTES": 150 * 2 * 64 * 2}
    case = random_case(generator, dtype=HALF, num_kv_heads=1, batch=2, q_len=140, kv_len=150, is_causal=True)
    out, _ = interpreter.call("triton.launch:attention", *case.arguments, patch=patch)
    for i in range(2):
        alone, _ = interpreter.call("triton.launch:attention", *case.batch_entry(i).arguments, patch=patch)
        assert torch.equal(alone, out[i : i + 1])


def _apart(x: torch.Tensor) -> torch.Tensor:
    """The values of ``x``, three elements apart."""
    wide = torch.full((*x.shape, 3), float("nan"))
    wide[..., 1] = x
    return wide[..., 1]


@pytest.mark.parametrize("dtype", [HALF, FULL])
@pytest.mark.parametrize("q_len", [3, 140])
def test_tables_that_are_views(interpreter, generator, dtype, q_len):
    case = random_case(generator, dtype=dtype, q_len=q_len, kv_len=150, is_causal=True)
    tables = {"centroids": _apart(case.centroids), "rotation": case.rotation.T.contiguous().T}
    path = "triton.flash_attention_tq4_kv:triton_flash_attention_tq4_kv"
    packed = (case.q, case.k, case.k_norms, case.v, case.v_norms)
    want, got = (
        interpreter.call(path, *packed, *levels, None, True) for levels in ((case.centroids, case.rotation), tables.values())
    )
    assert torch.equal(got, want)
    x = torch.randn(2, 3, 20, 64, generator=generator)
    codec = TQ4Codec(64)
    rotation, companding, levels = codec.rotation.T.contiguous().T, _apart(codec.companding), _apart(codec.centroids)
    want = interpreter.call("triton.compress:compress", x, codec.rotation, codec.companding, True, codec.centroids, "unbiased")
    got = interpreter.call("triton.compress:compress", x, rotation, companding, True, levels, "unbiased")
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    want = interpreter.call("triton.compress:decompress", *want, codec.centroids, codec.rotation, True, torch.float32)
    assert torch.equal(interpreter.call("triton.compress:decompress", *got, levels, rotation, True, torch.float32), want)


@pytest.mark.parametrize("sm_scale", [None, 0.3])
@pytest.mark.parametrize("packed", [PACKED, PACKED_KEYS, DENSE], ids=["packed", "packed-keys", "dense"])
def test_public_functions(interpreter, generator, packed, sm_scale):
    case = random_case(generator, dtype=HALF, q_len=3, packed=packed, is_causal=True, sm_scale=sm_scale)
    levels = (case.centroids, case.rotation)
    if packed == PACKED:
        path = "triton.flash_attention_tq4_kv:triton_flash_attention_tq4_kv"
        args = (case.q, case.k, case.k_norms.unsqueeze(-1), case.v, case.v_norms.unsqueeze(-1), *levels)
    elif packed == PACKED_KEYS:
        path = "triton.flash_attention_tq4:triton_flash_attention_tq4"
        args = (case.q, case.k, case.k_norms.unsqueeze(-1), *levels, case.v)
    else:
        path = "triton.flash_attention:triton_flash_attention"
        args = (case.q, case.k, case.v)
    out = interpreter.call(path, *args, sm_scale, True)
    check_gate(out, expected(case)[0], pytorch_attention(case), out.dtype)


def test_sums_over_many_tiles_do_not_shrink(interpreter, generator):
    # Values are summed in units of their largest norm: this one times its reciprocal is not one.
    norm = next(x for x in (1 + torch.rand(1000, generator=generator)).unbind() if x * (1 / x) < 1)
    sizes = {"num_kv_heads": 1, "group": 1, "head_dim": 32, "kv_len": 1 << 14}
    case = random_case(generator, dtype=FULL, **sizes)
    # All weights are one and all values the same powers of two, so that nothing else rounds much.
    levels = 2.0 ** -torch.arange(8.0)
    v = case.v[:, :, :1].expand_as(case.v).contiguous()
    v_norms = torch.full_like(case.v_norms, norm.item())
    case = case.replace(q=torch.zeros_like(case.q), v=v, v_norms=v_norms, centroids=torch.cat([-levels, levels.flip(0)]))
    out, _ = interpreter.call("triton.launch:attention", *case.arguments)
    want, _ = expected(case)
    # Rotating back sums 32 products, each rounded by half an ulp of the sum at most; each of 256 tiles would shrink by one.
    assert (out.double() - want).abs().max() <= 16 * 2.0**-24 * want.abs().max()


CODECS = [(16, "haar"), (20, "haar"), (64, "hadamard"), (96, "haar"), (128, "hadamard"), (256, "hadamard"), (512, "hadamard")]


@both_dtypes
@pytest.mark.parametrize(("head_dim", "rotation"), CODECS)
def test_compress(interpreter, generator, dtype, head_dim, rotation):
    def compress(*args):
        return interpreter.call("triton.compress:compress", *args)

    codec = TQ4Codec(head_dim, rotation=rotation, scale="norm")
    x = torch.randn(2, 2, 35, head_dim, generator=generator).to(dtype)
    for layout in ("transposed", "odd"):
        check_compress(compress, lay_out(x, layout), codec)
    special = torch.cat([special_vectors(head_dim, dtype, generator), x[0, 0]])
    for scale in SCALES:
        check_compress(compress, special, TQ4Codec(head_dim, rotation=rotation, scale=scale))
    codes, norms = compress(x[:, :, :0], codec.rotation, codec.companding, False)
    assert codes.shape == (2, 2, 0, head_dim // 2)
    assert norms.shape == (2, 2, 0)


@pytest.mark.parametrize("scale", [scale for scale in SCALES if scale != "norm"])
def test_scales_where_no_program_sees_whole_vectors(interpreter, generator, scale):
    def in_two_steps(x, rotation, companding, hadamard, centroids, scale):
        codes, lengths = interpreter.call("triton.compress:compress", x, rotation, companding, hadamard)
        args = (x, codes, lengths, centroids, rotation, hadamard, scale)
        return codes, interpreter.call("triton.compress:rescaled", *args)

    x = torch.cat([special_vectors(96, FULL, generator), torch.randn(20, 96, generator=generator)])
    check_compress(in_two_steps, x, TQ4Codec(96, scale=scale))


@both_dtypes
@pytest.mark.parametrize(("head_dim", "rotation"), CODECS)
def test_decompress(interpreter, generator, dtype, head_dim, rotation):
    def decompress(*args):
        return interpreter.call("triton.compress:decompress", *args)

    codec = TQ4Codec(head_dim, rotation=rotation)
    for layout in ("contiguous", "transposed", "odd", "strided") if head_dim <= 128 else ("odd", "strided"):
        check_decompress(decompress, codec, dtype, generator, 35, layout)


@both_dtypes
@pytest.mark.parametrize(
    ("head_dim", "rotation", "page_size", "layout"),
    [
        (64, "hadamard", 16, "contiguous"),
        (80, "haar", 48, "odd"),
        (128, "hadamard", 16, "transposed"),
        (256, "hadamard", 64, "sliced"),
    ],
)
def test_store(interpreter, generator, dtype, head_dim, rotation, page_size, layout):
    case = random_store(
        generator, tokens=35, heads=3, head_dim=head_dim, dtype=dtype, page_size=page_size, rotation=rotation, layout=layout,
        slot_dtype=torch.int32 if page_size == 16 else torch.int64, scale="norm" if dtype == HALF else "unbiased",
    )  # fmt: skip
    check_store(lambda case: interpreter.call("triton.store:store", *case.kernel_arguments), case)


@both_dtypes
@pytest.mark.parametrize(("head_dim", "layout"), [(96, "odd"), (64, "transposed")])
def test_store_of_vectors_that_no_program_sees_whole(interpreter, generator, dtype, head_dim, layout):
    sizes = {"tokens": 35, "heads": 3, "head_dim": head_dim, "layout": layout, "slot_dtype": torch.int32}
    case = random_store(generator, dtype=dtype, scale="unbiased", page_size=48, **sizes)
    patch = {"triton.compress:_ELSEWHERE": (64 * 128, 4)}  # room for some columns of a rotation alone
    check_store(lambda case: interpreter.call("triton.store:store", *case.kernel_arguments, patch=patch), case)
