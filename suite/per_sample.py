"""Several adapters in one batch: every row goes through its own adapter, all in one pass through the backbone.

What adapters of one structure own at one place is stacked, (S, ...). A forward takes each row's own out of it, and
`torch.vmap` runs the branch over the rows: batched products, no loop over adapters (as S-LoRA has it for LoRA alone,
arXiv:2311.03285, section 5). The backbone runs as ever, on the whole batch; only a module that reads a changed weight
or bias, such as a norm, the head or an attention with a packed projection, is itself run over rows.
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from adaptsuite.bank import (
    Adapter,
    Bank,
    Context,
    PackedPort,
    Port,
    changed,
    has_forward,
    split_key,
    tensor_key,
    tensors_in,
    weight_params,
)
from adaptsuite.errors import UsageError, nearest
from adaptsuite.method import Method
from adaptsuite.sites import Site, find_sites
from adaptsuite.stacks import Slot, Stack, divides, holding, over_rows, owned, turn, value_at

_numbers = itertools.count()


def activate(bank: Bank, names: Sequence[str], rows: Tensor | Sequence[str | None]) -> None:
    """What `Handle.activate` does with per_sample."""
    index = row_index(names, rows, next(bank.root.parameters()).device)
    if bank.by_row is None or bank.by_row.names != list(names):
        refuse(bank, names)
        bank.activate(names, Wiring(bank, names))
    bank.by_row.refresh()
    bank.context = replace(bank.context, index=index, wiring=bank.by_row.number)


def row_index(names: Sequence[str], rows: Tensor | Sequence[str | None], device: torch.device) -> Tensor:
    """(B,) int64: the place in `names` of each row's adapter, -1 for the plain backbone.

    rows: such numbers, or names with None for the backbone. Raises LookupError for an unknown name, UsageError for
    what is no (B,) whole numbers from -1 on and below the number of names.
    """
    if not isinstance(rows, Tensor):
        places = {None: -1, **{name: i for i, name in enumerate(names)}}
        for row in rows:
            if isinstance(row, str) and row not in places:
                raise LookupError(f"no adapter {row!r} among those of the rows; {nearest(row, names)}")
        rows = torch.tensor([places.get(row, row) for row in rows])
    if rows.ndim != 1 or not len(rows) or rows.is_floating_point() or rows.dtype == torch.bool:
        raise UsageError(f"per_sample is {rows.dtype} of shape {tuple(rows.shape)}, whole numbers (B,) are expected")
    if not -1 <= int(rows.min()) <= int(rows.max()) < len(names):
        raise UsageError(f"per_sample has {sorted(set(rows.tolist()))}, -1 to {len(names) - 1} are expected")
    return rows.to(device, torch.long)


def refuse(bank: Bank, names: Sequence[str]) -> None:
    """Raises UsageError with the reason where one of the adapters cannot share a batch with others."""
    for name in names:
        method, branches = bank.adapters[name].method, bank.adapters[name].branches.values()
        reason = None
        if method.in_place:
            reason = "changes the backbone itself, which all rows share"
        elif any(hasattr(b, "enter") for b in branches):
            reason = "changes what a whole block gets, which all rows share"
        elif any(getattr(b, "shrink", None) is not None for b in branches):
            reason = "joins tokens, and all rows of a batch must have equally many"
        if reason:
            raise UsageError(f"adapter {name!r} cannot be one of several in a batch: method {method.name!r} {reason}")


# ---- what rows take their own of


class Held:
    """A base tensor that adapters hold copies of; the others' rows have the base's own."""

    def __init__(self, bank: Bank, names: Sequence[str], path: str, param: str):
        key, base = tensor_key(path, param), bank.root.get_submodule(path)
        holders: list[Slot] = []
        places = []
        for adapter in (bank.adapters[name] for name in names):
            stores = (s for s in (adapter.tensors, adapter.moved) if key in s._parameters or key in s._buffers)
            store = next(stores, None)
            places.append(None if store is None else len(holders))
            holders += [] if store is None else [(store, key)]
        self.stack = Stack([[slot] for slot in [*holders, (base, param)]])
        self.places = torch.tensor([len(holders) if place is None else place for place in [*places, None]])
        lengths = [t.shape[:1].numel() for t in self.stack.sources()]
        self.lengths = torch.tensor(lengths) if len(set(lengths)) > 1 else None

    def at(self, index: Tensor) -> Tensor:
        """(B, ...): each row's own."""
        if self.places.device != index.device:
            self.places = self.places.to(index.device)
        return self.stack.tensors()[0].index_select(0, self.places[index])


