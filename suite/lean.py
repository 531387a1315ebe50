"""Lean activations: what is cheap to compute again is not kept for the backward pass.

Outputs of norms (layer, RMS, group), of GELU, SiLU and their like, and products of tensors that are kept anyway are
saved as the function that made them and its inputs, which autograd keeps in any case, and are computed again where
backward asks for them. A transformer with trained weights at every linear layer keeps about two thirds of the bytes;
gradients are the same bit for bit wherever the function is deterministic.

A saved tensor is recognised by a live weak reference to the output itself, to the tensor it is a view of, or to the
tensor it was cast from (autocast), never by its address: freed memory is given out again at once.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

CHEAP = {
    F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.group_norm, torch.group_norm,
    F.gelu, F.silu, F.mish, F.hardswish, F.elu, F.softplus,
}  # fmt: skip
PRODUCT = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}

_local = threading.local()


@contextlib.contextmanager
def lean(keep: Callable[[Tensor], Any] = lambda tensor: None) -> Iterator[None]:
    """Forwards inside the `with` save lean activations; backward may run outside, in any thread.

    keep: told of each tensor that is really kept. Inside another `lean`, without gradients, and in what torch.compile
    traces this does nothing; compile_host(lean=True) tells the compiler to do the same. Blocks under gradient
    checkpointing save nothing that could be left out. An input that was changed in place between forward and backward
    raises RuntimeError, as it does without `lean`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or getattr(_local, "entered", False):
        yield
        return
    _local.entered, saving = True, _Saving(keep)
    try:
        with saving, torch.autograd.graph.saved_tensors_hooks(saving.pack, _unpack):
            yield
    finally:
        _local.entered = False


def make_lean(bank) -> None:
    """Every forward of the bank's host is in a `lean` from now on, until the bank is released."""
    if bank.lean is None:
        bank.lean = Around()
        bank.fixed_hooks += [
            bank.root.register_forward_pre_hook(bank.lean.before, prepend=True),
            bank.root.register_forward_hook(bank.lean.after, always_call=True),
        ]


class Around:
    """Hooks that open a `lean` when a module is called and close it however the call ends."""

    def before(self, module, args) -> None:
        if not torch.compiler.is_compiling():
            around = lean()
            around.__enter__()
            _stack().append(around)

    def after(self, module, args, output) -> None:
        if not torch.compiler.is_compiling():
            _stack().pop().__exit__(None, None, None)


def _stack() -> list:
    return _local.__dict__.setdefault("stack", [])


@dataclass(frozen=True)
class _Kept:
    """A tensor as autograd would keep it."""

    tensor: Tensor
    version: int

    def value(self) -> Tensor:
        if self.tensor._version != self.version:  # hooks take autograd's own check away
            shape = tuple(self.tensor.shape)
            raise RuntimeError(f"a tensor {shape} that backward needs was changed in place after the forward")
        return self.tensor


@dataclass(frozen=True)
class _Made:
    """How a tensor was made: `args` and `kwargs` hold tensors while it is made, what `pack` gives for them later."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    autocast: dict[str, Any]  # of the forward; backward runs without
    version: int  # of the tensor itself when it was made

    def value(self) -> Tensor:
        with torch.no_grad(), torch.autocast(**self.autocast):
            return self.function(*_each(_Packed, _unpack, self.args), **_each(_Packed, _unpack, self.kwargs))

    def packed(self, pack: Callable[[Tensor], Any]) -> "_Made":
        return replace(self, args=_each(Tensor, pack, self.args), kwargs=_each(Tensor, pack, self.kwargs))


@dataclass(frozen=True)
class _Derived:
    """A view or a cast of a tensor that is made again."""

    made: _Made
    dtype: torch.dtype
    geometry: tuple[torch.Size, tuple[int, ...], int]

    def value(self) -> Tensor:
        return self.made.value().to(self.dtype).as_strided(*self.geometry)


_Packed = (_Kept, _Made, _Derived)


def _unpack(packed: _Kept | _Made | _Derived) -> Tensor:
    return packed.value()


def _each(kind: type | tuple[type, ...], change: Callable, values: tuple | dict[str, Any]):
    if isinstance(values, dict):
        return {name: change(v) if isinstance(v, kind) else v for name, v in values.items()}
    return tuple(change(v) if isinstance(v, kind) else v for v in values)


class _Saving(TorchFunctionMode):
    """Sees how tensors are made, and packs those that autograd saves."""

    def __init__(self, keep: Callable[[Tensor], Any]):
        super().__init__()
        self.keep = keep
        self.made = WeakTensorKeyDictionary()  # tensor -> _Made

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if torch.compiler.is_compiling():  # a part of the model is traced
            return out
        cheap = function in CHEAP or function in PRODUCT and len(args) == 2 and self._factors_stay(*args)
        # without a gradient the function's input is not kept either; in place it is gone
        if cheap and out.requires_grad and not any(out is value for value in (*args, *kwargs.values())):
            self.made[out] = _Made(function, args, kwargs, _autocast(out.device.type), out._version)
            out.grad_fn.metadata["made"] = TensorWeakRef(out)
        return out

    def _factors_stay(self, a, b) -> bool:
        """Whether a product's factors are there anyway: for its own backward, as leaves, or made again themselves."""
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return all(x.is_leaf or other.requires_grad or self._source(x) is not None for x, other in ((a, b), (b, a)))

    def pack(self, tensor: Tensor) -> _Kept | _Made | _Derived:
        source = self._source(tensor)
        if source is None:
            kept = tensor.detach()  # a node that saves its own output would hold itself
            self.keep(kept)
            return _Kept(kept, tensor._version)
        made = self.made[source].packed(self.pack)
        if tensor is source:
            return made
        return _Derived(made, tensor.dtype, (tensor.shape, tensor.stride(), tensor.storage_offset()))

    def _source(self, tensor: Tensor) -> Tensor | None:
        """The living, unchanged tensor of `made` that this one is, is a view of, or was cast from."""
        whole = tensor if tensor._base is None else tensor._base
        if (node := whole.grad_fn) is None:
            return None
        if (made := self.made.get(whole)) is not None:
            return whole if whole._version == made.version else None
        if node.name() != "ToCopyBackward0" or whole._version:
            return None
        source = node.next_functions[0][0].metadata.get("made", _nothing)()
        same = source is not None and source.device == whole.device and source.stride() == whole.stride()
        return self._source(source) if same else None


def _autocast(kind: str) -> dict[str, Any]:
    """The arguments of torch.autocast that give the state of now."""
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return {"device_type": kind, "dtype": dtype, "enabled": on}


def _nothing() -> None:
    return None
