"""Sliding windows, soft caps and sinks: their definition, what tq4_attention refuses, and which backends have them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
from mask_contract import MaskContract
from turboquant_vllm import TQ4Codec, reference, tq4_attention


class TestReference(MaskContract):
    @pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
    def dtype(self, request):
        return request.param

    @pytest.fixture
    def device(self):
        return "cpu"

    @pytest.fixture
    def run(self):
        # Blocks shorter than the cases: a block may be wholly before a window, or begin inside it.
        return lambda *args: reference.attention(*args, block=48)


@given(
    group=st.sampled_from([1, 3]),
    q_len=st.integers(0, 9),
    kv_len=st.integers(0, 40),
    window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.floats(0.1, 100),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_definition(group, q_len, kv_len, window, softcap, has_sinks, seed):
    codec, generator = TQ4Codec(16), torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2 * group, q_len, 16, generator=generator)
    k, v = (codec.compress(torch.randn(2, 2, kv_len, 16, generator=generator)) for _ in range(2))
    sinks = torch.randn(2 * group, generator=generator) if has_sinks else None
    masks = {"sliding_window": window, "softcap": softcap, "sinks": sinks}
    out, lse = tq4_attention(q, k, v, codec, is_causal=True, return_lse=True, backend="reference", **masks)
    keys, values = (oracle.decompress(*t, codec.centroids, codec.rotation) for t in (k, v))
    want, want_lse = oracle.attention(q, keys, values, 0.25, True, **masks)
    oracle.assert_close(out, want)
    oracle.assert_lse_close(lse, want_lse)


def test_window_counts_the_query_itself():
    # One-hot values show which keys a query sees.
    codec, n = TQ4Codec(16), 6
    k, q = codec.compress(torch.zeros(1, 1, n, 16)), torch.zeros(1, 1, 2, 16)
    v = torch.eye(n, 16)[None, None]
    out = tq4_attention(q, k, v, codec, is_causal=True, sliding_window=3)
    assert torch.equal(out[0, 0, :, :n] > 0, torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]], dtype=torch.bool))


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1, got 0"),
        ({"sliding_window": 2.0}, TypeError, "sliding_window must be an int, got float"),
        ({"sliding_window": 4, "is_causal": False}, ValueError, "sliding_window must come with is_causal=True, got False"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite in float32, .*, got 0.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be positive and finite in float32, .*, got inf"),
        ({"softcap": float("nan")}, ValueError, "softcap must be positive and finite in float32, .*, got nan"),
        ({"softcap": "30"}, TypeError, "softcap must be a float or None, got str"),
        ({"sinks": [0.0] * 4}, TypeError, "sinks must be a torch.Tensor, got list"),
        ({"sinks": torch.zeros(4, dtype=torch.bfloat16)}, TypeError, "sinks must be torch.float32, got torch.bfloat16"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \[4\], got \[2\]"),
        ({"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks must be on cpu like q, got meta"),
    ],
)
def test_wrong_masks(masks, error, message):
    codec = TQ4Codec(64)
    k = codec.compress(torch.zeros(1, 2, 9, 64))
    with pytest.raises(error, match=message):
        tq4_attention(torch.zeros(1, 4, 3, 64), k, k, codec, **{"is_causal": True, **masks})


def test_compiles_into_one_graph():
    codec = TQ4Codec(64)
    q, k = torch.randn(1, 4, 3, 64), codec.compress(torch.randn(1, 2, 9, 64))

    def step(q, sinks):
        return tq4_attention(q, k, k, codec, is_causal=True, sliding_window=4, softcap=30.0, sinks=sinks)

    sinks = torch.randn(4)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, sinks), step(q, sinks))
