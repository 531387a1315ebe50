"""The exponential average of what a run trains (EMA), which is what gets validated and kept."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Average:
    """average <- d average + (1 - d) weights after every step, d = min(decay, (1 + t) / (10 + t)), t steps before it.

    Of all that the handle's `state` holds, buffers included: the mean that a BatchNorm would see under averaged weights
    is the average of the means under each, where its input is linear in them, and not the newest one. Integers, and
    what is not finite at the start (masks), are copied. At least float32, also beside half-precision weights.
    It has a handle's `state` and `load_state` itself.
    """

    def __init__(self, handle, decay: float):
        self.handle, self.decay, self.steps = handle, decay, 0
        self.tensors: dict[str, Tensor] = {}
        self.averaged: list[str] = []
        for name, value in handle.state().items():
            if value.is_floating_point() and value.isfinite().all():
                self.averaged.append(name)
                value = value.to(torch.promote_types(value.dtype, torch.float32))
            self.tensors[name] = value.detach().clone()

    def state(self) -> dict[str, Tensor]:
        return self.tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, own in self.tensors.items():
            own.copy_(state[name])

    def update(self) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        live = self.handle.state()
        old = [self.tensors[name] for name in self.averaged]
        torch._foreach_lerp_(old, [live[n].to(t.dtype) for n, t in zip(self.averaged, old, strict=True)], 1 - decay)
        for name in live.keys() - set(self.averaged):
            self.tensors[name].copy_(live[name])
        self.steps += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The handle holds the average inside the `with`, and what it held before afterwards."""
        live = {name: value.clone() for name, value in self.handle.state().items()}
        self.handle.load_state(self.tensors)
        try:
            yield
        finally:
            self.handle.load_state(live)
