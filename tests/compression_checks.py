"""Checks of a backend's compress and decompress against the reference, for every backend's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attention_cases import lay_out
from turboquant_vllm import TQ4Codec, reference

# Float32 sums of head_dim products differ in their last bits, relative to the vector's length: a coordinate this close to
# a boundary may fall on either side.
_BOUNDARY = 1e-6
_NORM = 1e-6


def _norm_bound(x: torch.Tensor) -> float:
    """Relative error of a length. On a GPU matrix units sum the squares of half precision, D / 2 in each of two sums, and cut
    each to the sum's last place: on average half a unit of a sum that is half grown, D / 8 * 2^-23; half of that in the root,
    which with its inverse is off by two units more.
    """
    return max(_NORM, x.shape[-1] / 16 * 2.0**-23 + 2.0**-22) if x.is_cuda and x.dtype.itemsize == 2 else _NORM


# Relative to the largest magnitude of a vector. Half precision: levels, then the result, are rounded once each, and bfloat16
# results are computed from float16 levels. float32: a sum of head_dim products.
_VALUE = {torch.float32: 4e-6, torch.float16: 2 * 2.0**-10, torch.bfloat16: 2 * 2.0**-8}


def special_vectors(head_dim: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Vectors of zeros, of very small and very large numbers, alone in a coordinate, and with NaN or Inf, ``[9, D]``."""
    info = torch.finfo(dtype)
    normal = torch.randn(9, head_dim, generator=generator, dtype=torch.float64)
    factors = [0.0, min(1e30, float(info.max) / 8), 1e-30, info.smallest_normal * info.eps, 1.0, 1.0, 1.0, 1.0, 1.0]
    x = (normal * torch.tensor(factors, dtype=torch.float64)[:, None]).to(dtype)
    x[4] = 0
    x[4, head_dim // 2] = -3.0
    x[5, 3] = float("nan")
    x[6, 1] = float("inf")
    x[7, 2] = float("-inf")
    return x


def check_compress(
    run: Callable[..., Any], x: torch.Tensor, codec: TQ4Codec, error: torch.Tensor | float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compress ``x [..., D]``: norms as defined, codes as the reference's, but for coordinates on a boundary; returns both.

    ``error [...]``: the length of what rounding may have changed in a vector already.
    """
    rotation, _, companding, hadamard, *scaling = codec.writing
    codes, norms = run(x, rotation, companding, hadamard, *scaling)
    # Given the codes, which may be either of two for coordinates on a boundary.
    levels = codec.centroids.double()[reference.unpack_codes(codes)]
    length = x.double().norm(dim=-1)
    dot = (x.double() @ rotation.double().T * levels).sum(-1)
    want_norms = {
        "norm": length,
        "least_squares": dot / levels.square().sum(-1),
        "unbiased": length * (length / torch.where(length == 0, 1.0, dot)),
    }[codec.scale]
    assert codes.shape == (*x.shape[:-1], codec.head_dim // 2)
    assert codes.dtype == torch.uint8
    assert norms.shape == x.shape[:-1]
    assert norms.dtype == torch.float32
    finite = x.isfinite().all(-1)
    assert norms[~finite].isnan().all()
    assert (codes[~finite] == 0).all()
    # Below the normal range of float32 a rotated coordinate is a sum of products rounded to multiples of 2^-149.
    grid = codec.head_dim * 2.0**-150
    # The unbiased scale, a square over a product, feels an error three times.
    allowed = _norm_bound(x) * want_norms.abs() + grid + 3 * error
    wrong_norms = ~((norms.double() - want_norms).abs() <= allowed) & finite
    assert not wrong_norms.any(), f"{norms[wrong_norms].tolist()} instead of {want_norms[wrong_norms].tolist()}"
    length = torch.where(length > 0, length, 1.0).unsqueeze(-1)
    y = x.double() @ codec.rotation.double().T / length
    got = reference.unpack_codes(codes)
    slack = _BOUNDARY + (grid + torch.as_tensor(error, dtype=torch.float64, device=x.device).unsqueeze(-1)) / length
    lower, upper = (torch.bucketize(shifted, codec.boundaries.double()) for shifted in (y - slack, y + slack))
    wrong = ((got < lower) | (got > upper)) & finite.unsqueeze(-1)
    assert not wrong.any(), f"{int(wrong.sum())} codes of {wrong.numel()} differ, first at {wrong.nonzero()[0].tolist()}"
    return codes, norms


def check_decompress(
    run: Callable[..., Any], codec: TQ4Codec, dtype: torch.dtype, generator: torch.Generator, tokens: int, layout: str
) -> None:
    """Decompress random codes ``[2, 3, tokens, D // 2]``, four norms being NaN, Inf, -Inf and 0, to ``dtype``."""
    codes = torch.randint(256, (2, 3, tokens, codec.head_dim // 2), generator=generator, dtype=torch.uint8)
    norms = 10 * torch.rand(2, 3, tokens, generator=generator)
    norms[0, 0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
    codes, norms = (lay_out(x.to(codec.device), layout) for x in (codes, norms))
    out = run(codes, norms, codec.centroids, codec.rotation, codec.rotation_kind == "hadamard", dtype)
    want = reference.decompress(codes, norms, codec.centroids, codec.rotation, torch.float64)
    assert out.shape == want.shape
    assert out.dtype == dtype
    assert not out[~norms.isfinite()].isfinite().any()
    assert out[norms.isnan()].isnan().all()
    out, want = out[norms.isfinite()], want[norms.isfinite()]
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    limit = _VALUE[dtype] * want.abs().amax(-1, keepdim=True) + smallest
    error = (out.double() - want).abs()
    assert (error <= limit).all(), f"error {(error - limit).max().item():.3e} above the limit"
