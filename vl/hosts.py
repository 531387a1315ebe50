"""The parts of vision-language models: which of them train, how fast, and the table of it before training starts.

A part is a component with blocks (vision tower, Q-Former, language model) or a module between components (projector,
head). Parts are named by path and never by suffix: `q_proj` is in every tower, `language_model` is one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from adaptsuite.bank import BANK, is_base, tensor_key
from adaptsuite.errors import UsageError, nearest
from adaptsuite.host import Handle, attach
from adaptsuite.method import Method, resolve
from adaptsuite.sites import component_info, component_prefixes, patch_maps

Kind = Literal["vision", "language", "bridge"]
Choice = Literal["freeze", "adapt", "full"]
TOKEN_TABLES = ("token_embedding", "word_embeddings", "embed_tokens", "wte", "shared")


@dataclass(frozen=True)
class Part:
    """One part of a host; `bridge` is what lies between towers: projectors, Q-Formers, heads, free parameters."""

    name: str  # path in the host; "" for a host that is one tower
    kind: Kind
    family: str  # library.Class; "parameter" for one that no module between towers holds
    component: bool  # has blocks, so that it can be adapted
    root: str  # path of the module that holds it

    def holds(self, path: str) -> bool:
        return not self.root or path == self.root or path.startswith(f"{self.root}.")


def parts(model: nn.Module) -> list[Part]:
    """All parts: the components first, in the order of the model, then what lies between them."""
    patched, found = patch_maps(model), []
    modules = dict(model.named_modules())
    for info in component_info(model):
        root = info.prefix if info.prefix in modules else info.prefix.rpartition(".")[0]  # open_clip's text lies above
        names = {name.rpartition(".")[2] for name, _ in modules[root].named_modules()}
        kind = "vision" if info.prefix in patched else "language" if names & set(TOKEN_TABLES) else "bridge"
        found.append(Part(info.prefix, kind, info.family, True, root))
    taken = [part.root for part in found]
    if not all(taken):  # a tower on the root of the model holds what is no other's
        return found
    return found + _between(model, "", taken)


def _between(model: nn.Module, path: str, taken: list[str]) -> list[Part]:
    """The largest modules at or below a path that hold no component, and parameters on the way to them."""
    module = model.get_submodule(path)
    if path in taken or path == BANK or not any(True for _ in module.parameters()):
        return []
    if not any(t.startswith(f"{path}." if path else "") for t in taken):
        return [Part(path, "bridge", f"{type(module).__module__.split('.')[0]}.{type(module).__name__}", False, path)]
    at = f"{path}." if path else ""
    own = [Part(at + n, "bridge", "parameter", False, at + n) for n, p in module._parameters.items() if p is not None]
    return own + [part for name, _ in module.named_children() for part in _between(model, at + name, taken)]


def find_parts(model: nn.Module, name: str) -> list[Part]:
    """The parts that a name stands for: a path, a path above, or whole words of it; where no part has the name, vision
    and language are the towers of that kind, projector the modules between that project. Raises UsageError for others.
    """
    known = parts(model)
    try:
        prefixes = component_prefixes(model, name)
    except LookupError:
        prefixes = []
    found = [p for p in known if p.name in prefixes or f".{name}." in f".{p.name}."]
    found = found or [p for p in known if name == _role(p)]
    if not found:
        raise UsageError(f"part {name!r} is not in the model; {nearest(name, [p.name for p in known if p.name])}")
    return found


def _role(part: Part) -> str | None:
    """What a part is called whatever its family calls it."""
    if part.component:
        return part.kind
    return "projector" if part.family != "parameter" and "project" in part.name else None


def adapt(
    model: nn.Module,
    method: str | Method,
    choice: Mapping[str, Choice],
    rates: Mapping[str, float] | None = None,
    sample: Any = None,
    **settings: Any,
) -> Handle:
    """Puts one adapter on parts of a model: `adapt` gets the sites of the method, `full` trains a copy.

    choice: {part: "adapt" | "full" | "freeze"}, later entries win; what is not named stays frozen.
    rates: {part: factor of the learning rate}.  sample, settings: as `adaptsuite.attach` takes them.
    All that trains is in one adapter folder. Raises UsageError for parts that are not there.
    """
    factors = factors_of(model, rates or {})
    method = resolve(method, **settings) if isinstance(method, str) else replace(method, **settings)
    method, full = chosen(model, method, choice)
    handle = attach(model, method, sample=sample, head=full)
    handle.adapter.rates = factors
    return handle


def chosen(model: nn.Module, method: Method, choice: Mapping[str, Choice]) -> tuple[Method, tuple[str, ...]]:
    """(the method at its roles in the parts to adapt, paths of those to train whole); see `adapt`."""
    found: dict[Part, Choice] = {}
    for name, what in choice.items():
        if what not in ("freeze", "adapt", "full"):
            raise UsageError(f"part {name!r}: {what!r} is none of freeze, adapt and full")
        found |= dict.fromkeys(find_parts(model, name), what)
    for part, what in found.items():
        if what == "adapt" and not part.component:
            raise UsageError(f"part {part.name!r} has no blocks to adapt: take full or freeze")
        if what == "full" and (part.family == "parameter" or part.root != part.name):
            raise UsageError(f"part {part.name!r} is no module of its own: take adapt or freeze")
    adapted = [p.name for p, what in found.items() if what == "adapt"]
    if not adapted:
        raise UsageError("no part is adapted: name one of " + ", ".join(p.name for p in parts(model) if p.component))
    if not method.sites:
        raise UsageError(f"method {method.name!r} has no sites: it cannot be put on {', '.join(adapted)}")
    roles = dict.fromkeys(site.rpartition(":")[2] for site in method.sites)
    sites = tuple(f"{name}:{role}" if name else role for name in adapted for role in roles)
    return replace(method, sites=sites), tuple(p.root for p, what in found.items() if what == "full")


def factors_of(model: nn.Module, rates: Mapping[str, float]) -> dict[str, float]:
    """Path in the model -> factor of the learning rate of what trains below it, of {part: factor}."""
    found: dict[str, float] = {}
    for name, factor in rates.items():
        fine = isinstance(factor, int | float) and math.isfinite(factor) and factor > 0
        if not fine:
            raise UsageError(
                f"part {name!r}: factor of the learning rate is {factor}, it must be above 0; or freeze it"
            )
        found |= dict.fromkeys((part.root for part in find_parts(model, name)), float(factor))
    return found


def table(handle: Handle) -> list[dict[str, Any]]:
    """For each part {"part", "kind", "family", "trained", "frozen", "bytes", "rate"}: values, bytes of trained ones,
    factor of their learning rate. What belongs to no part alone, such as a shared v_proj, is in the last row."""
    model, adapter = handle.model, handle.adapter
    known = sorted(parts(model), key=lambda part: len(part.root), reverse=True)
    rows = {p: {"part": p.name or "model", "kind": p.kind, "family": p.family} for p in parts(model)}
    rows[None] = {"part": "shared", "kind": "bridge", "family": "adaptsuite"}
    for part, row in rows.items():
        row |= {"trained": 0, "frozen": 0, "bytes": 0, "rate": 1.0 if part is None else adapter.rate_at(part.root)}

    def row_of(path: str | None) -> dict[str, Any]:
        return rows[None if path is None else next((p for p in known if p.holds(path)), None)]

    trained = handle.trained()
    for name, p in model.named_parameters():
        if is_base(name) and tensor_key(name) not in adapter.tensors and f"base.{tensor_key(name)}" not in trained:
            row_of(name)["frozen"] += p.numel()
    for name, p in trained.items():
        row = row_of(handle.place_of(name))
        row["trained"] += p.numel()
        row["bytes"] += p.numel() * p.element_size()
    return [row for part, row in rows.items() if part is not None or row["trained"] or row["frozen"]]


def describe(rows: list[dict[str, Any]]) -> list[str]:
    """`table` as lines: what is trained where, for a reader before the first step."""
    wide = max(len(row["part"]) for row in rows)
    return [
        f"{row['part']:{wide}}  {row['kind']:8}  {row['trained']:>11,} trained  {row['frozen']:>13,} frozen"
        + (f"  rate x {row['rate']:g}" if row["trained"] and row["rate"] != 1 else "")
        for row in rows
    ]
