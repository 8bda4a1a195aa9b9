"""Every kernel compiles for every architecture, and within its shared memory; no GPU is needed.

Calls run as usual, on CPU tensors, but instead of launching a kernel they let Triton compile it, by its own
``warmup``, for a pretended device. So the very configurations, argument types and specialisations of real launches are
compiled. Triton itself accepts more shared memory than a device has.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_cases import random_case
from paged_cases import known_lengths, random_batch
from store_cases import random_store
from turboquant_vllm import PagedTQ4Cache, TQ4Codec

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32

# Backend, architecture, threads of a warp; shared memory of a block in KiB.
TARGETS = {
    "sm_80": ("cuda", 80, 32, 163),
    "sm_90": ("cuda", 90, 32, 227),
    "sm_100": ("cuda", 100, 32, 227),
    "sm_120": ("cuda", 120, 32, 99),
    "gfx942": ("hip", "gfx942", 64, 64),
}
GRID = (2**31 - 1, 65535, 65535)  # of NVIDIA's GPUs

CALLS = {
    "decode": {"dtype": HALF, "head_dim": 128, "group": 4},
    "decode-64": {"dtype": BF16, "head_dim": 64, "group": 7},
    "decode-96": {"dtype": HALF, "head_dim": 96, "group": 4},
    "decode-256": {"dtype": BF16, "head_dim": 256, "group": 8},
    "decode-sixteen-rows": {"dtype": BF16, "head_dim": 128, "group": 16},
    "decode-packed-keys": {"dtype": HALF, "head_dim": 128, "group": 4, "packed": (True, False)},
    "some-rows": {"dtype": BF16, "head_dim": 128, "group": 4, "q_len": 17},
    "many-rows": {"dtype": HALF, "head_dim": 128, "group": 4, "q_len": 70},
    "many-rows-256": {"dtype": BF16, "head_dim": 256, "group": 4, "q_len": 70},
    "many-rows-packed-keys": {"dtype": BF16, "head_dim": 128, "group": 4, "q_len": 70, "packed": (True, False)},
    "many-rows-dense": {"dtype": BF16, "head_dim": 64, "group": 4, "q_len": 70, "packed": (False, False)},
    "float32": {"dtype": FULL, "head_dim": 128, "group": 4, "q_len": 3},
    "decode-masks": {"dtype": HALF, "head_dim": 128, "group": 4},
    "many-rows-masks": {"dtype": BF16, "head_dim": 256, "group": 4, "q_len": 70},
    "decode-offsets": {"dtype": HALF, "head_dim": 128, "group": 4, "offsets": True},
    "decode-offsets-256": {"dtype": BF16, "head_dim": 256, "group": 8, "offsets": True},
    "some-rows-offsets": {"dtype": BF16, "head_dim": 96, "group": 4, "q_len": 17, "offsets": True},
    "decode-512": {"dtype": BF16, "head_dim": 512, "group": 8},
    "some-rows-512": {"dtype": BF16, "head_dim": 512, "group": 4, "q_len": 17, "offsets": True},
    "many-rows-512": {"dtype": BF16, "head_dim": 512, "group": 4, "q_len": 70},
    "many-rows-offsets": {"dtype": BF16, "head_dim": 256, "group": 4, "q_len": 70, "offsets": True},
}
# Architectures with little shared memory get the calls that take most of it.
FITS = {
    "sm_80": ["decode", "many-rows", "decode-offsets-256", "some-rows-512"],
    "sm_90": ["some-rows", "many-rows-packed-keys", "many-rows-dense", "float32", "some-rows-offsets"],
    "sm_100": ["decode", "many-rows", "some-rows-offsets", "decode-512"],
    "sm_120": [
        "decode",
        "some-rows",
        "many-rows",
        "many-rows-256",
        "decode-masks",
        "decode-offsets",
        "many-rows-offsets",
        "many-rows-512",
    ],
    "gfx942": [
        "decode",
        "some-rows",
        "many-rows",
        "many-rows-256",
        "float32",
        "many-rows-masks",
        "decode-offsets-256",
        "some-rows-512",
        "many-rows-512",
    ],
}


class _Device:
    """What Triton asks its driver for before it compiles."""

    def __init__(self, target: Any, number: int) -> None:
        self.target, self.number = target, number

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class _Kernel:
    """Stands in a module for a kernel: compiles where it should be launched, and keeps what came out."""

    def __init__(self, function: Any, compiled: list[tuple[str, Any]]) -> None:
        self.function, self.compiled = function, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile(*args: Any, **kwargs: Any) -> None:
            assert all(size <= limit for size, limit in zip(grid, GRID, strict=False)), f"{self.function.__name__}: {grid}"
            kernel = self.function.warmup(*args, grid=grid, **kwargs)
            self.compiled.append((self.function.__name__, kernel))

        return compile


@pytest.fixture
def target(request):
    return request.param


@pytest.fixture
def compiled(target, monkeypatch):
    """A list that fills with (name, compiled kernel) while Triton functions of this package are called."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from turboquant_vllm.triton import compress, launch, prefill, store, store_keys, unpack

    backend, arch, warp, shared = TARGETS[target]
    kernels: list[tuple[str, Any]] = []
    for module in (launch, compress, prefill, store, store_keys, unpack):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction):
                monkeypatch.setattr(module, name, _Kernel(value, kernels))
        monkeypatch.setattr(module, "device_guard", lambda device: contextlib.nullcontext(), raising=False)
        monkeypatch.setattr(module, "uses_prmt", lambda device_type: backend == "cuda")
    # Room for slices of 128 keys of the calls below, so that results are joined.
    monkeypatch.setattr(prefill, "SCRATCH_BYTES", 128 * 2 * 2 * 64 * 2)
    # Plans of compress and decompress depend on the device.
    properties = SimpleNamespace(shared_memory_per_block_optin=shared << 10, multi_processor_count=64)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    plan = compress.plan_tiles
    for module in (compress, store):
        monkeypatch.setattr(module, "plan_tiles", lambda *args, **kw: plan(*args[:-1], torch.device("cuda"), **kw))
    # Triton keeps kernels by device number: away from those of real devices.
    driver.set_active(_Device(GPUTarget(backend, arch, warp), 1000 + list(TARGETS).index(target)))
    yield kernels
    driver.set_active(None)


