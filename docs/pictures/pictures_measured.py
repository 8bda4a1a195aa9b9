"""Pictures of what was measured: every number is one of a result file in benchmarks/results."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

# Of Okabe and Ito's colours, which the colour-blind tell apart; grey and blue differ in lightness, too.
OURS, DENSE, OTHER, LIGHT = "#0072B2", "#8A8A8A", "#D55E00", "#D9D9D9"
WIDTH = 4.8  # inches

_FORMATS = {
    "tq4": "TQ4, scales from a text", "tq4-weights": "TQ4, scales from the weights", "tq4-ones": "TQ4 without scales",
    "plain": "plain TQ4", "fp8": "fp8", "int4": "int4 per token", "int4-channel": "int4, keys per channel",
}  # fmt: skip
_MODELS = {"smollm2-135m": ("SmolLM2-135M", 64), "gemma3-270m": ("Gemma 3 270M", 256)}
# Result files that do not say it: made before caches kept keys around offsets by default.
_PLAIN = ("fb4de81b923fb168e75c9e84f1a02b4b92c95474",)
_CONTEXT = 2048  # tokens that both models were read in
_CACHES = ("bf16", "fp8", "tq4")  # of vLLM


def load(name: str) -> dict[str, Any]:
    """A result file."""
    content: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def newest(pattern: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the latest result file of a kind."""
    found = [(path.name, load(path.name)) for path in sorted(RESULTS.glob(pattern))]
    return max(found, key=lambda file: str(file[1]["environment"]["date"]))


def steps() -> dict[str, Any]:
    """Milliseconds a step of `generate` by cache, longest context last; compiled steps in the end."""
    (name, found), (calls_name, calls) = newest("hf-*.json"), newest("decode-h*.json")
    offsets = [row["offsets_ratio"] for row in calls["rows"] if "offsets_ratio" in row]
    rows = [
        {
            "batch": row["batch"],
            "context": row["context"],
            "layers": row["layers"],
            "compiled": row["caches"][0] == "static",
            "dense": round(1000 * row["batch"] / row["dense_tokens_per_s"], 1),
            "ours": round(1000 * row["batch"] / row["ours_tokens_per_s"], 1),
            "ratio": row["ratio"],
        }
        for row in found["rows"]
        if "ratio" in row  # neither what limits the host nor rows whose answers were wrong
    ]
    rows.sort(key=lambda row: (row["compiled"], row["batch"], row["context"]))
    environment = found["environment"]
    extra = {"offsets": [min(offsets), max(offsets)], "plain": environment["revision"] in _PLAIN, "files": [name, calls_name]}
    return {"gpu": environment["gpu"], "date": environment["date"], "rows": rows, **extra}


