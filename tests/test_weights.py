"""Channel scales from weights: against what the models' own attention makes of random tokens, and where weights are found."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("transformers")

import transformers

from hf_models import _COMMON, _HEADS, make_config, make_model, one_thread  # noqa: F401  (one_thread is a fixture)
from turboquant_vllm import weights
from turboquant_vllm.calibration import FILE_NAME
from turboquant_vllm.hf.calibration import key_scales_from_model, measure_key_scales
from turboquant_vllm.weights import (
    index_weights,
    key_scales_from_safetensors,
    key_scales_from_weights,
    why_taken_for_weights,
)

Randn = Callable[..., torch.Tensor]

_POSITIONS, _SEQUENCES, _VOCABULARY = 1024, 12, 4096
_GATED = {"layer_types": ["full_attention"], "num_experts": 0, "decoder_sparse_step": 2, "mlp_only_layers": [0]}
# Family -> class of its configuration, and its arguments.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_HEADS, "attention_bias": True}),
    "qwen2": ("Qwen2Config", {**_COMMON, "hidden_size": 128}),
    "qwen3": ("Qwen3Config", _HEADS),
    "qwen3_next": ("Qwen3NextConfig", {**_HEADS, **_GATED, "partial_rotary_factor": 0.25}),
    "gemma2": ("Gemma2Config", _HEADS),
    "gemma3": ("Gemma3TextConfig", {**_HEADS, "layer_types": ["full_attention"]}),
    "olmo2": ("Olmo2Config", {**_COMMON, "hidden_size": 128}),
    "phi3": ("Phi3Config", {**_COMMON, "hidden_size": 128}),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "hidden_size": 128, "num_key_value_heads": 4, "rotary_pct": 0.25}),
    "cohere": ("CohereConfig", {**_COMMON, "hidden_size": 128}),
    "glm4": ("Glm4Config", {**_HEADS, "attention_bias": True}),
    "no rope": ("LlamaConfig", _HEADS),
}
_NORM_OF_KEYS = {"qwen3", "qwen3_next", "gemma3", "olmo2"}


def seeded_model(name: str, randn: Randn, spread: float = 0.7) -> Any:
    """A model of one layer whose embeddings are random directions; rows of projections differ by e to the ``spread``."""
    kind, arguments = CASES[name]
    given = {**arguments, "num_hidden_layers": 1, "vocab_size": _VOCABULARY, "max_position_embeddings": _POSITIONS}
    config = getattr(transformers, kind)(**given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if "embed" in name:
            parameter.data = randn(*parameter.shape)
        elif name.endswith("norm.weight"):
            parameter.data += 0.5 * randn(*parameter.shape).clamp(-1.5, 1.5)
        elif parameter.dim() == 2 and any(x in name for x in ("q_proj", "k_proj", "qkv_proj", "query_key_value")):
            parameter.data = randn(*parameter.shape) * (spread * randn(parameter.shape[0], 1)).exp()
        elif parameter.dim() == 1 and name.endswith(("q_proj.bias", "k_proj.bias", "query_key_value.bias")):
            parameter.data = 10 * randn(*parameter.shape)
    return model


@pytest.mark.parametrize("name", CASES)
def test_scales_from_weights_are_those_of_what_attention_sees(name: str, randn: Randn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are random directions have nothing in common but biases: what is measured must be what the weights say."""
    monkeypatch.setattr(weights, "_IN_COMMON", 0.0)
    monkeypatch.setattr(weights, "_POSITIONS", _POSITIONS)
    if name == "no rope":
        monkeypatch.setattr(
            "transformers.models.llama.modeling_llama.apply_rotary_pos_emb", lambda query, key, *args, **kwargs: (query, key)
        )
    norms = name in _NORM_OF_KEYS
    # Behind a norm of keys a channel of half its head's square would stand for the mean of a ratio very badly.
    model = seeded_model(name, randn, 0.3 if norms else 0.7)
    assert norms == any("q_norm" in parameter for parameter, _ in model.named_parameters())
    ids = torch.randint(
        _VOCABULARY, (_SEQUENCES, _POSITIONS), generator=torch.Generator().manual_seed(int(randn(1).abs() * 1e6))
    )
    measured = measure_key_scales(model, ids)[0]
    if name == "no rope":
        model.config.rope_parameters = None
    found = key_scales_from_model(model)
    assert list(found) == [0]
    assert found[0].shape == measured.shape
    assert found[0].dtype == torch.float32
    # Mean squares over 4096 random directions are off by sqrt(2 / 4096) = 2 %, the fourth root of their ratio by 0.8 %, and
    # four times that for some channel of a few hundred. Behind a norm of queries and keys, the ratio of means stands for the
    # mean of a ratio: off by the share that a channel has of its head's square, a tenth, a fourth of it here; at most by
    # the tenths that the largest channel of a head has.
    error = (found[0] / measured).log().abs()
    assert error.square().mean().sqrt() < (0.03 if norms else 0.02) < measured.log().std() / 4
    assert error.max() < (0.12 if norms else 0.08)


