"""vLLM with the TQ4 cache against the same engine's bf16 and fp8 caches: time per token, time to first token, capacity.

    python benchmarks/vllm_serving.py        # writes results/vllm-h200.json
    python benchmarks/vllm_serving.py --tensor-parallel-size 2 --cases b32-8k b1-32k --out results/vllm-tp2-h200.json
    python benchmarks/vllm_serving.py --tensor-parallel-size 2 --cases short-1 host-1 --one-at-a-time --out host.json
    python benchmarks/vllm_serving.py --cases b32-8k --keep results/vllm-h200.json        # its other rows stay as they are

An engine for each cache type, all with the shape of Llama-3.1-8B but fewer layers, and dummy weights. They start together, and
each case is timed in one after another, in whole engine steps; the file is written anew after each. The TQ4 engine checks its
attention against the definition first, and ``--gate`` names a command whose success the file records: tests of greedy tokens,
say, which run while the engines start. With ``--one-at-a-time`` each engine ends before the next one starts, so that none waits
beside another that is timed.

Cases ``host-*`` say in how much of a step's time the GPU has nothing to do. The wall time is of the case that they name, timed
with them, before any profiler runs; kernels are those of other steps, in a profiler of each rank.

Half of the layers for times, so that what a step does once weighs little more than in the whole model, and a cache that is
large enough; then, for capacity, a quarter of them in engines of their own, with a quarter of what one card has for its cache:
once in one process, as all cases before, and once with the engine's core in its own, as vLLM has it unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import RESULTS, environment, write_results
from vllm_worker import CACHES, CAPACITY, CASES, DECODE, HOSTS, SERVED, TRACES, TTFT

BLOCKS = ["blocks", "capacity blocks"]
PROFILED = TRACES | HOSTS  # with the case that each is of


def installed(folder: Path) -> Path:
    """A folder in which the plugin is an installed package, for processes that vLLM starts."""
    name = folder / "turboquant_plugin-1.dist-info"
    name.mkdir(exist_ok=True)
    (name / "METADATA").write_text("Metadata-Version: 2.1\nName: turboquant_plugin\nVersion: 1\n")
    (name / "entry_points.txt").write_text("[vllm.general_plugins]\nturboquant = turboquant_vllm.vllm:register\n")
    return folder


class Worker:
    """A process with one engine."""

    def __init__(self, cache: str, folder: Path, arguments: Sequence[str]) -> None:
        # -P: a file here must not be taken for a package of the same name that vLLM brings.
        script = Path(__file__).with_name("vllm_worker.py")
        command = [sys.executable, "-P", "-W", "ignore", str(script), cache, "--folder", str(folder / cache), *arguments]
        self.log = folder / f"{cache}.log"
        path = os.pathsep.join(filter(None, [str(installed(folder)), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def message(self) -> dict[str, Any]:
        """The next JSON object that it prints; other lines, vLLM's, are passed over. An ``error`` where it has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        status, log = self.process.wait(), self.log.read_text()
        print(log[-3000:], file=sys.stderr, flush=True)
        reasons = [line for line in log.splitlines() if "Error" in line] or [""]
        return {"error": f"ended with status {status}: {reasons[-1][:500]}"}

    def measure(self, case: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{case}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "has ended"}
        return self.message()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Results:
    """What was measured so far, and the file with it."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.values: dict[str, dict[str, Any]] = {}
        self.errors: dict[str, dict[str, str]] = {}
        self.more: dict[str, dict[str, dict[str, float]]] = {}  # by case and name
        self.kept: dict[str, dict[str, Any]] = {}  # rows of an earlier run

    def keep(self, path: Path) -> None:
        """Let rows of an earlier file stay where this run has none; they say of which revision they are."""
        earlier = json.loads(path.read_text())
        for row in earlier["rows"]:
            self.kept[row["id"]] = {**row, "revision": row.get("revision", earlier["environment"]["revision"])}

    def add(self, case: str, cache: str, message: dict[str, Any]) -> None:
        print(cache, json.dumps(message), flush=True)
        if "error" in message:
            self.errors.setdefault(case, {})[cache] = message["error"]
            return
        self.values.setdefault(case, {})[cache] = message["value"]
        for name in ("running", "kernel_ms"):
            if name in message:
                self.more.setdefault(case, {}).setdefault(name, {})[cache] = message[name]

    def row(self, case: str) -> dict[str, Any]:
        """Times of each cache and ratios of TQ4's to theirs; for blocks and capacity, numbers and their ratios."""
        values = self.values.get(case, {})
        if case in BLOCKS:
            sizes, unit = {}, "blocks"
        elif case in DECODE:
            sizes, unit = dict(zip(("requests", "context"), DECODE[case], strict=True)), "ms_per_step"
        elif case in TTFT:
            sizes, unit = {"requests": 1, "context": TTFT[case]}, "ms_to_first_token"
        elif case in PROFILED:
            return {"id": case, "of": PROFILED[case], "step": values, "errors": self.errors.get(case, {})}
        else:
            sizes, unit = dict(zip(("requests", "context"), CAPACITY, strict=True)), "tokens_per_second"
        row: dict[str, Any] = {"id": case, **sizes, unit: values, **self.more.get(case, {})}
        if "tq4" in values:
            row |= {f"against_{name}": round(values["tq4"] / value, 3) for name, value in values.items() if name != "tq4"}
        return row | ({"errors": self.errors[case]} if case in self.errors else {})

    def rows(self) -> list[dict[str, Any]]:
        has = {case: case in self.values or case in self.errors for case in BLOCKS + CASES}
        return [self.row(case) if here else self.kept[case] for case, here in has.items() if here or case in self.kept]

    def write(self) -> None:
        write_results(self.path, environment(**self.settings), self.rows())


