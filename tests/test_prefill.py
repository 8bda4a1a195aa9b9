"""The schedule of slices on a CPU, with plain PyTorch for its parts: unpacking, dense attention, joining."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from attention_cases import Case, compare, random_case
from turboquant_vllm import merge_attention_states, reference
from turboquant_vllm.prefill import (
    MOST_PARTS,
    Dense,
    Part,
    Piece,
    _flash,
    attention_over_slices,
    dense_attention,
    pieces,
    slices,
)

CPU = torch.device("cpu")


def merge(parts: Sequence[Part], first_row: int, stop_row: int, target: Part, is_last: bool) -> None:
    assert len(parts) <= MOST_PARTS

    def some(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        rows = (slice(None), slice(None), slice(first_row - part.first_row, stop_row - part.first_row))
        assert part.first_row <= first_row
        assert part.lse.is_contiguous()
        assert part.out[rows].shape[2] == stop_row - first_row
        return part.out[rows], part.lse[rows]

    out, lse = some(target)
    if not parts:
        assert is_last
        out[:], lse[:] = 0, float("-inf")
        return
    outs, lses = zip(*(some(part) for part in parts), strict=True)
    joined, joined_lse = merge_attention_states(torch.stack([out.float() for out in outs]), torch.stack(lses))
    out.copy_(joined)
    lse.copy_(joined_lse)


class Scratch:
    """Decompresses slices into one scratch, full of NaN between them."""

    def __init__(self, case: Case, slice_len: int) -> None:
        self.case = case
        shape = (2, *case.k.shape[:2], slice_len, case.q.shape[-1])
        self.scratch = torch.full(shape, float("nan"), dtype=case.q.dtype)

    def unpack(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.scratch.fill_(float("nan"))
        case = self.case
        for x, norms, out in ((case.k, case.k_norms, self.scratch[0]), (case.v, case.v_norms, self.scratch[1])):
            some = (slice(None), slice(None), slice(first, stop))
            vectors = reference.decompress(x[some], norms[some], case.centroids, case.rotation, case.q.dtype)
            out[:, :, : stop - first] = 0
            out[:, :, : vectors.shape[2]] = vectors
        return self.scratch[0, :, :, : stop - first], self.scratch[1, :, :, : stop - first]


class Recorder:
    """PyTorch's dense attention on a CPU; remembers the numbers of queries and keys of each call."""

    def __init__(self, grain: int) -> None:
        self.grain, self.shapes = grain, []

    def __call__(self, q, k, v, is_causal, sm_scale):
        assert not is_causal or q.shape[2] == k.shape[2]
        self.shapes.append((q.shape[2], k.shape[2]))
        return dense_attention(CPU, q.dtype, q.shape[-1]).run(q, k, v, is_causal, sm_scale)


