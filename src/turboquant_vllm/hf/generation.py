"""Generation in which each call of ``generate`` has a cache of its own: what a pipeline over a list of prompts needs.

    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    pipe(prompts, custom_generate=fresh_cache())

A cache that is passed as an argument would be one conversation that all prompts go on with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import utils
from transformers.generation.configuration_utils import GenerationConfig

from turboquant_vllm.hf import CACHE_ARGUMENT
from turboquant_vllm.hf.cache import TurboQuantCache, TurboQuantStaticCache

__all__ = ["fresh_cache"]

_OURS = (TurboQuantCache, TurboQuantStaticCache)


def fresh_cache(make: Callable[[Any], Any] = TurboQuantCache) -> Callable[..., Any]:
    """What to pass to ``generate``, or to a pipeline, as ``custom_generate``, so that each call gets a new cache.

    Args:
        make: makes a cache of a model: ``TurboQuantCache``, or for options ``lambda model: TurboQuantCache(model,
            skip_layers=(0,))``.

    Returns:
        A function that runs transformers' own loop for greedy search, sampling, beams or prompt look-up. transformers hands
        such functions no streamer and no assistant model.

    Raises:
        ValueError: from ``generate``, where a cache is passed, too, or another way of decoding is asked for.
    """

    def decode(model: Any, input_ids: torch.Tensor, *, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        given = kwargs.get(CACHE_ARGUMENT)
        # Releases before 5.23 do not say whose it is; one that `generate` has made is empty, and none of ours.
        if given is not None and (
            getattr(given, "_is_user_defined", False) or isinstance(given, _OURS) or given.get_seq_length()
        ):
            got = type(given).__name__
            raise ValueError(f"{CACHE_ARGUMENT}: expected none beside custom_generate=fresh_cache(), got a {got}")
        mode = generation_config.get_generation_mode()
        name = utils.GENERATION_MODES_MAPPING[mode]
        if not hasattr(type(model), name):
            raise ValueError(f"fresh_cache() serves greedy search, sampling, beams and prompt look-up, got {mode.value}")
        kwargs[CACHE_ARGUMENT] = make(model)
        return getattr(type(model), name)(model, input_ids, generation_config=generation_config, **kwargs)

    return decode
