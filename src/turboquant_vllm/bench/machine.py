"""What all measurements share: medians with a cold cache, PyTorch's dense attentions, a machine's bandwidth, result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

import turboquant_vllm
from turboquant_vllm.ops import has_triton

__all__ = [
    "DENSE_BACKENDS", "Machine", "best_dense_ms", "copy_bandwidth", "dense_attention", "environment", "graphed", "median_ms",
    "read_bandwidth", "write_results",
]  # fmt: skip

DENSE_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def median_ms(run: Callable[[], object], rep: int = 120, device: str = "cuda") -> float:
    """Median time of ``run`` in milliseconds: on a GPU for ``rep`` of them, the L2 cache flushed before each run."""
    if device == "cuda":
        import triton

        return float(triton.testing.do_bench(run, warmup=25, rep=rep, return_mode="median"))
    run()
    return 1e3 * float(Timer("run()", globals={"run": run}).blocked_autorange(min_run_time=rep / 1000).median)


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
    backends = DENSE_BACKENDS if q.is_cuda else {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    for name, backend in backends.items():

        def run(backend: SDPBackend = backend) -> torch.Tensor:
            return dense_attention(q, k, v, is_causal, backend)

        try:
            run()
            times[name] = median_ms(graphed(run) if graph else run, rep, q.device.type)
        except RuntimeError:
            continue
    best = min(times, key=times.__getitem__)
    return times[best], best, times


def read_bandwidth(device: str = "cuda") -> float:
    """GB/s at which this machine reads memory: a float32 sum of 4 GiB, on a CPU of 256 MiB."""
    x = torch.randn(2**30 if device == "cuda" else 2**26, device=device)
    return x.nbytes / median_ms(lambda: x.sum(), device=device) / 1e6


def copy_bandwidth(device: str = "cuda") -> float:
    """GB/s of a copy of 2 GiB within a device, on a CPU of 256 MiB, bytes read plus bytes written."""
    x = torch.randn(2**29 if device == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median_ms(lambda: y.copy_(x), device=device) / 1e6


@dataclass(frozen=True)
class Machine:
    """What is measured on.

    Attributes:
        device: "cuda" or "cpu".
        name: of the card or processor.
        dtype: of queries and dense caches.
        read, copy: bandwidths in GB/s.
        rep: milliseconds of each measurement.
    """

    device: str
    name: str
    dtype: torch.dtype
    read: float
    copy: float
    rep: int

    @classmethod
    def measured(cls, device: str, rep: int) -> Machine:
        """The machine, its bandwidths measured now."""
        name = torch.cuda.get_device_name() if device == "cuda" else _processor()
        dtype = torch.float16 if device == "cuda" else torch.float32
        found = cls(device, name, dtype, read_bandwidth(device), copy_bandwidth(device), rep)
        if device == "cuda":
            torch.cuda.empty_cache()
        return found

    def median_ms(self, run: Callable[[], object]) -> float:
        """Median time of ``run``, on a GPU replayed from a graph."""
        return median_ms(graphed(run) if self.device == "cuda" else run, self.rep, self.device)


def environment(**more: Any) -> dict[str, Any]:
    """Machine, versions, date, revision and command of this run; TURBOQUANT_REVISION overrides the revision."""
    revision = os.environ.get("TURBOQUANT_REVISION", "")
    if not revision:
        command = ["git", "rev-parse", "HEAD"]
        try:
            folder = Path(__file__).parent
            revision = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            revision = f"release {turboquant_vllm.__version__}"
    triton_version = None
    if has_triton():
        import triton

        triton_version = triton.__version__
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "revision": revision,
        "command": _command(),
        **more,
    }


def write_results(path: Path, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write ``{"environment": ..., "rows": [...]}``, one row a line, so that a diff shows what changed."""
    lines = ",\n".join("    " + json.dumps(row) for row in rows)
    text = f'{{\n  "environment": {json.dumps(env)},\n  "rows": [\n{lines}\n  ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _command() -> str:
    """The command line of this process, without the folders that programs lie in and results go to."""
    program = Path(sys.argv[0])
    folder = f"{program.parent.name}/" if program.parent.name == "benchmarks" else ""
    name = "turboquant" if program.stem in ("turboquant", "__main__") else f"python {folder}{program.name}"
    arguments = sys.argv[1:]
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return " ".join([name, *arguments])


def _processor() -> str:
    """The processor's model, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
