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
        key_offsets: keys are kept around offsets that groups of 64 tokens share, as in ``TurboQuantCache``.
        key_scales: with offsets, the file of the model's key scales (:mod:`turboquant_vllm.calibration`). None: the file
            "turboquant.safetensors" in the model's folder, or where there is none the model's weights.
    """

    exact_prefill: bool = True
    key_offsets: bool = True
    key_scales: str | None = None

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
        if "dense_layers" in values:
            raise ValueError(
                "additional_config['turboquant'] must not have dense_layers: vLLM leaves layers dense by --kv-cache-dtype tq4 "
                f"--kv-cache-dtype-skip-layers and their numbers, got {values['dense_layers']!r}"
            )
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ValueError(f"additional_config['turboquant'] may have {', '.join(names)}, got {', '.join(unknown)}")
        for name in ("exact_prefill", "key_offsets"):
            if not isinstance(values.get(name, True), bool):
                raise TypeError(f"{name} must be true or false, got {values[name]!r}")
        path = values.get("key_scales")
        if not isinstance(path, str | None):
            raise TypeError(f"key_scales must be the path of a file, got {path!r}")
        if path is not None and not values.get("key_offsets", True):
            raise ValueError("key_scales must come with key_offsets true, got false")
        return cls(**values)
