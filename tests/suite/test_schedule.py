"""One cycle against its formula in plain loops, and what a range test finds. Killed cycles: test_resume.py."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adaptsuite.cli import main
from adaptsuite.errors import Diverged, UsageError
from adaptsuite.plan import Plan
from adaptsuite.range_test import climb, judged, range_test
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


# ---- the range test


class Whole:
    """A plain model as the handle of one group for each tensor, the first of them its head."""

    def __init__(self, model):
        self.model = model

    def trainable(self):
        named = list(self.model.named_parameters())
        return [{"name": "model" if i else "head", "params": [p], "names": [n]} for i, (n, p) in enumerate(named)]

    def state(self):
        return self.model.state_dict()

    def load_state(self, state):
        self.model.load_state_dict(state)

    def regulariser(self):
        return None


class Bowl:
    """Loss 0.5 c w^2 of a single weight, whatever the sample."""

    monitor, c = "loss", 4.0

    def loss(self, model, batch):
        return 0.5 * self.c * (model.weight**2).sum()


def bowl(weight=1.0):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, weight)
    return model, Whole(model)


STEEP = Plan(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=None, batch_size=8, lr=0.5, device="cpu")


def test_a_range_test_takes_the_steps_of_a_plain_loop_and_stops_where_they_diverge():
    """Gradient descent on a bowl of curvature c diverges beyond a rate of 2 / c."""
    model, handle = bowl()
    rates = climb(1e-3, 100.0, 60)
    found = range_test(handle, Bowl(), Blobs(24), STEEP, rates)
    weight, average = 1.0, 0.0
    for step, (loss, smoothed) in enumerate(zip(found.losses, found.smoothed, strict=True)):
        expected = 0.5 * Bowl.c * weight**2
        average = 0.9 * average + 0.1 * expected
        assert loss == pytest.approx(expected, rel=1e-12)
        assert smoothed == pytest.approx(average / (1 - 0.9 ** (step + 1)), rel=1e-12)
        weight *= 1 - rates[step] * Bowl.c
    assert found.diverged and found.rates == rates[: len(found.losses)] and len(found.rates) < 60
    assert found.rates[-1] > 2 / Bowl.c and found.suggestion < 2 / Bowl.c
    assert found.suggestion == pytest.approx(found.rates[int(np.argmin(found.smoothed))] / 10, rel=0.05)
    assert f"step {len(found.rates)} of 60" in found.reason


def test_a_range_test_leaves_the_weights_as_they_were():
    model, handle = bowl(0.7)
    range_test(handle, Bowl(), Blobs(24), STEEP, climb(1e-3, 1e3, 40))
    assert model.weight.item() == 0.7 and not model.training


def test_head_and_backbone_keep_the_ratio_of_their_rates():
    seen, handle = [], Whole(nn.Linear(8, 3))
    hook = register_optimizer_step_pre_hook(lambda own, *_: seen.append([g["lr"] for g in own.param_groups]))
    try:
        range_test(handle, Classify(), Blobs(24), replace(STEEP, head_lr=5.0), climb(1e-4, 1e-3, 10, "linear"))
    finally:
        hook.remove()
    np.testing.assert_allclose([head / other for head, other in seen], 10)
    np.testing.assert_allclose([other for _, other in seen], np.linspace(1e-4, 1e-3, 10))


def test_a_loss_that_does_not_fall_gives_no_suggestion():
    found = judged([0.1, 1.0, 10.0], [1.0, 1.0, 9.0], [1.0, 1.0, 5.0], True, 100)
    assert found.suggestion is None and "never fell below its start of 1.000; diverged at 10, step 3" in found.reason
    assert "--high" in judged([0.1, 1.0], [2.0, 1.0], [2.0, 1.0], False, 2).reason


def test_a_loss_that_is_not_finite_at_the_start_is_one_line():
    _, handle = bowl(math.inf)
    with pytest.raises(Diverged, match="not finite at the start"):
        range_test(handle, Bowl(), Blobs(24), STEEP, climb(1e-3, 1.0, 10))


@pytest.mark.parametrize("given, message", [((1.0, 0.1, 20), "0 < low < high"), ((0.1, 1.0, 3), "10 at least")])
def test_rates_that_do_not_climb_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        climb(*given)


def test_the_command_says_one_line_and_draws_its_picture(tmp_path, capsys):
    for i in range(12):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 + 200 * (i % 2), 10 * i, 90)).save(folder / f"{i}.png")
    line = "vision lr-test --backbone embedded:vision-tiny --image-size 48 --method lora --steps 12 --json".split()
    line += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--set=plan.batch_size=4"]
    assert main([*line, "--set=plan.schedule=one_cycle"]) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert 1 <= len(found["rates"]) == len(found["losses"]) <= found["steps"] == 12
    assert found["line"].startswith("lr ") and found["line"] in err and found["reason"] in found["line"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Loss at each rate" in page and "data:image/svg+xml" in page
    assert main([*line, "--low", "1", "--high", "0.1"]) == 2
    assert "0 < low < high" in capsys.readouterr().err
