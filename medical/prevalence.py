"""Probabilities and predictive values where a finding is rarer or more frequent than it was in the training rows.

All of it assumes that only the prevalence differs: that a positive looks the same in both places, p(x | y) being equal.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptsuite import metrics
from adaptsuite.errors import DataError
from adaptsuite.medical.clinical import LEVEL, Finding, interval_of, values

PREVALENCES = tuple(np.round(np.geomspace(0.001, 0.5, 60), 6).tolist())
STEPS, CLOSE = 10_000, 1e-9  # of the EM


def to_prevalence(probabilities, old, new) -> np.ndarray:
    """Posteriors at a new prevalence: p'_k = p_k new_k / old_k, scaled to sum to 1.

    probabilities: (N, K) with priors (K,), or those of a finding, of any shape, with two numbers (Elkan 2001, The
    foundations of cost-sensitive learning, IJCAI, theorem 2; Saerens et al. 2002, Neural Computation 14:21, eq. 2.4).
    They must be calibrated at the old prevalence. A threshold moves by the same formula: the calls then stay.
    """
    p, old, new = np.asarray(probabilities, dtype=float), _priors(old, "old"), _priors(new, "new")
    if old.shape != new.shape or (old.ndim and p.shape[-1:] != old.shape):
        raise ValueError(f"priors {old.shape} and {new.shape} do not fit probabilities {p.shape}")
    if not old.ndim:
        positive, negative = p * new / old, (1 - p) * (1 - new) / (1 - old)
        return positive / (positive + negative)
    scaled = p * new / old
    return scaled / scaled.sum(-1, keepdims=True)


def estimate_prevalence(
    probabilities, old, patients=None, repeats: int = 200, seed: int = 0, level: float = LEVEL
) -> list[dict[str, Any]]:
    """Prevalence of each class among unlabelled rows, {"value", "ci"} each, by EM from their probabilities.

    probabilities: (N, K), or (N,) of a finding, whose two classes are given back as absent and present; calibrated at
    the priors `old`.  Saerens et al. 2002, eq. 2.9: posteriors at the present guess, whose mean is the next guess, from
    `old` on. The likelihood has no other maximum. Uncalibrated probabilities mislead it (Alexandari et al. 2020,
    arXiv:1901.06852): scale their temperature first. Intervals resample patients.
    """
    p, old = np.asarray(probabilities, dtype=float), _priors(old, "old")
    if p.ndim == 1:
        p, old = np.stack([1 - p, p], 1), np.stack([1 - old, old])
    if p.ndim != 2 or not len(p) or old.shape != p.shape[1:]:
        raise ValueError(f"priors {old.shape} do not fit probabilities {np.shape(probabilities)}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("values outside [0, 1] are no probabilities")
    value, draws = metrics.resample(lambda weights: _em(p / old, old, weights), len(p), patients, repeats, seed)
    return [{"value": float(v), **interval_of(draws[:, k], level, repeats)} for k, v in enumerate(value)]


def _em(ratios: np.ndarray, start: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, K) priors that maximise sum_n w_n log sum_k prior_k ratio_nk.

    The posterior's mean under a guess: prior_k * mean_n(ratio_nk / sum_j prior_j ratio_nj), two matrix products.
    """
    shares = (weights / weights.sum(1, keepdims=True)).astype(float)
    priors = np.tile(start, (len(weights), 1))
    for _ in range(STEPS):
        new = priors * ((shares / (priors @ ratios.T)) @ ratios)
        if abs(new - priors).max() < CLOSE:
            return new
        priors = new
    return priors


def predictive_values(sensitivity, specificity, prevalence) -> tuple[np.ndarray, np.ndarray]:
    """PPV and NPV at a prevalence, by Bayes; nan where nothing is called positive, or negative."""
    sensitivity, specificity, prevalence = (np.asarray(x, dtype=float) for x in (sensitivity, specificity, prevalence))
    found, called_in_error = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    cleared, missed = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    with np.errstate(invalid="ignore", divide="ignore"):
        return found / (found + called_in_error), cleared / (cleared + missed)


def predictive_curves(
    found: Finding,
    patients=None,
    prevalences: Sequence[float] = PREVALENCES,
    repeats: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, Any]:
    """PPV and NPV of a finding's threshold over prevalence: {"prevalence", "ppv", "npv", "here"}.

    ppv, npv: {"value", "low", "high"}, lists beside `prevalence`.  here: the prevalence of these rows, where both are
    those of the table.
    """
    at = np.asarray(prevalences, dtype=float)
    if not ((at > 0) & (at < 1)).all():
        raise ValueError("prevalences lie between 0 and 1")
    if found.truth.all() or not found.truth.any():
        raise DataError("no predictive values over prevalence: all rows are of one class")

    def statistic(weights):
        sensitivity, specificity = values(found, weights, ("sensitivity", "specificity")).T[..., None]  # (R, 1) each
        return np.stack(predictive_values(sensitivity, specificity, at), 1)  # (R, 2, P)

    value, draws = metrics.resample(statistic, len(found.truth), patients, repeats, seed)
    ends = metrics.band(draws, level)
    curves = {"prevalence": at.tolist(), "here": float(found.truth.mean())}
    for i, name in enumerate(("ppv", "npv")):
        curves[name] = dict(zip(("value", "low", "high"), (_plain(x) for x in (value[i], *ends[:, i])), strict=True))
    return curves


def _plain(numbers: np.ndarray) -> list[float | None]:
    return [None if np.isnan(x) else float(x) for x in numbers]


def _priors(priors, name: str) -> np.ndarray:
    priors = np.asarray(priors, dtype=float)
    inside = bool(((priors > 0) & (priors < 1)).all())
    if priors.ndim > 1 or not inside or (priors.ndim and not np.isclose(priors.sum(), 1, atol=1e-3)):
        raise ValueError(f"the {name} prevalence {priors.tolist()} is none: a number in (0, 1), or K that sum to 1")
    return priors
