"""lm-eval with a 4-bit cache: log-likelihoods and generation on a tiny local task really go through it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

import lm_eval
from lm_eval.tasks import TaskManager
from transformers import LlamaForCausalLM

from turboquant_vllm.demo.run import MODEL
from turboquant_vllm.eval import TurboQuantLM
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache
from turboquant_vllm.quality.attention import cache_format
from turboquant_vllm.quality.formats import TQ4Format

OPTIONS: dict[str, Any] = {"pretrained": str(MODEL), "device": "cpu", "dtype": "float32", "batch_size": 2}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}, cache_dir: {folder}}}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["(self", "import", "None"]
{more}
"""
CHOICE = "metric_list: [{metric: acc}]"
WRITE = "generation_kwargs: {until: ['\\n'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": "class A:\n    def f", "answer": 0},
        {"question": "from os", "answer": 1},
        {"question": "def g(x):\n    if x is", "answer": 2},
    ]
    data = folder / "data.json"
    data.write_text("\n".join(map(json.dumps, documents)))
    for name, kind, more in (("tiny_choice", "multiple_choice", CHOICE), ("tiny_write", "generate_until", WRITE)):
        text = TASK.format(name=name, kind=kind, data=data, folder=folder, more=more)
        if kind == "generate_until":
            text = "\n".join(line for line in text.splitlines() if not line.startswith("doc_to_choice"))
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def model() -> TurboQuantLM:
    return TurboQuantLM(**OPTIONS, seed=2, key_offsets=False)


def test_log_likelihoods_are_those_of_the_cache(model: TurboQuantLM) -> None:
    exact: Any = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.tensor([model.tok_encode("import os\n\n\ndef join(path, *paths):\n    return")])
    with torch.inference_mode():
        plain = exact(ids).logits
        with cache_format(exact, TQ4Format(seed=2)):
            expected = exact(ids).logits
    got = model._model_call(ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (got - plain).abs().max() > 0.05
    reads_codes = TurboQuantLM(**OPTIONS, seed=2, key_offsets=False, attn_implementation="tq4")
    assert reads_codes.model.config._attn_implementation == "tq4"
    torch.testing.assert_close(reads_codes._model_call(ids), expected, rtol=1e-3, atol=1e-3)


def test_skipped_layers_are_exact() -> None:
    model = TurboQuantLM(**OPTIONS, skip_layers="0/1/2/3/4/-1")
    plain: Any = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()
    ids = torch.tensor([model.tok_encode("import os\n")])
    with torch.inference_mode():
        torch.testing.assert_close(model._model_call(ids), plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_tasks_run_and_every_call_has_a_cache(model: TurboQuantLM, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[Any] = []
    forward = LlamaForCausalLM.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        caches.append(kwargs.get(CACHE_ARGUMENT))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watched)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=["tiny_choice", "tiny_write"], task_manager=manager, bootstrap_iters=0)
    assert 0 <= found["results"]["tiny_choice"]["acc,none"] <= 1
    assert 0 <= found["results"]["tiny_write"]["exact_match,none"] <= 1
    assert len(caches) > 6
    assert all(isinstance(cache, TurboQuantCache) and len(cache.packed_layers) == 6 for cache in caches)
    assert len({id(cache) for cache in caches}) > 1
    scores = [sample["filtered_resps"] for sample in found["samples"]["tiny_choice"]]
    assert all(-100 < value < 0 for row in scores for value, _ in row)


def test_bad_arguments_say_so() -> None:
    with pytest.raises(ValueError, match="skip_layers: expected layer numbers between slashes, got '1/x'"):
        TurboQuantLM(**OPTIONS, skip_layers="1/x")
    with pytest.raises(ValueError, match="skip_layers"):
        TurboQuantLM(**OPTIONS, skip_layers=6)


def test_the_command_knows_the_model(tasks: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "turboquant_vllm.eval", "--model", "turboquant", "--tasks", "tiny_choice", "--device", "cpu",
        "--include_path", str(tasks), "--output_path", str(tmp_path),
        "--model_args", f"pretrained={MODEL},dtype=float32,seed=1",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "tiny_choice" in run.stdout
