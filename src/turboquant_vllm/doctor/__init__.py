"""`turboquant doctor`: what will be served in 4 bits of a model, and by which kernels, before anything is loaded."""

from turboquant_vllm.doctor.layers import Found, Layer, find_layers
from turboquant_vllm.doctor.report import print_report
from turboquant_vllm.doctor.run import run_doctor

__all__ = ["Found", "Layer", "find_layers", "print_report", "run_doctor"]
