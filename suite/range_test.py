"""The LR-range test: one short run in which the rate climbs until the loss diverges (Smith 2017, arXiv:1506.01186).

The curve says which rates a model, its data and its adapter can take, at the cost of a hundred steps.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from adaptsuite import experiment, figures
from adaptsuite import recipe as recipes
from adaptsuite.batches import Seeded, chunks, load, seed_all, steps_of_epoch
from adaptsuite.checkpoint import copied
from adaptsuite.devices import autocast, pick_device, to_device
from adaptsuite.errors import Diverged, UsageError
from adaptsuite.plan import Plan
from adaptsuite.report import Run, write_run
from adaptsuite.trainer import make_optimizer

SMOOTH = 0.9  # decay of the average of the loss
DIVERGED = 4.0  # times the lowest smoothed loss
BELOW = 10.0  # the suggestion is so many times smaller than the rate of the lowest loss
FALLEN = 0.98  # of the first loss: what is above has not fallen


@dataclass(frozen=True)
class RangeTest:
    """What the loss did at each rate; lists end where the test was stopped."""

    rates: list[float]
    losses: list[float]  # of the step taken with the rate, before it
    smoothed: list[float]  # average of the losses so far, recent ones first
    diverged: bool
    suggestion: float | None  # largest rate for a run; None where the loss did not fall
    reason: str


def climb(low: float, high: float, steps: int, rise: Literal["exponential", "linear"] = "exponential") -> list[float]:
    """Rates from low to high, in equal factors or in equal differences. Raises UsageError."""
    if not 0 < low < high < math.inf:
        raise UsageError(f"a range test climbs from --low {low:g} to --high {high:g}: expected 0 < low < high")
    if steps < 10:
        raise UsageError(f"--steps {steps}: a curve needs 10 at least")
    if rise not in ("exponential", "linear"):
        raise UsageError(f"--rise {rise}: expected exponential or linear")
    return (np.geomspace if rise == "exponential" else np.linspace)(low, high, steps).tolist()


def range_test(handle, task, train, plan: Plan, rates: Sequence[float]) -> RangeTest:
    """Takes one step with each rate until the loss diverges, then puts the adapter back where it was.

    Groups keep their ratios to plan.lr; batch, clipping, momentum, weight decay and precision are the plan's.
    """
    if plan.precision == "fp16":
        raise UsageError("a range test looks for rates whose loss overflows: take precision fp32 or bf16")
    device, start = pick_device(plan.device), copied(handle.state())
    handle.model.to(device).train()
    optimizer, losses, smoothed = make_optimizer(handle, plan), [], []
    batches, average, diverged = _batches(train, plan), 0.0, False
    for number, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] / plan.lr * rate
        loss = _step(handle, task, next(batches), plan, device, optimizer, number)
        diverged = not math.isfinite(loss)
        if not diverged:
            losses.append(loss)
            average = SMOOTH * average + (1 - SMOOTH) * loss
            smoothed.append(average / (1 - SMOOTH ** (number + 1)))
            diverged = smoothed[-1] > DIVERGED * min(smoothed)
        if diverged:
            break
    handle.load_state(start)
    handle.model.eval()
    if not losses:
        raise Diverged(f"the loss is not finite at the start, before a step with --low {rates[0]:g}")
    return judged(list(rates[: len(losses)]), losses, smoothed, diverged, len(rates))


def judged(rates: list[float], losses: list[float], smoothed: list[float], diverged: bool, steps: int) -> RangeTest:
    """The suggestion of a curve, and the reason for it."""
    best = int(np.argmin(smoothed))
    end = f"diverged at {rates[-1]:.2g}, step {len(rates)} of {steps}" if diverged else f"finite up to {rates[-1]:.2g}"
    if smoothed[best] > FALLEN * smoothed[0]:
        reason = f"the loss never fell below its start of {smoothed[0]:.3f}; {end}"
        return RangeTest(rates, losses, smoothed, diverged, None, reason)
    suggestion = max(rates[0], float(f"{rates[best] / BELOW:.1e}"))
    reason = f"a tenth of {rates[best]:.2g}, where the smoothed loss was lowest ({smoothed[best]:.3f}); {end}"
    if best == len(rates) - 1 and not diverged:
        reason += "; it still fell there: a larger --high may allow more"
    return RangeTest(rates, losses, smoothed, diverged, suggestion, reason)


def _batches(train, plan: Plan) -> Iterator[list[Any]]:
    """The micro-batches of one step after the other, epochs without end."""
    epoch = 0
    while True:
        steps = steps_of_epoch(len(train), plan.batch_size * plan.accumulate, 1, plan.seed, epoch)
        for indices in steps:
            yield list(load(Seeded(train, plan.seed, epoch), chunks(indices, plan.batch_size), plan.workers))
        epoch += 1


def _step(handle, task, batches: list[Any], plan: Plan, device, optimizer, number: int) -> float:
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for index, batch in enumerate(batches):
        seed_all(plan.seed, "range test", number, index)
        with autocast(device, plan.precision):
            loss, extra = task.loss(handle.model, to_device(batch, device)), handle.regulariser()
        ((loss if extra is None else loss + extra) / len(batches)).backward()
        total += float(loss.detach()) / len(batches)
    if plan.clip is not None:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], plan.clip)
    optimizer.step()
    return total


# ---- the command


def run(domain, recipe, manifest, rates: Sequence[float], out: str | Path | None = None, say=lambda line: None) -> dict:
    """The test of a settled recipe's first fold and seed, with a report where `out` is a folder; JSON of its result."""
    handle, task, train, plan = experiment.started(domain, recipe, manifest, say)
    found = range_test(handle, task, train, plan, rates)
    result = {"lr": plan.lr, "steps": len(rates), "line": line(found), **asdict(found)}
    if out is not None:
        page = Run(
            title=f"LR-range test of {experiment.title(recipe.method, recipe.data.manifest)}",
            recipe=recipes.to_toml(recipe),
            adapted={"backbone": recipe.backbone, "method": recipe.method, **recipe.method_settings},
            params=handle.parameters_count(),
            metrics={"lr_test": result},
            extra=[{"title": "Loss at each rate", "text": line(found), "figure": curve(found, plan.lr)}],
            seeds=recipe.seeds[:1],
        )
        result["report"] = str(write_run(out, page))
    return result


