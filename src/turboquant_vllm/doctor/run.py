"""What the installed packages and the device at hand make of a model's layers, as figures for a report or for JSON."""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from turboquant_vllm import ops
from turboquant_vllm.attention import choose_backend, why_not
from turboquant_vllm.calibration import FILE_NAME, find_key_scales
from turboquant_vllm.checks import AttentionShape
from turboquant_vllm.demo.output import one_line
from turboquant_vllm.doctor.layers import Found, Layer, find_layers
from turboquant_vllm.limits import why_not_decode_pages, why_not_store, why_not_store_triton
from turboquant_vllm.paged import chunk_bytes
from turboquant_vllm.records import GROUP
from turboquant_vllm.verify.loading import check_name
from turboquant_vllm.vllm import why_not_layer

__all__ = ["run_doctor"]

_PACKAGES = ("torch", "triton", "transformers", "vllm", "cuda-core")
_NEEDED = ("torch", "transformers")
_DRIVER = Path("/proc/driver/nvidia/version")
_ALIBI = ("bloom", "mpt")  # models whose scores always have a bias by distance


def run_doctor(model: str, *, device: str = "auto", trust_remote_code: bool = False) -> dict[str, Any]:
    """What will be served in 4 bits of a model, by transformers and by vLLM.

    Args:
        model: folder of a Hugging Face model, or its name on the hub; its configuration is read, its weights are not.
        device: "auto", "cpu" or "cuda".
        trust_remote_code: run code that comes with the model.

    Returns:
        ``packages``: of each the version, what is expected and whether it fits; ``device``; ``layers``: groups of equal layers
        and what becomes of them; ``others``: layers without keys and values of their own; ``refused``; ``vllm``;
        ``bytes_per_token``; ``key_scales``; ``served``: whether anything is kept in 4 bits, and nothing that is installed
        stands against it.

    Raises:
        ImportError: transformers is missing.
        OSError: there is no such model.
        ValueError: it is no causal language model.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("reading a model needs transformers: pip install turboquant-vllm[hf]")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(check_name(model), trust_remote_code=trust_remote_code)
    found = find_layers(config, trust_remote_code=trust_remote_code)
    where = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)
    packages = [_package(name) for name in _PACKAGES]
    against_vllm = _why_not_vllm(config, found)
    groups: dict[Layer, list[int]] = defaultdict(list)
    for index, layer in found.layers.items():
        groups[layer].append(index)
    layers = [_describe(layer, numbers, where, found.refused, against_vllm) for layer, numbers in groups.items()]
    fits = all(package["fits"] for package in packages if package["name"] in _NEEDED)
    return {
        "model": model,
        "architecture": (getattr(config, "architectures", None) or [type(config).__name__])[0],
        "seen_by": found.source,
        "packages": packages,
        "device": _device(where),
        "layers": layers,
        "others": found.others,
        "refused": found.refused,
        "vllm": against_vllm,
        "bytes_per_token": _bytes(found),
        "key_scales": _key_scales(model, config),
        "served": fits and any(group["transformers"]["bits"] == 4 for group in layers),
    }


def _package(name: str) -> dict[str, Any]:
    """A package's version and whether this library's requirements allow it; a missing one fits if it is not needed."""
    wanted = ""
    for line in metadata.requires("turboquant-vllm") or ():
        requirement = Requirement(line)
        if requirement.name == name:
            wanted = str(requirement.specifier)
            specifier = requirement.specifier
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return {"name": name, "version": None, "expected": wanted, "fits": name not in _NEEDED}
    return {
        "name": name,
        "version": version,
        "expected": wanted,
        "fits": not wanted or specifier.contains(version, prereleases=True),
    }


def _device(device: torch.device) -> dict[str, Any]:
    """Its name, and on NVIDIA's the driver and why the native kernels do not run."""
    if device.type == "cpu":
        return {"device": "cpu", "name": "CPU", "native": ops.why_not_cuda(device)}
    driver = re.search(r"Kernel Module\D+([\d.]+)", _DRIVER.read_text()) if _DRIVER.exists() else None
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "name": f"{properties.name}, compute capability {properties.major}.{properties.minor}",
        "driver": driver[1] if driver else None,
        "native": ops.why_not_cuda(device),
    }


