"""Drafts in vLLM's engine: a model of their own, an EAGLE head, MTP layers; answers are as without, whatever is rejected."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vllm_engine_cases import (  # isort: skip  (skips where there is no engine)
    Engine,
    held_out_prompts,  # noqa: F401  (fixture "prompts")
    one_process,  # noqa: F401  (fixture)
    noticed,
    random_prompts,
    small_model,  # noqa: F401  (fixture "model")
)
import transformers
from safetensors.torch import load_file, save_file

from engine_gate import Gate
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.hf import register
from turboquant_vllm.vllm.batch import Kind
from turboquant_vllm.vllm.dense import DenseLayer
from turboquant_vllm.vllm.layer import PagedLayer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HEAD_LAYER = 6  # its number behind those of the model


def write_head(folder: Path, generator: torch.Generator) -> dict[str, object]:
    """An EAGLE head for the small model: its last layer, over a random mixture of embedding and hidden state, mostly wrong."""
    weights, config = load_file(MODEL / "model.safetensors"), json.loads((MODEL / "config.json").read_text())
    last = f"model.layers.{HEAD_LAYER - 1}."
    own = {name.replace(last, "layers.0."): x for name, x in weights.items() if name.startswith(last)}
    own.pop("layers.0.input_layernorm.weight", None)
    size = config["hidden_size"]
    own["fc.weight"] = (torch.randn(size, 2 * size, generator=generator) / size**0.5).to(torch.float16)
    save_file(own, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "tie_word_embeddings": False}))
    return {"method": "eagle", "model": str(folder)}


def drafts_see_one_more(right, layer, q, k, v, kv_cache, runs, out, **where):
    """Each token of a verification sees the draft behind it, too."""

    def later(run):
        is_verified = run.kind == Kind.DECODE and run.max_query_len > 1
        return dataclasses.replace(run, seq_lens=run.seq_lens + 1) if is_verified else run

    right(layer, q, k, v, kv_cache, [later(run) for run in runs], out, **where)


@pytest.mark.parametrize(
    ("drafts", "head", "fault"),
    [
        ("model", "packed", None),
        ("model", "packed", drafts_see_one_more),
        ("eagle", "packed", None),
        ("eagle", "dense", None),
    ],
)
def test_the_same_as_without(drafts, head, fault, model, prompts, tmp_path, generator, monkeypatch):
    if fault is not None:
        right = PagedLayer.attend
        monkeypatch.setattr(PagedLayer, "attend", lambda *args, **where: fault(right, *args, **where))
    own = {"method": "draft_model", "model": str(MODEL)} if drafts == "model" else write_head(tmp_path, generator)
    names = {"kv_cache_dtype": "tq4", "kv_cache_dtype_skip_layers": [str(HEAD_LAYER)]} if head == "dense" else {}
    config = {**own, "num_speculative_tokens": 3}
    with Engine(exact_prefill=False, **names, block_size=64, speculative_config=config) as engine:
        context = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        kinds = [type(layer.impl.layer) for layer in context.values()]
        assert kinds[:6] == [PagedLayer] * 6
        assert kinds[6:] == ([PagedLayer] * 6 if drafts == "model" else [DenseLayer if head == "dense" else PagedLayer])
        with noticed(fault):
            Gate(model, exact_prefill=False).check(prompts, engine.answers(prompts))
        accepted, drafted = (engine.counter(f"vllm:spec_decode_num_{what}_tokens") for what in ("accepted", "draft"))
    # The model's own drafts are nearly always right, the random head's nearly never.
    assert drafted > 100
    assert fault or (accepted > 0.8 * drafted if drafts == "model" else accepted < 0.3 * drafted)


@pytest.mark.parametrize("key_offsets", [False, True])
def test_layers_that_predict_a_token_more(key_offsets, tmp_path, generator):
    """A model that has one such layer (MTP), random, with a cache of its own."""
    register()
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 97}
    config = transformers.Qwen2Config(**sizes, num_hidden_layers=2, max_position_embeddings=256, initializer_range=0.3)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="tq4", dtype=torch.float16).eval()
    model.get_input_embeddings().weight.data.mul_(0.05)
    config.architectures, config.num_nextn_predict_layers = ["MiMoForCausalLM"], 1
    weights = {name: x for name, x in model.state_dict().items() if name != "lm_head.weight" or not config.tie_word_embeddings}
    more = {name.split(".", 3)[3]: x.clone() for name, x in weights.items() if name.startswith("model.layers.1.")}
    ones = torch.ones(128, dtype=torch.float16)
    more |= {f"{name}_layernorm.weight": ones.clone() for name in ("token", "hidden", "final")}
    more["input_proj.weight"] = torch.randn(128, 256, generator=generator).to(torch.float16) / 16
    weights |= {f"model.mtp_layers.0.{name}": x for name, x in more.items()}
    save_file({name: x.contiguous() for name, x in weights.items()}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    prompts = random_prompts(generator, 100, 5, 64, 17)
    form = {"exact_prefill": False, "key_offsets": key_offsets}
    drafts = {"method": "mtp", "num_speculative_tokens": 1}
    with Engine(model=tmp_path, **form, block_size=64, max_model_len=192, speculative_config=drafts) as engine:
        context = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert len(context) == 3
        answers = engine.answers(prompts)
        assert engine.counter("vllm:spec_decode_num_draft_tokens") > 50
    Gate(model, **form).check(prompts, answers)
    if key_offsets:  # those of a group follow from the drafts written with its first key
        return
    with Engine(model=tmp_path, **form, block_size=64, max_model_len=192) as engine:
        agree = [a.tokens == b.tokens for a, b in zip(answers, engine.answers(prompts), strict=True)]
    assert sum(agree) >= len(agree) - 1  # a rounding may decide once
