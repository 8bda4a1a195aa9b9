"""Key scales of the layers that a rank serves: found once in a process, from a file or from the model's weights.

They are given to layers when metadata builders are made: weights are there then, and neither pages nor graphs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from turboquant_vllm.calibration import FILE_NAME, find_key_scales, load_key_scales
from turboquant_vllm.vllm.options import Options
from turboquant_vllm.weights import key_scales_from_safetensors, why_taken_for_weights

__all__ = ["check_folder", "find_scales", "layer_number", "own_heads", "use_key_scales"]

logger = logging.getLogger(__name__)

_DRAFT_MODEL = "draft_model."  # begins the names of a model that drafts by itself
_ADVICE = "`turboquant calibrate MODEL` measures them from a text"
_found: dict[int, tuple[Any, dict[int, torch.Tensor]]] = {}  # by the identity of a configuration, which is kept


def use_key_scales(layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
    """Give each of the layers the scales of the layer whose keys it reads, of this rank's heads; ones where none are known.

    Raises:
        FileNotFoundError, ValueError: as :func:`find_scales`.
    """
    context = vllm_config.compilation_config.static_forward_context
    without = []
    for name in layer_names:
        attention = context[name]
        owner = getattr(attention, "kv_sharing_target_layer_name", None) or name
        layer, scales = attention.impl.layer, _scales_of(owner, context[owner], vllm_config)
        w = None if scales is None else own_heads(scales, layer.num_kv_heads, *_rank(vllm_config))
        if w is not None and w.shape[1] != layer.head_dim:
            w = None
        if w is None:
            without.append(name)
        layer.use_key_scales(w, device)
    if without:
        logger.warning(
            "no channel scales for the keys of %s: none of that name and head dimension; %s", ", ".join(without), _ADVICE
        )


def _scales_of(name: str, attention: Any, vllm_config: Any) -> torch.Tensor | None:
    """``[H_kv, D]`` of all heads."""
    model_config = vllm_config.model_config
    if name.startswith(_DRAFT_MODEL):
        model_config = vllm_config.speculative_config.draft_model_config
    elif getattr(attention, "is_draft_layer", False):  # a part of a model, which has no file of its own
        return None
    number = layer_number(name)
    if model_config is None or number is None:
        return None
    options = Options.read(vllm_config.additional_config)
    of_target = model_config is vllm_config.model_config
    return find_scales(options.key_scales if of_target else None, model_config, vllm_config.load_config).get(number)


def find_scales(path: str | None, model_config: Any, load_config: Any) -> dict[int, torch.Tensor]:
    """Scales of a model, layer -> float32 ``[H_kv, D]`` on the CPU, read at the first call; empty, and then the log says so,
    where there is neither a file nor weights that can be read.

    Args:
        path: of a file of :func:`turboquant_vllm.calibration.save_key_scales`. None: "turboquant.safetensors" in the model's
            folder, else the weights in safetensors files there.
        model_config, load_config: vLLM's.

    Raises:
        FileNotFoundError: there is no file at ``path``.
        ValueError: the file is damaged, or another model's; says what differs.
    """
    known = _found.get(id(model_config))
    if known is None:
        known = _found[id(model_config)] = model_config, _find(path, model_config, load_config)
    return known[1]


def check_folder(model_config: Any) -> None:
    """Before vLLM loads the weights.

    Raises:
        ValueError: it would take the file of scales in the model's folder for weights; says what to do.
    """
    folder = getattr(model_config, "model", None)
    reason = "" if folder is None else why_taken_for_weights(folder)
    if reason:
        raise ValueError(
            f"{reason}: expected the index that `turboquant calibrate` writes with it, or the file elsewhere and "
            """--additional-config '{"turboquant": {"key_scales": FILE}}'"""
        )


def _find(path: str | None, model_config: Any, load_config: Any) -> dict[int, torch.Tensor]:
    config = model_config.hf_config
    if path is not None:
        return load_key_scales(path, config)
    folder = _folder(model_config.model, model_config.revision, load_config.download_dir)
    if folder is None:
        logger.warning("no channel scales for keys: %s is no folder here; %s", model_config.model, _ADVICE)
        return {}
    found = find_key_scales(folder, config)
    if found is not None:
        logger.info("channel scales for keys: %s", folder / FILE_NAME)
        return found
    if load_config.load_format == "dummy":  # those weights are not the model's
        logger.warning("no channel scales for keys: weights are dummies, and %s has no %s", folder, FILE_NAME)
        return {}
    try:
        return key_scales_from_safetensors(folder, config)
    except (OSError, ValueError) as error:
        logger.warning("no channel scales for keys: %s; %s", error, _ADVICE)
        return {}


def _folder(model: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Where the model's files are on this machine, of which vLLM has read the weights by now; None if they are not."""
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None


def layer_number(name: str) -> int | None:
    """Of a layer's name, such as "model.layers.3.self_attn.attn"."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def own_heads(scales: torch.Tensor, num_kv_heads: int, rank: int, size: int) -> torch.Tensor:
    """Of scales ``[H_kv, D]`` those of the ``num_kv_heads`` heads that rank ``rank`` of ``size`` has; neighbouring ranks have
    the same where there are more ranks than heads.

    Raises:
        ValueError: heads are not divided so.
    """
    total = scales.shape[0]
    if total == num_kv_heads:
        return scales
    if num_kv_heads != max(total // size, 1) or total % num_kv_heads:
        raise ValueError(
            f"key scales must be of {num_kv_heads * size} kv heads, {num_kv_heads} on each of {size} ranks, got {total}"
        )
    first = rank * total // size
    return scales[first : first + num_kv_heads]


def _rank(vllm_config: Any) -> tuple[int, int]:
    """This process's tensor-parallel rank, and how many there are."""
    size: int = vllm_config.parallel_config.tensor_parallel_size
    if size == 1:
        return 0, 1
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank(), size
