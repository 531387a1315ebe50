"""The adapter-efficiency bench: methods side by side in score, size, work and time (`adapt DOMAIN compare`).

What Mundra et al. 2023 (arXiv:2305.07491) ask of a claim of efficiency: all methods on one backbone and one split,
beside full fine-tuning, in training time and latency and not in trained parameters alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite import experiment, metrics
from adaptsuite import recipe as recipes
from adaptsuite.atomic import write_file
from adaptsuite.compare_page import NOTE, caption, is_full, markdown, pareto, parted, progress, sentences
from adaptsuite.costs import costs
from adaptsuite.domain import Domain
from adaptsuite.errors import Diverged, UsageError
from adaptsuite.manifest import LABELLED, Manifest
from adaptsuite.recipe import Recipe
from adaptsuite.report import Run, write_run

FULL = "full"  # the method that all are measured beside
LIMIT = "Every method ran with its own default settings and rate, unless the entry names others: no method was tuned."


def methods_of(text: str) -> list[tuple[str, str, list[str]]]:
    """(label, method, settings) of each entry of "a,b:rank=4:plan.lr=0.01"; lists are written with /.

    Raises UsageError for an empty or a repeated entry.
    """
    found = []
    for label in (entry.strip() for entry in text.split(",")):
        parts = label.split(":")
        settings = [part for part in parts if "=" in part]
        name = ":".join(parts[: len(parts) - len(settings)])  # peft:LOKR has a colon of its own
        if not name or any("=" in part for part in parts[: len(parts) - len(settings)]):
            raise UsageError(f"--methods {text}: {label!r} is no METHOD or METHOD:key=value:key=value")
        found.append((label, name, [setting.replace("/", ",") for setting in settings]))
    labels = [label for label, *_ in found]
    if len(set(labels)) < len(labels):
        raise UsageError(f"--methods {text}: {next(x for x in labels if labels.count(x) > 1)!r} comes twice")
    return found


def compare(
    domain: Domain,
    given: Mapping[str, Recipe],
    reference: Recipe,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
    count: int = 9,
) -> dict[str, Any]:
    """Trains every recipe on the same folds and seeds, measures it beside the reference, and writes table and report.

    given: label -> recipe, as options gave it.  reference: the same of full fine-tuning; it is only trained where it is
    among them.  count: turns in which times are taken.  Returns {"rows", "sentences", "table", "report"}; a method
    whose training diverged is a row with its reason.  Raises UsageError for one that does not fit.
    """
    manifest = experiment.read_table(domain, reference)
    with experiment.rows_named(manifest):
        settled = {
            label: experiment.complete(domain, recipe, [r.path for r in manifest.rows])
            for label, recipe in {FULL: reference, **given}.items()
        }
        for recipe in settled.values():  # what does not fit is said before any work
            experiment.adapt(domain, recipe, manifest.classes)
    host = experiment.adapt(domain, settled[FULL], manifest.classes)
    full = experiment.started(domain, settled[FULL], manifest, handle=host)
    rows = []
    for label in given:
        rows.append(_row(domain, label, settled[label], manifest, full, out / experiment.safe(label, "-_.="), count))
        say(progress(rows[-1]))
    _against_full(domain, manifest, rows)
    return _written(domain, settled, manifest, rows, out)


def _row(
    domain: Domain, label: str, recipe: Recipe, manifest: Manifest, full: tuple, out: Path, count: int
) -> dict[str, Any]:
    """Score and costs of one method; its training's adapters stay in `out`."""
    try:
        result, outcomes = experiment.train(domain, recipe, manifest, out)
    except Diverged as error:
        return {"method": label, "failed": str(error)}
    part = "test" if result["metrics"]["test"] else "val"
    found = result["metrics"][part]
    metric = recipe.plan.get("monitor") or domain.task(recipe, manifest.classes).monitor
    metric = metric if metric in found else next(iter(found), None)
    handle, *_ = experiment.restore(domain, outcomes[0].adapter)
    _, task, data, plan = experiment.started(domain, recipe, manifest, handle=handle)
    return {
        "method": label,
        "metric": metric,
        "part": part,
        "score": found.get(metric),
        "params": result["params"],
        **costs(domain, (handle, task, data, plan), full, count),
        "fit_seconds": sum(o.fit.seconds for o in outcomes) / len(outcomes),
        "adapters": [o.adapter.relative_to(out.parent).as_posix() for o in outcomes],  # below the run's folder
        "said": [(getattr(o.fold, part), o.outputs[part]) for o in outcomes if part in o.outputs],
    }


def _against_full(domain: Domain, manifest: Manifest, rows: list[dict[str, Any]]) -> None:
    """Adds `against_full` to each row: its score less full fine-tuning's, with a paired interval over groups.

    Only where labels are scored, and where full fine-tuning is among the methods (its first entry counts) and saw the
    same rows.
    """
    said = {row["method"]: row.pop("said", []) for row in rows}
    full = next((row for row in rows if is_full(row) and said[row["method"]]), None)
    if full is None or manifest.task not in LABELLED:
        return

    def drawn(label: str) -> tuple[np.ndarray, np.ndarray] | None:
        indices = np.concatenate([own for own, _ in said[label]]) if said[label] else np.empty(0)
        if not np.array_equal(indices, where):
            return None
        outputs = np.concatenate([own for _, own in said[label]])
        scored = metrics.prepare(outputs, domain.targets(subset, manifest.classes), manifest.task, False)
        statistic = metrics.METRICS[manifest.task][full["metric"]]
        return metrics.resample(lambda weights: statistic(scored, weights), len(where), groups)

    where = np.concatenate([own for own, _ in said[full["method"]]])
    subset = manifest.subset(where)
    groups = subset.groups()
    theirs = drawn(full["method"])
    for row in rows:
        ours = drawn(row["method"]) if row is not full and row.get("metric") == full["metric"] else None
        if ours is not None:
            interval = metrics.band(ours[1] - theirs[1]).tolist() if len(theirs[1]) else None
            row["against_full"] = {"value": float(ours[0] - theirs[0]), "ci": interval}


def _written(
    domain: Domain, settled: Mapping[str, Recipe], manifest: Manifest, rows: list[dict[str, Any]], out: Path
) -> dict[str, Any]:
    """The folder's table and report, and the result that `--json` prints."""
    told, (scores, costed) = sentences(rows), parted(rows)
    write_file(out / "compare.md", markdown(rows) + "\n" + "\n".join(f"- {text}" for text in [*told, NOTE]) + "\n")
    first = next(iter(settled.values()))
    figure = pareto(rows)
    page = Run(
        title=f"Comparison of {experiment.title(f'{len(rows)} methods', first.data.manifest)}",
        task=manifest.task,
        recipe=recipes.to_toml(first),
        adapted={"backbone": first.backbone + (" (random weights)" if first.random_weights else "")},
        data={"table": manifest.source.name, "rows": len(manifest), "sha256": manifest.digest},
        metrics={"compare": rows, "sentences": told},
        comparison=scores,
        extra=[
            {"title": "What the numbers say", "text": " ".join(told)},
            *([{"title": "Score and cost", "figure": figure, "caption": caption(rows)}] if figure else []),
            {"title": "What each costs", "text": NOTE, "table": costed},
        ],
        limits=[LIMIT],
        seeds=first.seeds,
    )
    return {"rows": rows, "sentences": told, "table": str(out / "compare.md"), "report": str(write_run(out, page))}