def draw_steps(data: dict[str, Any]) -> Figure:
    rows = data["rows"]
    most = max(row["layers"] for row in rows)
    figure = Figure(figsize=(WIDTH, 0.66 * len(rows) + 0.9))
    axis = figure.add_subplot()
    for place, row in enumerate(rows):
        for shift, key, colour in ((-0.18, "dense", DENSE), (0.18, "ours", OURS)):
            axis.barh(place + shift, row[key], 0.34, color=colour)
            bold = "bold" if row[key] == min(row["dense"], row["ours"]) else "normal"
            axis.text(row[key] + 0.8, place + shift, f"{row[key]:.1f}", va="center", fontsize=9, fontweight=bold)
    axis.set_yticks(range(len(rows)), [_case(row, most) for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(max(row["dense"], row["ours"]) for row in rows))
    axis.set_xlabel("milliseconds a step, shorter is better")
    axis.set_ylabel("sequences x tokens in the cache")
    axis.tick_params("y", length=0)
    handles = [Patch(color=colour) for colour in (DENSE, OURS)]
    figure.legend(
        handles, ["bf16 cache", "TQ4 cache"], loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=10
    )
    figure.subplots_adjust(left=0.37, right=0.99, top=1 - 0.35 / figure.get_figheight(), bottom=0.5 / figure.get_figheight())
    return figure


def say_steps(data: dict[str, Any]) -> str:
    eager = [row["ratio"] for row in data["rows"] if not row["compiled"]]
    compiled = ", ".join(f"{row['ratio']:.2f}" for row in data["rows"] if row["compiled"])
    slower = sum(ratio < 1 for ratio in eager)
    low, high = (f"{100 * (ratio - 1):.0f}" for ratio in data["offsets"])
    default = f"over keys with offsets, the default, an attention call takes {low} to {high} % longer"
    plain = f"Measured over plain TQ4; {default}. " if data["plain"] else ""
    return (
        f"`generate` with a model of 8B shape in bf16, transformers' own caches against ours, on one {data['gpu']} "
        f"({data['date']}): {min(eager):.2f} to {max(eager):.2f} times as fast, compiled {compiled}. "
        f"In {slower} of {len(eager)} eager cases it is slower: short contexts and single sequences wait for Python. "
        f"{plain}All of it: [Performance](performance.md), {', '.join(f'`{name}`' for name in data['files'])}."
    )


def _case(row: dict[str, Any], most: int) -> str:
    """What a row is of: sequences and tokens, and what sets it apart from the others."""
    what = f"{row['batch']} x {row['context']:,}"
    layers = f"{row['layers']} of {most} layers" if row["layers"] != most else ""
    return "\n".join(filter(None, [what, "compiled" if row["compiled"] else "", layers]))


def vllm() -> dict[str, Any]:
    """Milliseconds of a step in which all requests decode, by cache, in vLLM's engine."""
    found = load("vllm-h200.json")
    rows = [
        {
            "requests": row["requests"],
            "context": row["context"],
            **{cache: round(row["ms_per_step"][cache], 2) for cache in _CACHES},
        }
        for row in found["rows"]
        if "ms_per_step" in row
    ]
    rows.sort(key=lambda row: row["tq4"] / row["bf16"])
    return {"gpu": found["environment"]["gpu"], "date": found["environment"]["date"], "layers": found["environment"]["layers"],
            "vllm": found["environment"]["vllm"], "rows": rows}  # fmt: skip


def draw_vllm(data: dict[str, Any]) -> Figure:
    rows = data["rows"]
    figure = Figure(figsize=(WIDTH, 0.85 * len(rows) + 0.9))
    axis = figure.add_subplot()
    for place, row in enumerate(rows):
        for shift, cache, colour in zip((-0.26, 0, 0.26), _CACHES, (DENSE, OTHER, OURS), strict=True):
            axis.barh(place + shift, row[cache], 0.24, color=colour)
            bold = "bold" if row[cache] == min(row[name] for name in _CACHES) else "normal"
            axis.text(row[cache] + 0.08, place + shift, f"{row[cache]:.2f}", va="center", fontsize=9, fontweight=bold)
    axis.set_yticks(range(len(rows)), [f"{row['requests']} x {row['context']:,}" for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(row[cache] for row in rows for cache in _CACHES))
    axis.set_xlabel("milliseconds a step, shorter is better")
    axis.set_ylabel("requests x tokens in the cache")
    axis.tick_params("y", length=0)
    handles = [Patch(color=colour) for colour in (DENSE, OTHER, OURS)]
    labels = ["bf16", "fp8", "TQ4, keys with offsets"]
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=10)
    figure.subplots_adjust(left=0.25, right=0.99, top=1 - 0.35 / figure.get_figheight(), bottom=0.5 / figure.get_figheight())
    return figure


def say_vllm(data: dict[str, Any]) -> str:
    low, high = (pick(row["tq4"] / row["bf16"] for row in data["rows"]) for pick in (min, max))
    slower = [f"{row['requests']} x {row['context']}" for row in data["rows"] if row["tq4"] > row["bf16"]]
    but = f" Slower than bf16: {', '.join(slower)}." if slower else ""
    return (
        f"A step of vLLM {data['vllm']}, {data['layers']} layers of Llama-8B's shape and dummy weights, on one {data['gpu']} "
        f"({data['date']}), all requests decoding: TQ4 takes {low:.2f} to {high:.2f} of bf16's time.{but} "
        f"[Performance](performance.md), `vllm-h200.json`."
    )


def quality() -> dict[str, Any]:
    """Divergence from the exact cache against bytes of a token's key and value in one head, by model and format."""
    found = load("quality-real.json")["rows"]
    models = []
    for model, (title, head_dim) in _MODELS.items():
        points = [
            {"format": row["format"], "bytes": float(row["bytes_per_token_head"]), "kl": round(row["kl"], 4)}
            for row in found
            if row["model"] == model and row["context"] == _CONTEXT and not row.get("decode")
        ]
        models.append({"title": f"{title}, head dimension {head_dim}", "bf16": 4 * head_dim, "points": points})
    return {"context": _CONTEXT, "models": models}


def say_quality(data: dict[str, Any]) -> str:
    fewer, less = [], []
    for model in data["models"]:
        found = {point["format"]: point for point in model["points"]}
        fewer.append(model["bf16"] / found["tq4"]["bytes"])
        less.append(found["plain"]["kl"] / found["tq4"]["kl"])
    return (
        f"How far the next token's distribution moves from the exact one (KL divergence), over windows of {data['context']} "
        f"tokens. In {min(fewer):.1f} to {max(fewer):.1f} times fewer bytes than bf16, TQ4 with keys around offsets and scales "
        f"from a text loses {min(less):.0f} to {max(less):.0f} times less than plain TQ4. These two small models are the "
        f"pretrained ones that were measured ([Quality](quality.md), `quality-real.json`)."
    )


def draw_quality(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 6.2), layout="constrained")
    axes = figure.subplots(len(data["models"]), 1)
    for axis, model in zip(axes, data["models"], strict=True):
        lowest, highest = (f(point["kl"] for point in model["points"]) for f in (min, max))
        heights = _apart([point["kl"] for point in model["points"]], (highest / lowest) ** (1 / 11))
        for point, height in zip(model["points"], heights, strict=True):
            ours, plain = point["format"].startswith("tq4"), point["format"] == "plain"
            colour, marker = (OURS, "o") if ours or plain else (OTHER, "s")
            axis.plot(point["bytes"], point["kl"], marker, color=colour, markersize=7, mfc="white" if plain else colour)
            side = -1 if point["bytes"] > 0.4 * model["bf16"] else 1
            beside = point["bytes"] + side * 0.018 * model["bf16"]
            axis.plot([point["bytes"], beside], [point["kl"], height], color=colour, linewidth=0.8)
            axis.text(
                beside + side * 0.003 * model["bf16"],
                height,
                f"{_FORMATS[point['format']]}: {point['kl']:.3g}",
                ha="right" if side < 0 else "left",
                va="center",
                fontsize=9.4,
            )
        axis.set_yscale("log")
        axis.set_ylim(lowest / 1.6, highest * 1.6)
        axis.set_xlim(0.245 * model["bf16"], 0.52 * model["bf16"])
        ticks = sorted({round(point["bytes"]) for point in model["points"] if point["format"] in ("tq4", "fp8")})
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
        decades = [x for x in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0) if lowest / 1.6 < x < highest * 1.6]
        axis.set_yticks(decades, [f"{x:g}" for x in decades])
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(axis="y", color=LIGHT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title(f"{model['title']} (bf16: {model['bf16']} bytes)", loc="left")
        axis.set_ylabel("KL, nats")
    axes[-1].set_xlabel("bytes of a token in one head; lower and further left is better")
    return figure


def _apart(heights: list[float], ratio: float) -> list[float]:
    """Heights of labels on a logarithmic axis: each at least ``ratio`` above the one below it."""
    found = list(heights)
    order = sorted(range(len(found)), key=lambda i: found[i])
    for below, above in itertools.pairwise(order):
        found[above] = max(found[above], ratio * found[below])
    return found


def decode() -> dict[str, Any]:
    """Microseconds of one attention call against context, by batch."""
    _, found = newest("decode-contexts-*.json")
    panels = []
    for batch in (1, 16):
        rows = [row for row in found["rows"] if row["id"] == f"batch{batch}"]
        lines = {key: [round(1000 * row[key], 2) for row in rows] for key in ("best_fp16_ms", "ours_ms", "floor_ms")}
        panels.append({"batch": batch, "context": [row["shape"][4] for row in rows], **lines})
    return {"gpu": found["environment"]["gpu"], "date": found["environment"]["date"], "panels": panels}


def draw_decode(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.8), layout="constrained")
    axes = figure.subplots(len(data["panels"]), 1, sharex=True)
    for axis, panel in zip(axes, data["panels"], strict=True):
        for key, label, colour, style in (
            ("best_fp16_ms", "fp16, best of PyTorch", DENSE, "s-"),
            ("ours_ms", "TQ4, native kernel", OURS, "o-"),
            ("floor_ms", "bytes at read bandwidth", "black", ":"),
        ):
            axis.plot(panel["context"], panel[key], style, color=colour, label=label, markersize=4.5)
        axis.set(xscale="log", yscale="log", ylabel="one call, microseconds")
        axis.set_title(f"batch {panel['batch']}", loc="left")
        axis.grid(color=LIGHT, linewidth=0.6)
    ticks = max((panel["context"] for panel in data["panels"]), key=len)[::2]
    axes[-1].set_xticks(ticks, [f"{tokens:,}" for tokens in ticks])
    axes[-1].xaxis.set_minor_locator(NullLocator())
    axes[-1].set_xlabel("context, tokens")
    axes[0].legend(frameon=False, fontsize=9)
    return figure


