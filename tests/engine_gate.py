"""How far an engine's log-probabilities may be from those of exact arithmetic over the same 4-bit cache.

:class:`Gate` runs transformers over the tokens that the engine was given and has made, with the cache that the engine should
have had: in float32, where next to nothing is rounded and no code flips, and several times in the engine's dtype. How far these
are from float32 is what rounding does in right runs (see :mod:`flips`); the engine is to be as near.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flips import assert_as_near, neighbour
from turboquant_vllm.hf import CACHE_ARGUMENT, TurboQuantCache
from turboquant_vllm.hf.calibration import key_scales_from_model

Cuts = Callable[[int], Iterable[int]]  # of the length of a prompt
# What a model is called with, beside the cache: (model, all tokens so far, place of the first that the cache has not).
Inputs = Callable[[Any, Sequence[int], int], dict[str, Any]]
# Least degrees of freedom of what right runs say: the bound is 6.0 spreads of theirs. Were the spread known, it would be 4.8.
FREEDOM = 28
FEWEST_RUNS = 4  # right ones, however many prompts there are: each has a mean and a spread of its own


@dataclass(frozen=True)
class Answer:
    """What an engine made of a prompt.

    Attributes:
        tokens: the tokens that it chose.
        log_probs: float32 ``[len(tokens), vocabulary]``, of all tokens at each of these places.
    """

    tokens: list[int]
    log_probs: torch.Tensor


def whole(length: int) -> tuple[int, ...]:
    """Cuts of a prompt that is read at once."""
    return ()


def token_ids(model: Any, tokens: Sequence[int], start: int) -> dict[str, Any]:
    """Inputs of a text."""
    return {"input_ids": torch.tensor([tokens[start:]], device=model.device)}


class Gate:
    """What an engine's answers must pass.

    Args:
        model: in the engine's dtype, with "tq4" attention.
        exact_prefill, key_offsets, skip_layers: as in ``TurboQuantCache``; with offsets, keys have the scales of the model's
            weights.
        inputs: of other models than those of texts alone.
    """

    def __init__(
        self,
        model: Any,
        *,
        exact_prefill: bool,
        key_offsets: bool = False,
        skip_layers: Iterable[int] = (),
        inputs: Inputs = token_ids,
    ) -> None:
        self._pairs = [(copy.deepcopy(model).float(), model)]
        # A group's offset follows from the call that begins it: the engine's are of one token.
        self._token_by_token = key_offsets
        self._inputs = inputs
        self._format: dict[str, Any] = {
            "exact_prefill": exact_prefill,
            "key_offsets": key_offsets,
            "skip_layers": tuple(skip_layers),
        }
        if key_offsets:
            self._format["key_scales"] = key_scales_from_model(model)

    def check(self, prompts: Sequence[list[int]], answers: Sequence[Answer], cuts: Cuts = whole) -> None:
        """The answers are greedy, and as near to float32 as transformers is in their dtype.

        ``cuts(length)``: where a prompt was cut into pieces that were read one after the other.
        """
        runs = max(FEWEST_RUNS, 1 + math.ceil(FREEDOM / len(prompts)))
        for seed in range(len(self._pairs), runs):
            rounded = neighbour(self._pairs[0][1], seed)
            self._pairs.append((copy.deepcopy(rounded).float(), rounded))
        ours, theirs = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            chosen = answer.log_probs.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert (chosen == answer.log_probs.amax(-1)).all(), "an answer that is not greedy"  # NaN fails, too
            ends = [0, *cuts(len(prompt)), len(prompt)]
            pieces = [prompt[first:stop] for first, stop in itertools.pairwise(ends)]
            read = [[self._log_probs(model, pieces, answer.tokens) for model in pair] for pair in self._pairs[:runs]]
            ours.append(answer.log_probs - read[0][0])
            theirs.append([rounded - exact for exact, rounded in read])
        assert_as_near(ours, theirs)

    @torch.inference_mode()
    def _log_probs(self, model: Any, pieces: Iterable[Sequence[int]], answer: list[int]) -> torch.Tensor:
        """transformers' for each token of an answer, whatever it would have chosen: float32 ``[len(answer), vocabulary]``."""
        cache = TurboQuantCache(model.config, **self._format)
        results, tokens = [], list[int]()
        answered = [[token] for token in answer[:-1]] if self._token_by_token else [answer[:-1]]
        for piece in (*pieces, *answered):
            start = len(tokens)
            tokens += piece
            results.append(model(**self._inputs(model, tokens, start), **{CACHE_ARGUMENT: cache}).logits[0])
        return torch.cat(results)[-len(answer) :].float().log_softmax(-1).cpu()
