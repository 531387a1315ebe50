"""A threshold for a stated purpose, chosen on validation rows: the `threshold` record that an adapter keeps.

A target is text: `sensitivity>=0.95`, `specificity>=0.9`, `ppv>=0.8`, `npv>=0.99`, `f1` or `youden` (sensitivity +
specificity - 1). A row is positive where its probability is at or above the threshold; thresholds lie halfway between
neighbouring probabilities of the validation rows, so that rounding moves no row across.

Of the thresholds that reach a target the one with the best partner is taken: for sensitivity and npv the highest
specificity, for specificity and ppv the highest sensitivity. Then the higher sensitivity (to miss costs more than to
ask again), then the higher threshold.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adaptsuite import metrics
from adaptsuite.errors import DataError, UsageError
from adaptsuite.medical.clinical import AT_THRESHOLD, Finding, counts, evaluate, finding

PARTNER = {"sensitivity": "specificity", "npv": "specificity", "specificity": "sensitivity", "ppv": "sensitivity"}
BEST = ("f1", "youden")  # without a value to reach
EXAMPLES = "sensitivity>=0.95, specificity>=0.9, ppv>=0.8, npv>=0.99, f1, youden"


@dataclass(frozen=True)
class Target:
    """What a threshold shall reach: a metric and its least value, or the best of `f1` or `youden` (value None)."""

    metric: str
    value: float | None = None

    def __str__(self) -> str:
        return self.metric if self.value is None else f"{self.metric}>={self.value:g}"


def parse(text: str | Target) -> Target:
    """The Target of its text. Raises UsageError for anything else."""
    if isinstance(text, Target):
        return text
    if text in BEST:
        return Target(text)
    match = re.fullmatch(r"\s*(\w+)\s*>=\s*([0-9.]+)\s*", text)
    if match and match[1] in PARTNER:
        try:
            value = float(match[2])
        except ValueError:
            value = -1.0
        if 0 < value <= 1:
            return Target(match[1], value)
    raise UsageError(f"operating point {text!r} is not understood; examples: {EXAMPLES}")


@dataclass(frozen=True, eq=False)
class Cuts:
    """All ways (C,) to part the rows of a finding by a threshold, from few to many positives; one calls all rows."""

    thresholds: np.ndarray
    order: np.ndarray  # (N,) rows by falling probability
    ends: np.ndarray  # (C,) rows of `order` that are called

    def rates(self, truth: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
        """name -> (R, C) under weights (R, N), nan where not defined."""
        positive = truth[self.order]
        tp, fp = (
            np.cumsum(weights[:, self.order] * own, 1, dtype=float)[:, self.ends - 1] for own in (positive, ~positive)
        )
        fn, tn = (total - called for total, called in ((tp[:, -1:], tp), (fp[:, -1:], fp)))
        with np.errstate(invalid="ignore", divide="ignore"):
            sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
            return {
                "sensitivity": sensitivity,
                "specificity": specificity,
                "ppv": tp / (tp + fp),
                "npv": tn / (tn + fn),
                "f1": 2 * tp / (2 * tp + fp + fn),
                "youden": sensitivity + specificity - 1,
            }


def cuts(probabilities: np.ndarray) -> Cuts:
    """The cuts of (N,) probabilities; the lowest threshold is 0, which calls every row."""
    order = np.argsort(-probabilities, kind="stable")
    ranked = probabilities[order]
    ends = np.flatnonzero(np.append(ranked[1:] < ranked[:-1], True)) + 1
    thresholds = np.append((ranked[ends[:-1] - 1] + ranked[ends[:-1]]) / 2, 0.0)
    upper, lower = ranked[ends[:-1] - 1], ranked[ends[:-1]]
    thresholds[:-1] = np.where(thresholds[:-1] > lower, thresholds[:-1], upper)  # no number lies between the two
    return Cuts(thresholds, order, ends)


def choose_threshold(
    probabilities,
    truth,
    target: str | Target,
    patients=None,
    assured: float | None = None,
    repeats: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The record of the threshold that reaches the target on these validation rows, as JSON holds it.

    {"value", "target", "reached", "rule", "rows", "positives", "patients", "counts": {tp, fp, fn, tn}, "val":
    {metric: {"value", "ci", "of"}}, "notes"}. A target that no threshold reaches has value None, reached False and the
    nearest in `nearest`. assured: let the target be reached not by the validation rows as they are, but by that share
    of their patient resamples (.9, say), so that other patients will most likely reach it too.
    Raises DataError where rows of one class leave nothing to choose by.
    """
    target, found = parse(target), finding(probabilities, truth)
    if assured is not None and (target.value is None or not 0 < assured < 1):
        raise UsageError(f"assured={assured!r} is a share between 0 and 1, for a target with a value, not for {target}")
    _require_both(found)
    own = cuts(found.probabilities)
    reached = _reaching(own, found, target, patients, assured, repeats, seed)
    rates = own.rates(found.truth, np.ones((1, len(found.truth))))
    place = _best({name: rate[0] for name, rate in rates.items()}, target, reached)
    threshold, some = float(own.thresholds[place]), bool(reached.any())
    at = replace(found, threshold=threshold)
    record = {
        "value": threshold if some else None,
        "target": str(target),
        "reached": some,
        "rule": _rule(target, assured),
        **_behind(found, patients),
        "counts": counts(at),
        "val": evaluate(at, patients, AT_THRESHOLD, repeats, seed),
        **({} if some else {"nearest": threshold}),
    }
    return {**record, "notes": _notes(record, target, at, assured)}


