"""Run parts of the benchmark, one case after the other, and keep what each gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from turboquant_vllm.bench.kernels import WrongAnswerError
from turboquant_vllm.bench.machine import Machine, environment
from turboquant_vllm.bench.parts import PARTS
from turboquant_vllm.demo.output import one_line

__all__ = ["run_bench"]


def run_bench(
    part: str = "all",
    *,
    quick: bool = False,
    device: str = "auto",
    progress: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """Measure a part, or all, on this machine; on a CPU with small sizes.

    Args:
        part: "decode", "prefill", "paged", "store", "hf", "vllm", "quality" or "all".
        quick: fewer cases, and less time for each.
        device: "auto", "cpu" or "cuda".
        progress: called with what is being measured.

    Returns:
        ``environment``, with the machine's bandwidths; ``rows``, one for each case, its answer checked before it was timed;
        ``failed``: cases whose answer was wrong, and how; ``left_out``: parts that cannot run here, and why.

    Raises:
        ValueError: there is no such part.
    """
    if part != "all" and part not in PARTS:
        raise ValueError(f"part: expected all, {', '.join(PARTS)}, got {part!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    progress("bandwidth")
    machine = Machine.measured(device, 30 if quick else 120)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in PARTS if part == "all" else [part]:
        try:
            for case, measure in PARTS[name](machine, quick):
                progress(f"{name}: {case}")
                try:
                    rows.append({"part": name, "case": case, **measure()})
                except WrongAnswerError as error:
                    failed[f"{name}: {case}"] = str(error)
                if device == "cuda":
                    torch.cuda.empty_cache()
        except (ImportError, LookupError, torch.OutOfMemoryError) as error:
            left_out[name] = str(error) if type(error) is LookupError else one_line(error)
    about = {"machine": machine.name, "device": device, "quick": quick}
    bandwidths = {"read_gb_per_s": round(machine.read, 1), "copy_gb_per_s": round(machine.copy, 1)}
    return {"environment": environment(**about, **bandwidths), "rows": rows, "failed": failed, "left_out": left_out}
