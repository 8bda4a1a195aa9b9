"""Vectors and codes, in plain PyTorch: how the codec compresses and reads back; the definition that kernels are tested against.

Arithmetic is float32, or float64 where the first argument is float64; what is coded is rotated in float64.
"""

from __future__ import annotations

import torch

from turboquant_vllm.autocast import without_autocast

__all__ = ["compress", "compress_rotated", "compute_dtype", "decompress", "rotated", "scaled", "unpack_codes"]

# Vectors outside this range are scaled by a power of two before their squares are summed, so that none over- or underflows.
_LARGE, _SMALL, _SHIFT = 1e15, 1e-15, 2.0**100


@without_autocast
def compress(
    x: torch.Tensor,
    rotation: torch.Tensor,
    boundaries: torch.Tensor,
    centroids: torch.Tensor | None = None,
    scale: str = "norm",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise vectors: rotate ``x / |x|``, keep each coordinate's cell and one scale.

    Args:
        x: ``[..., D]``, any floating dtype.
        rotation: float32 ``[D, D]``, orthogonal.
        boundaries: float32 ``[15]``, ascending; code = number of boundaries below the coordinate.
        centroids: float32 ``[16]``, the levels that will be read back, each in its own cell; needed by every scale but
            "norm".
        scale: what is kept in ``norms``, with y = x @ rotation.T and c the levels of its codes: "norm" keeps |x|,
            "least_squares" <y, c> / <c, c>, which is nearest to x, and "unbiased" |x|^2 / <y, c>, whose inner product
            with x is |x|^2.

    Returns:
        codes uint8 ``[..., D // 2]`` and norms float32 ``[...]``. The zero vector has norm 0. A vector with a NaN or Inf,
        or too long for float32, has norm NaN: attention cannot overlook that, as it could a score of -Inf.
    """
    x, shift = scaled(x.to(compute_dtype(x)))
    length = x.square().sum(-1, keepdim=True).sqrt()
    return _quantise(rotated(x, rotation), length, shift, boundaries, centroids, scale)


def compress_rotated(
    y: torch.Tensor, boundaries: torch.Tensor, centroids: torch.Tensor | None, scale: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`compress`, of float32 or float64 vectors that are rotated already."""
    y, shift = scaled(y)
    return _quantise(y, y.square().sum(-1, keepdim=True).sqrt(), shift, boundaries, centroids, scale)


def _quantise(
    y: torch.Tensor,
    length: torch.Tensor,
    shift: torch.Tensor,
    boundaries: torch.Tensor,
    centroids: torch.Tensor | None,
    scale: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and norms of rotated vectors ``y`` of such ``length``, both times ``shift``."""
    y = y / torch.where(length > 0, length, 1.0)
    # The cell of a NaN is arbitrary, but it is the same in every implementation.
    code = torch.bucketize(y.nan_to_num(nan=-1.0), boundaries.to(y.dtype)).to(torch.uint8)
    codes = code[..., 0::2] << 4 | code[..., 1::2]
    if scale != "norm":
        assert centroids is not None
        levels = centroids.to(y.dtype)[code.long()]
        product = (y * levels).sum(-1, keepdim=True)  # positive, but for the zero vector
        if scale == "least_squares":
            length = length * product / levels.square().sum(-1, keepdim=True)
        else:
            length = length / torch.where(length == 0, 1.0, product)
    norms = (length / shift).squeeze(-1).float()
    return codes, torch.where(norms.isfinite(), norms, float("nan"))


@without_autocast
def decompress(
    codes: torch.Tensor, norms: torch.Tensor, centroids: torch.Tensor, rotation: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Reconstruct vectors ``norms * (centroids[codes] @ rotation)`` in ``dtype``, ``[..., D]``.

    Args:
        codes: uint8 ``[..., D // 2]``.
        norms: float32 ``[...]``.
        centroids: float32 ``[16]``, in any order.
        rotation: float32 ``[D, D]``.
        dtype: any floating dtype; float64 computes in float64.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    levels = centroids.to(compute)[unpack_codes(codes)]
    return (levels @ rotation.to(compute) * norms.to(compute).unsqueeze(-1)).to(dtype)


def unpack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Indices of the levels, int64 ``[..., D]``, from packed codes ``[..., D // 2]``."""
    return torch.stack([codes >> 4, codes & 15], -1).flatten(-2).long()


def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors ``[..., D]`` times a power of two, ``[..., 1]``, that keeps their squares in float32's range, and that power."""
    largest = x.abs().amax(-1, keepdim=True)
    shift = torch.ones_like(largest)
    shift = torch.where(largest > _LARGE, 1 / _SHIFT, torch.where(largest < _SMALL, _SHIFT, shift))
    return x * shift, shift


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """``x @ rotation.T`` of vectors ``[..., D]``, in x's dtype.

    Sums are float64 where there is such a thing: in float32 the order of additions, which depends on how many vectors there
    are, would decide on which side of a boundary some coordinates fall, and so what else is in a call on a vector's codes;
    and a query's rounding would move all scores of its row.
    """
    wide = torch.float64 if x.device.type in ("cpu", "cuda") else x.dtype
    return (x.to(wide) @ rotation.to(wide).T).to(x.dtype)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What arithmetic on ``x`` is done in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