def widened(q: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """Rows ``first .. stop`` of q; those that it does not have are NaN."""
    inside = q[:, :, max(first, 0) : stop]
    return torch.nn.functional.pad(inside, (0, 0, max(-first, 0), max(stop - q.shape[2], 0)), value=float("nan"))


def run(case: Case, slice_len: int, grain: int = 1, target: Part | None = None) -> tuple[torch.Tensor, torch.Tensor, Recorder]:
    dense = Recorder(grain)
    part = attention_over_slices(
        lambda first, stop: widened(case.q, first, stop), case.q.shape[2], case.k.shape[2], case.sm_scale, case.is_causal,
        slice_len=slice_len, unpack=Scratch(case, slice_len).unpack, dense=Dense(dense, grain), merge=merge, target=target,
    )  # fmt: skip
    assert part.first_row == 0
    assert target is None or part is target
    return part.out, part.lse, dense


@given(
    batch=st.integers(1, 2),
    group=st.sampled_from([1, 4, 5]),
    q_len=st.integers(1, 40),
    kv_len=st.integers(0, 60),
    slice_grains=st.integers(1, 30),
    grain=st.sampled_from([1, 2, 8]),
    is_causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    in_place=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_slices_give_the_whole(batch, group, q_len, kv_len, slice_grains, grain, is_causal, dtype, in_place, seed):
    case = random_case(
        torch.Generator().manual_seed(seed), dtype=dtype, batch=batch, group=group, q_len=q_len, kv_len=kv_len,
        head_dim=16, is_causal=is_causal,
    )  # fmt: skip
    target = Part(torch.full_like(case.q, float("nan")), torch.full(case.q.shape[:3], float("nan")), 0) if in_place else None
    out, lse, dense = run(case, slice_grains * grain, grain, target)
    want, want_lse = reference.attention(case.q.double(), *case.arguments[1:])
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    unseen = want_lse == float("-inf")
    assert (out[unseen] == 0).all()
    assert torch.equal(lse == float("-inf"), unseen)
    if not unseen.all():
        compare(out, want, dtype)
        compare(lse[~unseen], want_lse[~unseen], dtype, at_least=1.0, what="lse")
    # Shapes are multiples of the grain, but for one short rest of the keys where there is no causal mask.
    assert all(rows % grain == 0 for rows, _ in dense.shapes)
    assert all(keys % grain == 0 or (keys < grain and not is_causal) for _, keys in dense.shapes)


@given(
    q_len=st.integers(1, 30),
    prefix=st.integers(0, 30),
    slice_len=st.integers(1, 30),
    grain=st.integers(1, 5),
    is_causal=st.booleans(),
)
def test_pieces_cover_each_visible_pair_once(q_len, prefix, slice_len, grain, is_causal):
    kv_len = prefix + q_len if is_causal else prefix + 1
    seen = torch.zeros(q_len, kv_len, dtype=torch.int64)
    ended = torch.zeros(q_len, dtype=torch.int64)
    cuts = list(slices(kv_len, prefix if is_causal else 0, slice_len))
    assert [first for first, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
    for first, stop in cuts:
        assert 0 < stop - first <= slice_len
        for piece in pieces(q_len, kv_len, is_causal, first, stop, grain):
            assert first <= piece.first_key < piece.stop_key <= stop
            rows, keys = slice(piece.first_row, piece.stop_row), slice(piece.first_key, piece.stop_key)
            block = torch.ones_like(seen[rows, keys])
            if piece.is_causal:
                assert block.shape[0] == block.shape[1]
                block = block.tril()
            assert (ended[rows] == 0).all()
            ended[rows] += piece.ends
            seen[rows, keys] += block
    assert torch.equal(seen, oracle.visible(q_len, kv_len, is_causal).long())
    assert (ended == 1).all()


def test_one_slice_is_one_dense_call_without_joining(generator):
    def refuse(*args: object) -> None:
        raise AssertionError("nothing to join")

    case = random_case(generator, dtype=torch.float32, q_len=8, kv_len=8, is_causal=True)
    dense = Recorder(4)
    attention_over_slices(
        lambda first, stop: case.q[:, :, first:stop], 8, 8, case.sm_scale, True, slice_len=12,
        unpack=Scratch(case, 12).unpack, dense=Dense(dense, 4), merge=refuse,
    )  # fmt: skip
    assert dense.shapes == [(8, 8)]


def test_a_chunk_behind_a_prefix_of_odd_length_is_two_calls(generator):
    # The square begins at a multiple of the grain; what is before it is read by as few rows as the chunk needs.
    case = random_case(generator, dtype=torch.float32, q_len=8, kv_len=27, is_causal=True)
    assert run(case, 40, 8)[2].shapes == [(8, 16), (16, 16)]


def test_pieces_of_a_chunk_over_a_prefix():
    # 4 queries after 6 keys, slices of 5: the prefix, then its rest and the diagonal.
    assert list(pieces(4, 10, True, 0, 5)) == [Piece(0, 4, 0, 5, False, False)]
    assert list(slices(10, 6, 5)) == [(0, 1), (1, 6), (6, 10)]
    assert list(pieces(4, 10, True, 5, 10)) == [Piece(0, 4, 5, 6, False, False), Piece(0, 4, 6, 10, True, True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_dense_operator_takes_groups_and_returns_natural_logarithms(generator, dtype, is_causal):
    q, k, v = (torch.randn(2, heads, 33, 64, generator=generator).to(dtype) for heads in (8, 2, 2))
    out, lse = dense_attention(CPU, dtype, 64).run(q, k, v, is_causal, 0.3)
    want, want_lse = oracle.attention(q, k, v, 0.3, is_causal)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), want, rtol=0, atol=limit)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0, atol=limit)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_flash_attention_returns_contiguous_logarithms(generator, monkeypatch, layout):
    def like_pytorch(q, k, v, *options, scale):  # its result has the strides of q, its log-sum-exps have those of their own
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, *options[:2], scale=scale)
        return torch.empty_like(q).copy_(out), lse.contiguous()

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", like_pytorch, raising=False)
    case = random_case(generator, dtype=torch.float32, q_len=5, kv_len=7, packed=(False, False), layout=layout)
    out, lse = _flash(case.q, case.k, case.v, False, case.sm_scale)
    assert lse.is_contiguous()
    for got, want in zip((out, lse), oracle.attention(case.q, case.k, case.v, case.sm_scale, False), strict=True):
        compare(got, want, torch.float32)
