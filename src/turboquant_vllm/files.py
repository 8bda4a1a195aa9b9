"""Safetensors files with a format name, a version and a checksum, replaced in one step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors from any device, with metadata ("format" and "version" among it) and a SHA-256 over the tensors.

    The file is replaced in one step, so that a reader never sees half of it.

    Raises:
        OSError: the file cannot be written; what stood at ``path`` before stands there still.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "sha256": _checksum(tensors)}
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(
    path: str | os.PathLike[str], expected_format: str, expected_version: str, names: Sequence[str] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a file of :func:`write_tensors`; with ``names``, of exactly those tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, another format or version, other tensors, or a wrong checksum.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error
    if metadata.get("format") != expected_format:
        raise ValueError(f"{path}: expected format {expected_format!r}, got {metadata.get('format')!r}")
    if metadata.get("version") != expected_version:
        raise ValueError(f"{path}: expected format version {expected_version}, got {metadata.get('version')}")
    if names and set(tensors) != set(names):
        raise ValueError(f"{path}: expected {', '.join(names[:-1])} and {names[-1]}, got {sorted(tensors)}")
    checksum = _checksum(tensors)
    if metadata.get("sha256") != checksum:
        raise ValueError(f"{path}: expected checksum {metadata.get('sha256')}, got {checksum}")
    return tensors, metadata


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
