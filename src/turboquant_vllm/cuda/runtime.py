"""Load compiled CUDA C++ on a device, and launch it.

:func:`load_kernel` puts one kernel of a source, which :mod:`turboquant_vllm.cuda.nvrtc` compiles, on one device,
:func:`launch` enqueues it on a stream. The driver is reached through NVIDIA's ``cuda.core``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.cuda.nvrtc import OptionValue, compile_cubin, libraries

__all__ = ["Kernel", "aligned", "compile_for", "launch", "load_kernel"]

_kernels: dict[tuple[Any, ...], Kernel] = {}
_lock = threading.RLock()


class Kernel:
    """One entry point on one device, with its argument buffer; :func:`load_kernel` makes it, :func:`launch` runs it.

    ``name``; ``device``, the index; ``params``, one ``struct`` code per argument; ``core``, the ``cuda.core.Kernel``.
    """

    def __init__(self, core: Any, *, name: str, device: int, params: str) -> None:
        self.core, self.name, self.device, self.params = core, name, device, params
        self._driver = libraries().driver
        self._capability = torch.cuda.get_device_capability(device)
        self._lock = threading.Lock()  # buffer and configurations are shared by all threads
        self._configs: dict[tuple[bool, tuple[int, int, int] | None], Any] = {}
        # Native alignment is CUDA's, so one buffer serves separate parameters and a single struct of them alike.
        offsets = _check_params(name, params, core)
        self._pack = struct.Struct(f"@{params}").pack_into
        self._buffer = ctypes.create_string_buffer(struct.calcsize(f"@{params}0q"))
        base = ctypes.addressof(self._buffer)
        self._pointers = (ctypes.c_void_p * len(params))(*[base + offset for offset in offsets])
        self._arguments = ctypes.addressof(self._pointers)
        (self._function,) = self._check("loading", *self._driver.cuKernelGetFunction(core.handle))
        self._limit_id = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        limit = self._driver.cuFuncGetAttribute(self._limit_id, self._function)
        (self._shared_limit,) = self._check("reading the shared memory limit", *limit)

    def blocks_per_multiprocessor(self, threads: int, shared_bytes: int) -> int:
        """How many blocks of ``threads`` threads and ``shared_bytes`` dynamic shared memory fit one multiprocessor."""
        self._raise_shared_limit(shared_bytes)
        result = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self._function, threads, shared_bytes)
        return int(self._check("reading the occupancy", *result)[0])

    def clusters_at_once(self, threads: int, shared_bytes: int, blocks: int) -> int:
        """How many clusters of ``blocks`` such blocks the device runs at once; 0 where it has none of that size."""
        if self._capability < (9, 0):
            return 0
        self._raise_shared_limit(shared_bytes)
        config = self._make_config(False, (blocks, 1, 1))
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, 0
        result = self._driver.cuOccupancyMaxActiveClusters(self._function, config)
        return int(self._check(f"reading how many clusters of {blocks} blocks fit", *result)[0])

    def _check(self, what: str, status: Any, *values: Any) -> tuple[Any, ...]:
        if status:
            raise RuntimeError(f"{what} failed for {self.name} on cuda:{self.device}: {status.name}")
        return values

    def _raise_shared_limit(self, shared_bytes: int) -> None:
        if shared_bytes > self._shared_limit:
            result = self._driver.cuFuncSetAttribute(self._function, self._limit_id, shared_bytes)
            self._check(f"asking for {shared_bytes} bytes of dynamic shared memory", *result)
            self._shared_limit = shared_bytes

    def _make_config(self, pdl: bool, cluster: tuple[int, int, int] | None) -> Any:
        if cluster is not None and self._capability < (9, 0):
            raise ValueError(f"cluster needs compute capability 9.0, cuda:{self.device} has {self._capability}")
        attributes = []
        if cluster is not None:
            attributes.append(self._driver.CUlaunchAttribute())
            attributes[-1].id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attributes[-1].value.clusterDim
            size.x, size.y, size.z = cluster
        if pdl and self._capability >= (9, 0):
            attributes.append(self._driver.CUlaunchAttribute())
            ids = self._driver.CUlaunchAttributeID
            attributes[-1].id = ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attributes[-1].value.programmaticStreamSerializationAllowed = 1
        config = self._configs[pdl, cluster] = self._driver.CUlaunchConfig()
        config.attrs, config.numAttrs = attributes, len(attributes)
        return config


def _check_params(name: str, params: str, core: Any) -> list[int]:
    """Byte offset of each argument; ValueError unless the compiled kernel takes just these, if the driver can tell."""
    if wrong := set(params) - set("PqQiIfd"):
        raise ValueError(f"params of {name} may hold the codes P q Q i I f d, got {''.join(sorted(wrong))!r}")
    layout = [(struct.calcsize(f"@{params[:i]}0{code}"), struct.calcsize(code)) for i, code in enumerate(params)]
    align = max((size for _, size in layout), default=1)
    as_struct = [(0, -(-struct.calcsize(f"@{params}") // align) * align)]
    with contextlib.suppress(NotImplementedError):
        actual = [(int(info.offset), int(info.size)) for info in core.arguments_info]
        if actual not in (layout, as_struct):
            raise ValueError(f"params {params!r} of {name} are (offset, size) {layout}, the kernel takes {actual}")
    return [offset for offset, _ in layout]


def compile_for(device: int, name: str, wanted: Sequence[tuple[str, Mapping[str, int | str]]]) -> None:
    """Compile sources with their macros for CUDA device ``device``, so that :func:`load_kernel` finds them.

    ``name`` labels errors. As many are compiled at a time as there are cores: NVRTC keeps no other thread waiting. Nothing is
    loaded, which a graph's capture may forbid to other threads.
    """
    arch = _arch_of(device)
    with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(compile_cubin, text, arch=arch, name=name, defines=defines) for text, defines in wanted]
    for job in jobs:
        job.result()


def _arch_of(device: int) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def load_kernel(
    source: Path | str,
    name: str,
    *,
    device: torch.device | int,
    params: str,
    defines: Mapping[str, int | str] | None = None,
    options: Mapping[str, OptionValue] | None = None,
) -> Kernel:
    """The kernel ``name`` compiled for ``device`` and loaded in its primary context, which is PyTorch's.

    ``source``: a file, read once per process, or the text itself. ``name``: an ``extern "C"`` function or a template
    instantiation. ``params``: one code per argument in order, P pointer, q int64, i int32, f float32 (Q, I, d: uint64,
    uint32, float64); a kernel that takes a single struct of these members has the same params. A repeated call costs
    about two microseconds. Load before capturing a CUDA graph.

    Raises ValueError for params that do not fit the compiled kernel or a device that is not CUDA, RuntimeError if
    compiling or loading fails, ImportError without cuda-core.
    """
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda" or torch.version.hip:
        raise ValueError(f"device must be an NVIDIA GPU, got {device}{' (ROCm)' if torch.version.hip else ''}")
    index = torch.cuda.current_device() if device.index is None else device.index
    settings = tuple((key, str(value)) for key, value in sorted((options or {}).items()))
    memo = (source, name, index, params, frozenset((defines or {}).items()), settings)
    if (found := _kernels.get(memo)) is not None:
        return found
    text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    label = f"{source.name}:{name}" if isinstance(source, Path) else name
    expressions = () if name.isidentifier() else (name,)
    compiled = compile_cubin(
        text, arch=_arch_of(index), name=label, defines=defines, options=options, name_expressions=expressions
    )
    core = libraries().core
    with _lock, torch.cuda.device(index):
        if memo not in _kernels:
            core.Device(index).set_current()  # the context may exist without being current in this thread
            try:
                handle = core.ObjectCode.from_cubin(compiled.cubin).get_kernel(compiled.kernels.get(name, name))
            except Exception as error:
                known = ", ".join(compiled.kernels)
                raise RuntimeError(f"could not load {label} on cuda:{index} (source has {known}): {error}") from error
            _kernels[memo] = Kernel(handle, name=label, device=index, params=params)
        return _kernels[memo]


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x`` if it begins on a 16-byte boundary, else a contiguous copy, which does."""
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % 16 else x


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    stream: int | None,
    args: Sequence[int | float],
    *,
    pdl: bool = False,
    cluster: tuple[int, int, int] | None = None,
) -> None:
    """Enqueue ``kernel`` and return at once; never synchronises, and a CUDA graph can capture it.

    ``grid``: blocks, ``block``: threads, ``shared_bytes``: dynamic shared memory per block, ``stream``: a raw handle,
    None for PyTorch's current stream of the kernel's device. ``args``: numbers in the order of ``kernel.params``, a
    tensor as ``tensor.data_ptr()``; as in PyTorch, a tensor used on a second stream needs ``record_stream``.
    ``pdl``: may start before the previous kernel of the stream has ended, so the kernel must execute
    ``griddepcontrol.wait`` before it touches memory that kernel uses; ignored below compute capability 9.0.
    ``cluster``: blocks per cluster, of which ``grid`` is a multiple; compute capability 9.0.

    Raises TypeError for args that do not fit params, RuntimeError if the driver refuses the launch.
    """
    if torch.cuda.current_device() != kernel.device:
        with torch.cuda.device(kernel.device):
            return launch(kernel, grid, block, shared_bytes, stream, args, pdl=pdl, cluster=cluster)
    if stream is None:
        stream = _raw_stream(kernel.device)
    with kernel._lock:
        kernel._raise_shared_limit(shared_bytes)
        config = kernel._configs.get((pdl, cluster)) or kernel._make_config(pdl, cluster)
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes, config.hStream = shared_bytes, stream
        try:
            kernel._pack(kernel._buffer, 0, *args)
        except (struct.error, OverflowError) as error:
            raise TypeError(f"{kernel.name} takes {kernel.params!r}, got {len(args)} arguments: {error}") from error
        (status,) = kernel._driver.cuLaunchKernelEx(config, kernel._function, kernel._arguments, 0)
        if status:
            if status == kernel._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
                libraries().core.Device(kernel.device).set_current()  # a fresh thread has no current context yet
                (status,) = kernel._driver.cuLaunchKernelEx(config, kernel._function, kernel._arguments, 0)
            kernel._check(f"launch (grid {grid}, block {block}, {shared_bytes} bytes of shared memory)", status)
