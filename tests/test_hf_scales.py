"""Which channel scales the keys of a cache get: those given, those of a file beside the model, or what its weights say."""

from __future__ import annotations

import logging
import os

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from hf_models import VOCABULARY, generated, make_config, make_model, one_thread  # noqa: F401
from turboquant_vllm.calibration import FILE_NAME, save_key_scales
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, TurboQuantStaticCache, scales
from turboquant_vllm.hf.calibration import key_scales_from_model

HEADS, DIM = 2, 32
# Of a configuration or a model, and an empty file.
CACHES = {
    "growing": lambda x, file, **options: TurboQuantCache(x, **options),
    "static": lambda x, file, **options: TurboQuantStaticCache(x, 64, **options),
    "growing of a file": lambda x, file, **options: TurboQuantCache.load(file, x, **options),
    "static of a file": lambda x, file, **options: TurboQuantStaticCache.load(file, x, max_cache_len=64, **options),
}


def scales_of(cache):
    return {index: layer.key_scales for index, layer in enumerate(cache.layers)}


def assert_scales(cache, expected):
    got = scales_of(cache)
    assert got.keys() == expected.keys()
    for layer, w in expected.items():
        assert torch.equal(got[layer], w), layer


@pytest.fixture(params=CACHES)
def make(request, tmp_path):
    """``make(config_or_model)``: a cache."""
    TurboQuantCache(make_config("llama"), key_scales={}).save(tmp_path / "empty")
    return lambda x, **options: CACHES[request.param](x, tmp_path / "empty", **options)


@pytest.fixture
def folder(tmp_path):
    """A model's folder."""
    make_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def of_folder(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="tq4")


@pytest.fixture
def some(generator):
    """Scales of two layers."""
    return {layer: torch.rand(HEADS, DIM, generator=generator) + 0.5 for layer in range(2)}


def test_a_model_gives_the_scales_of_its_weights(make):
    model = make_model("llama")
    expected = key_scales_from_model(model)
    assert all((w != 1).any() for w in expected.values())
    assert_scales(make(model), expected)
    assert all(layer.key_scales is None for layer in make(model, key_offsets=False).layers)


def test_a_model_and_its_scales_give_the_same_text(generator, tmp_path):
    model = make_model("llama")
    ids = torch.randint(3, VOCABULARY, (2, 70), generator=generator)
    cache, given = TurboQuantCache(model), TurboQuantCache(model.config, key_scales=key_scales_from_model(model))
    for got, want in zip(*(generated(model, x, ids).logits for x in (cache, given)), strict=True):
        assert torch.equal(got, want)
    cache.save(tmp_path / "file")
    for loaded in (TurboQuantCache.load(tmp_path / "file", x) for x in (model, model.config)):
        assert_scales(loaded, scales_of(given))
        with torch.no_grad():
            got, want = (model(ids[:, :1], **{CACHE_ARGUMENT: x}).logits for x in (loaded, given))
        given.crop(-1)
        assert torch.equal(got, want)


def test_a_file_beside_the_model_is_found(make, folder, some):
    save_key_scales(folder / FILE_NAME, some, make_config("llama"), source="a test")
    for x in (of_folder(folder), transformers.AutoConfig.from_pretrained(folder)):
        assert_scales(make(x), some)


def test_a_file_of_another_model_is_refused(make, folder, some, tmp_path):
    save_key_scales(tmp_path / "other", some, make_config("gemma3"), source="a test")
    message = "expected scales of this model, got those of another: model_type: expected llama, got gemma3"
    with pytest.raises(ValueError, match=f"other: {message}"):
        make(make_config("llama"), key_scales=tmp_path / "other")
    (tmp_path / "other").rename(folder / FILE_NAME)
    for x in (of_folder(folder), transformers.AutoConfig.from_pretrained(folder)):
        with pytest.raises(ValueError, match=f"{FILE_NAME}: {message}"):
            make(x)


def test_scales_that_are_given_come_before_all_others(make, folder, some, tmp_path):
    config = make_config("llama")
    save_key_scales(folder / FILE_NAME, {layer: 2 * w for layer, w in some.items()}, config, source="a test")
    save_key_scales(tmp_path / "given", some, config, source="a test")
    model = of_folder(folder)
    for given in (tmp_path / "given", str(tmp_path / "given"), some):
        assert_scales(make(model, key_scales=given), some)
    assert all(layer.key_scales is None for layer in make(model, key_scales={}).layers)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(model, key_scales=tmp_path / "nowhere")
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="key_scales must be positive and finite, got others for layer 1"):
            make(model, key_scales={**some, 1: torch.full((HEADS, DIM), wrong)})


def test_weights_in_the_folder_are_read_once(make, folder, monkeypatch):
    read = []

    def counted(*args):
        read.append(args)
        return key_scales_from_safetensors(*args)

    key_scales_from_safetensors = scales.key_scales_from_safetensors
    monkeypatch.setattr(scales, "key_scales_from_safetensors", counted)
    config, expected = transformers.AutoConfig.from_pretrained(folder), key_scales_from_model(of_folder(folder))
    for _ in range(3):
        assert_scales(make(config), expected)
    assert len(read) == 1
    file = folder / "model.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # which a new file has
    make(config)
    assert len(read) == 2


def test_without_weights_there_are_ones_and_the_log_says_so(make, caplog, tmp_path):
    config = make_config("llama")
    for name in ("", str(tmp_path), "no such/model at all!", "turboquant-tests/not-in-any-cache"):
        config._name_or_path = name
        scales._say_ones.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, scales.__name__):
            for _ in range(2):
                assert all(layer.key_scales is None for layer in make(config).layers)
        (said,) = caplog.messages
        assert said.startswith("keys of this llama model have scales of one, for its weights are not at hand: pass the model")
        assert '"turboquant calibrate"' in said
        assert FILE_NAME in said
        caplog.clear()
        make(config, key_offsets=False)
        make(config, key_scales={})
        assert not caplog.messages