def check_shared_memory(target: str, compiled: list[tuple[str, Any]]) -> None:
    limit = TARGETS[target][3] << 10
    too_large = {f"{name}: {kernel.metadata.shared} B" for name, kernel in compiled if kernel.metadata.shared > limit}
    assert not too_large, f"more than {target}'s {limit} B of shared memory: {sorted(too_large)}"
    # Of Blackwell's tensor memory; what does not fit compiles, too.
    columns = {name: getattr(kernel.metadata, "tmem_size", None) or 0 for name, kernel in compiled}
    assert max(columns.values()) <= 512, columns


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, names in FITS.items() for name in names], indirect=["target"]
)
def test_attention_fits(generator, target, compiled, name):
    from turboquant_vllm.triton import launch

    case = random_case(generator, is_causal=True, kv_len=300, **CALLS[name])
    if name.endswith("masks"):
        case = case.replace(sliding_window=100, softcap=30.0, sinks=torch.zeros(case.q.shape[1]))
    launch.attention(*case.arguments)
    assert {"query_kernel", "attention_kernel", "merge_kernel"} <= {kernel for kernel, _ in compiled}
    check_shared_memory(target, compiled)
    if name == "decode":
        attention = next(kernel for function, kernel in compiled if function == "attention_kernel")
        assert ("inline_asm" in attention.asm["ttir"]) == target.startswith("sm_")
        if target.startswith("sm_"):
            assert attention.asm["ptx"].count("prmt.b32") > 40


@pytest.mark.parametrize("target", ["sm_90", "gfx942"], indirect=True)
def test_float32_sums_are_short(generator, target, compiled):
    """No product over some of D, or some keys, goes on with the sum of the one before: one long sum rounds more."""
    from turboquant_vllm.triton import launch

    launch.attention(*random_case(generator, kv_len=300, **CALLS["float32"]).arguments)
    code = next(kernel.asm["ttir"] for name, kernel in compiled if name == "attention_kernel")
    sums = re.findall(r"tt\.dot %\w+, %\w+, %(\w+)", code)
    assert len(sums) > 8
    assert all(re.search(rf"%{name} = arith\.constant dense<0\.0", code) for name in sums), sums


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("decode") and not name.endswith("masks")])
def test_decode_keeps_its_loop_in_registers(generator, target, compiled, tmp_path, name):
    from turboquant_vllm.triton import launch

    case = random_case(generator, kv_len=300, **CALLS[name])
    launch.attention(*case.arguments)
    check_shared_memory(target, compiled)
    kernel = next(kernel for function, kernel in compiled if function == "attention_kernel")
    cubin = tmp_path / "attention.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    loops = _loops(_cuobjdump("-sass", cubin))
    assert len(loops) >= 2, "expected the loops over whole and over masked tiles"
    for loop in loops:
        spills = [instruction for instruction in loop if re.search(r"\b(?:STL|LDL)\b", instruction)]
        # A few between hundreds of instructions cost nothing.
        assert len(spills) <= len(loop) // 100, f"{len(spills)} of a loop's {len(loop)} instructions spill registers"


