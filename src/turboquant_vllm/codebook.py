"""Lloyd-Max levels for one coordinate of a rotated unit vector.

A uniformly random unit vector in R^D has coordinates with density proportional to (1 - y^2)^((D - 3) / 2) on [-1, 1].
The scalar quantiser with the smallest mean squared error has levels that are the means of their cells, and cell
boundaries half way between neighbouring levels. Both the probability and the partial mean of a cell have closed forms,
so the fixed point needs no quadrature:

    P(|y| > b)         = I_{1 - b^2}((D - 1) / 2, 1 / 2)                       regularised incomplete beta function
    integral of y f(y) = -(1 - y^2)^((D - 1) / 2) / ((D - 1) B(1/2, (D - 1)/2))

Lloyd's iteration (level <- mean of its cell) converges linearly and slowly for many levels. Its Jacobian is
tridiagonal, so Newton's method on the same fixed-point equation costs the same per step and converges quadratically.

Source: TurboQuant, arXiv 2504.19874, section 3; S. P. Lloyd, "Least squares quantization in PCM", 1982.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.linalg import solve_banded
from scipy.special import beta, betainc, betaincinv

from turboquant_vllm.checks import check_head_dim

__all__ = ["Codebook", "companding", "lloyd_max"]

_LLOYD_STEPS = 8
_NEWTON_STEPS = 60
# Where coordinates are clamped, in units of the last boundary: beyond that the curve would leave the last cell.
_COMPANDING_RANGE = 1.2


@dataclass(frozen=True)
class Codebook:
    """Levels of a scalar quantiser for one coordinate of a unit vector.

    Attributes:
        centroids: float64 ``[2**bits]``, ascending and symmetric about zero; read-only.
        boundaries: float64 ``[2**bits - 1]``, midpoints of neighbouring centroids; read-only.
        mse: expected squared error of one coordinate; ``head_dim * mse`` is the relative error of a vector.
    """

    centroids: np.ndarray
    boundaries: np.ndarray
    mse: float


@lru_cache(maxsize=64, typed=True)  # typed: 128.0 and True must not find what 128 and 1 left
def lloyd_max(head_dim: int, bits: int = 4) -> Codebook:
    """Levels with the least mean squared error for a coordinate of a random unit vector in R^head_dim.

    Args:
        head_dim: dimension of the vector, even and at least 16.
        bits: bits per coordinate, 1 to 8.

    Returns:
        The :class:`Codebook`, cached by ``(head_dim, bits)``.

    Raises:
        TypeError, ValueError: ``head_dim`` or ``bits`` is not an integer in its range.
    """
    check_head_dim(head_dim, minimum=16)
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be an int, got {type(bits).__name__}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be from 1 to 8, got {bits}")

    positive = _fixed_point(head_dim, 2 ** (bits - 1))
    centroids = np.concatenate([-positive[::-1], positive])
    boundaries = (centroids[1:] + centroids[:-1]) / 2
    probability, _ = _cells(head_dim, positive)
    # At the fixed point E[y c(y)] = E[c(y)^2], hence MSE = E[y^2] - E[c^2]; a cell and its mirror image count twice.
    mse = 1 / head_dim - 2 * float(probability @ positive**2)
    centroids.setflags(write=False)
    boundaries.setflags(write=False)
    return Codebook(centroids, boundaries, mse)


def companding(boundaries: np.ndarray) -> np.ndarray:
    """Coefficients of the curve that makes the cells of 16 mirrored levels equally wide, for kernels that cannot search.

    With s, c0, ..., c4 returned, the cell of a coordinate y is ``floor(8 + u * (c0 + c1 * w + ... + c4 * w^4))`` where
    ``u = clamp(s * y, -1/2, 1/2)`` and ``w = u^2``.

    Args:
        boundaries: float64 ``[15]`` of :func:`lloyd_max` with 4 bits.

    Returns:
        float64 ``[6]``. The curve takes each boundary to its integer but for an error that is worth less than 5e-8 of a
        coordinate; it rises everywhere, and the clamp lies inside the outermost cells.
    """
    positive = boundaries[8:]
    scale = 1 / (2 * _COMPANDING_RANGE * positive[-1])
    u, cell = positive * scale, np.arange(1.0, 8.0)
    # Five odd powers for seven boundaries. Steeper there means less harm to the coordinate.
    weight = 1 / np.gradient(cell, u)
    powers = u[:, None] ** np.arange(1, 10, 2)
    coefficients, *_ = np.linalg.lstsq(powers * weight[:, None], cell * weight, rcond=None)
    return np.concatenate([[scale], coefficients])


def _cells(head_dim: int, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability and mean of each cell on the positive half line, whose levels are ``levels`` (ascending)."""
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    rest = 1 - edges**2
    tail = betainc((head_dim - 1) / 2, 0.5, rest) / 2  # P(y > edge): differences of tails stay exact far out
    primitive = rest ** ((head_dim - 1) / 2) / ((head_dim - 1) * beta(0.5, (head_dim - 1) / 2))
    probability = tail[:-1] - tail[1:]
    return probability, (primitive[:-1] - primitive[1:]) / probability


def _fixed_point(head_dim: int, count: int) -> np.ndarray:
    """The ``count`` positive levels at which every level is the mean of its cell."""
    # High-resolution theory: optimal levels are spread like density^(1/3), again a shifted Beta law.
    exponent = ((head_dim - 3) / 3 + 2) / 2
    levels = np.sqrt(betaincinv(0.5, exponent, (np.arange(count) + 0.5) / count))
    for _ in range(_LLOYD_STEPS):
        levels = _cells(head_dim, levels)[1]

    scale = 1 / beta(0.5, (head_dim - 1) / 2)
    for _ in range(_NEWTON_STEPS):
        probability, mean = _cells(head_dim, levels)
        residual = levels - mean
        if np.abs(residual).max() < 1e-13:
            break
        edges = (levels[1:] + levels[:-1]) / 2
        density = scale * (1 - edges**2) ** ((head_dim - 3) / 2)
        # A mean moves with its cell's upper and lower edge, each edge half as fast as either neighbouring level.
        by_upper = density * (edges - mean[:-1]) / probability[:-1] / 2
        by_lower = density * (mean[1:] - edges) / probability[1:] / 2
        band = np.zeros((3, count))
        band[0, 1:] = -by_upper
        band[1] = 1 - np.append(by_upper, 0) - np.append(0, by_lower)
        band[2, :-1] = -by_lower
        step = solve_banded((1, 1), band, residual)
        levels = levels - step
    return levels
