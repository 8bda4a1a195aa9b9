"""The operators: schema, shape inference and autograd rule of each, and where its kernel is found.

Everything here needs torch alone. A kernel's module is imported when its operator first runs on real data, so tracing
with ``torch.compile`` and importing this package load neither Triton nor a compiler. All operators are forward only.

    turboquant::compress            vectors -> codes, norms             Triton on a GPU, else the reference
    turboquant::decompress          codes, norms -> vectors             Triton on a GPU, else the reference
    turboquant::store               keys, values -> slots of pages      the backend that it is told
    turboquant::triton_attention    attention, packed or dense K and V  Triton
    turboquant::triton_paged        attention over pages, into out      Triton
    turboquant::reference_paged     the same                            the reference, which asks tensors for lengths
    turboquant::cuda_decode         attention of few rows, packed K, V  CUDA C++, compiled at first use
    turboquant::cuda_paged          the same over pages                 CUDA C++
    turboquant::cuda_store_paged    the same, behind a store            CUDA C++
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.library import Library

from turboquant_vllm import reference
from turboquant_vllm.paged import PagedTQ4Cache
from turboquant_vllm.records import Masks, Operand, Sequences, Tables

__all__ = ["define_operator", "has_triton", "open_library", "triton_runs_on", "why_not_cuda", "why_not_triton"]


def _find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # an import hook forbids it, or a stub without a spec stands in for it
        return False


_HAS_TRITON = _find("triton")  # a constant, not a cached function: torch.compile warns about those
_HAS_CUDA_CORE = _find("cuda.core")


def has_triton() -> bool:
    """Whether the triton package can be imported."""
    return _HAS_TRITON


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run on tensors of ``device``."""
    return device.type in ("cuda", "xpu") and has_triton()


def why_not_triton(device: torch.device) -> str:
    """Why Triton kernels do not run on tensors of ``device``; empty where they do."""
    if not has_triton():
        return "the triton package is not installed"
    if not triton_runs_on(device):
        return f"Triton does not run on {device.type} tensors here"
    return ""


def why_not_cuda(device: torch.device) -> str:
    """Why the native CUDA kernels do not run on tensors of ``device``; empty where they do. Compiles nothing."""
    if device.type != "cuda" or torch.version.hip:
        return f"the CUDA kernels do not run on {device.type} tensors here"
    if not torch.cuda.is_available():  # a fake tensor may be on a GPU that is not there
        return "no CUDA device is available"
    properties = torch.cuda.get_device_properties(device)  # torch.compile knows this one as a constant
    if (capability := (properties.major, properties.minor)) < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    if not _HAS_CUDA_CORE:
        return "cuda-core is not installed: pip install turboquant-vllm[cuda]"
    return ""


@cache
def _kernel(path: str) -> Callable[..., Any]:
    """The function at ``module:name``, imported on first use."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def open_library(module: dict[str, Any]) -> Library:
    """A library for the operators of a module with these globals; where it is loaded again, what it defined before ends."""
    if (before := module.get("_LIBRARY")) is not None:
        before._destroy()
    return Library("turboquant", "FRAGMENT")


def define_operator(library: Library, name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register one operator: ``run`` for every device, ``fake`` for tracing, and a backward that says there is none."""
    if hasattr(torch.ops.turboquant, name):
        return  # a copy of this package that was taken from sys.modules has defined it, and lives on in it
    library.define(f"{name}{schema}")
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"turboquant::{name}", fake, lib=library)
    if "!" in schema:
        return  # what writes into its arguments can have no autograd rule

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"turboquant::{name} has no backward: a quantised cache is for inference")

    torch.library.register_autograd(f"turboquant::{name}", backward, lib=library)


def _compress(
    x: torch.Tensor,
    rotation: torch.Tensor,
    boundaries: torch.Tensor,
    companding: torch.Tensor,
    hadamard: bool,
    centroids: torch.Tensor | None = None,
    scale: str = "norm",
) -> Any:
    if triton_runs_on(x.device):
        return _kernel("turboquant_vllm.triton.compress:compress")(x, rotation, companding, hadamard, centroids, scale)
    return reference.compress(x, rotation, boundaries, centroids, scale)


