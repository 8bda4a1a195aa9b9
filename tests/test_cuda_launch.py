"""Launching through the NVRTC runtime: arguments with the driver replaced, and real launches on a GPU."""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cuda_sources import PARAMS, SOURCE, VERSIONS, empty_caches
from turboquant_vllm.cuda import runtime


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty disk cache."""
    return empty_caches(tmp_path, monkeypatch)


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

    def cuOccupancyMaxActiveClusters(self, function: int, config: Any) -> tuple[Any, int]:  # noqa: N802
        (cluster,) = config.attrs
        assert cluster.id == self.real.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        assert (config.gridDimX, config.blockDimX, config.sharedMemBytes) == (cluster.value.clusterDim.x, 256, 100_000)
        return self.real.CUresult(0), 132 // cluster.value.clusterDim.x

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
    fake = FakeDriver(runtime.libraries().driver)
    core = SimpleNamespace(Device=lambda index: SimpleNamespace(set_current=lambda: fake.contexts.append(index)))
    monkeypatch.setattr(runtime, "libraries", lambda: SimpleNamespace(core=core, driver=fake, versions=VERSIONS))
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


def test_clusters_at_once(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [fake_kernel(SEPARATE).clusters_at_once(256, 100_000, blocks) for blocks in (1, 4, 8)] == [132, 33, 16]
    assert driver.limits == [100_000] * 3
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fake_kernel(SEPARATE).clusters_at_once(256, 100_000, 1) == 0


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
    # PyTorch's own stream for captures is of the device that the process captured on first.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
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
