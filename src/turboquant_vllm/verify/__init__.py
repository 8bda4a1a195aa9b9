"""Whether 4 bits are enough for a model: `turboquant verify`, or `run_verify`."""

from turboquant_vllm.verify.run import run_verify

__all__ = ["run_verify"]
