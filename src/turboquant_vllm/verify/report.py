"""What `turboquant verify` prints: a progress bar on standard error, tables, and the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from turboquant_vllm.demo.output import make_console
from turboquant_vllm.demo.report import progress_bar
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

    perplexity, interval, memory = figures["perplexity"], figures["perplexity_interval"], figures["bytes_per_token"]
    title = (
        f"{figures['model']}, {figures['device']}, {figures['dtype']}: {figures['tokens']:,} tokens of {figures['text']},"
        f" {figures['context']} at a time"
    )
    table = Table(title=title, title_justify="left")
    for name in ("", "exact", "TQ4", "change"):
        table.add_column(name, justify="right" if name else "left")
    low, high = figures["increase_percent_interval"]
    table.add_row(
        "perplexity",
        f"{perplexity['exact']:.4f}",
        f"{perplexity['tq4']:.4f}",
        f"{figures['increase_percent']:+.2f} % ({low:+.2f} to {high:+.2f})",
    )
    bounds = (f"{interval[name][0]:.3f} to {interval[name][1]:.3f}" for name in ("exact", "tq4"))
    table.add_row("  95 % interval", *bounds, "")
    table.add_row("divergence, nats per token", "", f"{figures['kl']:.5f}", "")
    table.add_row("same most likely token", "", f"{100 * figures['agreement']:.1f} %", "")
    less = f"{memory['bf16'] / memory['tq4']:.2f}x less"
    table.add_row("cache, bytes per token", f"{memory['bf16']:,} (bf16)", f"{memory['tq4']:,}", less)
    console.print(table)

    shares = {item["layer"]: item["kl_share"] for item in figures["contributors"]}
    worst = set(list(shares)[:_MOST_CONTRIBUTORS])
    layers = Table(title="relative errors by layer; share of the divergence that goes away with that layer exact")
    for name in ("layer", "keys", "values", "attention", "share"):
        layers.add_column(name, justify="right")
    for item in figures["layers"]:
        errors = (f"{100 * item[f'{what}_error']:.2f} %" for what in ("key", "value", "attention"))
        share = f"{100 * shares[item['layer']]:.0f} %" if item["layer"] in shares else "exact"
        layers.add_row(str(item["layer"]), *errors, share, style="bold" if item["layer"] in worst else None)
    console.print(layers)

    advice = figures["recommendation"]
    verdict = "passed" if figures["passed"] else "FAILED"
    console.print(f"{verdict}: {figures['increase_percent']:+.2f} % perplexity, limit {figures['max_ppl_increase']:g} %")
    gain = figures["increase_percent"] - advice["increase_percent"]
    measured = f" ({advice['increase_percent']:+.2f} %, {gain:.2f} points less, {advice['bytes_per_token']:,} bytes per token)"
    changed = advice["dense_layers"] != figures["dense_layers"]
    console.print(f"recommendation: {advice['text']}{measured if changed else ''}; {figures['seconds']} s")
    if unused := figures["unused_weights"]:
        console.print(f"note: the model has no place for {len(unused):,} tensors of its files, such as {unused[0]}")
