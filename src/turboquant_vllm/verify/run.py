"""Is 4 bits good enough for this model? Its perplexity on a text with an exact cache and with a TQ4 cache, and why.

`turboquant verify MODEL` prints this; `run_verify` returns it. The cache is measured through `cache_format`, that is, the model
attends to exactly the keys and values that a TQ4 cache returns, at every position, in its own attention.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import turboquant_vllm
from turboquant_vllm.demo.run import pick_device
from turboquant_vllm.demo.text import gather
from turboquant_vllm.quality.attention import LayerErrors, Model, cache_format
from turboquant_vllm.quality.formats import TQ4Format
from turboquant_vllm.quality.measure import TokenScores, bootstrap_interval, compare_windows, perplexity
from turboquant_vllm.verify.loading import CachedLayers, check_cache, check_tokens, load
from turboquant_vllm.verify.text import longest_context, read_text, token_windows

__all__ = ["DEFAULT_CONTEXT", "DEFAULT_WINDOWS", "Progress", "run_verify"]

DEFAULT_CONTEXT = 2048
DEFAULT_WINDOWS = 16
_LAYER_WINDOWS = 2  # read once for each layer

# What is done now, in words, and how many steps it has; then None for each step.
Progress = Callable[[str | None, int], None]


def run_verify(
    model: str,
    text: Path | None = None,
    context: int | None = None,
    *,
    max_ppl_increase: float = 1.0,
    dense_layers: Collection[int] = (),
    count: int = DEFAULT_WINDOWS,
    device: str = "auto",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = lambda doing, steps: None,
) -> dict[str, Any]:
    """Compare a model's exact cache with a TQ4 cache on a text.

    Args:
        model: folder of a transformers causal language model, or its name on the Hugging Face hub.
        text: UTF-8 file to read; None reads modules of Python's standard library.
        context: tokens read at a time; None takes the model's longest, at most 2048.
        max_ppl_increase: the largest acceptable increase of the perplexity, in percent.
        dense_layers: layers whose cache stays exact.
        count: windows of ``context`` tokens to read, spread evenly over the text.
        device: "auto", "cpu" (float32) or "cuda" (bfloat16).
        seed: of the codec's rotation.
        trust_remote_code: run Python code that comes with the model.
        progress: told of what is done.

    Returns:
        A dictionary that JSON can hold. Perplexities are per token; "increase_percent" is that of the perplexity, each with a
        95 % bootstrap interval; "kl" is in nats per token. "layers" has the relative errors of K, V and the attention output.
        "contributors" has the share of the divergence that goes away when that layer, too, is exact, largest first, found on
        the first two windows. "passed" says whether the increase is at most ``max_ppl_increase``; "recommendation" which
        layers to leave exact.

    Raises:
        ImportError: a package of the extra "hf" is missing.
        FileNotFoundError: there is no such model or text.
        ValueError: the model has no cache of keys and values that `TurboQuantCache` would keep in 4 bits, the text is shorter
            than the context, the model gives NaN, or an argument is out of its range.
    """
    if count < 1:
        raise ValueError(f"windows: expected at least 1, got {count}")
    if not 0 <= max_ppl_increase < math.inf:
        raise ValueError(f"max_ppl_increase: expected a percentage of at least 0, got {max_ppl_increase}")
    start = time.perf_counter()
    progress("loading", 0)
    tokenizer, loaded, unused = load(model, pick_device(device), trust_remote_code=trust_remote_code)
    layers = check_cache(loaded, model, dense_layers)
    if unknown := sorted(set(dense_layers) - layers.packed.keys()):
        raise ValueError(f"dense layers: expected some of the cached {_span(layers.packed)}, got {unknown[0]}")
    context = longest_context(loaded.config, context, DEFAULT_CONTEXT)
    read = _windows(tokenizer, text, context, count)
    check_tokens(loaded, read)
    read = read.to(loaded.device)

    passes = _Passes(loaded, read, layers, seed, progress)
    kept = frozenset(dense_layers)
    errors = LayerErrors()
    scores = passes.compare("exact and TQ4 caches", kept, errors)
    if not scores.exact.isfinite().all():
        raise ValueError(f"model: expected finite likelihoods, {model} gives {scores.exact.sum().item()} with an exact cache")
    contributions = passes.contributions(sorted(layers.packed), kept)
    passed = 100 * scores.increase <= max_ppl_increase
    recommended = passes.recommend(scores, kept, [layer for layer, _ in contributions], max_ppl_increase)

    exact, tq4 = perplexity(scores.exact), perplexity(scores.other)
    return {
        "model": model,
        "unused_weights": unused,
        "text": str(text) if text else "Python standard library, modules held out from the demo's training",
        "device": torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else "CPU",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "versions": {
            "turboquant_vllm": turboquant_vllm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "context": context,
        "windows": len(read),
        "tokens": scores.exact.numel(),
        "seed": seed,
        "dense_layers": sorted(kept),
        "perplexity": {"exact": exact, "tq4": tq4},
        "perplexity_interval": {"exact": bootstrap_interval(scores.exact), "tq4": bootstrap_interval(scores.other)},
        "increase_percent": 100 * scores.increase,
        "increase_percent_interval": [100 * bound for bound in bootstrap_interval(scores.other, scores.exact)],
        "kl": scores.kl.mean().item(),
        "agreement": scores.agrees.float().mean().item(),
        "bytes_per_token": {"bf16": layers.bytes_per_token(layers.packed), "tq4": layers.bytes_per_token(kept)},
        "cached_layers": len(layers.packed) + len(layers.dense),
        "always_dense_layers": sorted(layers.dense),
        "layers": [
            {
                "layer": layer,
                "key_error": errors.relative("keys")[layer],
                "value_error": errors.relative("values")[layer],
                "attention_error": errors.relative("attention")[layer],
            }
            for layer in sorted(layers.packed)
        ],
        "contributors": [{"layer": layer, "kl_share": share} for layer, share in contributions],
        "max_ppl_increase": max_ppl_increase,
        "passed": passed,
        "recommendation": recommended | {"bytes_per_token": layers.bytes_per_token(recommended["dense_layers"])},
        "seconds": round(time.perf_counter() - start, 1),
    }


@dataclass
class _Passes:
    """Passes over one text, with TQ4 in all layers but some."""

    model: Model
    windows: torch.Tensor  # [n, context + 1]
    layers: CachedLayers
    seed: int
    progress: Progress

    def compare(self, doing: str, dense: Collection[int], errors: LayerErrors | None = None) -> TokenScores:
        """Both caches over all windows."""
        self.progress(doing, len(self.windows))
        return compare_windows(self._logits, self._tq4(dense, errors), self.windows.split(1), lambda: self.progress(None, 1))

    @torch.inference_mode()
    def contributions(self, layers: list[int], dense: Collection[int]) -> list[tuple[int, float]]:
        """Layers in TQ4 by the share of the divergence that goes away when that layer too is exact, largest first."""
        batches = self.windows[:_LAYER_WINDOWS].split(1)
        candidates = [layer for layer in layers if layer not in dense]
        self.progress("each layer exact", (len(candidates) + 2) * len(batches))
        exact = {batch.data_ptr(): self._logits(batch[:, :-1]) for batch in batches}

        def divergence(layers: Collection[int]) -> float:
            other = self._tq4(layers)
            scores = compare_windows(lambda ids: exact[ids.data_ptr()], other, batches, lambda: self.progress(None, 1))
            return scores.kl.mean().item()

        whole = divergence(dense)
        shares = {layer: 1 - divergence({*dense, layer}) / whole if whole > 0 else 0.0 for layer in candidates}
        return sorted(shares.items(), key=lambda item: -item[1])

    def recommend(self, scores: TokenScores, dense: Collection[int], order: list[int], limit: float) -> dict[str, Any]:
        """The fewest of the worst layers, doubling their number, whose exact caches keep the increase within ``limit`` %."""
        increase, tried, number = 100 * scores.increase, set(dense), 1
        while not increase <= limit and number <= len(order) // 2:
            tried = {*dense, *order[:number]}
            increase = 100 * self.compare(f"{len(tried)} layers exact", tried).increase
            number *= 2
        met = increase <= limit
        if not met:
            text = f"not for this text: with {_span(tried) if tried else 'no layer'} exact it is still {increase:+.2f} %"
        else:
            text = "all layers that can be in TQ4" if self.layers.dense else "all layers in TQ4"
            text += f" but {_span(tried)}" if tried else ""
        return {"text": text, "dense_layers": sorted(tried), "increase_percent": increase, "within_limit": met}

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(ids, use_cache=False).logits
        return found

    def _tq4(self, dense: Collection[int], errors: LayerErrors | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        cached = TQ4Format(seed=self.seed, dense_layers=self.layers.exact(dense))

        def logits(ids: torch.Tensor) -> torch.Tensor:
            with cache_format(self.model, cached, errors):
                return self._logits(ids)

        return logits


def _windows(tokenizer: Any, text: Path | None, context: int, count: int) -> torch.Tensor:
    if text is None:
        content, name = "\n".join(document.text for document in gather()["test"]), "the standard library"
    else:
        content, name = read_text(text), str(text)
    return token_windows(tokenizer, content, name, context, count)


def _span(layers: Collection[int]) -> str:
    names = sorted(layers)
    return f"layer {names[0]}" if len(names) == 1 else f"layers {', '.join(map(str, names))}"
