"""Which kernels tq4_paged_attention calls for whom, and what it takes and refuses of lengths that the host knows."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paged_cases import arguments, check_batch, random_batch, run_reference
from turboquant_vllm import TQ4Codec, ops, paged_attention, tq4_paged_attention
from turboquant_vllm.checks import PagedShape
from turboquant_vllm.lengths import HostLengths
from turboquant_vllm.limits import MAX_SEQUENCES, most_rows_over_pages
from turboquant_vllm.pieces import MOST_ROWS, NativeCall, cut_sequences, native_calls, rows_left

LENGTHS = [(1, 37), (20, 30), (3, 50)]
LENS, STARTS = [37, 30, 50], [0, 1, 21, 24]


@pytest.fixture
def call(generator):
    """tq4_paged_attention over a batch of LENGTHS, and the batch."""
    batch = random_batch(generator, LENGTHS, dtype=torch.float32)
    q, cache, *index = arguments(batch)
    codec = TQ4Codec(64)

    def run(seq_lens_cpu=None, cu_seqlens_q_cpu=None, **options):
        lengths = {"seq_lens_cpu": seq_lens_cpu, "cu_seqlens_q_cpu": cu_seqlens_q_cpu}
        return tq4_paged_attention(q, cache, codec, *index, return_lse=True, **lengths, **options)

    return run, batch


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "int64 scalars"])
def test_result_is_the_same(call, kind):
    run, batch = call
    make = {
        "tensor": lambda x: torch.tensor(x, dtype=torch.int32),
        "list": list,
        "tuple": tuple,
        "int64 scalars": lambda x: list(torch.tensor(x)),
    }[kind]
    check_batch(lambda _: run(make(LENS), make(STARTS)), batch)


WRONG = {
    "lens-alone": ((LENS, None), ValueError, "cu_seqlens_q_cpu must come with seq_lens_cpu, got None"),
    "starts-alone": ((None, STARTS), ValueError, "seq_lens_cpu must come with cu_seqlens_q_cpu, got None"),
    "dtype": ((torch.tensor(LENS), STARTS), TypeError, "seq_lens_cpu must be torch.int32, got torch.int64"),
    "device": (
        (LENS, torch.zeros(4, dtype=torch.int32, device="meta")),
        ValueError,
        "cu_seqlens_q_cpu must be on the CPU, got meta",
    ),
    "shape": ((LENS, torch.zeros(3, dtype=torch.int32)), ValueError, r"cu_seqlens_q_cpu must have shape \[4\], got \[3\]"),
    "count": ((LENS[:2], STARTS), ValueError, "seq_lens_cpu must have 3 entries, got 2"),
    "floats": (([37.0, 30, 50], STARTS), TypeError, "seq_lens_cpu must be an int32 tensor on the CPU or hold ints, got list"),
    "number": ((37, STARTS), TypeError, "seq_lens_cpu must be an int32 tensor on the CPU or hold ints, got int"),
    "first": ((LENS, [1, 1, 21, 24]), ValueError, r"cu_seqlens_q_cpu\[0\] must be 0, got 1"),
    "descending": ((LENS, [0, 1, 0, 24]), ValueError, r"cu_seqlens_q_cpu\[2\] must be from 1 to 24, got 0"),
    "beyond-q": ((LENS, [0, 1, 21, 25]), ValueError, r"cu_seqlens_q_cpu\[3\] must be from 21 to 24, got 25"),
    "negative": (([37, -1, 50], STARTS), ValueError, r"seq_lens_cpu\[1\] must be from 0 to 96, got -1"),
    "beyond-table": (([37, 30, 97], STARTS), ValueError, r"seq_lens_cpu\[2\] must be from 0 to 96, got 97"),
}


@pytest.mark.parametrize(("lengths", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_lengths(call, lengths, error, message):
    run, batch = call
    assert batch.block_table.shape == (3, 6)
    with pytest.raises(error, match=message):
        run(*lengths)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (([37, 29, 50], STARTS), r"seq_lens_cpu\[1\] must be at least seq_lens\[1\], which is 30, got 29"),
        ((LENS, [0, 2, 21, 24]), r"cu_seqlens_q_cpu\[1\] must be cu_seqlens_q\[1\], which is 1, got 2"),
    ],
)
def test_lengths_that_differ_from_the_tensors_are_found_where_asked_for(call, monkeypatch, lengths, message):
    run, _ = call
    run(*lengths)
    monkeypatch.setenv("TURBOQUANT_DEBUG", "1")
    run(LENS, STARTS)
    with pytest.raises(ValueError, match=message):
        run(*lengths)


def test_more_keys_than_the_truth_are_found_where_they_matter(monkeypatch, generator):
    monkeypatch.setenv("TURBOQUANT_DEBUG", "1")
    batch = random_batch(generator, [(1, 300), (130, 290)], dtype=torch.float32, head_dim=16)
    q, cache, *index = arguments(batch)
    codec, starts = TQ4Codec.reader(batch.rotation, batch.centroids, "haar"), [0, 1, 131]
    tq4_paged_attention(q, cache, codec, *index, seq_lens_cpu=[310, 290], cu_seqlens_q_cpu=starts)
    with pytest.raises(ValueError, match=r"seq_lens_cpu\[1\] must be seq_lens\[1\], which is 290, got 291"):
        tq4_paged_attention(q, cache, codec, *index, seq_lens_cpu=[310, 291], cu_seqlens_q_cpu=starts)


def test_up_to_256_query_rows_a_bound_will_do():
    def check(tokens, group):
        lens, starts = (torch.tensor(x, dtype=torch.int32) for x in ([300], [0, tokens]))
        HostLengths([301], starts.tolist()).check_contents(lens, starts, group)

    check(256, 1)
    check(64, 4)
    for tokens, group in ((257, 1), (65, 4)):
        with pytest.raises(ValueError, match=r"seq_lens_cpu\[0\] must be seq_lens\[0\], which is 300, got 301"):
            check(tokens, group)


class Kernels:
    """Stands in for the kernels: adds one to the rows that they promise to fill, and keeps their bounds."""

    def __init__(self) -> None:
        self.native_bounds: list[int] = []
        self.triton_calls = 0

    def __call__(self, path: str):
        return {"turboquant_vllm.cuda.paged:decode_pages": self.native}.get(path, self.triton)

    def serve(self, q, cache, sequences, out, least, most):
        for first, stop in itertools.pairwise(sequences.cu_seqlens_q.tolist()):
            rows = (stop - first) * q.shape[1] // cache.num_kv_heads
            # Bounds that do not hold leave rows unwritten.
            if least <= rows <= most and stop - first <= sequences.max_query_len:
                out[first:stop] += 1

    def native(self, q, cache, sequences, tables, sm_scale, masks, out, lse):
        self.native_bounds.append(sequences.max_query_len)
        assert len(sequences.seq_lens) <= MAX_SEQUENCES
        self.serve(q, cache, sequences, out, 1, most_rows_over_pages(q.shape[2]))

    def triton(self, q, cache, sequences, tables, sm_scale, masks, out, lse, min_rows=1):
        self.triton_calls += 1
        self.serve(q, cache, sequences, out, min_rows, 10**9)


@given(
    tokens=st.lists(st.integers(0, 40) | st.integers(0, 300), min_size=1, max_size=6),
    group=st.sampled_from([1, 3, 4, 16]),
    head_dim=st.sampled_from([64, 128, 256]),
    backend=st.sampled_from(["cuda", "triton"]),
    known=st.booleans(),
)
def test_each_sequence_is_served_once(tokens, group, head_dim, backend, known):
    lengths = [(count, 50) for count in tokens]
    generator = torch.Generator().manual_seed(0)
    batch = random_batch(generator, lengths, dtype=torch.float16, num_kv_heads=1, group=group, head_dim=head_dim)
    q, cache, *index = arguments(batch)
    kernels, out = Kernels(), torch.zeros_like(q)
    host = {"seq_lens_cpu": batch.seq_lens, "cu_seqlens_q_cpu": batch.cu_seqlens_q} if known else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_kernel", kernels)
        patch.setattr(paged_attention, "choose_paged_backend", lambda *_: (backend, ""))
        tq4_paged_attention(q, cache, TQ4Codec.reader(batch.rotation, batch.centroids, "haar"), *index, out=out, **host)
    assert (out == 1).all()
    if known and backend == "cuda":
        # The native kernels are as wide as their sequences need, and nothing is launched in vain.
        most = most_rows_over_pages(head_dim) // group
        few = [count for count in tokens if 0 < count <= most]
        assert not few or kernels.native_bounds[0] == max(few)
        assert set(kernels.native_bounds[1 if few else 0 :]) <= {most}
        assert kernels.triton_calls == any(count * group > MOST_ROWS for count in tokens)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60)), min_size=1, max_size=4),
    tokens=st.integers(1, 6),
    pieces=st.integers(1, 5),
    causal=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_pieces_give_what_the_whole_gives(lengths, tokens, pieces, causal, seed):
    batch = random_batch(torch.Generator().manual_seed(seed), lengths, dtype=torch.float32, head_dim=16, causal=causal)
    table, lens, starts = cut_sequences(
        batch.block_table, batch.seq_lens, batch.cu_seqlens_q, tokens, pieces, causal, batch.cache.page_size
    )
    assert (table.dtype, lens.dtype, starts.dtype) == (torch.int32,) * 3
    assert (len(table), len(lens), len(starts)) == (len(lengths) * pieces, len(lengths) * pieces, len(lengths) * pieces + 1)
    for (count, _), mine in zip(lengths, starts.diff().view(-1, pieces).tolist(), strict=True):
        assert sum(mine) == count
        assert max(mine) <= tokens or mine[0] == count > tokens * pieces
    check_batch(
        lambda _: run_reference(batch.replace(block_table=table, seq_lens=lens, cu_seqlens_q=starts)), batch, gate=False
    )


def test_pieces_of_lengths_out_of_range_are_those_of_the_nearest():
    table = torch.zeros(2, 3, dtype=torch.int32)
    lens, starts = torch.tensor([2**31 - 1, -5], dtype=torch.int32), torch.tensor([0, 3, 5], dtype=torch.int32)
    _, cut, _ = cut_sequences(table, lens, starts, 2, 2, True, 16)
    assert cut[:2].tolist() == [47, 48]
    assert (cut[2:] <= 0).all()


def test_calls_fit_the_native_kernels():
    shape = PagedShape(
        total_tokens=5000, num_seqs=500, num_heads=8, num_kv_heads=1, head_dim=128, page_size=16, max_pages=9
    )  # fmt: skip
    lengths = HostLengths([50] * 500, list(range(0, 5001, 10)))  # 80 rows: three pieces each
    calls = list(native_calls(shape, 10, lengths))
    assert [(call.first, call.stop) for call in calls] == [(0, 170), (170, 340), (340, 500)]
    assert {(call.tokens, call.pieces) for call in calls} == {(4, 3)}
    # Where the host knows a bound alone, and the pieces would be too many, longer sequences are left to Triton.
    assert list(native_calls(shape, 10, None)) == [NativeCall(0, 500, 4, 1)]
    assert rows_left(shape, 10, None) == 33
    fewer = dataclasses.replace(shape, num_seqs=100)
    assert list(native_calls(fewer, 10, None)) == [NativeCall(0, 100, 4, 3)]
    assert rows_left(fewer, 10, None) == 97


def test_lengths_known_to_a_compiled_function(generator, monkeypatch):
    monkeypatch.setattr(ops, "why_not_cuda", lambda device: "")
    monkeypatch.setattr(ops, "why_not_triton", lambda device: "")
    lengths = [(1, 37), (70, 90), (20, 30), (200, 200)]
    batch = random_batch(generator, lengths, dtype=torch.float16)
    q, cache, *index = arguments(batch)
    codec, calls = TQ4Codec.reader(batch.rotation, batch.centroids, "haar"), []
    lens, starts = [keys for _, keys in lengths], batch.cu_seqlens_q.tolist()

    def keep(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if "turboquant" in str(node.target))
        return lambda *args: (q,)

    def step(q, *index):
        return tq4_paged_attention(q, cache, codec, *index, seq_lens_cpu=lens, cu_seqlens_q_cpu=starts)

    torch.compile(step, fullgraph=True, backend=keep)(q, *index)
    # Those of few rows; the pieces of two; what is left.
    assert calls == ["turboquant.cuda_paged"] * 2 + ["turboquant.triton_paged"]
