"""Which classes are the finding, what validation rows decide about it, and the sections of evidence in a report."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from adaptsuite import metrics
from adaptsuite.domain import Said
from adaptsuite.errors import DataError, UsageError, nearest
from adaptsuite.manifest import Manifest
from adaptsuite.medical import charts, clinical, curves, prevalence
from adaptsuite.medical.calibration import calibration, fit_temperature
from adaptsuite.medical.card import NAMED, Card, card_sections, write_card
from adaptsuite.medical.clinical import AT_THRESHOLD, OF_PROBABILITIES, Finding, finding
from adaptsuite.medical.operating_point import achieved, choose_threshold, parse
from adaptsuite.medical.patients import frames_and_patients
from adaptsuite.medical.subgroups import age_band, subgroup_table
from adaptsuite.report import collect_versions

NEGATION = re.compile(
    r"non[-_ ]?\w+|no[-_ ]\w+|no|none|normal|neg|negative|healthy|control|controls|benign|absent|0", re.I
)
CARD = "model_card.md"
MOST = 6  # findings whose curves are drawn
CROSS = "Band: 95 % of resampled patients. Cross: at the threshold, with its intervals."


@dataclass(frozen=True)
class EvidenceSettings:
    """Section `evidence` of a recipe."""

    positive: tuple[str, ...] = ()  # classes that together are the finding; none: where names tell it, of two classes
    operating_point: str = "sensitivity>=0.95"  # what the threshold shall reach on validation rows
    assured: float | None = None  # share of patient resamples of these rows that shall reach it
    calibrate: bool = True  # temperature scaling on validation rows
    subgroups: tuple[str, ...] = ()  # columns of the table
    prevalence: float | None = None  # of the finding where it will be used
    near_duplicates: Literal["say", "stop", "off"] = "say"  # of one picture in two parts

    def __post_init__(self) -> None:
        parse(self.operating_point)
        if self.prevalence is not None and not 0 < self.prevalence < 1:
            raise UsageError(f"evidence.prevalence={self.prevalence}: a share between 0 and 1 is expected")


def findings(classes: Sequence[str], task: str, settings: EvidenceSettings) -> dict[str, list[int]]:
    """finding -> columns whose probabilities it sums; empty where nothing says which of two classes it is.

    Each label of a multilabel task; `positive` together; of two classes the one whose opposite is named as one (normal,
    benign, no..., non...); of more classes each against the others.
    """
    for name in settings.positive:
        if name not in classes:
            raise UsageError(f"evidence.positive: no class {name!r}; {nearest(name, classes)}")
    if task == "multilabel":
        return {name: [k] for k, name in enumerate(classes) if name in (settings.positive or classes)}
    if settings.positive:
        if len(settings.positive) == len(classes):
            raise UsageError("evidence.positive names every class: a finding needs rows without it")
        return {" or ".join(settings.positive): [classes.index(name) for name in settings.positive]}
    if len(classes) > 2:
        return {name: [k] for k, name in enumerate(classes)}
    negative = [k for k, name in enumerate(classes) if NEGATION.fullmatch(name)]
    return {classes[1 - negative[0]]: [1 - negative[0]]} if len(negative) == 1 else {}


def probability(outputs: np.ndarray, columns: Sequence[int], task: str) -> np.ndarray:
    """(rows,) of a finding."""
    return np.clip(metrics.to_probabilities(outputs, task)[:, columns].sum(1), 0, 1)


def truth(targets: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """(rows,) bool."""
    return targets[:, columns].any(1) if targets.ndim == 2 else np.isin(targets, columns)


def decide(
    manifest: Manifest, classes: Sequence[str], outputs: np.ndarray, settings: EvidenceSettings
) -> dict[str, Any]:
    """Records of an adapter from validation rows: "temperature", "threshold" {finding: record}, "notes"."""
    targets, patients, kept = manifest.targets(classes), manifest.groups(), {"notes": []}
    if settings.calibrate:
        try:
            kept["temperature"] = fit_temperature(outputs, targets, manifest.task)
        except DataError as e:
            kept["notes"].append(str(e))
    outputs, points = outputs / kept.get("temperature", 1.0), {}
    for name, columns in findings(classes, manifest.task, settings).items():
        found = probability(outputs, columns, manifest.task), truth(targets, columns)
        try:
            points[name] = choose_threshold(*found, settings.operating_point, patients, settings.assured)
        except DataError as e:
            kept["notes"].append(f"{name}: {e}")
        else:
            kept["notes"] += [f"{name}: {note}" for note in points[name]["notes"]]
    return kept | ({"threshold": points} if points else {})


# evidence -----------------------------------------------------------------------------------------------------------


def sections(
    said: Sequence[Said],
    classes: Sequence[str],
    settings: EvidenceSettings,
    part: str,
    splits: Sequence[Mapping[str, Any]],
    leaks: Mapping[str, Any],
    out: Path | None,
) -> list[dict[str, Any]]:
    """Of each finding its metrics at the operating point and its curves; the model card, which goes to `out` too; and
    calibration before and after.

    Of several seeds the first is drawn; tables of metrics tell the others.
    """
    seeds = list(dict.fromkeys(s.seed for s in said))
    first = _together([s for s in said if s.seed == seeds[0]])
    others = [_together([s for s in said if s.seed == seed]) for seed in seeds[1:]]
    scaled, found, card = _scaled(first, classes), [], None
    for place, (name, columns) in enumerate(findings(classes, first.manifest.task, settings).items()):
        if place == MOST:
            break
        own = _finding(first, name, columns, classes)
        if own.truth.all() or not own.truth.any():
            found.append(
                {"title": f"Finding: {name}", "text": f"All {part} rows are of one class: nothing to measure."}
            )
            continue
        called = _called(first, name, own)
        values = clinical.evaluate(own, first.patients, OF_PROBABILITIES)
        values |= clinical.evaluate(called, first.patients, AT_THRESHOLD)
        by_seed = [own, *(_finding(other, name, columns, classes) for other in others)]
        found += _of_finding(first, name, own, called, values, by_seed, settings, part)
        if place == 0:
            card = _card(first, name, own, called, values, scaled, classes, settings, part, splits, leaks)
    if card is not None:
        if out is not None:
            write_card(out / CARD, card)
        twice = (f"Metrics on {part} rows", "Model", "Data", "Versions")  # the report has them elsewhere
        found += [section for section in card_sections(card) if section["title"] not in twice]
    return found + ([_reliability(first, scaled, classes)] if scaled else [])


@dataclass(frozen=True, eq=False)
class _Together:
    """The rows of all folds of one seed."""

    manifest: Manifest
    outputs: np.ndarray
    raw: np.ndarray
    temperatures: np.ndarray  # (rows, 1)
    points: Sequence[Mapping[str, Any]]  # of each row's adapter: {finding: record}
    patients: np.ndarray
    facts: Mapping[str, Any]


def _together(said: Sequence[Said]) -> _Together:
    rows = [r for s in said for r in s.manifest.rows]
    manifest = replace(said[0].manifest, rows=tuple(rows))
    return _Together(
        manifest,
        np.concatenate([s.outputs for s in said]),
        np.concatenate([s.raw for s in said]),
        np.concatenate([np.full((len(s.outputs), 1), s.kept.get("temperature") or 1.0) for s in said]),
        [s.kept.get("threshold") or {} for s in said for _ in range(len(s.outputs))],
        manifest.groups(),
        said[0].facts,
    )


def _finding(rows: _Together, name: str, columns: Sequence[int], classes: Sequence[str]) -> Finding:
    p = probability(rows.outputs, columns, rows.manifest.task)
    own = {row_point.get(name, {}).get("value") for row_point in rows.points}
    threshold = own.pop() if len(own) == 1 else None
    return finding(p, truth(rows.manifest.targets(classes), columns), 0.5 if threshold is None else threshold)


def _called(rows: _Together, name: str, own: Finding) -> Finding:
    """Probabilities moved so that each row's own threshold lies at .5: folds choose different ones."""
    values = [point.get(name, {}).get("value") for point in rows.points]
    if len(set(values)) == 1:
        return own
    cut = np.clip([0.5 if v is None else v for v in values], 1e-9, 1 - 1e-9)
    p = np.clip(own.probabilities, 1e-12, 1 - 1e-12)
    moved = 1 / (1 + np.exp(-(np.log(p / (1 - p)) - np.log(cut / (1 - cut)))))
    # equal to the threshold is called, which rounding must not undo
    moved = np.where(own.probabilities >= cut, np.maximum(moved, 0.5), np.minimum(moved, np.nextafter(0.5, 0)))
    return finding(moved, own.truth, 0.5)


