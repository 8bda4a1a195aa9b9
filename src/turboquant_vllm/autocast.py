"""Arithmetic in the precision that it is written in, whatever ``torch.autocast`` a caller is in."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["without_autocast"]

P = ParamSpec("P")
T = TypeVar("T")


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` with autocast off on the device of its first argument: a tensor, or a tuple of such."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        first: Any = args[0]
        kind = (first if isinstance(first, torch.Tensor) else first[0]).device.type
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*args, **kwargs)

    return wrapper