def _why_not_vllm(config: Any, found: Found) -> str:
    """Why vLLM does not serve the model with this backend at all; empty where it may."""
    text = config.get_text_config(decoder=True)
    if any("latent" in layer.dense for layer in found.layers.values()):
        return "latent attention has a cache of its own in vLLM"
    if text.model_type in _ALIBI or getattr(text, "alibi", False):
        return "scores with a bias by distance (ALiBi) are not served"
    if importlib.util.find_spec("vllm") is None:
        return ""
    from vllm.model_executor.models.registry import ModelRegistry

    names = getattr(config, "architectures", None) or []
    known = ModelRegistry.get_supported_archs()
    return "" if not names or any(name in known for name in names) else f"the installed vLLM does not know {names[0]}"


def _describe(layer: Layer, numbers: list[int], device: torch.device, refused: str, against_vllm: str) -> dict[str, Any]:
    """Equal layers: what they are, and what becomes of them."""
    from turboquant_vllm.hf.layers import expected_shapes

    shapes = (torch.empty(1, layer.num_kv_heads, 1, dim, device="meta") for dim in (layer.head_dim, layer.value_dim))
    wrong = expected_shapes(*shapes)
    dense = layer.dense or (f"expected {wrong}" if wrong else "")
    in_vllm = against_vllm or why_not_layer(layer.head_dim, layer.value_dim)
    own = "decompressed each step: the model computes its attention by itself" if layer.own else ""
    return {
        "numbers": numbers,
        "num_heads": layer.num_heads,
        "num_kv_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "window": layer.window,
        "transformers": {"bits": 16, "why": dense} if dense else {"bits": 4, **_kernels(layer, device), "note": refused or own},
        "vllm": {"bits": 16, "why": in_vllm} if in_vllm else {"bits": 4, **_kernels(layer, device, pages=True)},
    }


def _kernels(layer: Layer, device: torch.device, *, pages: bool = False) -> dict[str, str]:
    """What decodes and what stores, and why not the native kernels."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shape = AttentionShape(1, layer.num_heads, layer.num_kv_heads, 1, 4096, layer.head_dim)
    q = torch.empty((1, layer.num_heads, 1, layer.head_dim), dtype=dtype, device=device)
    decode, _ = choose_backend(q, shape)
    reason = why_not("cuda", device, dtype, shape)
    if pages and decode == "cuda":
        reason = why_not_decode_pages(dtype, layer.head_dim, shape.group, 1)
        decode = "triton" if reason else decode
    k = torch.empty((1, layer.num_kv_heads, layer.head_dim), dtype=dtype, device="meta")
    # The codec's own choice of a rotation.
    hadamard = not layer.head_dim & (layer.head_dim - 1)
    no_store = ops.why_not_cuda(device) or why_not_store(k, k, hadamard, 1)
    no_triton = ops.why_not_triton(device) or why_not_store_triton(device, layer.head_dim, has_offsets=True)
    store = "cuda" if not no_store else "reference" if no_triton else "triton"
    return {"decode": decode, "store": store, "not_native": reason or no_store}


def _bytes(found: Found) -> dict[str, float]:
    """Bytes of a token of a long text in all layers with keys and values: those with a window have room for it and no more."""
    growing = [layer for layer in found.layers.values() if layer.window is None]
    bf16 = sum(2 * layer.num_kv_heads * (layer.head_dim + layer.value_dim) for layer in growing)
    packed = [layer for layer in growing if not layer.dense and layer.head_dim == layer.value_dim]
    saved = sum(
        layer.num_kv_heads * (4 * layer.head_dim - chunk_bytes(GROUP, layer.head_dim, True) / GROUP) for layer in packed
    )
    return {"bf16": float(bf16), "tq4": bf16 - saved}


def _key_scales(model: str, config: Any) -> str:
    """Where a cache finds the scales of the model's keys."""
    from turboquant_vllm.hf.scales import model_folder

    folder = model_folder(config)
    try:
        if folder is not None and find_key_scales(folder, config) is not None:
            return FILE_NAME
    except (OSError, ValueError) as error:
        return one_line(error)
    if folder is not None and any(folder.glob("*.safetensors")):
        return f"from the weights; better from a text: turboquant calibrate {model}"
    return f"none at hand: turboquant calibrate {model} makes them"
