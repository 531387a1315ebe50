"""One experiment of any domain: table -> folds and seeds -> adapters -> pooled evidence -> run folder.

A domain supplies what `adaptsuite.domain.Domain` lists; splits, seeds, artifacts and reports are the same for all.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from adaptsuite import recipe as recipes
from adaptsuite.artifact import load_adapter, read_adapter
from adaptsuite.checkpoint import copied
from adaptsuite.domain import Domain, Said
from adaptsuite.errors import AdapterError, DataError, UsageError
from adaptsuite.host import Handle, attach
from adaptsuite.manifest import LABELLED, Fold, Manifest, split
from adaptsuite.memory_limit import LIMITED, within
from adaptsuite.method import Method, method_class, resolve
from adaptsuite.plan import Plan
from adaptsuite.rates import Choice, choose, plans_of, section
from adaptsuite.recipe import Recipe
from adaptsuite.replay import CachedParts, cached
from adaptsuite.report import Run, comparison_row, write_run
from adaptsuite.sites import component_info
from adaptsuite.trainer import fit, predict_all
from adaptsuite.verify import verify

PROBE_C = 0.02  # inverse strength of the regularisation of a head's start


@dataclass
class Outcome:
    """One trained adapter and what it said of the rows it never saw."""

    fold: Fold
    seed: int
    adapter: Path
    adapted: dict[str, Any]  # what the report says of the method
    outputs: dict[str, np.ndarray]  # "val", "test": (rows, K) scores, as the adapter gives them
    params: dict[str, int]
    fit: Any
    seconds: float
    rates: list[dict[str, Any]] = field(default_factory=list)  # adaptsuite.rates.Choice.table
    notes: list[str] = field(default_factory=list)  # of the choice and the refit
    kept: dict[str, Any] = field(default_factory=dict)  # adaptsuite.domain.Domain.keep
    raw: dict[str, np.ndarray] = field(default_factory=dict)  # the outputs before they were calibrated
    metrics: dict[str, dict] = field(default_factory=dict)
    extra: list[dict[str, Any]] = field(default_factory=list)  # the domain's own sections of the report


def settle(domain: Domain, recipe: Recipe) -> tuple[Recipe, Manifest]:
    """The recipe with all defaults written out, and its table. Raises DataError or UsageError before any work."""
    manifest = read_table(domain, recipe)
    with rows_named(manifest):
        return complete(domain, recipe, [r.path for r in manifest.rows]), manifest


def read_table(domain: Domain, recipe: Recipe) -> Manifest:
    """The recipe's table, its files looked at (`usable`). Raises DataError or UsageError."""
    if not recipe.data.manifest:
        raise UsageError("no data: name a CSV or a folder of classes with --data")
    if recipe.data.classes and recipe.data.task != "segmentation":
        raise UsageError("data.classes names what masks hold: add --set data.task=segmentation")
    manifest = domain.table(recipe.data)
    return usable(domain, manifest, recipe.data.skip_bad)


def usable(domain: Domain, manifest: Manifest, skip_bad: bool) -> Manifest:
    """The table, once every file's header was read; DataError at the first that cannot be used.

    With skip_bad every file is decoded instead, and rows of damaged ones are left out and listed in `skipped`.
    """
    if skip_bad:
        return manifest.without(damaged(domain, manifest))
    with rows_named(manifest):
        for row in manifest.rows:
            domain.header(row.path)
            domain.further(manifest, row)
    return manifest


def damaged(domain: Domain, manifest: Manifest, see: Callable[[Any, dict], None] = lambda row, facts: None):
    """{row number: why its file cannot be used}, by decoding every file; see(row, facts): of each good one."""
    bad: dict[int, str] = {}
    for i, row in enumerate(manifest.rows):
        try:
            facts = domain.look(row.path)
            see(row, facts | {"remarks": [*facts["remarks"], *domain.further(manifest, row)]})
        except DataError as e:
            bad[i] = str(e).removeprefix(f"{row.path}: ")
    return bad


@contextlib.contextmanager
def rows_named(manifest: Manifest) -> Iterator[None]:
    """Puts the table's line before a DataError that names one of its files."""
    try:
        yield
    except DataError as e:
        row = next((r for r in manifest.rows if str(e).startswith(f"{r.path}:")), None)
        if row is None:
            raise
        raise DataError(f"{manifest.where(row)}: {e}") from e


