"""One forward that costs nothing: which modules a model calls, and which weights it reads without a call."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from adaptsuite.sites import example_input


def call_arguments(sample: Any) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) of one forward: a dict is keywords, a tuple or list is positions, (tuple, dict) is both."""
    if isinstance(sample, dict) or hasattr(sample, "keys"):
        return (), dict(sample)
    if isinstance(sample, (tuple, list)):
        if len(sample) == 2 and isinstance(sample[0], tuple) and isinstance(sample[1], dict):
            return sample
        return tuple(sample), {}
    return (sample,), {}


def meta_copy(model: nn.Module) -> nn.Module:
    """The model with tensors that have shapes and no values: a forward costs no arithmetic."""
    memo = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(_meta(p), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = _meta(b)
    return copy.deepcopy(model, memo)


def _meta(tensor: Tensor) -> Tensor:
    if isinstance(tensor, FakeTensor):  # a plain one in its place: fake tensors on meta are twice as slow
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta")


def called_modules(model: nn.Module, sample: Any = None) -> set[str]:
    """Paths of the modules that one forward calls; tried on a meta copy first, then for real."""
    args, kwargs = example_input(model) if sample is None else call_arguments(sample)
    try:
        shadow = meta_copy(model)
        to_meta = tree_map(lambda v: _meta(v) if isinstance(v, Tensor) else v, (args, kwargs))
        return _record_calls(shadow, *to_meta)
    except Exception:  # value-dependent control flow has no meta form
        return _record_calls(model, args, kwargs)


def _record_calls(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> set[str]:
    called: set[str] = set()
    modes = [(m, m.training) for m in model.modules()]
    handles = [m.register_forward_pre_hook(lambda *_, n=n: called.add(n)) for n, m in model.named_modules()]
    try:
        for m, _ in modes:
            m.training = False
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for h in handles:
            h.remove()
        for m, training in modes:
            m.training = training
    return called
