"""How a training is brought under a limit of memory: lean activations first, then fewer samples at once."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adaptsuite.bank import tensors_in
from adaptsuite.budget import budget
from adaptsuite.checkpoint import copied
from adaptsuite.costs import ratio, turns
from adaptsuite.devices import autocast, pick_device, to_device
from adaptsuite.errors import ResourceError
from adaptsuite.host import Handle
from adaptsuite.lean import lean
from adaptsuite.plan import Plan
from adaptsuite.probe import call_arguments

LIMITED = ("lean", "batch_size", "accumulate")  # what `within` may change
SLOW = 1.10  # of a step's time: beyond, it is a warning


def within(plan: Plan, handle: Handle, sample: Callable[[int], Any], say: Callable[[str], None]) -> Plan:
    """The plan under which a step stays below plan.memory_limit: as it is, lean, or lean with smaller batches.

    The effective batch, batch_size x accumulate, stays. sample: number of samples -> arguments of a forward.
    say: hears what a step needs, what was changed for it, and how much slower a lean step was measured to be.
    Raises ResourceError where one sample at once needs more.
    """
    if plan.memory_limit is None:
        return plan
    need = _Need(plan, handle, sample)
    if (plain := need(plan.batch_size, plan.lean)) <= plan.memory_limit:
        say(f"memory    a step needs {plain:.3g} GB of the {plan.memory_limit:g} GB allowed")
        return plan
    found = replace(plan, lean=True, batch_size=_batch(plan, need))
    found = replace(found, accumulate=plan.accumulate * (plan.batch_size // found.batch_size))
    then = need(found.batch_size, True)
    how = "" if plan.lean else f"lean, {_slower(plan, handle, sample(max(1, found.batch_size // 2)))}"
    if found.batch_size < plan.batch_size:
        how += f"{', ' * bool(how)}batch_size={found.batch_size} with accumulate={found.accumulate}"
    say(f"memory    a step would need {plain:.3g} GB, memory_limit is {plan.memory_limit:g}: {how}; {then:.3g} GB")
    return found


class _Need:
    """GB of one step: weights and buffers, the step's own peak, the optimiser's moments."""

    def __init__(self, plan: Plan, handle: Handle, sample: Callable[[int], Any]):
        self.plan, self.model, self.sample = plan, handle.model, sample
        self.fixed = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))

    def __call__(self, batch: int, lean: bool) -> float:
        with autocast(torch.device(next(self.model.parameters()).device), self.plan.precision):
            found = budget(self.model, None, self.sample(batch), lean=lean and not self.plan.compile)
        return (self.fixed + found.peak_bytes + found.optimizer_bytes) / 1e9


def _batch(plan: Plan, need: _Need) -> int:
    """The largest divisor of the batch that stays below the limit when it is lean."""
    parts = [n for n in range(plan.batch_size, 0, -1) if plan.batch_size % n == 0]
    for size in parts:
        if (least := need(size, True)) <= plan.memory_limit:
            return size
    raise ResourceError(
        f"memory_limit is {plan.memory_limit:g} GB and one sample needs {least:.3g} GB, lean too: take a smaller input "
        "or backbone, last_k, gradient checkpointing, or a higher limit"
    )


def _slower(plan: Plan, handle: Handle, sample: Any, pairs: int = 3) -> str:
    """What a lean step costs in time, measured in turns with a plain one; the sample is half of what fits lean."""
    device, state = pick_device(plan.device), copied(handle.state())
    model = handle.model.to(device).train()
    args, kwargs = to_device(call_arguments(sample), device)

    def step(around) -> None:
        with autocast(device, plan.precision), around():
            ends = [t for t in tensors_in(model(*args, **kwargs)) if t.requires_grad]
        torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])

    with torch.random.fork_rng(devices=[]):
        taken = turns({"lean": partial(step, lean), "plain": partial(step, contextlib.nullcontext)}, pairs)
    handle.load_state(state)
    for p in handle.trained().values():
        p.grad = None
    found = ratio(taken, "lean", "plain")["value"]
    return f"{found:.2f} times the time of a step" + (" (slower than 10 %)" if found > SLOW else "")
