"""Where the result files of this folder are, and what `turboquant bench` shares with its programs."""

from __future__ import annotations

from pathlib import Path

from turboquant_vllm.bench.machine import (
    best_dense_ms,
    copy_bandwidth,
    dense_attention,
    environment,
    graphed,
    median_ms,
    read_bandwidth,
    write_results,
)

__all__ = [
    "BYTES_PER_TOKEN",
    "RESULTS",
    "best_dense_ms",
    "copy_bandwidth",
    "dense_attention",
    "environment",
    "graphed",
    "median_ms",
    "read_bandwidth",
    "write_results",
]

RESULTS = Path(__file__).parent / "results"
BYTES_PER_TOKEN = {64: 72, 128: 136, 256: 264}  # codes and norms of K and V, one kv head
