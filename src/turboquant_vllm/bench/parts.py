"""The parts of `turboquant bench`, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from turboquant_vllm.bench.kernels import decode, paged, prefill, store
from turboquant_vllm.bench.machine import Machine
from turboquant_vllm.bench.models import hf, quality, vllm

__all__ = ["PARTS", "Part"]

# Of a machine and whether to be quick: cases by name, each a function that measures it.
Part = Callable[[Machine, bool], Iterator[tuple[str, Callable[[], dict[str, Any]]]]]
PARTS: dict[str, Part] = {
    "decode": decode, "prefill": prefill, "paged": paged, "store": store, "hf": hf, "vllm": vllm, "quality": quality,
}  # fmt: skip
