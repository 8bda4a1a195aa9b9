"""TQ4 on a small trained model, on the user's own machine: `python -m turboquant_vllm.demo`, or `run_demo`.

The model in `model/` was trained by `examples/small_model/train.py` on the Python standard library. The demo reads
modules that were held out from that training, once with exact attention and once with keys and values in 4 bits.
"""

from turboquant_vllm.demo.run import run_demo

__all__ = ["run_demo"]
