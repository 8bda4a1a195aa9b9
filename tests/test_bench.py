"""`turboquant bench`: rows are of checked answers, what cannot run says why, and result files say where they come from."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

from turboquant_vllm import cli
from turboquant_vllm.bench import PARTS, kernels, machine, others, parts, run, run_bench

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
# Made before result files had the command that makes them; each loses its place here when it is made again.
WITHOUT_COMMAND = {
    "decode-contexts-h200", "hf-h200", "quality-demo", "quality-demo-greedy", "quality-keys-bias",
    "quality-keys-h200", "quality-keys-rules", "quality-real", "quality-recall", "quality-text",
}  # fmt: skip
SMALL = machine.Machine("cpu", "a processor", torch.float32, 10.0, 10.0, 1)


@pytest.fixture(autouse=True)
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes longer than all else here."""
    monkeypatch.setattr(machine.Machine, "measured", lambda device, rep: SMALL)


def bench(*arguments: str) -> Any:
    return CliRunner().invoke(cli._application(), ["bench", *arguments])


@pytest.mark.parametrize("part", ["decode", "prefill", "paged", "store", "hf"])
def test_rows(part: str) -> None:
    found = run_bench(part, quick=True, device="cpu")
    assert not found["failed"]
    assert not found["left_out"]
    assert [row["case"] for row in found["rows"]] == [name for name, _ in PARTS[part](SMALL, True)]
    for row in found["rows"]:
        assert row["ours_ms"] > 0
        assert row["error"] < 1e-2
        if part != "store":
            assert row["ratio"] == pytest.approx(row["best_dense_ms"] / row["ours_ms"], rel=0.05)
        if part in ("decode", "paged"):
            shape = row["shape"]
            size = shape["num_kv_heads"] * shape["kv_len"] * (shape["head_dim"] + 8) * 33 / 32
            assert row["floor_ms"] == pytest.approx(size / SMALL.read / 1e6)


@pytest.mark.parametrize("part", ["decode", "paged"])
def test_a_wrong_answer_is_not_timed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"decode": "tq4_attention", "paged": "tq4_paged_attention"}[part]
    right = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *args, **options: right(*args, **options) * 1.02)
    monkeypatch.setattr(machine.Machine, "median_ms", lambda *_: pytest.fail("a wrong answer was timed"))
    found = run_bench(part, quick=True, device="cpu")
    assert not found["rows"]
    assert len(found["failed"]) == len(list(PARTS[part](SMALL, True)))
    result = bench(part, "--quick", "--device", "cpu")
    assert result.exit_code == 1
    assert "WRONG ANSWER, not timed" in result.stdout


def test_files_and_plots(tmp_path: Path) -> None:
    result = bench("decode", "--quick", "--device", "cpu", "--json", str(tmp_path / "found.json"), "--plot", str(tmp_path))
    assert result.exit_code == 0
    assert "a processor, small sizes: reads 10.0 GB/s" in result.stdout
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"revision", "command", "machine", "device", "torch", "date"} <= set(found["environment"])
    assert [row["part"] for row in found["rows"]] == ["decode", "decode"]


def test_a_command_without_the_folders_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/store.py", "--rep", "30", "--out", "/root/results", "--contexts"])
    assert machine.environment()["command"] == "python benchmarks/store.py --rep 30 --contexts"


def test_quality_is_measured_once_for_all_formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = {name: {"format": name, "bytes_per_token": 9.0, "kl": 0.1, "tvd": 0.1, "increase_percent": 1.0, "agreement": 1.0}
            for name in ("plain", "offsets", "tq4")}  # fmt: skip
    calls = []

    def measured(model: str, **options: Any) -> dict[str, Any]:
        calls.append(options)
        return {"model": model, "bytes_per_token": {"bf16": 30.0}, "formats": list(rows.values())}

    monkeypatch.setattr("turboquant_vllm.verify.run_verify", measured)
    found = run_bench("quality", quick=True, device="cpu")
    assert [row["format"] for row in found["rows"]] == list(rows)
    assert len(calls) == 1
    assert run_bench("quality", device="cpu")["rows"]
    result = bench("quality", "--device", "cpu", "--plot", str(tmp_path))
    assert (tmp_path / "quality.png").exists(), result.output


def test_other_libraries_are_compared_if_they_agree(monkeypatch: pytest.MonkeyPatch, randn: Any) -> None:
    """Stand-ins for libraries that need a GPU, by their public signatures."""

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        states = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*states, is_causal=causal, enable_gqa=True).transpose(1, 2)

    def single_decode_with_kv_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(q[None, None], k[None], v[None], False)[0, 0] * scale

    scale = 1.0
    stubs = {"flash_attn": {"flash_attn_func": flash_attn_func},
             "flashinfer": {"single_decode_with_kv_cache": single_decode_with_kv_cache}}  # fmt: skip
    for name, functions in stubs.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    q, k, v = randn(1, 4, 1, 16), randn(1, 2, 9, 16), randn(1, 2, 9, 16)
    assert set(others.other_attentions(q, k, v, False)) == {"flash-attn", "FlashInfer"}
    scale = 1.1
    assert set(others.other_attentions(q, k, v, False)) == {"flash-attn"}
    two = (x.repeat(2, 1, 1, 1) for x in (q, k, v))
    assert set(others.other_attentions(*two, False)) == {"flash-attn"}  # type: ignore[misc]
    prompt = randn(1, 4, 9, 16)
    assert set(others.other_attentions(prompt, k, v, True)) == {"flash-attn"}  # the stand-in has nothing else


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Any:
        raise LookupError("vLLM is not installed")
        yield

    monkeypatch.setitem(parts.PARTS, "vllm", missing)
    result = bench("vllm", "--device", "cpu")
    assert result.exit_code == 2
    assert "vLLM is not installed" in result.stderr
    assert run.run_bench("vllm", device="cpu")["left_out"] == {"vllm": "vLLM is not installed"}
    result = bench("nothing")
    assert result.exit_code == 2
    assert "part: expected all, decode, " in result.stderr


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_result_files_say_where_they_come_from(path: Path) -> None:
    found = json.loads(path.read_text())
    about = found["environment"]
    assert found["rows"]
    assert {"gpu", "torch", "date", "revision"} <= set(about)
    assert about["revision"] not in ("", "unknown")
    assert ("command" not in about) == (path.stem in WITHOUT_COMMAND)
