"""The frozen prefix of a host: what runs before anything that trains, so that its result can be kept and used again.

Which module trains first is seen in a forward. A kept forward starts there: what enters that module is put in place,
and modules that are done before it do not run; where they would return something of the batch they return NaN, so that
nothing else of them can reach the output unseen.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from adaptsuite.bank import BANK, split_key
from adaptsuite.errors import UsageError
from adaptsuite.host import Handle
from adaptsuite.sites import find_sites

Says = Callable[[nn.Module, Any], Any]  # `predict` or `loss` of a task


class NoPrefix(UsageError):
    """Nothing can be kept of this host, for the reason given."""


class _Reached(Exception):
    """Carries what enters the cut out of a forward that ends there."""


def blocks_of(model: nn.Module) -> list[str]:
    """Paths of the host's blocks; none where no layout is known."""
    try:
        return [site.path for site in find_sites(model, "block")]
    except LookupError:
        return []


def first_trained(handle: Handle) -> set[str]:
    """Paths of modules of which one is the first that trains: the blocks around trained places, else their owners.

    Raises NoPrefix where everything trains, or something besides this adapter acts.
    """
    bank, adapter = handle.bank, handle.adapter
    if adapter.kept is not None:
        raise NoPrefix("everything trains")
    if bank.active != [handle.name]:
        raise NoPrefix(f"the adapters {', '.join(bank.active) or 'none'} act, not {handle.name!r} alone")
    blocks = blocks_of(handle.model)
    held = [split_key(key)[0] for key in (*adapter.tensors, *adapter.moved._buffers)]
    return {_around(path, blocks) or bank.owner(path) for path in [*(s.path for s in handle.sites), *held]}


def _around(path: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if f"{path}.".startswith(f"{block}.")), None)


