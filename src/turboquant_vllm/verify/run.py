"""Are 4 bits good enough for this model? What it says about a text with an exact cache and with caches in 4 bits, and why.

`turboquant verify MODEL` prints this; `run_verify` returns it. The model reads the text through the very caches that it would
run with: all tokens of a window in one call, each of which sees all others as the cache returns them.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Collection, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import turboquant_vllm
from turboquant_vllm.demo.run import pick_device
from turboquant_vllm.demo.text import gather
from turboquant_vllm.quality.attention import Model, cached_logits
from turboquant_vllm.quality.caches import CacheFormat, KeyScales, choose_formats, known_formats
from turboquant_vllm.quality.measure import bootstrap_interval, compare_many, losses, perplexity
from turboquant_vllm.verify.layers import layer_divergences, layer_errors
from turboquant_vllm.verify.loading import CachedLayers, check_cache, check_tokens, load
from turboquant_vllm.verify.text import longest_context, read_text, token_windows

__all__ = ["DEFAULT_CONTEXT", "DEFAULT_WINDOWS", "Progress", "run_verify"]

DEFAULT_CONTEXT = 2048
DEFAULT_WINDOWS = {"cpu": 3, "cuda": 16}  # 280 s of CPU time for a model of 135 M parameters, 150 s on two cores
_LAYER_TOKENS = 256  # read once for each layer
_TRIES = 2  # passes over the whole text for the recommendation
_ERRORS = {"key": "keys", "value": "values", "attention": "attention"}
_SAME_SIZE = 1.1  # caches that differ by less than a tenth are told apart by what they lose

# What is done now, in words, and how many steps it has; then None for each step.
Progress = Callable[[str | None, int], None]


def run_verify(
    model: str,
    text: Path | None = None,
    context: int | None = None,
    *,
    max_ppl_increase: float = 1.0,
    dense_layers: Collection[int] = (),
    count: int | None = None,
    device: str = "auto",
    seed: int = 0,
    formats: Collection[str] | Sequence[CacheFormat] = (),
    key_scales: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda doing, steps: None,
) -> dict[str, Any]:
    """Compare a model's exact cache with caches in other formats on a text.

    Args:
        model: folder of a transformers causal language model, or its name on the Hugging Face hub.
        text: UTF-8 file to read; None reads modules of Python's standard library.
        context: tokens read at a time; None takes the model's longest, at most 2048.
        max_ppl_increase: the largest acceptable increase of the perplexity, in percent.
        dense_layers: layers whose cache stays exact.
        count: windows of ``context`` tokens to read, spread evenly over the text; None: 3 on a CPU, else 16.
        device: "auto", "cpu" (float32) or "cuda" (bfloat16).
        seed: of the codecs' rotations.
        formats: to compare; names of some of :func:`known_formats`, none for all of them, or formats of one's own.
        key_scales: file of `turboquant calibrate`; None: the one in the model's folder, or scales from its weights.
        trust_remote_code: run Python code that comes with the model.
        progress: told of what is done.

    Returns:
        A dictionary that JSON can hold. "formats" has a row for each format: the perplexity, its increase in percent, each with
        a 95 % bootstrap interval, "kl" in nats and "tvd" (total variation distance) of the next-token distributions, means over
        all tokens, "agreement" (the share of tokens where both find the same one most likely), "bytes_per_token", and
        "within_limit": whether the increase is at most ``max_ppl_increase``. "format" names the one to use, and the same
        figures stand for it outside of the rows. "layers" has the relative errors of its keys, values and attention outputs,
        "contributors" each layer's share of the divergence, largest first, both from the first 256 tokens. "passed" is that
        format's "within_limit"; "recommendation" says which layers to leave exact, and as "cache" the Python that makes it.

    Raises:
        ImportError: a package of the extra "hf" is missing.
        FileNotFoundError: there is no such model or text.
        ValueError: the model cannot be loaded, or has no cache of keys and values that `TurboQuantCache` would keep in 4 bits;
            the text is shorter than the context; the model gives NaN; the file has the scales of another model; or an argument
            is out of its range.
    """
    if count is not None and count < 1:
        raise ValueError(f"windows: expected at least 1, got {count}")
    if not 0 <= max_ppl_increase < math.inf:
        raise ValueError(f"max_ppl_increase: expected a percentage of at least 0, got {max_ppl_increase}")
    compared = choose_formats(known_formats(seed, KeyScales(key_scales)), formats)
    start = time.perf_counter()
    progress("loading", 0)
    tokenizer, loaded, unused = load(model, pick_device(device), trust_remote_code=trust_remote_code)
    layers = check_cache(loaded, model, dense_layers)
    if unknown := sorted(set(dense_layers) - layers.packed.keys()):
        raise ValueError(f"dense layers: expected some of the cached {_span(layers.packed)}, got {unknown[0]}")
    source = next((known.key_scales.source(loaded) for known in compared if known.key_scales), None)  # looked up before any run
    context = longest_context(loaded.config, context, DEFAULT_CONTEXT)
    read = _windows(tokenizer, text, context, count or DEFAULT_WINDOWS[loaded.device.type])
    check_tokens(loaded, read)

    passes = _Passes(loaded, read.to(loaded.device), layers, frozenset(dense_layers), progress)
    exact, rows = passes.rows(model, compared, max_ppl_increase)
    best = to_use(rows)
    chosen = compared[rows.index(best)]
    errors, contributions = passes.by_layer(chosen)
    advice = passes.recommend(chosen, exact, best["increase_percent"], contributions, max_ppl_increase)
    measured = ("increase_percent", "increase_percent_interval", "kl", "tvd", "agreement")
    return {
        "model": model,
        "unused_weights": unused,
        "text": str(text) if text else "Python standard library, modules held out from the demo's training",
        "device": torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "CPU",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": {
            "turboquant_vllm": turboquant_vllm.__version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
        "context": context,
        "windows": len(read),
        "tokens": exact.numel(),
        "seed": seed,
        "dense_layers": sorted(passes.kept),
        "key_scales": source,
        "formats": rows,
        "format": chosen.name,
        "perplexity": {"exact": perplexity(exact), "tq4": best["perplexity"]},
        "perplexity_interval": {"exact": [*bootstrap_interval(exact)], "tq4": best["perplexity_interval"]},
        **{name: best[name] for name in measured},
        "bytes_per_token": {"bf16": layers.bytes_per_token(chosen, layers.packed), "tq4": best["bytes_per_token"]},
        "cached_layers": len(layers.packed) + len(layers.dense),
        "always_dense_layers": sorted(layers.dense),
        "layers": [
            {"layer": layer, **{f"{name}_error": relative.get(layer) for name, relative in errors.items()}}
            for layer in sorted(layer for layer, _ in contributions)
        ],
        "contributors": [{"layer": layer, "kl_share": share} for layer, share in contributions],
        "max_ppl_increase": max_ppl_increase,
        "passed": best["within_limit"],
        "recommendation": advice | {"bytes_per_token": layers.bytes_per_token(chosen, advice["dense_layers"])},
        "seconds": round(time.perf_counter() - start, 1),
    }


class _Passes(NamedTuple):
    """Passes of a model over one text, some layers' caches exact in all of them."""

    model: Model
    windows: torch.Tensor  # [n, context + 1]
    layers: CachedLayers
    kept: frozenset[int]
    progress: Progress

    def rows(self, name: str, formats: Sequence[CacheFormat], limit: float) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Negative log-likelihoods with the exact cache, ``[windows, context]``, and the figures of each format."""
        self.progress(f"exact cache and {', '.join(known.title for known in formats)}", len(self.windows) * len(formats))
        others = [self._reader(known, self.kept) for known in formats]
        found = compare_many(self._reader(None), others, self.windows.split(1), lambda: self.progress(None, 1))
        rows = []
        for known, scores in zip(formats, found, strict=True):
            for title, values in (("an exact cache", scores.exact), (known.title, scores.other)):
                if not math.isfinite(perplexity(values)):
                    raise ValueError(f"model: expected finite likelihoods, {name} gives {values.sum().item()} with {title}")
            increase = 100 * scores.increase
            rows.append(
                {
                    "format": known.name,
                    "title": known.title,
                    "bytes_per_token": self.layers.bytes_per_token(known, self.kept),
                    "perplexity": perplexity(scores.other),
                    "perplexity_interval": [*bootstrap_interval(scores.other)],
                    "increase_percent": increase,
                    "increase_percent_interval": [100 * bound for bound in bootstrap_interval(scores.other, scores.exact)],
                    "kl": scores.kl.mean().item(),
                    "tvd": scores.tvd.mean().item(),
                    "agreement": scores.agrees.float().mean().item(),
                    "within_limit": increase <= limit,
                }
            )
        return found[0].exact, rows

    def by_layer(self, chosen: CacheFormat) -> tuple[dict[str, dict[int, float]], list[tuple[int, float]]]:
        """Relative errors of each layer that is not exact, and its share of the divergence, largest first."""
        packed = [layer for layer in sorted(self.layers.packed) if layer not in self.kept]
        ids = self.windows[:1, :-1][:, :_LAYER_TOKENS]
        self.progress("each layer by itself", len(packed))

        def make(dense: Collection[int]) -> Any:
            return chosen.make(self.model, {*self.kept, *dense})

        errors = layer_errors(self.model, ids, packed, make)
        parts = layer_divergences(self.model, ids, packed, make, lambda: self.progress(None, 1))
        whole = sum(parts.values())
        shares = {layer: part / whole if whole > 0 else 0.0 for layer, part in parts.items()}
        relative = {name: errors.relative(what) for name, what in _ERRORS.items()}
        return relative, sorted(shares.items(), key=lambda item: -item[1])

    def recommend(
        self, chosen: CacheFormat, exact: torch.Tensor, whole: float, contributions: list[tuple[int, float]], limit: float
    ) -> dict[str, Any]:
        """The fewest of the worst layers, half of them at most, whose exact caches keep the increase within ``limit`` %.

        How many it takes is read off their shares, tried, and read off once more with what the first ones saved.

        Args:
            chosen: the format.
            exact: negative log-likelihoods with the exact cache.
            whole: increase of the perplexity with no more than the kept layers exact, in percent.
            contributions: layers and their shares, largest first.
            limit: in percent.
        """
        order = [layer for layer, _ in contributions]
        saved = torch.tensor([0.0, *(share for _, share in contributions)], dtype=torch.float64).cumsum(0)
        most, number, increase = len(order) // 2, 0, whole
        per_share = whole
        for _ in range(_TRIES):
            if increase <= limit or number == most:
                break
            enough = (saved[: most + 1] * per_share >= whole - limit).nonzero()
            number = max(int(enough[0]), number + 1) if len(enough) else most
            increase = self._increase(chosen, {*self.kept, *order[:number]}, exact)
            per_share = (whole - increase) / max(saved[number].item(), 1e-9)
        tried, met = {*self.kept, *order[:number]}, increase <= limit
        if not met:
            still = f"{chosen.title} is still {increase:+.2f} %"
            text = f"not for this text: with {_span(tried) if tried else 'no layer'} exact {still}"
        else:
            text = f"all layers that can be in {chosen.title}" if self.layers.dense else f"all layers in {chosen.title}"
            text += f" but {_span(tried)}" if tried else ""
        return {
            "format": chosen.name,
            "cache": chosen.call and chosen.call(tried),
            "text": text,
            "dense_layers": sorted(tried),
            "increase_percent": increase,
            "within_limit": met,
        }

    @torch.inference_mode()
    def _increase(self, chosen: CacheFormat, dense: Collection[int], exact: torch.Tensor) -> float:
        """Increase of the perplexity in percent over that of likelihoods with an exact cache."""
        self.progress(f"{len(dense)} layers exact", len(self.windows))
        reader, found = self._reader(chosen, dense), []
        for window in self.windows.split(1):
            found.append(losses(reader(window[:, :-1]), window[:, 1:]).cpu())
            self.progress(None, 1)
        return 100 * math.expm1((torch.cat(found).double() - exact.double()).mean().item())

    def _reader(self, chosen: CacheFormat | None, dense: Collection[int] = ()) -> Callable[[torch.Tensor], torch.Tensor]:
        """Token ids ``[batch, length]`` to logits, through a fresh cache each time; None: without any."""
        return lambda ids: cached_logits(self.model, ids, chosen and chosen.make(self.model, dense))


def to_use(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The smallest cache within the limit, or one hardly larger that loses less; where none is, the one that loses least."""
    within = [row for row in rows if row["within_limit"]] or rows
    smallest = min(row["bytes_per_token"] for row in within)
    near = [row for row in within if row["bytes_per_token"] <= _SAME_SIZE * smallest] if within is not rows else rows
    return min(near, key=lambda row: row["kl"])


def _windows(tokenizer: Any, text: Path | None, context: int, count: int) -> torch.Tensor:
    if text is None:
        content, name = "\n".join(document.text for document in gather()["test"]), "the standard library"
    else:
        content, name = read_text(text), str(text)
    return token_windows(tokenizer, content, name, context, count)


def _span(layers: Collection[int]) -> str:
    names = sorted(layers)
    return f"layer {names[0]}" if len(names) == 1 else f"layers {', '.join(map(str, names))}"
