"""Triton's paged kernels in its interpreter: float32 and float16 (the interpreter rounds bfloat16 wrongly)."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from offset_contract import PagedOffsetContract
from paged_cases import check_batch, check_sequence, random_batch
from paged_contract import PagedContract
from triton_interpreter import in_interpreter

pytestmark = in_interpreter

HALF, FULL = torch.float16, torch.float32
SETTINGS = hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture
def run(interpreter):
    def call(batch, **options):
        out = torch.full_like(batch.q, float("nan"), memory_format=torch.contiguous_format)
        lse = torch.full(batch.q.shape[:2], float("nan"))
        path = "triton.route:attention_over_pages"
        interpreter.call(path, *batch.arguments, out, lse, *options.values())  # fills out and lse, which it shares
        return out, lse

    return call


class TestContract(PagedContract):
    @pytest.fixture
    def dtype(self):  # what is not of pages is tested in both, in test_triton_interpreter
        return HALF


class TestOffsets(PagedOffsetContract):
    LENGTHS = ((1, 37), (24, 170), (4, 90), (0, 20), (1, 64), (5, 3), (1, 129))

    @pytest.fixture
    def dtype(self):
        return HALF


def test_offsets_in_float32(run, generator):
    check_batch(run, random_batch(generator, [(1, 150), (20, 70)], dtype=FULL, page_size=64, offsets=True))


@pytest.mark.parametrize("offsets", [False, True])
def test_wide_vectors(run, generator, offsets):
    sizes = {"dtype": HALF, "head_dim": 512, "page_size": 64, "num_kv_heads": 1, "spare_tokens": 2, "offsets": offsets}
    check_batch(run, random_batch(generator, [(1, 270), (9, 40)], **sizes))


@hypothesis.given(data=st.data())
@SETTINGS
def test_any_batch(run, data):
    draw = data.draw
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sizes = {
        "dtype": draw(st.sampled_from([HALF, FULL])),
        "num_kv_heads": draw(st.integers(1, 2)),
        "group": draw(st.integers(1, 5)),
        "head_dim": 16 * draw(st.integers(1, 6)),
        "page_size": draw(st.sampled_from([16, 32, 48, 64])),
        "spare_tokens": draw(st.integers(0, 3)),
        "sliding_window": draw(st.none() | st.integers(1, 50)),
        "softcap": draw(st.none() | st.floats(0.5, 50)),
    }
    batch = random_batch(generator, lengths, **sizes)
    if draw(st.booleans()):
        batch = batch.replace(sinks=torch.randn(batch.q.shape[1], generator=generator))
    # Against a table of tolerances: PyTorch's luck on a handful of numbers is no measure.
    check_batch(run, batch, gate=False)


@pytest.mark.parametrize(("group", "least"), [(4, 33), (20, 33), (40, 33), (5, 17), (2, 4)])
def test_rows_of_the_others_are_left_alone(run, generator, group, least):
    batch = random_batch(generator, [(1, 40), (9, 9), (2, 30)], dtype=HALF, num_kv_heads=1, group=group)
    out, lse = run(batch, min_rows=least)
    whole, whole_lse = run(batch)
    for tokens in batch.tokens:
        if (tokens.stop - tokens.start) * group < least:
            assert out[tokens].isnan().all()
            assert lse[tokens].isnan().all()
        else:
            assert torch.equal(out[tokens], whole[tokens])
            assert torch.equal(lse[tokens], whole_lse[tokens])


def test_sequences_of_many_rows_and_keys_are_left_alone(interpreter, generator):
    lengths = [(20, 60), (10, 10), (1, 99), (6, 99), (30, 40)]
    batch = random_batch(generator, lengths, dtype=HALF, num_kv_heads=1, group=2)
    out, lse = torch.full_like(batch.q, float("nan")), torch.full(batch.q.shape[:2], float("nan"))
    interpreter.call("triton.paged_attention:paged_attention", *batch.arguments, out, lse, 1, (12, 1188))
    for index, tokens in enumerate(batch.tokens):
        if index in (0, 3, 4):  # at least 12 rows, and 1188 pairs of a row and a key
            assert out[tokens].isnan().all()
            assert lse[tokens].isnan().all()
        else:
            check_sequence(batch.alone(index), out[tokens], lse[tokens])


def test_tokens_of_no_sequence_are_left_alone(run, generator):
    batch = random_batch(generator, [(1, 40), (40, 40)], dtype=HALF, spare_tokens=3)
    out, lse = run(batch)
    assert out[41:].isnan().all()
    assert lse[41:].isnan().all()
