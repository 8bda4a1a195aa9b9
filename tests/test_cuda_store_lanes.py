"""The native store's source, run lane by lane on a CPU: codes and norms in their slots, every other byte untouched.

A C++ compiler builds the kernel's own text, its few PTX instructions replaced by ``lane_emulation.h``.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from store_cases import StoreCase, check_store, random_store
from turboquant_vllm.cuda import store

COMPILER = shutil.which("g++")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs g++ to run the kernel's source on a CPU")]

HALF, BF16 = torch.float16, torch.bfloat16
RUN = """
extern "C" int params_size() { return sizeof(StoreParams); }
extern "C" void run(const char* params, int columns, int rows) { run_grid(tq4_store, params, columns, rows, WARPS * 32); }
"""


def build(folder: Path, macros: dict[str, int | str]) -> ctypes.CDLL:
    text, replaced = re.subn(r"(?s)// ---- PTX\n.*// ---- end of PTX\n", "", store.SOURCE.read_text())
    assert replaced == 1
    assert "asm" not in text
    defines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    header = Path(__file__).with_name("lane_emulation.h")
    source, library = folder / "store.cpp", folder / "store.so"
    source.write_text(f'{defines}#include "{header}"\n{text}{RUN}')
    # Contraction would hide where the source asks for a fused product.
    options = ["-std=c++20", "-O1", "-frounding-math", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w"]
    assert COMPILER is not None
    subprocess.run([COMPILER, *options, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "scale", "layout", "slot_dtype"),
    [
        (64, BF16, "unbiased", "contiguous", torch.int64),
        (128, HALF, "norm", "sliced", torch.int64),
        (128, BF16, "least_squares", "transposed", torch.int32),
        (256, BF16, "norm", "contiguous", torch.int32),
        (256, HALF, "unbiased", "contiguous", torch.int64),
    ],
)
def test_every_byte(generator, tmp_path, monkeypatch, head_dim, dtype, scale, layout, slot_dtype):
    library = build(tmp_path, store.defines(head_dim, dtype, slot_dtype, scale, 1))

    def launch(kernel, grid, block, shared_bytes, stream, arguments):
        params = struct.pack(f"@{store.PARAMS}0q", *arguments)
        assert len(params) == library.params_size()
        library.run(params, *grid[:2])

    monkeypatch.setattr(store, "_kernel", lambda *key: (None, 4))
    monkeypatch.setattr(store, "launch", launch)

    def run(case: StoreCase) -> None:
        rotation, _, companding, _, *scaling = case.codec.writing
        store.store(case.k, case.v, case.cache.buffer, case.slot_mapping, rotation, companding, *scaling, case.cache.page_size)

    for tokens, heads, page_size in ((1, 1, 16), (41, 5, 48)):
        case = random_store(
            generator, tokens=tokens, heads=heads, head_dim=head_dim, dtype=dtype, page_size=page_size, layout=layout,
            slot_dtype=slot_dtype, scale=scale,
        )  # fmt: skip
        check_store(run, case)
