"""What a pretrained model makes of 4 bits: `turboquant verify` and `turboquant calibrate`."""

from turboquant_vllm.verify.calibrate import run_calibrate
from turboquant_vllm.verify.run import run_verify

__all__ = ["run_calibrate", "run_verify"]
