"""Lloyd-Max levels: the published errors, and the conditions of optimality by independent quadrature."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch

from turboquant_vllm import Codebook, lloyd_max
from turboquant_vllm.codebook import companding

HEAD_DIMS = (16, 18, 64, 80, 128, 256, 512)
ALL_BITS = range(1, 9)
# head_dim times the mean squared error of one coordinate at 4 bits, to six decimals.
KNOWN = {64: 0.009132, 80: 0.009204, 96: 0.009253, 128: 0.009315, 192: 0.009377, 256: 0.009408}

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def density(head_dim: int, y: np.ndarray) -> np.ndarray:
    """Density of one coordinate of a uniformly random unit vector in R^head_dim."""
    constant = math.exp(math.lgamma(head_dim / 2) - math.lgamma((head_dim - 1) / 2)) / math.sqrt(math.pi)
    return constant * (1 - y**2) ** ((head_dim - 3) / 2)


def cells(head_dim: int, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability, mean and squared error of every cell of ``levels``, by Gauss-Legendre quadrature."""
    edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    y = middle[:, None] + half[:, None] * _NODES
    mass = density(head_dim, y) * _WEIGHTS * half[:, None]
    probability = mass.sum(1)
    return probability, (mass * y).sum(1) / probability, (mass * (y - levels[:, None]) ** 2).sum(1)


@pytest.mark.parametrize(("head_dim", "known"), KNOWN.items())
def test_error_matches_the_published_figures(head_dim: int, known: float) -> None:
    # The figures are given to six decimals, so half a unit of the sixth is all that may differ.
    book = lloyd_max(head_dim)
    assert abs(head_dim * book.mse - known) <= 5e-7
    assert abs(head_dim * cells(head_dim, book.centroids)[2].sum() - known) <= 5e-7


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", ALL_BITS)
class TestEverySize:
    def test_error_matches_quadrature(self, head_dim: int, bits: int) -> None:
        book = lloyd_max(head_dim, bits)
        probability, _, error = cells(head_dim, book.centroids)
        assert abs(probability.sum() - 1) < 1e-12
        assert book.mse == pytest.approx(error.sum(), rel=1e-8)
        assert head_dim * book.mse < 1

    def test_every_level_is_the_mean_of_its_cell(self, head_dim: int, bits: int) -> None:
        book = lloyd_max(head_dim, bits)
        _, mean, _ = cells(head_dim, book.centroids)
        assert np.abs(book.centroids - mean).max() < 1e-11

    def test_levels_are_symmetric_and_ascending(self, head_dim: int, bits: int) -> None:
        book = lloyd_max(head_dim, bits)
        assert isinstance(book, Codebook)
        assert book.centroids.shape == (2**bits,)
        assert book.centroids.dtype == book.boundaries.dtype == np.float64
        assert np.array_equal(book.centroids, -book.centroids[::-1])
        assert (np.diff(book.centroids) > 0).all()
        assert 0 < book.centroids[-1] < 1
        assert np.array_equal(book.boundaries, (book.centroids[1:] + book.centroids[:-1]) / 2)

    def test_no_neighbouring_levels_do_better(self, generator: torch.Generator, head_dim: int, bits: int) -> None:
        book = lloyd_max(head_dim, bits)
        gap = np.diff(book.centroids).min()
        for _ in range(3):
            moves = torch.rand(2**bits, generator=generator, dtype=torch.float64).numpy() - 0.5
            moved = book.centroids + 0.4 * gap * moves
            assert cells(head_dim, moved)[2].sum() > book.mse

    def test_solving_is_quick(self, head_dim: int, bits: int) -> None:
        def seconds() -> float:
            start = time.perf_counter()
            lloyd_max.__wrapped__(head_dim, bits)
            return time.perf_counter() - start

        assert min(seconds() for _ in range(3)) < 0.1


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_each_bit_cuts_the_error(head_dim: int) -> None:
    errors = [lloyd_max(head_dim, bits).mse for bits in ALL_BITS]
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert ratios == sorted(ratios)
    assert 3 < ratios[0] < ratios[-1] < 4


def test_cached() -> None:
    assert lloyd_max(128, 4) is lloyd_max(128, 4)
    assert lloyd_max(128) is lloyd_max(128)
    assert lloyd_max(128, 3) is not lloyd_max(128, 4)


def test_cached_arrays_are_read_only() -> None:
    book = lloyd_max(128)
    for array in (book.centroids, book.boundaries):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((127,), ValueError, "head_dim must be even and at least 16, got 127"),
        ((14,), ValueError, "head_dim must be even and at least 16, got 14"),
        ((0,), ValueError, "head_dim must be even"),
        ((-128,), ValueError, "head_dim must be even"),
        ((128.0,), TypeError, "head_dim must be an int, got float"),
        (("128",), TypeError, "head_dim must be an int, got str"),
        ((True,), TypeError, "head_dim must be an int, got bool"),
        ((128, 0), ValueError, "bits must be from 1 to 8, got 0"),
        ((128, 9), ValueError, "bits must be from 1 to 8, got 9"),
        ((128, 4.0), TypeError, "bits must be an int, got float"),
        ((128, True), TypeError, "bits must be an int, got bool"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    # Equal arguments of the right type are in the cache already; they must not be found instead.
    lloyd_max(128)
    lloyd_max(128, 4)
    lloyd_max(128, 1)
    with pytest.raises(error, match=message):
        lloyd_max(*arguments)


@pytest.mark.parametrize("head_dim", [*range(16, 258, 2), 1024])
def test_companding_takes_boundaries_to_integers(head_dim: int) -> None:
    boundaries = lloyd_max(head_dim).boundaries
    scale, *coefficients = companding(boundaries)

    def curve(y: np.ndarray) -> np.ndarray:
        u = np.clip(scale * y, -0.5, 0.5)
        return 8 + sum(c * u ** (2 * i + 1) for i, c in enumerate(coefficients))

    # An error of the curve over its slope is one of the coordinate: here, of where the boundary seems to be.
    step = 1e-6
    slope = (curve(boundaries + step) - curve(boundaries - step)) / (2 * step)
    assert (np.abs(curve(boundaries) - np.arange(1, 16)) / slope).max() < 5e-8
    y = np.linspace(-1, 1, 40001)
    assert (np.diff(curve(y)) >= 0).all()
    # No other cell between boundaries or beyond them, and room for float32's rounding at the ends.
    assert 0.1 < curve(y).min() < 1
    assert 15 < curve(y).max() < 15.9
    apart = np.abs(y[:, None] - boundaries).min(1) > 1e-7
    assert (np.floor(curve(y))[apart] == np.searchsorted(boundaries, y)[apart]).all()
