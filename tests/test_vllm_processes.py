"""The vLLM plugin where vLLM runs processes of its own: found through its entry point in each, the same on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", exc_type=ImportError)

from vllm.platforms import current_platform

from turboquant_vllm.demo.run import MODEL

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

if not (torch.cuda.is_available() or current_platform.is_cpu()):
    pytest.skip("needs a GPU, or vLLM for CPUs", allow_module_level=True)

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    llm = LLM(skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=8, block_size=64, max_model_len=400, seed=0,
              kv_cache_memory_bytes=2**28, attention_backend="CUSTOM", **options)
    lengths = (30, 100, 5, 64)
    prompts = [{"prompt_token_ids": [(7 * i * j + j * j) % 4000 + 10 for j in range(n)]} for i, n in enumerate(lengths)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)]))
    print("BLOCKS", llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
"""
# Where vLLM is built for CPUs it takes one backend, whatever it is asked for.
FOR_CPUS = """
def register():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from turboquant_vllm.vllm import BACKEND

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """An environment in which the plugin is an installed package."""
    plugins = {"turboquant": "turboquant_vllm.vllm:register"}
    if current_platform.is_cpu():
        plugins["turboquant_cpu"] = "turboquant_for_cpus:register"
        (tmp_path / "turboquant_for_cpus.py").write_text(FOR_CPUS)
    for name, target in plugins.items():
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {target}\n")
    (tmp_path / "generate.py").write_text(GENERATE)
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    return {**os.environ, **threads, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": path}


def generate(installed: dict[str, str], ranks: int) -> tuple[list[list[int]], int]:
    script = Path(installed["PYTHONPATH"].split(os.pathsep)[0]) / "generate.py"
    dtype = "float16" if torch.cuda.is_available() else "float32"
    options = {"model": str(MODEL), "dtype": dtype, "tensor_parallel_size": ranks}
    command = [sys.executable, "-P", str(script), json.dumps(options)]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=False, timeout=280)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("TOKENS", "BLOCKS")))
    assert len(found) == 2, done.stdout[-1500:] + done.stderr[-1500:]
    return json.loads(found["TOKENS"]), int(found["BLOCKS"])


def test_ranks_agree(installed):
    alone, blocks = generate(installed, 1)
    assert blocks == 2**28 // (6 * 2 * 66 * (64 + 8))  # layers, heads, bytes of 64 tokens: the plugin was found
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    together, twice = generate(installed, 2)
    assert together == alone
    assert twice == 2 * blocks
