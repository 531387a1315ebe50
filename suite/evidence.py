"""Tables and charts of what an adapter said of rows that were held out: where it is right, sure, and wrong."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptsuite import figures, metrics

MISTAKES, PAIRS = 15, 10  # rows shown
RESAMPLES = 1000
RATES = ("recall", "precision", "f1")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Probabilities beside the truth, one row a sample."""

    paths: Sequence[str]  # as the table has them, relative
    targets: np.ndarray  # (N,) class numbers; (N, K) zeros and ones for multilabel
    probabilities: np.ndarray  # (N, K)
    groups: Sequence[str] | None = None  # None: each row is its own
    runs: Sequence[str] | None = None  # the fold or seed that said it, where there are several


def evidence(said: Predictions, labels: Sequence[str], task: str) -> dict[str, Any]:
    """Counts, per-class table, charts and the worst mistakes; confusion only where one class excludes the others."""
    scored = metrics.prepare(said.probabilities, said.targets, task, True)
    matrix = scored.truth.astype(int).T @ scored.predicted.astype(int)
    single = task != "multilabel"
    return {
        "rows": len(said.paths),
        "groups": None if said.groups is None else len(set(said.groups)),
        "runs": 1 if said.runs is None else len(set(said.runs)),
        "classes": class_table(scored, labels, said.groups),
        "confusion": figures.confusion(matrix, labels) if single else None,
        "pairs": confused_pairs(matrix, labels) if single else [],
        "reliability": figures.reliability(metrics.reliability(said.probabilities, said.targets, task, True)),
        "mistakes": mistakes(said, scored, labels),
    }


def support(said: Predictions, num_classes: int) -> np.ndarray:
    """(K,) samples of each class, each sample once however many runs saw it."""
    _, first = np.unique(np.asarray(said.paths), return_index=True)
    targets = said.targets[first]
    return targets.sum(0) if targets.ndim == 2 else np.bincount(targets, minlength=num_classes)


def class_table(scored: metrics.Scored, labels: Sequence[str], groups: Sequence[str] | None) -> list[dict[str, Any]]:
    """Recall, precision and F1 of each class with 95 % intervals over resampled groups; weakest F1 first."""
    codes = np.arange(len(scored.truth)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    num = int(codes.max()) + 1
    counts = np.zeros((num, 3, len(labels)))
    both = scored.truth & scored.predicted
    np.add.at(counts, codes, np.stack([both, scored.truth, scored.predicted], 1))
    values = _rates(counts.sum(0)[None])
    drawn, rng = [], np.random.default_rng(0)
    chunk = max(1, 2_000_000 // num)  # resamples at once
    for start in range(0, RESAMPLES if num > 1 else 0, chunk):
        weights = rng.multinomial(num, np.full(num, 1 / num), min(chunk, RESAMPLES - start))
        drawn.append(_rates(np.tensordot(weights, counts, 1)))
    draws = np.concatenate(drawn) if drawn else np.empty((0, *values.shape[1:]))
    table = []
    for k, label in enumerate(labels):
        rates = {name: _metric(values[0, i, k], draws[:, i, k]) for i, name in enumerate(RATES)}
        table.append({"class": label, "rows": int(scored.truth[:, k].sum()), **rates})
    return sorted(table, key=lambda row: (row["f1"]["value"] is None, row["f1"]["value"] or 0, -row["rows"]))


def _rates(counts: np.ndarray) -> np.ndarray:
    """(R, 3, K) counts of both, true, predicted -> (R, 3, K) recall, precision, F1; nan where not defined."""
    both, true, predicted = counts.swapaxes(0, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(true > 0, 2 * both / (true + predicted), np.nan)
        return np.stack([both / true, both / predicted, f1], 1)


def _metric(value: float, draws: np.ndarray) -> dict[str, Any]:
    if not math.isfinite(value):
        return {"value": None, "ci": None}
    draws = draws[np.isfinite(draws)]
    interval = [float(q) for q in np.quantile(draws, [0.025, 0.975])] if len(draws) else None
    return {"value": float(value), "ci": interval}


def confused_pairs(matrix: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent confusions, most frequent first."""
    wrong = matrix * (1 - np.eye(len(matrix), dtype=int))
    places = [divmod(int(place), len(matrix)) for place in np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]]
    return [
        {"true": labels[i], "predicted": labels[j], "times": int(wrong[i, j]), "of": int(matrix[i].sum())}
        for i, j in places
        if wrong[i, j]
    ]


def mistakes(said: Predictions, scored: metrics.Scored, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The wrong answers that were given with the greatest confidence; for multilabel, single labels."""
    if scored.task == "multilabel":
        away = abs(scored.probabilities - scored.truth) * (scored.predicted != scored.truth)
    else:
        away = scored.probabilities * (scored.predicted & ~scored.truth)
    rows = []
    for i, k in (divmod(int(place), len(labels)) for place in np.argsort(-away, axis=None, kind="stable")[:MISTAKES]):
        if not away[i, k]:
            break
        row: dict[str, Any] = {"path": said.paths[i]}
        if said.groups is not None and said.groups[i] != said.paths[i]:
            row["group"] = said.groups[i]
        if said.runs is not None:
            row["run"] = said.runs[i]
        if scored.task == "multilabel":
            row |= {"label": labels[k], "is": "there" if scored.truth[i, k] else "absent"}
        else:
            true = int(said.targets[i])
            row |= {"true": labels[true], "predicted": labels[k], "p(true)": float(scored.probabilities[i, true])}
        rows.append({**row, "probability": float(scored.probabilities[i, k])})
    return rows
