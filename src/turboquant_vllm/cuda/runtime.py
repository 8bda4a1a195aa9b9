"""Compile CUDA C++ at first use, keep the result, launch it.

:func:`compile_cubin` turns source text into machine code with NVRTC (no GPU, no driver, no host compiler),
:func:`load_kernel` puts one kernel of it on one device, :func:`launch` enqueues it on a stream. NVRTC and the driver
are reached through NVIDIA's ``cuda.core``, which is imported when a function first needs it.

Machine code is kept in memory and on disk. A disk entry is ``magic | key | payload length | SHA-256 of the payload |
payload``; one that does not match in every field is compiled again and replaced. Entries are never evicted; the folder
can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import json
import logging
import os
import re
import struct
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from turboquant_vllm.cuda.usage import ResourceUsage, resource_usage

__all__ = [
    "Compiled",
    "Kernel",
    "ResourceUsage",
    "aligned",
    "cache_dir",
    "compile_cubin",
    "launch",
    "load_kernel",
    "resource_usage",
]

logger = logging.getLogger(__name__)

FORMAT = 1  # of the payload; part of the key
MAGIC = b"TQCUBIN\n"
HEADER = struct.Struct("<8s32sQ32s")  # magic, key, payload length, SHA-256 of the payload

# Options that read further files are left out: the key would not cover what they read.
OPTIONS = frozenset({"fma", "ftz", "lineinfo", "max_register_count", "ptxas_options", "std", "use_fast_math"})
OptionValue = bool | int | str | Sequence[str]

_compiled: dict[str, Compiled] = {}
_kernels: dict[tuple[Any, ...], Kernel] = {}
_warned: set[Path | None] = set()
_lock = threading.RLock()


@dataclass(frozen=True)
class Compiled:
    """Machine code (``cubin``, an ELF image) of one source for ``arch``; ``kernels``, entry points by the name or name
    expression that asks for them; the ``log`` of NVRTC and ptxas; the cache ``key`` (hex)."""

    cubin: bytes
    kernels: Mapping[str, str]
    log: str
    arch: str
    key: str


@functools.cache
def _cuda() -> SimpleNamespace:
    """``cuda.core``, the driver bindings and their versions, or an ImportError that says what to install."""
    try:
        from cuda import core
        from cuda.bindings import driver, nvrtc

        _, major, minor = nvrtc.nvrtcVersion()  # loads the NVRTC library
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"the native CUDA kernels need cuda-core and NVRTC, which did not load ({error}); "
            "install them with: pip install turboquant-vllm[cuda]"
        ) from error
    return SimpleNamespace(core=core, driver=driver, versions=(f"nvrtc {major}.{minor}", f"core {core.__version__}"))


def compile_cubin(
    source: str,
    *,
    arch: str,
    name: str,
    defines: Mapping[str, int | str] | None = None,
    options: Mapping[str, OptionValue] | None = None,
    name_expressions: Sequence[str] = (),
) -> Compiled:
    """Machine code for ``source``, from the cache or compiled now; needs no GPU and no driver.

    ``source``: CUDA C++ text without ``#include`` (NVRTC searches no folder). ``arch``: a real architecture such as
    ``"sm_90"``. ``name`` labels diagnostics only. ``defines``: preprocessor macros. ``options``: fields of
    ``cuda.core.ProgramOptions`` named in ``OPTIONS``. ``name_expressions``: templates to instantiate ("decode<128>").

    Raises ValueError for another option, ImportError without cuda-core, and RuntimeError with the compile log if the
    source does not compile.
    """
    macros = {macro: str(int(value) if isinstance(value, bool) else value) for macro, value in (defines or {}).items()}
    settings: dict[str, Any] = dict(options or {})
    if unknown := sorted(settings.keys() - OPTIONS):
        raise ValueError(f"options must be among {', '.join(sorted(OPTIONS))}, got {', '.join(unknown)}")
    ingredients = [FORMAT, *_cuda().versions, arch, source, sorted(macros.items()), sorted(settings.items())]
    key = hashlib.sha256(json.dumps([ingredients, sorted(name_expressions)], default=list).encode()).hexdigest()
    with _lock:
        entry = _compiled.get(key) or _read_entry(cache_dir(), key)
        if entry is None:
            cubin, log, lowered = _run_nvrtc(source, arch, name, macros, settings, tuple(name_expressions))
            kernels = {symbol: symbol for symbol in re.findall(r"Compiling entry function '([^']+)'", log)}
            entry = Compiled(cubin, kernels | lowered, log, arch, key)
            _write_entry(cache_dir(), entry)
        _compiled[key] = entry
    return entry


def _run_nvrtc(
    source: str, arch: str, name: str, macros: dict[str, str], settings: dict[str, Any], expressions: tuple[str, ...]
) -> tuple[bytes, str, dict[str, str]]:
    """(cubin, log, entry point of each expression). The one place that compiles."""
    core = _cuda().core
    ptxas = settings.get("ptxas_options", ())
    ptxas = ["-v", *([ptxas] if isinstance(ptxas, str) else ptxas)]  # -v reports resource usage in the log
    # What NVRTC keeps itself comes without a log, and so without names.
    settings = {**settings, "name": os.path.basename(name), "arch": arch, "ptxas_options": ptxas, "no_cache": True}
    macro_list = sorted(macros.items()) or None
    log = io.StringIO()
    try:
        # The key covers the source text only, hence no_source_include.
        options = core.ProgramOptions(define_macro=macro_list, no_source_include=True, **settings)
        code = core.Program(source, "c++", options).compile("cubin", name_expressions=expressions, logs=log)
    except Exception as error:
        message = f"{error}\n{log.getvalue()}".replace("\0", "").strip()
        raise RuntimeError(f"NVRTC could not compile {name} for {arch}: {message}") from error
    lowered = {expression: symbol.decode() for expression, symbol in code.symbol_mapping.items()}
    return bytes(code.code), log.getvalue().replace("\0", "").strip(), lowered


def cache_dir() -> Path | None:
    """``$TURBOQUANT_CACHE_DIR``, else ``$XDG_CACHE_HOME/turboquant_vllm``, else ``~/.cache/turboquant_vllm``; None if
    there is no home directory either, and nothing is kept on disk."""
    if own := os.environ.get("TURBOQUANT_CACHE_DIR"):
        return Path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "turboquant_vllm"
    try:
        return Path.home() / ".cache" / "turboquant_vllm"
    except RuntimeError:
        return None


def _read_entry(folder: Path | None, key: str) -> Compiled | None:
    """The entry of ``key`` if it is there and whole, else None."""
    if folder is None:
        return None
    try:
        with (folder / f"{key}.bin").open("rb") as file:
            magic, stored_key, length, digest = HEADER.unpack(file.read(HEADER.size))
            size = os.fstat(file.fileno()).st_size
            if magic != MAGIC or stored_key.hex() != key or length != size - HEADER.size:
                return None
            payload = file.read(length)
        if hashlib.sha256(payload).digest() != digest:
            return None
        meta, _, cubin = payload.partition(b"\n")
        fields = json.loads(meta)
        return Compiled(cubin, fields["kernels"], fields["log"], fields["arch"], key)
    except (OSError, struct.error, ValueError, KeyError, TypeError):
        return None


def _write_entry(folder: Path | None, entry: Compiled) -> None:
    """Save ``entry`` in one atomic step. Failure is no more than a warning: the code is in memory."""
    meta = {"kernels": dict(entry.kernels), "log": entry.log, "arch": entry.arch}
    payload = json.dumps(meta).encode() + b"\n" + entry.cubin
    header = HEADER.pack(MAGIC, bytes.fromhex(entry.key), len(payload), hashlib.sha256(payload).digest())
    temporary = ""
    try:
        if folder is None:
            raise FileNotFoundError("no home directory")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=".tmp")  # created with mode 0600
        with os.fdopen(handle, "wb") as file:
            file.write(header + payload)
        os.replace(temporary, folder / f"{entry.key}.bin")
    except OSError as error:
        if folder not in _warned:
            logger.warning("compiled kernels are not kept in %s (%s); each process compiles them again", folder, error)
        _warned.add(folder)
        with contextlib.suppress(OSError):
            os.unlink(temporary)


class Kernel:
    """One entry point on one device, with its argument buffer; :func:`load_kernel` makes it, :func:`launch` runs it.

    ``name``; ``device``, the index; ``params``, one ``struct`` code per argument; ``core``, the ``cuda.core.Kernel``.
    """

    def __init__(self, core: Any, *, name: str, device: int, params: str) -> None:
        self.core, self.name, self.device, self.params = core, name, device, params
        self._driver = _cuda().driver
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
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(index))
    compiled = compile_cubin(text, arch=arch, name=label, defines=defines, options=options, name_expressions=expressions)
    core = _cuda().core
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
                _cuda().core.Device(kernel.device).set_current()  # a fresh thread has no current context yet
                (status,) = kernel._driver.cuLaunchKernelEx(config, kernel._function, kernel._arguments, 0)
            kernel._check(f"launch (grid {grid}, block {block}, {shared_bytes} bytes of shared memory)", status)