class Cut:
    """Where the frozen prefix ends: in front of the module at `path`."""

    def __init__(self, model: nn.Module, path: str, ended: Sequence[str]):
        """ended: modules that are done before, and are not called again."""
        self.model, self.path = model, path
        self.ended = {name: model.get_submodule(name) for name in ended}
        self.stubs: dict[str, _Stub] = {}
        self.dtype, self.key = torch.float32, ""  # of what enters; its name, where it is no first argument
        self.is_last = False  # what the host returns is what the module at the cut returns

    def enter(self, says: Says, batch: Any) -> Tensor:
        """(B, ...) what enters the cut; the forward goes no further."""
        hook = self._hook(self._leave)
        try:
            says(self.model, batch)
        except _Reached as reached:
            return reached.args[0]
        finally:
            hook.remove()
        raise NoPrefix(f"{self.path} was not called")

    @contextlib.contextmanager
    def entering(self, x: Tensor) -> Iterator[None]:
        """A forward inside the `with` starts at the cut with x (B, ...); its inputs are looked at for shapes only."""
        x, end = x.to(self.dtype), self.model.get_submodule(self.path)
        hook = self._hook(partial(self._replace, x))
        forwards = {module: self.stubs[name].of(len(x)) for name, module in self.ended.items()}
        if self.is_last:
            forwards = {self.model: lambda *args, **kwargs: end(**{self.key: x}) if self.key else end(x)}
        before = [module.__dict__.get("forward") for module in forwards]
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        try:
            yield
        finally:
            hook.remove()
            for module, forward in zip(forwards, before, strict=True):
                del module.__dict__["forward"]
                if forward is not None:
                    module.__dict__["forward"] = forward

    def learn(self, says: Says, batches: Sequence[Any]) -> list[Tensor]:
        """Learns from two batches of different sizes what the ended modules return; gives what enters of both.

        Raises NoPrefix unless forwards from there say exactly what whole ones do.
        """
        entered, seen, whole = zip(*(self._watched(says, batch) for batch in batches), strict=True)
        sizes = [len(said) for said in whole]
        if [len(x) for x in entered] != sizes:
            raise NoPrefix(f"{self.path} does not get one row a sample: {list(entered[0].shape)} of {sizes[0]}")
        self.dtype = entered[0].dtype
        self.stubs = {name: _Stub(name, *(outputs[name] for outputs in seen), sizes) for name in self.ended}
        for x, batch, said in zip(entered, batches, whole, strict=True):
            with self.entering(x):
                if not torch.equal(says(self.model, batch), said):
                    raise NoPrefix(f"more of the frozen part than what enters {self.path} reaches the output")
        return list(entered)

    def _watched(self, says: Says, batch: Any) -> tuple[Tensor, dict[str, list], Tensor]:
        """What enters the cut in a whole forward, what the ended modules return, and what is said; sets `is_last`."""
        entered: list[Tensor] = []
        outputs: dict[str, list] = {name: [] for name in (*self.ended, self.path, "")}
        hooks = [self._hook(lambda _, args, kwargs: entered.append(self._given(args, kwargs).clone()))]
        for name, found in outputs.items():
            module = self.model.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda _, __, out, found=found: found.append(out)))
        try:
            said = says(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        ends, roots = outputs.pop(self.path), outputs.pop("")
        self.is_last = len(roots) == 1 and ends[-1] is roots[0]
        return entered[0], outputs, said

    def _hook(self, act: Callable):
        module = self.model.get_submodule(self.path)
        return module.register_forward_pre_hook(act, with_kwargs=True, prepend=True)  # before those of its own branch

    def _given(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The first tensor among the arguments of the module at the cut."""
        if not (args and isinstance(args[0], Tensor)):
            self.key = next((k for k, v in kwargs.items() if isinstance(v, Tensor)), "")
            if not self.key:
                raise NoPrefix(f"{self.path} is given no tensor")
        return kwargs[self.key] if self.key else args[0]

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        raise _Reached(self._given(args, kwargs))

    def _replace(self, x: Tensor, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        return (args, kwargs | {self.key: x}) if self.key else ((x, *args[1:]), kwargs)


class _Stub:
    """What a module returned, call by call: NaN for what is of the batch, the value for what is not."""

    def __init__(self, name: str, first: Sequence[Any], second: Sequence[Any], sizes: Sequence[int]):
        self.calls = []
        for one, two in zip(first, second, strict=True):
            (leaves, spec), (others, _) = tree_flatten(one), tree_flatten(two)
            if len(leaves) != len(others):
                raise NoPrefix(f"{name} returns other things for other samples")
            self.calls.append((spec, [_leaf(name, a, b, sizes) for a, b in zip(leaves, others, strict=True)]))

    def of(self, size: int) -> Callable[..., Any]:
        """A stand-in for the module's forward of `size` samples."""
        calls = iter(self.calls)

        def forward(*args: Any, **kwargs: Any) -> Any:
            spec, leaves = next(calls)
            return tree_unflatten([leaf(size) for leaf in leaves], spec)

        return forward


def _leaf(name: str, a: Any, b: Any, sizes: Sequence[int]) -> Callable[[int], Any]:
    """Number of samples -> one leaf of a module's output, which was `a` and `b` for so many."""
    if not isinstance(a, Tensor) or a.shape == b.shape:
        if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b):
            raise NoPrefix(f"{name} returns something that differs between samples and is no row of a batch")
        return lambda size: a
    name = f"{name} returns {a.dtype} of {list(a.shape)} for {sizes[0]} samples"
    if not a.is_floating_point() or a.ndim != b.ndim:
        raise NoPrefix(name)
    pairs = list(zip(a.shape, b.shape, strict=True))
    nan = a.new_full((), math.nan)

    def blank(size: int) -> Tensor:
        return nan.expand([n if n == m else n // sizes[0] * size for n, m in pairs])

    if [blank(size).shape for size in sizes] != [a.shape, b.shape]:
        raise NoPrefix(name)
    return blank


def find_cut(handle: Handle, says: Says, batch: Any) -> Cut:
    """The cut of an adapted host, as one forward shows it. Raises NoPrefix where no block lies before what trains."""
    model, places = handle.model, first_trained(handle)
    flags = ("grad_checkpointing", "gradient_checkpointing")
    if any(getattr(m, flag, False) for m in model.modules() for flag in flags):
        raise NoPrefix("checkpointing would run the frozen part again in backward")
    order = _order(model, says, batch)
    entered = [name for starts, name in order if starts]
    path = next((name for name in entered if name in places), "")
    if not path:
        raise NoPrefix("what trains acts on the host as a whole")
    if entered.count(path) > 1:
        raise NoPrefix(f"{path} is called {entered.count(path)} times in a forward")
    start = order.index((True, path))
    again = {name for _, name in order[start:]}
    ended = {name for starts, name in order[:start] if not starts and name not in again}
    blocks = blocks_of(model)
    if not ended or blocks and not any(_around(block, sorted(ended)) for block in blocks):
        raise NoPrefix(f"no block lies before {path}, the first that trains")
    return Cut(model, path, _outermost(model, ended))


def _order(model: nn.Module, says: Says, batch: Any) -> list[tuple[bool, str]]:
    """(starts, path) of every call of a module in one forward, as they start and end; those of adapters left out."""
    order: list[tuple[bool, str]] = []
    hooks = []
    for name, module in model.named_modules():
        if name and not f"{name}.".startswith(f"{BANK}."):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: order.append((True, name))))
            hooks.append(module.register_forward_hook(lambda *_, name=name: order.append((False, name))))
    try:
        says(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _outermost(model: nn.Module, ended: set[str]) -> list[str]:
    """Those that no other of them holds; in place of one with hooks inside, which must run, those inside it."""
    hooked = [name for name, module in model.named_modules() if _is_hooked(module)]
    chosen: list[str] = []
    for name in sorted(ended, key=lambda name: name.count(".")):
        inside = any(other.startswith(f"{name}.") for other in hooked)
        if not inside and not any(name.startswith(f"{other}.") for other in chosen):
            chosen.append(name)
    return chosen


def _is_hooked(module: nn.Module) -> bool:
    """Whether something looks at its calls, other than what only serves checkpointing."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__name__", "") != "open_gradient" for hook in hooks)
