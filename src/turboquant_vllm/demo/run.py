"""Run the packaged model on held-out text, with exact attention and with 4-bit keys and values, and compare."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.demo import report
from turboquant_vllm.demo.attention import codec_for
from turboquant_vllm.demo.compare import compare, compare_formats, continue_prompt, held_out_windows, load
from turboquant_vllm.demo.figure import draw
from turboquant_vllm.demo.output import accept_any_text, check_writable, make_console, one_line, printing

MODEL = Path(__file__).parent / "model"
DEFAULT_WINDOWS = 32

_NEEDED = ("transformers", "tokenizers", "matplotlib", "rich")
_FIGURES, _FIGURE = "demo.json", "demo.png"
_PROMPT, _CONTINUATION = 96, 48  # tokens
_FORMAT_WINDOWS = 4


def check_extras() -> None:
    """Raise ImportError, naming the extras to install, when a package that only the demo needs is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}: pip install turboquant-vllm[hf,cli]")


def pick_device(device: str) -> torch.device:
    """The device to run on: "auto" takes a CUDA device when there is one.

    Raises:
        ValueError: `device` is none of "auto", "cpu", "cuda", or there is no CUDA device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected 'auto', 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a device that is there, got 'cuda' and PyTorch sees none")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def run_demo(out: Path, device: str = "auto", windows: int = DEFAULT_WINDOWS, model: Path = MODEL) -> dict[str, Any]:
    """Compare exact attention with TQ4 attention, and formats: print tables, write `demo.png` and `demo.json` into `out`.

    The text is the test split of the running interpreter's standard library, see `turboquant_vllm.demo.text`.

    Args:
        out: folder to write, created if missing.
        device: "auto", "cpu" (float32) or "cuda" (bfloat16).
        windows: how many windows of the model's context length to read, spread evenly over the text; at most all.
        model: folder of a model made by `examples/small_model/train.py`.

    Returns:
        What `demo.json` holds. Perplexities are per token, errors relative, `seconds` the wall-clock time.

    Raises:
        ImportError: a package of the extras "hf" and "cli" is missing.
        ValueError: `device` or `windows` is none that can be used.
        FileNotFoundError: there is no model in `model`, or this Python ships without its sources.
        OSError: `out` cannot be written.
    """
    check_extras()
    target = pick_device(device)
    if windows < 1:
        raise ValueError(f"windows: expected at least 1, got {windows}")
    import transformers

    start = time.perf_counter()
    for name in (_FIGURES, _FIGURE):
        check_writable(out / name)
    with report.progress_bar(make_console()) as progress:
        task = progress.add_task("loading", total=None)
        tokenizer, exact, quantised = load(model, target)
        text = held_out_windows(tokenizer, exact.config.max_position_embeddings, windows)
        progress.update(task, description="reading held-out text", total=len(text))
        measured, observer = compare(exact, quantised, text.to(target), lambda: progress.advance(task))
        some = text[torch.linspace(0, len(text) - 1, min(_FORMAT_WINDOWS, len(text))).long()].to(target)
        progress.reset(task, description="comparing formats", total=3 * len(some))
        formats = compare_formats(exact, some, lambda: progress.advance(task))
        progress.update(task, description="continuing a prompt", total=None)
        continuation = continue_prompt(exact, quantised, tokenizer, text[len(text) // 2], _PROMPT, _CONTINUATION)
    figures = {
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else "CPU",
        "dtype": str(exact.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **measured,
        "formats": formats,
        "format_windows": len(some),
        "continuation": continuation,
        "seconds": round(time.perf_counter() - start, 1),
    }
    (out / _FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    memory, perplexity = figures["bytes_per_token"], figures["perplexity"]
    title = (
        f"Key/value cache: {memory['bf16']:,} bytes per token in bf16, {memory['tq4']:,.0f} in TQ4."
        f"  Perplexity: {perplexity['exact']:.3f} exact, {perplexity['tq4']:.3f} in TQ4."
    )
    codec = codec_for(figures["head_dim"], target)
    draw(out / _FIGURE, figures["attention_error"], observer.histogram, observer.limit, codec, figures["formats"], title)
    with printing() as console:
        report.print_report(console, figures)
        console.print(f"wrote {out / _FIGURE} and {out / _FIGURES}")
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Command line of `python -m turboquant_vllm.demo`."""
    parser = argparse.ArgumentParser(prog="python -m turboquant_vllm.demo", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--windows", type=int, default=DEFAULT_WINDOWS, help="windows of held-out text (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write (%(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of another model made by train.py")
    accept_any_text()
    options = parser.parse_args(arguments)
    try:
        run_demo(options.out, options.device, options.windows, options.model)
    except Exception as error:
        sys.exit(f"error: {one_line(error)}")