def _compress_fake(x: torch.Tensor, *args: Any) -> Any:
    codes = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _decompress(
    codes: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    hadamard: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    if triton_runs_on(codes.device) and dtype != torch.float64:
        run = _kernel("turboquant_vllm.triton.compress:decompress")
        return run(codes, norms, centroids, rotation, hadamard, dtype)
    return reference.decompress(codes, norms, centroids, rotation, dtype)


def _decompress_fake(
    codes: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    rotation: torch.Tensor,
    hadamard: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=dtype)


def _store(
    k: torch.Tensor,
    v: torch.Tensor,
    buffer: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor,
    boundaries: torch.Tensor,
    companding: torch.Tensor,
    hadamard: bool,
    centroids: torch.Tensor,
    scale: str,
    page_size: int,
    backend: str,
    has_offsets: bool = False,
    key_scales: torch.Tensor | None = None,
    previous_slots: torch.Tensor | None = None,
) -> None:
    if k.shape[0] == 0:
        return
    cache = PagedTQ4Cache.of_checked(buffer, page_size, k.shape[1], k.shape[2], has_offsets)
    tables = Tables(centroids, rotation, key_scales)
    if backend == "cuda":
        run = _kernel("turboquant_vllm.cuda.store:store")
        how = (centroids, scale, page_size, has_offsets, key_scales, previous_slots)
        run(k, v, buffer, slot_mapping, rotation, companding, *how)
    elif backend == "triton":
        run = _kernel("turboquant_vllm.triton.store:store")
        offsets = (has_offsets, key_scales, previous_slots)
        run(k, v, buffer, slot_mapping, rotation, companding, hadamard, centroids, scale, page_size, *offsets)
    else:
        reference.store(k, v, cache, slot_mapping, tables, boundaries, scale, previous_slots)


# Below, the one place where the flat arguments of an operator become records.


def _dense_call(kernel: str) -> Callable[..., Any]:
    """An operator over dense caches that calls ``kernel``."""

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        k_norms: torch.Tensor | None,
        v: torch.Tensor,
        v_norms: torch.Tensor | None,
        centroids: torch.Tensor | None,
        rotation: torch.Tensor | None,
        sm_scale: float,
        is_causal: bool,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        k_groups: torch.Tensor | None = None,
        k_steps: torch.Tensor | None = None,
        key_scales: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        masks = Masks(is_causal, sliding_window, softcap, sinks)
        operands = Operand(k, k_norms, k_groups, k_steps), Operand(v, v_norms)
        return _kernel(kernel)(q, *operands, Tables(centroids, rotation, key_scales), sm_scale, masks, **options)

    return run


def _paged_call(kernel: str) -> Callable[..., None]:
    """An operator over pages that calls ``kernel``."""

    def run(
        q: torch.Tensor,
        pages: torch.Tensor,
        page_size: int,
        num_kv_heads: int,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        centroids: torch.Tensor,
        rotation: torch.Tensor,
        sm_scale: float,
        causal: bool,
        max_query_len: int,
        max_seq_len: int,
        out: torch.Tensor,
        lse: torch.Tensor,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        windows: torch.Tensor | None = None,
        has_offsets: bool = False,
        key_scales: torch.Tensor | None = None,
        *,
        seq_lens_cpu: Sequence[int] | None = None,
        cu_seqlens_q_cpu: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        cache = PagedTQ4Cache.of_checked(pages, page_size, num_kv_heads, q.shape[2], has_offsets)
        bounds = (max_query_len, max_seq_len, seq_lens_cpu, cu_seqlens_q_cpu)
        sequences = Sequences(block_table, seq_lens, cu_seqlens_q, *bounds)
        masks = Masks(causal, sliding_window, softcap, sinks, windows)
        tables = Tables(centroids, rotation, key_scales)
        _kernel(kernel)(q, cache, sequences, tables, sm_scale, masks, out, lse, **options)

    return run


def _attention_fake(q: torch.Tensor, *args: Any, **options: Any) -> Any:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


_LIBRARY = open_library(globals())
define_operator(
    _LIBRARY,
    "compress",
    "(Tensor x, Tensor rotation, Tensor boundaries, Tensor companding, bool hadamard, Tensor? centroids=None, "
    "str scale='norm') -> (Tensor, Tensor)",
    _compress,
    _compress_fake,
)
define_operator(
    _LIBRARY,
    "decompress",
    "(Tensor codes, Tensor norms, Tensor centroids, Tensor rotation, bool hadamard, ScalarType dtype) -> Tensor",
    _decompress,
    _decompress_fake,
)
define_operator(
    _LIBRARY,
    "store",
    "(Tensor k, Tensor v, Tensor(a!) buffer, Tensor slot_mapping, Tensor rotation, Tensor boundaries, Tensor companding, "
    "bool hadamard, Tensor centroids, str scale, int page_size, str backend, "
    "bool has_offsets=False, Tensor? key_scales=None, Tensor? previous_slots=None) -> ()",
    _store,
    lambda *args: None,
)
for _name, _run, _options in (
    ("triton_attention", _dense_call("turboquant_vllm.triton.route:attention"), ""),
    (
        "cuda_decode",
        _dense_call("turboquant_vllm.cuda.decode:decode"),
        ", *, bool pre_rotated=False, bool rotated_output=False, bool hadamard=False",
    ),
):
    define_operator(
        _LIBRARY,
        _name,
        "(Tensor q, Tensor k, Tensor? k_norms, Tensor v, Tensor? v_norms, Tensor? centroids, Tensor? rotation, "
        "float sm_scale, bool is_causal, int? sliding_window=None, float? softcap=None, Tensor? sinks=None, "
        f"Tensor? k_groups=None, Tensor? k_steps=None, Tensor? key_scales=None{_options}) -> (Tensor, Tensor)",
        _run,
        _attention_fake,
    )
for _name, _run, _options in (
    ("cuda_paged", _paged_call("turboquant_vllm.cuda.paged:decode_pages"), ", *, bool hadamard=False"),
    (
        "cuda_store_paged",
        _paged_call("turboquant_vllm.cuda.paged:store_and_decode_pages"),
        ", *, Tensor k, Tensor v, Tensor slot_mapping, Tensor companding, str scale, Tensor? previous_slots=None",
    ),
    ("reference_paged", _paged_call("turboquant_vllm.reference:fill_paged_attention"), ""),
    (
        "triton_paged",
        _paged_call("turboquant_vllm.triton.route:attention_over_pages"),
        ", *, int min_rows=1, int[]? seq_lens_cpu=None, int[]? cu_seqlens_q_cpu=None",
    ),
):
    define_operator(
        _LIBRARY,
        _name,
        f"(Tensor q, Tensor{'(c!)' if 'store' in _name else ''} pages, int page_size, int num_kv_heads, Tensor block_table, "
        "Tensor seq_lens, Tensor cu_seqlens_q, "
        "Tensor centroids, Tensor rotation, float sm_scale, bool causal, int max_query_len, int max_seq_len, Tensor(a!) out, "
        "Tensor(b!) lse, int? sliding_window=None, float? softcap=None, Tensor? sinks=None, Tensor? windows=None, "
        f"bool has_offsets=False, Tensor? key_scales=None{_options}) -> ()",
        _run,
        lambda *args, **options: None,
    )
