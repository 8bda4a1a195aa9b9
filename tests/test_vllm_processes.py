"""The vLLM plugin where vLLM runs processes of its own: found through its entry point in each, the same on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", exc_type=ImportError)

from vllm.platforms import current_platform

from turboquant_vllm.demo.run import MODEL

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]  # each rank is a process that imports vLLM

if not (torch.cuda.is_available() or current_platform.is_cpu()):
    pytest.skip("needs a GPU, or vLLM for CPUs", allow_module_level=True)

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    llm = LLM(skip_tokenizer_init=True, max_num_seqs=8, block_size=64, max_model_len=400, seed=0,
              kv_cache_memory_bytes=2**28, attention_backend="CUSTOM", **options)
    lengths = (30, 100, 5, 64)
    prompts = [{"prompt_token_ids": [(7 * i * j + j * j) % 4000 + 10 for j in range(n)]} for i, n in enumerate(lengths)]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)]))
    print("BLOCKS", llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
"""
# On CPUs vLLM takes one backend, whatever it is asked for. Operators that it lacks are in Python, in each of its processes.
FOR_CPUS = """
def register():
    {operators}
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from turboquant_vllm.vllm import BACKEND

    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND)
"""


# Half of the heads on each rank, or half of the layers. Ranks behind the first of a pipeline have no room for what they receive
# before vLLM's warm-up, which on a CPU it leaves out where nothing is traced.
EAGER = {"enforce_eager": True}
TRACED = {"compilation_config": {"mode": 2, "backend": "eager"}}
WAYS = {
    "tensor_parallel_size": EAGER,
    "pipeline_parallel_size": TRACED if current_platform.is_cpu() else EAGER,
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the plugin is an installed package."""
    tmp_path = tmp_path_factory.mktemp("installed")
    plugins = {"turboquant": "turboquant_vllm.vllm:register"}
    if current_platform.is_cpu():
        plugins["turboquant_cpu"] = "turboquant_for_cpus:register"
        operators = "import vllm_cpu_operators" if "vllm_cpu_operators" in sys.modules else ""
        (tmp_path / "turboquant_for_cpus.py").write_text(FOR_CPUS.format(operators=operators))
    for name, target in plugins.items():
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {target}\n")
    (tmp_path / "generate.py").write_text(GENERATE)
    threads = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    return {**os.environ, **threads, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": path}


def generate(installed: dict[str, str], **options: Any) -> tuple[list[list[int]], int]:
    script = Path(installed["PYTHONPATH"].split(os.pathsep)[0]) / "generate.py"
    dtype = "float16" if torch.cuda.is_available() else "float32"
    command = [sys.executable, "-P", str(script), json.dumps({"model": str(MODEL), "dtype": dtype, **options})]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=False, timeout=280)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("TOKENS", "BLOCKS")))
    assert len(found) == 2, done.stdout[-1500:] + done.stderr[-1500:]
    return json.loads(found["TOKENS"]), int(found["BLOCKS"])


@pytest.fixture(scope="module")
def alone(installed: dict[str, str]) -> tuple[list[list[int]], int]:
    """Of one rank: tokens, and how many blocks it has."""
    return generate(installed, **EAGER)


def test_the_plugin_is_found(alone):
    _, blocks = alone
    assert blocks == 2**28 // (6 * 2 * 66 * (64 + 8))  # layers, heads, bytes of 64 tokens


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs")
@pytest.mark.parametrize("way", WAYS)
def test_ranks_agree(installed, alone, way):
    tokens, blocks = generate(installed, **{way: 2}, **WAYS[way])
    assert tokens == alone[0]
    assert blocks == 2 * alone[1]
