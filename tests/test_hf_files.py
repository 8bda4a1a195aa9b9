"""Saving and loading a filled TurboQuantCache."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from safetensors import safe_open
from safetensors.torch import save_file

from hf_models import VOCABULARY, make_config, make_model, one_thread  # noqa: F401
from turboquant_vllm import TQ4Codec
from turboquant_vllm.files import read_tensors, write_tensors
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache


def contents(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture
def saved(tmp_path, generator):
    """A model, a text of 25 tokens, a cache of its first 15, and its file."""
    model = make_model("gemma3")
    ids = torch.randint(3, VOCABULARY, (2, 25), generator=generator)
    cache = TurboQuantCache(model.config, seed=3)
    with torch.no_grad():
        model(ids[:, :15], **{CACHE_ARGUMENT: cache})
    path = tmp_path / "prompt.safetensors"
    cache.save(path)
    return model, ids, cache, path


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("skipped", [(), (0,)])
def test_a_loaded_cache_goes_on_where_it_was(family, skipped, tmp_path, generator):
    model = make_model(family)
    ids = torch.randint(3, VOCABULARY, (2, 25), generator=generator)
    cache = TurboQuantCache(model.config, skip_layers=skipped)
    for start, stop in ((0, 12), (12, 15)):
        model(ids[:, start:stop], **{CACHE_ARGUMENT: cache})
    cache.save(tmp_path / "prompt.safetensors")
    loaded = TurboQuantCache.load(tmp_path / "prompt.safetensors", model.config)
    assert loaded.packed_layers == cache.packed_layers
    assert loaded.get_seq_length() == 15
    for start, stop in ((15, 16), (16, 25)):
        want = model(ids[:, start:stop], **{CACHE_ARGUMENT: cache}).logits
        assert torch.equal(model(ids[:, start:stop], **{CACHE_ARGUMENT: loaded}).logits, want)


def test_a_file_is_as_small_as_the_cache(saved):
    path = saved[3]
    vectors = 2 * 2 * 2 * (15 + 7)  # keys and values, sequences, heads, tokens of both layers
    tables = 4 * (32 * 32 + 16)
    assert vectors * (32 // 2 + 4) + tables <= path.stat().st_size <= vectors * (32 // 2 + 4) + tables + 2000


def test_files_state_what_they_hold(saved):
    tensors, metadata = contents(saved[3])
    assert metadata["format"] == "turboquant-hf-cache"
    header = json.loads(metadata["cache"])
    assert header["seed"] == 3
    assert header["layers"][0] == {"kind": "packed", "window": 8, "length": 15, "dtype": "float64"}
    assert tensors["0.codes"].shape == (2, 2, 2, 7, 16)
    assert torch.equal(tensors["rotation.32"], TQ4Codec(32, seed=3).rotation)


def test_an_empty_cache_can_be_saved(tmp_path):
    config = make_config("gemma3")
    TurboQuantCache(config).save(tmp_path / "empty")
    assert TurboQuantCache.load(tmp_path / "empty", config).get_seq_length() == 0


def test_other_options_are_the_callers(saved):
    model, ids, _, path = saved
    cache = TurboQuantCache.load(path, model.config, exact_prefill=False)
    cache.reset()
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache})
    assert all(not layer.exact_prefill for layer in cache.layers)
    assert cache.seed == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h["layers"].pop(), "expected 2 layers, got 1"),
        (lambda t, h: h["layers"][0].update(window=9), "layer 0: expected window 8, got 9"),
        (lambda t, h: h["layers"][1].update(kind="other"), "layer 1: expected kind packed, got other"),
        (lambda t, h: h.update(seed=4), "expected the rotation of seed 4"),
        (lambda t, h: t["centroids.32"].neg_(), "expected the centroids of seed 3"),
        (lambda t, h: t.update({"1.norms": t["1.norms"].half()}), "layer 1: expected uint8 codes and float32 norms"),
        (lambda t, h: t.update({"1.norms": t["1.norms"][..., :-1].clone()}), "layer 1: expected uint8 codes"),
        (lambda t, h: h.pop("layers"), "expected a seed and layers"),
    ],
)
def test_files_that_do_not_fit_are_refused(saved, change, message):
    model, _, _, path = saved
    tensors, metadata = contents(path)
    header = json.loads(metadata["cache"])
    change(tensors, header)
    write_tensors(path, tensors, {**metadata, "cache": json.dumps(header)})
    with pytest.raises(ValueError, match=message):
        TurboQuantCache.load(path, model.config)


def test_a_changed_byte_is_noticed(saved):
    model, _, _, path = saved
    tensors, metadata = contents(path)
    tensors["0.codes"][0, 0, 0, 0, 0] ^= 1
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="expected checksum"):
        TurboQuantCache.load(path, model.config)


def test_other_files_are_refused(tmp_path):
    config = make_config("gemma3")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TurboQuantCache.load(tmp_path / "nowhere", config)
    codec = TQ4Codec(32)
    codec.save(tmp_path / "keys", codec.compress(torch.randn(3, 32)))
    with pytest.raises(ValueError, match="expected format 'turboquant-hf-cache', got 'turboquant-tq4'"):
        TurboQuantCache.load(tmp_path / "keys", config)
    write_tensors(tmp_path / "new", {"x": torch.zeros(1)}, {"format": "turboquant-hf-cache", "version": "2"})
    with pytest.raises(ValueError, match="expected format version 1, got 2"):
        read_tensors(tmp_path / "new", "turboquant-hf-cache", "1")


def test_a_cache_of_another_model_is_refused(saved):
    with pytest.raises(ValueError, match="layer 0: expected window None, got 8"):
        TurboQuantCache.load(saved[3], make_config("llama"))
