"""Tensors without elements: on the device "meta", or fake, which are made under a mode of PyTorch and belong to it alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["has_elements", "keep_real"]

P = ParamSpec("P")
T = TypeVar("T")


def has_elements(x: torch.Tensor) -> bool:
    """Whether a program may ask what ``x`` holds."""
    return type(x) is torch.Tensor and not x.is_meta


def keep_real(count: int | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """``functools.lru_cache(count)`` for functions that make tensors: fake ones are neither kept nor made of what was."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        kept = lru_cache(count)(function)

        @wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            is_real = type(torch.empty(0, device="cpu")) is torch.Tensor
            return (kept if is_real else function)(*args, **kwargs)  # type: ignore[arg-type]

        return wrapper

    return decorate