def complete(domain: Domain, recipe: Recipe, paths: Sequence[Path] = ()) -> Recipe:
    """Domain defaults below the recipe's own settings, then what the data decides, then every field written out.

    Of the learning rate: plan.lr before the recipe's `rates` before the domain's default.
    """
    if not recipe.backbone:
        raise UsageError(f"no backbone: name one with --backbone (adapt {domain.name} info lists them)")
    if not recipe.method:
        raise UsageError(f"no method: name one with --method (adapt {domain.name} info lists them)")
    for name in ("front_end", "augment", "head", "evidence"):
        if getattr(recipe, name) and name not in domain.sections:
            raise UsageError(f"{name}.{next(iter(getattr(recipe, name)))} says nothing in {domain.name}: leave it out")
    sections = {**domain.sections, "method_settings": method_class(recipe.method)}
    given = domain.defaults_of(recipe)
    rate = recipe.rates.get(recipe.method, recipe.rates.get("default"))
    if rate is not None:
        given["plan"] = {**given["plan"], "lr": rate}
    recipe = replace(recipe, **{name: {**values, **getattr(recipe, name)} for name, values in given.items()})
    return recipes.resolved(domain.settle(recipe, paths), sections)


def adapt(
    domain: Domain,
    recipe: Recipe,
    classes: Sequence[str],
    decide: Callable[[Method, nn.Module], Method] = lambda method, model: method.without_data(),
) -> Handle:
    """The task model of a settled recipe with a fresh adapter, all started from the recipe's first seed.

    decide: the method with what it leaves to the data (`Method.prepare`).
    """
    import torch

    torch.manual_seed(recipe.seeds[0])
    model = domain.model(recipe, classes)
    method = decide(resolve(recipe.method, **recipe.method_settings), model)
    torch.manual_seed(recipe.seeds[0])
    method, head, rates = domain.placed(recipe, model, method)
    settings = dict(train_norms=domain.train_norms, head=head, last_k=recipe.last_k)
    handle = attach(model, method, sample=domain.sample(model), **settings)
    handle.adapter.rates |= rates
    return handle


def recorded(domain: Domain, folder: str | Path) -> tuple[Any, Recipe, list[str]]:
    """(record, recipe, labels) of an adapter that a command of the domain saved. Raises AdapterError."""
    record = read_adapter(folder)
    stored, labels = record.extra.get("recipe"), record.labels
    if not stored or labels is None:
        raise AdapterError(
            f"{folder}: saved outside the commands, without recipe and labels; take load_adapter in Python"
        )
    if stored.get("domain") != domain.name:
        other = stored.get("domain")
        raise AdapterError(f"{folder}: an adapter of domain {other!r}; use adapt {other} ...")
    try:
        recipe = recipes.from_dict(stored, domain.sections, f"{folder}/adapter.json")
    except UsageError as e:
        raise AdapterError(str(e)) from e
    return record, recipe, list(labels)


def restore(domain: Domain, folder: str | Path) -> tuple[Handle, Recipe, list[str], Any]:
    """(handle, recipe, labels, record) of a saved adapter, its backbone loaded anew. Raises AdapterError."""
    record, recipe, labels = recorded(domain, folder)
    model = domain.model(recipe, labels)
    handle = load_adapter(model, record, sample=domain.sample(model))
    domain.restored(handle, recipe, Path(folder))
    return handle, recipe, labels, record


