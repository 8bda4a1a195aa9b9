"""The NVRTC runtime: compiling for every architecture, the disk cache under attack, launch arguments, GPU launches."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import multiprocessing
import os
import re
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from turboquant_vllm.cuda import runtime

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

SOURCE = r"""
#ifndef SCALE
#define SCALE 1
#endif
extern "C" __global__ void vector_add(const float* a, const float* b, float* c, long long n, int bias, float s) {
  __shared__ float tile[64];
  extern __shared__ float dynamic[];
  if (threadIdx.x < 64) tile[threadIdx.x] = s;
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (n < 0) c[0] = dynamic[bias];
  if (i < n) c[i] = a[i] + SCALE * b[i] * tile[i & 63] + bias;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
struct Params { const float* a; const float* b; float* c; long long n; int bias; float s; };
extern "C" __global__ void vector_add_struct(const __grid_constant__ Params p) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < p.n) p.c[i] = p.a[i] + p.b[i] * p.s + p.bias;
}
template <int N> __global__ void fill(float* x) { x[threadIdx.x] = N; }
extern "C" __global__ void crowded(float* x) {
  float v[48];
  #pragma unroll
  for (int i = 0; i < 48; ++i) v[i] = ((volatile float*)x)[i * 32 + threadIdx.x];
  #pragma unroll
  for (int i = 0; i < 48; ++i) ((volatile float*)x)[i * 32 + threadIdx.x] = v[47 - i] + v[i];
}
"""
PARAMS = "PPPqif"
VERSIONS = ("nvrtc 1.0", "core 1.0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty disk cache and an empty memory cache."""
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(runtime, "_compiled", {})
    monkeypatch.setattr(runtime, "_kernels", {})
    monkeypatch.setattr(runtime, "_warned", set())


