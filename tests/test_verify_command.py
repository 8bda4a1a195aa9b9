"""The command `turboquant verify`: its options and exit status, whatever raises, and what it writes."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from transformers import LlamaForCausalLM

from turboquant_vllm import cli, verify
from turboquant_vllm.demo.run import MODEL
from verify_cases import CONTEXT, SHORT, WINDOWS, invoke

# The command


def test_command_prints_saves_and_passes(verify_command: tuple[Any, dict[str, Any]]) -> None:
    result, saved = verify_command
    assert (result.exit_code, result.stderr) == (0, "")
    for expected in (
        f"{saved['perplexity']['tq4']:.4f}",
        f"{saved['increase_percent']:+.2f} %",
        f"{saved['kl']:.5f}",
        f"{100 * (1 - saved['tvd']):.1f} %",
        f"{100 * saved['agreement']:.1f} %",
        "passed",
        "recommendation: all layers in TQ4; ",
        "\nuse: TurboQuantCache(model, key_offsets=False, seed=2)\n",
    ):
        assert expected in result.stdout


def test_command_fails_above_the_limit(verify_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each layer is read once, for 256 tokens at most, not as often as the text has windows, nor all of their tokens."""
    read: list[int] = []
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM, "forward", lambda self, ids, **kw: read.append(ids.numel()) or forward(self, ids, **kw)
    )
    monkeypatch.setattr("turboquant_vllm.verify.run._LAYER_TOKENS", 32)
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "verify.json"
    arguments = ("--context", CONTEXT, "--seed", 2, "--format", "plain", "--device", "cpu", "--json", out)
    result = invoke(MODEL, "--text", verify_text, *arguments, "--max-ppl-increase", 1e-9)
    assert result.exit_code == 1, result.output
    assert "FAILED" in result.stdout
    passes = 2 + 2  # exact and TQ4, and two tries of a recommendation at most
    assert sum(read) <= 2 + passes * WINDOWS * CONTEXT + (2 + 6) * 32
    found = json.loads(out.read_text())
    advice = found["recommendation"]
    assert not found["passed"]
    assert 1 <= len(advice["dense_layers"]) <= 3
    assert advice["cache"] == f"TurboQuantCache(model, key_offsets=False, seed=2, skip_layers={advice['dense_layers']})"
    assert f"{'use' if advice['within_limit'] else 'loses least'}: {advice['cache']}\n" in result.stdout
    numbers = " ".join(map(str, advice["dense_layers"]))
    assert advice["dense_layers"]
    assert f"--kv-cache-dtype tq4 --kv-cache-dtype-skip-layers {numbers}\n" in result.stdout
    if not advice["within_limit"]:
        assert advice["text"].startswith("not for this text: with layers ")
        assert len(advice["dense_layers"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "nowhere.txt"), "text: expected a file, found none at nowhere.txt"),
        (("--text", "short.txt", "--context", 100), "text: expected more tokens than the context of 100, got "),
        (("--text", "latin.txt"), "text: expected UTF-8 in latin.txt, got "),
        (("--context", 1), "context: expected at least 2 tokens, got 1"),
        (("--context", 2000), "context: expected at most the model's 1024 tokens, got 2000"),
        (("--windows", 0), "windows: expected at least 1, got 0"),
        (("--dense", "0,x"), "dense: expected numbers of layers between commas, got '0,x'"),
        (("--dense", "6"), "dense layers: expected some of the cached layers 0, 1, 2, 3, 4, 5, got 6"),
        (("--max-ppl-increase", -1), "max_ppl_increase: expected a percentage of at least 0, got -1.0"),
        (("--max-ppl-increase", "nan"), "max_ppl_increase: expected a percentage of at least 0, got nan"),
        (("--max-ppl-increase", "inf"), "max_ppl_increase: expected a percentage of at least 0, got inf"),
        (("--device", "tpu"), "device: expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("def f(x):\n    return x\n", encoding="utf-8")
    Path("latin.txt").write_bytes("é".encode("latin-1") * 9)
    result = invoke(MODEL, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}"), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTry another day."), "OutOfMemoryError: CUDA out of memory."),
        (MemoryError(), "MemoryError"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (RuntimeError("a kernel\nfailed"), "RuntimeError: a kernel"),
        (EOFError(), "EOFError"),
        (SystemExit(0), "SystemExit: 0"),
        (BrokenPipeError(32, "Broken pipe"), r"\[Errno 32\] Broken pipe"),
    ],
)
def test_whatever_raises_is_no_measurement(
    verify_text: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    result = invoke(MODEL, "--text", verify_text, *SHORT)
    assert result.exit_code == 2
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


def test_without_the_extra_nothing_was_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_missing", "typer")
    monkeypatch.setattr(sys, "argv", ["turboquant", "verify", "x"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "pip install turboquant-vllm[cli]" in capsys.readouterr().err


# What is written


def unused(*_: object, **__: object) -> Any:
    raise AssertionError("a long run before anybody looked whether its result can be written")


@pytest.mark.parametrize(("name", "reason"), [("file/x.json", "ot a directory|File exists"), ("folder", "Is a directory")])
def test_a_result_that_cannot_be_written_is_found_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(verify, "run_verify", unused)
    result = invoke(MODEL, "--json", tmp_path / name)
    assert result.exit_code == 2
    assert re.fullmatch(rf"error: .*({reason}).*\n", result.stderr), result.stderr


def test_a_run_that_fails_leaves_the_earlier_result(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for name in ("old.json", "new/new.json"):
        assert invoke("nowhere/at/all", "--json", tmp_path / name).exit_code == 2
    assert (tmp_path / "old.json").read_text() == "old"
    assert not (tmp_path / "new" / "new.json").exists()


def test_what_was_measured_is_not_lost_with_the_file(verify_figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: verify_figures)
    result = invoke(MODEL, "--json", "/dev/full")
    assert result.exit_code == 2
    assert result.stderr == "error: [Errno 28] No space left on device\n"
    assert "recommendation" in result.stdout


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("there", [True, False])
def test_a_reader_who_left_changes_neither_file_nor_status(
    verify_figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool, status: int, there: bool
) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: {**verify_figures, "passed": passed})
    with open(write, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed if there else None)
        arguments = ["verify", str(MODEL), "--json", str(tmp_path / "verify.json")]
        assert cli._application()(arguments, standalone_mode=False) == status
    assert json.loads((tmp_path / "verify.json").read_text())["kl"] == verify_figures["kl"]


def test_names_and_terminals_need_not_be_ascii(
    verify_figures: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name in letters that the terminal has not, and one in bytes that are no letters at all, with a code for an emoji."""
    name = "modèle-模型-\udce9 :smile: [red]"
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: {**verify_figures, "model": name})
    monkeypatch.setattr(sys, "argv", ["turboquant", "verify", name, "--json", str(tmp_path / "résultat.json")])
    monkeypatch.setenv("COLUMNS", "300")
    for encoding, expected in (("ascii", r"mod\xe8le-\u6a21\u578b-\udce9 :smile: [red]"), ("utf-8", r"modèle-模型-\udce9 :s")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        assert expected in written.getvalue().decode(encoding)
    assert json.loads((tmp_path / "résultat.json").read_text(encoding="utf-8"))["model"] == name


def test_standard_output_that_cannot_be_written_is_an_error(
    verify_figures: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "run_verify", lambda *_, **__: verify_figures)
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli._application()(["verify", str(MODEL)], standalone_mode=False) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
