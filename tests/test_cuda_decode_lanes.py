"""The native decode's source, run lane by lane on a CPU: dense caches and pages, against float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from attention_cases import check, compare, expected, random_case, skip_if_refused
from kernel_lanes import emulated_decode, few_objects, needs_compiler, run_pages  # noqa: F401
from offset_contract import OffsetContract, PagedOffsetContract
from paged_cases import check_batch, random_batch
from turboquant_vllm.cuda import cluster, decode, paged
from turboquant_vllm.pieces import cut_sequences
from turboquant_vllm.records import Sequences

pytestmark = [pytest.mark.slow, needs_compiler, pytest.mark.usefixtures("emulated_decode")]

HALF, BF16 = torch.float16, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "q_len", "kv_len", "causal"),
    [
        (HALF, 128, 4, 1, 100, False),
        (HALF, 64, 5, 2, 77, True),
        (BF16, 128, 4, 3, 50, True),
        (HALF, 256, 3, 1, 33, False),
        (HALF, 64, 16, 2, 32, True),  # one key of the last tile, its last, is hidden from the first query
        (HALF, 128, 16, 1, 100, False),
        (BF16, 128, 8, 3, 70, True),
        (HALF, 256, 5, 3, 41, True),
        (HALF, 64, 4, 4, 50, True),
    ],
)
def test_dense(generator, dtype, head_dim, group, q_len, kv_len, causal):
    sizes = {"batch": 2, "group": group, "q_len": q_len, "kv_len": kv_len, "head_dim": head_dim, "is_causal": causal}
    case = random_case(generator, dtype=dtype, device="cpu", **sizes)
    check(decode.decode, case)
    if q_len == 1:
        check(lambda *args: decode.decode(*args, split_len=32), case)


@pytest.mark.parametrize(
    ("q_len", "kv_len", "window", "softcap", "with_sinks"),
    [
        (1, 90, 20, None, False),
        (1, 90, None, None, True),
        (2, 90, 33, None, False),  # one key is hidden from the last query: the first of a tile
        (5, 3, 2, 1.5, True),
        (3, 70, None, 2.0, False),
        (8, 120, 1, 50.0, True),
        (1, 90, None, 1e6, False),
    ],
)
def test_dense_masks(generator, q_len, kv_len, window, softcap, with_sinks):
    sizes = {"batch": 2, "group": 4, "q_len": q_len, "kv_len": kv_len, "head_dim": 64, "is_causal": True}
    case = random_case(generator, dtype=HALF, device="cpu", **sizes)
    sinks = torch.randn(case.q.shape[1], generator=generator) + 1 if with_sinks else None
    case = case.replace(sliding_window=window, softcap=softcap, sinks=sinks)
    check_masked(decode.decode, case)
    if window is not None:  # what no query sees may be anything
        hidden = ~case.visible().any(0)
        norms = case.k_norms.clone()
        norms[:, :, hidden] = float("nan")
        check_masked(decode.decode, case.replace(k_norms=norms, v_norms=torch.where(hidden, norms, case.v_norms)), case)


def check_masked(run: Any, case: Any, expect: Any = None) -> None:
    """A query that sees no key but a sink has the sink's log-sum-exp, and zeros."""
    out, lse = run(*case.arguments)
    want, want_lse = expected(expect or case)
    compare(out, want, HALF)
    seen = want_lse > float("-inf")
    assert (lse[~seen] == float("-inf")).all()
    if seen.any():
        compare(lse[seen], want_lse[seen], HALF, at_least=1.0, what="lse")


def test_no_keys_but_sinks(generator):
    case = random_case(generator, dtype=HALF, device="cpu", group=2, kv_len=0)
    sinks = torch.randn(case.q.shape[1], generator=generator)
    out, lse = decode.decode(*case.replace(sinks=sinks).arguments)
    assert (out == 0).all()
    assert torch.equal(lse, sinks[None, :, None].expand_as(lse))


def test_rotation_folded_into_the_weights(generator):
    case = random_case(generator, dtype=HALF, device="cpu", group=4, kv_len=70)
    rotation = case.rotation.double()
    rotated = case.replace(q=(case.q.double() @ rotation.T).half())
    want, _ = expected(rotated.replace(q=rotated.q.double() @ rotation))
    out, _ = decode.decode(*rotated.arguments, pre_rotated=True, rotated_output=True)
    compare(out, want.double() @ rotation.T, HALF)


