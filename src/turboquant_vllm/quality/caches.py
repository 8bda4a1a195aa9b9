"""The cache formats that `turboquant verify` compares: one row of its table each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.calibration import FILE_NAME
from turboquant_vllm.records import GROUP

__all__ = ["WEIGHTS", "CacheFormat", "KeyScales", "choose_formats", "known_formats"]

_NORM = 4  # bytes, float32
_STEPS = 4 * 4  # bytes of a group, float32
WEIGHTS = "weights"  # where scales are from that no file has


@dataclass(frozen=True)
class CacheFormat:
    """A format that a model's cache may be kept in.

    Attributes:
        name: of the format in files and behind ``--format``.
        title: of its row in the table.
        make: a fresh cache for transformers, from a model and the layers to leave exact. Every token that a query sees in it,
            its own and those of the same call among them, is as the format returns it.
        key_bytes, value_bytes: bytes that a key, or a value, of so many coordinates takes, its part of what a group shares
            included.
        call: Python that makes such a cache of ``model``, from the layers to leave exact; None: not known.
        key_scales: those it has, if any.
    """

    name: str
    title: str
    make: Callable[[Any, Collection[int]], Any]
    key_bytes: Callable[[int], float]
    value_bytes: Callable[[int], float]
    call: Callable[[Collection[int]], str] | None = None
    key_scales: KeyScales | None = None


class KeyScales:
    """Key scales of a model as its caches would have them: of a file, else of one in the model's folder, else of its weights.

    Args:
        path: of a file of `turboquant calibrate`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._found: tuple[Any, Mapping[int, torch.Tensor], str] | None = None

    def of(self, model: Any) -> Mapping[int, torch.Tensor]:
        """Layer -> ``[H_kv, D]``, looked up once for a model.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else, or scales of another model.
        """
        return self._look_up(model)[0]

    def source(self, model: Any) -> str:
        """Where they are from: the path of a file, or "weights"."""
        return self._look_up(model)[1]

    def _look_up(self, model: Any) -> tuple[Mapping[int, torch.Tensor], str]:
        if self._found is None or self._found[0] is not model:
            from turboquant_vllm.hf.scales import key_scales_for, model_folder

            folder, path = model_folder(model.config), self.path
            if path is None and folder is not None and (folder / FILE_NAME).is_file():
                path = folder / FILE_NAME
            found = key_scales_for(model.config, model, path)
            self._found = model, found, WEIGHTS if path is None else str(path)
        return self._found[1:]


def known_formats(seed: int = 0, key_scales: KeyScales | None = None) -> list[CacheFormat]:
    """All formats, with rotations of ``seed``; ``key_scales`` are those of the format that has any."""
    scales = KeyScales() if key_scales is None else key_scales
    # Options are named where the cache's defaults are the same, so that a row stays what it is if they change.
    return [
        _packed("plain", "TQ4", seed, _codes_and_norm, {"key_offsets": False}),
        _packed("offsets", "TQ4, offsets", seed, _with_group, {"key_offsets": True, "key_scales": {}}),
        _packed("tq4", "TQ4, offsets and scales", seed, _with_group, {"key_offsets": True}, scales),
    ]


def choose_formats(known: Sequence[CacheFormat], wanted: Collection[str] | Sequence[CacheFormat]) -> list[CacheFormat]:
    """The known formats whose names are wanted, in the order of the known ones, all if none is; formats are taken as they are.

    Raises:
        ValueError: there is no format of such a name.
    """
    others = [given for given in wanted if isinstance(given, CacheFormat)]
    names = {given for given in wanted if isinstance(given, str)}
    if unknown := sorted(names - {one.name for one in known}):
        raise ValueError(f"format: expected some of {', '.join(one.name for one in known)}, got {unknown[0]}")
    return others + [one for one in known if one.name in names or not wanted]


def _packed(
    name: str,
    title: str,
    seed: int,
    key_bytes: Callable[[int], float],
    options: Mapping[str, Any],
    scales: KeyScales | None = None,
) -> CacheFormat:
    """What `TurboQuantCache` with these options and scales is."""

    def make(model: Any, dense: Collection[int]) -> Any:
        from turboquant_vllm.hf import TurboQuantCache

        given = options if scales is None else {**options, "key_scales": scales.of(model)}
        return TurboQuantCache(model.config, seed=seed, skip_layers=dense, exact_prefill=False, **given)

    def call(dense: Collection[int]) -> str:
        # Without a path the cache finds the same scales: it is given the model, not its configuration.
        path = {"key_scales": str(scales.path)} if scales is not None and scales.path is not None else {}
        given = {**options, **path, **({"seed": seed} if seed else {}), **({"skip_layers": sorted(dense)} if dense else {})}
        return f"TurboQuantCache(model, {', '.join(f'{option}={value!r}' for option, value in given.items())})"

    return CacheFormat(name, title, make, key_bytes, _codes_and_norm, call, scales)


def _codes_and_norm(head_dim: int) -> int:
    return head_dim // 2 + _NORM


def _with_group(head_dim: int) -> float:
    return _codes_and_norm(head_dim) + (2 * head_dim + _STEPS) / GROUP  # offset and outlier in 8 bits
