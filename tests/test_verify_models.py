"""`turboquant verify` on models of many kinds: what can be measured is, all else is one line and exit status 2."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.hf import CACHE_ARGUMENT
from turboquant_vllm.quality.formats import TQ4Format
from turboquant_vllm.verify import run_verify
from verify_cases import SHORT, copied, copy_of_the_demo, invoke, saved, tiny

# Other models


class Again(DynamicCache):
    """A growing cache that gives back what its vectors are after `compress` and `decompress`."""

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(*TQ4Format()(layer_idx, key, value), layer_idx, *args, **kwargs)


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=4096, hidden_size=64, n_layer=2, n_head=2, initializer_range=0.3))


def gpt_oss() -> Any:
    config = GptOssConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=2, num_experts_per_tok=1, sliding_window=32,
        initializer_range=0.2, max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GptOssForCausalLM(config)


@pytest.mark.parametrize("make", [bloom, gpt_oss])
def test_models_without_sdpa_are_measured_in_eager_attention(
    tmp_path: Path, verify_text: Path, make: Callable[[], Any]
) -> None:
    torch.manual_seed(0)
    folder = saved(make(), tmp_path)
    found = run_verify(str(folder), verify_text, 64, count=1, max_ppl_increase=1e6, device="cpu", formats=("plain",))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(verify_text.read_text(encoding="utf-8"))["input_ids"])[None, :64]
    with torch.inference_mode():
        p, q = (
            model(ids, **{CACHE_ARGUMENT: cache(config=model.config)}).logits.double().log_softmax(-1)
            for cache in (DynamicCache, Again)
        )
    assert found["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.01)
    assert found["kl"] > 1e-4
    assert [item["layer"] for item in found["layers"]] == [0, 1]
    for item in found["layers"]:
        assert item["key_error"] == pytest.approx(math.sqrt(0.0091), rel=0.2)
        assert item["attention_error"] > 1e-3


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
from turboquant_vllm.hf import CACHE_ARGUMENT

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, past_key_values=None, use_cache=None):  # as models were written before the new name
        return super().forward(input_ids, use_cache=use_cache, **{CACHE_ARGUMENT: past_key_values})
"""


def test_code_that_comes_with_a_model_runs_when_it_is_trusted(
    tmp_path: Path, verify_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    code = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    plain = tiny(tmp_path / "plain", initializer_range=0.3)
    folder = copied(plain, tmp_path / "own", model_type="own", architectures=["OwnForCausalLM"], auto_map=code)
    (folder / "modeling_own.py").write_text(OWN)
    arguments = (folder, "--text", verify_text, *SHORT)
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert re.fullmatch("error: model: .* brings code of its own; once you trust it: --trust-remote-code\n", refused.stderr), (
        refused.stderr
    )
    out = tmp_path / "own.json"
    assert invoke(*arguments, "--max-ppl-increase", 1000, "--json", out, "--trust-remote-code").exit_code == 0
    expected = run_verify(str(plain), verify_text, 16, count=1, device="cpu", formats=("plain",))["kl"]
    assert expected > 1e-4
    assert json.loads(out.read_text())["kl"] == pytest.approx(expected, rel=1e-4)


def broken_json(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{", encoding="utf-8")
    return folder


def no_cache(folder: Path) -> Path:
    config = MambaConfig(vocab_size=4096, hidden_size=32, state_size=4, num_hidden_layers=1)
    return saved(MambaForCausalLM(config), folder)


def encoder(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return saved(BertLMHeadModel(BertConfig(vocab_size=4096, **sizes)), folder)


def not_a_number(folder: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(tiny(folder))
    model.lm_head.weight.data[7] = math.nan
    model.save_pretrained(folder)
    return folder


def latent(folder: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ranks = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
    config = DeepseekV3Config(vocab_size=4096, num_key_value_heads=2, first_k_dense_replace=1, **sizes, **ranks)
    return saved(DeepseekV3ForCausalLM(config), folder)


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "model: expected a folder or the name of a model on the hub, found no "),
        (empty, "model: expected a config.json in "),
        (broken_json, "model: "),
        (no_cache, r"model: expected one whose cache can be kept in 4 bits, .* \(MambaForCausalLM\) has linear attention"),
        (encoder, r"model: expected one with a cache of keys and values, .* \(BertLMHeadModel\) keeps none"),
        (lambda folder: tiny(folder, head_dim=8), "layer 0: expected an even head dimension from 16 to 512, got 8; leave it"),
        (not_a_number, "model: expected finite likelihoods, .* gives nan with an exact cache"),
        (latent, r"model: expected one whose cache can be kept in 4 bits, .* has multi-head latent attention"),
    ],
)
def test_a_model_that_cannot_be_verified_is_one_line(tmp_path: Path, verify_text: Path, make: Any, message: str) -> None:
    result = invoke(make(tmp_path / "model"), "--text", verify_text, *SHORT)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.match(f"error: {message}", result.stderr), result.stderr
    assert result.stdout == ""


def test_what_cannot_be_packed_may_be_left_exact(verify_text: Path, tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model", head_dim=8)
    found = run_verify(str(folder), verify_text, 16, count=1, dense_layers=(0, 1), device="cpu", formats=("plain",))
    assert (found["increase_percent"], found["recommendation"]["dense_layers"]) == (0, [0, 1])


def pointer(folder: Path) -> Path:
    (copy_of_the_demo(folder) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    return folder


def cut(folder: Path) -> Path:
    copy_of_the_demo(folder)
    (folder / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:100_000])
    return folder


def few_tokens(folder: Path) -> Path:
    copy_of_the_demo(folder, vocab_size=100)
    tensors = load_file(MODEL / "model.safetensors")
    save_file({name: x[: 100 if len(x) == 4096 else None].clone() for name, x in tensors.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return folder


def without(*names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        copy_of_the_demo(folder)
        tensors = load_file(MODEL / "model.safetensors")
        kept = {name: x for name, x in tensors.items() if not name.endswith(names)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pointer, r"model: expected the file itself, .*model.safetensors is a pointer of git-lfs: git lfs pull"),
        (cut, "model: expected a causal language model, .* gives SafetensorError: "),
        (
            lambda folder: copy_of_the_demo(folder, intermediate_size=640),
            r"model: expected weights in the shapes of the configuration of .*: model.layers.0.mlp.* has \[.*\] in the file, "
            r"\[.*640.*\] in the model and 17 more",
        ),
        (few_tokens, "tokenizer: expected tokens below 100, the rows of the model's embedding, got "),
        (
            without("layers.1.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"),
            "model: expected weights for every parameter, the files of .* lack model.layers.0.self_attn.v_proj.* and 1 more",
        ),
    ],
)
def test_files_that_are_no_model_are_one_line(tmp_path: Path, verify_text: Path, make: Any, message: str) -> None:
    result = invoke(make(tmp_path / "model"), "--text", verify_text, *SHORT)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.match(f"error: {message}", result.stderr), result.stderr
    assert result.stdout == ""


def test_weights_that_the_model_has_no_place_for_are_named(
    verify_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = copied(tiny(tmp_path / "whole"), tmp_path / "model", num_hidden_layers=1)
    result = invoke(folder, "--text", verify_text, *SHORT, "--max-ppl-increase", 1000)
    assert result.exit_code == 0
    assert "note: the model has no place for 9 tensors of its files, such as model.layers.1." in result.stdout
    assert result.stderr == ""
