"""Measure what cache formats do to trained models: the result files behind docs/quality.md.

    PYTHONPATH=src python benchmarks/quality.py text MODEL --out benchmarks/results/quality-text.json
    PYTHONPATH=src python benchmarks/quality.py text demo --out benchmarks/results/quality-demo.json
    PYTHONPATH=src python benchmarks/quality.py greedy demo --out benchmarks/results/quality-demo-greedy.json
    PYTHONPATH=src python benchmarks/quality.py recall MODEL --out benchmarks/results/quality-recall.json

MODEL is a folder that `quality_train_text.py` or `quality_train_recall.py` wrote; "demo" is the small model in the package,
with a head dimension of 64. Each row of a result file is one format, named by its fields, and what was measured with it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from common import environment, write_results
from quality_formats import FormatCache, Halves, Outliers, describe, exact, fp8, int4
from quality_train_recall import load as load_recall
from quality_train_recall import sample
from turboquant_vllm.codec import SCALES
from turboquant_vllm.demo.compare import held_out_windows
from turboquant_vllm.demo.run import MODEL as DEMO
from turboquant_vllm.hf import CACHE_ARGUMENT
from turboquant_vllm.quality.attention import LayerErrors, Model, cache_format
from turboquant_vllm.quality.formats import Format, TQ4Format
from turboquant_vllm.quality.measure import TokenScores, bootstrap_interval, compare_windows, perplexity

_BATCH = 4
_BUCKETS = 8
_BEST = TQ4Format("unbiased", "unbiased")
_PLAIN = TQ4Format("norm", "norm")


def text_formats(layers: int, seeds: range, head_dim: int) -> Iterator[Format]:
    """Every format that is measured on text."""
    yield from (exact, fp8, int4)
    for seed, keys, values in product(seeds, (*SCALES, None), (*SCALES, None)):
        if keys or values:
            yield TQ4Format(keys, values, seed)
    for seed, cached in product(seeds, (_PLAIN, _BEST)):
        yield replace(cached, seed=seed, rotation="haar")
    if head_dim == 128:
        for seed, scale in product(seeds, SCALES):
            yield Halves(TQ4Format(scale, scale, seed))
    for factor, channels in product((10, 30, 100), (1, 4)):
        yield from (Outliers(cached, factor, channels) for cached in (fp8, int4, _PLAIN))
        yield from (Outliers(replace(_BEST, seed=seed), factor, channels, seed) for seed in seeds[:3])
    ends = ((0,), (layers - 1,), (0, layers - 1), (0, 1, layers - 2, layers - 1))
    for seed, dense in product(seeds[:3], ends):
        yield replace(_BEST, seed=seed, dense_layers=dense)
    yield from (replace(_BEST, dense_layers=(layer,)) for layer in range(1, layers - 1))


def score_row(scores: TokenScores, errors: LayerErrors) -> dict[str, Any]:
    """The figures of one format: in percent what says so, in nats the divergence."""
    low, high = bootstrap_interval(scores.other, scores.exact)
    buckets = zip(*(part.chunk(_BUCKETS, dim=1) for part in scores), strict=True)
    parts = [TokenScores(*bucket) for bucket in buckets]
    return {
        "perplexity": round(perplexity(scores.other), 5),
        "increase_percent": round(100 * scores.increase, 4),
        "interval_percent": [round(100 * low, 4), round(100 * high, 4)],
        "kl": round(scores.kl.mean().item(), 7),
        "agreement": round(scores.agrees.float().mean().item(), 5),
        "by_position": {
            "increase_percent": [round(100 * part.increase, 4) for part in parts],
            "kl": [round(part.kl.mean().item(), 7) for part in parts],
        },
        "errors": {
            what: [round(error, 5) for error in errors.relative(what).values()] for what in ("keys", "values", "attention")
        },
    }


def load_text(folder: Path, device: torch.device) -> tuple[Model, torch.Tensor]:
    """The model and its held-out windows ``[n, length + 1]``."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model: Model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    if (folder / "held_out.safetensors").is_file():
        windows = load_file(folder / "held_out.safetensors")["windows"].long()
    else:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        windows = held_out_windows(tokenizer, model.config.max_position_embeddings, 10**6)
    return model.to(device).eval(), windows.to(device)


def spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """So many of the windows, evenly spread."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long().to(windows.device)]


@torch.inference_mode()
def measure_text(model: Model, windows: torch.Tensor, formats: list[Format], seconds: float) -> list[dict[str, Any]]:
    """One row per format, in order; fewer when ``seconds`` are over."""
    start = time.perf_counter()
    batches = windows.split(_BATCH)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(ids, use_cache=False).logits
        return found

    kept = {batch.data_ptr(): logits(batch[:, :-1]) for batch in batches}
    rows: list[dict[str, Any]] = []
    for cached in formats:
        if time.perf_counter() - start > seconds:
            print(f"out of time: {len(rows)} of {len(formats)} formats measured")
            break
        errors = LayerErrors()
        with cache_format(model, cached, errors):
            scores = compare_windows(lambda ids: kept[ids.data_ptr()], logits, batches)
        rows.append({**describe(cached), **score_row(scores, errors)})
    return rows


@torch.inference_mode()
def measure_greedy(model: Model, windows: torch.Tensor, formats: list[Format], new: int) -> list[dict[str, Any]]:
    """Greedy continuations of the first halves of ``windows``, with an exact cache and with each format."""
    prompts = windows[:, : (windows.shape[1] - 1) // 2]
    prompts = prompts[:, -(windows.shape[1] - 1 - new) :]

    def write(cached: Format) -> torch.Tensor:
        ids: torch.Tensor = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            **{CACHE_ARGUMENT: FormatCache(cached)},
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            pad_token_id=model.config.eos_token_id,
        )
        return ids[:, prompts.shape[1] :]

    expected = write(exact)
    rows: list[dict[str, Any]] = []
    for cached in formats:
        same = write(cached) == expected
        until = same.cumprod(1).sum(1).float()
        row = {
            "greedy": new,
            "prompts": len(prompts),
            "prompt_tokens": prompts.shape[1],
            "same_tokens": round(same.float().mean().item(), 5),
            "until_first_difference": {"mean": until.mean().item(), "median": until.median().item()},
            "never_different": round((until == new).float().mean().item(), 5),
        }
        rows.append({**describe(cached), **row})
    return rows


def recall_formats(seeds: range) -> Iterator[Format]:
    """Every format that is measured on recall."""
    yield from (exact, fp8, int4)
    for seed, scale in product(seeds, SCALES):
        yield TQ4Format(scale, scale, seed)
    yield from (replace(_BEST, seed=seed, rotation="haar") for seed in seeds)
    yield from (TQ4Format("unbiased", None), TQ4Format(None, "unbiased"))
    for factor in (10, 100):
        yield from (Outliers(cached, factor, 4) for cached in (fp8, int4, _PLAIN, _BEST))


@torch.inference_mode()
def measure_recall(
    folder: Path, device: torch.device, formats: list[Format], most: int, answers: int, seconds: float
) -> list[dict[str, Any]]:
    """One row per length and format: how many of ``answers`` queries are answered, and the answers' mean loss in nats."""
    start = time.perf_counter()
    model = load_recall(folder, device)
    keys = json.loads((folder / "training.json").read_text())["keys"]
    rows: list[dict[str, Any]] = []
    pairs = min(256, most)
    while pairs <= most:
        queries = min(512, pairs)
        data = []
        generator = torch.Generator(device).manual_seed(pairs)
        for _ in range(max(1, answers // (4 * queries))):
            data.append(sample(4, pairs, queries, keys, generator))
        for cached in formats:
            if time.perf_counter() - start > seconds:
                print(f"out of time at {pairs} pairs")
                return rows
            right, loss = [], []
            with cache_format(model.body, cached):
                for ids, expected, positions in data:
                    logits = model(ids, positions).float()
                    right.append((logits.argmax(-1) == expected).float().mean())
                    loss.append(functional.cross_entropy(logits.flatten(0, 1), expected.flatten()))
            row = {"context": 2 * pairs, "answers": 4 * queries * len(data), "accuracy": torch.stack(right).mean().item()}
            rows.append({**describe(cached), **row, "loss": torch.stack(loss).mean().item()})
        pairs *= 2
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("text", "greedy", "recall"))
    parser.add_argument("model", help='folder, or "demo"')
    parser.add_argument("--out", type=Path, required=True, help="result file to write")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows to read")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--greedy", type=int, default=512, help="tokens of a greedy continuation")
    parser.add_argument("--answers", type=int, default=8192, help="queries at each length")
    parser.add_argument("--most-pairs", type=int, default=8192, help="pairs in the longest sequences")
    parser.add_argument("--seconds", type=float, default=600.0, help="no new format is begun after these")
    args = parser.parse_args()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = DEMO if args.model == "demo" else Path(args.model)
    seeds = range(args.seeds)
    about: dict[str, Any] = {"what": args.what, "training": json.loads((folder / "training.json").read_text())}
    if args.what == "recall":
        formats = list(recall_formats(seeds[:3]))
        rows = measure_recall(folder, device, formats, args.most_pairs, args.answers, args.seconds)
    else:
        model, windows = load_text(folder, device)
        layers, head_dim = model.config.num_hidden_layers, model.config.head_dim
        windows = spread(windows, args.windows)
        about |= {"windows": len(windows), "context": windows.shape[1] - 1, "head_dim": head_dim, "layers": layers}
        about["training"].pop("continuations", None)
        if args.what == "greedy":
            rows = measure_greedy(model, windows, [_BEST, _PLAIN, fp8, int4], args.greedy)
        else:
            rows = measure_text(model, windows, list(text_formats(layers, seeds, head_dim)), args.seconds)
            print(f"exact perplexity {rows[0]['perplexity']:.4f}")
    about["seconds"] = round(time.perf_counter() - start, 1)
    if not all(math.isfinite(row.get("perplexity", 0.0)) for row in rows):
        raise RuntimeError("perplexity: expected finite ones")
    write_results(args.out, environment(**about), rows)
    print(f"{len(rows)} rows in {time.perf_counter() - start:.1f} s: {args.out}")


if __name__ == "__main__":
    main()
