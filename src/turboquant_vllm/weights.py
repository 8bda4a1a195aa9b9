"""Channel scales of keys from a model's weights alone.

The norm in front of a layer leaves each coordinate of a token with a mean square of about 1. So the mean square of channel i of
a query is about that of row i of q_proj, times the norm's gain, plus its bias squared; behind a norm of the query, times that
norm's gain squared. What RoPE and offsets make of it:

- RoPE turns two channels into one another. Over many positions, each gets half of both where it turns fast; where it turns
  slowly the two stay apart.
- Of a key, what all keys have in common is taken away with its group's offset, as far as RoPE does not turn it within a group.
  A bias is all common; of the rest about 0.8 of the square is (docs/calibration.md).
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from turboquant_vllm.calibration import FILE_NAME, channel_scales, kv_heads_of, model_identity
from turboquant_vllm.records import GROUP

__all__ = ["index_weights", "key_scales_from_safetensors", "key_scales_from_weights", "why_taken_for_weights"]

_log = logging.getLogger(__name__)

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_IN_COMMON = 0.8
_POSITIONS = 1024
_NAME = re.compile(
    r"(?P<stack>(?:.*\.)?layers\.)(?P<layer>\d+)\.(?P<rest>(?:self_attn|self_attention|attention|attn|\w*norm)\..+)"
)
_OTHER_STACKS = re.compile(r"vision|visual|audio|image|speech|talker|encoder|(^|\.)mtp\.")
# Norms of these multiply by 1 + weight.
_ONE_MORE = re.compile(r"gemma[23]?(_text)?$|t5gemma|vaultgemma|recurrent_gemma|qwen3_next|qwen3_5|step3p7")
# RoPE of these turns channels 2i and 2i + 1 into one another; that of all others i and i + D / 2.
_NEIGHBOURS = re.compile(r"cohere|ernie4_5|glm$|glm4$|glm4v|glm_ocr|helium|llama4|gptj|codegen|moonshine|blt")
_NO_KEYS = re.compile(r"linear|mamba|conv|recurrent|moe|mlp")  # types of layers without a cache of keys


class _UnknownError(Exception):
    """A layer whose weights are not understood; says why."""


class _Moments(NamedTuple):
    """Of channels before RoPE, float64 ``[heads, D]``: mean squares, and mean products with the channel that RoPE mixes in."""

    squares: torch.Tensor
    products: torch.Tensor

    def times(self, squares: torch.Tensor, products: torch.Tensor) -> _Moments:
        """Of channels multiplied by numbers with these squares, and products with their partner's."""
        return _Moments(self.squares * squares, self.products * products)


class _Rope(NamedTuple):
    """What RoPE does to each channel x of a head: it becomes x cos + sign y sin, y being the partner. ``[D]`` each."""

    kept: torch.Tensor  # mean of cos^2 over positions
    mixed: torch.Tensor  # mean of 2 sign cos sin
    common: torch.Tensor  # share of a constant's square that is left in the mean of a group
    partner: torch.Tensor  # int64

    def moments(self, vectors: torch.Tensor) -> _Moments:
        """Of channels ``[heads, D, n]`` that are these vectors times random directions."""
        return _Moments(vectors.square().sum(-1).double(), (vectors * vectors[:, self.partner]).sum(-1).double())

    def turned(self, of: _Moments) -> torch.Tensor:
        """Mean squares ``[heads, D]`` behind it."""
        return self.kept * of.squares + (1 - self.kept) * of.squares[:, self.partner] + self.mixed * of.products


