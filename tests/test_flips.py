"""The gate of :mod:`flips` on errors whose sizes are known."""

from __future__ import annotations

import pytest
import torch

from flips import assert_as_near, neighbour

SPREAD, RUNS = 0.25, 8  # of the sizes of right runs, as models show it


def errors(generator: torch.Generator, prompts: int, runs: int, factor: float = 1.0) -> list[list[torch.Tensor]]:
    """Of each prompt and run; their sizes are a prompt's own times ``exp`` of normal numbers of spread SPREAD."""
    sizes = factor * (SPREAD * torch.randn(prompts, runs, generator=generator)).exp() * torch.arange(1, prompts + 1)[:, None]
    return [[size * torch.tensor([1.0, -1.0, 1.0]) for size in of_prompt] for of_prompt in sizes]


def test_right_runs_pass(generator):
    for _ in range(200):
        ours = errors(generator, 4, 1)
        assert_as_near([one for (one,) in ours], errors(generator, 4, RUNS))


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_one_wrong_prompt_fails(first, generator):
    ours = [one for (one,) in errors(generator, 4, 1)]
    # More than the bound may be with twice the spread for this prompt.
    ours[first] *= 100
    with pytest.raises(AssertionError, match="of a right run's"):
        assert_as_near(ours, errors(generator, 4, RUNS))


def test_all_a_little_wrong_fail(generator):
    with pytest.raises(AssertionError, match="in the mean"):
        assert_as_near([one for (one,) in errors(generator, 10, 1, factor=3)], errors(generator, 10, RUNS))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_fails(value, generator):
    ours = [one for (one,) in errors(generator, 4, 1)]
    ours[2][1] = value
    with pytest.raises(AssertionError, match="of a right run's"):
        assert_as_near(ours, errors(generator, 4, RUNS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_neighbour_is_off_by_units_in_the_last_place(dtype):
    model = torch.nn.Linear(64, 64, dtype=dtype)
    weight, other = model.weight.detach().float(), neighbour(model, 1).weight.detach().float()
    assert (other != weight).float().mean() > 0.1
    # Up to one unit, and rounding to the nearest.
    assert ((other - weight).abs() <= 1.5 * torch.finfo(dtype).eps * weight.abs() + torch.finfo(dtype).smallest_normal).all()
    assert torch.equal(neighbour(model, 1).weight, neighbour(model, 1).weight)
    assert not torch.equal(neighbour(model, 1).weight, neighbour(model, 2).weight)
