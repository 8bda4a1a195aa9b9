"""The command line: `turboquant info`, `doctor`, `demo`, `verify`, `calibrate` and `bench`; needs the extra `cli`."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch

import turboquant_vllm
from turboquant_vllm.attention import BACKENDS, choose_backend, why_not
from turboquant_vllm.checks import AttentionShape
from turboquant_vllm.demo.output import accept_any_text, check_writable, forget, one_line, printing

_missing: str | None = None
try:
    import typer
    from rich.table import Table
except ModuleNotFoundError as error:
    _missing = error.name

__all__ = ["main"]

# One new token of one sequence in a cache of 4096, at the sizes of a common model.
_DECODE = AttentionShape(batch=1, num_heads=32, num_kv_heads=8, q_len=1, kv_len=4096, head_dim=128)
_DTYPE = torch.float16
_NO_MEASUREMENT = 2  # exit status of `verify`, whose 1 says that a model loses too much
_PACKAGES = ("torch", "triton", "cuda-core", "transformers")


def main() -> None:
    """Entry point of `turboquant` and of `python -m turboquant_vllm`."""
    accept_any_text()
    if _missing is not None:
        print(f"turboquant: the command line needs {_missing}: pip install turboquant-vllm[cli]", file=sys.stderr)
        sys.exit(_NO_MEASUREMENT if sys.argv[1:2] == ["verify"] else 1)
    _application()()


def _application() -> typer.Typer:
    app = typer.Typer(
        help="4-bit key/value caches with attention that reads them directly.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(info)
    app.command()(doctor)
    app.command()(demo)
    app.command()(verify)
    app.command()(calibrate)
    app.command()(bench)
    return app


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, devices, and which backend serves a typical decode on each device, and why no other."""
    found_versions, found_devices = _versions(), [_describe(device) for device in _devices()]
    with printing() as console:
        if as_json:
            call = {**asdict(_DECODE), "dtype": str(_DTYPE).removeprefix("torch.")}
            print(json.dumps({"versions": found_versions, "call": call, "devices": found_devices}, indent=2))
            return
        versions = Table("package", "version")
        for name, version in found_versions.items():
            versions.add_row(name, version or "not installed")
        console.print(versions)
        console.print(
            f"\nDecoding {_DECODE.q_len} token against {_DECODE.kv_len}, {_DECODE.num_heads} heads over "
            f"{_DECODE.num_kv_heads}, head_dim {_DECODE.head_dim}, {_DTYPE}:"
        )
        backends = Table("device", "backend", "")
        for device in found_devices:
            backends.add_section()
            first = f"{device['device']}: {device['name']}"
            for name, reason in {device["auto"]: "picked", **device["not_picked"]}.items():
                backends.add_row(first, name, reason)
                first = ""
        console.print(backends)


def doctor(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name on the hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with MODEL.")] = False,
) -> None:
    """Say what of a model will be kept in 4 bits, by which kernels, and what stays dense or is refused, and why.

    Reads the model's configuration and what is installed, and loads nothing. Exit status: 0 if some of its layers will be kept
    in 4 bits, 1 if none, or if nothing could be found out.
    """
    with _one_line_for_errors(1):
        from turboquant_vllm.doctor import print_report, run_doctor

        found = run_doctor(model, device=device, trust_remote_code=trust_remote_code)
        with printing() as console:
            if as_json:
                print(json.dumps(found, indent=2))
            else:
                print_report(console, found)
    raise typer.Exit(0 if found["served"] else 1)


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("demo-out"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    windows: Annotated[int | None, typer.Option(help="Windows of held-out text to read.")] = None,
) -> None:
    """Read held-out text with a small trained model, its cache exact and in 4 bits, and compare."""
    from turboquant_vllm.demo import run_demo

    with _one_line_for_errors(1):
        run_demo(out, device) if windows is None else run_demo(out, device, windows)


