"""The reference attention, which defines what kernels compute, against float64 softmax over decompressed tensors."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from turboquant_vllm import TQ4Codec, merge_attention_states
from turboquant_vllm.records import Masks, Operand, Tables
from turboquant_vllm.reference import attention
from turboquant_vllm.reference_codes import rotated

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PACKED = [
    pytest.param((True, True), id="packed"),
    pytest.param((True, False), id="packed-keys"),
    pytest.param((False, True), id="packed-values"),
    pytest.param((False, False), id="dense"),
]


@dataclass(frozen=True)
class Call:
    """Arguments of one call of the reference."""

    q: torch.Tensor
    k: torch.Tensor
    k_norms: torch.Tensor | None
    v: torch.Tensor
    v_norms: torch.Tensor | None
    centroids: torch.Tensor
    rotation: torch.Tensor
    sm_scale: float
    is_causal: bool = False

    def run(self, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        block = {name: options.pop(name) for name in ("block",) if name in options}
        operands = Operand(self.k, self.k_norms), Operand(self.v, self.v_norms)
        tables, masks = Tables(self.centroids, self.rotation), Masks(self.is_causal, **options)
        return attention(self.q, *operands, tables, self.sm_scale, masks, **block)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        def dense(x: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
            return x if norms is None else oracle.decompress(x, norms, self.centroids, self.rotation)

        k, v = dense(self.k, self.k_norms), dense(self.v, self.v_norms)
        return oracle.attention(self.q, k, v, self.sm_scale, self.is_causal)

    def keys(self, start: int, stop: int) -> Call:
        """The same call over some of the keys."""
        parts = {name: getattr(self, name) for name in ("k", "k_norms", "v", "v_norms")}
        return replace(self, **{name: None if x is None else x[:, :, start:stop] for name, x in parts.items()})


@pytest.fixture
def call(generator: torch.Generator) -> Callable[..., Call]:
    def make(
        q_len: int = 3,
        kv_len: int = 40,
        *,
        head_dim: int = 32,
        group: int = 2,
        batch: int = 2,
        packed: tuple[bool, bool] = (True, True),
        dtype: torch.dtype = torch.float64,
        is_causal: bool = False,
    ) -> Call:
        codec = TQ4Codec(head_dim) if head_dim >= 16 else None
        centroids = torch.linspace(-1, 1, 16) if codec is None else codec.centroids
        rotation = torch.eye(head_dim) if codec is None else codec.rotation

        def operand(packed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
            rows = (batch, 2, kv_len)
            if not packed:
                return torch.randn(*rows, head_dim, generator=generator).to(dtype), None
            codes = torch.randint(256, (*rows, head_dim // 2), generator=generator, dtype=torch.uint8)
            return codes, math.sqrt(head_dim) * (0.5 + torch.rand(rows, generator=generator))

        q = torch.randn(batch, 2 * group, q_len, head_dim, generator=generator).to(dtype)
        scale = 1 / math.sqrt(head_dim)
        return Call(q, *operand(packed[0]), *operand(packed[1]), centroids, rotation, scale, is_causal)

    return make


def assert_as_expected(call: Call, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = call.run(**options)
    want, want_lse = call.expected()
    assert out.dtype == call.q.dtype
    assert lse.dtype == (torch.float64 if call.q.dtype == torch.float64 else torch.float32)
    oracle.assert_close(out, want)
    oracle.assert_lse_close(lse, want_lse)
    return out, lse


# Agreement with the definition


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(call: Callable[..., Call], dtype: torch.dtype, packed: tuple[bool, bool], is_causal: bool) -> None:
    assert_as_expected(call(7, 600, head_dim=64, dtype=dtype, packed=packed, is_causal=is_causal))


def test_causal_mask_for_every_pair_of_lengths(call: Callable[..., Call]) -> None:
    longest = call(40, 40, head_dim=16, batch=1, group=1, is_causal=True)
    for q_len in range(1, 41):
        for kv_len in range(1, 41):
            one = replace(longest.keys(0, kv_len), q=longest.q[:, :, :q_len])
            out, lse = assert_as_expected(one, block=16)
            unseen = max(0, q_len - kv_len)
            assert (out[:, :, :unseen] == 0).all()
            assert (lse[:, :, :unseen] == -INF).all()
            assert lse[:, :, unseen:].isfinite().all()


@pytest.mark.parametrize("group", [1, 4, 5, 7, 8, 16])
@pytest.mark.parametrize("q_len", [1, 3])
def test_groups(call: Callable[..., Call], group: int, q_len: int) -> None:
    assert_as_expected(call(q_len, 33, group=group, dtype=torch.float32, is_causal=True))


@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("packed", PACKED)
def test_head_dims(call: Callable[..., Call], head_dim: int, packed: tuple[bool, bool]) -> None:
    assert_as_expected(call(2, 40, head_dim=head_dim, packed=packed, dtype=torch.float32))


@pytest.mark.parametrize("block", [1, 3, 64, 512, 1000])
def test_block_size_changes_nothing(call: Callable[..., Call], block: int) -> None:
    assert_as_expected(call(5, 700, is_causal=True), block=block)


@pytest.mark.parametrize("sm_scale", [0.0, -0.3, 1e-30, 0.5])
def test_any_scale(call: Callable[..., Call], sm_scale: float) -> None:
    assert_as_expected(replace(call(4, 30, is_causal=True), sm_scale=sm_scale))


def test_levels_in_any_order(call: Callable[..., Call], randn: Callable[..., torch.Tensor]) -> None:
    levels = randn(16) / 4 + 0.1
    assert not torch.equal(levels, levels.sort().values)
    assert_as_expected(replace(call(), centroids=levels))


def test_any_strides(call: Callable[..., Call]) -> None:
    one = call(6, 40, is_causal=True)
    want, want_lse = one.run()

    def transposed(x: torch.Tensor | None) -> torch.Tensor:
        assert x is not None
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    parts = {name: transposed(getattr(one, name)) for name in ("q", "k", "k_norms", "v", "v_norms")}
    assert not parts["k"].is_contiguous()
    out, lse = replace(one, **parts).run()
    oracle.assert_close(out, want)
    oracle.assert_lse_close(lse, want_lse)
    assert_as_expected(replace(one, k=one.k[:1, :1].expand_as(one.k), v_norms=one.v_norms[:1, :, :1].expand(2, 2, 40)))
    every_second = {name: getattr(one, name)[:, :, ::2] for name in ("q", "k", "k_norms", "v", "v_norms")}
    assert_as_expected(replace(one, **every_second))


# Empty and extreme


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_keys_give_zeros(call: Callable[..., Call], dtype: torch.dtype, packed: tuple[bool, bool]) -> None:
    for is_causal in (False, True):
        out, lse = call(4, 0, dtype=dtype, packed=packed, is_causal=is_causal).run()
        assert (out == 0).all()
        assert (lse == -INF).all()
    out, lse = call(9, 4, dtype=dtype, packed=packed, is_causal=True).run(block=2)
    assert (out[:, :, :5] == 0).all()
    assert (lse[:, :, :5] == -INF).all()
    assert out[:, :, 5:].any(-1).all()


@pytest.mark.parametrize("sizes", [{"q_len": 0}, {"batch": 0}, {"q_len": 0, "kv_len": 0}])
def test_no_queries(call: Callable[..., Call], sizes: dict[str, int]) -> None:
    one = call(**sizes)
    out, lse = one.run()
    assert out.shape == one.q.shape
    assert lse.shape == one.q.shape[:-1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("signs", "sm_scale"), [(False, 32.0), (False, -32.0), (True, 256.0)])
def test_scores_far_from_zero(
    call: Callable[..., Call], generator: torch.Generator, dtype: torch.dtype, signs: bool, sm_scale: float
) -> None:
    # Whole numbers and powers of two everywhere: scores are exact in float32, however large.
    one = call(12, 60, head_dim=64, dtype=dtype, is_causal=True)
    rotated = torch.randint(1, 5, one.q.shape, generator=generator).double()
    if signs:
        rotated *= 2 * torch.randint(2, one.q.shape, generator=generator) - 1
    q = (rotated @ one.rotation.double()).to(dtype)
    one = replace(one, q=q, k_norms=torch.ones(2, 2, 60), centroids=torch.arange(1.0, 17.0), sm_scale=sm_scale)
    out, lse = assert_as_expected(one, block=16)
    assert out.any(-1).all()
    if signs:
        assert lse.min() < -5e3
        assert lse.max() > 5e4
    else:
        assert (lse * math.copysign(1, sm_scale)).min() > 2e4


@pytest.mark.parametrize("name", ["k_norms", "v_norms"])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("block", [8, 512])
def test_what_a_query_does_not_see_never_reaches_it(call: Callable[..., Call], name: str, bad: float, block: int) -> None:
    q_len, kv_len = 12, 20
    one = call(q_len, kv_len, is_causal=True)
    clean, clean_lse = one.run(block=block)
    sees = oracle.visible(q_len, kv_len, True)
    for position in range(kv_len):
        norms = getattr(one, name).clone()
        norms[:, :, position] = bad
        out, lse = replace(one, **{name: norms}).run(block=block)
        hidden = ~sees[:, position]
        assert torch.equal(out[:, :, hidden], clean[:, :, hidden])
        assert torch.equal(lse[:, :, hidden], clean_lse[:, :, hidden])
        reached = out[:, :, ~hidden].isfinite()
        if name == "v_norms":
            assert not reached.any()
            assert torch.equal(lse, clean_lse)
        elif math.isnan(bad):
            assert not reached.any()
            assert lse[:, :, ~hidden].isnan().all()


def test_nan_in_a_query_stays_in_its_row(call: Callable[..., Call]) -> None:
    one = call(5, 20)
    clean, _ = one.run()
    q = one.q.clone()
    q[0, 1, 2, 3] = NAN
    out, lse = replace(one, q=q).run()
    assert out[0, 1, 2].isnan().all()
    assert lse[0, 1, 2].isnan()
    out[0, 1, 2] = clean[0, 1, 2]
    assert torch.equal(out, clean)


# Memory and offsets


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("packed", PACKED)
def test_keys_are_streamed(call: Callable[..., Call], packed: tuple[bool, bool]) -> None:
    one = call(64, 1024, packed=packed, batch=1)
    with LargestTensor() as short:
        one.run(block=64)
    longer = call(64, 8192, packed=packed, batch=1)
    with LargestTensor() as long:
        longer.run(block=64)
    assert long.elements == short.elements < 64 * 1024


def test_offsets_beyond_two_billion_bytes() -> None:
    # A child process, for its address space; almost no page of the buffer is ever touched.
    program = """
