"""How much memory the layers of a growing cache take, and how often they move to more."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from turboquant_vllm.hf.layers import PackedLayer, PackedSlidingLayer
from turboquant_vllm.hf.storage import PackedStorage, codec_for
from turboquant_vllm.records import GROUP

HEADS, DIM, WINDOW = 2, 32, 6


def full():
    return PackedLayer(0, seed=0)


def sliding():
    return PackedSlidingLayer(0, WINDOW, seed=0)


@pytest.fixture
def states(randn):
    """``states(batch, count)``: keys and values of new tokens."""
    return lambda batch, count: (randn(batch, HEADS, count, DIM), randn(batch, HEADS, count, DIM))


def test_a_long_first_call_keeps_only_its_window(states):
    layer = sliding()
    layer.update(*states(1, 5000))
    assert len(layer.storage) == WINDOW - 1
    assert layer.nbytes < 300 * 2 * HEADS * (DIM // 2 + 4)


@pytest.mark.parametrize("make", [full, sliding])
def test_storage_costs_what_the_format_says_and_is_seldom_copied(make, states):
    layer = make()
    layer.update(*states(1, 1000))
    buffers = set()
    for _ in range(1000):
        layer.update(*states(1, 1))
        buffers.add(layer.storage.buffer.data_ptr())
    tokens, room = (2000, 256) if make is full else (WINDOW, WINDOW)
    assert tokens * 2 * HEADS * (DIM // 2 + 4) <= layer.nbytes <= (tokens + room) * 2 * HEADS * (DIM // 2 + 4)
    assert len(buffers) <= 1000 // room + 2


@pytest.mark.parametrize("count", [20, 50, 100, 300, 1000, 5000])
def test_a_first_call_takes_what_it_needs(count):
    layer = full()
    x = torch.zeros(4, HEADS, count, DIM)
    layer.update(x, x)
    needed = 4 * count * 2 * HEADS * (DIM // 2 + 4)
    assert needed <= layer.nbytes <= needed * 17 // 16


@pytest.mark.parametrize("count", [20, 50, 100, 300, 1000, 5000])
def test_with_offsets_a_first_call_takes_what_it_needs_too(count):
    layer = PackedLayer(0, seed=0, key_offsets=True)
    x = torch.zeros(4, HEADS, count, DIM)
    layer.update(x, x)
    needed = 4 * HEADS * (count * (DIM + 8) + -(-count // GROUP) * (2 * DIM + 16))
    assert needed <= layer.nbytes <= needed * 17 // 16


@pytest.mark.parametrize("head_dim", [16, 18, 64, 128, 512])
@pytest.mark.parametrize("prompt", [1, 16, 250])
@pytest.mark.parametrize(
    ("window", "has_offsets"), [(None, False), (21, False), (4096, False), (None, True), (256, True), (4096, True)]
)
def test_a_short_text_never_takes_more_than_in_bf16(head_dim, prompt, window, has_offsets):
    options = {"seed": 0, "key_offsets": has_offsets}
    layer = PackedLayer(0, **options) if window is None else PackedSlidingLayer(0, window, **options)
    x, device = torch.zeros(2, HEADS, prompt, head_dim, dtype=torch.bfloat16), torch.device("meta")
    buffers = set()
    for states in (x, *(x[:, :, :1],) * 600):
        layer.update(states.to(device), states.to(device))
        seen = layer.get_seq_length()
        tokens = seen if window is None else min(seen, window - 1)
        buffers.add(layer.storage.capacity)
        if tokens >= 16:
            assert layer.nbytes <= 2 * tokens * x[:, :, :1].nbytes
    assert len(buffers) <= 10  # doubled until there are 256 tokens to spare


def test_storage_at_131072_tokens_is_within_its_share_of_bf16():
    storage = PackedStorage(codec_for(128, 0, torch.device("meta")), 1, 8)
    x = torch.empty(1, 8, 131072, 128, dtype=torch.bfloat16, device="meta")
    storage.append(x, x)
    assert storage.nbytes <= 0.28 * 2 * x.nbytes
    for _ in range(5000):
        storage.append(x[:, :, :1], x[:, :, :1])
    assert storage.nbytes <= 0.28 * 2 * x.nbytes * 136072 / 131072


def test_storage_may_be_written_to_outside_of_inference_mode(states):
    layer = full()
    with torch.inference_mode():
        layer.update(*states(2, 3))
    layer.update(*states(2, 1))
    with torch.inference_mode():
        layer.reorder_cache(torch.tensor([1, 0]))
    layer.update(*states(2, 1))
    assert layer.get_seq_length() == 5