def verify(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name on the hub.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to read; default: Python's standard library.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens read at a time; default: the model's, at most 2048.")] = None,
    windows: Annotated[int | None, typer.Option(help="How many times CONTEXT tokens to read.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File to write everything measured to.")] = None,
    max_ppl_increase: Annotated[float, typer.Option(help="Largest acceptable increase of the perplexity, percent.")] = 1.0,
    dense: Annotated[str, typer.Option(help="Layers to leave exact, such as 0,1,31.")] = "",
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="plain, offsets or tq4; default: all. Repeatable.")
    ] = None,
    scales: Annotated[
        Path | None, typer.Option(help="File of turboquant calibrate; default: in MODEL, or its weights.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the codec's rotation.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with MODEL.")] = False,
) -> None:
    """Read a text with a model, its cache exact and in formats of 4 bits, and say which is good enough.

    Exit status: 0 if in one of them the perplexity rises by at most --max-ppl-increase, 1 if in all by more, 2 if nothing could
    be measured.
    """
    with _one_line_for_errors(_NO_MEASUREMENT):
        from turboquant_vllm.verify import report, run_verify

        if json_out is not None:
            check_writable(json_out)
        with report.shown_progress() as progress:
            figures = run_verify(
                model,
                text,
                context,
                max_ppl_increase=max_ppl_increase,
                dense_layers=_layers(dense),
                count=windows,
                device=device,
                seed=seed,
                trust_remote_code=trust_remote_code,
                formats=formats or (),
                key_scales=scales,
                progress=progress,
            )
        unwritten: OSError | None = None
        if json_out is not None:
            try:
                json_out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            except OSError as error:  # what took minutes to measure is printed all the same
                unwritten = error
        with printing() as console:
            report.print_report(console, figures)
        if unwritten is not None:
            raise unwritten
    raise typer.Exit(0 if figures["passed"] else 1)


def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face model, or its name on the hub.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to read; default: Python's documentation and library.")] = None,
    out: Annotated[Path | None, typer.Option(help="File; default: turboquant.safetensors in the model's folder.")] = None,
    from_weights: Annotated[bool, typer.Option("--from-weights", help="Read no text: seconds, but less good.")] = False,
    context: Annotated[int | None, typer.Option(help="Tokens read at a time; default: the model's, at most 2048.")] = None,
    windows: Annotated[int | None, typer.Option(help="How many times CONTEXT tokens to read.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with MODEL.")] = False,
) -> None:
    """Measure the channel scales with which a model's keys lose least in 4 bits, and write them to a file.

    Caches and the vLLM plugin find the file in the model's folder, or take its path. Exit status 2: nothing was written.
    """
    with _one_line_for_errors(_NO_MEASUREMENT):
        from turboquant_vllm.verify import report, run_calibrate

        with report.shown_progress() as progress:
            found = run_calibrate(
                model,
                text,
                out,
                from_weights=from_weights,
                context=context,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=progress,
                **({} if windows is None else {"count": windows}),
            )
        read = f"{found['tokens']:,} tokens of {found['source']}" if found["tokens"] else "the weights"
        with printing():
            span = f"{found['smallest']:.3g} to {found['largest']:.3g}"
            layers = f"{found['layers']} layers of {found['kv_heads']} x {found['head_dim']}"
            print(f"{found['out']}: scales from {span} for {layers}, from {read}, in {found['seconds']} s")


def bench(
    part: Annotated[str, typer.Argument(help="decode, prefill, paged, store, hf, vllm, quality or all.")] = "all",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases, less time for each.")] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="File to write everything measured to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder to write plots to.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Measure this library against what else is at hand, on this machine; on a CPU with small sizes.

    Each answer is checked before it is timed. Exit status: 0, 1 if an answer was wrong, 2 if nothing could be measured.
    """
    with _one_line_for_errors(_NO_MEASUREMENT):
        from turboquant_vllm.bench import plot as plot_rows
        from turboquant_vllm.bench import print_rows, run_bench
        from turboquant_vllm.bench.machine import write_results
        from turboquant_vllm.verify import report

        if json_out is not None:
            check_writable(json_out)
        with report.shown_progress() as progress:
            found = run_bench(part, quick=quick, device=device, progress=lambda doing: progress(doing, 0))
        if json_out is not None:
            write_results(json_out, found["environment"], found["rows"])
        with printing() as console:
            print_rows(console, found)
            if plot is not None:
                for path in plot_rows(found, plot):
                    print(path)
        if not found["rows"] and not found["failed"]:
            raise LookupError("; ".join(f"{name}: {reason}" for name, reason in found["left_out"].items()))
    raise typer.Exit(1 if found["failed"] else 0)


def _layers(dense: str) -> list[int]:
    try:
        return [int(name) for name in dense.split(",") if name.strip()]
    except ValueError:
        raise ValueError(f"dense: expected numbers of layers between commas, got {dense!r}") from None


@contextmanager
def _one_line_for_errors(status: int) -> Iterator[None]:
    """Whatever goes wrong within the block, in code of the model's own, too, is a line on standard error and this status."""
    try:
        yield
    except (Exception, SystemExit) as error:
        _fail(one_line(error), status)


def _fail(message: str, status: int) -> NoReturn:
    try:
        typer.echo(f"error: {message}", err=True)
    except OSError:
        forget(sys.stderr)
    raise typer.Exit(status)


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
