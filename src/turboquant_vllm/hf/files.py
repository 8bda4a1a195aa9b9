"""Filled caches as safetensors files, so that a long prompt need be read once only.

A file holds for each packed layer the codes ``[2, B, H_kv, n, D // 2]`` and norms ``[2, B, H_kv, n]`` of keys and values, for
each dense one its keys and values, and the rotations and levels that read them.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from turboquant_vllm.codec import TQ4Tensor
from turboquant_vllm.files import read_tensors, write_tensors
from turboquant_vllm.hf.layers import PackedLayer
from turboquant_vllm.hf.static import DenseStaticLayer, PagedLayer
from turboquant_vllm.hf.storage import codec_for

__all__ = ["fill_layers", "read_cache", "write_cache"]

_FORMAT, _VERSION = "turboquant-hf-cache", "1"
# Linear-algebra libraries differ in a Haar matrix's last bits; anything beyond that is another rotation.
_SAME_ROTATION = 1e-5

Tensors = dict[str, torch.Tensor]


def write_cache(path: str | os.PathLike[str], layers: list[Any], seed: int) -> None:
    """Write the layers of a cache.

    Raises:
        ValueError: a layer holds something else than keys and values.
        OSError: the file cannot be written.
    """
    tensors: Tensors = {}
    descriptions = []
    for index, layer in enumerate(layers):
        description = _describe(index, layer)
        descriptions.append(description)
        if not layer.is_initialized or layer.keys is None:
            continue
        if description["kind"] == "packed":
            keys, values, _ = layer.export()
            codec = layer.codec
            tensors[f"{index}.codes"] = torch.stack((keys.codes, values.codes))
            tensors[f"{index}.norms"] = torch.stack((keys.norms, values.norms))
            tensors[f"rotation.{codec.head_dim}"], tensors[f"centroids.{codec.head_dim}"] = codec.rotation, codec.centroids
            description["dtype"] = str(layer.dtype).removeprefix("torch.")
        else:
            length = description["length"] if layer.is_compileable else None
            tensors[f"{index}.keys"], tensors[f"{index}.values"] = (x[:, :, :length] for x in (layer.keys, layer.values))
    header = {"seed": seed, "layers": descriptions}
    write_tensors(path, tensors, {"format": _FORMAT, "version": _VERSION, "cache": json.dumps(header)})


def read_cache(path: str | os.PathLike[str]) -> tuple[int, list[dict[str, Any]], Tensors]:
    """Seed, descriptions of the layers and tensors of a file of :func:`write_cache`.

    Raises:
        FileNotFoundError, ValueError: no such file, or another one.
    """
    tensors, metadata = read_tensors(path, _FORMAT, _VERSION)
    try:
        header = json.loads(metadata["cache"])
        return int(header["seed"]), list(header["layers"]), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a seed and layers, got {metadata.get('cache')!r}") from error


def fill_layers(
    path: str | os.PathLike[str], layers: list[Any], seed: int, descriptions: list[dict[str, Any]], tensors: Tensors,
    device: torch.device | str,
) -> None:  # fmt: skip
    """Fill new layers with what :func:`read_cache` found; dense ones on ``device``, packed ones wherever they are used.

    Raises:
        ValueError: the file does not fit the layers, or its rotations or levels are not ours.
    """
    for index, (layer, found) in enumerate(zip(layers, descriptions, strict=True)):
        expected = _describe(index, layer)
        for name in ("kind", "window"):
            if found.get(name) != expected.get(name):
                raise ValueError(f"{path}: layer {index}: expected {name} {expected.get(name)}, got {found.get(name)}")
        if f"{index}.codes" in tensors:
            packed = _packed(path, index, tensors)
            _check_tables(path, packed.head_dim, seed, tensors)
            layer.restore(packed, getattr(torch, found["dtype"]), found["length"])
        elif f"{index}.keys" in tensors:
            layer.update(*(tensors[f"{index}.{name}"].to(device) for name in ("keys", "values")))
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length = found["length"]


def _describe(index: int, layer: Any) -> dict[str, Any]:
    """Kind, window and length of a layer."""
    if type(layer).__name__ == "DummyLayer":  # one that uses another layer's keys and values, or has no attention
        return {"kind": "none", "length": 0}
    if isinstance(layer, (PackedLayer, PagedLayer)):
        kind, window = "packed", layer.window
    elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DenseStaticLayer):
        kind, window = "dense", getattr(layer, "sliding_window", None)
    else:
        raise ValueError(f"layer {index}: expected keys and values to be saved, got a {type(layer).__name__}")
    return {"kind": kind, "window": window, "length": int(layer.get_seq_length())}


def _packed(path: Any, index: int, tensors: Tensors) -> TQ4Tensor:
    codes, norms = tensors[f"{index}.codes"], tensors[f"{index}.norms"]
    if codes.dtype != torch.uint8 or norms.dtype != torch.float32 or codes.dim() != 5 or codes.shape[:-1] != norms.shape:
        got = f"{codes.dtype} {list(codes.shape)} and {norms.dtype} {list(norms.shape)}"
        raise ValueError(f"{path}: layer {index}: expected uint8 codes and float32 norms of 5 and 4 dimensions, got {got}")
    return TQ4Tensor(codes, norms)


def _check_tables(path: Any, head_dim: int, seed: int, tensors: Tensors) -> None:
    codec = codec_for(head_dim, seed, torch.device("cpu"))
    for name, own, tolerance in (("rotation", codec.rotation, _SAME_ROTATION), ("centroids", codec.centroids, 0.0)):
        found = tensors.get(f"{name}.{head_dim}")
        if found is None or found.shape != own.shape or not torch.allclose(found, own, rtol=0, atol=tolerance):
            raise ValueError(f"{path}: expected the {name} of seed {seed} for head dimension {head_dim}, got others")