def train_one(
    domain: Domain,
    recipe: Recipe,
    manifest: Manifest,
    fold: Fold,
    seed: int,
    out: Path,
    datasets: "Parts",
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """One adapter on one fold: doctor, fit (with a grid, of each rate), scores of the rows held out, adapter folder."""
    start = time.perf_counter()
    recipe = replace(recipe, seeds=(seed,))
    plans = plans_of(recipe, fold, seed)

    handle = adapt(domain, recipe, manifest.classes, _deciding(domain, recipe, manifest, fold, datasets, plans[0], say))
    recipe = replace(domain.decided(recipe, handle.model), method_settings=asdict(handle.method))
    verify(handle, domain.sample(handle.model), fresh=True).raise_if_dead()
    limited = within(plans[0], handle, partial(domain.sample, handle.model), say)
    plans = [replace(plan, **{name: getattr(limited, name) for name in LIMITED}) for plan in plans]
    work = _Work(domain, recipe, manifest, cached(domain, recipe, handle, datasets, plans[0], say), handle)
    fresh = copied(handle.state()) if recipe.refit else {}
    choice = work.choose(plans, fold, out, say)
    both = {name: datasets.part(handle.model, getattr(fold, name)) for name in ("train", "val")}
    notes = [*choice.notes, *domain.beside(recipe, handle, both, choice.plan, out, manifest.classes, say)]
    outputs = {"val": work.outputs(fold.val, choice.plan)} if len(fold.val) else {}
    if recipe.refit:
        handle.load_state(fresh)
        notes = [*notes, *work.refit(choice, fold, out)]
    if len(fold.test):
        outputs["test"] = work.outputs(fold.test, choice.plan)
    kept = domain.keep(recipe, manifest.subset(fold.val), outputs["val"]) if "val" in outputs else {}
    adapter = out / "adapter"
    if is_main():
        handle.save(
            adapter,
            labels=list(manifest.classes),
            preprocessing=domain.describe(handle.model),
            recipe=recipes.to_dict(replace(recipe, data=replace(recipe.data, manifest=""))),
            recipe_hash=recipes.digest(recipe),
            manifest_hash=manifest.digest,
            **({"lr_grid": choice.table} if choice.table else {}),
            **kept,
        )
    seconds = time.perf_counter() - start
    shown = next(part for part in ("test", "val", "train") if len(getattr(fold, part)))
    raw, outputs = outputs, {part: domain.calibrated(own, kept) for part, own in outputs.items()}
    data = datasets.part(handle.model, getattr(fold, shown))
    extra = [*handle.method.sections(handle), *domain.extra(handle, data, outputs.get("test"))]
    return Outcome(
        fold=fold,
        seed=seed,
        adapter=adapter,
        adapted=adapted_facts(domain, recipe, handle),
        outputs=outputs,
        params=handle.parameters_count(),
        fit=choice.fit,
        seconds=seconds,
        rates=choice.table,
        notes=[*notes, *kept.get("notes", ())],
        kept=kept,
        raw=raw,
        extra=extra,
    )


def _deciding(
    domain: Domain, recipe: Recipe, manifest: Manifest, fold: Fold, datasets: "Parts", plan: Plan, say: Callable
) -> Callable[[Method, nn.Module], Method]:
    """What `adapt` asks of a method that leaves something to the data: it sees training and validation rows."""

    def decide(method: Method, model: nn.Module) -> Method:
        task = domain.task(recipe, manifest.classes, class_counts(manifest, fold.train))
        train, val = (datasets.part(model, rows) for rows in (fold.train, fold.val))
        return method.prepare(model, task, train, val, plan, say)

    return decide


def started(
    domain: Domain,
    recipe: Recipe,
    manifest: Manifest,
    say: Callable[[str], None] = lambda line: None,
    handle: Handle | None = None,
) -> tuple[Handle, Any, Any, Plan]:
    """(handle, task, training data, plan) of a settled recipe's first fold and seed, as before its first step.

    handle: an adapter that is there already; it is left as it is.
    """
    seed = recipe.seeds[0]
    recipe = replace(recipe, seeds=(seed,), lr_grid=(), weight_decay_grid=(), refit=False)
    fold = _folds(manifest, recipe.data, seed)[0]
    (plan,) = plans_of(recipe, fold, seed)
    datasets = Parts(domain, manifest, np.unique(np.concatenate([fold.train, fold.val])), fold.train)
    if handle is not None:
        work = _Work(domain, recipe, manifest, datasets, handle)
        return handle, work.task(fold.train), datasets.part(handle.model, fold.train, training=True), plan
    for remark in prepare_rows(domain, domain.model(recipe, manifest.classes), manifest.subset(datasets.used)):
        say(f"warning   {remark}")
    handle = adapt(domain, recipe, manifest.classes, _deciding(domain, recipe, manifest, fold, datasets, plan, say))
    work = _Work(domain, recipe, manifest, datasets, handle)
    return handle, work.task(fold.train), work.started(fold.train, plan), plan


@dataclass(frozen=True)
class _Work:
    """A handle that trains on rows of a table and is asked about others."""

    domain: Domain
    recipe: Recipe
    manifest: Manifest
    datasets: "Parts | CachedParts"
    handle: Handle

    def choose(self, plans: Sequence[Plan], fold: Fold, out: Path, say: Callable[[str], None]) -> Choice:
        """The best of the plans (adaptsuite.rates), or the only one, with its weights in place."""
        train, val = self.started(fold.train, plans[0]), self.datasets.part(self.handle.model, fold.val)

        def fitted(plan: Plan, folder: Path):
            return fit(self.handle.model, self.task(fold.train), train, val, plan, folder, self.handle)

        if not (self.recipe.lr_grid or self.recipe.weight_decay_grid):
            return Choice(plans[0], fitted(plans[0], out), [], [])
        return choose(self.handle, plans, fitted, plans[0].monitor or self.task(fold.train).monitor, out, say)

    def refit(self, choice: Choice, fold: Fold, out: Path) -> list[str]:
        """Trains the chosen plan on training and validation rows together; what is to be said of it.

        No row is left to choose the epoch by: the schedule stays, and ends with the epoch that was best before. That
        is the training that was judged; a rate that was best by an early epoch may fall apart later.
        """
        rows, plan, until = np.sort(np.concatenate([fold.train, fold.val])), choice.plan, choice.fit.best_epoch
        data, plan = self.started(rows, plan), replace(plan, patience=None)
        folder = out / f"refit-{plan.lr:g}"
        again = fit(self.handle.model, self.task(rows), data, None, plan, folder, self.handle, until=until)
        said = (
            f"trained anew on {len(rows)} rows, {len(fold.val)} of them validation rows, for {until} of {plan.epochs} "
            "epochs, as the fit was best there: scores of validation rows are of the fit before"
        )
        return [said, *(note for note in again.notes if note not in choice.fit.notes)]

    def task(self, rows: np.ndarray):
        counts = class_counts(self.manifest, rows)
        return self.datasets.task(self.domain.task(self.recipe, self.manifest.classes, counts))

    def started(self, rows: np.ndarray, plan: Plan):
        """The rows as training data, once the head is started on them where the recipe says so."""
        dataset = self.datasets.part(self.handle.model, rows)
        if self.recipe.head.get("start") == "probe" and self.handle.model.linear_head:
            start_head(self.handle, self.task(rows), dataset, plan)
        return self.datasets.part(self.handle.model, rows, training=True)

    def outputs(self, rows: np.ndarray, plan: Plan) -> np.ndarray:
        """(rows, K) scores."""
        model, task = self.handle.model, self.domain.task(self.recipe, self.manifest.classes)
        dataset, task = self.datasets.part(model, rows), self.datasets.task(task)
        return self.domain.outputs(model, task, dataset, plan)


def class_counts(manifest: Manifest, rows: np.ndarray) -> np.ndarray | None:
    """(K,) rows of each class; a row of several labels counts for each. None where rows have no class."""
    if manifest.task not in LABELLED:
        return None
    targets = manifest.subset(rows).targets(manifest.classes)
    return targets.sum(0) if targets.ndim == 2 else np.bincount(targets, minlength=len(manifest.classes))


class Embedding:
    """A task whose outputs are what the head reads."""

    def __init__(self, task):
        self.task, self.target = task, task.target

    def predict(self, model: nn.Module, batch: Any):
        return self.task.embed(model, batch)


def start_head(handle: Handle, task, dataset, plan: Plan) -> None:
    """Starts a linear head as the logistic regression on frozen features: adapters need not unlearn a random one.

    Kumar et al. 2022, arXiv:2202.10054: linear probing, then fine-tuning. Features are standardised for the regression
    and the scaling is folded into the weights. A class without a training row keeps zero weights and a low bias.
    """
    import torch

    features, targets = predict_all(handle.model, Embedding(task), dataset, plan.batch_size, plan.device)
    path = handle.model.linear_head.replace(".", "/")
    weight, bias = (handle.adapter.tensors[f"{path}/{name}"] for name in ("weight", "bias"))
    values = linear_probe(features, targets, len(bias))
    with torch.no_grad():
        for tensor, value in zip((weight, bias), values, strict=True):
            tensor.copy_(torch.from_numpy(value).to(tensor))


def linear_probe(features: np.ndarray, targets: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """weight (K, D) and bias (K,) of an l2-regularised logistic regression; one against rest for (N, K) targets."""
    from sklearn.linear_model import LogisticRegression

    mean, std = features.mean(0), features.std(0) + 1e-6
    x, weight, bias = (features - mean) / std, np.zeros((num_classes, features.shape[1])), np.full(num_classes, -5.0)
    regression = LogisticRegression(C=PROBE_C, max_iter=1000)
    if targets.ndim == 1:
        present = np.unique(targets)
        regression.fit(x, targets)
        both = len(present) == 2  # scikit-learn keeps one row for two classes
        rows = np.concatenate([-regression.coef_, regression.coef_]) / 2 if both else regression.coef_
        shift = np.concatenate([-regression.intercept_, regression.intercept_]) / 2 if both else regression.intercept_
        weight[present], bias[present] = rows, shift
    else:
        for k in range(num_classes):
            share = targets[:, k].mean()
            if 0 < share < 1:
                regression.fit(x, targets[:, k])
                weight[k], bias[k] = regression.coef_[0], regression.intercept_[0]
            elif share == 1:
                bias[k] = 5.0
    weight = weight / std
    return weight, bias - weight @ mean


class Parts:
    """Datasets of row numbers; decoded files are shared by all folds and seeds of a run."""

    def __init__(self, domain: Domain, manifest: Manifest, used: Sequence[int] = (), trained: Sequence[int] = ()):
        self.domain, self.manifest = domain, manifest
        self.used, self.trained = np.array(used, int), np.array(trained, int)  # rows of all folds and seeds

    def task(self, task):
        """What trains and scores these data sets."""
        return task

    def part(self, model: nn.Module, indices: np.ndarray, training: bool = False):
        """None without a row. training: as an epoch draws them, where that is otherwise than scoring sees them."""
        if not len(indices):
            return None
        subset = self.manifest.subset(indices)
        targets = self.domain.targets(subset, self.manifest.classes)
        return self.domain.rows(model, subset, targets)


def train(
    domain: Domain,
    recipe: Recipe,
    manifest: Manifest,
    out: str | Path,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], list[Outcome]]:
    """Every fold with every seed of a settled recipe; (result as `adapt … train --json` prints it, outcomes)."""
    start, out = time.perf_counter(), Path(out)
    data, outcomes = recipe.data, []
    plans = [(seed, fold) for seed in recipe.seeds for fold in _folds(manifest, data, seed)]
    for seed, fold in plans:
        plans_of(recipe, fold, seed)  # refuses before any work
    used = np.unique(np.concatenate([getattr(fold, part) for _, fold in plans for part in fold.sizes]))
    trained = np.unique(
        np.concatenate([getattr(f, part) for _, f in plans for part in ("train", "val")[: 1 + recipe.refit]])
    )
    parts = Parts(domain, manifest, used, trained)
    remarks = prepare_rows(domain, domain.model(recipe, manifest.classes), manifest.subset(used))
    remarks += domain.doubts(recipe, manifest, [fold for _, fold in plans])
    for remark in remarks:
        say(f"warning   {remark}")
    for seed, fold in plans:
        folder = out
        if len(plans) > 1:
            folder = out / "-".join([f"seed{seed}"] * (len(recipe.seeds) > 1) + [safe(fold.name)] * bool(data.cv))
            say(f"run    {folder.name}: {', '.join(f'{n} {part}' for part, n in fold.sizes.items())} rows")
        with rows_named(manifest):
            outcome = train_one(domain, recipe, manifest, fold, seed, folder, parts, say)
        outcome.metrics = {
            name: domain.evaluate(manifest.subset(getattr(fold, name)), manifest.classes, own)
            for name, own in outcome.outputs.items()
        }
        outcomes.append(outcome)
    metrics = {name: pooled(domain, manifest, outcomes, name) for name in ("test", "val")}
    metrics["folds"] = [
        {
            "name": o.fold.name,
            "seed": o.seed,
            **{name: {m: v["value"] for m, v in found.items()} for name, found in o.metrics.items()},
            **next(({"lr": row["lr"]} for row in o.rates if row["chosen"]), {}),
            "best_epoch": o.fit.best_epoch,
            "seconds": round(o.seconds, 2),
        }
        for o in outcomes
    ]
    if any(o.rates for o in outcomes):
        several = len(outcomes) > 1
        metrics["lr_grid"] = [
            {**({"name": o.fold.name, "seed": o.seed} if several else {}), **row} for o in outcomes for row in o.rates
        ]
    adapters = [str(o.adapter) for o in outcomes]
    result = {
        "metrics": metrics,
        "params": outcomes[0].params,
        "adapter": adapters if len(adapters) > 1 or data.cv else adapters[0],
        "skipped": list(manifest.skipped),
        "warnings": [*manifest.notes, *remarks, *dict.fromkeys(note for o in outcomes for note in o.notes)],
        "seconds": round(time.perf_counter() - start, 2),
    }
    return result, outcomes


def prepare_rows(domain: Domain, model: nn.Module, manifest: Manifest) -> list[str]:
    with rows_named(manifest):
        return domain.prepare(model, [r.path for r in manifest.rows])


def skipped_rows(manifest: Manifest) -> list[str]:
    return [f"{s['row']}: {s['path']} was left out: {s['reason']}" for s in manifest.skipped]


def _said(manifest: Manifest, outcome: Outcome, part: str) -> Said:
    return Said(
        manifest=manifest.subset(getattr(outcome.fold, part)),
        outputs=outcome.outputs[part],
        raw=outcome.raw[part],
        kept=outcome.kept,
        name=outcome.adapter.parent.name,
        seed=outcome.seed,
        facts={**outcome.adapted, **outcome.params},
    )


def run(
    domain: Domain,
    recipe: Recipe,
    manifest: Manifest,
    out: str | Path,
    say: Callable[[str], None] = lambda line: None,
    comparison: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """`train`, then the run folder with its report; the result as `adapt … train --json` prints it.

    comparison: rows of other runs (`comparison_row`) that the report shows beside this one.
    """
    result, outcomes = train(domain, recipe, manifest, out, say)
    if not is_main():
        return result
    part = "test" if result["metrics"]["test"] else "val"
    seen = [o for o in outcomes if part in o.outputs]
    said = None  # where no row was held back there is no evidence
    if seen:
        subset = manifest.subset(np.concatenate([getattr(o.fold, part) for o in seen]))
        names = [o.adapter.parent.name for o in seen for _ in o.outputs[part]] if len(outcomes) > 1 else None
        said = domain.predictions(subset, manifest.classes, np.concatenate([o.outputs[part] for o in seen]), names)
    sections = domain.evidence(recipe, manifest, [_said(manifest, o, part) for o in seen], part, Path(out))
    if facts := {s["title"]: s["facts"] for s in sections if s.get("facts")}:
        result["metrics"]["evidence"] = facts
    monitor = recipe.plan.get("monitor") or domain.task(recipe, manifest.classes).monitor
    grid = result["metrics"].get("lr_grid")
    page = Run(
        title=title(recipe.method, recipe.data.manifest),
        task=manifest.task,
        labels=manifest.classes,
        command=f"adapt {domain.name} train --recipe {Path(out) / 'recipe.toml'} --out NEW_FOLDER",
        recipe=recipes.to_toml(recipe),
        adapted=outcomes[0].adapted,
        params=result["params"],
        adapter_bytes=(outcomes[0].adapter / "adapter.safetensors").stat().st_size,
        data=_data_card(manifest, outcomes),
        metrics=result["metrics"],
        curves=[
            {"name": o.adapter.parent.name, "history": o.fit.history, "best_epoch": o.fit.best_epoch} for o in outcomes
        ],
        monitor=monitor,
        predictions=said,
        warnings=[
            *result["warnings"],
            *skipped_rows(manifest),
            *dict.fromkeys(n for o in outcomes for n in (*o.fold.notes, *o.fit.notes)),
        ],
        extra=[
            *([section(grid, monitor)] if grid else []),
            *sections,
            *outcomes[0].extra,
        ],
        seeds=recipe.seeds,
        seconds=result["seconds"],
    )
    if comparison:
        metric = next((name for name, cell in comparison[0].items() if isinstance(cell, Mapping)), "accuracy")
        page = replace(page, comparison=[*comparison, comparison_row(page, metric)])
    return {**result, "report": str(write_run(out, page))}


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks, under torchrun."""
    return int(os.environ.get("RANK", "0")) == 0


def title(method: str, data: str) -> str:
    table = Path(data).resolve()
    return f"{method} on {table.name if table.is_dir() else table.parent.name}"


def adapted_facts(domain: Domain, recipe: Recipe, handle: Handle) -> dict[str, Any]:
    roles = Counter(s.role for s in handle.sites)
    norms = sum(kind == "norm" for kind in handle.adapter.kinds.values())
    bare = sum(s.norm is None for s in handle.sites) if "beside" in handle.method.norms else 0
    return {
        "backbone": recipe.backbone + (" (random weights)" if recipe.random_weights else ""),
        "input": domain.describe(handle.model)["input"],
        "method": recipe.method,
        "sites": ", ".join(f"{n} x {role}" for role, n in roles.items()) or "none",
        "norms": f"{norms} tensors trained" + (f"; {bare} sites have no norm before them" if bare else ""),
        **{k: v for k, v in recipe.method_settings.items() if k != "sites"},
    }


def _data_card(manifest: Manifest, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    sizes = {part: sorted({o.fold.sizes[part] for o in outcomes}) for part in outcomes[0].fold.sizes}
    return {
        "table": manifest.source.name,
        "rows": len(manifest),
        "classes": len(manifest.classes),
        "groups": len(set(manifest.groups())) if "group" in manifest.columns else "every row its own",
        **{f"{part} rows": " or ".join(map(str, n)) for part, n in sizes.items()},
        "sha256": manifest.digest,
    }


def _folds(manifest: Manifest, data, seed: int) -> list[Fold]:
    return split(manifest, data.test, data.val, data.cv, seed, data.shots)


def safe(name: str, also: str = "-_.") -> str:
    """The name of a folder, of letters, digits and `also`."""
    return "".join(c if c.isalnum() or c in also else "_" for c in name).strip(".") or "fold"


def pooled(domain: Domain, manifest: Manifest, outcomes: Sequence[Outcome], part: str) -> dict[str, dict]:
    """Metrics of a part over folds and seeds: {name: {"value", "ci", "range"?, "seeds"?, "spread"?, "note"?}}.

    value: of the rows of all folds together, with several seeds the mean of each seed's.  ci: 95 %, resampling the
    groups of the pooled predictions: a group counts once, however many seeds saw it.  range, seeds: lowest and highest
    seed, and how many.  spread: {"folds" and/or "seeds": {"mean", "std", "n"}}, the sample standard deviation over
    folds (each the mean of its seeds) and over seeds (each over the rows of all folds); no part of the interval.
    """
    seen = [o for o in outcomes if part in o.outputs]
    if not seen:
        return {}

    def together(own: Sequence[Outcome]) -> tuple[Manifest, Sequence[str], np.ndarray]:
        rows = manifest.subset(np.concatenate([getattr(o.fold, part) for o in own]))
        return rows, manifest.classes, np.concatenate([o.outputs[part] for o in own])

    def values(own: Sequence[Outcome]) -> dict[str, float]:
        return domain.score(*together(own))

    metrics = domain.evaluate(*together(seen))
    seeds, folds = {o.seed for o in seen}, dict.fromkeys(o.fold.name for o in seen)
    by_seed = [values([o for o in seen if o.seed == seed]) for seed in seeds] if len(seeds) > 1 else []
    by_fold = [[values([o]) for o in seen if o.fold.name == name] for name in folds] if len(folds) > 1 else []
    for name, found in metrics.items():
        of_seeds = [m[name] for m in by_seed if name in m]
        of_folds = [_mean([m[name] for m in runs if name in m]) for runs in by_fold if any(name in m for m in runs)]
        if of_seeds:
            found |= {"value": _mean(of_seeds), "range": [min(of_seeds), max(of_seeds)], "seeds": len(of_seeds)}
        spread = {key: _spread(own) for key, own in (("folds", of_folds), ("seeds", of_seeds)) if len(own) > 1}
        found |= {"spread": spread} if spread else {}
    return metrics


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": _mean(values), "std": float(np.std(values, ddof=1)), "n": len(values)}


def budget_of(domain: Domain, recipe: Recipe):
    """What one training step would cost (adaptsuite.budget.Budget); with data, for its classes and input length."""
    return next(iter(budgets_of(domain, recipe, [recipe.last_k]).values()))


def budgets_of(domain: Domain, recipe: Recipe, depths: Sequence[int | None] = ()) -> dict[int | None, Any]:
    """last_k -> adaptsuite.budget.Budget, for these depths or for every number of last blocks."""
    from adaptsuite.budget import budget

    if recipe.data.manifest:
        recipe, manifest = settle(domain, recipe)
        classes: Sequence[str] = manifest.classes
    else:
        recipe, classes = complete(domain, recipe), ("a", "b")
    model = domain.model(recipe, classes)
    method = resolve(recipe.method, **recipe.method_settings).without_data()
    plan = recipes.build(Plan, recipe.plan, "plan")
    method, head, _ = domain.placed(recipe, model, method)
    depths = depths or range(1, max(c.num_blocks for c in component_info(model)) + 1)
    settings = dict(train_norms=domain.train_norms, head=head, lean=plan.lean)
    sample = domain.sample(model, plan.batch_size)
    return {k: budget(model, method, sample, last_k=k, **settings) for k in depths}


def preview(domain: Domain, recipe: Recipe, manifest: Manifest) -> tuple[list[str], dict[str, Any]]:
    """What training by a settled recipe would do, parameters first: lines for a terminal and the same as a table."""
    folds = _folds(manifest, recipe.data, recipe.seeds[0])
    domain.task(recipe, manifest.classes)  # refuses settings that exclude each other
    for fold in folds:
        plans_of(recipe, fold, recipe.seeds[0])  # refuses grids that cannot be
    handle = adapt(domain, recipe, manifest.classes)
    c = handle.parameters_count()
    share, roles = c["trained"] / c["total"], Counter(s.role for s in handle.sites)
    where = " at " + ", ".join(f"{n} x {role}" for role, n in roles.items()) if roles else ""
    lines = [
        f"backbone  {recipe.backbone}  {(c['total'] - c['trained']) / 1e6:.2f} M frozen"
        + ("  (random weights)" if recipe.random_weights else ""),
        f"adapter   {recipe.method}  {c['trained'] / 1e6:.4f} M trainable ({share:.2%}, "
        f"{c['trained_without_head']:,} without the head){where}",
        *(f"part      {line}" for line in domain.trains(handle)),
        f"input     {domain.describe(handle.model)['input']}",
        f"data      {len(manifest)} rows, {len(manifest.classes)} classes, {len(set(manifest.groups()))} groups",
    ]
    for label, grid in (("rates", recipe.lr_grid), ("decays", recipe.weight_decay_grid)):
        if grid:
            lines.append(f"{label:<10}{', '.join(f'{value:g}' for value in grid)}: validation rows choose")
    if recipe.refit:
        lines.append("refit     on training and validation rows together, once validation rows have chosen")
    for fold in folds:
        lines.append(f"split     {fold}")
        lines += [f"note      {note}" for note in fold.notes]
    lines += [f"note      {note}" for note in manifest.notes]
    lines += [f"skipped   {line}" for line in skipped_rows(manifest)]
    plan = {
        "params": c,
        "recipe": recipes.to_dict(recipe),
        "splits": [{"name": f.name, **f.sizes} for f in folds],
        "skipped": list(manifest.skipped),
    }
    return lines, plan


def _plus_minus(spread: dict[str, float]) -> str:
    return f"{spread['mean']:.3f} ± {spread['std']:.3f} ({spread['n']})"


def summary(result: dict[str, Any]) -> list[str]:
    """The result of a training or an evaluation, one fact per line."""
    lines = []
    for part in ("test", "val"):
        for name, found in result["metrics"].get(part, {}).items():
            if found["value"] is not None:
                interval = f"  [{found['ci'][0]:.3f}, {found['ci'][1]:.3f}]" if found.get("ci") else ""
                spread = "".join(f"  {key} {_plus_minus(own)}" for key, own in found.get("spread", {}).items())
                lines.append(f"{part:<5} {name:<18} {found['value']:.3f}{interval}{spread}")
    if any("spread" in found for part in ("test", "val") for found in result["metrics"].get(part, {}).values()):
        lines.append("in []: 95 % interval over groups; folds, seeds: mean ± standard deviation (how many)")
    adapters = result["adapter"] if isinstance(result["adapter"], list) else [result["adapter"]]
    for folder in adapters:
        size = (Path(folder) / "adapter.safetensors").stat().st_size
        lines.append(f"{'saved' if 'report' in result else 'adapter'}  {folder}  ({size / 1e6:.2f} MB)")
    if "report" in result:
        lines.append(f"report {result['report']}")
    return lines
