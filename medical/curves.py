"""Curves of a finding over all thresholds, with bands of resampled patients: ROC, precision-recall, decision curve.

A curve is {"x", "value", "low", "high", ...}: lists that JSON holds and `adaptsuite.medical.charts` draws. Bands are
pointwise: each point of the curve lies within at the stated level, not the whole curve at once.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptsuite import metrics
from adaptsuite.errors import DataError
from adaptsuite.medical.clinical import LEVEL, Finding, evaluate
from adaptsuite.medical.operating_point import Cuts, cuts

GRID = tuple(np.linspace(0, 1, 101).tolist())
CLOSE = 1e-9  # a share on a grid point is at it, however it was rounded
WAGERS = tuple(np.linspace(0.01, 0.99, 99).tolist())


def roc_curve(found: Finding, patients=None, repeats: int = 500, seed: int = 0, level: float = LEVEL) -> dict[str, Any]:
    """Sensitivity over 1 - specificity. `x`, `value`: the points; `grid`, `low`, `high`: the band; `area`: AUROC.

    The band at x is of the highest sensitivity among thresholds whose 1 - specificity is at most x.
    """
    own = _cuts(found)
    fpr, tpr = (1 - own["specificity"], own["sensitivity"])
    low, high = _band(found, patients, _sensitivity_at, repeats, seed, level)
    curve = {"x": [0.0, *fpr.tolist()], "value": [0.0, *tpr.tolist()]}
    area = evaluate(found, patients, ("auroc",), repeats, seed, level)["auroc"]
    return {**curve, "grid": list(GRID), "low": low, "high": high, "area": area}


def pr_curve(found: Finding, patients=None, repeats: int = 500, seed: int = 0, level: float = LEVEL) -> dict[str, Any]:
    """PPV over sensitivity, as `roc_curve`; `area`: average precision, `prevalence`: PPV of calling every row.

    The band at x is of the PPV at the first threshold, from strict to lax, whose sensitivity is at least x.
    """
    own = _cuts(found)
    low, high = _band(found, patients, _ppv_at, repeats, seed, level)
    some = own["sensitivity"] > 0  # before the first positive there is nothing to see but zeros
    curve = {"x": own["sensitivity"][some].tolist(), "value": own["ppv"][some].tolist()}
    area = evaluate(found, patients, ("auprc",), repeats, seed, level)["auprc"]
    whole = {"prevalence": float(found.truth.mean()), "area": area}
    return {**curve, "grid": list(GRID), "low": low, "high": high, **whole}


def decision_curve(
    found: Finding,
    patients=None,
    wagers: Sequence[float] = WAGERS,
    repeats: int = 500,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Any]:
    """Net benefit over threshold probability (Vickers and Elkin 2006, Medical Decision Making 26:565).

    At p: TP/N - FP/N p / (1 - p), true positives less false ones at the rate at which p is willing to trade them.
    `x`, `value`, `low`, `high`; `all`: of calling every row, whose zero is the prevalence. Calling none is 0.
    Wants calibrated probabilities.
    """
    at = np.asarray(wagers, dtype=float)
    called = found.probabilities[:, None] >= at  # (N, T)
    hits, alarms = (np.where(own[:, None], called, False) for own in (found.truth, ~found.truth))
    odds = at / (1 - at)

    def statistic(weights):
        return (weights @ hits - (weights @ alarms) * odds) / weights.sum(1, keepdims=True)

    value, draws = metrics.resample(statistic, len(found.truth), patients, repeats, seed)
    low, high = metrics.band(draws, level)
    prevalence = float(found.truth.mean())
    everybody = prevalence - (1 - prevalence) * odds
    return {"x": at.tolist(), "value": value.tolist(), "low": _plain(low), "high": _plain(high)} | {
        "all": everybody.tolist(),
        "prevalence": prevalence,
    }


def _cuts(found: Finding) -> dict[str, np.ndarray]:
    if found.truth.all() or not found.truth.any():
        raise DataError("no curve: all rows are of one class")
    rates = cuts(found.probabilities).rates(found.truth, np.ones((1, len(found.truth))))
    return {name: rate[0] for name, rate in rates.items()}


def _band(found: Finding, patients, at, repeats: int, seed: int, level: float) -> list[list[float | None]]:
    own = cuts(found.probabilities)
    _, draws = metrics.resample(lambda w: at(own, found.truth, w), len(found.truth), patients, repeats, seed)
    return [_plain(end) for end in metrics.band(draws, level)]


def _sensitivity_at(own: Cuts, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, 101) sensitivity over the grid of 1 - specificity, nan in resamples of one class."""
    rates, rows = own.rates(truth, weights), []
    for sensitivity, specificity in zip(rates["sensitivity"], rates["specificity"], strict=True):
        last = np.searchsorted(1 - specificity, np.add(GRID, CLOSE), side="right")  # cuts: 1 - specificity rises
        defined = not np.isnan(sensitivity[0] + specificity[0])
        rows.append(np.concatenate([[0.0], sensitivity])[last] if defined else np.full(len(GRID), np.nan))
    return np.stack(rows)


def _ppv_at(own: Cuts, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, 101) PPV over the grid of sensitivity, nan in resamples without a positive."""
    rates, rows = own.rates(truth, weights), []
    for sensitivity, ppv in zip(rates["sensitivity"], rates["ppv"], strict=True):
        first = np.searchsorted(sensitivity, np.subtract(GRID, CLOSE), side="left")
        first = np.maximum(first, np.isnan(ppv).argmin())  # the strictest cuts may call none of the rows drawn
        rows.append(ppv[first] if not np.isnan(sensitivity[0]) else np.full(len(GRID), np.nan))
    return np.stack(rows)


def _plain(numbers: np.ndarray) -> list[float | None]:
    return [None if np.isnan(x) else float(x) for x in numbers]
