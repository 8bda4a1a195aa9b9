"""What the tests of `turboquant verify` share: models and a text for it, and the command."""

from __future__ import annotations

import inspect
import json
import shlex
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from turboquant_vllm import cli
from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.demo.text import windows
from turboquant_vllm.quality.attention import cache_format
from turboquant_vllm.quality.formats import TQ4Format
from turboquant_vllm.quality.measure import compare_windows

CONTEXT, WINDOWS = 96, 2  # a group of 64 keys, and a part of one
SHORT = ("--context", 16, "--windows", 1, "--format", "plain", "--device", "cpu")


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli._application(), ["verify", *map(str, arguments)])


def demo_model() -> Any:
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()


def text_that_suffers(path: Path) -> Path:
    """Write some windows of text and a bit, on which 4 bits are worse: on so little text they may also be better."""
    model, tokenizer = demo_model(), AutoTokenizer.from_pretrained(MODEL)
    length = CONTEXT * WINDOWS + 7
    for module in (textwrap, shlex, shutil, tempfile):
        ids = tokenizer(inspect.getsource(module)[: 20 * length], verbose=False)["input_ids"][:length]
        assert len(ids) == length
        if compare_windows(*both(model), windows(torch.tensor(ids), CONTEXT).split(1)).increase > 0.005:
            path.write_text(tokenizer.decode(ids), encoding="utf-8")
            return path
    pytest.fail("no text on which 4 bits are worse")


def both(model: Any) -> tuple[Any, Any]:
    """The model's logits with the exact cache, and with TQ4 of seed 2."""

    def tq4(ids: torch.Tensor) -> torch.Tensor:
        with cache_format(model, TQ4Format(seed=2)):
            return model(ids).logits

    return lambda ids: model(ids).logits, tq4


def tiny(folder: Path, **changes: Any) -> Path:
    """A random Llama with the demo's tokenizer."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
    config = LlamaConfig(vocab_size=4096, num_key_value_heads=1, bos_token_id=0, eos_token_id=0, **(sizes | changes))
    return saved(LlamaForCausalLM(config), folder)


def saved(model: Any, folder: Path) -> Path:
    """A model's folder, with the demo's tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def copy_of_the_demo(folder: Path, **config: Any) -> Path:
    """The demo's model with a changed configuration."""
    return copied(MODEL, folder, **config)


def copied(model: Path, folder: Path, **config: Any) -> Path:
    """A model's folder with a changed configuration."""
    shutil.copytree(model, folder)
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return folder
