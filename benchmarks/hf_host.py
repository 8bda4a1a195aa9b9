"""What limits an eager step: how long the host takes to ask for it, how long the GPU to do it, and what of ours costs the host.

A step that takes as long as asking for it is bound by the host: the GPU waits for launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from turboquant_vllm.hf import CACHE_ARGUMENT

__all__ = ["host_row"]

_TIMED = "timed"


class _Stopwatch:
    """Calls a function and adds up the host's time in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


@torch.inference_mode()
def host_row(model: Any, cache: Any, attention: str, batch: int, tokens: int, steps: int = 8) -> dict[str, Any]:
    """Milliseconds of single-token steps of a filled cache, and microseconds a layer of its update and of attention.

    ``step_ms`` is a step without interruption, ``enqueue_ms`` how long the host takes for one while nothing is waited for,
    ``gpu_ms`` the sum of its kernels' times, ``kernels`` how many these are.
    """
    ids = torch.ones((batch, 1), dtype=torch.long, device="cuda")
    mask = torch.ones((batch, tokens + 5 * steps), dtype=torch.long, device="cuda")

    def step() -> None:
        model(ids, attention_mask=mask[:, : cache.get_seq_length() + 1], **{CACHE_ARGUMENT: cache})

    def timed(count: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        asked = time.perf_counter()
        torch.cuda.synchronize()
        return 1e3 * (asked - start) / count, 1e3 * (time.perf_counter() - start) / count

    model.set_attn_implementation(attention)
    timed(steps)
    enqueue_ms = statistics.median(timed(1)[0] for _ in range(steps))
    step_ms = timed(steps)[1]
    kernels, gpu_ms = _gpu_time(step, steps // 2)
    update_us, attention_us = _calls(model, cache, attention, lambda: timed(steps // 2), steps // 2)
    return {
        "step_ms": round(step_ms, 3),
        "enqueue_ms": round(enqueue_ms, 3),
        "gpu_ms": round(gpu_ms, 3),
        "kernels": round(kernels),
        "bound_by": "host" if enqueue_ms > gpu_ms else "gpu",
        "update_us": round(update_us, 1),
        "attention_us": round(attention_us, 1),
    }


def _gpu_time(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Kernels of a step, and their time in milliseconds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(found) / steps, sum(event.time_range.elapsed_us() for event in found) / 1e3 / steps


def _calls(model: Any, cache: Any, attention: str, run: Callable[[], Any], steps: int) -> tuple[float, float]:
    """The host's microseconds a layer in the cache's update and in the attention function."""
    update = cache.update = _Stopwatch(cache.update)
    attend = _Stopwatch(AttentionInterface()[attention])
    AttentionInterface.register(_TIMED, attend)
    AttentionMaskInterface.register(_TIMED, AttentionMaskInterface()[attention])
    model.set_attn_implementation(_TIMED)
    run()
    model.set_attn_implementation(attention)
    calls = steps * len(cache.layers)
    return 1e6 * update.seconds / calls, 1e6 * attend.seconds / calls
