"""From frames and slices to patients: one probability a patient, and what an interval over frames leaves out."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from adaptsuite import metrics
from adaptsuite.errors import DataError, UsageError, nearest
from adaptsuite.medical.clinical import LEVEL, Finding, interval_of, values


def _mean(rows: np.ndarray) -> np.ndarray:
    return rows.mean(0)


def _max(rows: np.ndarray) -> np.ndarray:
    return rows.max(0)


def _noisy_or(rows: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return 0.0 - np.expm1(np.log1p(-rows).sum(0))


RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"mean": _mean, "max": _max, "noisy-or": _noisy_or}


def by_patient(rows, patients, rule: str = "mean") -> tuple[list, np.ndarray]:
    """Patients in the order of their first row, and one value each: (N,) -> (P,), (N, K) -> (P, K).

    rule: mean, slice-to-volume averaging, of probabilities, logits or features alike; max, one frame suffices;
    noisy-or, 1 - prod(1 - p), the chance that some frame shows it if frames were independent. They are not: over a
    hundred frames noisy-or says yes to everybody, unless the probabilities of empty frames are almost zero.
    """
    rows = np.asarray(rows, dtype=float)
    if rule not in RULES:
        raise UsageError(f"rule {rule!r} is unknown; {nearest(rule, RULES)}")
    if rule == "noisy-or" and not ((rows >= 0) & (rows <= 1)).all():
        raise ValueError("noisy-or needs probabilities in [0, 1]")
    names, members = _members(patients, len(rows))
    return names, np.stack([RULES[rule](rows[own]) for own in members])


def truth_by_patient(truth, patients, rule: str = "any") -> tuple[list, np.ndarray]:
    """Patients as `by_patient`, and their truth: (N,) -> (P,).

    rule: any, (N,) zeros and ones, positive where a frame is; same, class numbers that all rows of a patient share.
    """
    truth = np.asarray(truth)
    names, members = _members(patients, len(truth))
    if rule == "any":
        return names, np.array([bool(truth[own].any()) for own in members])
    if rule != "same":
        raise UsageError(f"rule {rule!r} is unknown; {nearest(rule, ('any', 'same'))}")
    mixed = sum(len(np.unique(truth[own])) > 1 for own in members)
    if mixed:
        raise DataError(f"{mixed} of {len(names)} patients have rows of several classes: rule 'same' does not hold")
    return names, truth[[own[0] for own in members]]


def _members(patients, rows: int) -> tuple[list, list[np.ndarray]]:
    """Names by first appearance, and the row numbers of each."""
    patients = np.asarray(patients)
    if patients.shape != (rows,):
        raise ValueError(f"patients have shape {patients.shape} beside {rows} rows")
    names, first, inverse = np.unique(patients, return_index=True, return_inverse=True)
    own = np.split(np.argsort(inverse, kind="stable"), np.cumsum(np.bincount(inverse))[:-1])
    order = np.argsort(first)
    return names[order].tolist(), [own[i] for i in order]


def frames_and_patients(
    found: Finding,
    patients,
    names: Sequence[str] = ("auroc", "auprc", "sensitivity", "specificity", "f1"),
    repeats: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, dict[str, Any]]:
    """Both intervals of the same predictions: {name: {"value", "patients": ci, "frames": ci, "wider": ratio}}.

    wider: width by patients over width by frames; its square is the design effect, so frames / wider^2 is the number
    of independent frames that would tell as much.
    """
    rows = len(found.truth)
    value, by_group = metrics.resample(lambda w: values(found, w, names), rows, patients, repeats, seed)
    _, by_frame = metrics.resample(lambda w: values(found, w, names), rows, None, repeats, seed)
    result = {}
    for i, name in enumerate(names):
        whole, naive = (interval_of(draws[:, i], level)["ci"] for draws in (by_group, by_frame))
        wider = (whole[1] - whole[0]) / (naive[1] - naive[0]) if whole and naive and naive[1] > naive[0] else None
        shown = None if np.isnan(value[i]) else float(value[i])
        result[name] = {"value": shown, "patients": whole, "frames": naive, "wider": wider}
    return result
