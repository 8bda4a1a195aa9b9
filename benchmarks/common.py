"""What all benchmarks share: cold-cache medians, PyTorch's best dense attention, the card's bandwidth, result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

RESULTS = Path(__file__).parent / "results"
BYTES_PER_TOKEN = {64: 72, 128: 136, 256: 264}  # codes and norms of K and V, one kv head
DENSE_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def median_ms(run: Callable[[], object], rep: int = 120) -> float:
    """Median time of ``run`` in milliseconds, the L2 cache flushed before each run."""
    return float(triton.testing.do_bench(run, warmup=25, rep=rep, return_mode="median"))


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` captured once in a CUDA graph; calling the result replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, backend: SDPBackend) -> torch.Tensor:
    """PyTorch's attention on ``[B, H, N, D]`` with grouped heads, by one backend."""
    grouped = q.shape[1] != k.shape[1]
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)


def best_dense_ms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, *, rep: int = 120, graph: bool = False
) -> tuple[float, str, dict[str, float]]:
    """Time of the fastest of PyTorch's backends, its name, and all times; one that refuses the inputs is left out."""
    times: dict[str, float] = {}
    for name, backend in DENSE_BACKENDS.items():

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            return dense_attention(q, k, v, is_causal, backend)

        try:
            run()
            times[name] = median_ms(graphed(run) if graph else run, rep)
        except RuntimeError:
            continue
    best = min(times, key=times.__getitem__)
    return times[best], best, times


def read_bandwidth() -> float:
    """GB/s at which this card reads memory: a float32 sum of 4 GiB."""
    x = torch.randn(2**30, device="cuda")
    return x.nbytes / median_ms(lambda: x.sum()) / 1e6


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy of 2 GiB, bytes read plus bytes written."""
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e6


def environment(**more: Any) -> dict[str, Any]:
    """GPU, versions, date and git revision of this run; TURBOQUANT_REVISION overrides the latter."""
    revision = os.environ.get("TURBOQUANT_REVISION", "")
    if not revision:
        command = ["git", "rev-parse", "HEAD"]
        try:
            revision = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            revision = "unknown"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision,
        **more,
    }


def write_results(path: Path, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write ``{"environment": ..., "rows": [...]}``, one row a line, so that a diff shows what changed."""
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    text = f'{{\n  "environment": {json.dumps(env)},\n  "rows": [\n{lines}\n  ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
