"""Slices decompressed for PyTorch's dense attention: in Triton's interpreter with PyTorch's CPU kernels, and on a GPU."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from packaging.version import Version

from attention_cases import check, compare, random_case
from attention_contract import HEAD_DIM, AttentionContract, check_causal_sizes
from turboquant_vllm import PagedTQ4Cache, reference

VERSIONS = {name: Version(metadata.version(name)) for name in ("triton", "numpy")}
pytestmark = [
    pytest.mark.triton_interpreter,
    pytest.mark.skipif(
        VERSIONS["triton"] < Version("3.7") and VERSIONS["numpy"] >= Version("2.4"),
        reason="the interpreter of Triton 3.6 needs numpy < 2.4",
    ),
]

HALF, FULL = torch.float16, torch.float32


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def run(interpreter):
    """The route that calls take, which leads here whatever their size."""
    patch = {"triton.prefill:MANY_ROWS": 0, "triton.prefill:uses_prmt": bool}
    return lambda *args: interpreter.call("triton.route:attention", *args, patch=patch)


def sliced(interpreter, slice_len: int, num_kv_heads: int = 2, head_dim: int = 64, itemsize: int = 2):
    """Calls whose scratch has room for ``slice_len`` keys of one sequence."""
    patch = {"triton.prefill:SCRATCH_BYTES": slice_len * 2 * num_kv_heads * head_dim * itemsize}
    return lambda *args: interpreter.call("triton.prefill:attention", *args, patch=patch)


class TestContract(AttentionContract):
    @pytest.fixture
    def dtype(self):
        return FULL


def test_causal_sizes(run, generator):
    check_causal_sizes(run, generator, FULL, "cpu", [1, 2, 7, 16, 17, 33])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "q_len", "kv_len", "is_causal"),
    [
        (HALF, 16, 4, 9, 33, False),
        (FULL, 20, 5, 7, 33, True),
        (HALF, 80, 7, 33, 33, True),
        (HALF, 128, 4, 17, 33, True),
        (HALF, 256, 1, 40, 33, True),
    ],
)
def test_shapes(run, generator, dtype, head_dim, group, q_len, kv_len, is_causal):
    sizes = {"head_dim": head_dim, "group": group, "q_len": q_len, "kv_len": kv_len, "num_kv_heads": 1}
    check(run, random_case(generator, dtype=dtype, is_causal=is_causal, **sizes))


@pytest.mark.parametrize(("q_len", "kv_len"), [(70, 70), (40, 70), (70, 40), (1, 70)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("slice_len", [16, 33])
def test_slices(interpreter, generator, slice_len, is_causal, q_len, kv_len):
    case = random_case(generator, dtype=HALF, q_len=q_len, kv_len=kv_len, is_causal=is_causal)
    check(sliced(interpreter, slice_len), case)


def test_batch_changes_no_bits_where_the_scratch_is_short(interpreter, generator):
    case = random_case(generator, dtype=HALF, batch=3, q_len=40, kv_len=50, is_causal=True)
    run = sliced(interpreter, 120)  # two sequences at a time
    out, lse = run(*case.arguments)
    for i in range(3):
        alone, lse_alone = run(*case.batch_entry(i).arguments)
        assert torch.equal(alone, out[i : i + 1])
        assert torch.equal(lse_alone, lse[i : i + 1])


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd", "strided"])
@pytest.mark.parametrize(("dtype", "head_dim"), [(HALF, 128), (HALF, 80), (FULL, 20), (HALF, 256)])
def test_unpack(interpreter, generator, dtype, head_dim, layout):
    from turboquant_vllm.triton.unpack import Packed

    case = random_case(generator, dtype=dtype, batch=2, kv_len=150, head_dim=head_dim, layout=layout)
    case.k_norms[1, 0, 40], case.v_norms[1, 0, 41], case.v_norms[0, 1, 42] = float("inf"), float("nan"), float("-inf")
    packed = Packed(case.k, case.k_norms, case.v, case.v_norms, case.centroids, case.rotation)
    first, tokens, filled, capacity = 37, 100, 110, 120
    scratch = torch.full((2, 2, 2, capacity, head_dim), 7.0, dtype=dtype)
    # In a child process: what it writes to shared memory is seen here.
    keys, values = scratch.share_memory_()[:, :, :, :filled].unbind()
    interpreter.call("triton.unpack:unpack", packed, first, tokens, keys, values)
    assert (scratch[:, :, :, tokens:filled] == 0).all()
    assert (scratch[:, :, :, filled:] == 7).all()
    some = (slice(None), slice(None), slice(first, first + tokens))
    for name, out in (("k", keys), ("v", values)):
        norms = getattr(case, name + "_norms")
        want = reference.decompress(getattr(case, name), norms, case.centroids, case.rotation, torch.float64)[some]
        good = norms.isfinite()[some] & case.v_norms.isfinite()[some]
        # Levels, the rotation and the result are rounded once each.
        compare(out[:, :, :tokens][good], want[good], dtype)
    assert keys[1, 0, 41 - first].isnan().all()
    assert keys[0, 1, 42 - first].isnan().all()
    assert not keys[1, 0, 40 - first].isfinite().any()
    assert (values[1, 0, 41 - first] == 0).all()
    assert (values[0, 1, 42 - first] == 0).all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(9, 70), (70, 70), (5, 16), (20, 0)])
@pytest.mark.parametrize("page_size", [16, 48])
def test_pages(interpreter, generator, page_size, q_len, kv_len):
    case = random_case(generator, dtype=FULL, q_len=q_len, kv_len=kv_len, is_causal=True)
    used = -(-kv_len // page_size)
    table = torch.randperm(used + 3, generator=generator, dtype=torch.int32)[:used]
    # Whatever is no token of the sequence is poison: a norm of these bytes is NaN.
    cache = PagedTQ4Cache.allocate(used + 3, page_size=page_size, num_kv_heads=2, head_dim=HEAD_DIM)
    cache.buffer.fill_(255)
    pages = cache.k_codes, cache.k_norms, cache.v_codes, cache.v_norms
    for i, page in enumerate(table.tolist()):
        for x, place in zip((case.k, case.k_norms, case.v, case.v_norms), pages, strict=True):
            some = x[0, :, i * page_size : (i + 1) * page_size]
            place[page, :, : some.shape[1]] = some
    patch = {"triton.prefill:SCRATCH_BYTES": 40 * 2 * 2 * HEAD_DIM * 4}  # keys; K and V; heads; head_dim; bytes
    # Beyond the sequence a table may hold anything.
    table = torch.cat([table, torch.tensor([2**31 - 1, -1], dtype=torch.int32)])

    def run(q: torch.Tensor, *others: object) -> object:
        *_, centroids, rotation, sm_scale, is_causal = others
        path = "triton.prefill:paged_attention"
        return interpreter.call(path, q, *pages, table, kv_len, centroids, rotation, sm_scale, is_causal, patch=patch)

    check(run, case)


def test_page_number_out_of_range_reads_inside_the_buffer(interpreter, generator):
    case = random_case(generator, dtype=FULL, q_len=4, kv_len=32, is_causal=True)
    pages = [torch.stack([x[0, :, :16], x[0, :, 16:]]) for x in (case.k, case.k_norms, case.v, case.v_norms)]
    rest = (32, case.centroids, case.rotation, case.sm_scale, True)
    results = [
        interpreter.call("triton.prefill:paged_attention", case.q, *pages, torch.tensor(table, dtype=torch.int32), *rest)[0]
        for table in ([0, 1], [-7, 2**31 - 1])
    ]
    assert torch.equal(*results)
