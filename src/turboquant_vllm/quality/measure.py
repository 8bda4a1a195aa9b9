"""What two versions of a model say about the same text, token by token, and what may be concluded from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

__all__ = [
    "TokenScores",
    "agreement",
    "bootstrap_interval",
    "compare_many",
    "compare_windows",
    "kl_divergence",
    "losses",
    "perplexity",
    "token_scores",
    "total_variation",
]

# Token ids int64 [batch, n] -> logits [batch, n, vocabulary] of the tokens that follow each.
Logits = Callable[[torch.Tensor], torch.Tensor]

_BLOCK = 64  # neighbouring tokens are not independent: whole blocks of at least so many are drawn
_RESAMPLES = 2000
_ELEMENTS = (
    2**20
)  # logits of one model that are worked on at a time: a vocabulary of 262,144 times 2048 tokens are 2 GiB in float32
_NEVER = -1e30  # logarithm of the probability of a token that cannot come, so that two of them are not apart


class TokenScores(NamedTuple):
    """One number per predicted token, each ``[..., tokens]``.

    Attributes:
        exact: negative log-likelihood in nats of the token that came, under the exact model, float32.
        other: the same under the other model.
        kl: Kullback-Leibler divergence in nats of the other model's next-token distribution from the exact one, float32.
        agrees: whether both find the same token most likely, bool.
        tvd: total variation distance of the two next-token distributions, from 0 to 1, float32.
    """

    exact: torch.Tensor
    other: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor
    tvd: torch.Tensor

    @property
    def increase(self) -> float:
        """Increase of the perplexity, relative: 0.01 is one percent."""
        return (self.other.double() - self.exact.double()).mean().expm1().item()


def perplexity(losses: torch.Tensor) -> float:
    """exp of the mean of negative log-likelihoods in nats; inf where float64 ends."""
    return losses.double().mean().exp().item()


def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods in nats, ``[...]``, of the tokens ``targets`` that came, from logits ``[..., vocabulary]``."""
    found = [_losses(block, came) for (block,), came in _with_targets(targets, logits)]
    return torch.cat(found).reshape(targets.shape)


