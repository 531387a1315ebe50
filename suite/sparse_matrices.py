"""Matrices of which only some values are there: those train, are counted and are stored, the others are zero.

`take_mask(layer, "weight", mask)`: `layer.weight` goes on to be the whole matrix, made of a parameter with the values
that are left. Stored is that parameter, and beside it `weight_at`: int32 places, or one bit a place where that is less.
"""

import functools
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str]


def parts(adapter: nn.Module) -> list[nn.Module]:
    """The modules that hold an adapter's own parameters: what its sites share, and its branches."""
    shared = getattr(adapter, "shared", None)
    return [*([] if shared is None else [shared]), *adapter.branches.values()]


def matrices(adapter: nn.Module) -> list[Place]:
    """Module and name of each matrix in the parts of an adapter, masked or not, once."""
    modules = {id(m): m for part in parts(adapter) for m in part.modules()}.values()
    return [(m, name) for m in modules for name, p in m._parameters.items() if p is not None and p.ndim >= 2]


def whole(place: Place) -> Tensor:
    return getattr(*place)


def is_masked(place: Place) -> bool:
    return place[1] in place[0].__dict__.get("shapes", {})


def maskable(part: nn.Module) -> None:
    """Lets a part take the masks of a saved state (see adaptsuite.method.Method.on_step)."""
    part.__class__ = _class(type(part), ())


def take_mask(module: nn.Module, name: str, mask: Tensor | None) -> None:
    """Leaves the parameter `name` only its values where the mask (flat, bool, on the CPU) is True; None: all of them.

    The parameter becomes another one, (n, 1, ...) with as many dimensions as before: optimisers decay matrices and
    not vectors.
    """
    p, full = module._parameters[name], whole((module, name)).detach()
    shapes = {n: shape for n, shape in module.__dict__.get("shapes", {}).items() if n != name}
    for own in (f"{name}_at", f"{name}_places"):
        module._buffers.pop(own, None)
    if mask is not None:
        shapes[name] = tuple(full.shape)
        places = mask.nonzero()[:, 0]
        module.register_buffer(f"{name}_at", packed(mask).to(p.device))
        module.register_buffer(f"{name}_places", places.to(p.device), persistent=False)
        full = full.flatten()[places.to(p.device)].view(-1, *[1] * (full.ndim - 1))
    module._parameters[name] = nn.Parameter(full.clone(), p.requires_grad)
    module.shapes = shapes
    module.__class__ = _class(type(module), tuple(shapes))


def packed(mask: Tensor) -> Tensor:
    """The places where a flat mask is True, as int32, or as bits (uint8) where these take fewer bytes."""
    places = mask.nonzero()[:, 0].int()
    return places if 4 * len(places) < len(mask) / 8 else torch.from_numpy(np.packbits(mask.numpy()))


def unpacked(stored: Tensor, size: int) -> Tensor:
    stored = stored.cpu()
    if stored.dtype == torch.uint8:
        return torch.from_numpy(np.unpackbits(stored.numpy(), count=size).astype(bool))
    return torch.zeros(size, dtype=torch.bool).index_fill(0, stored.long(), True)


class _Maskable:
    """Mixed into the class of a part, and into that of each module in it that has a masked matrix."""

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Masks what is masked in a saved state of the part, and nothing else."""
        if hasattr(super(), "take_shapes"):
            super().take_shapes(state)
        for module, name, key in list(_keys(self)):
            stored, own = state.get(f"{key}_at"), module._buffers.get(f"{name}_at")
            if stored is not None and (own is None or not torch.equal(own.cpu(), stored.cpu())):
                take_mask(module, name, None)
                take_mask(module, name, unpacked(stored, whole((module, name)).numel()))
            elif stored is None and own is not None:
                take_mask(module, name, None)

    def __reduce_ex__(self, protocol):
        return _blank, (type(self).plain, tuple(self.__dict__.get("shapes", ()))), self.__getstate__()


def _keys(part: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Module, name, and key in the part's state, of every parameter."""
    for prefix, module in part.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                yield module, name, f"{prefix}.{name}".lstrip(".")


def dense_state(branch: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved state of a branch of this structure with its zeros written out."""
    maskable(branch)
    branch.take_shapes(state)
    dense = dict(state)
    for module, name, key in _keys(branch):
        if is_masked((module, name)):
            module._parameters[name].data = state[key]
            dense[key] = whole((module, name)).detach()
            del dense[f"{key}_at"]
    return dense


@functools.cache
def _class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A class of modules whose parameters of these names are read as whole matrices."""
    plain = kind.plain if issubclass(kind, _Maskable) else kind
    facts = {name: _whole_property(name) for name in names} | {"plain": plain, "__module__": plain.__module__}
    return type(plain.__name__, (_Maskable, plain), facts)


def _whole_property(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        values, shape = module._parameters[name], module.shapes[name]
        empty = values.new_zeros(int(np.prod(shape)))
        return empty.scatter_add(0, module._buffers[f"{name}_places"], values.flatten()).view(shape)

    return property(read)


def _blank(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _class(plain, names)
    return kind.__new__(kind)
