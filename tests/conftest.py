"""What all tests share: fresh random data, hypothesis profiles, and skipping what needs a GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from triton_interpreter import Interpreter

hypothesis.settings.register_profile("ci", max_examples=25, deadline=None, print_blob=True)
hypothesis.settings.register_profile("thorough", max_examples=1000, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Workers that each start a thread per core would wait for one another.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // _WORKERS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def generator() -> torch.Generator:
    """Fresh random data; the seed is printed where a test fails, and TEST_SEED=... repeats it."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def randn(generator: torch.Generator) -> Callable[..., torch.Tensor]:
    """``randn(*shape)``: float32 Gaussian data from ``generator``."""
    return lambda *shape: torch.randn(shape, generator=generator)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """Triton's interpreter, in a process of its own."""
    child = Interpreter()
    yield child
    child.close()


@pytest.fixture(scope="session")
def verify_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for `turboquant verify`."""
    from verify_cases import text_that_suffers

    return text_that_suffers(tmp_path_factory.mktemp("verify") / "text.txt")


@pytest.fixture(scope="session")
def verify_command(verify_text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """The command's result, and the file that it wrote, for the demo's model and that text, with rotations of seed 2."""
    import json

    from verify_cases import CONTEXT, MODEL, invoke

    out = tmp_path_factory.mktemp("verify") / "new" / "verify.json"
    arguments = (MODEL, "--text", verify_text, "--context", CONTEXT, "--seed", 2, "--device", "cpu", "--json", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        result = invoke(*arguments, "--format", "plain", "--dense", "", "--max-ppl-increase", 1000)
    assert result.exit_code == 0, result.output
    return result, json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def verify_figures(verify_command: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
    """What `turboquant verify` says of the demo's model and that text."""
    return verify_command[1]
