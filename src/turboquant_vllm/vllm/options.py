"""The plugin's own settings: ``--additional-config '{"turboquant": {"exact_prefill": false}}'``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Settings of the plugin.

    Attributes:
        exact_prefill: a prompt that is read in one step attends to its exact keys and values, as in ``TurboQuantCache``. With
            False every token sees every other in 4 bits: then neither chunks, prefix hits nor preemptions change what it sees.
    """

    exact_prefill: bool = True

    @classmethod
    def read(cls, additional_config: object) -> Options:
        """The options in vLLM's ``additional_config``.

        Raises:
            TypeError, ValueError: a name or a value that is no option; says which there are.
        """
        given = additional_config.get("turboquant", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise TypeError(f"additional_config['turboquant'] must be a dict of options, got {type(given).__name__}")
        values: dict[str, Any] = dict(given)
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"additional_config['turboquant'] may have {', '.join(names)}, got {', '.join(unknown)}")
        if not isinstance(values.get("exact_prefill", True), bool):
            raise TypeError(f"exact_prefill must be true or false, got {values['exact_prefill']!r}")
        return cls(**values)
