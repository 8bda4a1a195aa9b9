"""Rotations: orthogonal, the same for a seed on every machine, and distributed as they claim."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard

from turboquant_vllm.rotation import haar, randomized_hadamard, rotation_kind

Make = Callable[..., np.ndarray]

# SHA-256 of the sign bits, row by row: a cache written on one machine must be readable on every other, for ever.
SIGN_BITS = {
    (64, 0): "8ff5fa73fc0f1be92e4a0719119f0dbbcf362590f5fcfaeb6e28218157fdc188",
    (128, 0): "9e247597471e1b12bcadee93ca4d7c098cff9e045faf32fe573ca6755dd7746c",
    (128, 1): "007166d5a8af29cc794b209b7c7e4354800d0e25105ac9a2529ddec3a4d2ee9a",
    (256, 12345): "97226022d69c8d2b3c9bdffa30c89515d959bd841304917db8fa5ed7e70dff2c",
}


@pytest.mark.parametrize("seed", [0, 7, 2**70])
@pytest.mark.parametrize(
    ("make", "head_dim"),
    [(randomized_hadamard, d) for d in (2, 16, 64, 128, 256)] + [(haar, d) for d in (2, 16, 18, 64, 80, 96, 128, 192, 256)],
)
def test_orthogonal(make: Make, head_dim: int, seed: int) -> None:
    matrix = make(head_dim, seed)
    assert matrix.dtype == np.float32
    assert matrix.shape == (head_dim, head_dim)
    assert matrix.flags.c_contiguous
    assert not matrix.flags.writeable  # all callers share it
    wide = matrix.astype(np.float64)
    for product in (wide @ wide.T, wide.T @ wide):
        assert np.abs(product - np.eye(head_dim)).max() < 1e-6


@pytest.mark.parametrize("head_dim", [2, 16, 64, 128, 256])
def test_hadamard_entries_are_signs_over_the_root(head_dim: int) -> None:
    entry = np.float32(1 / math.sqrt(head_dim))
    assert np.array_equal(np.abs(randomized_hadamard(head_dim, 3)), np.full((head_dim, head_dim), entry))


@pytest.mark.parametrize("head_dim", [2, 16, 128])
def test_hadamard_is_sylvesters_matrix_times_signs(head_dim: int) -> None:
    signs = np.sign(randomized_hadamard(head_dim, 5))
    assert np.array_equal(signs, hadamard(head_dim) * signs[0])  # the first row of Sylvester's matrix is ones


@pytest.mark.parametrize(("head_dim", "seed"), SIGN_BITS)
def test_hadamard_signs_never_change(head_dim: int, seed: int) -> None:
    bits = np.packbits(randomized_hadamard(head_dim, seed) > 0)
    assert hashlib.sha256(bits.tobytes()).hexdigest() == SIGN_BITS[head_dim, seed]


@pytest.mark.parametrize("make", [randomized_hadamard, haar])
def test_seeds(make: Make) -> None:
    matrix = make(64, 11)
    assert np.array_equal(make.__wrapped__(64, 11), matrix)  # type: ignore[attr-defined]
    others = [make(64, seed) for seed in (0, 1, 12)]
    assert not any(np.array_equal(matrix, other) for other in others)
    assert make(64) is make(64)
    assert np.array_equal(make(64), make(64, 0))


def test_haar_is_pinned_to_its_seed() -> None:
    # A linear-algebra library may differ in the last bits of a float32, not beyond.
    gaussian = np.random.Generator(np.random.PCG64(9)).standard_normal((18, 18))
    # Gram-Schmidt gives the one factorisation whose R has a positive diagonal.
    columns: list[np.ndarray] = []
    for column in gaussian.T:
        for _ in range(2):
            column = column - sum((np.dot(column, other) * other for other in columns), np.zeros(18))
        columns.append(column / np.linalg.norm(column))
    assert np.abs(haar(18, 9) - np.stack(columns, 1)).max() < 1e-6


def test_haar_distribution() -> None:
    # The trace of a Haar matrix has mean 0 and variance 1. A QR factorisation whose signs are left as they come is biased.
    count, head_dim = 800, 16
    matrices = torch.stack([torch.tensor(haar.__wrapped__(head_dim, seed)) for seed in range(1000, 1000 + count)]).double()
    trace = matrices.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.mean()) < 4 / math.sqrt(count)
    assert abs(trace.var() - 1) < 4 * math.sqrt(2 / count)
    # Each entry has mean 0 and variance 1 / head_dim, and both determinants are equally likely.
    assert (matrices.mean(0).abs() < 5 / math.sqrt(count * head_dim)).all()
    assert (matrices.square().mean(0) * head_dim - 1).abs().max() < 6 * math.sqrt(2 / count)
    assert 0.4 < (torch.linalg.det(matrices) > 0).double().mean() < 0.6


@pytest.mark.parametrize(
    ("head_dim", "name", "kind"),
    [
        (128, "auto", "hadamard"),
        (128, "hadamard", "hadamard"),
        (128, "haar", "haar"),
        (80, "auto", "haar"),
        (80, "haar", "haar"),
        (2, "auto", "hadamard"),
    ],
)
def test_kinds(head_dim: int, name: str, kind: str) -> None:
    assert rotation_kind(head_dim, name) == kind


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rotation_kind(80, "hadamard"), ValueError, "power of two, got head_dim=80"),
        (lambda: rotation_kind(128, "random"), ValueError, "rotation must be 'auto', 'hadamard' or 'haar', got 'random'"),
        (lambda: randomized_hadamard(80), ValueError, "power of two, got head_dim=80"),
        (lambda: randomized_hadamard(0), ValueError, "head_dim must be even and at least 2, got 0"),
        (lambda: haar(81), ValueError, "head_dim must be even and at least 2, got 81"),
        (lambda: haar(64.0), TypeError, "head_dim must be an int, got float"),  # type: ignore[arg-type]
        (lambda: randomized_hadamard(64.0), TypeError, "head_dim must be an int, got float"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    haar(64), randomized_hadamard(64)  # in the cache under an equal key
    with pytest.raises(error, match=message):
        call()
