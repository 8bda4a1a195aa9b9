"""The examples in docs/huggingface.md and in the README run as they are written; what they need beyond that is said here."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from turboquant_vllm.hf import CACHE_ARGUMENT

ROOT = Path(__file__).parents[1]


def examples(path: str) -> list[str]:
    """The examples of a page, with the argument that older releases of transformers call something else."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)
    return [re.sub(r"\bcache=", f"{CACHE_ARGUMENT}=", example) for example in found]


def run(program: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    warnings = ("-W", "error::DeprecationWarning:__main__", "-W", "error::FutureWarning:__main__")
    found = subprocess.run(
        [sys.executable, *warnings, "-c", program], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_examples_of_the_page(tmp_path):
    example, pipeline, saving = examples("docs/huggingface.md")
    assert len(example.replace("\n\n", "\n").strip().splitlines()) <= 11
    check = """
assert again.get_seq_length() == cache.get_seq_length() == output.shape[1] - 1
assert cache.packed_layers == list(range(model.config.num_hidden_layers))
"""
    text, size = run(example + saving + check, tmp_path).rsplit("\n", 2)[:2]
    found = run(example + pipeline, tmp_path)
    assert [text["generated_text"][:9] for (text,) in ast.literal_eval(found.splitlines()[-1])] == [
        "def parse",
        "import os",
    ]
    assert text.lstrip().startswith("def parse_args(")
    assert re.fullmatch(r"\d+ bytes for 2\d tokens", size)


def test_example_of_the_readme(tmp_path):
    check = "assert output.shape[1] > inputs['input_ids'].shape[1]\n"
    run(examples("README.md")[2] + check, tmp_path)


@pytest.mark.parametrize(
    ("stub", "message"),
    [
        ("None", "needs transformers 5.14 or later: .*hf.; it is not installed"),
        ("types.ModuleType('transformers')", "needs transformers 5.14 or later: .*; it is not installed"),
        ("old", "needs transformers 5.14 or later: .*; got 5.13.2"),
    ],
)
def test_without_a_transformers_that_will_do_one_line_says_so(stub, message, tmp_path):
    program = f"""
import importlib.machinery, sys, types
old = types.ModuleType("transformers")
old.__version__, old.__spec__ = "5.13.2", importlib.machinery.ModuleSpec("transformers", None)
sys.modules["transformers"] = {stub}
try:
    import turboquant_vllm.hf
except ImportError as error:
    print(error)
"""
    assert re.search(message, run(program, tmp_path))