class Rows:
    """Branches of one structure at one site, of some of the adapters; a port takes it for a branch."""

    inside_attention = True

    def __init__(self, site: Site, members: Mapping[int, tuple[Adapter, nn.Module]], num: int, shared: dict):
        self.site = site
        owners = [adapter for adapter, _ in members.values()]
        branches = [branch for _, branch in members.values()]
        self.template, first = branches[0], owners[0]
        self.needs_grid = getattr(self.template, "needs_grid", False)
        slots = [[*owned(b), *((b, name) for name in _differing(branches))] for b in branches]
        self.stacks, self.targets = [Stack(slots)] if slots[0] else [], slots[0]
        if getattr(first, "shared", None) is not None:  # one stack for all sites
            key = tuple(id(a) for a in owners)
            self.stacks.append(shared.setdefault(key, Stack([owned(a.shared) for a in owners])))
            self.targets = [*self.targets, *owned(first.shared)]
        self.places = torch.full((num + 1,), -1)
        self.places[list(members)] = torch.arange(len(members))

    def parameters(self) -> Iterator[Tensor]:
        return (v for v in map(value_at, self.targets) if isinstance(v, nn.Parameter))

    def at(self, index: Tensor) -> tuple[list[Tensor], Tensor]:
        """Each row's own tensors (B, ...), and whether it has any (B,)."""
        if self.places.device != index.device:
            self.places = self.places.to(index.device)
        places = self.places[index]
        taken = places.clamp(min=0)
        return [t.index_select(0, taken) for stack in self.stacks for t in stack.tensors()], places >= 0

    def __call__(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        _refuse_batch_statistics(self.template)

        def one(own: tuple[list[Tensor], Tensor], tokens: list[Tensor], seen: list[Tensor | None]) -> Tensor:
            mask, features = seen
            with holding(zip(self.targets, own[0], strict=True)):
                out = self.template(*tokens, replace(context, token_mask=mask, features=features))
            return torch.where(own[1], out, tokens[1])

        own, there = self.at(_index(context))
        if "rows" in type(self.template).__dict__:
            named = {name: t for (_, name), t in zip(self.targets, own, strict=True)}
            divides(len(there), len(y))
            out = self.template.rows(named, there, *(t.reshape(len(there), -1, t.shape[-1]) for t in (x, y)))
            return out.reshape(y.shape)
        with turn():
            return over_rows(one, (own, there), [x, y], context)

    def change(self, own: tuple[list[Tensor], Tensor], value: Tensor, param: str) -> Tensor:
        """A base tensor as one row's branch makes it."""
        with holding(zip(self.targets, own[0], strict=True)):
            return torch.where(own[1], changed(value, self.site, self.template, param), value)


def _differing(branches: Sequence[nn.Module]) -> list[str]:
    """Names of the numbers in which the branches differ, such as LoRA's scale."""
    numbers = [name for name, value in vars(branches[0]).items() if isinstance(value, float)]
    return [name for name in numbers if len({getattr(b, name) for b in branches}) > 1]


def _structure(method: Method, branch: nn.Module) -> tuple:
    """What branches of one stack have in common: the class, the settings that must not vary, and the shapes."""
    free = {"sites", "blocks", *method.varying}
    settings = [(f.name, getattr(method, f.name)) for f in fields(method) if f.name not in free]
    shapes = [() if method.varying else tuple(value_at(slot).shape) for slot in owned(branch)]
    state = [(k, v) for k, v in vars(branch).items() if isinstance(v, int | str | tuple) and k != "training"]
    return type(method), type(branch), repr(settings), repr(state), tuple(shapes)


class RowShadow:
    """Runs a module over rows, each with its own values of weights and biases that the module, or one in it, reads."""

    def __init__(self, bank: Bank, path: str, dim: int):
        self.bank, self.path, self.dim = bank, path, dim  # dim: of the batch in what the module gets
        self.entries: dict[tuple[str, str], tuple[Held | None, list[Rows]]] = {}

    def place(self, module: nn.Module) -> "RowShadow":
        self.module, self.before = module, module.__dict__.get("forward")
        module.__dict__["forward"] = self.forward
        self.mark = module.register_forward_pre_hook(_nothing)  # torch's fused encoder layer passes by what has none
        return self

    def remove(self) -> None:
        del self.module.__dict__["forward"]
        if self.before is not None:
            self.module.__dict__["forward"] = self.before
        self.mark.remove()

    def forward(self, *args, **kwargs):
        forward = self.before or type(self.module).forward.__get__(self.module)
        context = self.bank.context
        index = _index(context)
        for path, _ in self.entries:
            _refuse_batch_statistics(self.bank.root.get_submodule(path))
        leaves, layout = tree_flatten((args, kwargs))
        dims = self._dims(args, kwargs) if len(index) > 1 else None
        form: list[Any] = []

        def one(own: tuple, given: list, seen: list[Tensor | None]) -> list[Tensor]:
            values, row, classes = own
            own_context = replace(context, index=row, token_mask=seen[0], features=seen[1])
            args, kwargs = tree_unflatten(given, layout)
            with self.bank.within(own_context), holding(self._values(values)):
                out, spec = tree_flatten(forward(*args, **kwargs))
            form[:] = [spec, out]
            found = [t for t in out if isinstance(t, Tensor)]
            return found if classes is None else [_without(t, classes) for t in found]

        with turn():
            own = [(h and h.at(index), [rows.at(index) for rows in deltas]) for h, deltas in self.entries.values()]
            own = (own, index[:, None], self._classes(index))
            with self._attention(index):
                found = iter(over_rows(one, own, leaves, context, dims, self.dim))
        return tree_unflatten([next(found) if isinstance(t, Tensor) else t for t in form[1]], form[0])

    def _attention(self, index: Tensor):
        """On the CPU torch's fused attention has no form for rows and would run once for each of them."""
        if index.device.type != "cpu" or len(index) == 1 or not next(self.module.children(), None):
            return contextlib.nullcontext()
        return sdpa_kernel(SDPBackend.MATH)

    def _values(self, own: Sequence[tuple[Tensor | None, list]]) -> Iterator[tuple[Slot, Tensor]]:
        for (path, param), (_, deltas), (value, changes) in zip(self.entries, self.entries.values(), own, strict=True):
            module = self.bank.root.get_submodule(path)
            value = value_at((module, param)) if value is None else value
            for rows, change in zip(deltas, changes, strict=True):
                value = rows.change(change, value, param)
            yield (module, param), value

    def _classes(self, index: Tensor) -> Tensor | None:
        """(B,) outputs of each row's own head, where they differ."""
        held = self.entries.get((self.path, "weight"), (None,))[0]
        if held is None or held.lengths is None:
            return None
        return held.lengths.to(index.device)[held.places.to(index.device)[index]]

    def _dims(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int | None]:
        """Of each thing that the module gets the dimension that counts rows; None for masks and tables of all."""
        # by name and not by identity: a compiled graph would be bound to the very tensor
        given = [("", t) for t in tree_flatten(args)[0]]
        given += [(name, t) for name, value in kwargs.items() for t in tree_flatten(value)[0]]
        first = next(t for _, t in given if isinstance(t, Tensor))
        rows = first.shape[self.dim]

        def dim(name: str, t: Any) -> int | None:
            if not isinstance(t, Tensor) or not t.ndim:
                return None
            if "padding" in name:
                return 0
            if t.shape == first.shape:
                return self.dim
            if t.ndim == 2 and first.ndim > 2 and self.path:  # (T, D) of positions, (T, T) of a mask
                return None
            square = t.ndim == 3 and t.shape[1] == t.shape[2]  # (B, T, T), (B * heads, T, T) or (heads, T, T)
            at = 0 if square else self.dim
            if t.ndim <= at or (t.shape[at] % rows if square else t.shape[at] != rows):
                return None
            if t.ndim == 3 and t.shape[at] == rows and (square or rows == first.shape[1 - self.dim]):
                shape = tuple(t.shape)
                raise UsageError(
                    f"{self.path} gets {shape}, of {rows} rows or of something else: try more or fewer rows"
                )
            return at

        return [dim(name, t) for name, t in given]


def _without(logits: Tensor, classes: Tensor) -> Tensor:
    """Logits behind a row's own classes are none."""
    return logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= classes, float("-inf"))


