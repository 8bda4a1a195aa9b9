"""The native kernels' own source, built by a C++ compiler and run lane by lane on a CPU, its PTX replaced by
``lane_emulation.h``; what a GPU would not forgive raises :class:`LaneError`."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import hashlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from paged_cases import Batch
from turboquant_vllm.cuda import cluster, decode, paged, sources, store, variants

SHARED_LIMIT = 232448  # bytes of a block, as on Hopper
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ on Linux to run the kernels' source on a CPU")

_FOLDER = tempfile.TemporaryDirectory(prefix="lanes-")  # of sources and libraries, until the process ends
# Contraction would hide where a source asks for a fused product; fortified, setjmp serves no stacks of one's own; shared memory
# of an inline function would be that of all libraries.
_OPTIONS = ("-std=c++20", "-ffp-contract=off", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fno-gnu-unique")
# Calls for each access to memory and for undefined behaviour, which the runtime answers: nothing of g++'s own is linked.
# Optimizing would take longer than it saves.
_SILENT = "vptr,return,unreachable,nonnull-attribute,builtin"
_WATCHED = ("-O0", "-g1", "-fsanitize=thread", "-fsanitize=undefined", f"-fno-sanitize={_SILENT}")


class LaneError(AssertionError):
    """A lane did what a GPU would not forgive; says what, in which block and thread, and on which line."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        *(
            (name, ctypes.c_int)
            for name in ("columns", "rows", "cluster", "threads", "team", "shared_bytes", "before_previous_ends", "ranges")
        ),
        ("memory", ctypes.c_void_p),
    )


class _Failure(ctypes.Structure):
    _fields_ = (("what", ctypes.c_char_p), ("where", ctypes.c_void_p))


def _compile(*arguments: Any) -> None:
    assert COMPILER is not None
    subprocess.run([COMPILER, *_OPTIONS, *arguments], check=True)


@functools.cache
def _runtime() -> Path:
    library = Path(_FOLDER.name, "runtime.so")
    _compile("-O2", "-frounding-math", "-shared", "-o", library, Path(__file__).with_name("lane_runtime.cpp"))
    return library


class Library:
    """The kernels of a source, by name: parameter structs as the sources have them. ``team``: threads of a block that have
    barriers of their own; 0: all."""

    def __init__(self, path: Path, kernels: Sequence[str], team: int) -> None:
        self._path, self._library, self._team = path, ctypes.CDLL(str(path)), team
        for name in kernels:
            getattr(self._library, f"{name}_run").restype = ctypes.POINTER(_Failure)

    def launch(
        self,
        name: str,
        params: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        pdl: bool,
        args: Sequence[Any],
        *,
        blocks: int = 1,
    ) -> None:
        """Run a grid. ``params``: of :func:`turboquant_vllm.cuda.runtime.launch`'s kernel, whose other arguments these are;
        ``blocks``: of a cluster."""
        packed = struct.pack(f"@{params}0q", *args)
        assert len(packed) == getattr(self._library, f"{name}_params")(), "params do not fill the kernel's struct"
        assert all(1 <= blocks < limit for blocks, limit in zip(grid, (2**31, 2**16, 2**16), strict=True)), grid
        assert grid[2] == 1
        assert threads in range(32, 1025, 32)
        assert grid[0] % blocks == 0, (grid, blocks)
        assert 0 <= shared_bytes <= SHARED_LIMIT
        ranges = live_memory()
        memory = (ctypes.c_uint64 * (2 * len(ranges)))(*(edge for both in ranges for edge in both))
        sizes = (grid[0], grid[1], blocks, threads, self._team or threads, shared_bytes, pdl, len(ranges))
        call = _Launch(name.encode(), *sizes, ctypes.cast(memory, ctypes.c_void_p))
        failure = getattr(self._library, f"{name}_run")(packed, ctypes.byref(call)).contents
        if failure.what:
            raise LaneError(failure.what.decode() + self._line(failure.where))

    def _line(self, where: int | None) -> str:
        """The lines of the source that the code at ``where`` comes from, the innermost first."""
        if where is None or shutil.which("addr2line") is None:
            return ""
        maps = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
        begin = min(int(fields[0].split("-")[0], 16) for fields in maps if fields[-1] == str(self._path))
        command = ["addr2line", "-i", "-e", self._path, hex(where - begin - 1)]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
        found = [re.sub(r" \(discriminator.*", "", Path(line).name) for line in lines if line and "lane_emulation" not in line]
        return ", " + " in ".join(found)


