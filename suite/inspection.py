"""What can be said before training: of a domain, of a backbone, of a data set, of a method on a backbone."""

from collections import Counter
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from adaptsuite import recipe as recipes
from adaptsuite.backbones import load_backbone
from adaptsuite.bank import split_key
from adaptsuite.domain import HEAD, Domain
from adaptsuite.errors import DataError, UsageError
from adaptsuite.experiment import adapt, complete, damaged, skipped_rows
from adaptsuite.front_end import NotForPictures
from adaptsuite.host import Handle, attach
from adaptsuite.manifest import Fold, Row, split
from adaptsuite.method import method_class, methods, resolve
from adaptsuite.recipe import Recipe, shipped_recipes
from adaptsuite.sites import example_input
from adaptsuite.verify import verify

Found = tuple[list[str], dict[str, Any]]  # lines for a terminal, and the same for --json


def domain_info(domain: Domain) -> Found:
    """Methods, backbones and recipes: {"domain", "methods": {name: summary}, "backbones", "recipes"}."""
    names = methods((domain.name,))
    known = {name: (method_class(name).__doc__ or "").strip().splitlines()[0] for name in names}
    settings = {name: _settings(domain, name) for name in names}
    lines = []
    for name, text in known.items():
        lines.append(f"method    {name:<18} {text}")
        lines += [f"          {'':<18} --set {said}" for said in settings[name].values()]
    lines += [f"backbone  {name}" for name in domain.backbones]
    lines += [f"recipe    {name}" for name in shipped_recipes(domain.name)]
    found = {
        "domain": domain.name,
        "methods": known,
        "settings": settings,
        "backbones": list(domain.backbones),
        "recipes": shipped_recipes(domain.name),
    }
    return lines, found


def _settings(domain: Domain, method: str) -> dict[str, str]:
    """Setting -> `name=default`, with its choices where there are some, in this domain."""
    cls = method_class(method)
    kinds, own = get_type_hints(cls), domain.defaults(method)["method_settings"]
    found = {}
    for f in fields(cls):
        value = own.get(f.name, f.default)
        value = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        choices = [str(c) for c in get_args(kinds[f.name])] if get_origin(kinds[f.name]) is Literal else []
        found[f.name] = f"{f.name}={value}" + (f"  ({' or '.join(choices)})" if choices else "")
    return found


def backbone_info(domain: Domain, recipe: Recipe) -> Found:
    """{"backbone", "parameters", "fingerprint", "sites": {role: count}, "shadow_sites", …}."""
    from adaptsuite.identity import base_fingerprint
    from adaptsuite.probe import called_modules
    from adaptsuite.sites import find_sites, roles

    recipe = complete(domain, recipe)
    try:
        model = domain.model(recipe, ["a", "b"])
        sample, about = domain.sample(model), domain.describe(model)
    except NotForPictures as e:
        model = load_backbone(recipe.backbone, random_weights=recipe.random_weights, seed=recipe.seeds[0])
        sample, about = example_input(model), {"input": str(e)}
    called, sites = called_modules(model, sample), roles(model)
    unseen = sorted({s.role for role in sites for s in find_sites(model, role) if s.path not in called})
    found = {
        "backbone": recipe.backbone,
        "random_weights": recipe.random_weights,
        "parameters": sum(p.numel() for n, p in model.named_parameters() if not n.startswith(f"{HEAD}.")),
        "fingerprint": base_fingerprint(model, (HEAD,)),
        "sites": sites,
        "shadow_sites": unseen,
        **about,
    }
    lines = [
        f"backbone     {found['backbone']}  {found['parameters'] / 1e6:.2f} M parameters",
        f"fingerprint  {found['fingerprint']}",
        *(f"site         {role:<12} {count}" for role, count in sites.items()),
        *(f"{key:<12} {value}" for key, value in about.items()),
    ]
    if unseen:
        lines.append(f"read without a call: {', '.join(unseen)}")
    return lines, found