def fake_nvrtc(source: str, arch: str, name: str, macros: Any, settings: Any, expressions: Any) -> Any:
    """Bytes that depend on every input, as large as a real cubin."""
    seed = repr((source, arch, sorted(macros.items()), sorted(settings.items()), expressions)).encode()
    return hashlib.sha256(seed).digest() * 2048, "ptxas info : Compiling entry function 'k' for 'sm'", {}


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces NVRTC; lists the name of each compilation."""
    names: list[str] = []

    def record(*args: Any) -> Any:
        names.append(args[2])
        return fake_nvrtc(*args)

    monkeypatch.setattr(runtime, "_run_nvrtc", record)
    monkeypatch.setattr(runtime, "_cuda", lambda: SimpleNamespace(versions=VERSIONS))
    return names


def compile_k(**changes: Any) -> runtime.Compiled:
    return runtime.compile_cubin(**{"source": "text", "arch": "sm_90", "name": "k", **changes})


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_for_every_architecture_without_a_gpu(arch: str) -> None:
    pytest.importorskip("cuda.core")
    compiled = runtime.compile_cubin(SOURCE, arch=arch, name="vector_add", name_expressions=["fill<7>"])
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.arch == arch
    assert compiled.kernels["vector_add"] == "vector_add"
    assert compiled.kernels["fill<7>"].startswith("_Z4fill")
    usage = runtime.resource_usage(compiled)
    assert set(usage) == set(compiled.kernels)
    assert 8 <= usage["vector_add"].registers <= 64
    assert usage["vector_add"].static_shared == 256
    assert usage["vector_add"].spill_stores == usage["vector_add"].spill_loads == 0


def test_resource_usage_sees_spills_and_agrees_with_cuobjdump(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    compiled = runtime.compile_cubin(SOURCE, arch="sm_80", name="k", options={"max_register_count": 24})
    usage = runtime.resource_usage(compiled)
    assert usage["crowded"].registers <= 24
    assert usage["crowded"].spill_stores >= 64
    assert usage["crowded"].spill_loads >= 64
    assert usage["crowded"].stack_frame > 0
    roomy = runtime.resource_usage(runtime.compile_cubin(SOURCE, arch="sm_80", name="k"))["crowded"]
    assert roomy.registers > 24
    assert roomy.spill_stores == roomy.stack_frame == 0

    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    (tmp_path / "k.cubin").write_bytes(compiled.cubin)
    text = subprocess.run([tool, "-res-usage", tmp_path / "k.cubin"], capture_output=True, text=True, check=True).stdout
    seen = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert {name: tuple(map(int, rest)) for name, *rest in seen} == {
        name: (use.registers, use.stack_frame, use.static_shared) for name, use in usage.items()
    }


def test_resource_usage_counts_spills_of_outlined_functions_and_refuses_an_unknown_log() -> None:
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\n"
        "ptxas info    : Function properties for k\n"
        "    32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 1 barriers, 32 bytes cumulative stack size, 512 bytes smem\n"
        "ptxas info    : Function properties for _Z1gPfi\n"
        "ptxas         .     0 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads\n"
    )
    compiled = runtime.Compiled(b"", {"k": "k"}, log, "sm_90", "")
    assert runtime.resource_usage(compiled) == {"k": runtime.ResourceUsage(32, 44, 52, 32, 512)}
    with pytest.raises(RuntimeError, match="no resource usage for k"):
        runtime.resource_usage(runtime.Compiled(b"", {"k": "k"}, "silence", "sm_90", ""))


def test_defines_reach_the_source() -> None:
    pytest.importorskip("cuda.core")
    source = 'static_assert(A == 3 && B == 1, ""); extern "C" __global__ void k(NAME* x) { *x = A; }'
    runtime.compile_cubin(source, arch="sm_90", name="k", defines={"A": 3, "B": True, "NAME": "long long"})


def test_a_compile_error_names_kernel_and_arch_and_shows_the_log(folder: Path) -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(RuntimeError, match=r"could not compile decode for sm_90: (?s:.*)\"missing\" is undefined") as info:
        runtime.compile_cubin('extern "C" __global__ void k(int* x) { *x = missing; }', arch="sm_90", name="decode")
    assert "\0" not in str(info.value)
    greedy = 'extern "C" __global__ void k(int* x) { __shared__ int y[99999]; y[*x] = 1; __syncthreads(); *x = y[3]; }'
    with pytest.raises(RuntimeError, match="too much shared data"):
        runtime.compile_cubin(greedy, arch="sm_90", name="k")
    with pytest.raises(RuntimeError, match="for sm_1: "):
        runtime.compile_cubin("", arch="sm_1", name="k")
    with pytest.raises(RuntimeError, match=r"cuda_fp16\.h"):
        runtime.compile_cubin("#include <cuda_fp16.h>", arch="sm_90", name="k")
    assert not folder.exists()


def test_options_that_the_key_cannot_cover_are_refused(compilations: list[str]) -> None:
    with pytest.raises(ValueError, match=r"options must be among .*, got include_path"):
        compile_k(options={"include_path": "/tmp"})


def test_without_cuda_core_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime._cuda.cache_clear()
    for module in ("cuda", "cuda.core", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install turboquant-vllm\[cuda\]"):
        compile_k()


def test_importing_the_runtime_does_not_import_cuda_core() -> None:
    code = "import sys, turboquant_vllm.cuda.runtime; sys.exit('cuda.core' in sys.modules)"
    paths = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_every_ingredient_changes_the_key(compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [compile_k().key]
    for change in (
        {"source": "text "},
        {"arch": "sm_80"},
        {"defines": {"A": 1}},
        {"defines": {"A": 2}},
        {"defines": {"A": 1, "B": 1}},
        {"options": {"use_fast_math": True}},
        {"options": {"use_fast_math": False}},
        {"options": {"ptxas_options": ["-O2"]}},
        {"name_expressions": ["A"]},
    ):
        keys.append(compile_k(**change).key)
    for versions in (("nvrtc 1.1", "core 1.0"), ("nvrtc 1.0", "core 1.1")):
        monkeypatch.setattr(runtime, "_cuda", lambda versions=versions: SimpleNamespace(versions=versions))
        keys.append(compile_k().key)
    monkeypatch.setattr(runtime, "_cuda", lambda: SimpleNamespace(versions=VERSIONS))
    monkeypatch.setattr(runtime, "FORMAT", runtime.FORMAT + 1)
    keys.append(compile_k().key)
    assert len(set(keys)) == len(keys) == len(compilations)


def test_order_spelling_and_label_do_not_change_the_key(compilations: list[str]) -> None:
    first = compile_k(defines={"A": 1, "B": 2}, options={"ftz": True, "fma": False}, name_expressions=["x", "y"])
    again = compile_k(
        defines={"B": "2", "A": True}, options={"fma": False, "ftz": True}, name_expressions=("y", "x"), name="other"
    )
    assert first is again
    assert len(compilations) == 1


# ---- memory and disk -------------------------------------------------------------------------------------------------


def test_a_hit_does_not_compile(compilations: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_k()
    assert compile_k() is first
    forget(monkeypatch)
    second = compile_k()
    assert second is not first
    assert second == first
    assert compilations == ["k"]
    assert [path.name for path in folder.iterdir()] == [f"{first.key}.bin"]
    assert stat.S_IMODE((folder / f"{first.key}.bin").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_hit_from_disk_restores_log_and_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.core")
    first = runtime.compile_cubin(SOURCE, arch="sm_90", name="k", name_expressions=["fill<7>"])
    forget(monkeypatch)
    monkeypatch.setattr(runtime, "_run_nvrtc", None)
    second = runtime.compile_cubin(SOURCE, arch="sm_90", name="k", name_expressions=["fill<7>"])
    assert second == first
    assert runtime.resource_usage(second) == runtime.resource_usage(first)


def flip(position: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(b""), id="zero length"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:20]), id="half a header"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), id="last byte missing"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\0"), id="a byte too many"),
        pytest.param(lambda path: path.write_bytes(b"\0" * path.stat().st_size), id="all zero"),
        pytest.param(flip(0), id="magic"),
        pytest.param(flip(8), id="key"),
        pytest.param(flip(40), id="length"),
        pytest.param(flip(48), id="digest"),
        pytest.param(flip(runtime.HEADER.size), id="first payload byte"),
        pytest.param(flip(-1), id="last payload byte"),
    ],
)
def test_a_damaged_entry_is_rebuilt(
    damage: Callable[[Path], None], compilations: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compile_k()
    path = folder / f"{first.key}.bin"
    intact = path.read_bytes()
    damage(path)
    forget(monkeypatch)
    assert compile_k() == first
    assert len(compilations) == 2
    assert path.read_bytes() == intact


def test_an_entry_of_another_key_is_not_trusted(compilations: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = compile_k(), compile_k(source="other")
    (folder / f"{other.key}.bin").replace(folder / f"{first.key}.bin")
    forget(monkeypatch)
    assert compile_k() == first
    assert len(compilations) == 3


def test_a_directory_in_place_of_the_entry(
    compilations: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = compile_k()
    (folder / f"{first.key}.bin").unlink()
    (folder / f"{first.key}.bin").mkdir()
    forget(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert compile_k() == first
    assert len(caplog.records) == 1
    assert [path.name for path in folder.iterdir()] == [f"{first.key}.bin"], "a temporary file was left behind"


def no_permission(*args: Any, **kwargs: Any) -> None:
    raise PermissionError(13, "Permission denied", f"/unique/{os.urandom(4).hex()}")


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("obstacle", ["a file in the way", "no permission", "disk full", "no home"])
def test_an_unusable_folder_is_one_warning(
    obstacle: str,
    compilations: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if obstacle == "a file in the way":
        (tmp_path / "file").touch()
        monkeypatch.setenv("TURBOQUANT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    elif obstacle == "no permission":
        monkeypatch.setattr(runtime.tempfile, "mkstemp", no_permission)
    elif obstacle == "disk full":
        monkeypatch.setattr(runtime.os, "replace", no_permission)
    else:
        monkeypatch.delenv("TURBOQUANT_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(runtime.Path, "home", no_home)
    with caplog.at_level(logging.WARNING):
        results = [compile_k(), compile_k(source="other"), compile_k()]
    assert results[0] is results[2]
    assert len(compilations) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runtime.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", "")
    assert runtime.cache_dir() == tmp_path / "xdg" / "turboquant_vllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert runtime.cache_dir() == tmp_path / ".cache" / "turboquant_vllm"


def race(barrier: Any, results: Any, rounds: int) -> None:
    """Compile the same keys as the other process, in step with it, each round after a fresh start."""
    runtime._run_nvrtc = fake_nvrtc
    runtime._cuda = lambda: SimpleNamespace(versions=VERSIONS)  # type: ignore[assignment]
    digests = []
    for number in range(rounds):
        runtime._compiled.clear()
        barrier.wait(timeout=60)
        digests.append(hashlib.sha256(compile_k(source=f"text {number // 2}").cubin).hexdigest())
    results.put(digests)


def test_two_processes_race_on_the_same_entries(compilations: list[str], folder: Path) -> None:
    rounds = 40
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [context.Process(target=race, args=(barrier, results, rounds)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = results.get(timeout=60), results.get(timeout=60)
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    expected = [compile_k(source=f"text {number // 2}") for number in range(rounds)]
    assert first == second == [hashlib.sha256(compiled.cubin).hexdigest() for compiled in expected]
    assert compilations == [], "an entry that the race left behind does not validate"
    assert len(list(folder.iterdir())) == rounds // 2


# ---- launch arguments, with the driver replaced ----------------------------------------------------------------------


class FakeDriver:
    """The driver bindings, with the calls that need a GPU replaced; remembers the launches."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.limits: list[int] = []
        self.launches: list[SimpleNamespace] = []
        self.statuses: list[int] = []
        self.contexts: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def cuKernelGetFunction(self, kernel: int) -> tuple[int, int]:  # noqa: N802
        return 0, kernel + 1

    def cuFuncGetAttribute(self, attribute: Any, function: int) -> tuple[int, int]:  # noqa: N802
        return 0, 48 * 1024

    def cuFuncSetAttribute(self, function: int, attribute: Any, value: int) -> tuple[Any]:  # noqa: N802
        self.limits.append(value)
        return (self.real.CUresult(0 if value <= 227 * 1024 else 1),)

    def cuLaunchKernelEx(self, config: Any, function: int, arguments: int, extra: int) -> tuple[Any]:  # noqa: N802
        addresses = ctypes.cast(arguments, ctypes.POINTER(ctypes.c_void_p))[: len(PARAMS)]
        values = [
            struct.unpack(code, ctypes.string_at(address, struct.calcsize(code)))[0]
            for code, address in zip(PARAMS, addresses, strict=True)
        ]
        self.launches.append(
            SimpleNamespace(
                grid=(config.gridDimX, config.gridDimY, config.gridDimZ),
                block=(config.blockDimX, config.blockDimY, config.blockDimZ),
                shared=config.sharedMemBytes,
                stream=int(config.hStream),
                attributes=list(config.attrs),
                count=config.numAttrs,
                function=function,
                values=values,
                as_struct=ctypes.string_at(addresses[0], struct.calcsize("@" + PARAMS)),
            )
        )
        return (self.real.CUresult(self.statuses.pop(0) if self.statuses else 0),)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    pytest.importorskip("cuda.core")
    fake = FakeDriver(runtime._cuda().driver)
    core = SimpleNamespace(Device=lambda index: SimpleNamespace(set_current=lambda: fake.contexts.append(index)))
    monkeypatch.setattr(runtime, "_cuda", lambda: SimpleNamespace(core=core, driver=fake, versions=VERSIONS))
    monkeypatch.setattr(runtime, "_raw_stream", lambda index: 0x77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return fake


def fake_kernel(layout: list[tuple[int, int]], params: str = PARAMS) -> runtime.Kernel:
    infos = [SimpleNamespace(offset=offset, size=size) for offset, size in layout]
    return runtime.Kernel(SimpleNamespace(handle=5, arguments_info=infos), name="add", device=0, params=params)


SEPARATE = [(0, 8), (8, 8), (16, 8), (24, 8), (32, 4), (36, 4)]
VALUES = [2**47 + 16, 2**47 + 32, 0, -(2**40), -3, 0.5]


def test_launch_hands_over_configuration_and_arguments(driver: FakeDriver) -> None:
    kernel = fake_kernel(SEPARATE)
    runtime.launch(kernel, (5, 4, 3), (128, 2, 1), 1024, None, VALUES)
    runtime.launch(kernel, (1, 1, 1), (32, 1, 1), 0, 0x99, [1, 2, 3, 4, 5, 6])
    first, second = driver.launches
    assert (first.grid, first.block, first.shared, first.stream) == ((5, 4, 3), (128, 2, 1), 1024, 0x77)
    assert first.values == VALUES
    assert first.as_struct == struct.pack("@" + PARAMS, *VALUES)
    assert (first.function, first.count) == (6, 0)
    assert (second.grid, second.shared, second.stream, second.values) == ((1, 1, 1), 0, 0x99, [1, 2, 3, 4, 5, 6])
    assert driver.limits == []


def test_launch_attributes(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, ids = fake_kernel(SEPARATE), driver.real.CUlaunchAttributeID
    runtime.launch(kernel, (4, 1, 1), (32, 1, 1), 0, None, VALUES, pdl=True, cluster=(2, 1, 1))
    runtime.launch(kernel, (4, 1, 1), (32, 1, 1), 0, None, VALUES)
    cluster, pdl = driver.launches[0].attributes
    assert cluster.id == ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    assert (cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z) == (2, 1, 1)
    assert pdl.id == ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert pdl.value.programmaticStreamSerializationAllowed == 1
    assert [seen.count for seen in driver.launches] == [2, 0]

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    older = fake_kernel(SEPARATE)
    runtime.launch(older, (4, 1, 1), (32, 1, 1), 0, None, VALUES, pdl=True)
    assert driver.launches[-1].count == 0
    with pytest.raises(ValueError, match=r"cluster needs compute capability 9\.0"):
        runtime.launch(older, (4, 1, 1), (32, 1, 1), 0, None, VALUES, cluster=(2, 1, 1))


def test_the_shared_memory_limit_is_raised_once(driver: FakeDriver) -> None:
    kernel = fake_kernel(SEPARATE)
    for shared_bytes in (48 * 1024, 99 * 1024, 64 * 1024, 99 * 1024):
        runtime.launch(kernel, (1, 1, 1), (32, 1, 1), shared_bytes, None, VALUES)
    assert driver.limits == [99 * 1024]
    with pytest.raises(RuntimeError, match=r"asking for 300000 bytes .* failed for add on cuda:0: .*INVALID_VALUE"):
        runtime.launch(kernel, (1, 1, 1), (32, 1, 1), 300000, None, VALUES)


def test_launch_errors(driver: FakeDriver) -> None:
    kernel = fake_kernel(SEPARATE)
    text: Any = "x"
    for values in (VALUES[:-1], [*VALUES, 1], [*VALUES[:-1], text], [0.5, *VALUES[1:]], [*VALUES[:4], 2**31, 0.5]):
        with pytest.raises(TypeError, match=r"add takes 'PPPqif', got \d arguments"):
            runtime.launch(kernel, (1, 1, 1), (32, 1, 1), 0, None, values)
    assert driver.launches == []
    driver.statuses = [1]
    with pytest.raises(RuntimeError, match=r"launch \(grid \(0, 1, 1\), block .*INVALID_VALUE"):
        runtime.launch(kernel, (0, 1, 1), (32, 1, 1), 0, None, VALUES)
    runtime.launch(kernel, (1, 1, 1), (32, 1, 1), 0, None, VALUES)


def test_a_thread_without_a_context_gets_one(driver: FakeDriver) -> None:
    driver.statuses = [201]
    runtime.launch(fake_kernel(SEPARATE), (1, 1, 1), (32, 1, 1), 0, None, VALUES)
    assert len(driver.launches) == 2
    assert driver.contexts == [0]
    assert driver.launches[1].values == VALUES


def test_params_must_fit_the_compiled_kernel(driver: FakeDriver) -> None:
    fake_kernel([(0, 40)])
    fake_kernel([(0, 16)], params="Pi")  # the tail padding of a struct
    for layout in (SEPARATE[:-1], [(0, 48)], [*SEPARATE[:5], (40, 8)]):
        with pytest.raises(ValueError, match="params 'PPPqif' of add are"):
            fake_kernel(layout)
    with pytest.raises(ValueError, match="may hold the codes"):
        fake_kernel(SEPARATE, params="3Pqif")


def test_threads_do_not_mix_their_arguments(driver: FakeDriver) -> None:
    kernel = fake_kernel(SEPARATE)
    interval = sys.getswitchinterval()

    def work(number: int) -> None:
        for _ in range(200):
            runtime.launch(kernel, (number, 1, 1), (32, 1, 1), 0, None, [number] * 6)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(driver.launches) == 800
    assert all(seen.values == [seen.grid[0]] * 6 for seen in driver.launches)


def test_load_kernel_wants_an_nvidia_gpu() -> None:
    with pytest.raises(ValueError, match="device must be an NVIDIA GPU, got cpu"):
        runtime.load_kernel(SOURCE, "vector_add", device=torch.device("cpu"), params=PARAMS)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> torch.device:
    """The last GPU, which is not the current one where there are two."""
    pytest.importorskip("cuda.core")
    if not torch.cuda.is_available() or torch.version.hip:
        pytest.skip("needs an NVIDIA GPU")
    return torch.device("cuda", torch.cuda.device_count() - 1)


def add_on(
    device: torch.device, n: int = 1000, **options: Any
) -> tuple[Callable[..., None], torch.Tensor, torch.Tensor, torch.Tensor]:
    """A launcher of c = a + b * 0.5 + 3 and its tensors."""
    kernel = runtime.load_kernel(SOURCE, "vector_add", device=device, params=PARAMS, **options)
    a, b, c = (torch.randn(n, device=device) for _ in range(3))
    c.fill_(float("nan"))

    def run(shared_bytes: int = 0, **extra: Any) -> None:
        arguments = (a.data_ptr(), b.data_ptr(), c.data_ptr(), n, 3, 0.5)
        runtime.launch(kernel, (-(-n // 256), 1, 1), (256, 1, 1), shared_bytes, None, arguments, **extra)

    return run, a, b, c


@pytest.mark.gpu
@pytest.mark.parametrize("extra", [{}, {"shared_bytes": 64 * 1024}, {"pdl": True}])
def test_gpu_vector_add(device: torch.device, extra: dict[str, Any]) -> None:
    run, a, b, c = add_on(device)
    before = torch.cuda.current_device()
    run(**extra)
    assert torch.cuda.current_device() == before
    torch.testing.assert_close(c, a + b * 0.5 + 3)


@pytest.mark.gpu
def test_gpu_defines_paths_templates_and_structs(device: torch.device, tmp_path: Path) -> None:
    run, a, b, c = add_on(device, defines={"SCALE": 4})
    run()
    torch.testing.assert_close(c, a + b * 2 + 3)
    path = tmp_path / "kernels.cu"
    path.write_text(SOURCE)
    fill = runtime.load_kernel(path, "fill<7>", device=device, params="P")
    assert runtime.load_kernel(path, "fill<7>", device=device, params="P") is fill
    runtime.launch(fill, (1, 1, 1), (32, 1, 1), 0, None, (c.data_ptr(),))
    assert bool((c[:32] == 7).all())
    add = runtime.load_kernel(path, "vector_add_struct", device=device, params=PARAMS)
    arguments = (a.data_ptr(), b.data_ptr(), c.data_ptr(), 1000, 3, 0.5)
    runtime.launch(add, (4, 1, 1), (256, 1, 1), 0, None, arguments)
    torch.testing.assert_close(c, a + b * 0.5 + 3)
    assert add.blocks_per_multiprocessor(1024, 0) >= 1


@pytest.mark.gpu
def test_gpu_launch_follows_the_current_stream(device: torch.device) -> None:
    run, a, b, c = add_on(device)
    run()  # nothing is loaded below
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a launch on another stream would read the old a
        a.fill_(2.0)
        run()
    stream.synchronize()
    torch.testing.assert_close(c, 2.0 + b * 0.5 + 3)


@pytest.mark.gpu
def test_gpu_graph_capture_and_replay(device: torch.device) -> None:
    run, a, b, c = add_on(device)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph):
        run()
        run(pdl=True)
    for value in (1.0, 5.0):
        a.fill_(value)
        c.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(c, value + b * 0.5 + 3)


@pytest.mark.gpu
def test_gpu_launch_from_a_fresh_thread(device: torch.device) -> None:
    run, a, b, c = add_on(device)
    torch.cuda.synchronize(device)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    torch.testing.assert_close(c, a + b * 0.5 + 3)


@pytest.mark.gpu
def test_gpu_errors(device: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"could not load absent .*source has .*vector_add"):
        runtime.load_kernel(SOURCE, "absent", device=device, params=PARAMS)
    with pytest.raises(ValueError, match="the kernel takes"):
        runtime.load_kernel(SOURCE, "vector_add", device=device, params="PPPqi")
    run, *_ = add_on(device)
    with pytest.raises(RuntimeError, match="dynamic shared memory"):
        run(shared_bytes=10**6)