_older: list[weakref.ref[torch.Tensor]] = []


def _tensors() -> list[torch.Tensor]:
    kind = torch.Tensor
    return [x for x in gc.get_objects() if type(x) is kind and x.device.type == "cpu" and x.layout is torch.strided]


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Inside, Python's list of objects holds those made since, so that a launch looks through no more than it must."""
    _older[:] = map(weakref.ref, _tensors())
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _older.clear()


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """As :func:`settled`, for the tests of a module."""
    with settled():
        yield


def live_memory() -> list[tuple[int, int]]:
    """Begins and ends of all tensors that somebody holds, in order: what else a kernel touches is an error."""
    found: dict[int, int] = {}
    for x in (*_tensors(), *(x for reference in _older if (x := reference()) is not None)):
        storage = x.untyped_storage()
        found[storage.data_ptr()] = max(found.get(storage.data_ptr(), 0), storage.data_ptr() + storage.nbytes())
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(found.items()):
        if merged and begin < merged[-1][1]:
            begin, end = merged[-1][0], max(end, merged.pop()[1])
        merged.append((begin, end))
    return merged


@functools.cache
def build(text: str, kernels: tuple[tuple[str, str], ...], macros: tuple[tuple[str, Any], ...]) -> Library:
    """``text``, without its PTX, as a library of ``kernels``: names and parameter structs. Built once a process."""
    text, replaced = re.subn(r"(?s)// ---- PTX\n.*?// ---- end of PTX\n", lambda cut: "\n" * cut[0].count("\n"), text)
    assert replaced
    assert "// ---- PTX" not in text
    text = text.replace("extern __shared__ __align__(1024) char smem[];", "char* smem = dynamic_shared();")
    assert "asm" not in text
    defines = "".join(f"#define {name} {value}\n" for name, value in {"BF16": 0, **dict(macros)}.items())
    entries = "".join(
        f'extern "C" int {name}_params() {{ return sizeof({params}); }}\n'
        f'extern "C" const Failure* {name}_run(const char* params, const Launch* launch) {{\n'
        f"  return run_kernel<{params}, {name}>(params, launch);\n}}\n"
        for name, params in kernels
    )
    text = f'{defines}#include "{Path(__file__).with_name("lane_emulation.h")}"\n{text}\n{entries}'
    stem = Path(_FOLDER.name, hashlib.sha256(text.encode()).hexdigest())
    source, code, library = (stem.with_suffix(suffix) for suffix in (".cpp", ".o", ".so"))
    source.write_text(text)
    _compile(*_WATCHED, "-c", "-o", code, source)
    _compile("-shared", "-o", library, code, _runtime())
    sizes = dict(macros)
    team = store.THREADS if "TEAM_BYTES" in sizes else 32 * sizes["WARPS"] // sizes["PASSES"] if sizes.get("CLUSTER") else 0
    return Library(library, [name for name, _ in kernels], team)


def store_source() -> str:
    """The text of the store."""
    return sources.store_source()


def decode_source(clusters: bool = False, stores: bool = False) -> str:
    """The text of the kernels of a decode."""
    return sources.source(clusters, stores)


def build_store(*key: Any) -> Library:
    """The store for the arguments of :func:`turboquant_vllm.cuda.store.defines` but the last."""
    return build(store_source(), (("tq4_store", "StoreParams"),), tuple(store.defines(*key, 1).items()))


def store_kernels(at_once: int = 4, teams: int = 3) -> Callable[..., store.Kernels]:
    """What stands for ``turboquant_vllm.cuda.store._kernels``."""

    def kernels(index: int, *key: Any) -> store.Kernels:
        alone, packed = (cast(Any, functools.partial(build_store, *key, of_block)) for of_block in (1, teams))
        return store.Kernels(alone, at_once, packed, teams)

    return kernels


def build_decode(variant: variants.Variant, pages: int) -> Library:
    """The kernels of a native decode."""
    kernels = (("tq4_decode", "DecodeParams"), ("tq4_combine", "CombineParams"), ("tq4_rotate", "DecodeParams"))
    some = kernels[: 1 if variant.cluster else 2 + pages]
    text = decode_source(variant.cluster, variant.stores is not None)
    return build(text, some, tuple({**variant.defines, "PAGED": pages}.items()))