def key_scales_from_weights(names: Iterable[str], get: Callable[[str], torch.Tensor], config: Any) -> dict[int, torch.Tensor]:
    """Scales of the layers that have keys; ones where names or shapes are not known, and then the log says where and why.

    Args:
        names: of all tensors of the model.
        get: the tensor of such a name.
        config: of the model.

    Returns:
        Layer -> float32 ``[H_kv, D]``, on the CPU. Empty for models with multi-head latent attention.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(text, "kv_lora_rank", None) is not None:
        return {}
    identity = model_identity(text)
    count = identity["num_hidden_layers"]
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * count
    layers = _by_layer(names, count)
    scales: dict[int, torch.Tensor] = {}
    unknown: dict[str, list[int]] = {}
    for layer in range(count - (getattr(text, "num_kv_shared_layers", None) or 0)):
        if _NO_KEYS.search(kinds[layer]):
            continue
        rope, own = identity["rope"], kv_heads_of(text, layer)
        try:
            scales[layer] = _Layer(layers.get(layer, {}), get, {**identity, **own}).scales(rope.get(kinds[layer], rope))
        except _UnknownError as error:
            scales[layer] = torch.ones(own["num_key_value_heads"], own["head_dim"])
            unknown.setdefault(str(error), []).append(layer)
    for reason, numbers in unknown.items():
        which = f"all {count} layers" if len(numbers) == count else f"layers {', '.join(map(str, numbers))}"
        advice = "`turboquant calibrate MODEL` measures them from a text"
        _log.warning("no channel scales for the keys of %s: %s; %s", which, reason, advice)
    return scales


def key_scales_from_safetensors(folder: str | os.PathLike[str], config: Any) -> dict[int, torch.Tensor]:
    """:func:`key_scales_from_weights` of the safetensors files in a model's folder, of which only what is needed is read.

    Raises:
        FileNotFoundError: the folder has no safetensors file of weights.
        ValueError: one is damaged, or misses a tensor that the index has.
    """
    folder = Path(folder)
    index = folder / _INDEX
    try:
        with ExitStack() as stack:
            where: dict[str, Any] = {}
            for path in _files(folder, index):
                file = stack.enter_context(safe_open(path, framework="pt"))
                where.update(dict.fromkeys(file.keys(), file))
            return key_scales_from_weights(where, lambda name: where[name].get_tensor(name), config)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: expected the safetensors files of a model, got {type(error).__name__}: {error}") from error


def index_weights(folder: str | os.PathLike[str]) -> None:
    """Write "model.safetensors.index.json" where a model's weights are in one file and the folder has no index.

    A loader that reads every safetensors file of a folder, as vLLM's does, then leaves that of the scales alone.

    Raises:
        OSError: the file cannot be written.
    """
    whole, index = Path(folder) / _WHOLE, Path(folder) / _INDEX
    if index.exists() or not whole.is_file():
        return
    with safe_open(whole, framework="pt") as file:
        names = list(file.keys())
    content = {"metadata": {"total_size": whole.stat().st_size}, "weight_map": dict.fromkeys(names, whole.name)}
    partial = index.with_name(f".{index.name}.{uuid.uuid4().hex}")
    try:
        partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
        os.replace(partial, index)
    finally:
        partial.unlink(missing_ok=True)


def why_taken_for_weights(folder: str | os.PathLike[str]) -> str:
    """Why a loader that reads all safetensors files of a folder would take that of the scales for weights; or empty."""
    folder = Path(folder)
    if not (folder / FILE_NAME).is_file() or (folder / _INDEX).is_file() or not (folder / _WHOLE).is_file():
        return ""
    return f"{folder / FILE_NAME} stands beside {_WHOLE} without a {_INDEX} to tell them apart"


def _files(folder: Path, index: Path) -> list[Path]:
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    found = sorted(path for path in folder.glob("*.safetensors") if path.name != FILE_NAME)
    whole = [path for path in found if path.name == _WHOLE]  # others may be copies, such as "consolidated"
    if not found:
        raise FileNotFoundError(f"{folder}: expected safetensors files of a model, found none")
    return whole or found


def _by_layer(names: Iterable[str], count: int) -> dict[int, dict[str, str]]:
    """Layer -> what follows its number in a name -> the name; of the decoder's stack among those that the model has."""
    stacks: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        if found := _NAME.fullmatch(name):
            stacks.setdefault(found["stack"], {}).setdefault(int(found["layer"]), {})[found["rest"]] = name
    own = {stack: layers for stack, layers in stacks.items() if not _OTHER_STACKS.search(stack)}
    fitting = {stack: layers for stack, layers in own.items() if max(layers) + 1 == count} or own
    return fitting[min(fitting, key=len)] if fitting else {}


