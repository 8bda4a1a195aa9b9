"""Slices decompressed for PyTorch's dense attention: in Triton's interpreter with PyTorch's CPU kernels, and on a GPU."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from attention_cases import check, compare, expected, random_case
from attention_contract import AttentionContract, check_causal_sizes
from paged_cases import check_batch, known_lengths, random_batch
from paged_contract import PagedContract
from triton_interpreter import in_interpreter
from turboquant_vllm import reference
from turboquant_vllm.prefill import Dense, Part, dense_attention

pytestmark = in_interpreter

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


@pytest.mark.parametrize(
    ("dtype", "slice_len", "q_len", "kv_len"), [(HALF, 100, 70, 170), (FULL, 48, 130, 130), (FULL, 48, 70, 40)]
)
def test_slices_with_offsets(interpreter, generator, dtype, slice_len, q_len, kv_len):
    case = random_case(generator, dtype=dtype, batch=2, q_len=q_len, kv_len=kv_len, is_causal=True, offsets=True)
    check(sliced(interpreter, slice_len, itemsize=dtype.itemsize), case)


def test_what_hidden_groups_share_does_not_matter(interpreter, generator):
    case = random_case(generator, dtype=FULL, q_len=100, kv_len=200, is_causal=True, offsets=True)
    want, want_lse = expected(case)
    case.k_steps[:, :, 2] = float("nan")  # of keys 128 to 191
    out, lse = sliced(interpreter, 100, itemsize=4)(*case.arguments)
    assert out[:, :, 28:].isnan().all()
    assert lse[:, :, 28:].isnan().all()
    compare(out[:, :, :28], want[:, :, :28], FULL)
    compare(lse[:, :, :28], want_lse[:, :, :28], FULL, at_least=1.0, what="lse")


@pytest.mark.parametrize(("q_len", "kv_len"), [(40, 200), (40, 30), (3, 0)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_sinks(interpreter, generator, is_causal, q_len, kv_len):
    case = random_case(generator, dtype=HALF, batch=2, q_len=q_len, kv_len=kv_len, is_causal=is_causal)
    case = case.replace(sinks=torch.randn(4, generator=generator) + 3)
    patch = {"triton.prefill:SCRATCH_BYTES": 32 * 2 * 2 * 64 * 2}  # keys; K and V; heads; head_dim; bytes

    def run(*args):
        return interpreter.call("triton.prefill:attention", *args, patch=patch)

    check(run, case)


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
    _, k, v, tables, *_ = case.arguments
    packed = Packed(k, v, tables)
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


def coarse(device, dtype, head_dim):
    """PyTorch's dense attention, as if it wanted multiples of 16."""
    return Dense(dense_attention(device, dtype, head_dim).run, 16)


@pytest.mark.parametrize(("first", "tokens"), [(37, 100), (64, 64), (10, 20), (100, 50)])
@pytest.mark.parametrize(("dtype", "head_dim"), [(HALF, 64), (FULL, 20), (HALF, 256)])
@pytest.mark.parametrize("scaled", [True, False], ids=["scales", "ones"])
def test_unpack_offsets(interpreter, generator, dtype, head_dim, first, tokens, scaled):
    from turboquant_vllm.triton.unpack import Packed

    case = random_case(generator, dtype=dtype, batch=2, kv_len=150, head_dim=head_dim, layout="odd", offsets=True)
    case = case if scaled else case.replace(key_scales=None)
    case.v_norms[1, 0, 120], case.k_steps[0, 1, 0, 0] = float("nan"), float("nan")
    _, k, v, tables, *_ = case.arguments
    scratch = torch.full((2, 2, 2, tokens + 20, head_dim), 7.0, dtype=dtype)
    keys, values = scratch.share_memory_()[:, :, :, : tokens + 10].unbind()
    interpreter.call("triton.unpack:unpack", Packed(k, v, tables), first, tokens, keys, values)
    assert (scratch[:, :, :, tokens : tokens + 10] == 0).all()
    assert (scratch[:, :, :, tokens + 10 :] == 7).all()
    want = reference.decompress_keys(k, tables, torch.float64)
    want[1, 0, 120] = float("nan")
    want = want[:, :, first : first + tokens]
    good = want.isfinite().all(-1)
    # Levels, the rotation and the result are rounded once each; the scales multiply what has been rounded.
    compare(keys[:, :, :tokens][good], want[good], dtype)
    assert keys[:, :, :tokens][~good].isnan().all()


