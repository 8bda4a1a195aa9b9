"""What the benchmark of vLLM writes: rows of this run, and those of an earlier one beside them; and what it says is the host's
time, with an engine, workers and a profiler that are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


@pytest.fixture
def results(tmp_path):
    vllm_serving = pytest.importorskip("vllm_serving")
    return vllm_serving.Results(tmp_path / "new.json", {})


def measured(results, case, tq4, bf16):
    for cache, value in (("tq4", tq4), ("bf16", bf16)):
        results.add(case, cache, {"value": value})


def test_rows_of_an_earlier_run_stay_and_say_of_which_revision_they_are(results, tmp_path):
    earlier = [{"id": "b32-8k", "against_bf16": 9.0}, {"id": "capacity", "revision": "a"}, {"id": "capacity-served"}]
    (tmp_path / "old.json").write_text(json.dumps({"environment": {"revision": "b"}, "rows": earlier}))
    results.keep(tmp_path / "old.json")
    measured(results, "b32-8k", 3.0, 6.0)
    assert [(row["id"], row.get("revision")) for row in results.rows()] == [
        ("b32-8k", None), ("capacity", "a"), ("capacity-served", "b"),
    ]  # fmt: skip
    assert results.rows()[0]["against_bf16"] == 0.5


def test_a_case_that_failed_replaces_an_earlier_row(results, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps({"environment": {"revision": "b"}, "rows": [{"id": "short-1"}]}))
    results.keep(tmp_path / "old.json")
    results.add("short-1", "tq4", {"error": "out of memory"})
    (row,) = results.rows()
    assert row["errors"] == {"tq4": "out of memory"}
    assert "revision" not in row


def event(name, start, end, device=torch.autograd.DeviceType.CUDA, annotation=False):
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=device, time_range=times, is_user_annotation=annotation)


EVENTS = [  # microseconds of two steps
    event("void tq4_decode<128>(int)", 0.0, 1000.0),
    event("triton_red_fused_all_reduce_rms_norm_0", 900.0, 1400.0),  # launched early
    event("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(int)", 2000.0, 6000.0),
    event("Memcpy HtoD", 2500.0, 3000.0),  # beside it
    event("void (anonymous namespace)::one_shot_all_reduce_kernel<8>(int)", 6000.0, 6200.0),
    event("ncclDevKernel_AllGather_RING_LL(int)", 7000.0, 7400.0),
    event("cudaGraphLaunch", 0.0, 9000.0, torch.autograd.DeviceType.CPU),
    event("a range", 0.0, 9000.0, annotation=True),
]


def test_a_step_of_a_rank_has_its_kernels_its_collectives_and_when_any_runs():
    vllm_profile = pytest.importorskip("vllm_profile")
    assert vllm_profile.summary(EVENTS, 2) == {
        "kernel_ms": 1.0,  # 1 + 0.5 + 0.5
        "collective_ms": 2.3,  # 4 + 0.2 + 0.4
        "busy_ms": 3.0,  # 1.4 + 4.2 + 0.4
        "launches": 3.0,
        "of_attention": {"tq4_decode": 0.5},
    }


def test_what_is_asked_of_the_profiler_has_these_names():
    found = torch.autograd.profiler_util.FunctionEvent(1, "kernel", 0, 2, 5, device_type=torch.autograd.DeviceType.CUDA)
    summary = pytest.importorskip("vllm_profile").summary([found], 1)
    assert (summary["kernel_ms"], summary["launches"]) == (0.003, 1.0)


def rank(kernel_ms, collective_ms):
    times = {"kernel_ms": kernel_ms, "collective_ms": collective_ms, "busy_ms": kernel_ms + collective_ms}
    return {**times, "launches": 9.0, "of_attention": {"tq4_store": 1.0}}


def test_the_hosts_time_is_that_of_the_rank_which_waits_least():
    vllm_profile = pytest.importorskip("vllm_profile")
    assert vllm_profile.host_times(4.0, [rank(1.0, 2.0), rank(1.0, 0.5)]) == {
        "ms_per_step": 4.0, "host_ms": 2.5, "kernel_ms": 1.0, "collective_ms": 0.5, "busy_ms": 1.5, "launches": 9.0,
        "rank": 1, "collective_ms_of_ranks": [2.0, 0.5],
    }  # fmt: skip
    assert "rank" not in vllm_profile.host_times(4.0, [rank(1.0, 0.0)])


def test_a_worker_profiles_what_runs_between_two_calls(monkeypatch):
    vllm_profile, calls = pytest.importorskip("vllm_profile"), []

    class Profile:
        def __init__(self, activities):
            calls.append(activities)

        def start(self):
            calls.append("start")

        def stop(self):
            calls.append("stop")

        def events(self):
            assert calls[-1] == "stop"
            return EVENTS

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    worker = vllm_profile.ProfiledWorker()
    assert worker.start_step_profile() is None
    found = worker.end_step_profile(2)
    assert calls == ["synchronize", [torch.profiler.ProfilerActivity.CUDA], "start", "synchronize", "stop"]
    assert json.loads(json.dumps(found)) == vllm_profile.summary(EVENTS, 2)  # nothing that needs pickle to get back


@pytest.mark.vllm
def test_workers_of_vllm_take_the_methods():
    gpu_worker = pytest.importorskip("vllm.v1.worker.gpu_worker", exc_type=ImportError)
    profile = pytest.importorskip("vllm_profile")
    assert f"{profile.__name__}.{profile.ProfiledWorker.__name__}" == profile.EXTENSION
    names = [name for name in dir(profile.ProfiledWorker) if not name.startswith("__")]  # those that vLLM compares
    assert names == ["end_step_profile", "start_step_profile"]
    assert not any(hasattr(gpu_worker.Worker, name) for name in names)


class Engine:
    """Steps of 2 ms, of 50 with the profiler, and of 3 once it has run, each a token of each request."""

    def __init__(self, ranks):
        self.ranks, self.clock, self.profiling, self.profiled, self.fails = ranks, 0.0, -1, False, False
        self.requests: list[str] = []
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=SimpleNamespace(running=[], waiting=[])))

    def add_request(self, name, prompt, params):
        self.requests.append(name)
        return name

    def abort_request(self, names, internal):
        self.requests = []

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        if self.profiling >= 0:
            self.profiling += 1
            if self.fails:
                raise RuntimeError("out of memory")
        self.clock += 0.05 if self.profiling >= 0 else 0.003 if self.profiled else 0.002
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])]) for _ in self.requests]

    def collective_rpc(self, method, args=()):
        if method == "start_step_profile":
            assert self.requests
            self.profiling = 0
            return [None for _ in self.ranks]
        assert method == "end_step_profile"
        assert self.fails or args == (self.profiling,)
        self.profiling, self.profiled = -1, True
        return self.ranks


@pytest.fixture
def timer(monkeypatch):
    worker = pytest.importorskip("vllm_worker")
    parts = {"vllm": {"SamplingParams": dict}, "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA=1)}}
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    engine = Engine([rank(1.0, 0.75), rank(1.0, 0.25)])
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: engine.clock, monotonic_ns=lambda: 0))
    return worker.Timer(SimpleNamespace(llm_engine=engine))


def test_wall_times_are_of_steps_before_any_profiler(timer):
    cases = pytest.importorskip("vllm_serving").in_order(["trace-1", "host-1", "host-32"])
    found = {case: timer.measure(case)["value"] for case in cases}
    assert (found["short-1"], found["short-32"]) == (2.0, 2.0)
    for case in ("host-1", "host-32"):
        assert (found[case]["ms_per_step"], found[case]["host_ms"], found[case]["rank"]) == (2.0, 0.75, 1)
    assert not timer.engine.requests


def test_a_case_alone_times_its_steps_itself(timer):
    assert timer.measure("host-32k")["value"]["ms_per_step"] == 2.0


def test_a_trace_is_of_the_first_rank_and_has_no_times_of_a_host(timer):
    assert timer.measure("trace-32") == {"value": {"kernel_ms": 1.0, "launches": 9.0, "of_attention": {"tq4_store": 1.0}}}


def test_a_step_that_fails_ends_its_profiler(timer):
    timer.engine.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        timer.measure("trace-1")
    assert timer.engine.profiling == -1


def test_cases_stay_in_their_order_but_for_those_with_a_profiler():
    in_order = pytest.importorskip("vllm_serving").in_order
    assert in_order(["trace-1", "short-1", "b32-8k"]) == ["short-1", "b32-8k", "trace-1"]
    assert in_order(["host-1", "ttft"]) == ["ttft", "short-1", "host-1"]


def test_a_hosts_row_has_values_by_cache_and_names_its_case(results):
    measured(results, "host-32k", {"host_ms": 1.0}, {"host_ms": 2.0})
    results.add("host-32k", "fp8", {"error": "out of memory"})
    (row,) = results.rows()
    assert row == {
        "id": "host-32k", "of": "b1-32k", "step": {"tq4": {"host_ms": 1.0}, "bf16": {"host_ms": 2.0}},
        "errors": {"fp8": "out of memory"},
    }  # fmt: skip


def test_a_worker_is_a_script_that_finds_its_modules_with_no_folder_on_the_path():
    command = [sys.executable, "-P", "-W", "ignore", str(BENCHMARKS / "vllm_worker.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "--core-process" in done.stdout) == (0, True), done.stderr


TOGETHER = "start tq4, start bf16, short-1 tq4, short-1 bf16, end tq4, end bf16, start fp8, short-1 fp8, end fp8"
ALONE = "start tq4, short-1 tq4, end tq4, start bf16, short-1 bf16, end bf16, start fp8, short-1 fp8, end fp8"


@pytest.mark.parametrize(("option", "expected"), [([], TOGETHER), (["--one-at-a-time"], ALONE)])
def test_engines_are_there_together_or_each_alone(monkeypatch, tmp_path, option, expected):
    vllm_serving, log = pytest.importorskip("vllm_serving"), []

    class Worker:
        def __init__(self, cache, folder, arguments):
            self.cache = cache
            log.append(f"start {cache}")

        def message(self):
            return {"ready": {"value": 10}, "vllm": "0.33.0", "worst": None}

        def measure(self, case):
            log.append(f"{case} {self.cache}")
            return {"value": {"tq4": 2.0, "bf16": 4.0, "fp8": 8.0}[self.cache]}

        def end(self):
            log.append(f"end {self.cache}")

    monkeypatch.setattr(vllm_serving, "Worker", Worker)
    monkeypatch.setattr(vllm_serving, "environment", lambda **settings: settings)
    out, gate = tmp_path / "out.json", tmp_path / "gate"
    arguments = ["--caches", "tq4", "bf16", "--cases", "short-1", "--later-caches", "fp8", "--later-cases", "short-1"]
    command = ["vllm_serving.py", *arguments, "--gate", f"echo ran >> '{gate}'", "--out", str(out), *option]
    monkeypatch.setattr(sys, "argv", command)
    vllm_serving.main()
    assert ", ".join(log) == expected
    assert gate.read_text() == "ran\n"
    rows = {row["id"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["blocks"]["blocks"] == {"tq4": 10, "bf16": 10, "fp8": 10}
    assert rows["short-1"]["ms_per_step"] == {"tq4": 2.0, "bf16": 4.0, "fp8": 8.0}
    assert (rows["short-1"]["against_bf16"], rows["short-1"]["against_fp8"]) == (0.5, 0.25)
