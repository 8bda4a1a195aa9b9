"""`turboquant bench`: this library against what else is at hand, on the machine at hand; answers are checked before timing."""

from turboquant_vllm.bench.parts import PARTS
from turboquant_vllm.bench.report import plot, print_rows
from turboquant_vllm.bench.run import run_bench

__all__ = ["PARTS", "plot", "print_rows", "run_bench"]