@pytest.fixture
def run_pages(interpreter):
    """Calls over pages whose lengths the host knows: slices of 48 keys or so for sequences of more than 8 rows."""

    def call(batch, pairs=0, is_coarse=False):
        out = torch.full_like(batch.q, float("nan"), memory_format=torch.contiguous_format)
        lse = torch.full(batch.q.shape[:2], float("nan"))
        width = 2 * batch.cache.num_kv_heads * batch.cache.head_dim * batch.q.dtype.itemsize
        patch = {"triton.prefill:uses_prmt": bool, "triton.prefill:SCRATCH_BYTES": 48 * width}
        patch |= {"triton.prefill:MANY_ROWS": 9, "triton.prefill:MANY_PAIRS": pairs}
        if is_coarse:
            patch["triton.prefill:dense_attention"] = coarse
        args = known_lengths(batch)
        interpreter.call("triton.route:attention_over_pages", *args, out, lse, patch=patch)
        return out, lse

    return call


class TestPages(PagedContract):
    @pytest.fixture
    def dtype(self):
        return FULL

    @pytest.fixture
    def run(self, run_pages):
        return run_pages


@pytest.mark.parametrize("page_size", [64, 256])
def test_pages_with_offsets(run_pages, generator, page_size):
    lengths = [(40, 40), (24, 170), (10, 90), (1, 129), (0, 0), (9, 5)]
    batch = random_batch(generator, lengths, dtype=FULL, page_size=page_size, offsets=True)
    check_batch(run_pages, batch)
    check_batch(run_pages, batch.replace(key_scales=None))


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=hypothesis.settings().max_examples // 2, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_batch_over_pages(run_pages, data):
    draw = data.draw
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 120)), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = {
        "dtype": draw(st.sampled_from([HALF, FULL])),
        "num_kv_heads": draw(st.integers(1, 2)),
        "group": draw(st.integers(1, 5)),
        "head_dim": 16 * draw(st.integers(1, 6)),
        "page_size": draw(st.sampled_from([16, 32, 48, 64])),
        "spare_tokens": draw(st.integers(0, 3)),
        "sliding_window": draw(st.none() | st.integers(1, 50)),
        "causal": True,
    }
    if sizes["sliding_window"] is None:
        sizes["causal"] = draw(st.booleans())
    batch = random_batch(generator, lengths, **sizes)
    if draw(st.booleans()):
        batch = batch.replace(sinks=torch.randn(batch.q.shape[1], generator=generator))
    is_coarse = draw(st.booleans())
    check_batch(lambda batch: run_pages(batch, is_coarse=is_coarse), batch, gate=False)


@pytest.mark.parametrize("order", [1, -1])
def test_queries_of_neighbours_fill_the_padding_and_nothing_else(run_pages, generator, order):
    lengths = [(20, 60), (9, 75), (1, 30), (40, 40), (17, 100), (12, 5)][::order]
    batch = random_batch(generator, lengths, dtype=FULL, num_kv_heads=1)
    out, _ = check_batch(lambda batch: run_pages(batch, is_coarse=True), batch)
    for index, tokens in enumerate(batch.tokens):
        q = torch.full_like(batch.q, float("nan"))
        q[tokens] = batch.q[tokens]
        alone, _ = run_pages(batch.replace(q=q), is_coarse=True)
        assert torch.equal(alone[tokens], out[tokens]), index


def test_slices_and_fused_kernels_share_a_batch(run_pages, generator):
    # Rows and keys decide: of these, the second and the last have 10 rows and more, but too few pairs.
    lengths = [(20, 60), (10, 10), (1, 99), (6, 99), (5, 90)]
    batch = random_batch(generator, lengths, dtype=FULL, num_kv_heads=1, group=2)
    out, _ = check_batch(lambda batch: run_pages(batch, pairs=1000), batch)
    sliced, _ = run_pages(batch)
    for tokens, is_sliced in zip(batch.tokens, (True, False, False, True, False), strict=True):
        assert torch.equal(out[tokens], sliced[tokens]) == (is_sliced or tokens.stop - tokens.start == 1)


def test_where_a_lone_sequence_would_end_does_not_matter(interpreter, generator):
    out = torch.randn(2000, generator=generator).as_strided((1, 2, 5, 16), (1001, 16, 32, 1))
    lse = torch.randn(1, 2, 5, generator=generator)
    target = Part(torch.zeros(1, 2, 5, 16).share_memory_(), torch.zeros(1, 2, 5).share_memory_(), 0)
    interpreter.call("triton.prefill:merge", [Part(out, lse, 0)], 0, 5, target)
    compare(target.out, out.double(), FULL)
    compare(target.lse, lse.double(), FULL)
