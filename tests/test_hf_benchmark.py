"""The benchmark of the caches, with a tiny model on a CPU: every row has times, and no wrong cache passes its comparison."""

from __future__ import annotations

import gc
import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DynamicCache

import hf
from hf_logits import LARGEST_RATIO
from turboquant_vllm.hf import TurboQuantCache

TOKENS, BATCH = 300, 2


@pytest.fixture
def few_objects():
    """The benchmark collects garbage before each measurement: there, only among what has been made since."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return hf.make_model(3, "cpu")


def error_with(model, attention, cache, change=None):
    """What the benchmark makes of a filled cache, after a change to all of its layers."""
    model.set_attn_implementation(attention)
    hf.fill(cache, model, BATCH, TOKENS)
    for layer in cache.layers if change is not None else ():
        change(layer)
    options = {"return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        found = hf.generate(model, cache, BATCH, cache.get_seq_length() + 1, hf.WARMUP, **options)
        logits, ids = torch.stack(found.logits, 1).float(), found.sequences[:, -hf.WARMUP - 1 : -1]
    return hf.error_of(model, logits, ids, TOKENS, isinstance(cache, TurboQuantCache))


@pytest.fixture(scope="module")
def largest(model):
    """The largest error that passes."""
    return LARGEST_RATIO * error_with(model, "sdpa", DynamicCache(config=model.config))


def swap_sequences(layer):
    layer.storage.buffer.copy_(layer.storage.buffer.flip(0))


def swap_heads(layer):
    for x in layer.storage.keys:
        x.copy_(x.flip(1))


def lose_the_first_token(layer):
    layer.storage.start += 1


def swap_offsets(layer):
    for x in layer.storage.keys[2:]:
        x.copy_(x.flip(1))


def lose_the_last_token(layer):
    layer.storage.stop -= 1


def shift_codes(layer):
    codes = layer.storage.values.data
    codes[:, :, 1:] = codes[:, :, :-1].clone()


def scale_the_values_of_a_head(layer):
    layer.storage.values.norms[:, 0].mul_(1.1)


def test_a_right_cache_passes(model, largest):
    assert 0 < largest < 0.1
    assert error_with(model, "tq4", TurboQuantCache(model.config)) < largest


@pytest.mark.parametrize(
    "change",
    [
        swap_sequences,
        swap_heads,
        swap_offsets,
        lose_the_first_token,
        lose_the_last_token,
        shift_codes,
        scale_the_values_of_a_head,
    ],
)
def test_a_wrong_cache_does_not(change, model, largest):
    assert error_with(model, "tq4", TurboQuantCache(model.config), change) > largest


def test_every_row_has_times(tmp_path, few_objects):
    sizes = ["--layers", "2", "--compiled-layers", "1", "--memory-tokens", "100", "--steps", "2", "--cases", "2x160,1x96"]
    hf.main(["--device", "cpu", *sizes, "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "hf-cpu.json").read_text())["rows"]
    assert [row["id"] for row in rows if "ratio" in row] == [
        f"{pair}-{case}" for pair in ("static-turboquant-static", "dynamic-turboquant") for case in ("2x160", "1x96")
    ]
    for row in rows:
        if "ratio" in row:
            assert row["ratio"] > 0
            assert row["wrong"] is False
