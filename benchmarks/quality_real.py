"""What cache formats do to pretrained models: KL, total variation, agreement and perplexity against the exact cache.

    PYTHONPATH=src python benchmarks/quality_real.py NAME=FOLDER ... [--contexts 512 2048] [--decode 512] [--out FILE]

FOLDERs hold models as transformers saves them. Our formats go through the library's own writer and reader: a
:class:`turboquant_vllm.hf.TurboQuantCache` whose first call sees its own tokens in 4 bits. Other formats are round trips of
keys and values in a DynamicCache. Everything else is float32. The text is Python's standard library: modules that
``turboquant demo`` trains on calibrate, others measure. ``--decode N`` reads the second half of windows of 2 N tokens token by
token, behind a prompt of N, and scores that half alone (rows with ``decode``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from common import RESULTS, environment, write_results
from turboquant_vllm.demo.text import gather
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache
from turboquant_vllm.hf.calibration import key_scales_from_model, measure_key_scales
from turboquant_vllm.quality.measure import TokenScores, perplexity, token_scores
from turboquant_vllm.records import GROUP
from turboquant_vllm.verify.text import token_windows

CALIBRATION = (8, 512)  # windows and their length
RoundTrip = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class RoundTripCache(DynamicCache):
    """A cache that keeps what keys and values read back as."""

    def __init__(self, config: Any, change: RoundTrip) -> None:
        super().__init__(config=config)
        self._change = change

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **options: Any) -> Any:
        return super().update(*self._change(key_states, value_states), *args, **options)


def int4(x: torch.Tensor, dim: int) -> torch.Tensor:
    """16 even levels from the least to the largest along ``dim``."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-12)
    return ((x - low) / step).round() * step + low


def int4_channels(x: torch.Tensor) -> torch.Tensor:
    """As :func:`int4`, for each channel of every 64 tokens."""
    return torch.cat([int4(part, -2) for part in x.split(GROUP, -2)], -2)


def formats(model: Any, scales: dict[int, torch.Tensor]) -> dict[str, tuple[Callable[[], Any], float]]:
    """For each format a maker of caches, and bytes per token and kv head for keys and values."""
    config, d = model.config, model.config.get_text_config().head_dim
    from_weights = key_scales_from_model(model)

    def ours(**options: Any) -> Callable[[], Any]:
        return lambda: TurboQuantCache(config, exact_prefill=False, **options)

    def fp8(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return k.to(torch.float8_e4m3fn).to(k.dtype), v.to(torch.float8_e4m3fn).to(v.dtype)

    shared = (2 * d + 16) / GROUP
    return {
        "tq4": (ours(key_scales=scales), d + 8 + shared),
        "tq4-weights": (ours(key_scales=from_weights), d + 8 + shared),
        "tq4-ones": (ours(key_scales={}), d + 8 + shared),
        "plain": (ours(key_offsets=False), d + 8),
        "fp8": (lambda: RoundTripCache(config, fp8), 2 * d),
        "int4": (lambda: RoundTripCache(config, lambda k, v: (int4(k, -1), int4(v, -1))), d + 8),
        "int4-channel": (
            lambda: RoundTripCache(config, lambda k, v: (int4_channels(k), int4(v, -1))),
            d + 4 + 4 * d / GROUP,
        ),
    }


@torch.inference_mode()
def scores(model: Any, ids: torch.Tensor, make: Callable[[], Any], exact: list[torch.Tensor], prompt: int) -> TokenScores:
    """Of the tokens behind ``prompt``, those read token by token where ``prompt`` is not 0, of all windows side by side."""
    found = []
    for some, want in [(ids, torch.stack(exact))] if prompt else zip(ids.split(1), [x[None] for x in exact], strict=True):
        cache, inputs = make(), some[:, :-1]
        if prompt:
            model(inputs[:, :prompt], **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
            steps = inputs[:, prompt:].split(1, 1)
        else:
            steps = (inputs,)
        first = prompt
        for ids_of_step in steps:
            logits = model(ids_of_step, **{CACHE_ARGUMENT: cache}).logits.float()
            last = first + ids_of_step.shape[1]
            exactly = want[:, first - prompt : last - prompt].to(logits.device)
            found.append(token_scores(exactly.flatten(0, 1), logits.flatten(0, 1), some[:, first + 1 : last + 1].flatten()))
            first = last
    return TokenScores(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def measure(name: str, folder: Path, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device).eval()
    documents = gather()
    train, test = ("\n".join(document.text for document in documents[part]) for part in ("train", "test"))
    windows = token_windows(tokenizer, train, "the standard library", CALIBRATION[1], CALIBRATION[0])[:, :-1]
    makers = formats(model, measure_key_scales(model, windows.to(device)))
    longest = model.config.get_text_config().max_position_embeddings
    rows = []
    works = [(context, 0) for context in args.contexts] + ([(2 * args.decode, args.decode)] if args.decode else [])
    for context, prompt in works:
        if context > longest:
            continue
        count = max(1, min(args.windows, args.tokens // context)) if not prompt else 4
        ids = token_windows(tokenizer, test, "the standard library", context, count).to(device)
        exact = []
        with torch.inference_mode():
            for row in ids.split(1):
                exact.append(model(row[:, :-1], use_cache=False).logits[0, prompt:].float().cpu())
        for format_name in args.formats or makers:
            make, size = makers[format_name]
            found = scores(model, ids, make, exact, prompt)
            row = {
                "model": name, "context": context, "format": format_name, "bytes_per_token_head": size,
                "kl": found.kl.double().mean().item(), "tvd": found.tvd.double().mean().item(),
                "increase_percent": 100 * found.increase, "agreement": found.agrees.double().mean().item(),
                "perplexity_exact": perplexity(found.exact), "tokens": found.kl.numel(),
            }  # fmt: skip
            rows.append({**row, "decode": prompt} if prompt else row)
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--contexts", type=int, nargs="*", default=[56, 512, 2048, 8192])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16384, help="at most so many of each context, or one window")
    parser.add_argument("--decode", type=int, default=512)
    parser.add_argument("--formats", nargs="*", help="some of tq4, tq4-weights, tq4-ones, plain, fp8, int4, int4-channel")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality-real.json", help="rows of other works are kept there")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = environment(text="the standard library of this Python", dtype="float32")
    here = {name: run[name] for name in ("gpu", "revision")}
    rows = []
    if args.out.exists():
        before = json.loads(args.out.read_text())
        rows = [{**{name: before["environment"][name] for name in here}, **row} for row in before["rows"]]
    for one in args.models:
        name, _, folder = one.partition("=")
        new = [{**row, **here} for row in measure(name, Path(folder), args, device)]
        works = [_work(row) for row in new]
        rows = [row for row in rows if _work(row) not in works] + new
        write_results(args.out, run, rows)


def _work(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["context"], row["format"], row.get("decode", 0)


if __name__ == "__main__":
    main()
