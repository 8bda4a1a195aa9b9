"""Filled caches as safetensors files, so that a long prompt need be read once only.

A file holds for each packed layer the codes ``[2, B, H_kv, n, D // 2]`` and norms ``[2, B, H_kv, n]`` of keys and values, for
each dense one its keys and values, for each with linear attention its states, and the rotations and levels that read them.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer, StaticLayer

from turboquant_vllm.checks import MAX_HEAD_DIM
from turboquant_vllm.codec import TQ4Keys, TQ4Tensor, other_table
from turboquant_vllm.files import header_number, read_header, read_tensors, write_tensors
from turboquant_vllm.hf.layers import DTYPES, MIN_HEAD_DIM, PackedLayer
from turboquant_vllm.hf.packing import PACKED
from turboquant_vllm.hf.recurrent import fill_states, recurrent_states, state_names
from turboquant_vllm.hf.static import DenseStaticLayer, PagedLayer
from turboquant_vllm.hf.storage import codec_for
from turboquant_vllm.records import GROUP

__all__ = ["fill_layers", "read_cache", "write_cache"]

_FORMAT = "turboquant-hf-cache"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_LONGEST = 2**63 - 1  # what a length on a device can be
_PARTS: dict[str, tuple[str, ...]] = {"packed": ("codes", "norms"), "dense": ("keys", "values"), "states": (), "none": ()}
_TABLES = ("rotation", "centroids")

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
        tensors.update({f"{index}.{name}": state for name, state in recurrent_states(layer).items()})
        if description["kind"] == "states" or not layer.is_initialized or layer.keys is None:
            continue
        if description["kind"] == "packed":
            keys, values, _ = layer.export()
            codec = layer.codec
            tensors[f"{index}.codes"] = torch.stack((keys.codes, values.codes))
            tensors[f"{index}.norms"] = torch.stack((keys.norms, values.norms))
            if isinstance(keys, TQ4Keys):
                description["offsets"] = True
                tensors[f"{index}.groups"], tensors[f"{index}.steps"] = keys.groups, keys.steps
                if codec.key_scales is not None:
                    tensors[f"{index}.key_scales"] = codec.key_scales
            tensors[f"rotation.{codec.head_dim}"], tensors[f"centroids.{codec.head_dim}"] = codec.rotation, codec.centroids
            description["dtype"] = str(layer.dtype).removeprefix("torch.")
        else:
            length = description["length"]
            own = slice(length - _kept(description["window"], length), length) if layer.is_compileable else slice(None)
            tensors[f"{index}.keys"], tensors[f"{index}.values"] = (x[:, :, own] for x in (layer.keys, layer.values))
    header = {"seed": seed, "layers": descriptions}
    write_tensors(path, tensors, {"format": _FORMAT, "cache": json.dumps(header)})


def read_cache(path: str | os.PathLike[str]) -> tuple[int, list[dict[str, Any]], Tensors]:
    """Seed, descriptions of the layers and tensors of a file of :func:`write_cache`, each checked as far as it stands alone.

    Raises:
        FileNotFoundError, ValueError: no such file, or another one.
    """
    tensors, metadata = read_tensors(path, _FORMAT)
    header = read_header(path, metadata, "cache", ("seed", "layers"))
    seed, layers = header_number(path, "seed", header["seed"]), header["layers"]
    if not isinstance(layers, list):
        raise ValueError(f"{path}: expected layers to be a list, got {layers!r}")
    expected = {name for index, layer in enumerate(layers) for name in _check_layer(path, index, layer, tensors)}
    if others := sorted(tensors.keys() - expected):
        raise ValueError(f"{path}: expected tensors of {len(layers)} layers, got {others} beside them")
    return seed, layers, tensors


def fill_layers(
    path: str | os.PathLike[str], layers: list[Any], seed: int, descriptions: list[dict[str, Any]], tensors: Tensors,
    device: torch.device | str,
) -> None:  # fmt: skip
    """Fill new layers with what :func:`read_cache` found; dense ones on ``device``, packed ones wherever they are used.

    Raises:
        ValueError: the file does not fit the layers, or its rotations or levels are not ours.
    """
    for index, (layer, found) in enumerate(zip(layers, descriptions, strict=True)):
        expected, kind, length = _describe(index, layer), found["kind"], found["length"]
        if kind != expected["kind"]:
            raise ValueError(f"{path}: layer {index}: expected kind {expected['kind']}, got {kind}")
        known = state_names(layer)
        if ("states" in found) != bool(known) or not set(found.get("states", ())) <= set(known):
            raise ValueError(f"{path}: layer {index}: expected states among {known}, got {found.get('states')}")
        window = expected.get("window")
        # A dense layer without a window has all tokens, whatever the window of the layer that reads it.
        if found.get("window") != window and not (kind == "dense" and found["window"] is None):
            raise ValueError(f"{path}: layer {index}: expected window {window}, got {found.get('window')}")
        if kind in ("packed", "dense") and layer.is_compileable and length > layer.max_cache_len:
            raise ValueError(f"{path}: layer {index}: expected at most {layer.max_cache_len} tokens, got {length}")
        if f"{index}.codes" in tensors:
            packed = TQ4Tensor(tensors[f"{index}.codes"], tensors[f"{index}.norms"])
            _check_tables(path, packed.head_dim, seed, tensors)
            _restore(path, index, layer, packed, found, tensors)
        elif f"{index}.keys" in tensors:
            keys, values = (tensors[f"{index}.{name}"] for name in _PARTS["dense"])
            own = slice(keys.shape[2] - _kept(window, length), None)
            keys, values = keys[:, :, own].to(device), values[:, :, own].to(device)
            if isinstance(layer, DenseStaticLayer):
                layer.restore(keys, values, length)
            else:
                layer.update(keys, values)
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length
        fill_states(layer, {name: tensors[f"{index}.{name}"].to(device) for name in found.get("states", ())})


def _restore(path: Any, index: int, layer: Any, packed: TQ4Tensor, found: dict[str, Any], tensors: Tensors) -> None:
    """Fill a packed layer, whose keys have offsets if the file's have."""
    dtype, length, offsets = _DTYPES[found["dtype"]], found["length"], bool(found.get("offsets"))
    expected = layer.key_offsets
    if offsets != expected:
        names = ("without offsets", "with offsets")
        raise ValueError(
            f"{path}: layer {index}: expected keys {names[expected]}, got keys {names[offsets]}: key_offsets={offsets}"
        )
    keys, values = (TQ4Tensor(*part) for part in zip(packed.codes, packed.norms, strict=True))
    layer.key_scales = tensors.get(f"{index}.key_scales")
    shared = (tensors[f"{index}.groups"], tensors[f"{index}.steps"]) if offsets else ()
    layer.restore(TQ4Keys(*keys, *shared) if shared else keys, values, dtype, length)


