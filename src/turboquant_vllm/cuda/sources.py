"""The native decode's source text, and the parameters of its kernels as codes of :mod:`struct`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from turboquant_vllm.cuda.variants import Variant

__all__ = ["params_of", "source"]

_QUERY = ("device.cuh", "query.cuh", "matrix.cuh", "hadamard.cuh")
_TILES = ("query_columns.cuh", "query_rows.cuh")
_LINE = (*_QUERY, "pages.cuh", "groups.cuh", *_TILES, "decode.cu", "combine.cu")
_CLUSTER = (*_QUERY, "pages.cuh", "groups.cuh", *_TILES, "cluster.cuh", "decode.cu")
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


@cache
def source(cluster: bool = False) -> str:
    """The text of the kernels of a call."""
    paths = (Path(__file__).with_name(name) for name in (_CLUSTER if cluster else _LINE))
    return "".join(f'#line 1 "{path.name}"\n{path.read_text(encoding="utf-8")}' for path in paths)


def params_of(variant: Variant, pages: bool) -> dict[str, str]:
    """Parameters of the kernels of a call, by name, in the order in which they are launched."""
    attend = _OPERANDS + (_PAGES if pages else "i" if variant.cluster else _WORK) + _HEADS + _REST
    attend += _MASKS if variant.masked else ""
    attend += _OFFSETS + ("" if pages else _OFFSET_STRIDES) if variant.offsets else ""
    if variant.cluster:
        return {"tq4_decode": attend + _CLUSTER_LAST + ("Pii" if pages else "")}
    combine = (_COMBINE_PAGES if pages else _COMBINE) + (("PPi" if pages else "P") if variant.masked else "")
    return {**({"tq4_rotate": attend} if pages else {}), "tq4_decode": attend, "tq4_combine": combine}
