"""One cycle against its formula in plain loops, and what a range test finds. Killed cycles: test_resume.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adaptsuite.errors import UsageError
from adaptsuite.plan import Plan
from adaptsuite.schedule import lr_factor, momentum, warmup_steps
from adaptsuite.trainer import fit

CYCLE = Plan(schedule="one_cycle", lr=0.4, tail=0.2, cycle_start=0.05, cycle_momentum=(0.95, 0.85), device="cpu")


class Blobs:
    """Three clouds in eight dimensions."""

    def __init__(self, num):
        self.label = torch.arange(num) % 3
        self.x = 2 * F.one_hot(self.label, 8) + torch.randn(num, 8, generator=torch.Generator().manual_seed(num))

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return {"x": self.x[index], "label": self.label[index]}


class Classify:
    monitor = "accuracy"

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["label"])

    def predict(self, model, batch):
        return model(batch["x"])

    def score(self, outputs, targets):
        return {"accuracy": (outputs.argmax(1) == targets).mean()}


def smith(total, plan):
    """(rate, momentum) of every step: two straight lines, and a third for the tail, each drawn by its ends."""
    tail = round(plan.tail * total)
    cycle, (high, low) = total - tail, plan.cycle_momentum
    start, end = plan.cycle_start * plan.lr, plan.cycle_start * plan.lr / 100
    steps = np.arange(total, dtype=np.float64)
    rates = np.interp(steps, [0, cycle / 2, cycle], [start, plan.lr, start])
    momenta = np.interp(steps, [0, cycle / 2, cycle], [high, low, high])
    for i in range(tail):
        rates[cycle + i] = start + (end - start) * (i + 1) / tail
    return rates, momenta


@pytest.mark.parametrize("total", [1, 2, 5, 10, 97, 400])
@pytest.mark.parametrize("tail", [0.0, 0.2])
def test_every_step_of_a_cycle_has_the_rate_and_the_momentum_of_the_formula(total, tail):
    plan = replace(CYCLE, tail=tail)
    rates, momenta = smith(total, plan)
    for step in range(total):
        assert plan.lr * lr_factor(step, total, 0, plan) == pytest.approx(rates[step], rel=1e-12)
        assert momentum(step, total, plan) == pytest.approx(momenta[step], rel=1e-12)


def test_a_cycle_starts_low_peaks_in_its_middle_and_ends_far_below_its_start():
    factors = [lr_factor(step, 100, 0, CYCLE) for step in range(100)]
    momenta = [momentum(step, 100, CYCLE) for step in range(100)]
    assert factors[0] == CYCLE.cycle_start and max(factors) == factors[40] == 1.0
    assert factors[-1] == pytest.approx(CYCLE.cycle_start / 100)
    assert momenta[0] == 0.95 and min(momenta) == momenta[40] == pytest.approx(0.85) and set(momenta[80:]) == {0.95}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_takes_every_step_with_the_rate_and_the_momentum_of_its_place(optimizer):
    seen, plan = [], replace(CYCLE, optimizer=optimizer, epochs=3, batch_size=8)
    model = nn.Linear(8, 3)

    def note(own, *_):
        for group in own.param_groups:
            seen.append((group["lr"], group["betas"][0] if optimizer == "adamw" else group["momentum"]))

    hook = register_optimizer_step_pre_hook(note)
    try:
        fit(model, Classify(), Blobs(24), Blobs(12), plan)
    finally:
        hook.remove()
    rates, momenta = smith(9, plan)
    assert len(seen) == 18  # weight and bias have groups of their own
    np.testing.assert_allclose([s[0] for s in seen[::2]], rates, rtol=1e-12)
    np.testing.assert_allclose([s[1] for s in seen[::2]], momenta, rtol=1e-12)


def test_other_schedules_leave_the_momentum_alone_and_keep_their_warm_up():
    plan = Plan(warmup=0.1)
    assert momentum(3, 10, plan) is None and warmup_steps(plan, 100) == 10
    assert warmup_steps(replace(CYCLE, warmup=0.5), 100) == 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"tail": 1.0}, "tail=1.0: expected a share of the steps"),
        ({"cycle_start": 0.0}, "cycle_start=0.0: expected a share of lr"),
        ({"cycle_momentum": (0.85, 0.95)}, "the second not above the first"),
        ({"schedule": "one_cycle", "warmup_steps": 3}, "one_cycle climbs by itself"),
        ({"schedule": "one_cycle", "min_lr": 1e-4}, "where a cosine ends, the schedule is one_cycle"),
        ({"schedule": "one-cycle"}, "did you mean one_cycle"),
    ],
)
def test_a_cycle_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Plan(**settings)