def _describe(index: int, layer: Any) -> dict[str, Any]:
    """Kind, window and length of a layer, and names of its states where it is of a kind that has any."""
    if type(layer).__name__ == "DummyLayer":  # one that uses another layer's keys and values, or has no attention
        return {"kind": "none", "length": 0}
    states = {"states": sorted(recurrent_states(layer))} if state_names(layer) else {}
    if type(layer) is LinearAttentionLayer:
        return {"kind": "states", "length": 0, **states}
    if isinstance(layer, (PackedLayer, PagedLayer)):
        kind, window = "packed", layer.window
    elif isinstance(layer, DenseStaticLayer):
        kind, window = "dense", layer.window
    elif type(layer) in (*PACKED, StaticLayer):
        kind, window = "dense", getattr(layer, "sliding_window", None)
    else:
        raise ValueError(f"layer {index}: expected keys and values to be saved, got a {type(layer).__name__}")
    return {"kind": kind, "window": window, "length": int(layer.get_seq_length()), **states}


def _kept(window: int | None, length: int) -> int:
    """How many of ``length`` tokens later calls can see."""
    return length if window is None else min(length, window - 1)


def _check_layer(path: Any, index: int, layer: object, tensors: Tensors) -> list[str]:
    """Check the description of a layer and its tensors; names of these, and of the tables that read them."""
    where = f"{path}: layer {index}"
    kind = layer.get("kind") if isinstance(layer, dict) else layer
    if not isinstance(layer, dict) or kind not in tuple(_PARTS):
        raise ValueError(f"{where}: expected kind {', '.join(_PARTS)}, got {kind!r}")
    length = header_number(where, "length", layer.get("length"), _LONGEST)
    window = layer.get("window")
    if window is not None and header_number(where, "window", window) == 0:
        raise ValueError(f"{where}: expected window to be positive, got 0")
    states = _check_states(where, index, layer.get("states", []), tensors)
    names = [f"{index}.{part}" for part in _PARTS[kind] if f"{index}.{part}" in tensors]
    if not names and not length:
        return states
    if len(names) < 2:
        raise ValueError(f"{where}: expected {' and '.join(_PARTS[kind])} of {length} tokens, got {names}")
    first, second = (tensors[name] for name in names)
    got = f"{first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
    if kind == "dense":
        together = first.shape[::2] == second.shape[::2] and first.dtype == second.dtype
        if first.dim() != 4 or second.dim() != 4 or not together or not first.is_floating_point():
            raise ValueError(f"{where}: expected floating keys and values of 4 dimensions, got {got}")
        least, count = _kept(window, length), first.shape[2]
    else:
        if (first.dtype, second.dtype) != (torch.uint8, torch.float32) or first.dim() != 5 or first.shape[:-1] != second.shape:
            raise ValueError(f"{where}: expected uint8 codes and float32 norms of 5 and 4 dimensions, got {got}")
        if first.shape[0] != 2 or not MIN_HEAD_DIM <= 2 * first.shape[4] <= MAX_HEAD_DIM:
            raise ValueError(f"{where}: expected codes of keys and values of head dimension 16 to {MAX_HEAD_DIM}, got {got}")
        if layer.get("dtype") not in tuple(_DTYPES):
            raise ValueError(f"{where}: expected dtype {', '.join(_DTYPES)}, got {layer.get('dtype')!r}")
        least, count = _kept(window, length), first.shape[3]
        if layer.get("offsets"):
            names += _check_offsets(where, index, first, tensors)
            least = min(length, least + (length - least) % GROUP)  # groups are kept whole
        names += [name for x in _TABLES if (name := f"{x}.{2 * first.shape[4]}") in tensors]
    if not least <= count <= (length if kind == "dense" else least):
        raise ValueError(f"{where}: expected {least} of {length} tokens, got {count}")
    return names + states


