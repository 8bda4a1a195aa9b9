"""Without lm-eval, one line says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

MESSAGE = "turboquant_vllm.eval needs lm_eval: pip install turboquant-vllm[eval]"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("import turboquant_vllm.eval", f"ModuleNotFoundError: {MESSAGE}"),
        ("import runpy; runpy.run_module('turboquant_vllm.eval', run_name='__main__')", MESSAGE),
    ],
)
def test_without_lm_eval_one_line_says_what_to_install(how: str, expected: str) -> None:
    program = f"import sys; sys.modules['lm_eval'] = None; {how}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == expected
    assert expected != MESSAGE or run.stderr.strip() == MESSAGE
