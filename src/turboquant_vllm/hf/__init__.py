"""Caches in 4 bits for Hugging Face transformers, and attention that reads them.

from turboquant_vllm.hf import TurboQuantCache, register

register()
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tq4")
model.generate(**inputs, past_key_values=TurboQuantCache(model.config))
"""

from turboquant_vllm.hf.attention import ATTENTION_NAME, attention_forward, register
from turboquant_vllm.hf.cache import TurboQuantCache, TurboQuantStaticCache

__all__ = ["ATTENTION_NAME", "TurboQuantCache", "TurboQuantStaticCache", "attention_forward", "register"]
