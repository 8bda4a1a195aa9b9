"""When a run over a 4-bit cache in half precision is as near to exact arithmetic as it should be.

Rounding moves a logit a little at each operation of a model. And where it moves a coordinate of a key or value over the
boundary between two cells, that code flips and the coordinate moves by a whole level, so no number of units in the last place
bounds what it does to a logit. The bound is measured instead, by other runs that are right: of the same model, and of models
whose weights are its weights moved to numbers next to them (:func:`neighbour`). Each is compared with float32 over its own
weights. As many operations round there and as many codes flip, at other places: all errors are draws of one noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import scipy.stats
import torch

# Of one comparison. All tests together make a few hundred of them, so one run of thousands fails for nothing.
FALSE_ALARM = 1e-6


def neighbour(model: Any, seed: int) -> Any:
    """A copy whose weights are off by up to one unit in the last place: a model as good, whose rounding is another draw."""
    other = copy.deepcopy(model)
    # On the CPU, so that each device draws the same.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            ulps = torch.rand(weight.shape, generator=generator).mul_(2).sub_(1).to(weight.device)
            weight.copy_(weight.float() * (1 + torch.finfo(weight.dtype).eps * ulps))
    return other


def assert_as_near(ours: Sequence[torch.Tensor], theirs: Sequence[Sequence[torch.Tensor]]) -> None:
    """Errors ``ours`` are of the size of ``theirs``, of right runs: each prompt's, and in the mean over prompts.

    A size is the root of the mean square over a prompt's places. Its logarithm has a mean that is the prompt's own and a spread
    that is all prompts', both estimated from ``theirs``. So the distance of ours from the mean of ``n`` others has
    ``sqrt(1 + 1 / n)`` of that spread, and in units of the estimate it is a draw of Student's t, which gives the bound for
    :data:`FALSE_ALARM`. Where a prompt is so short that some runs flip no code at all, its right runs spread more: then the
    spread that they show is taken. One prompt's error may be a few times a right run's; the mean over prompts only a part of
    that.

    Args:
        ours: one tensor for each prompt, its errors at all places.
        theirs: as many such tensors of each prompt as there are right runs, at least two.
    """
    logs = torch.tensor([_log_size(errors) for errors in ours])
    others = torch.tensor([[_log_size(errors) for errors in of_prompt] for of_prompt in theirs])
    prompts, runs = others.shape
    assert logs.shape == (prompts,)
    assert runs >= 2
    means, freedom = others.mean(1), prompts * (runs - 1)
    own = others.var(1)
    factor = scipy.stats.t.isf(FALSE_ALARM, freedom) * math.sqrt(1 + 1 / runs)
    bounds = factor * own.clamp(min=own.mean()).sqrt()
    mean_bound = factor * math.sqrt(own.mean() / prompts)
    distances = logs - means
    errors = ", ".join(f"{x:.2f} of {y:.2f}" for x, y in zip(distances.exp().tolist(), bounds.exp().tolist(), strict=True))
    message = (
        f"errors of prompts in units of a right run's, and what is allowed: {errors}; "
        f"in the mean {distances.mean().exp():.2f} of {math.exp(mean_bound):.2f}; spread of right runs: {own.mean().sqrt():.2f}"
    )
    print(message)
    # Written so that NaN fails, too.
    assert (distances <= bounds).all(), message
    assert distances.mean() <= mean_bound, message


def _log_size(errors: torch.Tensor) -> float:
    return errors.double().square().mean().log().item() / 2
