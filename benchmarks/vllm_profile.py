"""What the GPUs of an engine do while it steps, by rank: ``vllm_worker.py`` gives vLLM's workers the methods that tell.

A rank's kernels and when none of them runs; what of a step's time that is, is the host's. A collective waits on the GPU for the
other ranks, so its time is no kernel's work, and stands apart.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import Any

import torch

EXTENSION = "vllm_profile.ProfiledWorker"  # for vLLM's `worker_extension_cls`
OF_ATTENTION = re.compile("tq4|store|cache|flash|attention|rotat|previous|plan", re.IGNORECASE)
# Inductor names its kernels after all that they follow, collectives too.
COLLECTIVE = re.compile(r"^(?!triton_).*(nccl|cross_device|all_?reduce|all_?gather|reduce_?scatter|multimem)", re.IGNORECASE)


def short(name: str) -> str:
    """A kernel's name without its return type, arguments and parameters of templates."""
    return name.replace("(anonymous namespace)::", "").split("(")[0].split("<")[0].removeprefix("void ")


def busy_us(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of them lasts: kernels overlap, those of other streams and those that are launched early."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def summary(events: Iterable[Any], steps: int) -> dict[str, Any]:
    """Of a step, from a profiler's events of ``steps``: milliseconds of its kernels and copies but collectives, of these, and
    in which any of all runs; launches, and how many are of what this library or attention needs."""
    on_gpu = [one for one in events if one.device_type == torch.autograd.DeviceType.CUDA and not one.is_user_annotation]
    kernels = [(short(one.name), one.time_range.start, one.time_range.end) for one in on_gpu]
    collective = sum(end - start for name, start, end in kernels if COLLECTIVE.search(name))
    alone = sum(end - start for name, start, end in kernels if not COLLECTIVE.search(name))
    busy = busy_us((start, end) for _, start, end in kernels)
    counts = collections.Counter(name for name, _, _ in kernels)
    return {
        "kernel_ms": round(alone / steps / 1e3, 4),
        "collective_ms": round(collective / steps / 1e3, 4),
        "busy_ms": round(busy / steps / 1e3, 4),
        "launches": len(kernels) / steps,
        "of_attention": {name[-80:]: count / steps for name, count in counts.items() if OF_ATTENTION.search(name)},
    }


def host_times(ms_per_step: float, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """A step's wall time, without a profiler, and how much of it the GPU runs nothing, gaps between kernels of one graph too:
    of the rank which waits least in collectives, since there the others' hosts add least to what seems to be the GPU's work."""
    waits = [rank["collective_ms"] for rank in ranks]
    chosen = waits.index(min(waits))
    times = {name: ranks[chosen][name] for name in ("kernel_ms", "collective_ms", "busy_ms", "launches")}
    found = {"ms_per_step": ms_per_step, "host_ms": round(ms_per_step - times["busy_ms"], 4), **times}
    return found | ({"rank": chosen, "collective_ms_of_ranks": waits} if len(ranks) > 1 else {})


class ProfiledWorker:
    """Methods that each worker of an engine has, for ``collective_rpc``; vLLM refuses names that a worker has already."""

    step_profiler: torch.profiler.profile

    def start_step_profile(self) -> None:
        torch.cuda.synchronize()  # what was launched before is of no step to come
        self.step_profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.step_profiler.start()

    def end_step_profile(self, steps: int) -> dict[str, Any]:
        torch.cuda.synchronize()
        self.step_profiler.stop()
        return summary(self.step_profiler.events() or (), steps)
