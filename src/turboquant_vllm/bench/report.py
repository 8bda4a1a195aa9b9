"""Tables and plots of what `turboquant bench` measured."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turboquant_vllm.quality.figure import quality_against_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

__all__ = ["plot", "print_rows"]

_COLUMNS = {
    "case": "case", "ours_ms": "ours, ms", "best_dense_ms": "dense, ms", "best_dense": "best dense", "ratio": "times as fast",
    "read_share": "of read bandwidth", "copy_share": "of copy bandwidth", "bytes_per_token": "bytes a token", "kl": "KL, nats",
    "increase_percent": "perplexity, %", "error": "error",
}  # fmt: skip


def print_rows(console: Console, found: dict[str, Any]) -> None:
    """A table for each part, then what failed and what was left out."""
    from rich.table import Table

    about = found["environment"]
    small = ", small sizes" if about["device"] == "cpu" else ""
    console.print(f"{about['machine']}{small}: reads {about['read_gb_per_s']:,} GB/s, copies {about['copy_gb_per_s']:,} GB/s")
    for part, rows in _by_part(found["rows"]).items():
        columns = [name for name in _COLUMNS if any(name in row for row in rows)]
        table = Table(title=part, title_justify="left")
        for name in columns:
            table.add_column(_COLUMNS[name], justify="left" if name in ("case", "best_dense") else "right")
        for row in rows:
            table.add_row(*(_cell(name, row.get(name)) for name in columns))
        console.print(table)
    for case, reason in found["failed"].items():
        console.print(f"WRONG ANSWER, not timed: {case}: {reason}", soft_wrap=True)
    for part, reason in found["left_out"].items():
        console.print(f"left out: {part}: {reason}", soft_wrap=True)


def plot(found: dict[str, Any], folder: Path) -> list[Path]:
    """Time against context, share of the read bandwidth, and divergence against bytes, of the parts that were measured.

    Returns:
        The files that were written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    parts, written, machine = _by_part(found["rows"]), [], found["environment"]["machine"]
    for part in ("decode", "paged"):
        if rows := parts.get(part):
            figure, (times, shares) = plt.subplots(2, 1, figsize=(6, 7), sharex=True)
            _over_contexts(times, shares, rows)
            figure.suptitle(f"{part}: {machine}", fontsize=10)
            written.append(_save(figure, folder / f"{part}.png"))
    if rows := parts.get("quality"):
        figure, axis = plt.subplots(figsize=(6, 4))
        quality_against_bytes(axis, [(row["format"], row["bytes_per_token"], row["kl"]) for row in rows])
        written.append(_save(figure, folder / "quality.png"))
    return written


def _over_contexts(times: Axes, shares: Axes, rows: list[dict[str, Any]]) -> None:
    for batch in sorted({row["shape"]["batch"] for row in rows}):
        some = [row for row in rows if row["shape"]["batch"] == batch]
        contexts = [row["shape"]["kv_len"] for row in some]
        suffix = f", batch {batch}"
        times.plot(contexts, [row["best_dense_ms"] for row in some], "s--", label=f"dense{suffix}", markersize=4)
        times.plot(contexts, [row["ours_ms"] for row in some], "o-", label=f"TQ4{suffix}", markersize=4)
        shares.plot(contexts, [row["read_share"] for row in some], "o-", label=f"TQ4{suffix}", markersize=4)
    times.set(xscale="log", yscale="log", ylabel="one call, ms")
    shares.set(xlabel="context, tokens", ylabel="share of read bandwidth", ylim=(0, None))
    for axis in (times, shares):
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return path


def _by_part(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found = defaultdict(list)
    for row in rows:
        found[row["part"]].append(row)
    return found


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in ("read_share", "copy_share"):
        return f"{100 * value:.1f} %"
    if name == "error":
        return f"{value:.1e}"
    return f"{value:,.3g}" if isinstance(value, float) else str(value)
