"""Channel scales of keys: what they are, how they are measured from queries and keys, and the file that keeps them.

Keys are coded as w * k and queries divided by w, one positive w for each channel of each kv head. Scores do not change, but the
error of a code does: it is spread evenly over the channels of w * k, so that channel i of a key is wrong by e / w_i, and
a score by sum_i q_i^2 e^2 / w_i^2, where e^2 is proportional to the sum over all channels of w_i^2 Var k_i. That is
smallest for

    w_i = (E q_i^2 / Var k_i)^(1/4)

with Var k_i that of what is coded: keys less their group's offset, outlying keys left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.files import read_tensors, write_tensors
from turboquant_vllm.records import GROUP

__all__ = [
    "FILE_NAME",
    "KeyStatistics",
    "channel_scales",
    "find_key_scales",
    "kv_heads_of",
    "load_key_scales",
    "model_identity",
    "save_key_scales",
]

FILE_NAME = "turboquant.safetensors"

_FORMAT = "turboquant-key-scales"
# A channel that is never used, or always the same, would get a scale without bounds.
_FLOOR = 1e-3
_LARGEST = 32.0


def channel_scales(query_squares: torch.Tensor, key_variances: torch.Tensor) -> torch.Tensor:
    """w = (query_squares / key_variances)^(1/4), float32, of geometric mean 1 in each head.

    Args:
        query_squares: ``[..., D]``, not negative: mean square of each channel of the queries of a kv head.
        key_variances: ``[..., D]``, not negative: variance of each channel of its keys.

    Returns:
        ``[..., D]``, finite and from 1/32 to 32. Both arguments are raised by a thousandth of their head's mean first; a head
        with a number that is not finite, or with nothing but zeros, has ones.
    """
    logs = []
    for x in (query_squares.double(), key_variances.double()):
        mean = x.mean(-1, keepdim=True)
        logs.append(((x + _FLOOR * mean) / mean).log())
    w = (logs[0] - logs[1]) / 4
    w = (w - w.mean(-1, keepdim=True)).exp().clamp(1 / _LARGEST, _LARGEST).float()
    return torch.where(w.isfinite().all(-1, keepdim=True), w, 1.0)


class KeyStatistics:
    """Mean squares of queries and variances of keys of all layers, over what was added."""

    def __init__(self) -> None:
        self._sums: dict[int, list[torch.Tensor]] = {}

    def add(self, layer: int, query: torch.Tensor, key: torch.Tensor) -> None:
        """Count in the queries ``[B, H_q, N, D]`` and keys ``[B, H_kv, N, D]`` of one layer, as attention sees them.

        Keys count as what is left of them when the mean of their group of 64 is taken away and the outlying key of each
        group is not looked at, as the cache's writer does; keys behind the last whole group count only where there is none.

        Raises:
            ValueError: ``query`` or ``key`` has a NaN or an infinity.
        """
        heads, length = key.shape[1], key.shape[2]
        squares = query.double().unflatten(1, (heads, -1)).square().sum((0, 2, 3))  # [H_kv, D]
        size = GROUP if length >= GROUP else length
        groups = key[:, :, : length // size * size].double().unflatten(2, (-1, size))  # [B, H_kv, G, size, D]
        rest, number = _residual_squares(groups), groups[:, 0, :, 0, 0].numel() * max(size - 2, 1)
        counts = torch.tensor([query.numel() // squares.numel(), number], dtype=torch.float64, device=key.device)
        if not bool((squares + rest).isfinite().all()):
            raise ValueError(f"layer {layer}: expected finite queries and keys, got a NaN or an infinity")
        found = [squares, rest, counts]
        before = self._sums.get(layer)
        self._sums[layer] = found if before is None else [old + new for old, new in zip(before, found, strict=True)]

    def scales(self) -> dict[int, torch.Tensor]:
        """Layer -> :func:`channel_scales` ``[H_kv, D]``, on the CPU."""
        found = {}
        for layer, (squares, rest, counts) in sorted(self._sums.items()):
            found[layer] = channel_scales(squares / counts[0], rest / counts[1]).cpu()
        return found


def _residual_squares(groups: torch.Tensor) -> torch.Tensor:
    """Squares of keys ``[B, H_kv, G, size, D]`` less their group's mean, the key farthest from it left out: ``[H_kv, D]``."""
    size = groups.shape[3]
    if size == 1:
        return groups.square().sum((0, 2, 3))
    far = (groups - groups.mean(3, keepdim=True)).square().sum(-1).argmax(-1)  # [B, H_kv, G]
    key = groups.gather(3, far[..., None, None].expand(*far.shape, 1, groups.shape[-1]))
    mean = (groups.sum(3, keepdim=True) - key) / (size - 1)
    rest = (groups - mean).square().sum(3) - (key - mean).square().squeeze(3)
    return rest.clamp_min(0).sum((0, 2))


