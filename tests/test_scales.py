"""The three scales of a compressed vector: their definitions in float64, their promises, and extreme vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import oracle
from turboquant_vllm import TQ4Codec, TQ4Tensor, reference
from turboquant_vllm.codec import SCALES

Randn = Callable[..., torch.Tensor]
BETTER = [scale for scale in SCALES if scale != "norm"]


def levels(codec: TQ4Codec, t: TQ4Tensor) -> torch.Tensor:
    """What the codes stand for before scale and rotation, float64 ``[..., D]``."""
    ones = torch.ones(t.codes.shape[:-1])
    return oracle.decompress(t.codes, ones, codec.centroids, codec.rotation) @ codec.rotation.double().T


def expected_norms(codec: TQ4Codec, x: torch.Tensor, t: TQ4Tensor) -> torch.Tensor:
    """The scale by its definition, given the codes."""
    y, c = x.double() @ codec.rotation.double().T, levels(codec, t)
    if codec.scale == "norm":
        return x.double().norm(dim=-1)
    if codec.scale == "least_squares":
        return (y * c).sum(-1) / (c * c).sum(-1)
    return x.double().square().sum(-1) / (y * c).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_norms_follow_the_definition_and_codes_do_not_depend_on_it(randn: Randn, scale: str, dtype: torch.dtype) -> None:
    for head_dim in (16, 80, 128):
        codec = TQ4Codec(head_dim, seed=1, scale=scale)
        x = (randn(3, 50, head_dim) * randn(50, 1).exp()).to(dtype)
        t = codec.compress(x)
        assert torch.equal(t.codes, TQ4Codec(head_dim, seed=1).compress(x).codes)
        assert t.norms.dtype == torch.float32
        torch.testing.assert_close(t.norms.double(), expected_norms(codec, x, t), rtol=1e-6, atol=0.0)


def test_each_scale_keeps_its_promise(randn: Randn) -> None:
    x = randn(2000, 64).double()
    again = {scale: TQ4Codec(64, scale=scale) for scale in SCALES}
    again = {scale: codec.decompress(codec.compress(x), torch.float64) for scale, codec in again.items()}
    error = {scale: (x - y).square().sum(-1) for scale, y in again.items()}
    squares = x.square().sum(-1)
    # No scale comes nearer to x than least squares, in any vector.
    for other in ("norm", "unbiased"):
        assert (error["least_squares"] <= error[other] * (1 + 1e-6)).all()
        assert error["least_squares"].sum() < 0.999 * error[other].sum()
    torch.testing.assert_close((x * again["unbiased"]).sum(-1), squares, rtol=1e-6, atol=0.0)
    # What that costs in error is a hundredth of the error.
    assert error["unbiased"].sum() < 1.02 * error["least_squares"].sum()
    # The other two fall short, by about the relative error of the codec.
    for short in ("norm", "least_squares"):
        assert (x * again[short]).sum() / squares.sum() == pytest.approx(1 - 0.0091, abs=0.0015)


def test_any_codec_reads_every_scale(randn: Randn) -> None:
    x = randn(20, 64)
    reader = TQ4Codec(64)
    for scale in SCALES:
        writer = TQ4Codec(64, scale=scale)
        t = writer.compress(x)
        assert torch.equal(reader.decompress(t), writer.decompress(t))
        assert writer.to("cpu").scale == scale


@pytest.mark.parametrize("scale", BETTER)
def test_zeros_and_extremes(randn: Randn, scale: str) -> None:
    codec = TQ4Codec(64, scale=scale)
    x = randn(7, 64)
    x[0] = 0.0
    x[1] *= 1e-40
    x[2] *= 1e30
    x[3, 5], x[4, 6], x[5, 7] = float("nan"), float("inf"), float("-inf")
    t = codec.compress(x)
    assert t.norms[0] == 0
    assert (codec.decompress(t)[0] == 0).all()
    assert t.norms[3:6].isnan().all()
    for row in (1, 2, 6):
        want = expected_norms(codec, x[row], TQ4Tensor(t.codes[row], t.norms[row]))
        assert t.norms[row].item() == pytest.approx(want.item(), rel=1e-6, abs=2.0**-149 * 64)


def test_a_power_of_two_changes_norms_alone(randn: Randn) -> None:
    x = randn(9, 80)
    for scale in BETTER:
        codec = TQ4Codec(80, scale=scale)
        t, scaled = codec.compress(x), codec.compress(x * 2.0**90)
        assert torch.equal(scaled.codes, t.codes)
        assert torch.equal(scaled.norms, t.norms * 2.0**90)


def test_least_squares_takes_any_levels(randn: Randn) -> None:
    codec = TQ4Codec(64)
    x, centroids = randn(30, 64).double(), codec.centroids * 1.3
    codes, norms = reference.compress(x, codec.rotation, codec.boundaries, centroids, "least_squares")
    plain = reference.compress(x, codec.rotation, codec.boundaries, codec.centroids, "least_squares")[1]
    assert torch.equal(codes, codec.compress(x).codes)
    torch.testing.assert_close(norms, plain / 1.3)


@pytest.mark.parametrize("scale", SCALES)
def test_operator_is_traced_and_sees_the_scale(randn: Randn, scale: str) -> None:
    codec = TQ4Codec(64, scale=scale)
    x = randn(5, 64)
    args: tuple[Any, ...] = (x, *codec.writing)
    torch.library.opcheck(torch.ops.turboquant.compress.default, args)
    assert torch.equal(torch.ops.turboquant.compress(*args)[1], codec.compress(x).norms)
