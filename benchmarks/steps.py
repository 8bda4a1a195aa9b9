"""What a step's store and attention add to the other kernels of a layer: cases of the benchmark of pages, and some between.

    PYTHONPATH=src python benchmarks/steps.py [--cases step-1x1024 step-1x32768] [--out results]

Microseconds, whole steps in CUDA graphs. ``layer``: in layers of a Llama's products, norms and activations, each with weights
of its own, so that nothing is in a cache. ``copies``: between copies of 96 MB. ``alone``: with a cold L2, a launch included.
Of the first two also for attention without the store. Between products of one shape a step must not be timed: their own time
depends on what ran before, most likely on which multiprocessors, by more than a short step takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import common
from paged import HEAD_DIM, STEPS, StepCase, step_of
from turboquant_vllm import TQ4Codec

LAYERS, COPIES = 12, 9
HIDDEN, INTERMEDIATE, QKV = 4096, 14336, 6144
BETWEEN: list[StepCase] = [
    ("step-1x8192", 1, 32, 8, 8192, 8192),
    ("step-2x8192", 2, 32, 8, 8192, 8192),
    ("step-4x8192", 4, 32, 8, 8192, 8192),
    ("step-8x1024", 8, 32, 8, 1024, 1024),
]
CASES = {case[0]: case for case in [*STEPS, *BETWEEN]}
Run = Callable[[], Any]


def random_weights(*shape: int) -> torch.Tensor:
    return 0.02 * torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


class Layers:
    """Llama-8B's layers but for attention, as one graph for each number of tokens."""

    def __init__(self) -> None:
        shapes = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
        self.weights = [[random_weights(*shape) for shape in shapes] for _ in range(LAYERS)]
        self.norm = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")

    def graph(self, tokens: int, step: Run | None) -> Run:
        first, rotary = random_weights(tokens, HIDDEN), torch.ones(tokens, QKV, dtype=torch.bfloat16, device="cuda")

        def run() -> None:
            x = first
            for qkv, out, up, down in self.weights:
                h = F.linear(F.rms_norm(x, (HIDDEN,), self.norm), qkv) * rotary
                if step is not None:
                    step()
                x = x + F.linear(h[:, :HIDDEN], out)
                gates, values = F.linear(F.rms_norm(x, (HIDDEN,), self.norm), up).chunk(2, -1)
                x = x + F.linear(F.silu(gates) * values, down)

        return common.graphed(run)


def between_copies(source: torch.Tensor, target: torch.Tensor, step: Run | None) -> Run:
    def run() -> None:
        for _ in range(COPIES):
            target.copy_(source)
            if step is not None:
                step()
        target.copy_(source)

    return common.graphed(run)


def row(case: StepCase, codec: TQ4Codec, layers: Layers, copied: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    """Medians of three turns."""
    step = step_of(case, codec)
    worst = step.batch.error()
    steps: list[Run | None] = [None, step.one_call, step.batch]
    calls = [layers.graph(case[1], one) for one in steps] + [between_copies(*copied, one) for one in steps]
    calls.append(common.graphed(step.one_call))
    turns = [[1e3 * common.median_ms(call, 40) for call in calls] for _ in range(3)]
    empty, layer, attends, nothing, copies, attends_copies, alone = (sorted(x)[1] for x in zip(*turns, strict=True))
    return {
        "id": case[0],
        "scope": "step",
        "dtype": "fp16",
        "layer_us": round((layer - empty) / LAYERS, 2),
        "layer_attention_us": round((attends - empty) / LAYERS, 2),
        "copies_us": round((copies - nothing) / COPIES, 2),
        "copies_attention_us": round((attends_copies - nothing) / COPIES, 2),
        "alone_us": round(alone, 2),
        "max_abs_err": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=common.RESULTS)
    options = parser.parse_args()
    codec = TQ4Codec(HEAD_DIM, device="cuda").with_key_scales(torch.ones(8, HEAD_DIM))
    source = torch.randn(48 << 20, dtype=torch.bfloat16, device="cuda")
    layers, copied, rows = Layers(), (source, torch.empty_like(source)), []
    for name in options.cases:
        rows.append(row(CASES[name], codec, layers, copied))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    common.write_results(options.out / "steps-h200.json", common.environment(), rows)


if __name__ == "__main__":
    main()