def model_identity(config: Any) -> dict[str, Any]:
    """What of a model's configuration decides which scales fit its keys: type, sizes, heads, and RoPE; heads of layer 0.

    Args:
        config: of transformers, or any object with its attributes.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found: dict[str, Any] = {"model_type": str(getattr(text, "model_type", ""))}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        found[name] = int(getattr(text, name))
    return {**found, **kv_heads_of(text, 0), "rope": rope_of(text)}


def kv_heads_of(text: Any, layer: int) -> dict[str, int]:
    """How many key/value heads a layer of a text configuration has, and their dimension."""

    def given(name: str) -> Any:
        try:
            return getattr(text, name, None)
        except RuntimeError:  # layers differ: transformers refuses one answer for all
            return getattr(text.per_layer_config[layer], name, None)

    heads, dim = given("num_key_value_heads"), given("head_dim")
    attention_heads = int(text.num_attention_heads)
    return {"num_key_value_heads": int(heads or attention_heads), "head_dim": int(dim or text.hidden_size // attention_heads)}


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary embedding of a text configuration: "theta", "type", "factor", "partial"; by type of layer where they differ.

    Empty where there is none.
    """
    given = getattr(config, "rope_parameters", None)
    if not given:  # as transformers before 5 said it
        given = {**(getattr(config, "rope_scaling", None) or {}), "rope_theta": getattr(config, "rope_theta", None)}
    if any(isinstance(value, Mapping) for value in given.values()):
        return {str(kind): _one_rope(config, value) for kind, value in sorted(given.items()) if isinstance(value, Mapping)}
    return _one_rope(config, given)


def _one_rope(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    theta = given.get("rope_theta") or getattr(config, "rope_theta", None)
    if not theta:
        return {}
    partial = given.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    kind = str(given.get("rope_type") or given.get("type") or "default")
    return {"theta": float(theta), "type": kind, "factor": float(given.get("factor") or 1), "partial": float(partial or 1)}


def save_key_scales(
    path: str | os.PathLike[str], scales: Mapping[int, torch.Tensor], config: Any, *, source: str, text: bytes | None = None
) -> None:
    """Write scales of a model to a safetensors file.

    Args:
        path: the file; one named "turboquant.safetensors" in a model's folder is found there.
        scales: layer -> float32 ``[H_kv, D]``.
        config: of the model.
        source: in words, what they were measured from.
        text: what they were measured from; None: the weights.

    Raises:
        OSError: the file cannot be written; what stood at ``path`` before stands there still.
    """
    from turboquant_vllm import __version__

    identity = json.dumps(model_identity(config), sort_keys=True)
    metadata = {
        "format": _FORMAT,
        "turboquant_vllm": __version__,
        "revision": str(getattr(config, "_commit_hash", None) or ""),
        "source": source,
        "text_sha256": "weights" if text is None else hashlib.sha256(text).hexdigest(),
        "model": identity,
        "model_sha256": hashlib.sha256(identity.encode()).hexdigest(),
    }
    write_tensors(path, {f"layers.{layer}.key_scales": w.float() for layer, w in scales.items()}, metadata)


def load_key_scales(path: str | os.PathLike[str], config: Any) -> dict[int, torch.Tensor]:
    """Scales of a file of :func:`save_key_scales`: layer -> float32 ``[H_kv, D]``, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file, another version, a wrong checksum, the scales of another model than that of ``config``, or
            scales that are not finite and positive.
    """
    tensors, metadata = read_tensors(path, _FORMAT)
    expected = model_identity(config)
    digest = hashlib.sha256(json.dumps(expected, sort_keys=True).encode()).hexdigest()
    if metadata.get("model_sha256") != digest:
        raise ValueError(f"{path}: expected scales of this model, got those of another: {_differences(expected, metadata)}")
    scales = {}
    for name, w in tensors.items():
        parts = name.split(".")
        if len(parts) != 3 or (parts[0], parts[2]) != ("layers", "key_scales") or not parts[1].isdecimal():
            raise ValueError(f"{path}: expected tensors layers.N.key_scales, got {name}")
        if w.dtype != torch.float32 or w.dim() != 2:
            raise ValueError(f"{path}: expected {name} float32 [kv heads, head_dim], got {w.dtype} {list(w.shape)}")
        if not bool((w.isfinite() & (w > 0)).all()):
            raise ValueError(f"{path}: expected {name} to be finite and positive")
        scales[int(parts[1])] = w
    return dict(sorted(scales.items()))


def _differences(expected: dict[str, Any], metadata: Mapping[str, str]) -> str:
    try:
        got = dict(json.loads(metadata["model"]))
    except (KeyError, TypeError, ValueError):
        return "the file does not say which"
    names = [name for name in expected if got.get(name) != expected[name]]
    return "; ".join(f"{name}: expected {expected[name]}, got {got.get(name)}" for name in names) or "of another layout"


def find_key_scales(folder: str | os.PathLike[str], config: Any) -> dict[int, torch.Tensor] | None:
    """Scales of the file "turboquant.safetensors" in a model's folder; None where there is none.

    Raises:
        ValueError: as :func:`load_key_scales`.
    """
    path = Path(folder) / FILE_NAME
    return load_key_scales(path, config) if path.is_file() else None