def choose_thresholds(
    probabilities, targets, classes: Sequence[str], target: str | Target, patients=None, **settings: Any
) -> dict[str, dict[str, Any]]:
    """class -> record of `choose_threshold` of that class against the others, as (N, K) probabilities have them.

    Of several classes each is called or not on its own, also where their probabilities sum to 1.
    """
    targets = np.asarray(targets)
    truth = targets.astype(bool) if targets.ndim == 2 else targets[:, None] == np.arange(len(classes))
    return {
        name: choose_threshold(np.asarray(probabilities)[:, k], truth[:, k], target, patients, **settings)
        for k, name in enumerate(classes)
    }


def achieved(
    record: Mapping[str, Any], probabilities, truth, patients=None, repeats: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """What a record's threshold does on other rows: {"target", "threshold", "met", "counts", "test": metrics}.

    met: whether the value there reaches the target, None where the target is a best value or is not defined there.
    Raises DataError for a record whose target was not reached: it has no threshold.
    """
    if record.get("value") is None:
        raise DataError(f"the adapter has no threshold: {record['target']} was not reached on validation rows")
    found, target = finding(probabilities, truth, record["value"]), parse(record["target"])
    test = evaluate(found, patients, AT_THRESHOLD, repeats, seed)
    value = test[target.metric]["value"] if target.value is not None else None
    met = None if value is None else value >= target.value
    facts = {"target": record["target"], "threshold": record["value"], "met": met}
    return {**facts, "counts": counts(found), "test": test}


def _require_both(found: Finding) -> None:
    if found.truth.all() or not found.truth.any():
        kind = "positive" if found.truth.any() else "negative"
        raise DataError(f"no threshold: all {len(found.truth)} validation rows are {kind}")


def _behind(found: Finding, patients) -> dict[str, int]:
    """How many rows and patients a record rests on."""
    names = np.arange(len(found.truth)) if patients is None else np.asarray(patients)
    whole, positive = (len(np.unique(own)) for own in (names, names[found.truth]))
    facts = {"rows": len(found.truth), "positives": int(found.truth.sum())}
    return {**facts, "patients": whole, "positive_patients": positive}


def _reaching(own: Cuts, found: Finding, target: Target, patients, assured, repeats: int, seed: int) -> np.ndarray:
    """(C,) bool: the cuts that reach the target."""
    if target.value is None:
        return np.ones(len(own.thresholds), dtype=bool)
    value, draws = metrics.resample(
        lambda weights: own.rates(found.truth, weights)[target.metric],
        len(found.truth),
        patients,
        0 if assured is None else repeats,
        seed,
    )
    if assured is None:
        return value >= target.value
    if not len(draws):
        raise DataError("no assured threshold: all validation rows are of one patient")
    return (value >= target.value) & ((draws >= target.value).mean(0) >= assured)


def _best(rates: Mapping[str, np.ndarray], target: Target, reached: np.ndarray) -> int:
    """The cut to take: by the partner among those that reach the target, else the one nearest to it."""
    some = bool(reached.any())
    first = rates[PARTNER[target.metric] if some and target.value is not None else target.metric]
    rank = (-np.arange(len(reached)), rates["sensitivity"], np.nan_to_num(first, nan=-1.0))  # the last counts first
    order = np.lexsort((*rank, reached)) if some else np.lexsort(rank)
    return int(order[-1])


def _rule(target: Target, assured: float | None) -> str:
    by = "highest" if target.value is None else f"highest {PARTNER[target.metric]} among those that reach it"
    sure = "" if assured is None else f", reached in {assured:.0%} of patient resamples"
    return f"{by}{sure}; then the higher sensitivity, then the higher threshold; positive at or above it"


def _notes(record: Mapping[str, Any], target: Target, at: Finding, assured: float | None) -> list[str]:
    if not record["reached"]:
        sure = "" if assured is None else f" in {assured:.0%} of patient resamples"
        value = record["val"][target.metric]["value"]
        nearest = "" if value is None else f": the nearest is {value:.3f} at {record['nearest']:.3g}"
        return [f"{target} is not reached{sure} on {record['rows']} validation rows{nearest}"]
    if at.called.all():
        return [f"{target} is reached only by calling every row positive: this threshold tells nothing"]
    return []
