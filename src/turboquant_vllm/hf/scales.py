"""Which channel scales the keys of a cache get: those given, those of a file beside the model, or what its weights say."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from turboquant_vllm.calibration import FILE_NAME, find_key_scales, load_key_scales
from turboquant_vllm.hf.calibration import key_scales_from_model
from turboquant_vllm.weights import key_scales_from_safetensors

__all__ = ["KeyScales", "key_scales_for", "model_folder", "split_model"]

KeyScales = Mapping[int, torch.Tensor] | str | os.PathLike[str]

_log = logging.getLogger(__name__)
_of_models: WeakKeyDictionary[Any, Mapping[int, torch.Tensor]] = WeakKeyDictionary()
_of_folders: dict[tuple[str, int], Mapping[int, torch.Tensor]] = {}


def split_model(config: Any) -> tuple[Any, Any]:
    """The configuration, and the model or None, of either."""
    if isinstance(config, torch.nn.Module) and hasattr(config, "config"):
        return config.config, config
    return config, None


def key_scales_for(config: Any, model: Any, given: KeyScales | None) -> Mapping[int, torch.Tensor]:
    """Scales ``[H_kv, D]`` by layer; layers without have ones.

    Args:
        config: of the model.
        model: whose weights may be read, or None.
        given: scales by layer, or the path of a file of ``turboquant calibrate``. None: those of "turboquant.safetensors" in
            the folder that the model came from, else what follows from the weights of ``model`` or of that folder, else ones,
            which the log says. Weights are read once.

    Raises:
        FileNotFoundError, ValueError: the file is none, or another model's; scales are not finite and positive.
    """
    if isinstance(given, Mapping):
        for layer, w in given.items():
            if not bool((w.isfinite() & (w > 0)).all()):
                raise ValueError(f"key_scales must be positive and finite, got others for layer {layer}")
        return given
    if given is not None:
        return load_key_scales(given, config)
    folder = model_folder(config)
    found = None if folder is None else find_key_scales(folder, config)
    if found is not None:
        return found
    if model is not None:
        if model not in _of_models:
            _of_models[model] = key_scales_from_model(model)
        return _of_models[model]
    if folder is not None and any(folder.glob("*.safetensors")):
        key = (str(folder), max(file.stat().st_mtime_ns for file in folder.glob("*.safetensors")))
        if key not in _of_folders:
            _of_folders[key] = key_scales_from_safetensors(folder, config)
        return _of_folders[key]
    _say_ones(str(getattr(config, "model_type", "")))
    return {}


@lru_cache(maxsize=64)
def _say_ones(kind: str) -> None:
    _log.warning(
        "keys of this %s model have scales of one, for its weights are not at hand: pass the model instead of its config, "
        'or a file of "turboquant calibrate" as key_scales (%s in the model\'s folder is found)', kind, FILE_NAME,
    )  # fmt: skip


def model_folder(config: Any) -> Path | None:
    """Where the model came from, if that is on this machine."""
    name = getattr(config, "_name_or_path", None)
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=getattr(config, "_commit_hash", None))
    except HFValidationError:  # not the name of a model
        return None
    return Path(found).parent if isinstance(found, str) else None
