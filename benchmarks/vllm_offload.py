"""vLLM offloading to host memory, the TQ4 cache against bf16: bytes over PCIe, and the first token of a prompt that comes back.

    python -P benchmarks/vllm_offload.py        # writes results/vllm-offload.json

For each connector and cache an engine in a process of its own: the shape of Llama-3.1-8B with fewer layers, dummy weights. A
prompt is read; the engine's prefix cache is emptied; the same prompt is asked for again, and its blocks come from host memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import RESULTS, environment, write_results
from vllm_worker import CACHES, CAPTURED, CHUNK, LLAMA, VOCABULARY, Timer, write_scales

CONNECTORS = ["OffloadingConnector", "SimpleCPUOffloadConnector"]


def parser() -> argparse.ArgumentParser:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--layers", type=int, default=16)
    given.add_argument("--context", type=int, default=16384)
    given.add_argument("--cache-bytes", type=float, default=8e9)
    given.add_argument("--host-bytes", type=float, default=16e9)
    given.add_argument("--caches", nargs="+", default=["tq4", "bf16"], choices=CACHES)
    given.add_argument("--connectors", nargs="+", default=CONNECTORS)
    given.add_argument("--extra", type=json.loads, default={}, help="more of kv_connector_extra_config")
    given.add_argument("--out", type=Path, default=RESULTS / "vllm-offload.json")
    given.add_argument("--measure", nargs=2, metavar=("CACHE", "CONNECTOR"), help="in this process, and print")
    return given


def first_token_ms(timer: Timer, prompt: list[int]) -> float:
    start = time.perf_counter()
    timer.ids.append(timer.engine.add_request(f"r{time.monotonic_ns()}", {"prompt_token_ids": prompt}, timer.params(2)))
    while not timer.step():
        pass
    elapsed = 1e3 * (time.perf_counter() - start)
    while timer.engine.has_unfinished_requests():  # to its end: a request that is aborted leaves a step on its way
        timer.step()
    timer.clear()
    return elapsed


def measure(cache: str, connector: str, options: argparse.Namespace) -> dict[str, Any]:
    """One engine: milliseconds to the first token of a prompt that is new, in the engine's cache, and in host memory."""
    import torch
    from vllm import LLM
    from vllm.config import KVTransferConfig

    import turboquant_vllm.vllm as plugin

    plugin.register()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": options.layers}))
        if cache == "tq4":
            write_scales(folder, options.layers)
        extra = {"cpu_bytes_to_use": int(options.host_bytes), **options.extra}
        llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=options.context + 1024,
            max_num_seqs=8,
            max_num_batched_tokens=CHUNK,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=int(options.cache_bytes),
            gpu_memory_utilization=0.1,
            block_size=64,
            compilation_config={"cudagraph_capture_sizes": CAPTURED[:4]},
            disable_log_stats=False,
            kv_transfer_config=KVTransferConfig(kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra),
            **CACHES[cache],
        )
    timer = Timer(llm)
    times: dict[str, list[float]] = {"new": [], "cached": [], "reloaded": []}
    for _ in range(4):
        prompt = torch.randint(10, VOCABULARY, (options.context,)).tolist()
        times["new"].append(first_token_ms(timer, prompt))
        first_token_ms(timer, prompt[:70])  # steps in which what was stored goes
        times["cached"].append(first_token_ms(timer, prompt))
        tries = 100
        while not llm.reset_prefix_cache():  # blocks that are being copied are in use until a step hears that they are not
            tries -= 1
            if tries == 0:
                raise RuntimeError("expected an engine without requests, whose cache can be emptied")
            time.sleep(0.02)
            first_token_ms(timer, prompt[:50])
        times["reloaded"].append(first_token_ms(timer, prompt))
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {
        "ms_to_first_token": {name: round(statistics.median(some[1:]), 2) for name, some in times.items()},
        "bytes_of_a_block": page_bytes(llm),
        "reloaded_tokens": counters.get("vllm:external_prefix_cache_hits", 0),
        "transfers": {name.removeprefix("vllm:"): value for name, value in counters.items() if "kv_offload" in name},
    }


def page_bytes(llm: Any) -> int:
    """What a block takes in all layers."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    caches = [layer.kv_cache for layer in layers]
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return sum(cache[0].nbytes * (len(cache) // blocks) for cache in caches)


def main() -> None:
    options = parser().parse_args()
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_FLASHINFER_SAMPLER="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1"
    )
    if options.measure:
        cache, connector = options.measure
        print("FOUND", json.dumps(measure(cache, connector, options)), flush=True)
        return
    rows = []
    for connector in options.connectors:
        found: dict[str, Any] = {}
        for cache in options.caches:
            command = [sys.executable, "-P", "-W", "ignore", __file__, *sys.argv[1:], "--measure", cache, connector]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
            found[cache] = json.loads(lines[0].removeprefix("FOUND ")) if lines else {"error": done.stderr[-800:]}
            print(connector, cache, json.dumps(found[cache]), flush=True)
        row: dict[str, Any] = {"id": connector, "context": options.context, **found}
        if all("error" not in one for one in found.values()) and {"tq4", "bf16"} <= set(found):
            ours, theirs = found["tq4"], found["bf16"]
            row["against_bf16"] = {
                "bytes": round(ours["bytes_of_a_block"] / theirs["bytes_of_a_block"], 4),
                "reloaded": round(ours["ms_to_first_token"]["reloaded"] / theirs["ms_to_first_token"]["reloaded"], 3),
            }
        rows.append(row)
        write_results(options.out, environment(layers=options.layers), rows)


if __name__ == "__main__":
    main()
