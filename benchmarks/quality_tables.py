"""Make the tables and plots of docs/quality.md from the result files.

    python benchmarks/quality_tables.py scales      print one table; `--help` names them all
    python benchmarks/quality_tables.py --write     replace all tables and plots of docs/quality.md

A table stands in the page between a comment with the command that makes it and a comment that ends it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "quality.md"
Row = dict[str, Any]
_BEST = ("unbiased", "unbiased")


@cache
def load(name: str) -> tuple[Row, list[Row]]:
    """Environment and rows of one result file."""
    content = json.loads((RESULTS / f"quality-{name}.json").read_text())
    return content["environment"], content["rows"]


def texts(name: str, **wanted: Any) -> list[Row]:
    """Rows of a text result file with exactly these fields; fields that are not named must be plain."""
    plain: Row = {"outliers": None, "halves": None, "dense_layers": [], "rotation": "auto"} | wanted
    if plain.get("format", "tq4") != "tq4":
        plain = {key: value for key, value in plain.items() if key not in ("dense_layers", "rotation")}
    rows = [row for row in load(name)[1] if "perplexity" in row]
    return [row for row in rows if all(row.get(key) == value for key, value in plain.items())]


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown, its first column left and the others right."""
    lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: list[float], digits: int = 2) -> str:
    """The mean, and from where to where when there are several."""
    if len(values) == 1:
        return f"{values[0]:+.{digits}f}"
    return f"{mean(values):+.{digits}f} ({min(values):+.{digits}f} to {max(values):+.{digits}f})"


def figures(rows: list[Row]) -> tuple[str, str, str]:
    """Perplexity increase, divergence and agreement, over seeds."""
    increase = spread([row["increase_percent"] for row in rows])
    return increase, f"{mean(row['kl'] for row in rows):.5f}", f"{100 * mean(row['agreement'] for row in rows):.2f} %"


_HEADER = ("increase of the perplexity, %", "KL, nats", "same top token")


_REAL = {
    "tq4": "TQ4, scales from a text", "tq4-weights": "TQ4, scales from the weights", "tq4-ones": "offsets alone",
    "plain": "plain TQ4", "fp8": "fp8 (e4m3)", "int4": "int4 per token", "int4-channel": "int4, keys per channel of 64 tokens",
}  # fmt: skip


def _real(model: str, columns: list[tuple[str, Row]]) -> str:
    """Divergence, what stays of the distribution and perplexity of a pretrained model, formats side by side."""
    found = [row for row in load("real")[1] if row["model"] == model]
    rows = []
    for name, title in _REAL.items():
        own = [row for row in found if row["format"] == name]
        cells = []
        for _, wanted in columns:
            row = next((row for row in own if all(row.get(key, 0) == value for key, value in wanted.items())), None)
            # Spaces that break no line: a cell is read as three numbers.
            share = row and f"{row['kl']:.4f}, {100 * (1 - row['tvd']):.1f}\u00a0%, {row['increase_percent']:+.1f}\u00a0%"
            cells.append(share or "-")
        if cells[0] != "-":
            rows.append((title, f"{own[0]['bytes_per_token_head']:g}", *cells))
    return table(("format", "bytes", *(title for title, _ in columns)), rows)


def smollm2() -> str:
    """SmolLM2-135M, by context."""
    return _real("smollm2-135m", [(f"{n} tokens", {"context": n, "decode": 0}) for n in (56, 512, 2048, 8192)])


def gemma3() -> str:
    """Gemma 3 270M."""
    return _real("gemma3-270m", [("2048 tokens", {"context": 2048, "decode": 0})])


def decoded() -> str:
    """SmolLM2-135M: tokens that are written one by one behind a prompt, and those of prompts as long as both."""
    columns = [
        ("512 behind 512, one by one", {"context": 1024, "decode": 512}),
        ("prompts of 512", {"context": 512, "decode": 0}),
    ]
    return _real("smollm2-135m", columns)


def models() -> str:
    """The models that everything is measured on."""
    rows = []
    for name, what in (("text", "text"), ("demo", "demo, in the package"), ("recall", "recall")):
        environment, found = load(name)
        training = environment["training"]
        size, steps = f"{training['parameters'] / 1e6:.1f} M", f"{training['steps']:,}"
        exact = next(row for row in found if row["format"] == "exact")
        good = f"perplexity {exact['perplexity']:.2f}" if "perplexity" in exact else "accuracy " + ", ".join(
            f"{100 * row['accuracy']:.1f} %" for row in found if row["format"] == "exact" and not row.get("outliers")
        )  # fmt: skip
        context = environment.get("context") or max(row["context"] for row in found)
        rows.append((what, size, str(environment.get("head_dim", 128)), f"{context:,}", steps, good))
    return table(("model", "parameters", "D", "context", "training steps", "exact cache"), rows)


