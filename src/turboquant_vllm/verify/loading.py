"""Load a model to be verified, and find out what its cache holds; what cannot be verified is said in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from turboquant_vllm.demo.output import one_line
from turboquant_vllm.quality.attention import Model, cached_output, keeps_cache, no_loading_bar
from turboquant_vllm.quality.caches import CacheFormat

__all__ = ["CachedLayers", "Loaded", "check_cache", "check_name", "check_tokens", "load"]

_NEEDED = ("transformers", "tokenizers")
_POINTER = b"version https://git-lfs"
_SDPA = "scaled_dot_product_attention"  # what transformers' refusal of models without it names


class Loaded(NamedTuple):
    """A tokenizer, a causal language model, and the names of tensors that its files hold and the model has no place for."""

    tokenizer: Any
    model: Model
    unused: list[str]


def load(name: str, device: torch.device, *, trust_remote_code: bool = False) -> Loaded:
    """A model with "sdpa" attention, or "eager" where it has none, in float32 on a CPU, else in bfloat16.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such folder, or no such model on the hub or in its cache.
        ValueError: what is there is no causal language model, its files are damaged or do not fit its configuration, or it
            needs code of its own and ``trust_remote_code`` is not set.
    """
    if missing := [needed for needed in _NEEDED if importlib.util.find_spec(needed) is None]:
        raise ImportError(f"reading a model needs {', '.join(missing)}: pip install turboquant-vllm[hf]")
    from transformers import AutoTokenizer

    name = check_name(name)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            model, report = _load_model(name, dtype, trust_remote_code)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise FileNotFoundError(f"model: {one_line(error)}") from error
    except Exception as error:  # libraries for files and code of the model's own raise whatever they like
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ValueError(f"model: {name} brings code of its own; once you trust it: --trust-remote-code") from error
        raise ValueError(f"model: expected a causal language model, {name} gives {one_line(error)}") from error
    _check_report(name, report)
    return Loaded(tokenizer, model.to(device).eval(), sorted(report["unexpected_keys"]))


def check_name(name: str) -> str:
    """What transformers takes for a model that a user named: a folder with its files in it, or a name on the hub.

    Raises:
        FileNotFoundError: there is no such folder, or it has no configuration.
        ValueError: a file in it is none yet.
    """
    folder = Path(name).expanduser()
    looks_like_a_path = folder.is_absolute() or name.startswith(".") or name.count("/") != 1
    if folder.is_dir():
        _check_folder(folder, name)
        return str(folder)
    if looks_like_a_path:
        raise FileNotFoundError(f"model: expected a folder or the name of a model on the hub, found no {name}")
    return name


@dataclass
class CachedLayers:
    """What a model keeps of each token, by layer, as `TurboQuantCache` divides it.

    Attributes:
        packed: layers that can be kept in 4 bits -> heads, and coordinates of each head's key and value.
        dense: layers with keys and values that it keeps dense in any case -> numbers per token.
    """

    packed: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    dense: dict[int, int] = field(default_factory=dict)

    def bytes_per_token(self, cached: CacheFormat, exact: Collection[int]) -> float:
        """Bytes of a cache in a format where the layers ``exact``, and those that are dense in any case, are in bf16."""
        found = 2.0 * sum(self.dense.values())
        for layer, (heads, key_dim, value_dim) in self.packed.items():
            each = 2 * (key_dim + value_dim) if layer in exact else cached.key_bytes(key_dim) + cached.value_bytes(value_dim)
            found += heads * each
        return found


@torch.inference_mode()
def check_cache(model: Model, name: str, dense: Collection[int] = ()) -> CachedLayers:
    """What the model's layers keep, seen in a call of two tokens.

    Raises:
        ValueError: the model keeps no keys and values, `TurboQuantCache` would keep none of its layers in 4 bits, or refuse one
            that is not among the ``dense`` ones.
    """
    from transformers import DynamicCache

    from turboquant_vllm.hf.layers import expected_shapes
    from turboquant_vllm.hf.packing import why_dense

    found = CachedLayers()
    named = f"{name} ({type(model).__name__})"
    reasons = why_dense(model.config)
    if reasons and all(reasons):
        has = " and ".join(sorted(set(reasons)))
        raise ValueError(f"model: expected one whose cache can be kept in 4 bits, {named} has {has}")
    cache = DynamicCache(config=model.config)
    output = cached_output(model, torch.zeros((1, 2), dtype=torch.long, device=model.device), cache)
    for index, (layer, reason) in enumerate(zip(cache.layers, reasons, strict=True)):
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if key is None or value is None or not key.numel():
            continue
        if reason:
            found.dense[index] = sum(x.shape[1] * x.shape[-1] for x in (key, value))
            continue
        if index not in dense and (wrong := expected_shapes(key, value)):
            raise ValueError(f"layer {index}: expected {wrong}; leave it exact: --dense {index}")
        found.packed[index] = key.shape[1], key.shape[-1], value.shape[-1]
    if not found.packed or not keeps_cache(model, output):
        raise ValueError(f"model: expected one with a cache of keys and values, {named} keeps none")
    return found


def check_tokens(model: Model, ids: torch.Tensor) -> None:
    """Raise ValueError where the tokenizer knows more tokens than the model: a GPU would end with an assertion."""
    known = model.get_input_embeddings().weight.shape[0]
    if (largest := int(ids.max())) >= known:
        raise ValueError(f"tokenizer: expected tokens below {known:,}, the rows of the model's embedding, got {largest:,}")


def _load_model(name: str, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Model, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are in the report, which says more than transformers' error
    }
    try:
        found = AutoModelForCausalLM.from_pretrained(name, attn_implementation="sdpa", **options)
    except ValueError as error:
        if _SDPA not in str(error):
            raise
        found = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager", **options)
    model, report = found
    return model, report


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block transformers prints errors alone: no bars, no tables of keys."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_loading_bar():
            yield
    finally:
        logging.set_verbosity(before)


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model: expected a config.json in {name}, found none")
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".model", ".safetensors", ".bin") and file.is_file():
            with file.open("rb") as opened:
                if opened.read(len(_POINTER)) == _POINTER:
                    raise ValueError(f"model: expected the file itself, {file} is a pointer of git-lfs: git lfs pull")


def _check_report(name: str, report: dict[str, Any]) -> None:
    """transformers fills what it does not find with random numbers, and goes on."""
    if different := sorted(report["mismatched_keys"], key=str):
        key, in_file, in_model = different[0]
        shapes = f"{key} has {list(in_file)} in the file, {list(in_model)} in the model"
        raise ValueError(f"model: expected weights in the shapes of the configuration of {name}: {shapes}{_more(different)}")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"model: expected weights for every parameter, the files of {name} lack {missing[0]}{_more(missing)}")
    if errors := report.get("error_msgs"):
        raise ValueError(f"model: {str(errors[0]).splitlines()[0]}")


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
