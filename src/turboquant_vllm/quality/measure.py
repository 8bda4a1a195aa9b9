"""What two versions of a model say about the same text, token by token, and what may be concluded from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

__all__ = ["TokenScores", "bootstrap_interval", "compare_windows", "perplexity", "token_scores"]

# Token ids int64 [batch, n] -> logits [batch, n, vocabulary] of the tokens that follow each.
Logits = Callable[[torch.Tensor], torch.Tensor]

_BLOCK = 64  # neighbouring tokens are not independent: whole blocks of at least so many are drawn
_RESAMPLES = 2000


class TokenScores(NamedTuple):
    """One number per predicted token, each ``[..., tokens]``.

    Attributes:
        exact: negative log-likelihood in nats of the token that came, under the exact model, float32.
        other: the same under the other model.
        kl: Kullback-Leibler divergence in nats of the other model's next-token distribution from the exact one, float32.
        agrees: whether both find the same token most likely, bool.
    """

    exact: torch.Tensor
    other: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor

    @property
    def increase(self) -> float:
        """Increase of the perplexity, relative: 0.01 is one percent."""
        return math.expm1((self.other.double() - self.exact.double()).mean().item())


def perplexity(losses: torch.Tensor) -> float:
    """exp of the mean of negative log-likelihoods in nats."""
    return math.exp(losses.double().mean().item())


def token_scores(exact: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Scores of two models' logits ``[..., vocabulary]`` for the tokens ``targets`` ``[...]`` that came."""
    first, second = exact.float().log_softmax(-1), other.float().log_softmax(-1)
    came = targets.unsqueeze(-1)
    return TokenScores(
        -first.gather(-1, came).squeeze(-1),
        -second.gather(-1, came).squeeze(-1),
        F.kl_div(second, first, log_target=True, reduction="none").sum(-1),
        first.argmax(-1) == second.argmax(-1),
    )


@torch.inference_mode()
def compare_windows(
    exact: Logits, other: Logits, batches: Iterable[torch.Tensor], advance: Callable[[], None] = lambda: None
) -> TokenScores:
    """Read text with two models; scores ``[windows, length]``, on the CPU.

    Args:
        exact, other: token ids ``[batch, length]`` to logits ``[batch, length, vocabulary]``.
        batches: windows ``[batch, length + 1]`` of inputs and, shifted by one, targets, on the models' device.
        advance: called after each batch.
    """
    found = []
    for batch in batches:
        scores = token_scores(exact(batch[:, :-1]), other(batch[:, :-1]), batch[:, 1:])
        found.append(TokenScores(*(part.cpu() for part in scores)))
        advance()
    return TokenScores(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def bootstrap_interval(losses: torch.Tensor, baseline: torch.Tensor | None = None, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a perplexity, or of its relative increase over a baseline on the same tokens.

    Blocks of neighbouring tokens are drawn with replacement; both models' blocks are drawn together, so what they
    share, the difficulty of the text, does not widen the interval of the increase. Each window is cut into blocks of 64
    tokens or a little more, so that every token counts. From fewer than some twenty blocks the interval is a guess, and
    from one, a point.

    Args:
        losses: negative log-likelihoods in nats ``[windows, length]``.
        baseline: the same of the baseline; None asks for the perplexity itself.
        seed: of the drawing.
    """
    values = losses.double() if baseline is None else losses.double() - baseline.double()
    blocks = values.tensor_split(max(1, values.shape[-1] // _BLOCK), dim=-1)
    sums = torch.stack([block.sum(-1) for block in blocks], -1).flatten()
    sizes = torch.tensor([block.shape[-1] for block in blocks]).expand(*values.shape[:-1], -1).flatten()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(sums.numel(), (_RESAMPLES, sums.numel()), generator=generator)
    means = sums[draws].sum(-1) / sizes[draws].sum(-1)
    means = means.exp() if baseline is None else means.expm1()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