def scales() -> str:
    """Each scale for keys, for values and for both."""
    lines = []
    for name in ("text", "demo"):
        head_dim = load(name)[0]["head_dim"]
        groups: dict[tuple[Any, Any], list[Row]] = defaultdict(list)
        for row in texts(name, format="tq4"):
            groups[row["key_scale"], row["value_scale"]].append(row)
        for (keys, values), rows in groups.items():
            attention = [100 * mean(row["errors"]["attention"]) for row in rows]
            lines.append((str(head_dim), keys or "exact", values or "exact", *figures(rows), f"{mean(attention):.2f} %"))
    return table(("D", "keys", "values", *_HEADER, "error of attention"), lines)


def formats() -> str:
    """TQ4 and other formats, with their size."""
    lines = []
    for name in ("text", "demo"):
        head_dim = load(name)[0]["head_dim"]
        best = {"format": "tq4", "key_scale": _BEST[0], "value_scale": _BEST[1]}
        chosen = [
            ("fp8, no scale", 8.0, texts(name, format="fp8")),
            ("TQ4", 4 + 32 / head_dim, texts(name, **best)),
            ("TQ4, Haar rotation", 4 + 32 / head_dim, texts(name, **best, rotation="haar")),
            ("TQ4 of half vectors", 4 + 64 / head_dim, texts(name, **best, halves=True)),
            ("int4, each vector's minimum and maximum", 4 + 32 / head_dim, texts(name, format="int4")),
        ]
        for what, bits, rows in chosen:
            if rows:
                lines.append((what, str(head_dim), f"{bits:.2f}", *figures(rows)))
    return table(("format", "D", "bits per coordinate", *_HEADER), lines)


def positions() -> str:
    """What happens at which distance from the beginning."""
    environment, _ = load("text")
    rows = texts("text", format="tq4", key_scale=_BEST[0], value_scale=_BEST[1])
    count = len(rows[0]["by_position"]["kl"])
    width = environment["context"] // count
    lines = []
    for i in range(count):
        increase = spread([row["by_position"]["increase_percent"][i] for row in rows])
        kl = mean(row["by_position"]["kl"][i] for row in rows)
        lines.append((f"{i * width:,} to {(i + 1) * width:,}", increase, f"{kl:.5f}"))
    return table(("tokens", *_HEADER[:2]), lines)


def outliers() -> str:
    """Keys with planted outlier channels: one planting for all formats, and TQ4's worst of three."""
    lines = []
    for name in ("text", "demo"):
        for factor, channels in product((10, 30, 100), (1, 4)):
            planted = {"outliers": {"factor": factor, "channels": channels}}
            best = texts(name, format="tq4", key_scale=_BEST[0], value_scale=_BEST[1], **planted)
            plain = texts(name, format="tq4", key_scale="norm", value_scale="norm", **planted)
            others = (texts(name, format=other, **planted) for other in ("int4", "fp8"))
            cells = (spread([row["increase_percent"] for row in rows]) for rows in (best[:1], plain, *others))
            worst = max(row["increase_percent"] for row in best)
            lines.append((str(load(name)[0]["head_dim"]), f"{channels} x {factor}", *cells, f"{worst:+.2f}"))
    return table(("D", "channels", "TQ4", 'TQ4, scale "norm"', "int4", "fp8", "TQ4, worst of 3 plantings"), lines)


def layers() -> str:
    """The effect of leaving layers exact."""
    lines = []
    groups: dict[tuple[int, ...], list[Row]] = defaultdict(list)
    for row in load("text")[1]:
        if row.get("key_scale") == _BEST[0] and row.get("value_scale") == _BEST[1] and "perplexity" in row:
            if row.get("outliers") or row.get("halves") or row["rotation"] != "auto":
                continue
            groups[tuple(row["dense_layers"])].append(row)
    count = load("text")[0]["layers"]
    seeds = {row["seed"] for row in groups[0,]}
    for dense, rows in sorted(groups.items(), key=lambda item: (len(item[0]), item[0])):
        rows = [row for row in rows if row["seed"] in seeds]
        bits = 4.25 + 11.75 * len(dense) / count
        lines.append((", ".join(map(str, dense)) or "none", f"{bits:.2f}", *figures(rows)))
    return table(("exact layers", "bits per coordinate", *_HEADER), lines)


