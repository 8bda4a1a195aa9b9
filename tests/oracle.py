"""The definitions once more, in float64 and without the package: what tests compare against.

Every function takes and returns torch tensors; nothing streams, nothing is fast.
"""

from __future__ import annotations

import torch

# How far float32 arithmetic on up to a few hundred terms may be from float64, relative to the largest magnitude; and
# what rounding the result to its dtype adds, relative to the element: half a unit in the last place.
_ARITHMETIC = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 4e-6, torch.bfloat16: 4e-6}
_ROUNDING = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, at_least: float = 0.0) -> None:
    """Every element of ``actual`` is where float32 (or float64) arithmetic and one rounding to its dtype may put it.

    Arithmetic errors are relative to the largest magnitude in ``expected``, or to ``at_least`` if that is larger.
    """
    assert actual.shape == expected.shape
    assert expected.dtype == torch.float64
    if not actual.numel():
        return
    largest = torch.where(expected.isfinite(), expected.abs(), 0.0).amax().item()
    allowed = _ARITHMETIC[actual.dtype] * max(largest, at_least) + _ROUNDING[actual.dtype] * expected.abs()
    actual = actual.double()
    fine = (actual == expected) | ((actual - expected).abs() <= allowed)
    worst = ((actual - expected).abs() / allowed)[~fine]
    assert fine.all(), f"{worst.numel()} of {fine.numel()} elements differ, by up to {worst.max():.2f} times what is allowed"


def assert_lse_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """As :func:`assert_close`, for log-sum-exps: a relative error of the sum is an absolute one of its logarithm."""
    assert_close(actual, expected, at_least=1.0)


def decompress(codes: torch.Tensor, norms: torch.Tensor, centroids: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Vectors ``[..., D]`` in float64 from codes ``[..., D // 2]`` and norms ``[...]``."""
    levels = torch.empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=torch.float64)
    levels[..., 0::2] = centroids.double()[codes.int() // 16]
    levels[..., 1::2] = centroids.double()[codes.int() % 16]
    return torch.einsum("...,...j,ji->...i", norms.double(), levels, rotation.double())


def visible(q_len: int, kv_len: int, is_causal: bool, sliding_window: int | None = None) -> torch.Tensor:
    """Bool ``[q_len, kv_len]``: whether query i sees key j, aligned to the bottom right."""
    if not is_causal:
        return torch.ones(q_len, kv_len, dtype=torch.bool)
    query, key = torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]
    distance = kv_len - q_len + query - key
    return (distance >= 0) & (distance < (kv_len + 1 if sliding_window is None else sliding_window))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    is_causal: bool,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float64: q ``[B, H_q, N_q, D]``, k and v ``[B, H_kv, N_kv, D]`` -> out, lse ``[B, H_q, N_q]``.

    Sinks ``[H_q]`` are logits of one more key, whose value is zero.
    """
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    sees = visible(q.shape[2], k.shape[2], is_causal, sliding_window)
    scores = q @ k.mT * sm_scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees, float("-inf"))
    if sinks is not None:
        scores = torch.cat([sinks.double()[:, None, None].expand(*scores.shape[:-1], 1), scores], -1)
        sees = torch.nn.functional.pad(sees, (1, 0), value=True)
        v = torch.nn.functional.pad(v, (0, 0, 1, 0))
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else torch.full(q.shape[:-1], float("-inf"), dtype=torch.float64)
    # Not exp(scores - lse): far from zero, lse is known much less exactly than the weights are.
    weights = torch.softmax(scores, -1).masked_fill(~sees, 0.0)
    return weights @ v, lse