def _loops(sass: str) -> list[list[str]]:
    """The instructions between each backward branch and where it leads."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass)]
    loops = []
    for at, text in code:
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            loops.append([body for place, body in code if int(branch[1], 16) <= place <= at])
    return loops


def _cuobjdump(option: str, cubin: Any) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120", "gfx942"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "rotation"),
    [
        (HALF, 128, "hadamard"),
        (BF16, 256, "hadamard"),
        (BF16, 256, "haar"),
        (FULL, 96, "haar"),
        (BF16, 512, "hadamard"),
        (BF16, 512, "haar"),
    ],
)
def test_compress_and_decompress_fit(generator, target, compiled, dtype, head_dim, rotation):
    from turboquant_vllm.triton.compress import compress, decompress

    codec = TQ4Codec(head_dim, rotation=rotation)
    signs = rotation == "hadamard"
    x = torch.randn(1, 2, 64, head_dim, generator=generator).to(dtype)
    codes, norms = compress(x, codec.rotation, codec.companding, signs)
    decompress(codes, norms, codec.centroids, codec.rotation, signs, dtype)
    assert [function for function, _ in compiled] == ["compress_kernel", "decompress_kernel"]
    check_shared_memory(target, compiled)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "offsets"), [(HALF, 128, False), (BF16, 80, True), (BF16, 256, False), (BF16, 256, True)]
)
def test_slices_for_dense_attention_fit(generator, target, compiled, dtype, head_dim, offsets):
    from turboquant_vllm.triton import prefill

    sizes = {"dtype": dtype, "head_dim": head_dim, "q_len": 200, "kv_len": 400, "offsets": offsets}
    case = random_case(generator, is_causal=True, **sizes)
    prefill.attention(*case.arguments)
    assert {function for function, _ in compiled} == {"unpack_both_kernel", "merge_kernel"}
    check_shared_memory(target, compiled)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "page_size", "offsets"), [(HALF, 128, 16, False), (BF16, 256, 48, False), (HALF, 128, 128, True)]
)
def test_slices_of_pages_fit(generator, target, compiled, monkeypatch, dtype, head_dim, page_size, offsets):
    from turboquant_vllm.triton import prefill, route

    monkeypatch.setattr(prefill, "MANY_PAIRS", 0)
    sizes = {"head_dim": head_dim, "page_size": page_size, "offsets": offsets}
    batch = random_batch(generator, [(200, 400)], dtype=dtype, **sizes)
    out, lse = torch.empty_like(batch.q), torch.empty(batch.q.shape[:2])
    route.attention_over_pages(*known_lengths(batch), out, lse)
    assert {function for function, _ in compiled} == {"unpack_both_kernel", "merge_kernel"}
    check_shared_memory(target, compiled)
    merge = next(kernel for function, kernel in compiled if function == "merge_kernel")
    # Rows are read and written in wide pieces: strides are known to be multiples of head_dim.
    assert "ld.global.v4.b32" in merge.asm["ptx"]
    assert "st.global.v4.b32" in merge.asm["ptx"]


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
def test_grids_of_a_million_rows(generator, compiled):
    from turboquant_vllm.triton import launch, prefill

    rows = 1 << 20
    case = random_case(generator, dtype=FULL, num_kv_heads=1, group=1, head_dim=16, packed=(False, False))
    launch.attention(case.q.expand(1, 1, rows, 16), *case.arguments[1:])
    part = prefill.Part(torch.zeros(1, 1, 1, 16).expand(1, 1, rows, 16), torch.zeros(1, 1, 1).expand(1, 1, rows), 0)
    prefill.merge([part], 0, rows, part)
    assert {function for function, _ in compiled} == {"query_kernel", "attention_kernel", "merge_kernel"}


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("offsets", [False, True], ids=["plain", "offsets"])
def test_new_length_compiles_nothing_in_slices_for_dense_attention(generator, compiled, offsets):
    from turboquant_vllm.triton import prefill

    sizes = {"dtype": HALF, "head_dim": 64, "is_causal": True, "offsets": offsets}
    for q_len, kv_len in ((200, 400), (10, 1010)):  # few parts; so many that some are joined on the way
        prefill.attention(*random_case(generator, q_len=q_len, kv_len=kv_len, **sizes).arguments)
    known = {id(kernel) for _, kernel in compiled}
    for q_len, kv_len in ((1, 1), (1, 300), (16, 16), (17, 256), (201, 127), (300, 1001)):
        prefill.attention(*random_case(generator, q_len=q_len, kv_len=kv_len, **sizes).arguments)
        new = [function for function, kernel in compiled if id(kernel) not in known]
        assert not new, f"compiled again for q_len {q_len}, kv_len {kv_len}: {new}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"], indirect=True)
@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 128), (HALF, 80)])
def test_store_fits(generator, target, compiled, dtype, head_dim):
    from turboquant_vllm.triton.store import store

    sizes = {"tokens": 40, "heads": 2, "head_dim": head_dim, "dtype": dtype}
    store(*random_store(generator, **sizes).kernel_arguments)
    store(*random_store(generator, **(sizes | {"tokens": 7})).kernel_arguments)
    assert [function for function, _ in compiled] == ["store_kernel"] * 2
    assert compiled[0][1] is compiled[1][1], "compiled again for another number of tokens"
    check_shared_memory(target, compiled)


@pytest.mark.parametrize(
    ("target", "dtype", "head_dim", "rotation", "scaled"),
    [
        ("sm_80", HALF, 96, "haar", False),
        ("sm_90", HALF, 128, "hadamard", False),
        ("sm_100", BF16, 256, "hadamard", True),
        ("sm_120", BF16, 256, "haar", True),
        ("gfx942", BF16, 256, "hadamard", True),
        ("sm_120", HALF, 512, "hadamard", False),
    ],
    indirect=["target"],
)
def test_store_of_keys_with_offsets_fits(generator, target, compiled, dtype, head_dim, rotation, scaled):
    from turboquant_vllm.triton.store import store

    codec, tokens = TQ4Codec(head_dim, rotation=rotation), 130
    cache = PagedTQ4Cache.allocate(4, page_size=64, num_kv_heads=2, head_dim=head_dim, has_offsets=True)
    k, v = torch.randn(2, tokens, 2, head_dim, generator=generator).to(dtype)
    where, scales = torch.arange(tokens), torch.ones(2, head_dim) if scaled else None
    rotation, _, *how = codec.writing
    for count in (tokens, 7):
        args = (k[:count], v[:count], cache.buffer, where[:count], rotation, *how, 64, True, scales, where[:count] - 1)
        store(*args)
    first, second = (kernel for function, kernel in compiled if function == "store_keys_kernel")
    assert first is second, "compiled again for another number of tokens"
    check_shared_memory(target, compiled)


@pytest.mark.parametrize("target", ["sm_120"], indirect=True)
def test_store_of_vectors_that_no_program_sees_whole(generator, target, compiled):
    from turboquant_vllm.triton.store import store

    store(*random_store(generator, tokens=40, heads=2, head_dim=96, dtype=HALF, scale="unbiased").kernel_arguments)
    assert [function for function, _ in compiled] == ["compress_kernel", "decompress_kernel", "place_kernel"]
    check_shared_memory(target, compiled)


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize("operands", [{}, {"packed": (False, False)}, {"offsets": True}], ids=["packed", "dense", "offsets"])
def test_new_length_compiles_nothing_in_decode(generator, compiled, operands):
    from turboquant_vllm.triton import launch

    sizes = {"dtype": HALF, "head_dim": 64, "group": 4, **operands}
    launch.attention(*random_case(generator, kv_len=100, **sizes).arguments)
    known = {id(kernel) for _, kernel in compiled}
    for kv_len in range(1, 301):
        launch.attention(*random_case(generator, kv_len=kv_len, **sizes).arguments)
        new = [function for function, kernel in compiled if id(kernel) not in known]
        assert not new, f"compiled again for kv_len {kv_len}: {new}"


@pytest.mark.parametrize("target", ["sm_90"], indirect=True)
@pytest.mark.parametrize(
    ("window", "offsets"),
    [(lambda q_len: None, False), (lambda q_len: 1 + q_len // 3, False), (lambda q_len: 1 + q_len // 3, True)],
    ids=["whole", "window", "offsets"],
)
def test_new_length_compiles_nothing_in_prefill(generator, compiled, window, offsets):
    from turboquant_vllm.triton import launch

    def attend(q_len: int) -> None:
        sizes = {"q_len": q_len, "kv_len": q_len, "offsets": offsets}
        case = random_case(generator, dtype=HALF, head_dim=64, is_causal=True, **sizes)
        launch.attention(*case.replace(sliding_window=window(q_len)).arguments)

    for q_len in (3, 7, 15, 31, 99, 199):  # one of each size class
        attend(q_len)
    known = {id(kernel) for _, kernel in compiled}
    for q_len in (*range(1, 34), *range(34, 301, 11)):
        attend(q_len)
        new = [function for function, kernel in compiled if id(kernel) not in known]
        assert not new, f"compiled again for q_len {q_len}: {new}"