def kl_divergence(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence in nats of softmax(``other``) from softmax(``exact``), sum p log(p / q).

    Args:
        exact, other: logits ``[..., vocabulary]`` of one shape; -inf is a token that cannot come.

    Returns:
        float32 ``[...]``, float64 if both are; inf where a token can come that cannot under ``other``.

    Raises:
        ValueError: the shapes differ, or there is no vocabulary.
    """
    return _over_rows(exact, other)[0]


def total_variation(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Total variation distance of softmax(``other``) and softmax(``exact``), sum |p - q| / 2: the share of tokens that must
    change, from 0 to 1. Arguments, results and errors as in :func:`kl_divergence`."""
    return _over_rows(exact, other)[1]


def agreement(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether both find the same token most likely, bool ``[...]``; arguments and errors as in :func:`kl_divergence`."""
    _check_logits(exact, other)
    return exact.argmax(-1) == other.argmax(-1)


def token_scores(exact: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Scores of two models' logits ``[..., vocabulary]`` for the tokens ``targets`` ``[...]`` that came.

    Raises:
        ValueError: as in :func:`kl_divergence`.
    """
    found: list[tuple[torch.Tensor, ...]] = []
    for (first, second), came in zip(
        _log_probabilities(exact, other), _blocks(targets.unsqueeze(-1), exact.shape[-1]), strict=True
    ):
        kl, tvd = _distances(first, second)
        found.append((_losses(first, came), _losses(second, came), kl, first.argmax(-1) == second.argmax(-1), tvd))
    return TokenScores(*(torch.cat(parts).reshape(targets.shape) for parts in zip(*found, strict=True)))


def _over_rows(exact: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    found = [_distances(*blocks) for blocks in _log_probabilities(exact, other)]
    return [torch.cat(parts).reshape(exact.shape[:-1]) for parts in zip(*found, strict=True)]


def _check_logits(exact: torch.Tensor, other: torch.Tensor) -> None:
    if exact.shape != other.shape or not exact.dim() or not exact.shape[-1]:
        want, got = list(exact.shape), list(other.shape)
        raise ValueError(f"logits: expected two tensors of one shape [..., vocabulary], got {want} and {got}")


def _blocks(x: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, ...]:
    """``[..., n]`` as ``[rows, n]``, so many rows at a time as of logits fit into a block."""
    return x.reshape(-1, x.shape[-1]).split(max(1, _ELEMENTS // vocabulary))


def _log_probabilities(*models: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Logarithms of the probabilities of one model or two, ``[n, vocabulary]`` each, a block at a time, one at least."""
    _check_logits(models[0], models[-1])
    dtype = torch.float64 if all(x.dtype == torch.float64 for x in models) else torch.float32
    for blocks in zip(*(_blocks(x, x.shape[-1]) for x in models), strict=True):
        yield tuple(block.to(dtype).log_softmax(-1) for block in blocks)


def _with_targets(targets: torch.Tensor, *models: torch.Tensor) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
    """Blocks of :func:`_log_probabilities`, each with the tokens ``[n, 1]`` that came."""
    return zip(_log_probabilities(*models), _blocks(targets.unsqueeze(-1), models[0].shape[-1]), strict=True)


def _losses(log_probabilities: torch.Tensor, came: torch.Tensor) -> torch.Tensor:
    return -log_probabilities.gather(-1, came).squeeze(-1)


def _distances(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KL divergence and total variation distance, ``[n]``, from logarithms of probabilities ``[n, vocabulary]``.

    With d = log p - log q, |p - q| is max(p, q) (1 - exp(-|d|)), and the divergence is summed as p (exp(-d) - 1 + d), which
    makes the same, because p and q both sum to 1. No term is negative, so none cancel, and an error common to all d, that of
    the normaliser, enters squared. Where q > p the term is written with q, so that nothing overflows.
    """
    surprise = (second.isneginf() & ~first.isneginf()).any(-1)
    d = first.clamp(min=_NEVER).sub_(second.clamp(min=_NEVER)).clamp_(min=-100)  # the term is q from -50 on, in float64, too
    size = d.abs()
    e = torch.expm1(-size)
    larger = torch.maximum(first, second).exp_()
    tvd = (larger * e).sum(-1) / -2
    # p (e + d) where d is positive, else q (-e + d (1 + e)): arithmetic without branches, which are several times slower.
    terms = torch.copysign(e + size, d).addcmul_(d.clamp(max=0), e)
    kl = terms.mul_(larger).sum(-1)
    return kl + torch.zeros_like(kl).masked_fill(surprise, math.inf), tvd  # NaN stays NaN


@torch.inference_mode()
def compare_many(
    exact: Logits, others: Sequence[Logits], batches: Iterable[torch.Tensor], advance: Callable[[], None] = lambda: None
) -> list[TokenScores]:
    """Read text with an exact model and some others; for each of them scores ``[windows, length]``, on the CPU.

    Args:
        exact, others: token ids ``[batch, length]`` to logits ``[batch, length, vocabulary]``.
        batches: windows ``[batch, length + 1]`` of inputs and, shifted by one, targets, on the models' device.
        advance: called after each batch of each of the others.
    """
    found: list[list[TokenScores]] = [[] for _ in others]
    for batch in batches:
        expected = exact(batch[:, :-1])
        for other, scores in zip(others, found, strict=True):
            of_batch = token_scores(expected, other(batch[:, :-1]), batch[:, 1:])
            scores.append(TokenScores(*(part.cpu() for part in of_batch)))
            advance()
    return [TokenScores(*(torch.cat(parts) for parts in zip(*scores, strict=True))) for scores in found]


def compare_windows(
    exact: Logits, other: Logits, batches: Iterable[torch.Tensor], advance: Callable[[], None] = lambda: None
) -> TokenScores:
    """As :func:`compare_many` with one other model."""
    return compare_many(exact, [other], batches, advance)[0]


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
    sizes = torch.tensor([block.shape[-1] for block in blocks], device=values.device).expand(*values.shape[:-1], -1).flatten()
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = torch.randint(sums.numel(), (_RESAMPLES, sums.numel()), generator=generator, device="cpu").to(values.device)
    means = sums[draws].sum(-1) / sizes[draws].sum(-1)
    means = means.exp() if baseline is None else means.expm1()
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64, device=values.device)).tolist()
    return low, high
