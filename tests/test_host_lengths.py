"""Lengths that the host knows: what tq4_paged_attention takes and refuses, and which kernels it then calls for whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paged_cases import arguments, check_batch, random_batch
from turboquant_vllm import TQ4Codec, ops, paged_attention, tq4_paged_attention
from turboquant_vllm.limits import most_rows_over_pages

LENGTHS = [(1, 37), (20, 30), (3, 50)]
LENS, STARTS = [37, 30, 50], [0, 1, 21, 24]


@pytest.fixture
def call(generator):
    """tq4_paged_attention over a batch of LENGTHS, and the batch."""
    batch = random_batch(generator, LENGTHS, dtype=torch.float32)
    q, cache, *index = arguments(batch)[:5]
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
        (([37, 31, 50], STARTS), r"seq_lens_cpu\[1\] must be seq_lens\[1\], which is 30, got 31"),
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


class Kernels:
    """Stands in for the kernels: adds one to the rows that they promise to fill, and keeps their bounds."""

    def __init__(self) -> None:
        self.bounds: dict[str, tuple[int, ...]] = {}

    def __call__(self, path: str):
        return {"turboquant_vllm.cuda.paged:decode_pages": self.native}.get(path, self.triton)

    def serve(self, args, least, most):
        q, _, _, num_kv_heads, _, _, starts = args[:7]
        for first, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            rows = (stop - first) * q.shape[1] // num_kv_heads
            # Bounds that do not hold leave rows unwritten.
            if least <= rows <= most and stop - first <= args[11]:
                args[13][first:stop] += 1

    def native(self, *args):
        self.bounds["native"] = args[11:13]
        self.serve(args, 1, most_rows_over_pages(args[0].shape[2]))

    def triton(self, *args):
        least = args[19] if len(args) > 19 else 1  # a default may be left out
        self.bounds["triton"] = (*args[11:13], least)
        self.serve(args, least, 10**9)


@given(
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    group=st.sampled_from([1, 3, 4, 16]),
    head_dim=st.sampled_from([64, 128, 256]),
    backend=st.sampled_from(["cuda", "triton"]),
    known=st.booleans(),
)
def test_each_sequence_is_served_once(tokens, group, head_dim, backend, known):
    lengths = [(count, 50) for count in tokens]
    generator = torch.Generator().manual_seed(0)
    batch = random_batch(generator, lengths, dtype=torch.float16, num_kv_heads=1, group=group, head_dim=head_dim)
    q, cache, *index = arguments(batch)[:5]
    kernels, out = Kernels(), torch.zeros_like(q)
    host = {"seq_lens_cpu": batch.seq_lens, "cu_seqlens_q_cpu": batch.cu_seqlens_q} if known else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_kernel", kernels)
        patch.setattr(paged_attention, "choose_paged_backend", lambda *_: (backend, ""))
        tq4_paged_attention(q, cache, TQ4Codec.reader(batch.rotation, batch.centroids, "haar"), *index, out=out, **host)
    assert (out == 1).all()
    if known and backend == "cuda":
        # The native kernels are as wide as their sequences need, and nothing is launched in vain.
        few = [count for count in tokens if 0 < count * group <= most_rows_over_pages(head_dim)]
        assert kernels.bounds.get("native", (0,))[0] == max(few, default=0)
        assert ("triton" in kernels.bounds) == any(count * group > most_rows_over_pages(head_dim) for count in tokens)
