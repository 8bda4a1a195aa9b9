"""What compiled kernels need of a multiprocessor, as ptxas reported it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turboquant_vllm.cuda.nvrtc import Compiled

__all__ = ["ResourceUsage", "resource_usage"]


@dataclass(frozen=True)
class ResourceUsage:
    """Registers per thread; spills and stack frame in bytes per thread; static shared memory in bytes per block."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack_frame: int
    static_shared: int


def resource_usage(compiled: Compiled) -> dict[str, ResourceUsage]:
    """What each entry point needs, as ptxas reported it; RuntimeError if the log lacks a number.

    Spills of device functions that were not inlined count for every kernel: the log does not say who calls them.
    """
    frame = r"Function properties for (\S+)\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill"
    frames = {symbol: [int(number) for number in numbers] for symbol, *numbers in re.findall(frame, compiled.log)}
    used = r"(?s)Compiling entry function '([^']+)'.*?Used (\d+) registers([^\n]*)"
    registers = {symbol: (int(count), rest) for symbol, count, rest in re.findall(used, compiled.log)}
    symbols = set(compiled.kernels.values())
    outlined = [numbers for symbol, numbers in frames.items() if symbol not in symbols]
    usage = {}
    for name, symbol in compiled.kernels.items():
        if symbol not in frames or symbol not in registers:
            raise RuntimeError(f"the compile log has no resource usage for {symbol}:\n{compiled.log}")
        count, rest = registers[symbol]
        shared = re.search(r"(\d+) bytes smem", rest)
        stack, stores, loads = frames[symbol]
        stores += sum(numbers[1] for numbers in outlined)
        loads += sum(numbers[2] for numbers in outlined)
        usage[name] = ResourceUsage(count, stores, loads, stack, int(shared[1]) if shared else 0)
    return usage