def _index(context: Context) -> Tensor:
    if context.index is None:
        raise UsageError("no adapter is named for the rows: call activate(per_sample=...) in the thread that runs them")
    return context.index


def _refuse_batch_statistics(module: nn.Module) -> None:
    if any(isinstance(m, _BatchNorm) and m.training for m in module.modules()):
        raise UsageError("batch statistics of one adapter cannot be taken over rows of several: train them one by one")


def _nothing(module: nn.Module, args) -> None:
    """Stays at a module only to be seen."""


# ---- where they act


class Wiring:
    """Ports and shadows of several adapters whose rows share batches."""

    def __init__(self, bank: Bank, names: Sequence[str]):
        self.bank, self.names, self.number = bank, list(names), next(_numbers)
        self.ports: dict[tuple[str, bool], Port] = {}
        self.shadows: dict[str, RowShadow] = {}
        self.shared: dict[tuple, Stack] = {}
        self.stacks: dict[int, Stack] = {}
        self.second = _batch_second(bank.root)
        for adapter in (bank.adapters[name] for name in names):
            for path, param in map(split_key, (*adapter.tensors, *adapter.moved._buffers)):
                self._entry(path, param)
        for rows in self._rows():
            self.stacks |= {id(stack): stack for stack in rows.stacks}
            packed = bank.packed(rows.site, rows) if has_forward(rows.template) else None
            if packed is not None or bank.acts_by_call(rows.site, rows.template):
                self._port(rows, packed)
            else:
                for param in weight_params(rows.site, rows.template):
                    self._entry(rows.site.path, param)[1].append(rows)

    def refresh(self) -> None:
        for stack in self.stacks.values():
            stack.refresh()

    def check_batch(self, module: nn.Module, args, kwargs) -> None:
        """Of the root: as many rows as the index has, which was given for these adapters."""
        context = self.bank.context
        num, first = len(_index(context)), next(tensors_in((args, kwargs)), None)
        if context.wiring != self.number:
            raise UsageError(
                "other adapters are active than when the rows were named: call activate(per_sample=...) anew"
            )
        if first is not None and len(first) != num:
            raise UsageError(f"per_sample has {num} rows, the batch has {len(first)}")

    def _batch_dim(self, path: str) -> int:
        """0 or 1; torchaudio's Conformer puts its batch first for the convolution."""
        return int(path.startswith(self.second) and ".conv_module" not in path)

    def _rows(self) -> list[Rows]:
        groups: dict[tuple, tuple[Site, dict[int, tuple[Adapter, nn.Module]]]] = {}
        for i, adapter in enumerate(self.bank.adapters[name] for name in self.names):
            for key, branch in adapter.branches.items():
                kind = (key, _structure(adapter.method, branch))
                groups.setdefault(kind, (adapter.sites[key], {}))[1][i] = (adapter, branch)
        return [Rows(site, members, len(self.names), self.shared) for site, members in groups.values()]

    def _port(self, rows: Rows, packed: str | None) -> None:
        key = (rows.site.path if packed is None else packed, packed is not None)
        port = self.ports.setdefault(key, Port(self.bank) if packed is None else PackedPort(self.bank))
        turn = 0  # groups of one turn change different features: they are joined at once
        while any(_overlap(rows.site, site) for site, _ in port.table.get(f"{turn}", ())):
            turn += 1
        site = rows.site if packed else replace(rows.site, batch_first=not self._batch_dim(rows.site.path))
        port.add(f"{turn}", site, rows)

    def _entry(self, path: str, param: str) -> tuple[Held | None, list[Rows]]:
        owner = self.bank.owner(path)
        shadow = self.shadows.setdefault(owner, RowShadow(self.bank, owner, self._batch_dim(owner)))
        if (path, param) not in shadow.entries:
            key = tensor_key(path, param)
            holds = any(
                key in a.tensors or key in a.moved._buffers for a in (self.bank.adapters[n] for n in self.names)
            )
            held = Held(self.bank, self.names, path, param) if holds else None
            if held is not None:
                self.stacks[id(held.stack)] = held.stack
                module = self.bank.root.get_submodule(path)
                if held.lengths is not None and (owner != path or "weight" not in module._parameters):
                    raise UsageError(f"{path}.{param} has other lengths in other adapters: rows cannot share a batch")
            shadow.entries[path, param] = (held, [])
        return shadow.entries[path, param]


def _overlap(a: Site, b: Site) -> bool:
    return a.rows is None or b.rows is None or (a.rows[0] < b.rows[1] and b.rows[0] < a.rows[1])


def _batch_second(root: nn.Module) -> tuple[str, ...]:
    """Beginnings of the paths of modules that get (T, B, D): what such blocks stand in, an encoder's norm included."""
    try:
        around = {site.path.rpartition(".")[0] for site in find_sites(root, "block") if not site.batch_first}
    except LookupError:
        return ()
    outer = {path.rpartition(".")[0] for path in around}
    encoders = (nn.TransformerEncoder, nn.TransformerDecoder)
    around |= {path for path in outer if isinstance(root.get_submodule(path), encoders)}
    return tuple(f"{path}." for path in around)