def check_data(domain: Domain, recipe: Recipe) -> Found:
    """Every row, every file decoded, and the split that training would use.

    {"ok", "rows", "classes": {label: count}, "groups", "splits", "problems": [...], "warnings": [...],
    "skipped": [...], "digest"}; a table that cannot be read at all raises DataError. With data.skip_bad, rows whose
    files cannot be used are no problems: the rest is described.
    """
    data = recipe.data
    if not data.manifest:
        raise UsageError("no data: name a CSV or a folder of classes with --data")
    manifest = domain.table(data)
    problems, warnings, facts = [], [], []

    def see(row: Row, seen: dict[str, Any]) -> None:
        warnings.extend(f"{manifest.where(row)}: {row.rel}: {remark}" for remark in seen.pop("remarks"))
        facts.append(seen)

    bad = damaged(domain, manifest, see)
    if data.skip_bad:
        manifest = manifest.without(bad)
    else:
        problems += [f"{manifest.where(manifest.rows[i])}: {manifest.rows[i].path}: {why}" for i, why in bad.items()]
    warnings = [*manifest.notes, *warnings]
    classes = Counter(label for row in manifest.rows for label in row.labels)
    folds: list[Fold] = []
    try:
        for fold in split(manifest, data.test, data.val, data.cv, recipe.seeds[0], data.shots):
            folds.append(fold)
            warnings += fold.notes
        warnings += domain.doubts(recipe, manifest, folds) if not bad or data.skip_bad else []
    except DataError as e:
        problems.append(str(e))
    found = {
        "ok": not problems,
        "rows": len(manifest),
        "classes": dict(sorted(classes.items())),
        "groups": len(set(manifest.groups())),
        "files": {
            key: _span([f[key] for f in facts if key in f]) for key in dict.fromkeys(k for f in facts for k in f)
        },
        "splits": [{"name": fold.name, **fold.sizes} for fold in folds],
        "problems": problems,
        "warnings": warnings,
        "skipped": list(manifest.skipped),
        "digest": manifest.digest,
    }
    lines = [
        f"rows      {found['rows']} in {found['groups']} groups, {len(classes)} classes",
        *(f"class     {name:<24} {count}" for name, count in found["classes"].items()),
        *(f"files     {key} {span['min']:g} to {span['max']:g}" for key, span in found["files"].items()),
        *(f"split     {fold}" for fold in folds),
        *(f"warning   {text}" for text in warnings),
        *(f"skipped   {text}" for text in skipped_rows(manifest)),
        *(f"problem   {text}" for text in problems),
    ]
    return lines, found


def _span(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "max": max(values)}


def examine(domain: Domain, recipe: Recipe) -> Found:
    """Liveness and promises of a fresh adapter (adaptsuite.verify.Verification as a dict), and what trains where.

    A network that takes no pictures, or gives no features to a head, is looked at by itself.
    """
    recipe, notes = complete(domain, recipe), []
    try:
        handle = adapt(domain, recipe, ["a", "b", "c"])
        sample = domain.sample(handle.model)
    except NotForPictures as e:
        handle, sample = _alone(recipe)
        shape = " x ".join(map(str, sample[0].shape))
        notes = [f"input      {shape} noise: looked at by itself, without a head of this domain ({e})"]
    found = verify(handle, sample, fresh=True)
    counts, table = handle.parameters_count(), handle.report()
    states = Counter(r["state"] for r in found.rows)
    at = _values_by_role(handle)
    lines = [
        f"adapter    {recipe.method} on {recipe.backbone}: {counts['trained_without_head']:,} values without the head",
        *notes,
        *(f"component  {r['component']}: {_counted(r)}, {r['frozen']:,} frozen" for r in table),
        *(f"site       {count} x {role}: {values:,} values" for role, (count, values) in at.items()),
        *(f"tensors    {count} {state}" for state, count in states.items()),
        f"identity   differs by {found.identity:.1e} at the start"
        + ("" if handle.method.identity_at_start else " (not promised)"),
        "train=eval " + ("not comparable, by design" if found.train_eval is None else f"{found.train_eval:.1e}"),
        "merged     " + (f"no: {found.merge_reason}" if found.merged is None else f"{found.merged:.1e}"),
        *([f"shadow     {len(found.shadow_sites)} sites read without a call"] if found.shadow_sites else []),
        "verdict    " + ("alive" if found.ok else "; ".join(found.problems)),
    ]
    return lines, {
        **found.as_dict(),
        "params": counts,
        "components": table,
        "sites": {role: {"sites": count, "values": values} for role, (count, values) in at.items()},
        "recipe": recipes.to_dict(recipe),
    }


def _alone(recipe: Recipe) -> tuple[Handle, tuple[Tensor, ...]]:
    """(adapter on the plain network, its example input)."""
    model = load_backbone(recipe.backbone, random_weights=recipe.random_weights, seed=recipe.seeds[0])
    args, _ = example_input(model)
    torch.manual_seed(recipe.seeds[0])
    return attach(model, resolve(recipe.method, **recipe.method_settings), sample=args), args


def _counted(row: dict[str, Any]) -> str:
    parts = ", ".join(f"{row[kind]:,} of the {kind}" for kind in ("norm", "head") if row[kind])
    return f"{row['trained']:,} trained" + (f" ({parts})" if parts else "")


def _values_by_role(handle: Handle) -> dict[str, tuple[int, int]]:
    """Role -> (sites, values that train there). Heads, norms beside sites and what several sites share are left out."""
    counts, values = Counter(s.role for s in handle.sites), Counter()
    roles = {s.path: s.role for s in reversed(handle.sites)}
    for name, p in handle.trained().items():
        kind, key = name.split(".")[:2]
        if kind == "branches":
            values[handle.adapter.sites[key].role] += p.numel()
        elif kind == "tensors" and split_key(key)[0] in roles:
            values[roles[split_key(key)[0]]] += p.numel()
    return {role: (count, values[role]) for role, count in counts.items()}