import torch
from turboquant_vllm import TQ4Codec, TQ4Tensor, tq4_attention
try:
    buffer = torch.empty(5 << 30, dtype=torch.uint8)
except RuntimeError:
    raise SystemExit(77)
codec = TQ4Codec(64)
q, k, v = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 40, 64), torch.randn(1, 2, 40, 64)
k, v = codec.compress(k), codec.compress(v)
head = 2**31 + 4096  # bytes between heads: the second lies beyond 2^31
far = []
for i, t in enumerate((k, v)):
    codes = buffer[i * 4096 :].as_strided((1, 2, 40, 32), (0, head, 32, 1)).copy_(t.codes)
    norms = buffer[i * 4096 + 2048 :].view(torch.float32).as_strided((1, 2, 40), (0, head // 4, 1)).copy_(t.norms)
    far.append(TQ4Tensor(codes, norms))
assert far[0].codes[0, 1].data_ptr() - buffer.data_ptr() > 2**31
assert torch.equal(tq4_attention(q, *far, codec, is_causal=True), tq4_attention(q, k, v, codec, is_causal=True))
assert torch.equal(codec.decompress(far[0]), codec.decompress(k))
x = buffer.view(torch.float32).as_strided((2, 40, 64), (head // 4, 64, 1)).copy_(torch.randn(2, 40, 64))
for one, other in zip(codec.compress(x), codec.compress(x.clone())):
    assert torch.equal(one, other)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if run.returncode == 77:
        pytest.skip("not enough memory for a buffer of 5 GiB, even untouched")
    assert run.returncode == 0, run.stderr


# Merging


@pytest.mark.parametrize("cuts", [(0, 40), (0, 13, 40), (0, 0, 7, 7, 7, 30, 40, 40), tuple(range(41))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_parts_equals_the_whole(call: Callable[..., Call], dtype: torch.dtype, cuts: tuple[int, ...]) -> None:
    whole = call(3, 40, dtype=dtype)
    parts = [whole.keys(start, stop).run() for start, stop in itertools.pairwise(cuts)]
    out, lse = merge_attention_states(torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts]))
    assert (out.dtype, lse.dtype) == (dtype, dtype)
    want, want_lse = whole.expected()
    oracle.assert_close(out, want)
    oracle.assert_lse_close(lse, want_lse)


def test_merging_a_causal_call_by_keys(call: Callable[..., Call]) -> None:
    # The last keys form the triangle; those before are seen by all: how a chunk continues a cache.
    whole = call(12, 30, is_causal=True)
    before, triangle = replace(whole.keys(0, 18), is_causal=False).run(), whole.keys(18, 30).run()
    out, lse = merge_attention_states(*(torch.stack(pair) for pair in zip(before, triangle, strict=True)))
    want, want_lse = whole.expected()
    oracle.assert_close(out, want)
    oracle.assert_lse_close(lse, want_lse)


def test_merging_nothing_gives_zeros() -> None:
    out, lse = merge_attention_states(torch.full((3, 2, 4), NAN), torch.full((3, 2), -INF))
    assert (out == 0).all()
    assert (lse == -INF).all()


def test_merging_keeps_dtypes_and_far_logarithms() -> None:
    outs = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    for far in (-6e4, 6e4):
        out, lse = merge_attention_states(outs, torch.tensor([far, far]))
        assert out.dtype == torch.bfloat16
        assert out.tolist() == [2.0, 3.0]
        assert lse.item() == pytest.approx(far + math.log(2), abs=0.004)  # a float32 of 6e4 is spaced by 1/256
    out, lse = merge_attention_states(outs, torch.tensor([6e4, -6e4]))
    assert (out.tolist(), lse.item()) == ([1.0, 2.0], 6e4)


def test_merging_hides_no_nan() -> None:
    # The second part's weight is below the smallest float32, yet it saw a NaN.
    out, _ = merge_attention_states(torch.tensor([[1.0], [NAN]]), torch.tensor([0.0, -1000.0]))
    assert out.isnan().all()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_what_a_vector_is_coded_from_does_not_depend_on_the_call(randn: Callable[..., torch.Tensor], head_dim: int) -> None:
    x, rotation = randn(1000, head_dim), TQ4Codec(head_dim).rotation
    together, alone = rotated(x, rotation), torch.cat([rotated(one, rotation) for one in x.split(1)])
    # Sums in float64 differ in their last bits: one in some 10^8 lies so near the middle of two float32 that they may show.
    assert (together != alone).sum() <= 1
    codec = TQ4Codec(head_dim)
    for whole, parts in zip(codec.compress(x), zip(*(codec.compress(one) for one in x.split(1)), strict=True), strict=True):
        assert (whole != torch.cat(parts)).sum() <= 1