def test_what_keys_have_in_common_counts_less_where_rope_is_slow(randn: Randn) -> None:
    """Equal rows everywhere: scales say only what an offset takes away."""
    config = make_config("llama")
    tensors = {
        f"layers.0.self_attn.{name}.weight": torch.eye(64)[:32].repeat(heads, 1)
        for name, heads in (("q_proj", 4), ("k_proj", 2))
    }
    config.num_hidden_layers = 1
    w = key_scales_from_weights(tensors, tensors.__getitem__, config)[0]
    assert torch.equal(w[0], w[1])
    # A group of 64 keys turns channel 0 ten times, the last one by 0.6 of a degree.
    torch.testing.assert_close(w[0, 15] / w[0, 0], torch.tensor(0.2**-0.25), rtol=0.01, atol=0)
    assert (w[0, 1:16] >= w[0, :15] * 0.99).all()
    torch.testing.assert_close(w[0, :16], w[0, 16:])


def named(config: Any, randn: Randn, prefix: str = "model.", **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights of a llama of that configuration, as a checkpoint names them."""
    sizes = {"q_proj": config.num_attention_heads * config.head_dim, "k_proj": config.num_key_value_heads * config.head_dim}
    found = {f"{prefix}embed_tokens.weight": randn(97, 64)}
    for layer in range(config.num_hidden_layers):
        start = f"{prefix}layers.{layer}."
        found |= {f"{start}self_attn.{name}.weight": randn(rows, 64) * randn(rows, 1).exp() for name, rows in sizes.items()}
        found[f"{start}input_layernorm.weight"] = randn(64).exp()
        found[f"{start}mlp.up_proj.weight"] = randn(8, 64)
    return found | tensors


def test_files_of_a_model_give_what_the_model_gives(randn: Randn, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformers.LlamaForCausalLM(make_config("llama"))
    expected = key_scales_from_model(model)
    assert list(expected) == [0, 1]
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    save_file({"layers.0.key_scales": torch.ones(2, 32)}, tmp_path / "one" / FILE_NAME)  # is no weight
    for name in ("one", "many"):
        found = key_scales_from_safetensors(tmp_path / name, model.config)
        assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
    assert not caplog.records


def test_only_what_is_needed_is_read(randn: Randn) -> None:
    config = make_config("llama")
    tensors, read = named(config, randn), []
    key_scales_from_weights(tensors, lambda name: read.append(name) or tensors[name], config)
    assert sorted(set(read)) == sorted(name for name in tensors if "self_attn" in name or "input_layernorm" in name)


def test_the_decoder_is_found_among_towers(randn: Randn) -> None:
    config = make_config("llama")
    own = named(config, randn, "language_model.model.")
    others = named(config, randn, "vision_tower.encoder.") | named(config, randn, "mtp.")
    expected = key_scales_from_weights(own, own.__getitem__, config)
    found = key_scales_from_weights([*others, *own], (others | own).__getitem__, config)
    assert all(torch.equal(found[layer], expected[layer]) for layer in (0, 1))
    assert not torch.equal(found[0], torch.ones(2, 32))


def test_fp8_weights_count_with_their_scales(randn: Randn) -> None:
    config = make_config("llama")
    tensors = named(config, randn)
    small, blocks = dict(tensors), dict(tensors)
    for name, x in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            scale = x.abs().amax(1, keepdim=True) / 448
            small[name], small[f"{name}_scale"] = (x / scale).to(torch.float8_e4m3fn), scale
            scale = x.unflatten(0, (-1, 32)).unflatten(2, (-1, 32)).abs().amax((1, 3)) / 448
            whole = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
            blocks[name], blocks[f"{name}_scale_inv"] = (x / whole).to(torch.float8_e4m3fn), scale
    expected = key_scales_from_weights(tensors, tensors.__getitem__, config)
    for given in (small, blocks):
        found = key_scales_from_weights(given, given.__getitem__, config)
        for layer, w in expected.items():
            # e4m3 keeps three bits: each product is off by at most 1 / 16, a row's sum of squares by less.
            torch.testing.assert_close(found[layer], w, rtol=0.04, atol=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: {name: x for name, x in tensors.items() if "k_proj" not in name}, "expected q_proj and k_proj"),
        (lambda tensors: {name.replace("layers", "h"): x for name, x in tensors.items()}, "expected q_proj and k_proj"),
        (
            lambda tensors: {name: x.to(torch.uint8) if "q_proj" in name else x for name, x in tensors.items()},
            "none that can be read",
        ),
        (
            lambda tensors: {name: x[:-1] if "k_proj" in name else x for name, x in tensors.items()},
            "expected k_proj of 64 rows, got 63",
        ),
        (lambda tensors: {name: x.to("meta") for name, x in tensors.items()}, "none that can be read"),
    ],
)
def test_weights_that_are_not_understood_give_ones_and_a_warning(
    randn: Randn, caplog: pytest.LogCaptureFixture, change: Callable[[Any], Any], said: str
) -> None:
    config = make_config("llama")
    tensors = change(named(config, randn))
    with caplog.at_level(logging.WARNING):
        found = key_scales_from_weights(tensors, tensors.__getitem__, config)
    assert all(torch.equal(found[layer], torch.ones(2, 32)) for layer in (0, 1))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert said in message
    assert "all 2 layers" in message
    assert "turboquant calibrate" in message


def test_one_layer_that_is_not_understood_is_named(randn: Randn, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config("llama")
    tensors = named(config, randn)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with caplog.at_level(logging.WARNING):
        found = key_scales_from_weights(tensors, tensors.__getitem__, config)
    assert torch.equal(found[1], torch.ones(2, 32))
    assert not torch.equal(found[0], torch.ones(2, 32))
    assert "layers 1:" in caplog.records[0].getMessage()


def test_norms_are_enough_where_projections_are_packed(randn: Randn, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config("qwen3")
    tensors = {f"model.layers.{layer}.self_attn.{x}_norm.weight": randn(32).exp() for layer in (0, 1) for x in "qk"}
    tensors |= {
        f"model.layers.{layer}.self_attn.{x}_proj.qweight": torch.ones(8, 8, dtype=torch.int32)
        for layer in (0, 1)
        for x in "qk"
    }
    found = key_scales_from_weights(tensors, tensors.__getitem__, config)
    assert found[0].std() > 0.05
    assert torch.equal(found[0][0], found[0][1])
    assert not caplog.records


@pytest.mark.parametrize("family", ["gemma3n", "gpt_oss", "llama4", "mistral", "gemma2", "phi3"])
def test_layers_with_keys_have_finite_scales(family: str, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(family)
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = key_scales_from_model(model)
    own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    assert list(found) == list(range(own))
    for w in found.values():
        assert w.shape == (config.num_key_value_heads, config.head_dim if hasattr(config, "head_dim") else 32)
        assert (w.isfinite() & (w > 0)).all()
    assert not [record for record in caplog.records if record.name.startswith("turboquant")]


def test_layers_of_two_head_dimensions(caplog: pytest.LogCaptureFixture) -> None:
    """transformers answers no question about the sizes of all of them."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this release has no such model")
    layers = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 64, "num_global_key_value_heads": 1}
    more = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97}
    config = transformers.Gemma4TextConfig(**_HEADS, **layers, **more, num_kv_shared_layers=0)
    scales = key_scales_from_model(transformers.AutoModelForCausalLM.from_config(config))
    assert [tuple(scales[layer].shape) for layer in range(2)] == [(2, 32), (1, 64)]
    assert all(w.isfinite().all() and w.std() > 0 for w in scales.values()), caplog.text