def _of_finding(rows, name, own, called, values, by_seed, settings, part) -> list[dict[str, Any]]:
    seeds = [clinical.evaluate(each, None, ("auroc", "auprc"), repeats=1) for each in by_seed]
    noted = any(v.get("note") for v in values.values())
    table = [
        {"metric": NAMED.get(m, m), part: v, **({"note": v.get("note", "")} if noted else {})}
        for m, v in values.items()
    ]
    point = {m: values[m] for m in AT_THRESHOLD}
    facts = {"metrics": values, "rows": len(own.truth), "positives": int(own.truth.sum())}
    if len(seeds) > 1:
        facts["by_seed"] = [{m: v["value"] for m, v in each.items()} for each in seeds]
        for row, metric in zip(table, values, strict=True):
            row["other seeds"] = ", ".join(f"{e[metric]['value']:.3f}" for e in seeds[1:]) if metric in seeds[0] else ""
    roc, pr = curves.roc_curve(own, rows.patients), curves.pr_curve(own, rows.patients)
    return [
        {"title": f"Finding: {name}", "text": _point_line(rows, name), "table": table, "facts": facts},
        {"title": f"{name}: ROC", "figure": charts.roc(roc, point), "caption": CROSS},
        {"title": f"{name}: precision and recall", "figure": charts.precision_recall(pr, point)},
        {
            "title": f"{name}: predictive values where the finding is rarer",
            "figure": charts.predictive_values(prevalence.predictive_curves(called, rows.patients)),
            "text": _elsewhere(point, settings),
        },
        {
            "title": f"{name}: net benefit",
            "figure": charts.decision(curves.decision_curve(own, rows.patients)),
            "caption": "Net benefit of calling by this model, of calling everyone, and of calling no one.",
        },
    ]


