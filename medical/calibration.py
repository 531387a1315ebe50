"""Temperature scaling (Guo et al. 2017, arXiv:1706.04599, section 4.2): one scalar that makes probabilities honest.

Logits are divided by T > 0 before softmax or sigmoid, so the order of a row's classes, and of a finding's rows, stays.
T minimises the negative log likelihood of validation rows. In 1/T that is a convex function, so its one minimum is
where the slope is zero: Brent's method finds it, where the paper takes L-BFGS.
"""

from typing import Any

import numpy as np

from adaptsuite import metrics
from adaptsuite.errors import DataError
from adaptsuite.medical.clinical import LEVEL, interval_of, reflected

TABLE = ("log_loss", "brier", "ece")


def fit_temperature(logits, targets, task: str = "multiclass") -> float:
    """T of validation logits: (N, K) beside (N,) class numbers; (N,) or (N, K) beside zeros and ones for multilabel.

    A finding with one logit is a multilabel task of one label; several labels share one T.
    Raises DataError where no T is the best: rows of one class, all rows right (T would go to 0), or logits that say
    nothing of the targets or the opposite (T would go to infinity).
    """
    logits, truth = _prepared(logits, targets, task)
    if (truth.all(0) | ~truth.any(0)).all():
        raise DataError(f"no temperature: the {len(truth)} validation rows are of one class")
    if _slope(logits, truth, task, 0.0) >= 0:
        raise DataError(
            f"no temperature: on {len(truth)} validation rows the logits say nothing of the targets, or the opposite"
        )
    if _all_right(logits, truth, task):
        raise DataError(
            f"no temperature: all {len(truth)} validation rows are right, so that no certainty is too great for them; "
            "take more rows"
        )
    temperature = 1 / _root(logits, truth, task)
    return temperature if nll(logits, targets, task, temperature) <= nll(logits, targets, task) else 1.0  # of rounding


def nll(logits, targets, task: str = "multiclass", temperature: float = 1.0) -> float:
    """Mean negative log likelihood in nats at a temperature; for multilabel the mean over rows and labels."""
    logits, truth = _prepared(logits, targets, task)
    scaled = logits / temperature
    if task == "multilabel":
        return float((np.logaddexp(0, scaled) - truth * scaled).mean())
    return float((_logsumexp(scaled) - scaled[truth]).mean())


def calibration(
    logits, targets, temperature: float, patients=None, task: str = "multiclass", repeats: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Rows {"metric", "before", "after", "change"} of log_loss, brier and ece, each with a patient-bootstrap interval.

    For rows that did not fit the temperature. change: after - before on the same resamples, below 0 is better.
    ece: of the predicted class over 15 bins, of every label's own probability for multilabel.
    brier: mean of (p - y)^2; over K > 2 classes their sum, over 2 classes one of them, over labels their mean.
    """
    logits, truth = _prepared(logits, targets, task)
    before, after = (
        metrics.Scored(metrics.to_probabilities(scaled, task), truth, task) for scaled in (logits, logits / temperature)
    )

    def statistic(weights):
        each = np.stack([_errors(scored, weights) for scored in (before, after)], 1)  # (R, 2, 3)
        return np.concatenate([each, each[:, 1:] - each[:, :1]], 1)

    value, draws = metrics.resample(statistic, len(truth), patients, repeats, seed)
    cells = ("before", "after", "change")
    return [
        {"metric": name}
        | {c: _metric(name, c, float(value[j, i]), draws[:, j, i], repeats) for j, c in enumerate(cells)}
        for i, name in enumerate(TABLE)
    ]


def _metric(name: str, cell: str, value: float, draws: np.ndarray, repeats: int) -> dict[str, Any]:
    if name != "ece":
        return {"value": value, **interval_of(draws, LEVEL, repeats)}
    least = -1.0 if cell == "change" else 0.0
    return {"value": value, **reflected(value, draws, LEVEL, repeats, least)}


def _errors(scored: metrics.Scored, weights: np.ndarray) -> np.ndarray:
    """(R, 3) log_loss, brier, ece."""
    table = metrics.METRICS[scored.task]
    brier = weights @ brier_scores(scored) / weights.sum(1)
    return np.stack([table["log_loss"](scored, weights), brier, table["ece"](scored, weights)], 1)


def brier_scores(scored: metrics.Scored) -> np.ndarray:
    """(N,) squared errors of the rows, as scikit-learn scales them (`calibration` says how)."""
    squares = (scored.probabilities - scored.truth) ** 2
    return squares.sum(1) if scored.task == "multiclass" and squares.shape[1] > 2 else squares.mean(1)


def _prepared(logits, targets, task: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) float64 logits and bool truth."""
    logits, targets = np.asarray(logits, dtype=float), np.asarray(targets)
    if task == "multilabel":
        logits, targets = (own[:, None] if own.ndim == 1 else own for own in (logits, targets))
    if task == "multiclass" and logits.ndim == 2 and logits.shape[1] == 1:
        raise ValueError("one logit a row is a multilabel task of one label: task='multilabel'")
    return logits, metrics.prepare(logits, targets, task, probabilities=False).truth


def _slope(logits: np.ndarray, truth: np.ndarray, task: str, beta: float) -> float:
    """d nll / d beta at beta = 1 / T: the mean logit under the probabilities less that of the truth."""
    expected = metrics.to_probabilities(beta * logits, task)
    return float(((expected - truth) * logits).sum(1).mean())


def _all_right(logits: np.ndarray, truth: np.ndarray, task: str) -> bool:
    if task == "multilabel":
        return bool(((2 * truth - 1) * logits >= 0).all())
    return bool((logits[truth] >= logits.max(1)).all())


def _root(logits: np.ndarray, truth: np.ndarray, task: str) -> float:
    """beta > 0 where the slope, negative at 0 and rising, is zero."""
    from scipy.optimize import brentq

    scale = float(abs(logits).max())
    unit, high = logits / scale, 1.0
    while _slope(unit, truth, task, high) < 0:
        high *= 2
    return float(brentq(lambda beta: _slope(unit, truth, task, beta), 0.0, high, xtol=1e-12, rtol=1e-12)) / scale


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(1)
    return top + np.log(np.exp(x - top[:, None]).sum(1))