def test_latent_attention_has_no_scales() -> None:
    assert key_scales_from_model(transformers.AutoModelForCausalLM.from_config(make_config("deepseek_v3"))) == {}


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    config = make_config("llama")
    with pytest.raises(FileNotFoundError, match="expected safetensors files of a model, found none"):
        key_scales_from_safetensors(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="expected the safetensors files of a model, got"):
        key_scales_from_safetensors(tmp_path, config)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        key_scales_from_safetensors(tmp_path, config)


class TestBesideWeights:
    """Some loaders read every safetensors file of a folder, but for those that an index leaves out."""

    @pytest.fixture
    def folder(self, tmp_path):
        model = make_model("llama", dtype=torch.float32)
        model.save_pretrained(tmp_path)
        save_file({"layers.0.key_scales": torch.ones(2, 16)}, tmp_path / FILE_NAME)
        return tmp_path

    def test_weights_in_one_file_get_an_index(self, folder):
        assert "turboquant.safetensors stands beside model.safetensors without" in why_taken_for_weights(folder)
        expected = key_scales_from_safetensors(folder, transformers.AutoConfig.from_pretrained(folder))
        index_weights(folder)
        assert why_taken_for_weights(folder) == ""
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {"model.safetensors"}
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        transformers.AutoModelForCausalLM.from_pretrained(folder)  # has all of its weights
        again = key_scales_from_safetensors(folder, transformers.AutoConfig.from_pretrained(folder))
        assert all(torch.equal(w, expected[layer]) for layer, w in again.items())

    def test_an_index_that_is_there_stays(self, folder):
        (folder / "model.safetensors.index.json").write_text("{}")
        index_weights(folder)
        assert (folder / "model.safetensors.index.json").read_text() == "{}"

    def test_a_folder_without_weights(self, tmp_path):
        index_weights(tmp_path)
        assert why_taken_for_weights(tmp_path) == ""
        assert not any(tmp_path.iterdir())

    def test_vllm_leaves_the_scales_alone(self, folder):
        utils = pytest.importorskip("vllm.model_executor.model_loader.weight_utils", exc_type=ImportError)
        files = sorted(map(str, folder.glob("*.safetensors")))
        choose = utils.filter_duplicate_safetensors_files
        assert len(choose(files, str(folder), "model.safetensors.index.json")) == 2
        index_weights(folder)
        assert choose(files, str(folder), "model.safetensors.index.json") == [str(folder / "model.safetensors")]
