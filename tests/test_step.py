"""engine/step.py: the learning rate, the step over micro-batches, numbers gone wrong."""

import math
import signal

import pytest
import torch
from torch import nn

from engine import job
from engine.step import learning_rate, optimizer_step
from engine.progress import Watch

ALONE = job.Ranks(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("step, rate", [
    (0, 0.0), (1, 0.01), (50, 0.5), (99, 0.99), (100, 1.0),
    (100 + 12_450, 0.1),  # half-way of the decay: the square root of 1 %
    (25_000, 0.01), (40_000, 0.01),
])
def test_learning_rate(step, rate):
    assert learning_rate(step, 3e-5) == pytest.approx(3e-5 * rate, rel=1e-12, abs=0)


def test_learning_rate_falls_by_a_constant_factor():
    rates = [learning_rate(step, 1.0) for step in (100, 1100, 2100)]
    assert rates[1] / rates[0] == pytest.approx(rates[2] / rates[1])
    assert rates[1] == pytest.approx(math.exp(math.log(0.01) * 1000 / 24_900))


class Objective(nn.Module):
    """Two per-sample losses of a linear model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)

    def forward(self, batch):
        y = self.linear(batch["x"])[:, 0]
        return {"square": y.square(), "size": y.abs()}


def cut(x, sizes):
    return iter([{"x": part, "name": ["?"] * len(part)} for part in x.split(sizes)])


def one_step(sizes):
    objective = Objective()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    outcome = optimizer_step(objective, cut(x, sizes), len(sizes), 8,
                                    {"square": 1.0, "size": 0.5}, optimizer, ALONE, torch.float32)
    return outcome.losses, objective.linear.weight.detach().clone()


def test_step_does_not_depend_on_the_cut():
    losses, weight = one_step([8])
    for sizes in ([4, 4], [1] * 8, [5, 2, 1]):
        other_losses, other_weight = one_step(sizes)
        assert other_losses == pytest.approx(losses, rel=1e-6)
        torch.testing.assert_close(other_weight, weight)


def test_step_against_plain_autograd():
    losses, weight = one_step([3, 5])
    objective = Objective()
    before = objective.linear.weight.detach().clone()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    parts = objective({"x": x})
    total = parts["square"].mean() + 0.5 * parts["size"].mean()
    total.backward()
    torch.testing.assert_close(weight, before - 0.1 * objective.linear.weight.grad)
    assert losses["loss"] == pytest.approx(total.item(), rel=1e-6)
    assert losses["size"] == pytest.approx(parts["size"].mean().item(), rel=1e-6)


def step_on(x, clip=None):
    """(outcome, weight before and after) of a step on these samples, two at a time."""
    objective = Objective()
    before = objective.linear.weight.detach().clone()
    optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
    batches = iter([{"x": part, "name": [f"{index}a", f"{index}b"]}
                    for index, part in enumerate(x.split(2))])
    outcome = optimizer_step(objective, batches, len(x) // 2, len(x), {"square": 1.0},
                                    optimizer, ALONE, torch.float32, clip)
    return outcome, before, objective.linear.weight.detach()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_step_that_is_not_finite_changes_nothing(value):
    x = torch.ones(4, 3)
    x[2, 1] = value
    outcome, before, after = step_on(x)
    assert outcome.losses is None and outcome.bad == ["0a", "0b", "1a", "1b"]
    assert torch.equal(before, after)


def test_the_gradient_is_clipped():
    x = 10 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    outcome, before, after = step_on(x, clip=0.5)
    assert outcome.losses["gradient_norm"] > 10  # before it was clipped
    free = step_on(x)[2] - before
    direction = torch.nn.functional.cosine_similarity(after - before, free)
    assert direction.item() == pytest.approx(1) and (after - before).norm() < 0.5 + 1e-6


def test_one_process_leaves_in_the_middle_of_a_step():
    with Watch(ALONE) as watch:
        signal.raise_signal(signal.SIGINT)
        assert optimizer_step(None, iter([]), 8, 8, {}, torch.optim.SGD(
            [torch.zeros(1)], lr=1.0), ALONE, torch.float32, watch=watch) is None
