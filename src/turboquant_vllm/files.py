"""Safetensors files with a format name, a version and a checksum, replaced in one step and read from one open file.

Version 2's checksum covers the tensors and all metadata, version 1's the tensors alone; both are read, 2 is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

__all__ = ["header_number", "read_header", "read_tensors", "write_tensors"]

_VERSION, _VERSIONS = "2", ("1", "2")

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors from any device, with metadata ("format" among it), the version and a SHA-256 over all of these.

    The file is replaced in one step, so that a reader never sees half of it; of several writers at once, in whatever
    threads, processes or containers, the last one's file remains.

    Raises:
        OSError: the file cannot be written; what stood at ``path`` before stands there still.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "version": _VERSION}
    metadata["sha256"] = _checksum(tensors, metadata)
    path = Path(path)
    partial = path.parent / f".{uuid.uuid4().hex}.partial"  # processes in two containers may have one number
    try:
        with partial.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(tensors, partial, metadata=metadata)
        os.chmod(partial, mode)  # which some releases of safetensors set to the owner's alone
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def read_tensors(
    path: str | os.PathLike[str], expected_format: str, names: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a file of :func:`write_tensors`; with ``names``, of exactly those tensors.

    They are what the file held when it was opened, in memory of their own: whoever replaces the file changes nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, another format or version, other tensors, or a wrong checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            tensors, metadata = _read_safetensors(file)
    except _FormatError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    if metadata.get("format") != expected_format:
        raise ValueError(f"{path}: expected format {expected_format!r}, got {metadata.get('format')!r}")
    version = metadata.get("version")
    if version not in _VERSIONS:
        raise ValueError(f"{path}: expected format version {' or '.join(_VERSIONS)}, got {version}")
    if names and set(tensors) != set(names):
        raise ValueError(f"{path}: expected {', '.join(names[:-1])} and {names[-1]}, got {sorted(tensors)}")
    checksum = _checksum(tensors, {} if version == "1" else metadata)
    if metadata.get("sha256") != checksum:
        raise ValueError(f"{path}: expected checksum {metadata.get('sha256')}, got {checksum}")
    return tensors, metadata


def read_header(path: str | os.PathLike[str], metadata: Mapping[str, str], name: str, fields: Sequence[str]) -> dict[str, Any]:
    """The JSON object with exactly these fields that stands in the metadata under ``name``; their values may be anything.

    Raises:
        ValueError: something else stands there.
    """
    try:
        header = json.loads(metadata[name])
    except (KeyError, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or header.keys() != set(fields):
        raise ValueError(f"{path}: expected {', '.join(fields[:-1])} and {fields[-1]}, got {metadata.get(name)!r}")
    return header


def header_number(path: str | os.PathLike[str], name: str, value: object, maximum: int | None = None) -> int:
    """``value``, which must be a whole number from 0 to ``maximum`` (None: any).

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or value < 0 or (maximum is not None and value > maximum):
        span = "that is not negative" if maximum is None else f"from 0 to {maximum}"
        raise ValueError(f"{path}: expected {name} to be a whole number {span}, got {value!r}")
    return value


class _FormatError(Exception):
    """What a file has instead of what a safetensors file has."""


def _read_safetensors(file: io.BufferedReader) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of an open file.

    Not by the safetensors library: releases of it open the path again for the tensors, or leave them in the file, where whoever
    writes to it changes them.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        raise _FormatError(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _FormatError(f"a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _FormatError(f"a header that is a {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _FormatError(f"metadata {metadata!r}")
    layout = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry[3:])
    place = 0
    for name, dtype, shape, first, stop in layout:
        if first != place or stop - first != math.prod(shape) * dtype.itemsize:
            raise _FormatError(f"tensor {name!r}, {dtype} {shape}, in bytes {first} to {stop}, with {place} before it")
        place = stop
    if place != size - 8 - length:
        raise _FormatError(f"{size - 8 - length} bytes of tensors where {place} were announced")
    tensors = {}
    for name, dtype, shape, first, stop in layout:
        count = stop - first
        raw = np.empty(count + 1, np.uint8)  # NumPy's, which no default device changes; one more, or an empty one has no stride
        if file.readinto(raw.data[:count]) != count:
            raise _FormatError(f"an end within tensor {name!r}")
        tensors[name] = torch.from_numpy(raw)[:count].view(dtype).reshape(shape)
    return tensors, metadata


def _entry(name: str, entry: object) -> tuple[str, torch.dtype, list[int], int, int]:
    """Name, dtype, shape, first byte and end of a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _FormatError(f"tensor {name!r} described by {entry!r}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
        raise _FormatError(f"tensor {name!r} of dtype {entry['dtype']!r}")
    for field in ("shape", "data_offsets"):
        numbers = entry[field]
        if not isinstance(numbers, list) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise _FormatError(f"tensor {name!r} with {field} {numbers!r}")
    if len(entry["data_offsets"]) != 2:
        raise _FormatError(f"tensor {name!r} with data_offsets {entry['data_offsets']}")
    return name, _DTYPES[entry["dtype"]], entry["shape"], *entry["data_offsets"]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata, where there is any, and the tensors' names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    if metadata:
        covered = {name: value for name, value in metadata.items() if name != "sha256"}
        digest.update(f"{json.dumps(covered, sort_keys=True)}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()