def greedy() -> str:
    """Greedy continuations."""
    lines = []
    for row in load("demo-greedy")[1]:
        until = row["until_first_difference"]
        never = f"{100 * row['never_different']:.0f} %"
        name = f'TQ4, scale "{row["key_scale"]}"' if row["format"] == "tq4" else row["format"]
        lines.append((name, f"{100 * row['same_tokens']:.1f} %", f"{until['median']:.0f}", f"{until['mean']:.0f}", never))
    header = ("format", "same token at the same place", "first difference at token, median", "mean", "no difference")
    return table(header, lines)


def recall() -> str:
    """Accuracy of retrieval against the context."""
    rows = load("recall")[1]
    contexts = sorted({row["context"] for row in rows})
    groups: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[recall_name(row)][row["context"]].append(row)
    lines = []
    for name, by_context in groups.items():
        cells = (
            f"{100 * mean(row['accuracy'] for row in by_context[c]):.2f} ({mean(row['loss'] for row in by_context[c]):.4f})"
            if by_context[c]
            else "-"
            for c in contexts
        )
        lines.append((name, *cells))
    return table(("accuracy, % (loss, nats)", *(f"{context:,}" for context in contexts)), lines)


def recall_name(row: Row) -> str:
    """What a row of the recall file is called in the page."""
    name = "TQ4" if row["format"] == "tq4" else str(row["format"])
    if row["format"] == "tq4":
        keys, values = row["key_scale"], row["value_scale"]
        if keys is None or values is None:
            name += ", keys exact" if keys is None else ", values exact"
        elif (keys, values) != _BEST:
            name += f', scale "{keys}"'
        name += ", Haar rotation" if row["rotation"] == "haar" else ""
    if planted := row.get("outliers"):
        name += f", {planted['channels']} channels x {planted['factor']}"
    return name


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (smollm2, gemma3, decoded, models, scales, formats, positions, outliers, layers, greedy, recall)
}


# Okabe and Ito's, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")


def draw(folder: Path) -> None:
    """Write the plots: divergence by position, and recall by context."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 6.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1)
    for axis in (upper, lower):
        axis.set_prop_cycle(color=_COLOURS)
    width = load("text")[0]["context"]
    for what, wanted in (
        ("TQ4", {"format": "tq4", "key_scale": _BEST[0], "value_scale": _BEST[1]}),
        ('TQ4, scale "norm"', {"format": "tq4", "key_scale": "norm", "value_scale": "norm"}),
        ("int4", {"format": "int4"}),
        ("fp8", {"format": "fp8"}),
    ):
        rows = texts("text", **wanted)
        count = len(rows[0]["by_position"]["kl"])
        places = [(i + 0.5) * width / count for i in range(count)]
        upper.plot(places, [mean(row["by_position"]["kl"][i] for row in rows) for i in range(count)], "o-", label=what, ms=3)
    upper.set(xlabel="position, tokens", ylabel="KL, nats per token", yscale="log", title="text model, D = 128")
    upper.legend(fontsize=8)
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in load("recall")[1]:
        groups[recall_name(row)][row["context"]].append(100 * row["accuracy"])
    planted = ", 4 channels x 100"
    for name, style in (("exact", "o-"), ("TQ4", "x-"), ("int4", "+-"), ("TQ4" + planted, "x--"), ("int4" + planted, "+--")):
        contexts = sorted(groups[name])
        lower.plot(contexts, [mean(groups[name][context]) for context in contexts], style, label=name)
    lower.set(xlabel="context, tokens", ylabel="answers right, %", xscale="log", title="recall model, D = 128", ylim=(0, 103))
    lower.legend(fontsize=8)
    figure.savefig(folder / "quality.png", metadata={"Software": None})


def fill(page: str, tables: dict[str, Callable[[], str]] | None = None, script: str = "quality_tables") -> str:
    """The page with every table of a script made anew."""
    made = TABLES if tables is None else tables

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]]()}\n{match[3]}"

    pattern = rf"(<!-- python benchmarks/{script}\.py (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, replace, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(TABLES))
    parser.add_argument("--write", action="store_true", help="replace the tables and plots of the page")
    args = parser.parse_args()
    if args.name:
        print(TABLES[args.name]())
    if args.write:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        draw(PAGE.parent)


if __name__ == "__main__":
    main()
