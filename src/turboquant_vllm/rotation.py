"""Seeded orthogonal matrices: the randomized Hadamard transform, and Haar-distributed rotations.

A rotation makes the coordinates of any fixed vector look like those of a random one, which is what the levels of
:mod:`turboquant_vllm.codebook` are made for. Rotating costs nothing in accuracy: inner products do not change.

The randomized Hadamard matrix is H diag(s) / sqrt(D) with H the Sylvester-Hadamard matrix and s seeded signs. All its
entries are +-1/sqrt(D), so it is the same to the last bit on every machine, and a product with its signs is exact in
half precision. It exists for powers of two; other dimensions use the Q factor of a seeded Gaussian matrix.

Matrices are NumPy's: what is kept for later callers depends neither on PyTorch's default device nor on its fake tensors.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np

from turboquant_vllm.checks import check_head_dim

__all__ = ["RotationKind", "haar", "randomized_hadamard", "rotation_kind"]

RotationKind = Literal["hadamard", "haar"]


def rotation_kind(head_dim: int, rotation: str = "auto") -> RotationKind:
    """The kind that ``rotation`` ("auto", "hadamard" or "haar") means for ``head_dim``.

    Raises:
        ValueError: an unknown name, or "hadamard" where ``head_dim`` is not a power of two.
    """
    power_of_two = head_dim & (head_dim - 1) == 0
    if rotation == "auto":
        return "hadamard" if power_of_two else "haar"
    if rotation == "hadamard":
        if not power_of_two:
            raise ValueError(f"rotation='hadamard' needs a head_dim that is a power of two, got head_dim={head_dim}")
        return "hadamard"
    if rotation == "haar":
        return "haar"
    raise ValueError(f"rotation must be 'auto', 'hadamard' or 'haar', got {rotation!r}")


@lru_cache(maxsize=64, typed=True)
def randomized_hadamard(head_dim: int, seed: int = 0) -> np.ndarray:
    """Randomized Hadamard matrix, float32 ``[head_dim, head_dim]``; read-only.

    Args:
        head_dim: a power of two, at least 2.
        seed: non-negative; the same seed gives the same bits on every machine.
    """
    check_head_dim(head_dim)
    rotation_kind(head_dim, "hadamard")
    index = np.arange(head_dim)
    # Sylvester's construction in one line: H[i, j] = (-1)^(number of ones in i & j).
    overlap = index[:, None] & index[None, :]
    parity = np.zeros_like(overlap)
    for bit in range(head_dim.bit_length()):
        parity ^= (overlap >> bit) & 1
    entry = np.float32(1 / math.sqrt(head_dim))
    return _read_only(np.where(parity, -entry, entry) * _signs(head_dim, seed))


@lru_cache(maxsize=64, typed=True)
def haar(head_dim: int, seed: int = 0) -> np.ndarray:
    """Haar-distributed rotation, float32 ``[head_dim, head_dim]``; read-only.

    The QR factorisation of a seeded Gaussian matrix in float64, its columns' signs fixed by R's diagonal. The last bits
    may differ between linear-algebra libraries.
    """
    check_head_dim(head_dim)
    gaussian = np.random.Generator(np.random.PCG64(seed)).standard_normal((head_dim, head_dim))
    q, r = np.linalg.qr(gaussian)
    q *= np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return _read_only(q.astype(np.float32, order="C"))


def _read_only(matrix: np.ndarray) -> np.ndarray:
    matrix.setflags(write=False)
    return matrix


def _signs(count: int, seed: int) -> np.ndarray:
    """Seeded signs, float32 ``[count]``, from the raw stream of PCG64, which NumPy promises never to change."""
    raw = np.random.PCG64(seed).random_raw(count)
    return np.where(raw >> np.uint64(63), np.float32(-1), np.float32(1)).astype(np.float32)
