"""Pictures of how TQ4 works: levels of the codec, keys of the demo's model (keys.json), the way of a tile in the kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from scipy.special import beta

from pictures_measured import LIGHT, OTHER, OURS, WIDTH
from turboquant_vllm import lloyd_max

KEYS = Path(__file__).parent / "keys.json"
_HEAD_DIM = 128


def levels() -> dict[str, Any]:
    """The law of a rotated unit vector's coordinate, its levels, and what is lost."""
    book = lloyd_max(_HEAD_DIM)
    return {
        "head_dim": _HEAD_DIM,
        "centroids": [round(float(x), 6) for x in book.centroids],
        "boundaries": [round(float(x), 6) for x in book.boundaries],
        "lost": round(_HEAD_DIM * book.mse, 4),
    }


def _density(y: np.ndarray, head_dim: int) -> np.ndarray:
    found: np.ndarray = (1 - y**2) ** ((head_dim - 3) / 2) / beta(0.5, (head_dim - 1) / 2)
    return found


def draw_levels(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axis = figure.add_subplot()
    levels, boundaries = np.array(data["centroids"]), np.array(data["boundaries"])
    y = np.linspace(-1.3, 1.3, 400) * levels[-1]
    axis.fill_between(y, _density(y, data["head_dim"]), color=LIGHT, linewidth=0)
    axis.vlines(boundaries, 0, _density(boundaries, data["head_dim"]), color="white", linewidth=1.5)
    axis.plot(levels, _density(levels, data["head_dim"]), "o", color=OURS, markersize=5, clip_on=False)
    axis.vlines(levels, 0, _density(levels, data["head_dim"]), color=OURS, linewidth=1)
    for code, (level, height) in enumerate(zip(levels, _density(levels, data["head_dim"]), strict=True)):
        axis.text(level, height + 0.12, f"{code:X}", ha="center", va="bottom", fontsize=9, color=OURS)
    axis.set_xlim(y[0], y[-1])
    axis.set_ylim(0, 5)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_xticks([-0.2, -0.1, 0, 0.1, 0.2])
    axis.set_xlabel(f"coordinate of a rotated unit vector, D = {data['head_dim']}")
    axis.text(0.02, 0.95, "law of the\ncoordinate", transform=axis.transAxes, va="top", color="#555555")
    axis.text(0.98, 0.95, "16 levels,\ncodes 0 to F", transform=axis.transAxes, va="top", ha="right", color=OURS)
    return figure


def say_levels(data: dict[str, Any]) -> str:
    return (
        f"The law of one coordinate of a randomly rotated unit vector (grey), cut into 16 cells, and the level of each (blue): "
        f"the mean of its cell. With the vector's length as scale the squared error is {data['lost']} of the squared length."
    )


def offset() -> dict[str, Any]:
    """Keys, and how far off they are read back without and with an offset."""
    content: dict[str, Any] = json.loads(KEYS.read_text(encoding="utf-8"))
    return content


def draw_offset(data: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    keys = np.array(data["keys"])
    middle = np.delete(keys, data["outlier"], 0).mean(0)
    for axis, name, title in ((axes[0], "plain", "plain TQ4"), (axes[1], "offsets", "around an offset")):
        axis.plot([0], [0], "+", color="black", markersize=11, mew=1.6)
        for key, away in zip(keys, data[name], strict=True):
            axis.add_patch(Circle(tuple(key), away, color=OTHER, alpha=0.22, linewidth=0))
        axis.plot(keys[:, 0], keys[:, 1], "o", color=OURS, markersize=3.2, zorder=3)
        axis.set_title(f"{title}: error {100 * data[f'{name}_error']:.1f} % of the keys", loc="left")
        axis.set_aspect("equal")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[["left", "bottom"]].set_visible(False)
    axes[0].text(0, -1.2, "zero", ha="center", va="top")
    axes[1].text(0, -1.2, "zero", ha="center", va="top")
    axes[1].annotate("", middle, (0, 0), arrowprops={"arrowstyle": "->", "color": "black", "linewidth": 1.4})
    axes[1].text(*(0.4 * middle + [0, 0.6]), "the group's offset", ha="center", va="bottom")
    axes[1].plot(*keys[data["outlier"]], "o", mfc="none", mec="black", markersize=9)
    axes[1].annotate(
        "its outlier",
        keys[data["outlier"]],
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        va="bottom",
    )
    return figure


def say_offset(data: dict[str, Any]) -> str:
    return (
        f"{len(data['keys'])} keys of the demo's model (layer {data['layer']}, head {data['head']}), in the plane that shows "
        f"most of them. The radius of a disc is the error with which that key comes back: {100 * data['plain_error']:.1f} % of "
        f"the keys' length as plain TQ4, {100 * data['offsets_error']:.1f} % around an offset."
    )


# What happens to a tile of 16 tokens in the native kernel, from top to bottom: what is there, and how it came about.
_WALK = [
    (
        "memory",
        "page of the cache",
        "16 tokens: codes of keys and values, a scale each",
        "asynchronous copy, a ring of tiles a warp",
    ),
    ("shared", "tile in shared memory", "bytes; each is two codes", "table look-up: byte to two levels in half precision"),
    ("register", "16 x D levels of the keys", "never written to memory", "matrix unit, with the queries rotated once before"),
    ("register", "scores", "times the scale of each key, plus the group's", "running maximum and sum: softmax"),
    ("register", "weights", "times the scale of each value", "matrix unit, with levels of the values, found likewise"),
    ("register", "sums of a warp's tiles", "in the rotated basis", "once, after the last tile: join warps, rotate back"),
    ("memory", "result", "in the original basis", ""),
]
_PLACES = {"memory": "#E8E8E8", "shared": "#CFE6F5", "register": "#9CCBEA"}


def tile() -> dict[str, Any]:
    """The stations of a tile; nothing here is measured."""
    return {"walk": _WALK}


def draw_tile(data: dict[str, Any]) -> Figure:
    steps = data["walk"]
    figure = Figure(figsize=(WIDTH, 0.98 * len(steps)))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_xlim(0, 10)
    axis.set_ylim(-2 * len(steps) + 0.75, 0.1)
    axis.axis("off")
    for row, (place, what, note, how) in enumerate(steps):
        top = -2 * row
        _box(axis, top, _PLACES[place])
        axis.text(5, top - 0.38, what, ha="center", va="center", fontsize=10.5, fontweight="bold")
        axis.text(5, top - 0.85, note, ha="center", va="center", fontsize=9.2)
        if how:
            axis.annotate("", (0.7, top - 2.0), (0.7, top - 1.2), arrowprops={"arrowstyle": "-|>", "color": "black"})
            axis.text(1.1, top - 1.6, how, va="center", fontsize=9.2, style="italic")
    return figure


def _box(axis: Axes, top: float, colour: str) -> None:
    axis.add_patch(FancyBboxPatch((0.1, top - 1.15), 9.8, 1.1, boxstyle="round,pad=0,rounding_size=0.15", color=colour))


def say_tile(_: dict[str, Any]) -> str:
    return "Grey: GPU memory. Light blue: shared memory. Blue: registers, which levels, scores and weights never leave."
