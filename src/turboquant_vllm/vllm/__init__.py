"""The vLLM plugin: attention backend CUSTOM, which keeps the key/value cache in 4 bits per coordinate.

    vllm serve MODEL --attention-backend CUSTOM

Where vLLM takes names of cache dtypes, ``--kv-cache-dtype tq4`` says the same again; other backends refuse it.

vLLM finds :func:`register` through the entry point group ``vllm.general_plugins`` and calls it in each of its processes.
Importing this package does not import vLLM.
"""

from __future__ import annotations

import logging
import re

from turboquant_vllm.checks import MAX_HEAD_DIM

__all__ = ["BACKEND", "CACHE_DTYPE", "NEWEST", "OLDEST", "register", "why_not_layer", "why_not_version"]

BACKEND = "turboquant_vllm.vllm.backend.TQ4Backend"
CACHE_DTYPE = "tq4"
OLDEST, NEWEST = (0, 30), (0, 33)  # releases whose hooks this plugin has been read and tested against

logger = logging.getLogger(__name__)


def register() -> None:
    """Make ``--attention-backend CUSTOM`` this backend; with a version of vLLM that is not supported, say so and do nothing."""
    import vllm

    reason = why_not_version(vllm.__version__)
    if reason:
        logger.warning("--attention-backend CUSTOM is not available: %s", reason)
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    from vllm.config import cache

    if hasattr(cache, "register_kv_cache_dtype") and not cache.is_known_kv_cache_dtype(CACHE_DTYPE):
        from turboquant_vllm.vllm.dtype import TQ4CacheDType

        cache.register_kv_cache_dtype(CACHE_DTYPE)(TQ4CacheDType)


def why_not_layer(head_size: int, value_size: int) -> str:
    """Why the backend cannot serve a layer with keys and values of these sizes; empty where it can."""
    if head_size != value_size:
        return f"the TQ4 backend needs values as long as keys, got head sizes {head_size} and {value_size}"
    if not 16 <= head_size <= MAX_HEAD_DIM or head_size % 16:
        return f"the TQ4 backend needs a head size from 16 to {MAX_HEAD_DIM} that is a multiple of 16, got {head_size}"
    return ""


def why_not_version(vllm_version: str) -> str:
    """Why the plugin does not work with this version of vLLM; empty where it does."""
    numbers = re.match(r"(\d+)\.(\d+)", vllm_version)
    if numbers is not None and OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return ""
    oldest, newest = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
    return f"turboquant-vllm supports vLLM {oldest} to {newest}, got {vllm_version}"
