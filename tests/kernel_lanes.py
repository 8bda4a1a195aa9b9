"""The native kernels' own source, built by a C++ compiler and run lane by lane, its PTX replaced by ``lane_emulation.h``."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from turboquant_vllm.cuda import decode, paged, store

COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++ to run the kernels' source on a CPU")

_FOLDER = tempfile.TemporaryDirectory(prefix="lanes-")  # of sources and libraries, until the process ends
_RUN_STORE = """
extern "C" int params_size() { return sizeof(StoreParams); }
extern "C" void run(const char* params, int columns, int rows) { run_grid(tq4_store, params, columns, rows, WARPS * 32); }
"""
_RUN_DECODE = """
extern "C" int size_of(int combine) { return combine ? sizeof(CombineParams) : sizeof(DecodeParams); }
extern "C" void tq4_decode_run(const char* p, int blocks, int threads) { run_grid(tq4_decode, p, blocks, 1, threads); }
extern "C" void tq4_combine_run(const char* p, int blocks, int threads) { run_grid(tq4_combine, p, blocks, 1, threads); }
#if PAGED
extern "C" void tq4_rotate_run(const char* p, int blocks, int threads) { run_grid(tq4_rotate, p, blocks, 1, threads); }
#endif
"""


@functools.cache
def build(text: str, run: str, macros: tuple[tuple[str, Any], ...], *options: str) -> ctypes.CDLL:
    """``text``, without its PTX, and the entry points of ``run`` as a library; built once a process."""
    text, replaced = re.subn(r"(?s)// ---- PTX\n.*?// ---- end of PTX\n", "", text)
    assert replaced == 1
    text = text.replace("extern __shared__ __align__(1024) char smem[];", "char* smem = dynamic_shared;")
    assert "asm" not in text
    defines = "".join(f"#define {name} {value}\n" for name, value in {"BF16": 0, **dict(macros)}.items())
    text = f'{defines}#include "{Path(__file__).with_name("lane_emulation.h")}"\n{text}{run}'
    stem = Path(_FOLDER.name, hashlib.sha256(text.encode()).hexdigest())
    source, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    source.write_text(text)
    # Contraction would hide where the source asks for a fused product.
    command = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w", *options]
    assert COMPILER is not None
    subprocess.run([COMPILER, *command, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def emulated_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native store launches its kernel in the emulator."""

    def kernel(index: int, *key: Any) -> tuple[ctypes.CDLL, int]:
        macros = tuple(store.defines(*key, 1).items())
        return build(store.SOURCE.read_text(), _RUN_STORE, macros, "-frounding-math"), 4

    def launch(library: Any, grid: Any, block: Any, shared: int, stream: None, arguments: Any) -> None:
        params = struct.pack(f"@{store.PARAMS}0q", *arguments)
        assert len(params) == library.params_size()
        library.run(params, *grid[:2])

    monkeypatch.setattr(store, "_kernel", kernel)
    monkeypatch.setattr(store, "launch", launch)


@pytest.fixture
def emulated_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native decoding, over dense caches and pages, launches its kernels in the emulator. Two warps, three blocks."""

    def kernel(name: str, params: str, defines: dict[str, int]) -> tuple[str, str, ctypes.CDLL]:
        return name, params, build(decode.source(), _RUN_DECODE, tuple(defines.items()))

    def launch(kernel: Any, grid: Any, block: Any, shared: int, stream: None, args: Any, **options: Any) -> None:
        name, params, library = kernel
        packed = struct.pack(f"@{params}0q", *args)
        assert len(packed) == library.size_of(name == "tq4_combine")
        getattr(library, f"{name}_run")(packed, grid[0], block[0])

    def variant(head_dim: int, rows: int, shared_limit: int, masked: bool = False) -> decode.Variant:
        row_tiles = next(n for n in (1, 2, 4, 8) if 4 * n >= rows)
        return decode.Variant(head_dim, row_tiles, 2, 2, 3, head_dim < 256 and row_tiles <= 2, masked)

    def kernels_of(params: dict[str, str], variant: decode.Variant, pages: int) -> Any:
        def codes(name: str) -> str:
            masks = decode.COMBINE_MASKS if name == "tq4_combine" else decode.DECODE_MASKS
            return params[name] + (masks if variant.masked else "")

        return tuple(kernel(name, codes(name), {**variant.defines, "PAGED": pages}) for name in params)

    def two(index: int, variant: decode.Variant) -> Any:
        return kernels_of({"tq4_decode": decode.DECODE_PARAMS, "tq4_combine": decode.COMBINE_PARAMS}, variant, 0)

    def three(index: int, variant: decode.Variant) -> Any:
        first = dict.fromkeys(("tq4_rotate", "tq4_decode"), paged.PAGED_PARAMS)
        return kernels_of({**first, "tq4_combine": paged.PAGED_COMBINE_PARAMS}, variant, 1)

    for module, kernels in ((decode, two), (paged, three)):
        module.Call.plan.cache_clear()
        monkeypatch.setattr(module, "_kernels", kernels)
        monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(module, "choose_variant", variant)
        monkeypatch.setattr(module, "device_limits", lambda index: (3, 232448))
