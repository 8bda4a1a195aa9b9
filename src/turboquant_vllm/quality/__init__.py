"""What a cache format does to a model: `turboquant verify`, and the parts that it and the benchmarks are made of."""

from turboquant_vllm.quality.verify import verify

__all__ = ["verify"]