def say_decode(data: dict[str, Any]) -> str:
    return f"One attention call on one {data['gpu']} ({data['date']}), cold L2, CUDA graphs, plain TQ4, 32 / 8 heads of 128."


def roofline() -> dict[str, Any]:
    """Microseconds of each call of decode-h200.json against the bytes of its cache, and what no call can beat."""
    found = load("decode-h200.json")
    environment = found["environment"]
    bandwidth, empty = environment["read_bandwidth_gb_per_s"], environment.get("empty_launch_ms")
    calls = [
        {
            "id": row["id"],
            "bytes": round(row["floor_ms"] * bandwidth, 2),  # millions
            "floor": round(1000 * row["floor_ms"], 2),
            "ours": round(1000 * row["ours_ms"], 2),
            "dense": round(1000 * row["best_fp16_ms"], 2),
        }
        for row in found["rows"]
        if row["scope"] == "call" and row["shape"][-1] == 128
    ]
    launch = None if empty is None else round(1000 * empty, 2)
    return {"gpu": environment["gpu"], "date": environment["date"], "bandwidth": bandwidth, "launch": launch, "calls": calls}


def draw_roofline(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axis = figure.add_subplot()
    sizes = [call["bytes"] for call in data["calls"]]
    ends = [0.6 * min(sizes), 2.5 * max(sizes)]
    for key, label, colour, style in (("dense", "fp16, best of PyTorch", DENSE, "s"), ("ours", "TQ4", OURS, "o")):
        axis.plot(sizes, [call[key] for call in data["calls"]], style, color=colour, label=label, markersize=4.5)
    for call, height in zip(data["calls"], _apart([call["ours"] for call in data["calls"]], 1.22), strict=True):
        axis.text(0.86 * call["bytes"], height, call["id"], fontsize=9, ha="right", va="center")
    axis.plot(ends, [1000 * end / data["bandwidth"] for end in ends], ":", color="black", label="TQ4's bytes at read bandwidth")
    if data["launch"] is not None:
        axis.axhline(data["launch"], linestyle="--", linewidth=1, color="black", label="a launch that does nothing")
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=(1, None))
    axis.set(xlabel="codes and norms, MB", ylabel="one call, microseconds")
    axis.grid(color=LIGHT, linewidth=0.6)
    axis.legend(frameon=False, fontsize=9)
    return figure


def say_roofline(data: dict[str, Any]) -> str:
    shares = {call["id"]: call["floor"] / call["ours"] for call in data["calls"]}
    most, least = (pick(shares, key=shares.__getitem__) for pick in (max, min))
    found = f"{100 * shares[most]:.0f} % of the bandwidth in {most} to {100 * shares[least]:.0f} % in {least}"
    launch = "" if data["launch"] is None else f" A launch that does nothing takes {data['launch']:.1f} us."
    return (
        f"Each case of head dimension 128 in the table below, on one {data['gpu']} ({data['date']}), whole calls, cold L2, "
        f"CUDA graphs, plain TQ4, against the bytes that it must read: {found}.{launch} `decode-h200.json`."
    )
