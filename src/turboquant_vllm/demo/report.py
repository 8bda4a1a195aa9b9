"""What the demo prints: a progress bar, a table, and one prompt continued twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def progress_bar(console: Console) -> Progress:
    """A bar with counts and times that leaves no trace when it is done, and none at all where there is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    )


def print_report(console: Console, figures: dict[str, Any]) -> None:
    """Print the figures of `run_demo`."""
    from rich.table import Table

    memory, perplexity, vectors = figures["bytes_per_token"], figures["perplexity"], figures["vector_error"]
    title = f"{figures['tokens']:,} held-out tokens in {figures['windows']} windows, {figures['device']}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("exact", "TQ4", "change"):
        table.add_column(name, justify="right")
    table.add_row(
        "cache, bytes per token",
        f"{memory['bf16']:,} (bf16)",
        f"{memory['tq4']:,.0f}",
        f"{figures['compression']:.2f}x less",
    )
    table.add_row(
        "perplexity",
        f"{perplexity['exact']:.3f}",
        f"{perplexity['tq4']:.3f}",
        f"{figures['perplexity_change_percent']:+.2f} %",
    )
    table.add_row("same most likely token", "", f"{100 * figures['argmax_agreement']:.1f} %", "")
    table.add_section()
    for name in ("keys", "values"):
        theory = f"{vectors['expected']:.5f} (theory, 'norm')"  # of the scale that is the length; the default loses no more
        table.add_row(f"error of {name}, |x - x'|² / |x|²", theory, f"{vectors[name]:.5f}", "")
    table.add_section()
    for layer, error in enumerate(figures["attention_error"]):
        table.add_row(f"error of attention, layer {layer}", "", f"{100 * error:.2f} %", "")
    console.print(table)

    formats = Table(title=f"formats of a cache, {figures['format_windows']} of these windows", title_justify="left")
    for name in ("", "bytes per token", "perplexity", "KL, nats", "same token"):
        formats.add_column(name, justify="right" if name else "left")
    for row in figures["formats"]:
        change = f"{row['perplexity']:.3f} ({row['increase_percent']:+.2f} %)"
        formats.add_row(
            row["title"], f"{row['bytes_per_token']:,.0f}", change, f"{row['kl']:.5f}", f"{100 * row['agreement']:.1f} %"
        )
    console.print(formats)

    written = figures["continuation"]
    console.rule("held-out prompt", align="left")
    console.print(written["prompt"], markup=False, highlight=False)
    for name, label in (("exact", "exact"), ("tq4", "TQ4"), ("held_out", "the file itself")):
        console.rule(f"continued: {label}", align="left")
        console.print(written[name], markup=False, highlight=False)
    console.rule(align="left")
    console.print(f"first {written['same_tokens']} of {written['new_tokens']} tokens the same; {figures['seconds']} s")
