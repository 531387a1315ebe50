"""Arithmetic on saved adapters: sums, negation, scaling, analogies and averages of what they change.

    compose("0.7*a + 0.3*b - c", {"a": folder, "b": folder, "c": folder}, "runs/d", rank=8)

What is summed is the change of the host and never the factors of it (adaptsuite.sums), unless `elementwise` asks for
the sum of Zhang et al. 2023 (arXiv:2306.14870): that needs adapters that started from the same values.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.artifact import TENSORS, Record, read_adapter, save_record
from adaptsuite.backbones import load_backbone
from adaptsuite.bank import base_state, tensor_key
from adaptsuite.errors import AdapterError, UsageError, nearest
from adaptsuite.expression import coefficients
from adaptsuite.identity import describe_base, fingerprint
from adaptsuite.method import Method
from adaptsuite.sums import SUMS, Term


def compose(
    expression: str,
    adapters: Mapping[str, str | Path | Record],
    out: str | Path | None = None,
    *,
    rank: int | None = None,
    elementwise: bool = False,
    head: str | None = None,
    model: nn.Module | None = None,
) -> Record:
    """The adapter that an expression over saved adapters describes, for `load_adapter`; written to `out` if given.

    rank: of low-rank adapters, after an SVD of the exact sum; `extra["composed"]` states the relative error.
    elementwise: the factors are summed apart, at the rank they have: A with the weights' absolute values as shares.
    head: name of the adapter whose head and labels are taken. Without it heads are averaged where the weights sum to 1,
    kept where all are equal, and refused otherwise: what a head was before its training is not stored.
    model: the backbone's task model, for trained copies of its tensors (BitFit, FiLM, norms) where the weights do not
    sum to 1; without it the backbone is loaded by its name.
    Raises UsageError for the expression and the options, AdapterError for adapters that cannot be summed.
    """
    factors = coefficients(expression, adapters)
    records = {n: a if isinstance(a, Record) else read_adapter(a) for n, a in adapters.items()}
    records = {n: record.method.plain(record) for n, record in records.items()}
    terms = [Term(name, factor, records[name]) for name, factor in factors.items()]
    if head is not None and head not in factors:
        raise UsageError(f"head={head!r} is not an adapter of the expression; {nearest(head, factors)}")
    first = terms[0].record
    leader = records[head] if head else first
    for term in terms[1:]:
        if difference := _difference(term.record, first, head is None):
            raise AdapterError(f"{term} and {terms[0]} cannot be composed: {difference}")
    if first.method.name not in SUMS:
        raise AdapterError(
            f"{terms[0]}: method {first.method.name!r} cannot be composed: no sum of its changes is one of its kind; "
            f"there is: {', '.join(sorted(SUMS))}"
        )
    method, tensors, facts = SUMS[first.method.name](terms, elementwise, rank)
    held, whose = _held(terms, leader if head else None, model)
    composed = {"expression": expression, "terms": {t.name: _facts(t) for t in terms}, "head": whose, **facts}
    tensors = {name: t.to(first.tensors[name].dtype) for name, t in {**tensors, **held}.items()}
    recipe = leader.extra.get("recipe")
    settings = {"recipe": {**recipe, "method_settings": _settings(method)}} if recipe else {}
    record = replace(
        leader,
        method=method,
        tensors=tensors,
        extra={**settings, "composed": composed},
        **dict.fromkeys(("temperature", "threshold", "recipe_hash")),  # they were fitted to other outputs
    )
    return record if out is None else read_adapter(save_record(record, out))


def _difference(a: Record, b: Record, heads: bool) -> str | None:
    """Why two adapters are of different kinds, or None."""
    loaded = [r.base.get("loaded") or {} for r in (a, b)]
    changed = loaded[0].get("layout") == loaded[1].get("layout") and loaded[0] != loaded[1]
    if a.base["fingerprint"] != b.base["fingerprint"] or changed:
        return f"they belong to different backbones, {a.base['name']} and {b.base['name']}, or to different weights"
    if a.method.name != b.method.name:
        return f"their methods are {a.method.name!r} and {b.method.name!r}"
    ours, theirs = ({s.key for s in r.sites} for r in (a, b))
    if ours != theirs:
        alone = sorted(ours ^ theirs)
        return f"their sites differ, by {len(alone)}: {alone[0].replace('/', '.')} is in one alone"
    if a.held.keys() != b.held.keys() or set(a.head) != set(b.head):
        alone = sorted(a.held.keys() ^ b.held.keys()) or sorted(set(a.head) ^ set(b.head))
        return f"one trains {alone[0].replace('/', '.')} of the backbone, the other does not"
    if a.preprocessing != b.preprocessing:
        return "their inputs are prepared in different ways (`preprocessing` in adapter.json)"
    if not heads:
        return None
    if a.labels != b.labels:
        return f"their heads have other labels ({_few(a.labels)}, {_few(b.labels)}): name whose to keep with head="
    for name in _heads(a):
        if a.tensors[name].shape != b.tensors[name].shape:
            shapes = " and ".join(str(tuple(r.tensors[name].shape)) for r in (a, b))
            return f"their heads have the shapes {shapes}: name whose to keep with head="
    return None


def _few(labels: Sequence[str] | None) -> str:
    return "none" if labels is None else ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")


def _heads(record: Record) -> list[str]:
    return [f"tensors.{key}" for key, kind in record.held.items() if kind == "head"]


def _settings(method: Method) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(method)))


def _facts(term: Term) -> dict[str, Any]:
    """What the composed adapter's record says of one that it was made of."""
    record = term.record
    facts = {"factor": term.factor, "folder": record.folder.name, "tensors": fingerprint(record.tensors)}
    return facts | ({"composed": record.extra["composed"]} if "composed" in record.extra else {})