@pytest.fixture
def emulated_store(monkeypatch: pytest.MonkeyPatch, few_objects: None) -> None:
    """The native store launches its kernel in the emulator."""
    emulate_store(monkeypatch)


def emulate_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch the native store in the emulator."""

    def launch(library: Callable[[], Library], grid: Any, block: Any, shared: int, stream: None, arguments: Any) -> None:
        library().launch("tq4_store", sources.STORE_PARAMS, grid, block[0], shared, False, arguments)

    monkeypatch.setattr(store, "_kernels", store_kernels())
    monkeypatch.setattr(store, "launch", launch)


@pytest.fixture
def emulated_decode(monkeypatch: pytest.MonkeyPatch, few_objects: None) -> None:
    """Native decoding, over dense caches and pages, launches its kernels in the emulator. Two warps, three blocks."""

    emulate_decode(monkeypatch)
    for module in (decode, paged, cluster):
        monkeypatch.setattr(module, "choose_variant", small_variant)


def small_variant(
    head_dim: int,
    rows: int,
    shared_limit: int,
    masked: bool = False,
    offsets: bool = False,
    hadamard: bool = False,
    cluster: bool = False,
) -> variants.Variant:
    """The variant for ``rows`` rows per key/value head, but with two warps."""
    row_tiles = next(n for n in (1, 2, 4, 8) if 4 * n >= rows)
    stages = 3 if offsets and head_dim < 256 else 2
    sizes = (head_dim, row_tiles, 2, stages, 1 if cluster else 3, head_dim < 256 and row_tiles <= 2)
    return variants.Variant(*sizes, masked, offsets, cluster, hadamard)


def emulate_decode(monkeypatch: pytest.MonkeyPatch, shared_limit: int = SHARED_LIMIT) -> None:
    """Launch native decoding in the emulator, as on a GPU of three multiprocessors, ``shared_limit`` bytes for a block."""

    def launch(
        kernel: Any, grid: Any, block: Any, shared: int, stream: None, args: Any, *, pdl: bool = False, cluster: Any = None
    ) -> None:
        name, params, library = kernel
        library.launch(name, params, grid, block[0], shared, pdl, args, blocks=cluster[0] if cluster else 1)

    def kernels_of(variant: variants.Variant, pages: int) -> Any:
        params = sources.params_of(variant, bool(pages))
        return tuple((name, codes, build_decode(variant, pages)) for name, codes in params.items())

    kernels: dict[Any, Any] = {
        decode: ("_kernels", lambda index, variant: kernels_of(variant, 0)),
        paged: ("_kernels", lambda index, variant: kernels_of(variant, 1)),
        cluster: ("_kernel", lambda index, variant, pages: kernels_of(variant, int(pages))[0]),
    }
    for module, replaced in kernels.items():
        monkeypatch.setattr(module, *replaced)
        monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(module, "device_limits", lambda index: (3, shared_limit))
    for plan in (decode.Call.plan, paged.Call.plan, cluster.plan):
        plan.cache_clear()
    monkeypatch.setattr(cluster, "_load_all", lambda *args: None)  # building takes longer than there is to run
    monkeypatch.setattr(cluster, "has_clusters", lambda index: shared_limit == SHARED_LIMIT)
    monkeypatch.setattr(cluster, "_counters", {-1: cluster.Counters(torch.zeros(1024, dtype=torch.int32))})
    monkeypatch.setattr(cluster, "_fit", lambda index, variant, pages, blocks: 4 // blocks)


def names_of_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of each kernel as it runs in the emulator."""
    found: list[str] = []
    launch = Library.launch

    def counted(library: Library, name: str, *args: Any, **options: Any) -> None:
        found.append(name)
        launch(library, name, *args, **options)

    monkeypatch.setattr(Library, "launch", counted)
    return found


def run_pages(
    batch: Batch, longest: int | None = None, out: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Native decoding of ``batch``; unserved rows stay NaN. ``longest``: query tokens of a sequence that is served."""
    out = torch.empty_like(batch.q) if out is None else out
    out.fill_(float("nan"))
    lse = torch.full(batch.q.shape[:2], float("nan"))
    longest = int(batch.cu_seqlens_q.diff().max()) if longest is None else longest
    q, cache, sequences, *how = batch.arguments
    sequences = sequences._replace(max_query_len=longest, max_seq_len=int(batch.seq_lens.max()))
    paged.decode_pages(q, cache, sequences, *how, out, lse, **options)
    return out, lse