class _Layer:
    """One layer's tensors, found by the ends of their names."""

    def __init__(self, names: Mapping[str, str], get: Callable[[str], torch.Tensor], identity: Mapping[str, Any]) -> None:
        self._names, self._get = names, get
        parts = [(*name.split(".", 1), full) for name, full in names.items()]
        self._parts = {end: full for module, end, full in parts if "norm" not in module}
        self._kind: str = identity["model_type"]
        self._one = 1.0 if _ONE_MORE.match(self._kind) else 0.0
        self._heads: int = identity["num_attention_heads"]
        self._kv_heads: int = identity["num_key_value_heads"]
        self._dim: int = identity["head_dim"]

    def scales(self, rope: Mapping[str, Any]) -> torch.Tensor:
        """``[H_kv, D]``."""
        turn = _rope(rope, self._dim, _NEIGHBOURS.match(self._kind) is not None)
        rest, bias = self._moments(0, turn)
        query = (turn.turned(rest) + turn.turned(bias)).unflatten(0, (self._kv_heads, -1)).mean(1)
        rest, bias = self._moments(1, turn)
        key = turn.turned(rest) * (1 - _IN_COMMON * turn.common) + turn.turned(bias) * (1 - turn.common)
        return channel_scales(query.clamp_min(0), key.clamp_min(0))

    def _moments(self, which: int, turn: _Rope) -> tuple[_Moments, _Moments]:
        """Of queries (0) or keys (1) before RoPE: what differs from token to token, and the bias."""
        short, long, heads = ("q", "query", self._heads) if which == 0 else ("k", "key", self._kv_heads)
        norm = self._tensor(f"{short}_norm.weight", f"{short}_layernorm.weight", f"{long}_layernorm.weight")
        try:
            rest, bias = self._projected(which, heads, turn)
        except _UnknownError:
            if norm is None:
                raise
            ones = torch.ones(heads, self._dim, dtype=torch.float64)
            rest, bias = _Moments(ones, 0 * ones), _Moments(0 * ones, 0 * ones)
        if norm is not None and norm.numel() in (self._dim, heads * self._dim):
            if norm.numel() == self._dim:  # each head has a norm of its own
                less = 1 / (rest.squares + bias.squares).mean(-1, keepdim=True).clamp_min(1e-30)
                rest, bias = rest.times(less, less), bias.times(less, less)
            gains = turn.moments((self._one + norm.float()).reshape(-1, self._dim, 1).cpu())
            rest, bias = rest.times(*gains), bias.times(*gains)
        return rest, bias

    def _projected(self, which: int, heads: int, turn: _Rope) -> tuple[_Moments, _Moments]:
        """As :meth:`_moments`, in front of a norm of queries and keys."""
        weight, bias = self._projection(which, heads)
        gain = self._tensor("input_layernorm.weight", of_layer=True)
        if gain is not None and gain.numel() == weight.shape[1]:
            weight = weight * (self._one + gain.to(weight))
        bias = torch.zeros(len(weight)) if bias is None else bias.float().cpu()
        rest = turn.moments(weight.view(heads, self._dim, -1))
        return _Moments(rest.squares.cpu(), rest.products.cpu()), turn.moments(bias.view(heads, self._dim, 1))

    def _projection(self, which: int, heads: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight ``[heads * D, hidden]`` in float32 and bias ``[heads * D]``."""
        rows, start = heads * self._dim, which * self._heads * self._dim
        every = (self._heads + 2 * self._kv_heads) * self._dim
        for name in ("q_proj", "k_proj")[which], "qkv_proj", "query_key_value":
            weight, bias = self._matrix(name), self._tensor(f"{name}.bias")
            if weight is None:
                continue
            parts = [weight] if bias is None else [weight, bias]
            if name == "query_key_value" and self._kind == "gpt_neox":  # of each head, query, key and value
                parts = [x.unflatten(0, (self._heads, 3, self._dim))[:, which].flatten(0, 1) for x in parts]
            elif name == "qkv_proj" and len(weight) == every:
                parts = [x[start : start + rows] for x in parts]
            elif which == 0 and name == "q_proj" and len(weight) == 2 * rows:  # of each head, query and gate
                parts = [x.unflatten(0, (heads, 2, self._dim))[:, 0].flatten(0, 1) for x in parts]
            elif len(weight) != rows or name == "query_key_value":
                raise _UnknownError(f"expected {name} of {rows} rows, got {len(weight)}")
            return parts[0], None if bias is None else parts[1]
        raise _UnknownError("expected q_proj and k_proj, or qkv_proj, among the weights, found none that can be read")

    def _matrix(self, name: str) -> torch.Tensor | None:
        """A weight in float32, with its scales where it is fp8."""
        weight = self._tensor(f"{name}.weight")
        if weight is None or weight.dim() != 2:
            return None
        found = weight.float()
        if weight.dtype.itemsize > 1:
            return found
        scale = self._tensor(f"{name}.weight_scale_inv", f"{name}.weight_scale")
        if scale is None or scale.numel() == 1:
            return found
        scale = scale.float().reshape(scale.shape[0], -1)
        for axis in (0, 1):  # one for each row, or for each block
            scale = scale.repeat_interleave(-(-found.shape[axis] // scale.shape[axis]), axis).narrow(axis, 0, found.shape[axis])
        return found * scale

    def _tensor(self, *ends: str, of_layer: bool = False) -> torch.Tensor | None:
        """The first that exists, of the layer or of its attention, if its numbers can be read."""
        names = self._names if of_layer else self._parts
        for end in ends:
            if end in names:
                found = self._get(names[end]).detach()
                return found if found.is_floating_point() and not found.is_meta else None
        return None


def _rope(rope: Mapping[str, Any], dim: int, neighbours: bool) -> _Rope:
    """What RoPE does to ``dim`` channels; no rope leaves all as they are. Scaled ones turn low frequencies slower still."""
    proportional = rope.get("type") == "proportional"
    width = 0 if not rope else dim if proportional else int(dim * rope["partial"]) // 2 * 2
    angles = torch.zeros(dim // 2, dtype=torch.float64)
    if width:
        angles[: width // 2] = rope["theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        if proportional:  # the same frequencies, but the last do not turn
            angles[int(dim * rope["partial"]) // 2 :] = 0
    turns = torch.arange(_POSITIONS)[:, None] * angles
    kept, mixed = turns.cos().square().mean(0), (2 * turns).sin().mean(0)
    turns = turns[:GROUP]
    common = turns.cos().mean(0).square() + turns.sin().mean(0).square()
    sign, partner = torch.ones(dim), torch.arange(dim)
    if neighbours:
        pair = torch.arange(dim) // 2
        sign[:width:2] = -1
        partner[:width] = torch.arange(width).view(-1, 2).flip(1).flatten()
    else:
        pair = torch.arange(dim) % max(width // 2, 1)
        pair[width:] = torch.arange(width // 2, dim // 2).repeat(2)
        sign[: width // 2] = -1
        partner[:width] = torch.arange(width).roll(width // 2)
    return _Rope(kept[pair], sign * mixed[pair], common[pair], partner)
