"""Drafts in vLLM's engine: a model of their own, an EAGLE head, MTP layers; the same answers as without, whatever is rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vllm_engine_cases import (  # isort: skip  (skips where there is no engine)
    Engine,
    held_out_prompts,  # noqa: F401  (fixture "prompts")
    one_process,  # noqa: F401  (fixture)
    small_model,  # noqa: F401  (fixture "model")
)
from safetensors.torch import load_file, save_file

from engine_gate import Gate
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.vllm.dense import DenseLayer
from turboquant_vllm.vllm.layer import PagedLayer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

HEAD_LAYER = 6  # its number behind those of the model


def write_head(folder: Path, generator: torch.Generator) -> Path:
    """An EAGLE head for the small model: its last layer, over a mixture of embedding and hidden state; random, so mostly wrong."""
    weights, config = load_file(MODEL / "model.safetensors"), json.loads((MODEL / "config.json").read_text())
    last = f"model.layers.{HEAD_LAYER - 1}."
    own = {name.replace(last, "layers.0."): x for name, x in weights.items() if name.startswith(last)}
    own.pop("layers.0.input_layernorm.weight", None)
    size = config["hidden_size"]
    own["fc.weight"] = (torch.randn(size, 2 * size, generator=generator) / size**0.5).to(torch.float16)
    save_file(own, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "tie_word_embeddings": False}))
    return folder


DRAFTS = {
    "model": lambda *_: {"method": "draft_model", "model": str(MODEL)},
    "eagle": lambda *args: {"method": "eagle", "model": str(write_head(*args))},
}


@pytest.mark.parametrize("head", ["packed", "dense"])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_the_same_as_without(drafts, head, model, prompts, tmp_path, generator):
    if (drafts, head) == ("model", "dense"):
        pytest.skip("its layers have the numbers of the model's")
    config = {**DRAFTS[drafts](tmp_path, generator), "num_speculative_tokens": 3}
    names = {"kv_cache_dtype": "tq4", "kv_cache_dtype_skip_layers": [str(HEAD_LAYER)]} if head == "dense" else {}
    form = {"exact_prefill": False, "key_offsets": True}
    with Engine(**form, **names, block_size=64, speculative_config=config) as engine:
        context = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        kinds = [type(layer.impl.layer) for layer in context.values()]
        assert len(kinds) == (12 if drafts == "model" else 7)
        assert kinds[:6] == [PagedLayer] * 6
        assert set(kinds[6:]) == {DenseLayer if head == "dense" else PagedLayer}
        Gate(model, **form).check(prompts, engine.answers(prompts))
        accepted, drafted = (engine.counter(f"vllm:spec_decode_num_{what}_tokens") for what in ("accepted", "draft"))
    # The model's own drafts are nearly always right, the random head's nearly never.
    assert drafted > 100
    assert accepted > 0.8 * drafted if drafts == "model" else accepted < 0.3 * drafted
