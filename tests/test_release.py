"""What is released: a wheel made from the source distribution, installed alone into an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

import turboquant_vllm
from turboquant_vllm.demo.run import MODEL

ROOT = Path(__file__).parents[1]
MOST_BYTES = 2**20

ROUND_TRIP = """
import torch, turboquant_vllm
from turboquant_vllm import TQ4Codec, tq4_attention
codec, x = TQ4Codec(64), torch.randn(1, 2, 70, 64)
k, v = codec.compress_keys(x + 3), codec.compress(x)
out = tq4_attention(torch.randn(1, 4, 3, 64), k, v, codec, is_causal=True)
error = ((codec.decompress(v) - x).norm() / x.norm()).item()
assert out.isfinite().all() and 0.05 < error < 0.12, error
print(turboquant_vllm.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """A "wheel" or an "sdist" of ``source``, by the build backend itself."""
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return out / run(sys.executable, "-c", program, out, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution of a copy of what git knows, and the wheel that is made from it."""
    folder = tmp_path_factory.mktemp("release")
    checkout, out = folder / "checkout", folder / "dist"
    for made in (checkout, out):
        made.mkdir()
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    for name in run("git", "ls-files", cwd=ROOT).splitlines():
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).symlink_to(ROOT / name)
    source = build("sdist", checkout, out)
    with tarfile.open(source) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    return source, build("wheel", next((folder / "unpacked").iterdir()), out)


def test_what_is_in_them(distributions: tuple[Path, Path]) -> None:
    source, wheel = distributions
    with zipfile.ZipFile(wheel) as packed:
        inside = set(packed.namelist())
    package = ROOT / "src" / "turboquant_vllm"
    sources = {f"turboquant_vllm/cuda/{path.name}" for path in (package / "cuda").iterdir() if path.suffix in (".cu", ".cuh")}
    assert len(sources) > 5
    assert sources | {"turboquant_vllm/py.typed"} <= inside
    assert {f"turboquant_vllm/{path.relative_to(package)}" for path in package.rglob("*.py")} <= inside
    assert not [name for name in inside if name.startswith("turboquant_vllm/demo/model/")]
    assert wheel.stat().st_size < MOST_BYTES
    assert source.stat().st_size < 2 * MOST_BYTES
    assert f"-{turboquant_vllm.__version__}" in wheel.name
    with tarfile.open(source) as packed:
        names = {name.split("/", 1)[-1] for name in packed.getnames()}
    assert {"tests/conftest.py", "constraints.txt", "Makefile", "README.md", "LICENSE"} <= names


def test_the_wheel_alone_works(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # What it depends on is that of the environment which runs this test; where that names a checkout is not followed.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--force-reinstall")
    run(*pip, distributions[1], cwd=tmp_path)
    assert Path(run(python, "-c", ROUND_TRIP, cwd=tmp_path).strip()).is_relative_to(packages)
    assert turboquant_vllm.__version__ in run(home / "bin" / "turboquant", "info", cwd=tmp_path)
    assert run(home / "bin" / "turboquant", "doctor", MODEL, cwd=tmp_path).endswith("served in 4 bits\n")
    missing = subprocess.run([home / "bin" / "turboquant", "demo"], capture_output=True, text=True, cwd=tmp_path)
    assert missing.returncode == 1
    assert "the demo's own model is in the repository" in missing.stderr
