"""Compile CUDA C++ at first use, and keep the result.

:func:`compile_cubin` turns source text into machine code with NVRTC (no GPU, no driver, no host compiler), which is reached
through NVIDIA's ``cuda.core``, imported when a function first needs it.

Machine code is kept in memory and on disk. A disk entry is ``magic | key | payload length | SHA-256 of the payload |
payload``; one that does not match in every field is compiled again and replaced. Entries are never evicted; the folder
can be deleted at any time.
"""

from __future__ import annotations

import contextlib
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

__all__ = ["Compiled", "OptionValue", "cache_dir", "compile_cubin", "libraries"]

logger = logging.getLogger(__name__)

FORMAT = 1  # of the payload; part of the key
MAGIC = b"TQCUBIN\n"
HEADER = struct.Struct("<8s32sQ32s")  # magic, key, payload length, SHA-256 of the payload

# Options that read further files are left out: the key would not cover what they read.
OPTIONS = frozenset({"fma", "ftz", "lineinfo", "max_register_count", "ptxas_options", "std", "use_fast_math"})
OptionValue = bool | int | str | Sequence[str]

_compiled: dict[str, Compiled] = {}
_locks: dict[str, threading.Lock] = {}  # of what is being compiled
_warned: set[Path | None] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Compiled:
    """Machine code (``cubin``, an ELF image) of one source for ``arch``; ``kernels``, entry points by the name or name
    expression that asks for them; the ``log`` of NVRTC and ptxas; the cache ``key`` (hex)."""

    cubin: bytes
    kernels: Mapping[str, str]
    log: str
    arch: str
    key: str


def libraries() -> SimpleNamespace:
    """``cuda.core``, the driver bindings and their versions, or an ImportError that says what to install."""
    with _lock:  # a thread that imports cuda.core while another does may find half of it
        return _import_libraries()


@functools.cache
def _import_libraries() -> SimpleNamespace:
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
    ingredients = [FORMAT, *libraries().versions, arch, source, sorted(macros.items()), sorted(settings.items())]
    key = hashlib.sha256(json.dumps([ingredients, sorted(name_expressions)], default=list).encode()).hexdigest()
    with _lock:
        own = _locks.setdefault(key, threading.Lock())
    with own:  # other threads may compile other kernels meanwhile
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
    core = libraries().core
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
