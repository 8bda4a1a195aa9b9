"""Portable GPU kernels in Triton: NVIDIA, AMD, Intel, and the interpreter on a CPU (``TRITON_INTERPRET=1``)."""

from turboquant_vllm.ops import has_triton

if not has_triton():
    raise ImportError(
        "turboquant_vllm.triton needs the triton package, which is not installed (pip install triton; Linux only). "
        "Everything else in turboquant_vllm works without it."
    )
