"""The package as it is installed: what importing it loads, life without Triton, its version and its types."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import turboquant_vllm

ROOT = Path(__file__).parents[1]
# torch itself loads cuda.bindings where it is installed; cuda.core is what only our compiler needs.
OTHERS = ("triton", "transformers", "vllm", "cuda.core")
HEAVY = (*OTHERS, "matplotlib", "typer", "rich", "turboquant_vllm.triton", "turboquant_vllm.cuda", "turboquant_vllm.demo")


def run(program: str, cwd: Path | None = None) -> str:
    """Standard output of a fresh interpreter."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def loads(module: str, names: list[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for name in names)


def test_import_loads_nothing_heavy() -> None:
    program = "import sys, json, torch; before = set(sys.modules); import turboquant_vllm; "
    program += "print(json.dumps([sorted(set(sys.modules) - before), sorted(sys.modules)]))"
    ours, everything = json.loads(run(program))
    assert "turboquant_vllm.attention" in ours
    assert not [module for module in HEAVY if loads(module, ours)]
    # Nor may torch's import have hidden one of these.
    assert not [module for module in OTHERS if loads(module, everything)]


def test_use_on_a_cpu_loads_nothing_heavy() -> None:
    program = """
import json, sys, torch
from turboquant_vllm import TQ4Codec, tq4_attention
codec = TQ4Codec(64)
k = codec.compress(torch.randn(1, 2, 5, 64))
codec.decompress(k)
tq4_attention(torch.randn(1, 2, 3, 64), k, k, codec)
print(json.dumps(sorted(sys.modules)))
"""
    loaded = json.loads(run(program))
    assert not [module for module in OTHERS if loads(module, loaded)]


def test_import_is_quick() -> None:
    program = """
import time, torch
start = time.perf_counter()
import turboquant_vllm
print(time.perf_counter() - start)
"""
    assert min(float(run(program)) for _ in range(3)) < 1.0


@pytest.mark.parametrize(
    "absent",
    [
        "sys.modules['triton'] = None",
        "sys.meta_path.insert(0, type('Blocker', (), {'find_spec': staticmethod(find_spec)}))",
    ],
)
def test_all_but_the_kernels_works_without_triton(absent: str) -> None:
    program = f"""
import sys

def find_spec(name, path=None, target=None):
    if name.split(".")[0] == "triton":
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

{absent}
import torch
from turboquant_vllm import TQ4Codec, lloyd_max, merge_attention_states, tq4_attention
from turboquant_vllm import attention, ops

codec = TQ4Codec(64)
q, x = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 9, 64)
k = codec.compress(x)
codec.decompress(k)
tq4_attention(q, k, k, codec, is_causal=True)
assert not ops.has_triton()
try:
    tq4_attention(q, k, k, codec, backend="triton")
except RuntimeError as error:
    assert "triton package is not installed" in str(error), error
else:
    raise AssertionError("ran without triton")
for module in ("", ".flash_attention_tq4_kv"):
    try:
        __import__("turboquant_vllm.triton" + module)
    except ImportError as error:
        print(error)
"""
    lines = run(program).splitlines()
    assert len(lines) == 2
    assert all("needs the triton package, which is not installed" in line for line in lines)


def test_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert turboquant_vllm.__version__ == project["version"]
    assert metadata.version("turboquant-vllm") == project["version"]


def test_the_lock_has_all_that_is_asked_for_within_its_bounds_and_names_no_source() -> None:
    lock = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "://" not in lock
    lines = [line.split("#")[0].strip() for line in lock.splitlines() if "==" in line]
    assert len(lines) > 50
    pinned: dict[str, list[Requirement]] = {}
    for found in map(Requirement, lines):
        pinned.setdefault(canonicalize_name(found.name), []).append(found)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*map(Requirement, project["dependencies"]), *map(Requirement, extras["dev"])]
    for wanted in asked:  # grows on the way
        if wanted.name == project["name"]:
            asked += [Requirement(text) for extra in wanted.extras for text in extras[extra]]
            continue
        for python in ("3.11", "3.12"):
            where = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
            fits = [x for x in pinned[canonicalize_name(wanted.name)] if x.marker is None or x.marker.evaluate(where)]
            assert len(fits) == 1, (wanted.name, python)
            version = next(iter(fits[0].specifier)).version
            assert wanted.specifier.contains(version), f"{wanted} is not {version}"


def test_types_are_shipped() -> None:
    package = importlib.resources.files("turboquant_vllm")
    assert (package / "py.typed").is_file()
    assert "Typing :: Typed" in metadata.metadata("turboquant-vllm").get_all("Classifier")


def test_example_in_the_package_docstring_runs() -> None:
    program = """
import torch, turboquant_vllm
keys, values, q = torch.randn(1, 2, 9, 128), torch.randn(1, 2, 9, 128), torch.randn(1, 4, 3, 128)
example = turboquant_vllm.__doc__.split("\\n\\n", 1)[1].replace('device="cuda"', 'device="cpu"')
exec(example)
assert out.shape == q.shape
"""
    run(program)


@pytest.mark.parametrize("block", range(2))
def test_examples_in_the_readme_run(block: int, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3  # the last one is run where transformers is looked at
    # Without a GPU, tensors without contents still check names, shapes and dtypes.
    device = "cuda" if torch.cuda.is_available() else "meta"
    run(blocks[block].replace('"cuda"', f'"{device}"') + "assert out.shape == q.shape\n", cwd=tmp_path)


def test_benchmarks_hide_no_package() -> None:
    # Tests have their folder on the path. vLLM imports some packages only if they are there, triton_kernels among them.
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert names
    assert not names & {*metadata.packages_distributions(), *sys.stdlib_module_names, "triton_kernels"}


def test_container_and_makefile_have_a_supported_vllm_and_what_is_copied_is_there() -> None:
    recipe = (ROOT / "docker" / "Dockerfile").read_text()
    version = re.search(r"ARG VLLM_VERSION=([\d.]+)", recipe)
    assert version
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tested = re.search(r"^VLLM_VERSION \?= ([\d.]+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tested
    for one in (version[1], tested[1]):
        assert Requirement(extras["vllm"][0]).specifier.contains(one)
    assert f'"{extras["cuda"][0]}"' in recipe
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", recipe, re.MULTILINE) for name in line.split()]
    assert copied
    for name in copied:
        assert (ROOT / name).exists(), name
