"""The demo's picture: the error that 4 bits leave in each layer, why it is that small, and what formats lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import beta

from turboquant_vllm import TQ4Codec
from turboquant_vllm.quality.figure import quality_against_bytes

_KEYS, _VALUES, _INK, _GRID, _LEVELS = "#2a6f97", "#e08e45", "#22303c", "#d5dbe0", "#b3261e"


def coordinate_density(y: np.ndarray, head_dim: int) -> np.ndarray:
    """Density at `y` in [-1, 1] of one coordinate of a uniformly random unit vector of `head_dim` coordinates."""
    return (1 - y**2) ** ((head_dim - 3) / 2) / beta(0.5, (head_dim - 1) / 2)


def draw(
    path: Path,
    attention_error: list[float],
    histogram: dict[str, torch.Tensor],
    limit: float,
    codec: TQ4Codec,
    formats: list[dict[str, Any]],
    title: str,
) -> None:
    """Write a PNG: the error per layer; the coordinates against their law, the levels and the boundaries; formats.

    Args:
        path: file to write.
        attention_error: per layer, |output - exact| / |exact|.
        histogram: counts of rotated normalised coordinates in [-limit, limit], for "keys" and "values".
        limit: half the width of the histogram.
        codec: gives head dimension, levels and boundaries.
        formats: of `compare_formats`, drawn as divergence against bytes.
        title: line above all.
    """
    # The object interface leaves pyplot's global state and its choice of a display alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=_INK)
    left, right, last = figure.subplots(1, 3, width_ratios=(1, 1.5, 1))

    percent = [100 * error for error in attention_error]
    bars = left.bar(range(len(percent)), percent, color=_KEYS, width=0.68)
    left.bar_label(bars, fmt="%.1f", padding=2, fontsize=9, color=_INK)
    left.set_xticks(range(len(percent)))
    left.set_ylim(0, 1.15 * max(percent))
    left.set_xlabel("layer")
    left.set_ylabel("|TQ4 - exact| / |exact|  (%)")
    left.set_title("Attention output, same inputs", fontsize=11, color=_INK)
    left.yaxis.grid(True, color=_GRID, linewidth=0.8)

    densities = {}
    for name, counts in histogram.items():
        edges = np.linspace(-limit, limit, counts.numel() + 1)
        densities[name] = (counts / counts.sum()).double().numpy() / (edges[1] - edges[0]), edges
    right.stairs(*densities["keys"], fill=True, color=_KEYS, alpha=0.45, label="keys")
    right.stairs(*densities["values"], color=_VALUES, linewidth=1.8, label="values")
    y = np.linspace(-limit, limit, 501)
    law = coordinate_density(y, codec.head_dim)
    right.plot(y, law, color=_INK, linewidth=1.5, linestyle=(0, (4, 2)), label="exact law")
    boundaries, centroids = codec.boundaries.cpu().numpy(), codec.centroids.cpu().numpy()
    right.vlines(boundaries, 0, 1.05 * law.max(), color=_INK, linewidth=0.7, alpha=0.5, label="15 boundaries")
    right.plot(
        centroids,
        np.zeros(len(centroids)),
        "^",
        color=_LEVELS,
        markersize=6,
        clip_on=False,
        zorder=5,
        label="16 levels",
    )
    right.set_xlim(-limit, limit)
    right.set_ylim(0, 1.22 * law.max())
    right.set_xlabel(f"coordinate of a normalised, rotated vector, head dimension {codec.head_dim}")
    right.set_ylabel("density")
    right.set_title(r"What the quantiser sees (law: density $\propto (1-y^2)^{(D-3)/2}$)", fontsize=11, color=_INK)
    right.legend(frameon=False, fontsize=9, loc="upper center", ncols=5, columnspacing=1.2, handlelength=1.6)
    quality_against_bytes(last, [(row["title"], row["bytes_per_token"], row["kl"]) for row in formats])
    last.set_title("What a format loses, down and left is better", fontsize=11, color=_INK)
    for axes in (left, right, last):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK, labelsize=9)
    figure.savefig(path)
