"""The native kernels' source texts, and the parameters of the decode's kernels as codes of :mod:`struct`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from turboquant_vllm.cuda.variants import Variant

__all__ = ["STORE_PARAMS", "params_of", "source", "store_source"]

_QUERY = ("query.cuh", "matrix.cuh", "hadamard.cuh", "pages.cuh", "groups.cuh", "query_columns.cuh", "query_rows.cuh")
_LINE = (*_QUERY, "decode.cu", "combine.cu")
_CLUSTER = (*_QUERY, "cluster.cuh", "decode.cu")
_KEYS = ("store.cuh", "key_rows.cuh", "store_keys.cuh")
_STORE = (*_KEYS, "store_vectors.cuh", "store_block.cuh", "store.cu")
_STEP = (*_KEYS, "store_block.cuh")  # within attention's launch
STORE_PARAMS = "P" * 9 + "q" + "I" * 15 + "i" * 3
_DIVISOR = "Ii"
_HEADS = "i" * 4 + _DIVISOR * 3
_WORK = "i" * 6 + _DIVISOR * 5
_REST = "i" * 6 + "f"
_OPERANDS = "P" * 8 + "q" * 16
_PAGES = "P" * 6 + "q" + "i" * 5 + _DIVISOR + "i" * 4
# What the first kernel takes behind these: masks; keys with offsets, over whole tensors with strides; a cluster.
_MASKS, _OFFSETS, _OFFSET_STRIDES, _CLUSTER_LAST = "Piff", "PPP", "q" * 6, "P" * 4 + "q" * 6 + "i" + _DIVISOR * 2
_COMBINE = "P" * 4 + _WORK + _HEADS + _DIVISOR + "i" * 5
_COMBINE_PAGES = "P" * 7 + "q" * 2 + "i" * 8 + _HEADS + _DIVISOR + "i" * 5


def _text(names: tuple[str, ...]) -> str:
    paths = (Path(__file__).with_name(name) for name in names)
    return "".join(f'#line 1 "{path.name}"\n{path.read_text(encoding="utf-8")}' for path in paths)


@cache
def source(cluster: bool = False, stores: bool = False) -> str:
    """The text of the kernels of a call; ``stores``: of a cluster's that stores a step's own keys and values first."""
    step = f"namespace store {{\n{_text(_STEP)}}}\n" if stores else ""  # both have functions of the same names
    return _text(("device.cuh",)) + step + _text(_CLUSTER if cluster else _LINE)


@cache
def store_source() -> str:
    """The text of the store."""
    return _text(_STORE)


def params_of(variant: Variant, pages: bool) -> dict[str, str]:
    """Parameters of the kernels of a call, by name, in the order in which they are launched."""
    attend = _OPERANDS + (_PAGES if pages else "i" if variant.cluster else _WORK) + _HEADS + _REST
    attend += _MASKS if variant.masked else ""
    attend += _OFFSETS + ("" if pages else _OFFSET_STRIDES) if variant.offsets else ""
    if variant.cluster:
        step = STORE_PARAMS + "Pii" if variant.stores is not None else ""
        return {"tq4_decode": attend + _CLUSTER_LAST + ("Pii" if pages else "") + step}
    combine = (_COMBINE_PAGES if pages else _COMBINE) + (("PPi" if pages else "P") if variant.masked else "")
    return {**({"tq4_rotate": attend} if pages else {}), "tq4_decode": attend, "tq4_combine": combine}
