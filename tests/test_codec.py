"""TQ4Codec: the layout of a compressed vector, its error, extreme values, and every shape and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from turboquant_vllm import TQ4Codec, TQ4Tensor, lloyd_max, reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SEEDS = st.integers(0, 2**31 - 1)
Randn = Callable[..., torch.Tensor]


def relative_error(x: torch.Tensor, again: torch.Tensor) -> float:
    """Mean of |x - x'|^2 / |x|^2 over vectors, in float64."""
    x, again = x.double(), again.double()
    return float(((x - again).square().sum(-1) / x.square().sum(-1)).mean())


def assert_nearest_levels(codec: TQ4Codec, x: torch.Tensor, t: TQ4Tensor) -> None:
    """The codes are those of the nearest levels in float64, one nibble after the other; the norms are the lengths."""
    x = x.double().reshape(-1, codec.head_dim)
    length = x.square().sum(-1).sqrt()
    y = x / torch.where(length > 0, length, 1.0)[:, None] @ codec.rotation.double().T
    distance = (y[..., None] - codec.centroids.double()).abs()
    nearest = distance.argmin(-1)
    nibbles = [[byte >> 4, byte & 15] for byte in t.codes.reshape(-1, codec.head_dim // 2).int().unbind(-1)]
    codes = torch.stack([nibble for pair in nibbles for nibble in pair], -1)
    # Float32 arithmetic may decide otherwise only where two levels are equally near to within its rounding.
    excess = distance.gather(-1, codes.long()[..., None]) - distance.gather(-1, nearest[..., None])
    assert excess.max() < 2e-6
    assert ((t.norms.double().reshape(-1) - length).abs() <= 1e-6 * length).all()


# Layout


def test_byte_i_holds_coordinate_2i_in_its_high_nibble() -> None:
    boundaries = torch.tensor(lloyd_max(16).boundaries, dtype=torch.float32)
    x = torch.zeros(2, 16)
    x[0, 4], x[1, 7] = 5.0, -5.0  # the largest and the smallest level; the others are near zero, code 7 (0111)
    codes, norms = reference.compress(x, torch.eye(16), boundaries)
    assert bytes(codes[0].tolist()).hex() == "7777f77777777777"
    assert bytes(codes[1].tolist()).hex() == "7777777077777777"
    assert norms.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("head_dim", [16, 18, 64])
def test_decompress_follows_the_formula(generator: torch.Generator, head_dim: int) -> None:
    codec = TQ4Codec(head_dim, seed=3)
    codes = torch.randint(256, (3, head_dim // 2), generator=generator, dtype=torch.uint8)
    norms = torch.rand(3, generator=generator) * 10
    again = codec.decompress(TQ4Tensor(codes, norms), torch.float64)
    assert again.dtype == torch.float64
    levels, matrix = codec.centroids.tolist(), codec.rotation.tolist()
    for row, scale, got in zip(codes.tolist(), norms.tolist(), again.tolist(), strict=True):
        y = []
        for byte in row:
            y += [levels[byte // 16], levels[byte % 16]]
        for i in range(head_dim):
            expected = scale * sum(y[j] * matrix[j][i] for j in range(head_dim))
            assert got[i] == pytest.approx(expected, rel=1e-12, abs=1e-13 * scale)


def test_decompress_takes_any_levels_in_any_order(generator: torch.Generator, randn: Randn) -> None:
    codes = torch.randint(256, (9, 32), generator=generator, dtype=torch.uint8)
    norms, levels, rotation = randn(9), randn(16) * 30, TQ4Codec(64).rotation
    again = reference.decompress(codes, norms, levels, rotation, torch.float32)
    oracle.assert_close(again, oracle.decompress(codes, norms, levels, rotation))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decompress_rounds_once_to_the_dtype(generator: torch.Generator, randn: Randn, dtype: torch.dtype) -> None:
    codec = TQ4Codec(80)
    t = TQ4Tensor(torch.randint(256, (50, 40), generator=generator, dtype=torch.uint8), randn(50).abs())
    again = codec.decompress(t, dtype)
    assert again.dtype == dtype
    oracle.assert_close(again, oracle.decompress(*t, codec.centroids, codec.rotation))


# Error


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256, 512])
def test_relative_error_is_the_one_promised(randn: Randn, head_dim: int) -> None:
    codec = TQ4Codec(head_dim, scale="norm")
    x = randn(4_000_000 // head_dim, head_dim)
    error = relative_error(x, codec.decompress(codec.compress(x)))
    # Over four million coordinates the mean scatters by 0.1 %.
    assert error == pytest.approx(head_dim * lloyd_max(head_dim).mse, rel=0.01)
    if head_dim == 128:
        assert error == pytest.approx(0.00932, rel=0.01)


@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
def test_rotation_spreads_vectors_with_few_large_coordinates(randn: Randn, rotation: str) -> None:
    codec = TQ4Codec(128, rotation=rotation, seed=2)
    x = randn(4000, 128)
    x[:, 5] *= 50
    x[:, 77] *= 20
    # These are far from uniformly random; a codec without a rotation would lose about a half.
    assert relative_error(x, codec.decompress(codec.compress(x))) < 2 * 128 * lloyd_max(128).mse


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_dtypes(randn: Randn, dtype: torch.dtype) -> None:
    for head_dim in (64, 80):
        codec = TQ4Codec(head_dim, scale="norm")
        x = randn(200, head_dim).to(dtype)
        t = codec.compress(x)
        assert (t.codes.dtype, t.norms.dtype) == (torch.uint8, torch.float32)
        assert_nearest_levels(codec, x, t)


# Extreme vectors


def test_zero_vectors_come_back_as_zeros(randn: Randn) -> None:
    codec = TQ4Codec(64)
    x = randn(6, 64)
    t = codec.compress(x)
    x[1::2] = 0.0
    with_zeros = codec.compress(x)
    assert (with_zeros.norms[1::2] == 0).all()
    assert (codec.decompress(with_zeros)[1::2] == 0).all()
    assert (with_zeros.codes[1::2] == 0x77).all()  # zero lies on the boundary above code 7, and belongs to the cell below
    assert torch.equal(with_zeros.codes[::2], t.codes[::2])
    assert torch.equal(with_zeros.norms[::2], t.norms[::2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_visible_in_their_vector(randn: Randn, dtype: torch.dtype, bad: float) -> None:
    codec = TQ4Codec(64)
    clean = randn(64, 64).to(dtype)
    x = clean.clone()
    for i in range(1, 64, 2):
        x[i, i] = bad
    t = codec.compress(x)
    again = codec.decompress(t)
    assert t.norms[1::2].isnan().all()
    assert (t.codes[1::2] == 0).all()  # arbitrary, but every implementation must agree
    assert again[1::2].isnan().all()
    assert torch.equal(again[::2], codec.decompress(codec.compress(clean))[::2])


@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1e-20, 1e-15, 1e15, 1e20, 1e30, 1e37])
def test_tiny_and_huge_vectors_keep_their_accuracy(randn: Randn, scale: float) -> None:
    codec = TQ4Codec(128)
    x = randn(16000, 128) * torch.tensor(scale)  # the mean error of 4000 is off by 0.3 %
    again = codec.decompress(codec.compress(x))
    assert relative_error(x, again) == pytest.approx(128 * lloyd_max(128).mse, rel=0.02)


@given(power=st.integers(-100, 100), head_dim=st.sampled_from([16, 80, 128]), seed=SEEDS)
def test_a_power_of_two_changes_norms_alone(power: int, head_dim: int, seed: int) -> None:
    codec = TQ4Codec(head_dim)
    x = torch.randn(7, head_dim, generator=torch.Generator().manual_seed(seed))
    t, scaled = codec.compress(x), codec.compress(x * 2.0**power)
    assert torch.equal(scaled.codes, t.codes)
    assert torch.equal(scaled.norms, t.norms * 2.0**power)


# Shapes


@given(
    lead=st.lists(st.integers(0, 5), max_size=4),
    head_dim=st.sampled_from([16, 18, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    seed=SEEDS,
)
def test_any_leading_shape(lead: list[int], head_dim: int, dtype: torch.dtype, seed: int) -> None:
    codec = TQ4Codec(head_dim, scale="norm")
    x = torch.randn(*lead, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    t = codec.compress(x)
    assert t.codes.shape == (*lead, head_dim // 2)
    assert t.norms.shape == tuple(lead)
    assert t.codes.is_contiguous()
    assert t.norms.is_contiguous()
    assert codec.decompress(t).shape == x.shape
    if x.numel():
        assert_nearest_levels(codec, x, t)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x[:, ::2],
        lambda x: x[..., 1::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x[0, 0, 0],
        lambda x: x.flip(-1).mT.contiguous().mT,
    ],
)
def test_any_strides(randn: Randn, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = view(randn(2, 4, 6, 64))
    codec = TQ4Codec(x.shape[-1], scale="norm")
    t = codec.compress(x)
    assert_nearest_levels(codec, x, t)
    assert t.shape == x.shape


def test_decompress_takes_any_strides_and_trailing_one(randn: Randn) -> None:
    codec = TQ4Codec(64)
    t = codec.compress(randn(3, 5, 64))
    plain = codec.decompress(t)
    strided = TQ4Tensor(t.codes.transpose(0, 1), t.norms.T)
    oracle.assert_close(codec.decompress(strided), oracle.decompress(*strided, codec.centroids, codec.rotation))
    assert torch.equal(codec.decompress(TQ4Tensor(t.codes, t.norms[..., None])), plain)


def test_input_is_left_as_it_was(randn: Randn) -> None:
    codec = TQ4Codec(64)
    x = randn(4, 64) * 1e20
    before = x.clone()
    t = codec.compress(x)
    copy = TQ4Tensor(t.codes.clone(), t.norms.clone())
    codec.decompress(t)
    assert torch.equal(x, before)
    assert torch.equal(t.codes, copy.codes)
    assert torch.equal(t.norms, copy.norms)


# Objects


def test_tensor_properties(randn: Randn) -> None:
    t = TQ4Codec(128).compress(randn(2, 8, 100, 128))
    assert t.head_dim == 128
    assert t.shape == torch.Size((2, 8, 100, 128))
    assert t.device == torch.device("cpu")
    assert t.nbytes == 2 * 8 * 100 * (64 + 4)
    moved = t.to("meta")
    assert isinstance(moved, TQ4Tensor)
    assert moved.device == moved.norms.device == torch.device("meta")
    assert moved.shape == t.shape


def test_codec_properties() -> None:
    codec = TQ4Codec(128, seed=5)
    book = lloyd_max(128)
    assert (codec.head_dim, codec.seed, codec.rotation_kind) == (128, 5, "hadamard")
    assert torch.equal(codec.centroids, torch.tensor(book.centroids).float())
    assert torch.equal(codec.boundaries, torch.tensor(book.boundaries).float())
    assert repr(codec) == "TQ4Codec(head_dim=128, seed=5, rotation='hadamard', scale='unbiased', device='cpu')"
    assert TQ4Codec(96).rotation_kind == "haar"
    assert TQ4Codec(128, rotation="haar").rotation_kind == "haar"
    moved = codec.to("meta")
    assert {x.device.type for x in (moved.rotation, moved.centroids, moved.boundaries, moved.companding)} == {"meta"}
    assert (moved.head_dim, moved.seed, moved.rotation_kind, moved.device.type) == (128, 5, "hadamard", "meta")
    assert codec.device.type == "cpu"


def test_codecs_do_not_share_a_rotation() -> None:
    codec = TQ4Codec(64)
    codec.rotation.zero_()
    assert TQ4Codec(64).rotation.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: TQ4Codec(15), ValueError, "head_dim must be even and at least 16, got 15"),
        (lambda c: TQ4Codec(8), ValueError, "head_dim must be even and at least 16, got 8"),
        (lambda c: TQ4Codec("64"), TypeError, "head_dim must be an int, got str"),
        (lambda c: TQ4Codec(64, seed=-1), ValueError, "seed must not be negative, got -1"),
        (lambda c: TQ4Codec(64, seed=1.0), TypeError, "seed must be an int, got float"),
        (lambda c: TQ4Codec(80, rotation="hadamard"), ValueError, "power of two, got head_dim=80"),
        (lambda c: TQ4Codec(64, rotation="none"), ValueError, "rotation must be 'auto', 'hadamard' or 'haar', got 'none'"),
        (
            lambda c: TQ4Codec(64, scale="mean"),
            ValueError,
            "scale must be one of 'norm', 'least_squares', 'unbiased', got 'mean'",
        ),
        (lambda c: c.compress([1.0] * 64), TypeError, "x must be a torch.Tensor, got list"),
        (lambda c: c.compress(torch.zeros(64, dtype=torch.int32)), TypeError, "x must be .*float16.*, got torch.int32"),
        (lambda c: c.compress(torch.zeros(3, 62)), ValueError, r"x must have shape \[3, 64\], got \[3, 62\]"),
        (lambda c: c.compress(torch.tensor(1.0)), ValueError, r"x must have shape \[..., 64\], got \[\]"),
        (lambda c: c.compress(torch.zeros(64, device="meta")), ValueError, "x must be on cpu like the codec, got meta"),
        (lambda c: c.decompress(torch.zeros(3, 32)), TypeError, "t must be a TQ4Tensor, got Tensor"),
        (lambda c: c.decompress(TQ4Tensor(torch.zeros(32), torch.zeros(()))), TypeError, "t.codes must be torch.uint8"),
        (lambda c: c.decompress(tq4((32,), (3,))), ValueError, r"t.norms must have shape \[\] or \[1\], got \[3\]"),
        (lambda c: c.decompress(tq4((3, 31), (3,))), ValueError, r"t.codes must have shape \[3, 32\], got \[3, 31\]"),
        (lambda c: c.decompress(tq4((), ())), ValueError, r"t.codes must have shape \[..., 32\], got \[\]"),
        (lambda c: c.decompress(tq4((32,), ()).to("meta")), ValueError, "t.codes must be on cpu like the codec, got meta"),
        (lambda c: c.decompress(tq4((32,), ()), torch.int8), TypeError, "dtype must be one of .*, got torch.int8"),
    ],
)
def test_bad_arguments(call: Callable[[TQ4Codec], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(TQ4Codec(64))


def tq4(codes: tuple[int, ...], norms: tuple[int, ...]) -> TQ4Tensor:
    return TQ4Tensor(torch.zeros(codes, dtype=torch.uint8), torch.zeros(norms))
