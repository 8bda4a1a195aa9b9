"""Draw time against context length: `python benchmarks/plot_decode.py`, from decode-contexts-h200.json to docs/decode.png."""

from __future__ import annotations

import json

import matplotlib

from common import RESULTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    results = json.loads((RESULTS / "decode-contexts-h200.json").read_text())
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, batch in zip(axes, (1, 16), strict=True):
        rows = [row for row in results["rows"] if row["id"] == f"batch{batch}"]
        context = [row["shape"][4] for row in rows]
        for key, label, style in (
            ("best_fp16_ms", "fp16, best of PyTorch", "o-"),
            ("ours_ms", "TQ4, native", "o-"),
            ("floor_ms", "136 bytes a token at read bandwidth", "--"),
        ):
            axis.plot(context, [1000 * row[key] for row in rows], style, label=label, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel="context, tokens", title=f"batch {batch}, 32 / 8 heads of 128")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("one call, microseconds")
    axes[0].legend()
    environment = results["environment"]
    figure.suptitle(f"Decode attention on {environment['gpu']}, cold L2, CUDA graphs ({environment['date']})")
    figure.tight_layout()
    figure.savefig(RESULTS.parent.parent / "docs" / "decode.png", dpi=110)


if __name__ == "__main__":
    main()