def _check_states(where: str, index: int, states: object, tensors: Tensors) -> list[str]:
    """Names of the tensors of a layer's states."""
    names = [f"{index}.{name}" for name in states] if isinstance(states, list) else []
    if not isinstance(states, list) or not all(name in tensors and tensors[name].is_floating_point() for name in names):
        raise ValueError(f"{where}: expected states to be names of floating tensors, got {states!r}")
    return names


def _check_offsets(where: str, index: int, codes: torch.Tensor, tensors: Tensors) -> list[str]:
    """Names of what keys with offsets have beside codes and norms."""
    _, *rows, count, half = codes.shape
    shared = (*rows, -(-count // GROUP))
    expected = {"groups": (torch.int8, (*shared, 2, 2 * half)), "steps": (torch.float32, (*shared, 4))}
    if f"{index}.key_scales" in tensors:
        expected["key_scales"] = (torch.float32, (rows[1], 2 * half))
    for name, (dtype, shape) in expected.items():
        got = tensors.get(f"{index}.{name}")
        if got is None or got.dtype != dtype or got.shape != shape:
            what = "none" if got is None else f"{got.dtype} {list(got.shape)}"
            raise ValueError(f"{where}: expected {name} {dtype} {list(shape)}, got {what}")
    scales = tensors.get(f"{index}.key_scales")
    if scales is not None and not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError(f"{where}: expected key_scales to be positive and finite, got others")
    return [f"{index}.{name}" for name in expected]


def _check_tables(path: Any, head_dim: int, seed: int, tensors: Tensors) -> None:
    rotation, centroids = (tensors.get(f"{name}.{head_dim}") for name in _TABLES)
    if name := other_table(rotation, centroids, codec_for(head_dim, seed, torch.device("cpu"))):
        raise ValueError(f"{path}: expected the {name} of seed {seed} for head dimension {head_dim}, got others")
