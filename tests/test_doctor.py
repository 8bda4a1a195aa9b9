"""`turboquant doctor`: what it says of a model is what a cache of that model does, and what it refuses says why."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from hf_models import VOCABULARY, make_config, make_model
from turboquant_vllm import cli
from turboquant_vllm.doctor import find_layers, report, run_doctor
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache, register

FAMILIES = ["llama", "gemma2", "gemma3", "gemma3n", "gpt_oss", "gpt2", "llama4", "deepseek_v3"]


def doctor(*arguments: str) -> Any:
    return CliRunner().invoke(cli._application(), ["doctor", *arguments])


def saved(family: str, folder: Any, **changes: Any) -> str:
    config = make_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:TurboQuantCache keeps nothing")
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_of_a_cache_that_a_model_has_filled(family, generator):
    register()
    model = make_model(family)
    cache = TurboQuantCache(model.config)
    model(torch.randint(3, VOCABULARY, (1, 4), generator=generator), **{CACHE_ARGUMENT: cache})
    found = find_layers(make_config(family))
    assert found.source == "a call without weights"
    assert not found.refused
    assert [index for index, layer in found.layers.items() if not layer.dense] == cache.packed_layers
    heads = model.config.get_text_config().num_attention_heads
    for index, layer in found.layers.items():
        keys, values = cache.layers[index].keys, cache.layers[index].values
        assert (keys.shape[1], keys.shape[3], values.shape[3]) == (layer.num_kv_heads, layer.head_dim, layer.value_dim)
        assert layer.num_heads == heads
        assert layer.window == getattr(cache.layers[index], "window", None)
    others = {index for numbers in found.others.values() for index in numbers}
    assert others | set(found.layers) == set(range(len(cache.layers)))
    assert all(
        layer.sinks == (family == "gpt_oss") and layer.softcap == (family == "gemma2") for layer in found.layers.values()
    )


def test_a_model_that_cannot_run_without_numbers_is_described_by_its_configuration(monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    config = make_config("gemma3")
    expected = find_layers(config)
    monkeypatch.setattr(type(make_model("gemma3")), "forward", fails)
    found = find_layers(config)
    assert found.source == "its configuration"
    assert found.layers == expected.layers


@pytest.mark.parametrize(
    ("kind", "head_dims", "own"),
    [
        ("falcon", {64}, True),
        ("bloom", {8}, True),
        ("qwen2_5_vl", {128}, False),
        ("gemma4", {256, 512}, False),
        ("gptj", {256}, Version(transformers.__version__) < Version("5.24")),
    ],
)
def test_configurations_as_they_come(kind, head_dims, own):
    if kind not in CONFIG_MAPPING:
        pytest.skip("this transformers does not have it")
    found = find_layers(CONFIG_MAPPING[kind]())
    assert {layer.head_dim for layer in found.layers.values()} == head_dims
    assert {layer.own for layer in found.layers.values()} == {own}


def test_report(tmp_path):
    result = doctor(saved("gemma3", tmp_path))
    assert result.exit_code == 0
    config = make_config("gemma3")
    windows = report.ranges([i for i, kind in enumerate(config.layer_types) if kind == "sliding_attention"])
    assert f"layers {windows}: windows of {config.sliding_window}, " in result.stdout
    assert "transformers: 4 bits; decoded by " in result.stdout
    assert result.stdout.endswith("served in 4 bits\n")
    assert "NOT" not in result.stdout


def test_json(tmp_path):
    folder = saved("llama", tmp_path)
    found = json.loads(doctor(folder, "--json").stdout)
    assert found == json.loads(json.dumps(run_doctor(folder)))
    config = make_config("llama")
    layers, heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    assert found["bytes_per_token"]["bf16"] == layers * heads * 4 * head_dim
    assert found["bytes_per_token"]["tq4"] == layers * heads * (head_dim + 8) * 33 / 32
    assert found["served"]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("deepseek_v3", {}, "dense: multi-head latent attention"),
        ("llama", {"head_dim": 8}, "dense: expected an even head dimension from 16 to"),
    ],
)
def test_what_is_not_served_says_why_and_ends_with_1(family, changes, words, tmp_path):
    result = doctor(saved(family, tmp_path, **changes))
    assert result.exit_code == 1
    assert words in result.stdout
    assert result.stdout.endswith("NOT served in 4 bits\n")


def test_packages_that_do_not_fit(tmp_path, monkeypatch):
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "5.2.0" if name == "transformers" else version(name))
    result = doctor(saved("llama", tmp_path))
    assert result.exit_code == 1
    assert "transformers: 5.2.0; EXPECTED " in result.stdout


@pytest.mark.parametrize(("name", "words"), [("./nowhere", "found no ./nowhere"), ("", "expected a config.json")])
def test_no_model(name, words, tmp_path):
    result = doctor(name or str(tmp_path))
    assert result.exit_code == 1
    assert words in result.stderr


def test_ranges():
    assert report.ranges([0]) == "0"
    assert report.ranges([0, 1]) == "0-1"
    assert report.ranges([0, 1, 2, 4]) == "0-2, 4"
    assert report.ranges([1, 4, 7]) == "1-7 by 3"
    assert report.ranges([2, 5]) == "2, 5"
