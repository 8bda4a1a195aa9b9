"""Measure a model's channel scales and write them to a file: `turboquant calibrate MODEL`, or `run_calibrate`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.calibration import FILE_NAME, save_key_scales
from turboquant_vllm.demo.output import check_writable
from turboquant_vllm.demo.run import pick_device
from turboquant_vllm.demo.text import gather
from turboquant_vllm.quality.attention import Model
from turboquant_vllm.verify.loading import check_tokens, load
from turboquant_vllm.verify.run import Progress
from turboquant_vllm.verify.text import longest_context, read_text, token_windows
from turboquant_vllm.weights import index_weights, key_scales_from_safetensors

__all__ = ["DEFAULT_CONTEXT", "DEFAULT_WINDOWS", "default_text", "run_calibrate"]

DEFAULT_CONTEXT = 2048
DEFAULT_WINDOWS = 2
_PIECE = 4000  # characters of prose, then of a program


def run_calibrate(
    model: str,
    text: Path | None = None,
    out: Path | None = None,
    *,
    from_weights: bool = False,
    context: int | None = None,
    count: int = DEFAULT_WINDOWS,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress = lambda doing, steps: None,
) -> dict[str, Any]:
    """Write the channel scales of a model's keys to a file.

    Args:
        model: folder of a transformers causal language model, or its name on the Hugging Face hub.
        text: UTF-8 file to read; None takes :func:`default_text`.
        out: file to write; None writes "turboquant.safetensors" into the model's folder, where caches and vLLM find it, or,
            for a model on the hub, into the current one. Beside weights in one file it comes with their index, without which
            vLLM would take it for weights.
        from_weights: read no text; the scales are less good, and caches find them without a file.
        context: tokens read at a time; None takes the model's longest, at most 2048.
        count: windows of ``context`` tokens to read, spread evenly over the text.
        device: "auto", "cpu" (float32) or "cuda" (bfloat16).
        trust_remote_code: run code that comes with the model.
        progress: told of what is done.

    Returns:
        A dictionary that JSON can hold: "out", "source", "layers", "kv_heads", "head_dim", "smallest" and "largest" scale,
        "tokens" read, "seconds".

    Raises:
        ImportError: a package of the extra "hf" is missing.
        FileNotFoundError: there is no such model or text.
        OSError: the file cannot be written.
        ValueError: the model's keys cannot be kept in 4 bits, or are not finite; the text is shorter than the context; an
            argument is out of its range.
    """
    if count < 1:
        raise ValueError(f"windows: expected at least 1, got {count}")
    if from_weights and text is not None:
        raise ValueError(f"text: expected none with from_weights, got {text}")
    start = time.perf_counter()
    progress("loading", 0)
    if out is None:
        folder = Path(model).expanduser()
        out = folder / FILE_NAME if folder.is_dir() else Path(FILE_NAME)
    check_writable(out)
    tokens = 0
    content: str | None = None
    if from_weights:
        scales, config = _from_weights(model, trust_remote_code)
        source = "weights"
    else:
        if text is None:
            content, source = default_text(), "Python's documentation and library"
        else:
            content, source = read_text(text), text.name
        tokenizer, loaded, _ = load(model, pick_device(device), trust_remote_code=trust_remote_code)
        config = loaded.config
        windows = token_windows(tokenizer, content, source, longest_context(config, context, DEFAULT_CONTEXT), count)[:, :-1]
        check_tokens(loaded, windows)
        tokens = windows.numel()
        progress("reading", len(windows))
        scales = _measured(loaded, windows, progress)
    if not scales:
        raise ValueError(f"model: expected one with a cache of keys, {model} has none")
    save_key_scales(out, scales, config, source=source, text=None if content is None else content.encode())
    if out.name == FILE_NAME:
        index_weights(out.parent)
    every = torch.cat([w.flatten() for w in scales.values()])
    heads, dim = next(iter(scales.values())).shape
    return {
        "out": str(out),
        "source": source,
        "layers": len(scales),
        "kv_heads": heads,
        "head_dim": dim,
        "smallest": every.min().item(),
        "largest": every.max().item(),
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
    }


def default_text() -> str:
    """Prose and programs in turns, from what comes with Python: the topics of its documentation, and modules of its library.

    Only modules that `turboquant verify` does not read by default. Where Python comes without its documentation, modules alone.
    """
    programs = "\n".join(document.text for document in gather()["train"])
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return programs
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    together = zip_longest(_pieces(prose), _pieces(programs[: len(prose)]), fillvalue="")
    return "\n".join(chain.from_iterable(together))


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def _measured(model: Model, windows: torch.Tensor, progress: Progress) -> dict[int, torch.Tensor]:
    from turboquant_vllm.hf.calibration import measure_key_scales

    return measure_key_scales(model, windows.to(model.device), lambda: progress(None, 1))


def _from_weights(model: str, trust_remote_code: bool) -> tuple[dict[int, torch.Tensor], Any]:
    """Scales and configuration: of a folder from its safetensors files, else of the model, loaded."""
    from transformers import AutoConfig

    from turboquant_vllm.hf.calibration import key_scales_from_model

    folder = Path(model).expanduser()
    if (folder / "config.json").is_file() and any(path.name != FILE_NAME for path in folder.glob("*.safetensors")):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return key_scales_from_safetensors(folder, config), config
    loaded = load(model, torch.device("cpu"), trust_remote_code=trust_remote_code).model
    return key_scales_from_model(loaded), loaded.config