@pytest.mark.parametrize(
    ("head_dim", "group", "page_size", "lengths", "causal"),
    [
        (128, 4, 16, [(1, 37), (1, 100), (0, 20), (1, 1), (1, 32), (1, 0)], True),
        (128, 4, 48, [(1, 137), (3, 90), (2, 2), (5, 48), (0, 0)], True),
        (64, 7, 64, [(1, 70), (2, 65), (1, 128)], False),
        (256, 4, 32, [(1, 50), (1, 33)], True),
        (128, 8, 16, [(4, 40), (1, 17), (2, 1)], True),
        (128, 16, 48, [(1, 137), (1, 50), (0, 3), (1, 16)], False),
    ],
)
def test_pages(generator, head_dim, group, page_size, lengths, causal):
    sizes = {"head_dim": head_dim, "group": group, "page_size": page_size, "causal": causal}
    check_batch(run_pages, random_batch(generator, lengths, dtype=HALF, device="cpu", **sizes))


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        ({"sliding_window": 20}, None),
        ({"sliding_window": 1, "page_size": 48}, None),
        ({"softcap": 2.0, "sliding_window": 100}, None),
        ({}, [3, 0, 40, 17, 200, 1, 9]),
        ({"softcap": 1.5, "causal": False}, None),
        ({"sinks": True, "sliding_window": 33}, None),
        ({"sinks": True, "softcap": 50.0}, None),
    ],
)
def test_masks_over_pages(generator, options, windows):
    if "sinks" in options:
        options = {**options, "sinks": torch.randn(8, generator=generator) + 1}
    lengths = [(1, 90), (1, 40), (3, 150), (5, 64), (1, 16), (4, 3), (2, 70)]
    batch = random_batch(generator, lengths, dtype=HALF, device="cpu", group=4, **options)
    if windows is not None:
        batch = batch.replace(windows=torch.tensor(windows, dtype=torch.int32))
    check_batch(run_pages, batch)


