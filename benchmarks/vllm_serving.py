"""vLLM with the TQ4 cache against the same engine's bf16 and fp8 caches: time per token, time to first token, capacity.

    python benchmarks/vllm_serving.py        # writes results/vllm-h200.json

An engine for each cache type, all with the shape of Llama-3.1-8B but fewer layers, dummy weights, and the share of one card's
cache that the whole model would have. They start together and are timed one after another, in whole engine steps.
The TQ4 engine checks its attention against the definition first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, environment, write_results
from vllm_worker import CACHES, CAPACITY, DECODE, TTFT


class Worker:
    """A process with one engine."""

    def __init__(self, cache: str, folder: Path, log: Path, arguments: list[str]) -> None:
        # -P: a file here must not be taken for a package of the same name that vLLM brings.
        command = [
            sys.executable,
            "-P",
            "-W",
            "ignore",
            str(Path(__file__).with_name("vllm_worker.py")),
            cache,
            "--folder",
            str(folder),
        ]
        self.cache, self.log = cache, log
        self.process = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )

    def messages(self) -> Any:
        """The JSON objects that it prints; other lines, vLLM's, are passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
        if self.process.wait():
            raise RuntimeError(f"{self.cache} failed:\n{self.log.read_text()[-3000:]}")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()


def row(case: str, values: dict[str, Any], running: dict[str, int]) -> dict[str, Any]:
    """A case's result: times of each cache and ratios of TQ4's to theirs; for capacity, tokens a second and their ratios."""
    if case in DECODE:
        sizes: dict[str, Any] = dict(zip(("requests", "context"), DECODE[case], strict=True))
        unit = "ms_per_step"
    elif case == "ttft":
        sizes, unit = {"requests": 1, "context": TTFT}, "ms_to_first_token"
    else:
        sizes, unit = {**dict(zip(("requests", "context"), CAPACITY, strict=True)), "running": running}, "tokens_per_second"
    against = {f"against_{name}": round(values["tq4"] / value, 3) for name, value in values.items() if name != "tq4"}
    return {"id": case, **sizes, unit: values, **against}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caches", nargs="*", default=["tq4", "bf16", "fp8"], choices=CACHES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--cache-bytes", type=float, default=27.5e9)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--cases", nargs="*", default=[*DECODE, "ttft", "capacity"])
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm-h200.json")
    options = parser.parse_args()
    arguments = ["--layers", str(options.layers), "--cache-bytes", str(options.cache_bytes)]
    arguments += ["--block-size", str(options.block_size), "--cases", *options.cases]
    folder = Path(tempfile.mkdtemp())
    workers = [Worker(cache, folder / cache, folder / f"{cache}.log", arguments) for cache in options.caches]
    streams = {worker.cache: worker.messages() for worker in workers}
    ready: dict[str, dict[str, Any]] = {}
    for cache, stream in list(streams.items()):
        try:
            ready[cache] = next(stream)["ready"]
            print(cache, ready[cache], flush=True)
        except RuntimeError as error:  # the others may still be compared
            print(error, file=sys.stderr, flush=True)
    values: dict[str, dict[str, Any]] = {}
    running: dict[str, int] = {}
    for worker in workers:
        if worker.cache not in ready:
            continue
        worker.go()
        for message in streams[worker.cache]:
            print(worker.cache, message, flush=True)
            values.setdefault(message["id"], {})[worker.cache] = message["value"]
            if "running" in message:
                running[worker.cache] = message["running"]
    blocks = {cache: message["blocks"] for cache, message in ready.items()}
    rows: list[dict[str, Any]] = [{"id": "blocks", "blocks": blocks, "against_bf16": round(blocks["tq4"] / blocks["bf16"], 3)}]
    rows += [row(case, found, running) for case, found in values.items()]
    settings = {"layers": options.layers, "cache_bytes": options.cache_bytes, "block_size": options.block_size}
    env = environment(vllm=ready["tq4"]["vllm"], error=ready["tq4"]["error"], **settings)
    write_results(options.out, env, rows)
    for one in rows:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
