"""Settings from environment variables."""

from __future__ import annotations

import os

__all__ = ["checks_contents"]

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def checks_contents() -> bool:
    """Whether the contents of index tensors are checked, which waits for the device: ``TURBOQUANT_DEBUG``, read at each call.

    Raises:
        ValueError: the variable is neither true nor false.
    """
    return _flag("TURBOQUANT_DEBUG")


def _flag(name: str) -> bool:
    value = os.environ.get(name, "")
    if (lower := value.strip().lower()) not in _TRUE + _FALSE:
        raise ValueError(f"the environment variable {name} must be 1, true, yes, on, 0, false, no or off, got {value!r}")
    return lower in _TRUE
