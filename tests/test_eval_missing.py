"""Without lm-eval, one line says what to install."""

from __future__ import annotations

import subprocess
import sys


def test_without_lm_eval_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['lm_eval'] = None; import turboquant_vllm.eval"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: turboquant_vllm.eval needs lm_eval: pip install turboquant-vllm[eval]"
    )