def in_order(cases: Sequence[str]) -> list[str]:
    """With the cases that hosts' wall times are of; those with a profiler last, since it may slow what follows."""
    with_walls = dict.fromkeys([*cases, *(HOSTS[case] for case in cases if case in HOSTS)])
    return sorted(with_walls, key=lambda case: case in PROFILED)


@dataclass(frozen=True)
class Engines:
    """Engines that are there at the same time: one for each of ``caches``, to time ``cases``."""

    caches: Sequence[str]
    cases: Sequence[str]
    layers: int
    cache_bytes: float
    block_size: int
    tensor_parallel_size: int
    core_process: int = 0

    def apart(self) -> list[Engines]:
        """Each alone."""
        return [replace(self, caches=[cache]) for cache in self.caches]

    def run(self, results: Results, end: float, gate: str = "") -> None:
        """Start them; once all are there and the gate command has ended, time the cases until ``end``."""
        if not self.cases or not self.caches or time.monotonic() > end:
            return
        folder = Path(tempfile.mkdtemp())
        checking = subprocess.Popen(gate, shell=True, stdout=sys.stderr) if gate else None
        names = ("layers", "cache_bytes", "block_size", "tensor_parallel_size", "core_process")
        arguments = [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in names]
        workers = {cache: Worker(cache, folder, arguments) for cache in self.caches}
        for cache, worker in list(workers.items()):
            message = worker.message()
            if "ready" not in message:  # the others may still be compared
                results.add(self.cases[0], cache, message)
                del workers[cache]
                continue
            results.add("blocks" if self.layers == results.settings["layers"] else "capacity blocks", cache, message["ready"])
            results.settings["vllm"] = message["vllm"]
            if message["worst"] is not None:
                results.settings.setdefault("error", {})[cache] = message["worst"]
        if checking is not None:
            results.settings["gate"] = "passed" if checking.wait() == 0 else f"failed with status {checking.returncode}"
            print("gate", results.settings["gate"], flush=True)
        results.write()
        for case in self.cases:
            for cache, worker in workers.items():
                if time.monotonic() > end:
                    print(f"no time left for {case} of {cache}", flush=True)
                    continue
                results.add(case, cache, worker.measure(case))
                results.write()
        for worker in workers.values():
            worker.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caches", nargs="*", default=["tq4", "bf16", "fp8"], choices=CACHES)
    parser.add_argument("--cases", nargs="*", default=CASES, choices=CASES)
    parser.add_argument("--later-caches", nargs="*", default=[], choices=CACHES, help="started once the others are done")
    parser.add_argument("--later-cases", nargs="*", default=["b32-8k", "b1-32k", "b8-32k"], choices=CASES)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--cache-bytes", type=float, default=20e9)
    parser.add_argument("--capacity-layers", type=int, default=8)
    parser.add_argument("--capacity-cache-bytes", type=float, default=27.5e9)
    parser.add_argument("--block-size", type=int, default=64, help="of all caches, so that numbers of blocks compare")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of each engine")
    parser.add_argument("--one-at-a-time", action="store_true", help="an engine ends before the next starts")
    parser.add_argument("--gate", default="", help="a shell command")
    parser.add_argument("--seconds", type=float, default=3600.0, help="after which no case is begun")
    parser.add_argument("--keep", type=Path, help="a file of an earlier run, whose rows stay where this one has none")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm-h200.json")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    names = ("layers", "cache_bytes", "capacity_layers", "capacity_cache_bytes", "block_size", "tensor_parallel_size")
    results = Results(options.out, {name: getattr(options, name) for name in names})
    if options.keep is not None:
        results.keep(options.keep)
    timed = in_order([case for case in options.cases if not case.startswith("capacity")])
    some = (options.layers, options.cache_bytes, options.block_size, options.tensor_parallel_size)
    groups = [Engines(options.caches, timed, *some)]
    some_for_capacity = (options.capacity_layers, options.capacity_cache_bytes, *some[2:])
    for core_process, case in enumerate(("capacity", SERVED)):
        if case in options.cases:
            groups.append(Engines(options.caches, [case], *some_for_capacity, core_process))
    groups.append(Engines(options.later_caches, in_order(options.later_cases), *some))
    if options.one_at_a_time:
        groups = [alone for group in groups for alone in group.apart()]
    for number, group in enumerate(groups):
        group.run(results, end, options.gate if number == 0 else "")
    for row in results.rows():
        print(json.dumps(row))
    if results.settings.get("gate", "passed") != "passed":
        sys.exit(f"expected the gate to pass, got {results.settings['gate']}")


if __name__ == "__main__":
    main()
