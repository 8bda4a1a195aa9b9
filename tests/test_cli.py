"""The command line: what `turboquant info` says, that `turboquant demo` runs the demo, and life without typer."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

import turboquant_vllm
from turboquant_vllm import attention, cli, demo

runner = CliRunner()


def invoke(*arguments: str) -> Any:
    return runner.invoke(cli._application(), list(arguments))


def test_info_as_json() -> None:
    result = invoke("info", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert set(found["versions"]) == {"turboquant_vllm", "torch", "triton", "cuda-core", "transformers", "Python"}
    assert found["versions"]["turboquant_vllm"] == turboquant_vllm.__version__
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["versions"]["Python"] == platform.python_version()
    assert (found["call"]["head_dim"], found["call"]["q_len"], found["call"]["dtype"]) == (128, 1, "float16")
    assert len(found["devices"]) == 1 + torch.cuda.device_count() + torch.xpu.device_count()
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["auto"]) == ("cpu", "reference")
    for device in found["devices"]:
        assert set(device["not_picked"]) == set(attention.BACKENDS) - {device["auto"]}
        assert all(device["not_picked"].values())


@pytest.mark.gpu
def test_info_picks_a_kernel_on_a_gpu() -> None:
    device = json.loads(invoke("info", "--json").stdout)["devices"][1]
    assert device["device"] == "cuda:0"
    assert device["name"] == torch.cuda.get_device_name(0)
    assert device["auto"] != "reference"
    assert device["not_picked"]["reference"] == f"can run, but {device['auto']} is preferred"


def test_info_as_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = invoke("info")
    assert result.exit_code == 0
    for text in (turboquant_vllm.__version__, torch.__version__, "head_dim 128", "cpu:", "reference", "picked"):
        assert text in result.stdout
    for name in attention.BACKENDS:
        assert name in result.stdout
        assert attention.why_not(name, torch.device("cpu"), torch.float16, cli._DECODE) in result.stdout


def test_info_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_PACKAGES", ("torch", "a-package-that-does-not-exist"))
    assert json.loads(invoke("info", "--json").stdout)["versions"]["a-package-that-does-not-exist"] is None
    assert "not installed" in invoke("info").stdout


def test_info_takes_whatever_backends_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"new": "", "newer [beta]": "needs a newer card", "reference": ""}
    for module in (attention, cli):
        monkeypatch.setattr(module, "BACKENDS", tuple(reasons))
        monkeypatch.setattr(module, "why_not", lambda name, *_: reasons[name])
    monkeypatch.setenv("COLUMNS", "200")
    cpu = json.loads(invoke("info", "--json").stdout)["devices"][0]
    assert cpu["auto"] == "new"
    assert cpu["not_picked"] == {"newer [beta]": "needs a newer card", "reference": "can run, but new is preferred"}
    assert "newer [beta]" in invoke("info").stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (Path("demo-out"), "auto")),
        (["--out", "here", "--device", "cpu"], (Path("here"), "cpu")),
        (["--windows", "3"], (Path("demo-out"), "auto", 3)),
    ],
)
def test_demo_calls_run_demo(monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: tuple[Any, ...]) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(demo, "run_demo", lambda *given: calls.append(given))
    assert invoke("demo", *arguments).exit_code == 0
    assert calls == [expected]


@pytest.mark.parametrize("error", [ImportError, ValueError, FileNotFoundError, PermissionError, RuntimeError, MemoryError])
def test_demo_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(*_: object) -> None:
        raise error("no such thing\nand more of it")

    monkeypatch.setattr(demo, "run_demo", fail)
    result = invoke("demo")
    assert result.exit_code == 1
    kind = "" if issubclass(error, (ImportError, ValueError, OSError)) else f"{error.__name__}: "
    assert result.stderr == f"error: {kind}no such thing\n"


@pytest.mark.parametrize("name", ["demo.json", "demo.png"])
def test_demo_finds_out_first_that_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def never(*_: object) -> None:
        raise AssertionError("loaded a model")

    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("turboquant_vllm.demo.run.load", never)
    (tmp_path / name).mkdir()
    result = invoke("demo", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: [Errno 21] Is a directory")


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]])
def test_a_reader_who_left_is_no_failure(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert not cli._application()(arguments, standalone_mode=False)


def test_demo_refuses_a_device_that_is_none() -> None:
    result = invoke("demo", "--device", "tpu")
    assert result.exit_code == 1
    assert "'tpu'" in result.stderr


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from turboquant_vllm.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", program, "info"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert "pip install turboquant-vllm[cli]" in run.stderr
    assert missing in run.stderr


def test_module_and_script_are_the_same_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "turboquant_vllm", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == json.loads(invoke("info", "--json").stdout)
    scripts = metadata.entry_points(group="console_scripts", name="turboquant")
    assert [script.load() for script in scripts] == [cli.main]
