"""The command line: `turboquant info`, `turboquant demo` and `turboquant verify`; needs the extra `cli`."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch

import turboquant_vllm
from turboquant_vllm.attention import BACKENDS, choose_backend, why_not
from turboquant_vllm.checks import AttentionShape

_missing: str | None = None
try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    _missing = error.name

__all__ = ["main"]

# One new token of one sequence in a cache of 4096, at the sizes of a common model.
_DECODE = AttentionShape(batch=1, num_heads=32, num_kv_heads=8, q_len=1, kv_len=4096, head_dim=128)
_DTYPE = torch.float16
_PACKAGES = ("torch", "triton", "cuda-core", "transformers")


def main() -> None:
    """Entry point of `turboquant` and of `python -m turboquant_vllm`."""
    if _missing is not None:
        sys.exit(f"turboquant: the command line needs {_missing}: pip install turboquant-vllm[cli]")
    _application()()


def _application() -> typer.Typer:
    app = typer.Typer(
        help="4-bit key/value caches with attention that reads them directly.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(info)
    app.command()(demo)
    app.command()(verify)
    return app


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices, and which backend serves a typical decode on each device, and why no other."""
    found_versions, found_devices = _versions(), [_describe(device) for device in _devices()]
    if as_json:
        call = {**asdict(_DECODE), "dtype": str(_DTYPE).removeprefix("torch.")}
        print(json.dumps({"versions": found_versions, "call": call, "devices": found_devices}, indent=2))
        return
    console = Console(markup=False, highlight=False)
    versions = Table("package", "version")
    for name, version in found_versions.items():
        versions.add_row(name, version or "not installed")
    console.print(versions)
    console.print(
        f"\nDecoding {_DECODE.q_len} token against {_DECODE.kv_len}, {_DECODE.num_heads} heads over {_DECODE.num_kv_heads}, "
        f"head_dim {_DECODE.head_dim}, {_DTYPE}:"
    )
    backends = Table("device", "backend", "")
    for device in found_devices:
        backends.add_section()
        first = f"{device['device']}: {device['name']}"
        for name, reason in {device["auto"]: "picked", **device["not_picked"]}.items():
            backends.add_row(first, name, reason)
            first = ""
    console.print(backends)


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo-out"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    windows: Annotated[int | None, typer.Option(help="Windows of held-out text to read.")] = None,
) -> None:
    """Read held-out text with a small trained model, its cache exact and in 4 bits, and compare."""
    from turboquant_vllm.demo import run_demo

    try:
        run_demo(out, device) if windows is None else run_demo(out, device, windows)
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def verify(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name on the hub.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to read; default: Python's standard library.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens read at a time; default: the model's, at most 2048.")] = None,
    windows: Annotated[int | None, typer.Option(help="How many times CONTEXT tokens to read.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File to write everything measured to.")] = None,
    max_ppl_increase: Annotated[float, typer.Option(help="Largest acceptable increase of the perplexity, percent.")] = 1.0,
    dense: Annotated[str, typer.Option(help="Layers to leave exact, such as 0,1,31.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the codec's rotation.")] = 0,
) -> None:
    """Read a text with a model, its cache exact and in 4 bits, and say whether 4 bits are good enough.

    Exit status: 0 if the perplexity rises by at most --max-ppl-increase, 1 if by more, 2 if nothing could be measured.
    """
    from turboquant_vllm.verify import report, run_verify

    try:
        layers = [int(name) for name in dense.split(",") if name.strip()]
    except ValueError:
        _fail(f"dense: expected numbers of layers between commas, got {dense!r}")
    options = {} if windows is None else {"count": windows}
    try:
        with report.shown_progress() as progress:
            figures = run_verify(
                model,
                text,
                context,
                max_ppl_increase=max_ppl_increase,
                dense_layers=layers,
                device=device,
                seed=seed,
                progress=progress,
                **options,
            )
        report.print_report(Console(markup=False, highlight=False), figures)
        if json_out is not None:
            json_out.parent.mkdir(parents=True, exist_ok=True)
            json_out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except (ImportError, OSError, ValueError) as error:
        _fail(str(error))
    raise typer.Exit(0 if figures["passed"] else 1)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"turboquant_vllm": turboquant_vllm.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    versions["Python"] = platform.python_version()
    return versions


def _devices() -> list[torch.device]:
    counts = {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count()}
    return [torch.device("cpu"), *(torch.device(kind, i) for kind, count in counts.items() for i in range(count))]


def _describe(device: torch.device) -> dict[str, Any]:
    """The device's name, the backend that "auto" takes for the typical decode, and what speaks against each other one."""
    q = torch.empty((_DECODE.batch, _DECODE.num_heads, _DECODE.q_len, _DECODE.head_dim), dtype=_DTYPE, device=device)
    picked, _ = choose_backend(q, _DECODE)
    reasons = {name: why_not(name, device, _DTYPE, _DECODE) for name in BACKENDS if name != picked}
    not_picked = {name: reason or f"can run, but {picked} is preferred" for name, reason in reasons.items()}
    return {"device": str(device), "name": _name(device), "auto": picked, "not_picked": not_picked}


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return platform.machine()
    return str(getattr(torch, device.type).get_device_name(device))
