"""The training loop of the quality models: bfloat16 weights with float32 masters, and a schedule that fits a given time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["train"]

_WARM_UP, _HOLD = 0.04, 0.35  # share of the training in which the rate rises, and after which it begins to fall


def train(
    model: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    *,
    seconds: float,
    steps: int | None,
    learning_rate: float,
    weight_decay: float,
    report: Callable[[], dict[str, float]] = dict,
    reports: int = 8,
) -> dict[str, Any]:
    """AdamW until ``seconds`` are over, or for ``steps`` steps when given; the rate follows the share that is over.

    Args:
        model: trained in place, in the dtype of its parameters.
        loss_of: number of the step, from 0, to the loss of its batch.
        seconds: length of the training; the number of steps depends on the machine.
        steps: exact length instead.
        learning_rate: at its highest.
        weight_decay: of matrices that are no embeddings.
        report: figures to log beside the loss.
        reports: how many times to log.

    Returns:
        "steps", "seconds", and the "log".
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    weights: list[torch.Tensor] = [p for p in model.parameters() if p.requires_grad]
    # An update smaller than half of bfloat16's last bit would be lost: the optimizer's own copy keeps it.
    masters = [p.detach().float().clone() for p in weights]
    decayed = [m for m, p in zip(masters, weights, strict=True) if p.ndim == 2 and id(p) not in embeddings]
    others = [m for m, p in zip(masters, weights, strict=True) if p.ndim != 2 or id(p) in embeddings]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=weights[0].device.type == "cuda",
    )
    model.train()
    log: list[dict[str, float]] = []
    total, since = torch.zeros((), device=weights[0].device), 0
    start = time.perf_counter()
    step, over, logged = 0, 0.0, 0.0
    while over < 1:
        rate = learning_rate * min(1.0, (over + 1e-3) / _WARM_UP, 1.02 - max(0.0, over - _HOLD) / (1 - _HOLD))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        total += loss.detach()
        step, since = step + 1, since + 1
        if step % 4 == 0 and weights[0].device.type == "cuda":
            torch.cuda.synchronize()  # the clock must not run ahead of the GPU
        elapsed = time.perf_counter() - start
        over = step / steps if steps else elapsed / seconds
        if over >= 1 or over - logged >= 1 / reports:
            logged = over
            mean = total.item() / since
            if not math.isfinite(mean):
                raise RuntimeError(f"loss: expected a finite one, got {mean} at step {step}")
            log.append({"step": step, "seconds": round(elapsed, 1), "loss": round(mean, 4), **report()})
            print("  ".join(f"{name} {value:g}" for name, value in log[-1].items()), flush=True)
            total.zero_()
            since = 0
    model.eval()
    return {"steps": step, "seconds": round(time.perf_counter() - start, 1), "log": log}
