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
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _WORKERS))


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
def verify_figures(verify_text: Path) -> dict[str, Any]:
    """What `run_verify` says of the demo's model and that text, with rotations of seed 2."""
    from turboquant_vllm.verify import run_verify
    from verify_cases import CONTEXT, MODEL

    return run_verify(str(MODEL), verify_text, CONTEXT, max_ppl_increase=1000, device="cpu", seed=2, formats=("plain",))
