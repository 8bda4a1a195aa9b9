"""What changes files that a codec saved, for their tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Metadata = dict[str, str]


def read(path: Path) -> tuple[Tensors, Metadata]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def checksum(tensors: Tensors, metadata: Metadata | None = None) -> str:
    """The file format's checksum: version 1's of the tensors alone, version 2's with the metadata."""
    digest = hashlib.sha256()
    if metadata is not None:
        digest.update((json.dumps({k: v for k, v in sorted(metadata.items()) if k != "sha256"}) + "\n").encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode() + x.contiguous().numpy().tobytes())
    return digest.hexdigest()


def rewrite(path: Path, change: Callable[[Tensors, Metadata], object]) -> None:
    """Change a saved file's contents and give it the checksum that fits them."""
    tensors, metadata = read(path)
    change(tensors, metadata)
    metadata["sha256"] = checksum(tensors, metadata)
    save_file(tensors, path, metadata)


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a saved file says of its tensors."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def header(metadata: Metadata, **fields: object) -> None:
    """Change what the file says of the codec."""
    metadata["codec"] = json.dumps({**json.loads(metadata["codec"]), **fields})
