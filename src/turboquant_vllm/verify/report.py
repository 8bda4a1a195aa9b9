"""What `turboquant verify` prints: a progress bar on standard error, tables, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from turboquant_vllm.demo.output import make_console
from turboquant_vllm.demo.report import progress_bar
from turboquant_vllm.quality.caches import WEIGHTS
from turboquant_vllm.verify.run import Progress

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_report", "shown_progress"]

_MOST_CONTRIBUTORS = 5


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A progress bar on standard error, as `run_verify` calls it."""
    with progress_bar(make_console(stderr=True)) as bar:
        task = bar.add_task("", total=None)

        def progress(doing: str | None, steps: int) -> None:
            if doing is None:
                bar.advance(task, steps)
            else:
                bar.reset(task, description=doing, total=steps or None)

        yield progress


def print_report(console: Console, figures: dict[str, Any]) -> None:
    """Print what `run_verify` returned."""
    from rich.table import Table

    title = (
        f"{figures['model']}, {figures['device']}, {figures['dtype']}: {figures['tokens']:,} tokens of {figures['text']},"
        f" {figures['context']} at a time"
    )
    table = Table(title=title, title_justify="left")
    for name in ("cache", "bytes/token", "perplexity", "increase (95 %)", "KL, nats", "1 - TVD", "agreement"):
        table.add_column(name, justify="left" if name == "cache" else "right")
    bf16 = figures["bytes_per_token"]["bf16"]
    table.add_row("exact (bf16)", f"{bf16:,.0f}", f"{figures['perplexity']['exact']:.4f}")
    for row in figures["formats"]:
        low, high = row["increase_percent_interval"]
        table.add_row(
            row["title"],
            f"{row['bytes_per_token']:,.0f} ({bf16 / row['bytes_per_token']:.2f}x)",
            f"{row['perplexity']:.4f}",
            f"{row['increase_percent']:+.2f} % ({low:+.2f} to {high:+.2f})",
            f"{row['kl']:.5f}",
            f"{100 * (1 - row['tvd']):.1f} %",
            f"{100 * row['agreement']:.1f} %",
            style="bold" if row["format"] == figures["format"] and len(figures["formats"]) > 1 else None,
        )
    console.print(table)

    chosen = next(row["title"] for row in figures["formats"] if row["format"] == figures["format"])
    if figures["layers"]:
        shares = {item["layer"]: item["kl_share"] for item in figures["contributors"]}
        worst = set(list(shares)[:_MOST_CONTRIBUTORS])
        layers = Table(
            title=f"{chosen} by layer: relative errors, and that layer's share of the divergence", title_justify="left"
        )
        for name in ("layer", "keys", "values", "attention", "share"):
            layers.add_column(name, justify="right")
        for item in figures["layers"]:
            found = (item[f"{what}_error"] for what in ("key", "value", "attention"))
            errors = ("" if error is None else f"{100 * error:.2f} %" for error in found)
            share = f"{100 * shares[item['layer']]:.0f} %"
            layers.add_row(str(item["layer"]), *errors, share, style="bold" if item["layer"] in worst else None)
        console.print(layers)

    if (source := figures["key_scales"]) is not None:
        weights = f"the weights; turboquant calibrate {figures['model']} measures them on a text"
        console.print(f"scales: from {weights if source == WEIGHTS else source}")
    advice = figures["recommendation"]
    verdict = "passed" if figures["passed"] else "FAILED"
    console.print(
        f"{verdict}: {chosen} {figures['increase_percent']:+.2f} % perplexity, limit {figures['max_ppl_increase']:g} %"
    )
    gain = figures["increase_percent"] - advice["increase_percent"]
    measured = (
        f" ({advice['increase_percent']:+.2f} %, {gain:.2f} points less, {advice['bytes_per_token']:,.0f} bytes per token)"
    )
    changed = advice["dense_layers"] != figures["dense_layers"]
    console.print(f"recommendation: {advice['text']}{measured if changed else ''}; {figures['seconds']} s")
    if advice["cache"]:
        console.print(f"{'use' if advice['within_limit'] else 'loses least'}: {advice['cache']}", soft_wrap=True)
    if advice["cache"] and (dense := advice["dense_layers"]):
        numbers = " ".join(map(str, dense))
        console.print(
            f"in vLLM: --attention-backend CUSTOM --kv-cache-dtype tq4 --kv-cache-dtype-skip-layers {numbers}", soft_wrap=True
        )
    if unused := figures["unused_weights"]:
        console.print(f"note: the model has no place for {len(unused):,} tensors of its files, such as {unused[0]}")
