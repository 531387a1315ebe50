"""What an adapter costs beside full fine-tuning: seconds of a step and of a forward, taken in turns.

Two models that are timed one after the other on a busy machine differ by the machine's load. Here they take turns in
one process and the ratio of each turn counts: load and clock cancel.
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from adaptsuite.batches import load, seed_all
from adaptsuite.budget import budget
from adaptsuite.devices import autocast, pick_device, to_device
from adaptsuite.host import Handle, get_handle
from adaptsuite.lean import lean
from adaptsuite.plan import Plan
from adaptsuite.probe import call_arguments
from adaptsuite.trainer import make_optimizer

Turns = dict[str, list[float]]


def turns(variants: Mapping[str, Callable[[], Any]], count: int) -> Turns:
    """Seconds of each variant in each turn, the order reversed every time; a first turn warms up and is left out.

    With one thread the process's own time is taken, so that the load of others does not count.
    """
    own = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock, names = time.process_time if own else time.perf_counter, list(variants)
    found: Turns = {name: [] for name in names}
    for turn in range(count + 1):
        for name in names if turn % 2 else reversed(names):
            start = clock()
            variants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name] += [clock() - start] if turn else []
    return found


def ratio(found: Turns, a: str, b: str) -> dict[str, Any]:
    """Median over turns of a's seconds over b's, and its quartiles."""
    ratios = [x / y for x, y in zip(found[a], found[b], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"value": middle, "quartiles": [low, high]}


def stepper(handle: Handle, task, data, plan: Plan) -> Callable[[], None]:
    """One training step on the first batch of the data: forward, loss, backward, optimiser.

    Rates are so small that a hundred steps on one batch leave the weights finite.
    """
    device = pick_device(plan.device)
    handle.model.to(device)
    first = [range(min(plan.batch_size, len(data)))]
    batch, optimizer = to_device(next(load(data, first)), device), make_optimizer(handle, plan)
    for group in optimizer.param_groups:
        group["lr"] = 1e-6 * group["base_lr"]

    def step() -> None:
        handle.model.train()
        optimizer.zero_grad(set_to_none=True)
        seed_all(plan.seed, "step")
        with autocast(device, plan.precision), lean() if plan.lean else contextlib.nullcontext():
            loss, extra = task.loss(handle.model, batch), handle.regulariser()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()

    return step


def forward(model, sample: Any) -> Callable[[], Any]:
    """One forward without gradients, in eval mode."""
    args, kwargs = to_device(call_arguments(sample), next(model.parameters()).device)

    def call() -> Any:
        model.eval()
        with torch.no_grad():
            return model(*args, **kwargs)

    return call


def merged(handle: Handle):
    """(copy of the host with the adapter in its weights, ""), or (None, why there is none)."""
    if handle.method.mergeable is not True:
        return None, str(handle.method.mergeable)
    host = copy.deepcopy(handle.model)
    try:
        get_handle(host, handle.name).merge()
    except ValueError as error:  # a tied weight
        return None, str(error)
    return host, ""


def costs(domain, own: tuple, full: tuple, count: int = 9) -> dict[str, Any]:
    """Counts of a trained adapter, and its times beside those of full fine-tuning in `count` turns each.

    own, full: (handle, task, data, plan) as `stepper` takes them.  step, latency, latency_merged: {"value": ratio to
    full fine-tuning, "quartiles", "ms": milliseconds}, of a batch for the step and of one item for the others.
    """
    handle, plan = own[0], own[-1]
    counted = budget(handle.model, sample=domain.sample(handle.model, plan.batch_size), lean=plan.lean)
    host, reason = merged(handle)
    models = {"latency": handle.model, "latency_merged": host, "full": full[0].model}
    steps = turns({"step": stepper(*own), "full": stepper(*full)}, count)
    calls = {name: forward(m, domain.sample(m, 1)) for name, m in models.items() if m is not None}
    found = {"step": steps, **dict.fromkeys(calls.keys() - {"full"}, turns(calls, count))}
    times = {name: {**ratio(t, name, "full"), "ms": 1e3 * statistics.median(t[name])} for name, t in found.items()}
    names = ("macs_per_item", "training_flops", "activation_bytes", "adapter_bytes")
    return {**{name: getattr(counted, name) for name in names}, "latency_merged": None, **times, "unmergeable": reason}
