"""The NVRTC runtime: compiling for every architecture, and the disk cache under attack."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cuda_sources import ARCHS, SOURCE, VERSIONS, empty_caches, forget
from turboquant_vllm.cuda import nvrtc
from turboquant_vllm.cuda.usage import ResourceUsage, resource_usage


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty disk cache."""
    return empty_caches(tmp_path, monkeypatch)


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

    monkeypatch.setattr(nvrtc, "_run_nvrtc", record)
    monkeypatch.setattr(nvrtc, "libraries", lambda: SimpleNamespace(versions=VERSIONS))
    return names


def compile_k(**changes: Any) -> nvrtc.Compiled:
    return nvrtc.compile_cubin(**{"source": "text", "arch": "sm_90", "name": "k", **changes})


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_for_every_architecture_without_a_gpu(arch: str) -> None:
    pytest.importorskip("cuda.core")
    compiled = nvrtc.compile_cubin(SOURCE, arch=arch, name="vector_add", name_expressions=["fill<7>"])
    assert compiled.cubin[:4] == b"\x7fELF"
    assert compiled.arch == arch
    assert compiled.kernels["vector_add"] == "vector_add"
    assert compiled.kernels["fill<7>"].startswith("_Z4fill")
    usage = resource_usage(compiled)
    assert set(usage) == set(compiled.kernels)
    assert 8 <= usage["vector_add"].registers <= 64
    assert usage["vector_add"].static_shared == 256
    assert usage["vector_add"].spill_stores == usage["vector_add"].spill_loads == 0


def test_resource_usage_sees_spills_and_agrees_with_cuobjdump(tmp_path: Path) -> None:
    pytest.importorskip("cuda.core")
    compiled = nvrtc.compile_cubin(SOURCE, arch="sm_80", name="k", options={"max_register_count": 24})
    usage = resource_usage(compiled)
    assert usage["crowded"].registers <= 24
    assert usage["crowded"].spill_stores >= 64
    assert usage["crowded"].spill_loads >= 64
    assert usage["crowded"].stack_frame > 0
    roomy = resource_usage(nvrtc.compile_cubin(SOURCE, arch="sm_80", name="k"))["crowded"]
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
    compiled = nvrtc.Compiled(b"", {"k": "k"}, log, "sm_90", "")
    assert resource_usage(compiled) == {"k": ResourceUsage(32, 44, 52, 32, 512)}
    with pytest.raises(RuntimeError, match="no resource usage for k"):
        resource_usage(nvrtc.Compiled(b"", {"k": "k"}, "silence", "sm_90", ""))


def test_defines_reach_the_source() -> None:
    pytest.importorskip("cuda.core")
    source = 'static_assert(A == 3 && B == 1, ""); extern "C" __global__ void k(NAME* x) { *x = A; }'
    nvrtc.compile_cubin(source, arch="sm_90", name="k", defines={"A": 3, "B": True, "NAME": "long long"})


def test_a_compile_error_names_kernel_and_arch_and_shows_the_log(folder: Path) -> None:
    pytest.importorskip("cuda.core")
    with pytest.raises(RuntimeError, match=r"could not compile decode for sm_90: (?s:.*)\"missing\" is undefined") as info:
        nvrtc.compile_cubin('extern "C" __global__ void k(int* x) { *x = missing; }', arch="sm_90", name="decode")
    assert "\0" not in str(info.value)
    greedy = 'extern "C" __global__ void k(int* x) { __shared__ int y[99999]; y[*x] = 1; __syncthreads(); *x = y[3]; }'
    with pytest.raises(RuntimeError, match="too much shared data"):
        nvrtc.compile_cubin(greedy, arch="sm_90", name="k")
    with pytest.raises(RuntimeError, match="for sm_1: "):
        nvrtc.compile_cubin("", arch="sm_1", name="k")
    with pytest.raises(RuntimeError, match=r"cuda_fp16\.h"):
        nvrtc.compile_cubin("#include <cuda_fp16.h>", arch="sm_90", name="k")
    assert not folder.exists()


def test_options_that_the_key_cannot_cover_are_refused(compilations: list[str]) -> None:
    with pytest.raises(ValueError, match=r"options must be among .*, got include_path"):
        compile_k(options={"include_path": "/tmp"})