# ---- trained copies of the backbone's tensors: exact, as a change of their values


def _held(terms: list[Term], leader: Record | None, model: nn.Module | None) -> tuple[dict[str, Tensor], str | None]:
    """The held tensors, and whose head it is: an adapter's name, "average", "equal", or None without one."""
    record, total = terms[0].record, sum(t.factor for t in terms)
    names = {f"{'moved' if kind == 'buffer' else 'tensors'}.{key}": kind for key, kind in record.held.items()}
    inner = [name for name, kind in names.items() if kind not in ("head", "buffer")]
    averages = abs(total - 1) < 1e-9
    base = {} if averages or not inner else _base_values(record, inner, model)
    found = {}
    for name in inner:
        found[name] = sum(t.factor * t.get(name) for t in terms)
        if not averages:
            found[name] = found[name] + (1 - total) * base[name].double()
    outer = [name for name in names if name not in inner]
    if not outer:
        return found, None
    if leader is not None:
        whose = next(t.name for t in terms if t.record is leader)
        return found | {name: leader.tensors[name] for name in outer}, whose
    alike = {name for name in outer if all(torch.equal(t.get(name), terms[0].get(name)) for t in terms)}
    found |= {name: record.tensors[name] for name in alike}
    if len(alike) == len(outer):
        return found, "equal"
    if not averages or any(names[name] == "buffer" for name in set(outer) - alike):
        why = "hold running statistics" if averages else f"have weights that sum to {total:g}, not 1"
        raise AdapterError(f"the heads of {' and '.join(map(str, terms))} {why}: name whose to keep with head=")
    return found | {n: sum(t.factor * t.get(n) for t in terms) for n in outer if n not in alike}, "average"


def _base_values(record: Record, names: list[str], model: nn.Module | None) -> dict[str, Tensor]:
    """What held tensors were before training."""
    name = record.base["name"]
    if model is None:
        plain, _, seed = name.removesuffix(")").partition(" (random weights, seed ")
        if " + " in plain or ":" not in plain:
            raise AdapterError(f"{record.folder}: the sum needs the tensors of {name}: give the model with model=")
        model = load_backbone(plain, random_weights=bool(seed), seed=int(seed or 0))
    if describe_base(model, record.head)["fingerprint"] != record.base["fingerprint"]:
        raise AdapterError(f"{record.folder}: the adapter was trained on {name}, the model that was given is another")
    values = {tensor_key(n): value for n, value in base_state(model).items()}
    found = {}
    for held in names:
        key = held.removeprefix("tensors.")
        while key not in values and "/" in key:  # a task model has its backbone one level down
            key = key.partition("/")[2]
        if key not in values or values[key].shape != record.tensors[held].shape:
            raise AdapterError(f"{record.folder}: {held} is not in {name}: give the task model with model=")
        found[held] = values[key].cpu()
    return found


def summary(record: Record) -> tuple[list[str], dict[str, Any]]:
    """What a terminal says of a composed and written adapter, and the same as a table."""
    facts, file = record.extra["composed"], record.folder / TENSORS
    sites = f" at {len(record.sites)} sites" if record.sites else ""
    lines = [f"composed  {facts['expression']}", f"adapter   {record.method.name}{sites}: {facts['how']}"]
    if "relative_error" in facts:
        worst = facts["worst"]
        at = f"at most {worst['relative_error']:.2%} ({worst['site']})"
        lines.append(f"error     {facts['relative_error']:.2%} of the norm of the exact change, {at}")
    if whose := facts["head"]:
        how = {"average": "average of all", "equal": "equal in all"}.get(whose, f"of {whose}")
        lines.append(f"head      {how}; labels {', '.join(record.labels or ['not stored'])}")
    size = file.stat().st_size
    lines.append(f"saved     {file}  ({size / 1e6:.2f} MB)")
    return lines, {"adapter": str(record.folder), "method": record.method.name, "bytes": size, **facts}
