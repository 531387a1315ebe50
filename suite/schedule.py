"""How the learning rate and the momentum move over a run: functions of the step alone, so a resumed run is exact.

`one_cycle` is the schedule of Smith 2018 (arXiv:1803.09820, sections 4.2 and 4.3; Smith and Topin, arXiv:1708.07120):
the rate climbs and falls on straight lines while the momentum does the opposite, then a short tail falls far below the
start. The large rate in the middle regularises, the low momentum there keeps it stable.
"""

import math

from adaptsuite.errors import UsageError
from adaptsuite.plan import Plan

TAIL_END = 0.01  # of cycle_start; "several orders of magnitude" below the largest rate


def warmup_steps(plan: Plan, total: int) -> int:
    """Steps of the warm-up; UsageError where it would take all of them. A cycle has none: it climbs by itself."""
    if plan.schedule == "one_cycle":
        return 0
    share = plan.warmup_steps is None
    warm = round(plan.warmup * total) if share else plan.warmup_steps
    if warm >= total:
        given = f"warmup={plan.warmup:g} of them is {warm}" if share else f"warmup_steps={warm}"
        raise UsageError(f"the run has {total} steps and {given}: the full learning rate would never be reached")
    return warm


def lr_factor(step: int, total: int, warm: int, plan: Plan) -> float:
    """Share of the full learning rate at a step, from 0.

    Linear warm-up, then constant, or half a cosine down to min_lr; or one cycle from cycle_start to 1 and back, and the
    tail.
    """
    if plan.schedule == "one_cycle":
        return _cycle_factor(step, total, plan)
    if step < warm:
        return (step + 1) / (warm + 1)
    if plan.schedule == "constant":
        return 1.0
    floor = plan.min_lr / plan.lr
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2


def momentum(step: int, total: int, plan: Plan) -> float | None:
    """Momentum (of AdamW: beta1) at a step of a cycle; None: the schedule leaves it as it is."""
    if plan.schedule != "one_cycle":
        return None
    high, low = plan.cycle_momentum
    return high - (high - low) * _climbed(step, total - _tail(total, plan))


def set_step(optimizer, step: int, total: int, warm: int, plan: Plan) -> float:
    """Sets the rate and the momentum of every group of an optimiser for a step; returns the rate's factor."""
    factor, beta = lr_factor(step, total, warm, plan), momentum(step, total, plan)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
        if beta is not None:
            group.update({"betas": (beta, group["betas"][1])} if "betas" in group else {"momentum": beta})
    return factor


def _cycle_factor(step: int, total: int, plan: Plan) -> float:
    tail, start = _tail(total, plan), plan.cycle_start
    if step < total - tail:
        return start + (1 - start) * _climbed(step, total - tail)
    return start * (1 - (1 - TAIL_END) * (step - (total - tail) + 1) / tail)


def _climbed(step: int, cycle: int) -> float:
    """0 at both ends of the cycle, 1 in its middle; 0 in the tail."""
    return max(0.0, 1 - abs(2 * step / cycle - 1))


def _tail(total: int, plan: Plan) -> int:
    return min(round(plan.tail * total), total - 1)