def line(found: RangeTest) -> str:
    """The result in one line."""
    return f"lr {'none' if found.suggestion is None else f'{found.suggestion:g}'}: {found.reason}"


def curve(found: RangeTest, lr: float) -> str:
    """Loss over the rate: the data address of a picture. lr: the recipe's own rate, for comparison."""
    with figures.canvas(7.2, 3.2) as figure:
        axis = figure.subplots()
        axis.plot(found.rates, found.losses, color=figures.SOFT, lw=1, label="loss of one step")
        axis.plot(found.rates, found.smoothed, color=figures.ACCENT, lw=1.6, label="smoothed")
        if found.suggestion is not None:
            axis.axvline(found.suggestion, color=figures.WARM, lw=1.2, label=f"suggested {found.suggestion:g}")
        if found.rates[0] <= lr <= found.rates[-1]:
            axis.axvline(lr, color=figures.INK, lw=1, ls=":", label=f"the recipe's {lr:g}")
        ratios = np.diff(np.log(found.rates))
        axis.set_xscale("log" if np.allclose(ratios, ratios[0]) else "linear")
        top = max(found.smoothed[0], DIVERGED * min(found.smoothed))
        axis.set(xlabel="learning rate", ylabel="training loss", ylim=(0, 1.1 * top))
        axis.grid(color="#e6eaee", lw=0.7)
        axis.legend(loc="upper left")
        return figures.embed(figure)
