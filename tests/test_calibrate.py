"""`turboquant calibrate`: scales of a text or of weights, the file that it writes, one clear line for what it cannot do."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

import transformers
from typer.testing import CliRunner

from hf_models import make_config, make_model, one_thread  # noqa: F401  (one_thread is a fixture)
from turboquant_vllm import cli
from turboquant_vllm.calibration import FILE_NAME, find_key_scales, load_key_scales
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.demo.text import gather
from turboquant_vllm.files import read_tensors
from turboquant_vllm.hf.calibration import key_scales_from_model, measure_key_scales
from turboquant_vllm.verify.calibrate import default_text, run_calibrate


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli._application(), ["calibrate", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo's model in a folder of its own."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path)
    return tmp_path


def test_a_text_s_scales_go_into_the_model_s_folder(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text(gather()["test"][0].text[:20000], encoding="utf-8")
    result = invoke(folder, "--text", text, "--context", 256, "--windows", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "6 layers of 2 x 64" in result.stdout
    assert "512 tokens of text.txt" in result.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = find_key_scales(folder, model.config)
    assert found is not None
    assert list(found) == list(range(6))
    _, metadata = read_tensors(folder / FILE_NAME, "turboquant-key-scales")
    assert metadata["text_sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert metadata["source"] == "text.txt"
    # The scales are those of what attention sees: nearer to those of other text than to those of the weights.
    other = run_calibrate(str(folder), out=folder / "other", context=256, count=2, device="cpu")
    assert other["tokens"] == 512
    again = load_key_scales(folder / "other", model.config)
    weights = key_scales_from_model(model)

    def apart(one: dict[int, torch.Tensor], two: dict[int, torch.Tensor]) -> float:
        return sum((one[layer] / two[layer]).log().square().mean().item() for layer in one)

    assert 0 < apart(found, again) < apart(found, weights)


def test_scales_of_weights_need_no_text(folder: Path) -> None:
    result = invoke(folder, "--from-weights", "--out", folder / "new" / "scales.safetensors")
    assert result.exit_code == 0, result.output
    assert "from the weights" in result.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found, expected = load_key_scales(folder / "new" / "scales.safetensors", model.config), key_scales_from_model(model)
    assert all(torch.equal(found[layer], expected[layer]) for layer in range(6))
    _, metadata = read_tensors(folder / "new" / "scales.safetensors", "turboquant-key-scales")
    assert metadata["text_sha256"] == "weights"
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, safe_serialization=True)
    assert find_key_scales(folder, model.config) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "missing.txt"], "text: expected a file, found none at missing.txt"),
        (["--windows", "0"], "windows: expected at least 1, got 0"),
        (["--context", "1000000"], "context: expected at most the model's 1024 tokens, got 1000000"),
        (["--context", "1"], "context: expected at least 2 tokens, got 1"),
        (["--from-weights", "--text", "x"], "text: expected none with from_weights, got x"),
        (["--device", "tpu"], "device"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(folder: Path, arguments: list[str], said: str) -> None:
    result = invoke(folder, *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not (folder / FILE_NAME).exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    result = invoke(tmp_path / "missing")
    assert result.exit_code == 2
    assert "model: expected a folder or the name of a model on the hub" in result.stderr
    latent = transformers.AutoModelForCausalLM.from_config(make_config("deepseek_v3"))
    latent.save_pretrained(tmp_path / "latent")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / "latent")
    result = invoke(tmp_path / "latent", "--from-weights")
    assert result.exit_code == 2
    assert "model: expected one with a cache of keys" in result.stderr
    with pytest.raises(ValueError, match="multi-head latent attention"):
        measure_key_scales(latent, torch.zeros(1, 8, dtype=torch.long))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "gemma3n", "gpt_oss", "phi3", "gpt2", "llama4"])
def test_every_layer_that_has_keys_is_measured(family: str) -> None:
    """Also with sinks, soft caps, windows, and layers that read the keys of others; the model's attention stays what it was."""
    model = make_model(family, "sdpa" if family not in ("gemma2", "gpt_oss") else "eager", torch.float32)
    before = model.config._attn_implementation
    steps = []
    found = measure_key_scales(model, torch.arange(3, 90).repeat(2, 1), lambda: steps.append(1))
    assert len(steps) == 2
    assert model.config._attn_implementation == before
    own = model.config.num_hidden_layers - (getattr(model.config, "num_kv_shared_layers", None) or 0)
    assert list(found) == list(range(own))
    for w in found.values():
        assert w.device.type == "cpu"
        assert w.dtype == torch.float32
        assert w.std() > 0
    assert all(torch.equal(w, found[layer]) for layer, w in measure_key_scales(model, torch.arange(3, 90).repeat(2, 1)).items())


def test_queries_of_layers_that_share_keys_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma3n", "sdpa", torch.float32)
    ids = torch.arange(3, 90)[None]
    found = measure_key_scales(model, ids)
    for layer in model.model.layers[2:]:
        layer.self_attn.q_norm.weight.data = torch.linspace(0.2, 5, 32)
    other = measure_key_scales(model, ids)
    assert not torch.allclose(found[0], other[0], rtol=0.05)


def test_a_model_that_gives_nan_is_refused() -> None:
    model = make_model("llama", "sdpa", torch.float32)
    model.model.layers[1].self_attn.k_proj.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="layer 1: expected finite queries and keys"):
        measure_key_scales(model, torch.arange(3, 90)[None])
    assert model.config._attn_implementation == "sdpa"


def test_the_default_text_is_what_verify_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    text = default_text()
    held_out = [document.text for document in gather()["test"] if len(document.text) > 4000]
    assert len(text) > 500_000
    assert not any(other[1000:1400] in text for other in held_out)
    topics = pytest.importorskip("pydoc_data.topics").topics
    assert topics["lambda"][:200] in text
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert topics["lambda"][:200] not in default_text()
