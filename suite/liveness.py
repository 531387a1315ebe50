"""Liveness of a model that others have adapted (peft, wrapped modules, unfrozen tensors): what trains, what is dead.

`adaptsuite.verify` looks at this package's own adapters, can merge them and take them off. Here nothing is known of a
model but which of its parameters require a gradient.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.probe import call_arguments
from adaptsuite.verify import AGREE, ALIVE, Runner, Verification, difference, gradients, perturb

UNCALLED = (
    "nn.MultiheadAttention reads the weight of its out_proj and never calls that module, so what wraps it acts nowhere "
    "(and merging it would change the output); adapt the weight instead: attach(model, 'lora', sites=('attn.out',))"
)
UNREAD = "the forward does not read them; choose sites on the path to the output"
CUT = (
    "they act on the output and get no gradient: their part of the forward runs under no_grad, inference mode or "
    "detach; call it with gradients"
)
FAST_PATH = (
    "in eval torch's fast path of nn.TransformerEncoderLayer reads weights past the modules that wrap them, so that "
    "they train and are then ignored; attach(model, 'lora') hooks the layer, which turns the fast path off"
)


def verify_module(model: nn.Module, batch: Any) -> Verification:
    """Whether every parameter that requires a gradient gets one, and acts in eval as it does in training.

    batch: one input (tensor, tuple of arguments or dict), or a function of the model that gives its output. Dropout and
    batch statistics are off meanwhile; parameters are moved off their start and put back. `problems` name the reason
    and the way out, with the number of values concerned. Raises UsageError where nothing requires a gradient.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UsageError(f"nothing in this {type(model).__name__} requires a gradient")
    if callable(batch) and not isinstance(batch, Tensor):
        run = Runner(model, batch, 0)
    else:
        args, kwargs = call_arguments(batch)
        run = Runner(model, lambda m: m(*args, **kwargs), 0)
    with _restored(model, trained):
        plain = run.values(_mode(model, False))
        perturb(trained.values(), 0)
        evaluated, learned = (run.values(_mode(model, training)) for training in (False, True))
        with _mode(model, True):
            size = gradients(trained, run)
        largest = max(size.values())
        dead = {n: p for n, p in trained.items() if size[n] <= ALIVE * largest}
        kinds: dict[str, list[str]] = {}  # names but for the numbers of blocks
        for n in dead:
            kinds.setdefault(re.sub(r"\d+", "#", n), []).append(n)
        causes = {n: cause for names in kinds.values() for cause in [_cause(run, names, learned)] for n in names}
    rows = [
        {
            "name": n,
            "kind": "adapter",
            "values": p.numel(),
            "gradient": size[n] / largest if largest else 0.0,
            "state": "dead" if n in dead else "alive",
        }
        for n, p in trained.items()
    ]
    changes, train_eval = difference(plain, evaluated), difference(learned, evaluated)
    found = Verification(rows, changes > 0, None, train_eval, None, "not an adapter of this package")
    total = sum(p.numel() for p in trained.values())
    for cause in dict.fromkeys(causes.values()):
        names = [n for n in dead if causes[n] == cause]
        count = sum(dead[n].numel() for n in names)
        found.problems.append(f"{count:,} of {total:,} trained values are dead ({names[0]} ...): {cause}")
    if not train_eval <= AGREE:
        fast = any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())
        ignored = "and eval equals the model without them: " if not found.changes_output else ""
        said = FAST_PATH if fast else "something acts in one mode only"
        found.problems.append(f"train and eval outputs differ by {train_eval:.1e}, {ignored}{said}")
    return found


def _cause(run: Runner, names: list[str], before: list[Tensor]) -> str:
    """Why these parameters are dead: whether the output moves with them says where to look."""
    params = [run.model.get_parameter(n) for n in names]
    kept = [p.detach().clone() for p in params]
    perturb(params, 1)
    moved = difference(before, run.values(_mode(run.model, True))) > 0
    with torch.no_grad():
        for p, value in zip(params, kept, strict=True):
            p.copy_(value)
    if moved:
        return CUT
    parts = names[0].split(".")
    above = (run.model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    return UNCALLED if any(isinstance(m, nn.MultiheadAttention) for m in above) else UNREAD


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A mode with dropout and batch statistics off, so that the modes can be compared."""
    model.train(training)
    rates = [(m, m.dropout) for m in model.modules() if isinstance(getattr(m, "dropout", None), float)]
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd | nn.modules.batchnorm._BatchNorm):
            m.training = False
    for m, _ in rates:
        m.dropout = 0.0
    try:
        yield
    finally:
        for m, rate in rates:
            m.dropout = rate


@contextlib.contextmanager
def _restored(model: nn.Module, trained: dict[str, nn.Parameter]) -> Iterator[None]:
    kept = [(p, p.detach().clone(), p.grad) for p in trained.values()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
        with torch.no_grad():
            for p, value, grad in kept:
                p.copy_(value)
                p.grad = grad
