"""The example of context parallelism, run as it is meant to be: one process a part of the context."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import oracle

EXAMPLE = Path(__file__).parents[1] / "examples" / "context_parallel" / "attend.py"


def attend(folder: Path, *arguments: str, world: int = 2) -> list[dict[str, torch.Tensor]]:
    """Run the example in ``world`` processes; what each of them saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), "--save", str(folder), *arguments]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | rendezvous | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        logs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(logs)
    return [torch.load(folder / f"rank{rank}.pt", map_location="cpu") for rank in range(world)]


def check(results: list[dict[str, torch.Tensor]], limit: float) -> None:
    """Every process has the attention over the whole context, within ``limit`` of the largest magnitude."""
    first = results[0]
    keys, values = (oracle.decompress(*first[name], first["centroids"], first["rotation"]) for name in ("k", "v"))
    want, _ = oracle.attention(first["q"], keys, values, 128**-0.5, True)
    for result in results:
        assert torch.equal(result["out"], first["out"])
        torch.testing.assert_close(result["out"].double(), want, rtol=0, atol=limit * want.abs().max().item())


def test_two_processes_on_a_cpu(tmp_path):
    check(attend(tmp_path, "--device", "cpu", "--dtype", "float32", "--tokens", "301", "--queries", "5"), 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_two_gpus(tmp_path, dtype):
    # One rounding for each part's result and one for the whole, beside those of attention itself.
    check(attend(tmp_path, "--dtype", dtype, "--tokens", "20001"), 6 * torch.finfo(getattr(torch, dtype)).eps)
