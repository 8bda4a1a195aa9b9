"""What offsets, outlying keys and channel scales do to real models: the study behind the key format.

    PYTHONPATH=src python benchmarks/quality_keys.py prompt FOLDER --text FILE --calibrate FILE --out RESULTS.json
    PYTHONPATH=src python benchmarks/quality_keys.py rules FOLDER --text FILE --calibrate FILE --out RESULTS.json
    PYTHONPATH=src python benchmarks/quality_keys.py decode FOLDER --text FILE --calibrate FILE --out RESULTS.json
    PYTHONPATH=src python benchmarks/quality_keys.py bias --out RESULTS.json

Formats are emulated (`quality_keys_format.py`), so that what the library does not do can be measured, too. "prompt" reads
windows of a text with caches that one call writes. "rules" asks what becomes of groups that begin with a few keys, by how far
the weights of attention move (`quality_keys_rules.py`); "decode" the same by how far the next-token distributions do, a call
for each token. "bias" plants a bias in random keys. KL and 1 - TVD compare with the exact cache.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from common import environment, write_results
from quality_keys_format import COPY, GrowingKeys, KeyFormat, Rule, codec_for, read_back, tq4
from quality_keys_rules import measure_rules
from quality_keys_scales import all_scales, measured_scales
from turboquant_vllm.quality.attention import Model

NAME = "key_study"
# layer, query, key, value -> what attention reads
Reading = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
Scales = dict[str, dict[int, torch.Tensor]]  # by how they were found, by layer, [H_kv, D]
_reading: Reading | None = None
_capture: Callable[..., None] | None = None


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    if _capture is not None:
        _capture(module.layer_idx, query, key, kwargs["scaling"], kwargs.get("sliding_window"))
    if _reading is not None:
        query, key, value = _reading(module.layer_idx, query, key, value)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


@contextmanager
def reading(how: Reading | None) -> Iterator[None]:
    """Within the block, attention of the loaded model reads queries, keys and values as ``how`` returns them."""
    global _reading
    _reading = how
    try:
        yield
    finally:
        _reading = None


@contextmanager
def capturing(how: Callable[..., None]) -> Iterator[None]:
    """Within the block, ``how`` sees layer, query, key, scaling and sliding window of each attention call."""
    global _capture
    _capture = how
    try:
        yield
    finally:
        _capture = None


def rotated(query: torch.Tensor, key: torch.Tensor, w: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(q / w) @ rotation.T and (w * k) @ rotation.T, for w ``[H_kv, D]``."""
    rotation = codec_for(key).rotation
    if w is not None:
        query = query / w.repeat_interleave(query.shape[1] // key.shape[1], 0)[:, None]
        key = key * w[:, None]
    return query @ rotation.T, key @ rotation.T


def whole(cached: KeyFormat, scales: Scales) -> Reading:
    """Attention over keys, and perhaps values, that one call wrote."""

    def read(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        q, y = rotated(query, key, None if cached.scales == "ones" else scales[cached.scales][layer])
        again = tq4(value @ codec_for(value).rotation.T) @ codec_for(value).rotation if cached.values else value
        return q, read_back(y, cached), again

    return read


def fp8(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
    """Keys and values in fp8 without a scale."""
    return query, *(x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value))


class Growing:
    """Attention over keys that come call by call; the batch holds the windows of text once exactly, then once for each rule."""

    def __init__(self, rules: list[tuple[Rule, bool]], windows: int, room: int, w: dict[int, torch.Tensor]) -> None:
        self._rules, self._windows, self._w = [rule for rule, _ in rules for _ in range(windows)], windows, w
        self._exact = windows * (1 + sum(not values for _, values in rules))  # rows whose values are exact
        self._room = -(-room // 64) * 64
        self._keys: dict[int, GrowingKeys] = {}
        self._dense: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Any:
        """``key`` and ``value`` hold all tokens so far; those of the exact rows come first."""
        q, y = rotated(query, key, self._w[layer])
        new = y[self._windows :, :, -query.shape[2] :]
        kept = self._keys.setdefault(layer, GrowingKeys(self._rules, self._room)).write(new)
        turn = codec_for(value).rotation
        value = torch.cat([value[: self._exact], tq4(value[self._exact :] @ turn.T) @ turn])
        return q, torch.cat([y[: self._windows], kept]), value


class Scores:
    """Sums over tokens: increase of the loss, KL, total variation, agreement."""

    def __init__(self) -> None:
        self.sums, self.count = torch.zeros(4, dtype=torch.float64), 0

    def add(self, exact: torch.Tensor, other: torch.Tensor, came: torch.Tensor) -> None:
        """Log-probabilities ``[..., V]`` and the tokens ``[...]`` that came."""
        more = (exact - other).gather(-1, came[..., None]).double().sum()
        kl = functional.kl_div(other, exact, log_target=True, reduction="sum")
        apart = 0.5 * (other.exp() - exact.exp()).abs().sum()
        same = (other.argmax(-1) == exact.argmax(-1)).sum()
        self.sums += torch.tensor([float(x) for x in (more, kl, apart, same)], dtype=torch.float64)
        self.count += came.numel()

    def row(self) -> dict[str, float]:
        more, kl, apart, same = (self.sums / self.count).tolist()
        figures = {"kl": kl, "tvd": apart, "increase_percent": 100 * math.expm1(more), "agreement": same}
        return {name: round(x, 6) for name, x in figures.items()} | {"tokens": self.count}


def load(folder: Path) -> tuple[Any, Model]:
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").to(device).eval()
    )
    model.set_attn_implementation(NAME)
    return AutoTokenizer.from_pretrained(folder), model


def windows_of(tokenizer: Any, text: Path, length: int, count: int, device: Any) -> torch.Tensor:
    """``[count, length + 1]`` token ids spread evenly over a text, the tokenizer's first token in front if it has one."""
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"])
    begin = torch.tensor([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype=ids.dtype)
    starts = torch.linspace(0, len(ids) - length - 1, count).long().tolist()
    return torch.stack([torch.cat([begin, ids[s : s + length + 1 - len(begin)]]) for s in starts]).to(device)


def log_probabilities(model: Model, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(ids, **options).logits.float().log_softmax(-1)
    return found


def prompt_formats(scales: Scales) -> Iterator[tuple[str, KeyFormat | None]]:
    """What is measured on prompts; None is fp8."""
    yield "fp8", None
    yield "plain", KeyFormat(0, "ones")
    yield "plain", KeyFormat(0, "ones", values=True)
    best = KeyFormat(64, "text")
    for group in (64, 128):
        yield "keys", replace(best, group=group)
        yield "keys", replace(best, group=group, values=True)
    yield "keys", replace(best, basis="model")
    yield "keys", replace(best, exact=True)
    yield "keys", replace(best, group=128, basis="model")
    yield "keys", replace(best, group=128, exact=True)
    for name in ("ones", *scales):
        if name != "text":
            yield "keys", replace(best, scales=name)
    yield "keys", replace(best, scales="weights", values=True)


@torch.inference_mode()
def measure_prompts(model: Model, scales: Scales, windows: torch.Tensor, batch: int, chosen: list[int]) -> list[dict[str, Any]]:
    formats = [x for index, x in enumerate(prompt_formats(scales)) if not chosen or index in chosen]
    scores = [Scores() for _ in formats]
    for ids in windows.split(batch):
        with reading(None):
            exact = log_probabilities(model, ids[:, :-1], use_cache=False)
        for (_, cached), sums in zip(formats, scores, strict=True):
            with reading(fp8 if cached is None else whole(cached, scales)):
                sums.add(exact, log_probabilities(model, ids[:, :-1], use_cache=False), ids[:, 1:])
    rows = []
    for (name, cached), sums in zip(formats, scores, strict=True):
        about = {} if cached is None else asdict(cached)
        rows.append({"what": "prompt", "format": name, **about, "context": windows.shape[1] - 1, **sums.row()})
    return rows


# Tokens of the prompt, of what follows, and of one call.
CASES = [
    (512, 512, 1),
    (512, 512, 4),
    (512, 512, 8),
    (512, 512, 16),
    (512, 512, 32),
    (1, 63, 1),
    (20, 44, 1),
    (2, 62, 1),
    (4, 60, 1),
    (8, 56, 1),
    (1, 62, 2),
]


def rules_for(prompt: int, step: int) -> list[tuple[Rule, bool]]:
    """Rules worth a look in a case, and whether values are in TQ4, too."""
    if prompt < 64:
        found = [Rule("rest", COPY), Rule("rest", COPY, all_keys=True)]
        slots = [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), tuple(range(1, 9)), (1, 4), (1, 4, 16), (4,), (8,), (16,), (32,)]
        found += [Rule("rest", COPY, again=again) for again in slots]
    elif step == 1:  # a lone key is the outlying one: its group's offset is the prior, whatever that counts as
        found = [Rule("zero", 0), *(Rule(name, COPY) for name in ("rest", "mean", "offset"))]
        found += [Rule("rest", count, all_keys=True) for count in (0, 2, 4, 8, 16)]
    else:
        found = [Rule("rest", count) for count in (0, 2, 4, 8, 16, 32, COPY)]
        found += [Rule("mean", 8), Rule("offset", 8), Rule("offset", COPY)]
    return [(rule, False) for rule in found] + [(Rule("rest", COPY if step == 1 else 8), True)]


@torch.inference_mode()
def measure_decode(
    model: Model, scales: Scales, ids: torch.Tensor, case: tuple[int, int, int], few: bool
) -> list[dict[str, Any]]:
    """Teacher-forced reading behind a prompt: each token once exactly and once by each rule."""
    prompt, more, step = case
    ids = ids[:, : prompt + more + 1]
    rules = rules_for(prompt, step)
    if few:
        again = [] if prompt >= 64 else [(Rule(again=(1, 2, 3)), values) for values in (False, True)]
        rules = [(Rule(), False), (Rule(), True), *again]
    count = len(ids)
    scores = [Scores() for _ in rules]
    cache = DynamicCache()
    rows = ids.repeat(1 + len(rules), 1)
    with reading(Growing(rules, count, prompt + more, scales["text"])):
        model(rows[:, :prompt], past_key_values=cache, logits_to_keep=1)
        for at in range(prompt, prompt + more, step):
            found = log_probabilities(model, rows[:, at : at + step], past_key_values=cache)
            for index, sums in enumerate(scores, 1):
                sums.add(found[:count], found[index * count : (index + 1) * count], ids[:, at + 1 : at + step + 1])
    about = {"what": "decode", "prompt": prompt, "more": more, "step": step}
    found_rows = [
        {**about, "rule": asdict(rule), "values": values, **x.row()} for (rule, values), x in zip(rules, scores, strict=True)
    ]
    for values in (False, True):
        together = Scores()
        for one in ids.split(2):
            keep = {"use_cache": False, "logits_to_keep": more}
            with reading(None):
                exact = log_probabilities(model, one[:, :-1], **keep)
            with reading(whole(KeyFormat(values=values), scales)):
                together.add(exact, log_probabilities(model, one[:, :-1], **keep), one[:, -more:])
        found_rows.append({**about, "rule": "whole", "values": values, **together.row()})
    return found_rows


def bias_rows(seeds: range) -> Iterator[dict[str, Any]]:
    """Relative errors of attention over random keys with a planted bias, averaged over ``seeds``."""
    dim, length, queries, theta = 128, 2048, 32, 1e6
    angle = torch.arange(length)[:, None] * theta ** (-torch.arange(0, dim, 2) / dim)  # [N, D / 2]
    cos, sin = angle.cos(), angle.sin()

    def rope(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        c, s = (y[-x.shape[-2] :] for y in (cos, sin))
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    biases = (("none", ()), ("slow", (30, 60, 94, 124)), ("slow", (30, 94)), ("fast", (10, 74)), ("fast", (10,)))
    for name, channels in biases:
        for cached in [None, KeyFormat(0, "ones")] + [
            KeyFormat(g, s, b) for g in (64, 128) for s in ("ones", "text") for b in ("rotated", "model")
        ]:
            errors = []
            for seed in seeds:
                generator = torch.Generator().manual_seed(seed)
                k, v, q = (torch.randn(1, 1, n, dim, generator=generator) for n in (length, length, queries))
                bias = torch.zeros(dim)
                if channels:
                    bias[list(channels)] = 600 / math.sqrt(len(channels))
                k, q = rope(2 * k + bias), rope(q)
                w = measured_scales(q, k)
                exact = functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
                read = fp8(0, q, k, v) if cached is None else whole(cached, {"text": {0: w}})(0, q, k, v)
                got = functional.scaled_dot_product_attention(*(x.double() for x in (*read[:2], v)))
                errors.append(((got - exact).norm() / exact.norm()).item())
            about = {"format": "fp8"} if cached is None else {"format": "keys" if cached.group else "plain", **asdict(cached)}
            yield {
                "what": "bias",
                "bias": name,
                "channels": list(channels),
                **about,
                "error": round(sum(errors) / len(errors), 4),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prompt", "decode", "rules", "bias"))
    parser.add_argument("folder", type=Path, nargs="?", help="of a pretrained model")
    parser.add_argument("--text", type=Path, help="UTF-8 text to read")
    parser.add_argument("--calibrate", type=Path, help="UTF-8 text to measure scales on")
    parser.add_argument("--out", type=Path, required=True, help="result file to write")
    parser.add_argument("--contexts", default="56x64,512x16,2048x8", help="lengths and numbers of windows")
    parser.add_argument("--chosen", default="", help="numbers of the formats, or of the decode's cases; default: all")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of one batch of prompts")
    parser.add_argument("--few", action="store_true", help="the rule that the library follows, and little else")
    parser.add_argument("--more", type=int, default=512, help="tokens behind the prompt, at most, for rules")
    parser.add_argument("--every", type=int, default=1, help="look at every so many layers only, for rules")
    parser.add_argument("--rows", type=int, default=8, help="windows of the decode")
    parser.add_argument("--calibration", type=int, default=2048, help="tokens of each of 8 windows that scales are measured on")
    args = parser.parse_args()
    start = time.perf_counter()
    about: dict[str, Any] = {"what": args.what}
    rows: list[dict[str, Any]] = []

    def found(more: list[dict[str, Any]], what: object) -> None:
        """Write what there is: a machine may be gone before all is done."""
        rows.extend({**({"model": args.folder.name} if args.folder else {}), **row} for row in more)
        write_results(args.out, environment(**about, seconds=round(time.perf_counter() - start, 1)), rows)
        print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)

    if args.what == "bias":
        found(list(bias_rows(range(4))), "bias")
        return
    tokenizer, model = load(args.folder)
    calibration = windows_of(tokenizer, args.calibrate, args.calibration, 8, model.device)
    about["calibration_tokens"] = calibration.numel()
    with torch.inference_mode():
        scales = all_scales(model, calibration, reading)
    chosen = [int(x) for x in args.chosen.split(",")] if args.chosen else []
    if args.what == "prompt":
        for context in args.contexts.split(","):
            length, count = (int(x) for x in context.split("x"))
            windows = windows_of(tokenizer, args.text, length, count, model.device)
            found(measure_prompts(model, scales, windows, max(1, args.tokens // length), chosen), context)
    else:
        windows = windows_of(tokenizer, args.text, 1024, args.rows, model.device)
        for case in (CASES[x] for x in chosen or range(len(CASES))):
            if args.what == "decode":
                found(measure_decode(model, scales, windows, case, args.few), case)
            else:
                rules = [rule for rule, values in rules_for(case[0], case[2]) if not values]
                found(
                    measure_rules(
                        model,
                        scales["text"],
                        windows,
                        (case[0], min(case[1], args.more), case[2]),
                        rules,
                        args.every,
                        capturing,
                    ),
                    case,
                )


if __name__ == "__main__":
    main()
