"""Rules for groups that begin with a few keys, by what they do to attention: one reading of a text serves all of them.

The model reads a text once, exactly. Its keys are then written call by call under each rule, and each query attends to the
keys as they are read at its time. What is measured is how far that moves the weights of attention: KL of one query of one head,
in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch

from quality_keys_format import GrowingKeys, KeyFormat, Rule, codec_for, read_back
from turboquant_vllm.quality.attention import Model

__all__ = ["measure_rules"]


class _Seen:
    """Queries and keys of all layers for one window, scaled and rotated; layers and kv heads in one dimension."""

    def __init__(self, w: dict[int, torch.Tensor], every: int) -> None:
        self._every = every
        self._w, self._queries, self._keys, self._windows = w, [], [], []  # type: ignore[var-annotated]

    def add(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float, window: int | None) -> None:
        if layer % self._every != self._every // 2:
            return
        turn, w = codec_for(key).rotation, self._w[layer]
        q = query[0].unflatten(0, (key.shape[1], -1)) / w[:, None, None]  # [H_kv, group, N, D]
        self._queries.append(scaling * q @ turn.T)
        self._keys.append(key[0] * w[:, None] @ turn.T)
        self._windows += [window or key.shape[2]] * key.shape[1]

    def all(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries ``[H, group, N, D]``, keys ``[H, N, D]``, windows ``[H]``."""
        return torch.cat(self._queries), torch.cat(self._keys), torch.tensor(self._windows, device=self._keys[0].device)


def _weights(q: torch.Tensor, y: torch.Tensor, first: int, windows: torch.Tensor) -> torch.Tensor:
    """Log-weights of queries ``[H, group, n, D]`` at positions from ``first`` on over keys ``[R, H, N, D]``."""
    scores = torch.einsum("hgnd,rhkd->rhgnk", q, y)
    query = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    key = torch.arange(y.shape[2], device=q.device)
    hidden = (key > query) | (key <= query - windows[:, None, None])  # [H, n, N]
    return scores.masked_fill(hidden[:, None], float("-inf")).log_softmax(-1)


def _divergence(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Sum of the KL of all queries for each row."""
    weights = exact.exp()
    return (weights * (exact - other).masked_fill(weights == 0, 0)).sum((1, 2, 3, 4)).double()


@torch.inference_mode()
def measure_rules(
    model: Model,
    w: dict[int, torch.Tensor],
    windows: torch.Tensor,
    case: tuple[int, int, int],
    rules: list[Rule],
    every: int,
    capture: Callable[[Any], AbstractContextManager[None]],
) -> list[dict[str, Any]]:
    """Mean KL of attention for the tokens behind a prompt, and for the prompt's own.

    Args:
        windows: ``[n, at least prompt + more]``.
        case: tokens of the prompt, behind it, and of one call.
        every: every so many layers are looked at.
        capture: within the block, attention hands layer, query, key, scaling and window of a call to its argument.
    """
    prompt, more, step = case
    sums = torch.zeros(len(rules) + 1, dtype=torch.float64)
    count = 0
    for ids in windows[:, : prompt + more].split(1):
        seen = _Seen(w, every)
        with capture(seen.add):
            model(ids, use_cache=False, logits_to_keep=1)
        q, y, reach = seen.all()
        size = -(-(prompt + more) // 64) * 64
        growing = GrowingKeys(rules, size)
        rows = y.expand(len(rules), *y.shape)
        growing.write(rows[:, :, :prompt])
        together = read_back(y, KeyFormat())[None]
        for at in range(prompt, prompt + more, step):
            now = slice(at, at + step)
            exact = _weights(q[:, :, now], y[None, :, : at + step], at, reach)
            sums[:-1] += _divergence(exact, _weights(q[:, :, now], growing.write(rows[:, :, now]), at, reach)).cpu()
            sums[-1] += _divergence(exact, _weights(q[:, :, now], together[:, :, : at + step], at, reach)).cpu()[0]
            count += exact[..., 0].numel()
    about = {"what": "rules", "prompt": prompt, "more": more, "step": step}
    named = [asdict(rule) for rule in rules] + ["whole"]
    return [
        {**about, "rule": rule, "attention_kl": round(kl, 7)} for rule, kl in zip(named, (sums / count).tolist(), strict=True)
    ]