def _point_line(rows: _Together, name: str) -> str:
    points = [p for p in {id(p): p.get(name) for p in rows.points}.values() if p]
    if not points:
        return "No operating point: no validation rows, or rows of one class; calls are made at .5."
    values = sorted({p["value"] for p in points if p["value"] is not None})
    if not values:
        return f"{points[0]['target']} was not reached on validation rows: calls are made at .5."
    at = f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} to {values[-1]:.3f} ({len(points)} adapters)"
    return f"Threshold {at}, chosen on validation rows for {points[0]['target']}."


def _elsewhere(point: Mapping[str, Mapping[str, Any]], settings: EvidenceSettings) -> str:
    share, pair = settings.prevalence, [point[m]["value"] for m in ("sensitivity", "specificity")]
    if share is None or None in pair:
        return ""
    ppv, npv = (float(v) for v in prevalence.predictive_values(*pair, share))
    return f"At a prevalence of {share:.3g}: PPV {ppv:.3f}, NPV {npv:.3f}, if only the prevalence differs."


def _card(rows, name, own, called, values, scaled, classes, settings, part, splits, leaks) -> Card:
    point = next((p[name] for p in rows.points if name in p), None)
    one = len({id(p) for p in rows.points}) == 1
    temperature = float(rows.temperatures[0, 0]) if len(np.unique(rows.temperatures)) == 1 else None
    return Card(
        title=f"{name}: {rows.facts.get('method', 'adapter')} on {rows.facts.get('backbone', 'a backbone')}",
        model={k: rows.facts[k] for k in ("backbone", "method", "trained", "total") if k in rows.facts},
        data={
            "rows": len(own.truth),
            "patients": len(np.unique(rows.patients)),
            "classes": ", ".join(classes),
            "positives": int(own.truth.sum()),
        },
        splits=splits,
        leaks=leaks,
        metrics=values,
        part=part,
        units=frames_and_patients(own, rows.patients) if len(np.unique(rows.patients)) < len(own.truth) else {},
        operating_point=point,
        achieved=achieved(point, own.probabilities, own.truth, rows.patients)
        if one and point and point["value"] is not None
        else None,
        temperature=temperature if scaled else None,
        calibration=scaled,
        subgroups={
            column: subgroup_table(called, column, _cells(rows.manifest, column), rows.patients)
            for column in settings.subgroups
        },
        versions=collect_versions(),
    )


def _scaled(rows: _Together, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The table of `calibration` before and after temperature scaling; empty where nothing was scaled."""
    if not (rows.temperatures != 1).any():
        return []
    return calibration(rows.raw, rows.manifest.targets(classes), rows.temperatures, rows.patients, rows.manifest.task)


def _reliability(rows: _Together, table: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    targets, task = rows.manifest.targets(classes), rows.manifest.task
    both = [
        metrics.reliability(metrics.to_probabilities(x, task), targets, task, True) for x in (rows.raw, rows.outputs)
    ]
    errors = next(row for row in table if row["metric"] == "ece")
    temperature = float(np.exp(np.log(rows.temperatures).mean()))
    figure = charts.calibration(*both, temperature, [errors["before"]["value"], errors["after"]["value"]])
    facts = {"temperature": temperature, **{row["metric"]: row for row in table}}
    return {"title": "Calibration before and after", "figure": figure, "facts": facts}


def _cells(manifest: Manifest, column: str) -> list[str]:
    cells = manifest.column(column)
    if column.lower() != "age":
        return cells
    try:
        return [age_band(cell) for cell in cells]
    except ValueError as e:
        raise DataError(f"{manifest.source.name}, column {column!r}: {e}") from None
