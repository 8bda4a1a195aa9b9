"""Formats in one picture: what each loses against what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["quality_against_bytes"]


def quality_against_bytes(axis: Axes, points: list[tuple[str, float, float]]) -> None:
    """Formats, as ``(name, bytes, KL)``: down and to the left is better."""
    middle = sum(size for _, size, _ in points) / max(len(points), 1)
    for name, size, kl in points:
        axis.plot(size, kl, "o")
        side, shift = ("left", 7) if size <= middle else ("right", -7)  # so that names stay within the picture
        axis.annotate(name, (size, kl), textcoords="offset points", xytext=(shift, -3), ha=side, fontsize=9)
    axis.set(
        xlabel="bytes of a token in all layers",
        ylabel="KL divergence, nats a token",
        ylim=(0, 1.1 * max((kl for *_, kl in points), default=1)),
    )
    axis.margins(x=0.2)
    axis.grid(alpha=0.3)
