"""Load a model to be verified, and find out what its cache holds; what cannot be verified is said in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.quality.attention import Model, cache_format, no_loading_bar

__all__ = ["check_cache", "load"]

_NEEDED = ("transformers", "tokenizers")


def load(name: str, device: torch.device) -> tuple[Any, Model]:
    """Tokenizer and causal language model with "sdpa" attention: float32 on a CPU, else bfloat16.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such folder, or no such model on the hub or in its cache.
        ValueError: what is there is no causal language model that runs with "sdpa".
    """
    if missing := [needed for needed in _NEEDED if importlib.util.find_spec(needed) is None]:
        raise ImportError(f"verify needs {', '.join(missing)}: pip install turboquant-vllm[hf]")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(name).expanduser()
    looks_like_a_path = folder.is_absolute() or name.startswith(".") or name.count("/") != 1
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model: expected a config.json in {name}, found none")
        name = str(folder)
    elif looks_like_a_path:
        raise FileNotFoundError(f"model: expected a folder or the name of a model on the hub, found no {name}")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with no_loading_bar():
            model: Model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
    except OSError as error:
        raise FileNotFoundError(f"model: {_first_line(error)}") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"model: expected a causal language model that runs with sdpa, got {_first_line(error)}") from error
    return tokenizer, model.to(device).eval()


@torch.inference_mode()
def check_cache(model: Model, name: str, dense: Collection[int] = ()) -> dict[int, tuple[int, int]]:
    """Layers with a cache of keys and values -> elements per token, and bytes per token in TQ4.

    Raises:
        ValueError: the model keeps no such cache, or one that `TurboQuantCache` would not keep in 4 bits, in a layer that is
            not among the ``dense`` ones.
    """
    from turboquant_vllm.hf import CACHE_ARGUMENT
    from turboquant_vllm.hf.cache import stays_dense
    from turboquant_vllm.hf.layers import expected_shapes

    found: dict[int, tuple[int, int]] = {}
    named = f"{name} ({type(model).__name__})"
    if stays_dense(model.config):
        raise ValueError(f"model: expected one whose cache can be kept in 4 bits, {named} has multi-head latent attention")

    def look(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in dense and (wrong := expected_shapes(key, value)):
            raise ValueError(f"layer {layer}: expected {wrong}; leave it exact: --dense {layer}")
        elements, packed = 0, 0
        for x in (key, value):
            elements += x.shape[1] * x.shape[-1]
            packed += x.shape[1] * (x.shape[-1] // 2 + torch.float32.itemsize)
        found[layer] = elements, packed
        return key, value

    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    with cache_format(model, look):
        output = model(ids, use_cache=True)
    if not found or getattr(output, CACHE_ARGUMENT, None) is None:
        raise ValueError(f"model: expected one with a cache of keys and values, {named} keeps none")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