def test_without_cuda_core_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc._import_libraries.cache_clear()
    for module in ("cuda", "cuda.core", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install turboquant-vllm\[cuda\]"):
        compile_k()


FROM_THREADS = """
from concurrent.futures import ThreadPoolExecutor
from turboquant_vllm.cuda.nvrtc import libraries

with ThreadPoolExecutor(8) as pool:
    first, *others = pool.map(lambda _: libraries(), range(8))
assert all(one is first for one in others)
"""


def test_threads_import_the_libraries_once() -> None:
    pytest.importorskip("cuda.core")
    run_alone(FROM_THREADS)


def test_importing_the_runtime_does_not_import_cuda_core() -> None:
    run_alone("import sys, turboquant_vllm.cuda.nvrtc; sys.exit('cuda.core' in sys.modules)")


def run_alone(code: str) -> None:
    """In a process of its own, which must exit with 0."""
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
        monkeypatch.setattr(nvrtc, "libraries", lambda versions=versions: SimpleNamespace(versions=versions))
        keys.append(compile_k().key)
    monkeypatch.setattr(nvrtc, "libraries", lambda: SimpleNamespace(versions=VERSIONS))
    monkeypatch.setattr(nvrtc, "FORMAT", nvrtc.FORMAT + 1)
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
    first = nvrtc.compile_cubin(SOURCE, arch="sm_90", name="k", name_expressions=["fill<7>"])
    forget(monkeypatch)
    monkeypatch.setattr(nvrtc, "_run_nvrtc", None)
    second = nvrtc.compile_cubin(SOURCE, arch="sm_90", name="k", name_expressions=["fill<7>"])
    assert second == first
    assert resource_usage(second) == resource_usage(first)


def test_a_compilation_of_the_same_source_has_log_and_names_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC has a cache of its own where there is a driver."""
    pytest.importorskip("cuda.core")
    first = nvrtc.compile_cubin(SOURCE, arch="sm_90", name="k", name_expressions=["fill<7>"])
    empty_caches(tmp_path / "other", monkeypatch)
    second = nvrtc.compile_cubin(SOURCE, arch="sm_90", name="k", name_expressions=["fill<7>"])
    assert second.kernels == first.kernels
    assert resource_usage(second) == resource_usage(first)


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
        pytest.param(flip(nvrtc.HEADER.size), id="first payload byte"),
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
        monkeypatch.setattr(nvrtc.tempfile, "mkstemp", no_permission)
    elif obstacle == "disk full":
        monkeypatch.setattr(nvrtc.os, "replace", no_permission)
    else:
        monkeypatch.delenv("TURBOQUANT_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(nvrtc.Path, "home", no_home)
    with caplog.at_level(logging.WARNING):
        results = [compile_k(), compile_k(source="other"), compile_k()]
    assert results[0] is results[2]
    assert len(compilations) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_where_the_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nvrtc.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("TURBOQUANT_CACHE_DIR", "")
    assert nvrtc.cache_dir() == tmp_path / "xdg" / "turboquant_vllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc.cache_dir() == tmp_path / ".cache" / "turboquant_vllm"


def race(barrier: Any, results: Any, rounds: int) -> None:
    """Compile the same keys as the other process, in step with it, each round after a fresh start."""
    nvrtc._run_nvrtc = fake_nvrtc
    nvrtc.libraries = lambda: SimpleNamespace(versions=VERSIONS)  # type: ignore[assignment]
    digests = []
    for number in range(rounds):
        nvrtc._compiled.clear()
        barrier.wait(timeout=60)
        digests.append(hashlib.sha256(compile_k(source=f"text {number // 2}").cubin).hexdigest())
    results.put(digests)


def test_threads_compile_side_by_side_and_one_source_once(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    record, both = nvrtc._run_nvrtc, threading.Barrier(2)

    def meet(*args: Any) -> Any:
        both.wait(timeout=60)
        return record(*args)

    monkeypatch.setattr(nvrtc, "_run_nvrtc", meet)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda source: compile_k(source=source), ("a", "b", "a", "b")))
    assert len(compilations) == 2
    assert found[:2] == found[2:]
    assert found[0] != found[1]


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
