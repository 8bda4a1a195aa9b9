"""Attention over keys with a large bias on few channels, as some models' projections have: through the codec and its reader."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from turboquant_vllm import TQ4Codec, TQ4Tensor, tq4_attention
from turboquant_vllm.calibration import KeyStatistics

Randn = Callable[..., torch.Tensor]
LENGTH, QUERIES, DIM, NORM = 2048, 128, 128, 600  # of fewer queries the error is one of 1.8 to 3.1 times another's
SLOW, FAST = (30, 60, 94, 124), (10, 74)  # channels and the partners that RoPE turns them into


def rope(x: torch.Tensor, first: int = 0) -> torch.Tensor:
    """``[..., N, D]`` turned by positions from ``first`` on, with theta 1e6."""
    angles = torch.arange(first, first + x.shape[-2])[:, None] * 1e6 ** (-torch.arange(0, DIM, 2) / DIM)
    cos, sin = (t.repeat(1, 2) for t in (angles.cos(), angles.sin()))
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def error(randn: Randn, channels: tuple[int, ...], kind: str) -> float:
    """Relative error of attention's output; "plain": without offsets, "offsets", or "scales": with offsets and scales."""
    bias = torch.zeros(DIM)
    if channels:
        bias[list(channels)] = NORM / math.sqrt(len(channels))
    heads = 4
    k, v, q = rope(2 * randn(1, heads, LENGTH, DIM) + bias), randn(1, heads, LENGTH, DIM), randn(1, heads, QUERIES, DIM)
    q = rope(q, LENGTH - QUERIES)
    codec = TQ4Codec(DIM)
    if kind == "scales":
        statistics = KeyStatistics()
        statistics.add(0, q, k)
        codec = codec.with_key_scales(statistics.scales()[0])
    keys = codec.compress(k) if kind == "plain" else codec.compress_keys(k)
    values = codec.compress(v)
    # Of keys alone: what values lose does not depend on the bias.
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, codec.decompress(values))
    assert isinstance(values, TQ4Tensor)
    return float((tq4_attention(q, keys, values, codec, is_causal=False) - exact).norm() / exact.norm())


@pytest.fixture
def without(randn: Randn) -> float:
    """The error over keys without a bias."""
    return error(randn, (), "offsets")


def test_where_rope_turns_it_slowly(randn, without):
    assert error(randn, SLOW, "offsets") <= 1.5 * without
    assert error(randn, SLOW, "plain") > 5 * without


def test_where_rope_turns_it_fast(randn, without):
    assert error(randn, FAST, "scales") <= 3 * without
    assert error(randn, FAST, "plain") > 5 * without