def test_pages_before_the_window_do_not_matter(generator):
    batch = random_batch(generator, [(1, 200), (4, 150)], dtype=HALF, device="cpu", sliding_window=50)
    for index, hidden in enumerate((150, 150 - 53)):
        batch.cache.buffer[batch.block_table[index, : hidden // 16].long()] = 255  # NaN among the norms
    check_batch(run_pages, batch)
    for index, hidden in enumerate((150, 150 - 53)):  # and in the first page that is looked at, norms beyond all others
        page = batch.block_table[index, hidden // 16].long()
        for norms in (batch.cache.k_norms, batch.cache.v_norms):
            norms[page, :, : hidden % 16] = 1e30
    check_batch(run_pages, batch)


@pytest.mark.parametrize(("head_dim", "longest"), [(64, None), (64, 2), (256, 4)])
def test_sequences_of_many_rows_are_left_alone(generator, head_dim, longest):
    batch = random_batch(generator, [(1, 40), (9, 30), (2, 33)], dtype=HALF, device="cpu", head_dim=head_dim, group=4)
    out, lse = run_pages(batch, longest)
    assert out[1:10].isnan().all()
    assert lse[1:10].isnan().all()
    assert out[:1].isfinite().all()
    assert out[10:].isfinite().all()


def at_an_odd_place(x: torch.Tensor) -> torch.Tensor:
    """Values of ``x`` from the second element of their memory on."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize(
    "place", [at_an_odd_place, lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)], ids=("odd", "transposed")
)
def test_tables_and_results_that_lie_badly(generator, place):
    batch = random_batch(generator, [(1, 40), (9, 30), (2, 33)], dtype=HALF, device="cpu", head_dim=64, group=4)
    want, want_lse = run_pages(batch)
    placed = batch.replace(**{name: place(getattr(batch, name)) for name in ("q", "rotation")})
    out, lse = run_pages(placed.replace(centroids=at_an_odd_place(batch.centroids)), out=place(batch.q))
    torch.testing.assert_close((out, lse), (want, want_lse), rtol=0, atol=0, equal_nan=True)
    assert out[1:10].isnan().all()  # a sequence of many rows
    case = random_case(generator, dtype=HALF, device="cpu", kv_len=40)
    check(decode.decode, case.replace(**{name: place(getattr(case, name)) for name in ("q", "rotation", "k_norms")}))


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_in_pieces(generator, causal):
    lengths = [(10, 60), (1, 40), (0, 9), (5, 3), (4, 33)]
    batch = random_batch(generator, lengths, dtype=HALF, device="cpu", head_dim=64, group=8, causal=causal)
    where = cut_sequences(batch.block_table, batch.seq_lens, batch.cu_seqlens_q, 4, 3, causal, batch.cache.page_size)
    names = ("block_table", "seq_lens", "cu_seqlens_q")
    check_batch(lambda _: run_pages(batch.replace(**dict(zip(names, where, strict=True)))), batch)


def test_entries_out_of_range_are_taken_for_the_nearest(generator):
    batch = random_batch(generator, [(1, 40), (2, 30)], dtype=HALF, device="cpu", head_dim=64, group=4)
    want, _ = run_pages(batch)
    table = batch.block_table.clone()
    table[1, -1], table[1, -2:-1] = 1 << 30, -5
    starts = torch.tensor([0, 1, 1 << 20], dtype=torch.int32)
    lens = torch.tensor([40, 1 << 30], dtype=torch.int32)
    out = torch.full_like(batch.q, float("nan"))
    lse = torch.full(batch.q.shape[:2], float("nan"))
    q, cache, _, *how = batch.arguments
    paged.decode_pages(q, cache, Sequences(table, lens, starts, 2, 1 << 20), *how, out, lse)
    torch.testing.assert_close(out[:1], want[:1], rtol=0.01, atol=0.01)


def decode_where_it_can(*args):
    skip_if_refused(*args)
    return decode.decode(*args)


@pytest.fixture
def line(monkeypatch):
    """No cluster serves a call."""
    monkeypatch.setattr(cluster, "choose_cluster", lambda *args: None)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group", "q_len", "kv_len", "offsets"),
    [
        (HALF, 128, 4, 1, 100, False),
        (BF16, 64, 5, 2, 77, False),
        (HALF, 256, 3, 1, 33, False),
        (HALF, 64, 16, 2, 32, False),
        (HALF, 128, 4, 1, 170, True),
    ],
)
def test_rotation_by_additions(generator, line, dtype, head_dim, group, q_len, kv_len, offsets):
    sizes = {"batch": 2, "group": group, "q_len": q_len, "kv_len": kv_len, "head_dim": head_dim, "is_causal": q_len > 1}
    case = random_case(generator, dtype=dtype, device="cpu", num_kv_heads=3, offsets=offsets, **sizes)
    check(lambda *args: decode.decode(*args, hadamard=True), case)
    if q_len == 1:
        check(lambda *args: decode.decode(*args, hadamard=True, split_len=32), case)


@pytest.mark.parametrize(("head_dim", "group", "offsets"), [(128, 4, False), (64, 7, True), (256, 4, False)])
def test_rotation_by_additions_over_pages(generator, line, monkeypatch, head_dim, group, offsets):
    monkeypatch.setattr(paged, "decode_pages", functools.partial(paged.decode_pages, hadamard=True))
    sizes = {"head_dim": head_dim, "group": group, "page_size": 64, "offsets": offsets}
    lengths = [(1, 37), (1, 100), (0, 20), (2, 33), (1, 1), (1, 0)]
    check_batch(run_pages, random_batch(generator, lengths, dtype=HALF, device="cpu", **sizes))


class TestOffsets(OffsetContract):
    @pytest.fixture
    def dtype(self):
        return HALF

    @pytest.fixture
    def device(self):
        return "cpu"

    @pytest.fixture
    def run(self):
        return decode_where_it_can


class TestOffsetsInPages(PagedOffsetContract):
    LENGTHS = ((1, 37), (3, 170), (4, 90), (0, 0), (1, 1), (1, 64), (5, 3), (1, 129), (2, 700))
    LONG = ((1, 2300), (2, 600), (1, 256))

    @pytest.fixture
    def dtype(self):
        return HALF

    @pytest.fixture
    def device(self):
        return "cpu"

    @pytest.fixture
    def run(self):
        return run_pages


@pytest.mark.parametrize(("head_dim", "group"), [(64, 8), (128, 1), (128, 4), (128, 16), (128, 32), (256, 4), (256, 16)])
def test_offsets_of_all_variants(generator, head_dim, group):
    sizes = {"dtype": HALF, "head_dim": head_dim, "group": group, "offsets": True}
    check(decode.decode, random_case(generator, batch=2, kv_len=1100, num_kv_heads=1, **sizes))
    if group * head_dim <= 4096:
        check_batch(run_pages, random_batch(generator, [(1, 600), (1, 70)], page_size=64, **sizes))


def test_ranges_of_fixed_length_with_offsets(generator):
    case = random_case(generator, dtype=HALF, batch=2, q_len=2, kv_len=300, offsets=True)
    check(lambda *args: decode.decode(*args, split_len=48), case)


@pytest.mark.parametrize("split_len", [464, 480, 496])
def test_ranges_that_begin_shortly_before_other_groups_are_scored(generator, split_len):
    case = random_case(generator, dtype=HALF, batch=1, num_kv_heads=1, kv_len=1100, offsets=True)
    check(lambda *args: decode.decode(*args, split_len=split_len), case, gate=False)  # of so few rows the gate is a draw


@pytest.mark.parametrize("page_size", [64, 192])
def test_groups_that_a_warp_comes_to_one_after_another(generator, page_size):
    # Of each of the six warps three times eight groups and more, in pages of any order.
    sizes = {"dtype": HALF, "device": "cpu", "head_dim": 64, "group": 4, "offsets": True}
    check_batch(run_pages, random_batch(generator, [(1, 5000), (1, 700)], page_size=page_size, **sizes))
