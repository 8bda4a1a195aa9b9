"""What a cache format does to a model: the parts that the demo, `turboquant verify` and the benchmarks are made of."""
