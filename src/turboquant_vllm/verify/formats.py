"""The cache formats that `turboquant verify` compares: one row of its table each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

__all__ = ["CacheFormat", "choose_formats", "known_formats"]

_NORM_BYTES = 4  # float32


@dataclass(frozen=True)
class CacheFormat:
    """A format that a model's cache may be kept in.

    Attributes:
        name: of the format in files and behind ``--format``.
        title: of its row in the table.
        make: a fresh cache for transformers, from the model's configuration and the layers to leave exact. Every token that a
            query sees in it, its own and those of the same call among them, is as the format returns it.
        key_bytes, value_bytes: bytes that a key, or a value, of so many coordinates takes, its part of what a group shares
            included.
    """

    name: str
    title: str
    make: Callable[[Any, Collection[int]], Any]
    key_bytes: Callable[[int], float]
    value_bytes: Callable[[int], float]


def known_formats(seed: int = 0) -> list[CacheFormat]:
    """All formats, with rotations of ``seed``; the first is the one that layers' shapes are checked for."""
    return [CacheFormat("plain", "TQ4", partial(_plain, seed), _codes_and_norm, _codes_and_norm)]


def choose_formats(formats: Sequence[CacheFormat], names: Iterable[str]) -> list[CacheFormat]:
    """Those of ``formats`` that are named, in the order of ``formats``; all of them where none is named.

    Raises:
        ValueError: there is no format of such a name.
    """
    named = set(names)
    if unknown := sorted(named - {known.name for known in formats}):
        raise ValueError(f"format: expected some of {', '.join(known.name for known in formats)}, got {unknown[0]}")
    return [known for known in formats if not named or known.name in named]


def _plain(seed: int, config: Any, dense: Collection[int]) -> Any:
    from turboquant_vllm.hf import TurboQuantCache

    return TurboQuantCache(config, seed=seed, skip_layers=dense, exact_prefill=False)


def _codes_and_norm(head_dim: int) -> int:
    return head_dim // 2 + _NORM_BYTES
