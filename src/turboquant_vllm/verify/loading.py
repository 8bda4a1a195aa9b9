"""Load a model to be verified, and find out what its cache holds; what cannot be verified is said in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.quality.attention import Model, cache_format, no_loading_bar

__all__ = ["CachedLayers", "check_cache", "load"]

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


@dataclass
class CachedLayers:
    """What a model keeps of each token, by layer, as `TurboQuantCache` divides it.

    Attributes:
        packed: layers that can be kept in 4 bits -> elements per token, and bytes per token in TQ4.
        dense: layers with keys and values that it keeps dense in any case -> elements per token.
        shared: layers that read the keys and values of another -> that other.
    """

    packed: dict[int, tuple[int, int]] = field(default_factory=dict)
    dense: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)

    def exact(self, chosen: Collection[int]) -> frozenset[int]:
        """The layers that attend to exact keys and values where the caches of the ``chosen`` ones are exact."""
        kept = {*chosen, *self.dense}
        return frozenset(kept | {layer for layer, source in self.shared.items() if source in kept})

    def bytes_per_token(self, chosen: Collection[int]) -> int:
        """Bytes where the caches of the ``chosen`` layers are exact, in bf16."""
        dense = sum(2 * elements for elements in self.dense.values())
        return dense + sum(2 * elements if layer in chosen else tq4 for layer, (elements, tq4) in self.packed.items())


@torch.inference_mode()
def check_cache(model: Model, name: str, dense: Collection[int] = ()) -> CachedLayers:
    """What the model's layers keep, seen in a call of two tokens.

    Raises:
        ValueError: the model keeps no keys and values, `TurboQuantCache` would keep none of its layers in 4 bits, or refuse one
            that is not among the ``dense`` ones.
    """
    from turboquant_vllm.hf import CACHE_ARGUMENT
    from turboquant_vllm.hf.layers import expected_shapes
    from turboquant_vllm.hf.packing import SHARED, why_dense

    found = CachedLayers()
    owners: dict[int, tuple[int, torch.Tensor]] = {}
    named = f"{name} ({type(model).__name__})"
    reasons = dict(enumerate(why_dense(model.config)))
    if reasons and all(reasons.values()):
        has = " and ".join(sorted(set(reasons.values())))
        raise ValueError(f"model: expected one whose cache can be kept in 4 bits, {named} has {has}")

    def look(layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        reason = reasons.get(layer, SHARED)  # releases before 5.24 have no layers for those that share
        if reason == SHARED:
            if key.data_ptr() not in owners:
                raise ValueError(f"layer {layer}: expected the keys and values of another layer, as they are there, got others")
            found.shared[layer] = owners[key.data_ptr()][0]
            return key, value
        owners[key.data_ptr()] = layer, key  # which keeps the memory from being used again
        elements = sum(x.shape[1] * x.shape[-1] for x in (key, value))
        if reason:
            found.dense[layer] = elements
            return key, value
        if layer not in dense and (wrong := expected_shapes(key, value)):
            raise ValueError(f"layer {layer}: expected {wrong}; leave it exact: --dense {layer}")
        found.packed[layer] = elements, sum(x.shape[1] * (x.shape[-1] // 2 + torch.float32.itemsize) for x in (key, value))
        return key, value

    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    with cache_format(model, look):
        output = model(ids, use_cache=True)
    if not found.packed or getattr(output, CACHE_ARGUMENT, None) is None:
        raise ValueError(f"model: expected one with a cache of keys and values, {named} keeps none")
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
