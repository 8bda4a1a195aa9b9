"""Caches in 4 bits for Hugging Face transformers, and attention that reads them.

from turboquant_vllm.hf import TurboQuantCache, register

register()
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tq4")
model.generate(**inputs, cache=TurboQuantCache(model.config))

Releases of transformers before 5.24 call the argument ``past_key_values``; CACHE_ARGUMENT is what the installed one calls it.
"""

from importlib.util import find_spec

_NEEDS = "turboquant_vllm.hf needs transformers 5.14 or later: pip install turboquant-vllm[hf]"
try:
    _FOUND = find_spec("transformers") is not None
except ValueError:  # a stub without a spec stands in for it
    _FOUND = False
if not _FOUND:
    raise ImportError(f"{_NEEDS}; it is not installed")

import transformers  # noqa: E402
from packaging.version import Version  # noqa: E402

if Version(transformers.__version__) < Version("5.14"):
    raise ImportError(f"{_NEEDS}; got {transformers.__version__}")

# What models and their `generate` call a cache. The old name warns from 5.24 on and ends with 5.40.
CACHE_ARGUMENT = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"

from turboquant_vllm.hf.attention import ATTENTION_NAME, attention_forward, register  # noqa: E402
from turboquant_vllm.hf.cache import TurboQuantCache, TurboQuantStaticCache  # noqa: E402
from turboquant_vllm.hf.generation import fresh_cache  # noqa: E402

__all__ = [
    "ATTENTION_NAME",
    "CACHE_ARGUMENT",
    "TurboQuantCache",
    "TurboQuantStaticCache",
    "attention_forward",
    "fresh_cache",
    "register",
]
