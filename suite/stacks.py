"""Tensors of several holders as one, and functions that run over rows, each with its own of them."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from adaptsuite.bank import Context
from adaptsuite.errors import UsageError

# a tensor or number of a module, by name; looked up anew each time, as another one may be put there
Slot = tuple[nn.Module, str]
_turns = threading.RLock()  # a template holds the tensors of one thread's rows at a time


class Stack:
    """The same tensors and numbers of S holders as one tensor (S, ...) each; smaller ones are filled up with zeros."""

    def __init__(self, holders: Sequence[Sequence[Slot]]):
        self.holders = [list(slots) for slots in holders]
        self.built: list[Tensor] = []
        self.seen: list[tuple[int, int]] | None = None

    def tensors(self) -> list[Tensor]:
        """Under autograd made anew, so that gradients reach each holder; else kept until one of them changes.

        A compiled graph looks for no changes: after them it needs `refresh`.
        """
        if torch.is_grad_enabled() and any(t.requires_grad for t in self.sources()):
            return self._stacked()
        if not torch.compiler.is_compiling():
            self.refresh()
        return self.built

    def refresh(self) -> None:
        """Writes into the tensors that are there where their shapes allow it: compiled graphs read these very ones."""
        seen = [(t.data_ptr(), t._version) for t in self.sources()]
        if seen == self.seen:
            return
        with torch.inference_mode(False), torch.no_grad():
            new = self._stacked()
            alike = [(t.shape, t.device, t.dtype) for t in new] == [(t.shape, t.device, t.dtype) for t in self.built]
            if alike:
                for old, value in zip(self.built, new, strict=True):
                    old.copy_(value)
            else:
                self.built = new
        self.seen = seen

    def sources(self) -> Iterator[Tensor]:
        return (v for slots in self.holders for v in map(value_at, slots) if isinstance(v, Tensor))

    def _stacked(self) -> list[Tensor]:
        like = next(self.sources())
        columns = [[value_at(slot) for slot in column] for column in zip(*self.holders, strict=True)]
        return [_stack(c) if isinstance(c[0], Tensor) else like.new_tensor(c) for c in columns]


def value_at(slot: Slot) -> Tensor | float:
    module, name = slot
    for store in (module._parameters, module._buffers):
        if name in store:
            return store[name]
    return module.__dict__[name]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    if len({t.shape for t in tensors}) > 1:
        largest = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
        ends = [[n for large, own in zip(largest, t.shape, strict=True) for n in (large - own, 0)] for t in tensors]
        tensors = [F.pad(t, end[::-1]) for t, end in zip(tensors, ends, strict=True)]  # from the last dimension on
    return torch.stack(list(tensors))


def owned(module: nn.Module) -> list[Slot]:
    """Where its parameters and buffers are."""
    return [
        (sub, name) for sub in module.modules() for store in (sub._parameters, sub._buffers)
        for name, value in store.items() if value is not None
    ]  # fmt: skip


def over_rows(
    one: Callable, own: Any, given: list, context: Context, dims: list[int | None] | None = None, out_dim: int = 0
) -> Any:
    """one(own, given, [token mask, features]) of each row: own (B, ...) without its first dimension, the others as
    batches of one, or of as many as a row has windows."""
    num, dims = len(context.index), dims or [0] * len(given)
    seen = [context.token_mask, context.features]
    seen_dims = [0 if t is not None and len(t) == num else None for t in seen]
    for t, dim in zip(given, dims, strict=True):
        if dim is not None:
            divides(num, t.shape[dim])
    leaves, layout = tree_flatten(own)
    if num == 1:
        return one(tree_unflatten([None if t is None else t[0] for t in leaves], layout), given, seen)

    def split(values: list, dims: list[int | None]) -> list:
        return [t if d is None else t.unflatten(d, (num, -1)) for t, d in zip(values, dims, strict=True)]

    def run(leaves, given, seen):
        return one(tree_unflatten(leaves, layout), given, seen)

    in_dims = ([None if t is None else 0 for t in leaves], dims, seen_dims)
    mapped = torch.vmap(run, in_dims, out_dim, randomness="different")
    found = mapped(leaves, split(given, dims), split(seen, seen_dims))
    if isinstance(found, Tensor):
        return found.flatten(out_dim, out_dim + 1)
    return [t.flatten(out_dim, out_dim + 1) for t in found]


@contextlib.contextmanager
def holding(values: Any) -> Iterator[None]:
    """Puts tensors into their modules' `__dict__`, which wins over parameters, inside the `with`."""
    values = list(values)
    before = [(module, name, module.__dict__[name]) for (module, name), _ in values if name in module.__dict__]
    for (module, name), value in values:
        module.__dict__[name] = value
    try:
        yield
    finally:
        for (module, name), _ in values:
            del module.__dict__[name]
        for module, name, value in before:
            module.__dict__[name] = value


def turn():
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _turns


def divides(num: int, found: int) -> None:
    if found % num:
        raise UsageError(f"per_sample has {num} rows, a site gets {found}")
