"""Overlap and surface distances of masks, in 2-D and 3-D, with what holds where a mask is empty.

    both empty       Dice and Jaccard 1, distances nan: nothing was to be found, and nothing was
    one of them      Dice and Jaccard 0, distances inf: no distance says how far off that is
    both with a mask as usual

Means over cases leave nan and inf out and say how many; the median of a distance counts inf as the worst. Distances are
in millimetres, between the centres of border pixels or voxels: those of the mask that have a face towards the outside,
which the end of the image is too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adaptsuite import metrics
from adaptsuite.medical.clinical import LEVEL, interval_of

OVERLAPS = ("dice", "jaccard")
DISTANCES = ("hd95_mm", "hd_mm", "assd_mm")
NAMES = (*OVERLAPS, *DISTANCES)
PERCENTILE = 95


@dataclass(frozen=True, eq=False)
class Distances:
    """From each border pixel of one mask to the nearest of the other, in mm; both ways. Empty where a mask is."""

    forth: np.ndarray  # (n,) of the prediction's border
    back: np.ndarray  # (m,) of the truth's border


def compare(prediction, truth, spacing_mm: Sequence[float] | None = None) -> dict[str, float]:
    """dice, jaccard and, with a spacing, hd95_mm, hd_mm and assd_mm of two masks of one shape (H, W) or (D, H, W).

    hd95_mm: the larger of the two directions' 95th percentiles, as MONAI has it; others take one percentile of both
    directions together, which is smaller.  assd_mm: the mean of both directions' distances together.
    """
    prediction, truth = _masks(prediction, truth)
    found = overlap(prediction, truth)
    if spacing_mm is None:
        return found
    spacing = _spacing(spacing_mm, prediction.ndim)
    if not (prediction.any() and truth.any()):
        missed = np.inf if prediction.any() or truth.any() else np.nan
        return found | dict.fromkeys(DISTANCES, missed)
    away = distances(prediction, truth, spacing)
    both = np.concatenate([away.forth, away.back])
    hd95 = max(np.percentile(away.forth, PERCENTILE), np.percentile(away.back, PERCENTILE))
    return found | {"hd95_mm": float(hd95), "hd_mm": float(both.max()), "assd_mm": float(both.mean())}


def compare_labels(
    prediction, truth, labels: Mapping[int, str], spacing_mm: Sequence[float] | None = None
) -> dict[str, dict[str, float]]:
    """name -> `compare` of each label of two label maps. labels: {1: "lesion"}; leave the background out."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    return {name: compare(prediction == value, truth == value, spacing_mm) for value, name in labels.items()}


def overlap(prediction, truth) -> dict[str, float]:
    """dice 2|A B| / (|A| + |B|) and jaccard |A B| / |A or B|; 1 where both are empty."""
    prediction, truth = _masks(prediction, truth)
    both, either = int((prediction & truth).sum()), int((prediction | truth).sum())
    if not either:
        return {"dice": 1.0, "jaccard": 1.0}
    return {"dice": 2 * both / (both + either), "jaccard": both / either}


def distances(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> Distances:
    """Distances between the borders of two bool masks of one shape."""
    from scipy.spatial import KDTree

    own, other = (np.argwhere(border(mask)) * np.asarray(spacing_mm, dtype=float) for mask in (prediction, truth))
    if not (len(own) and len(other)):
        return Distances(np.empty(0), np.empty(0))
    return Distances(KDTree(other).query(own)[0], KDTree(own).query(other)[0])


def border(mask: np.ndarray) -> np.ndarray:
    """Pixels of a bool mask with a neighbour across a face that is not in it; beyond the image nothing is in it."""
    inside = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(mask.ndim):
        for step in (-1, 1):
            inner &= np.roll(inside, step, axis)[(slice(1, -1),) * mask.ndim]
    return mask & ~inner


def summarise(
    cases: Sequence[Mapping[str, float]],
    patients=None,
    repeats: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> dict[str, dict[str, Any]]:
    """Means over cases as {"value", "ci", "cases", "note"?} with patient-bootstrap intervals.

    cases: one `compare` a case, all of the same names.  A distance also has its median, `hd95_mm median`, in which a
    missed mask counts as inf; value None where at least half of the cases are missed.
    """
    result = {}
    for name in cases[0]:
        column = np.array([case[name] for case in cases], dtype=float)
        result[name] = _summary(column, _mean, patients, repeats, seed, level)
        missed, empty = int(np.isinf(column).sum()), int(np.isnan(column).sum())
        notes = [f"{missed} cases with one mask empty are left out"] if missed else []
        notes += [f"{empty} cases with both masks empty are left out"] if empty else []
        if name in DISTANCES:
            result[f"{name} median"] = _summary(column, _median, patients, repeats, seed, level)
        if notes:
            result[name]["note"] = "; ".join([*notes, *filter(None, [result[name].get("note")])])
    return result


def _summary(column, statistic, patients, repeats: int, seed: int, level: float) -> dict[str, Any]:
    value, draws = metrics.resample(lambda w: statistic(column, w), len(column), patients, repeats, seed)
    cases = int((np.isfinite(column) if statistic is _mean else ~np.isnan(column)).sum())
    if not np.isfinite(value):
        return {"value": None, "ci": None, "cases": cases}
    if len(draws) and np.isposinf(draws).mean() > (1 - level) / 2:
        return {"value": float(value), "ci": None, "cases": cases, "note": "no interval: its upper end is infinite"}
    return {"value": float(value), **interval_of(draws, level, len(draws)), "cases": cases}


def _mean(column: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) means over the finite cases."""
    finite = np.isfinite(column)
    return weights[:, finite] @ column[finite] / weights[:, finite].sum(1)


def _median(column: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) medians over the cases that are not nan: the lowest value with half of the weight at or below it."""
    order = np.argsort(column, kind="stable")
    order = order[~np.isnan(column[order])]
    if not len(order):
        return np.full(len(weights), np.nan)
    below = np.cumsum(weights[:, order], 1)
    return column[order][(below >= below[:, -1:] / 2).argmax(1)]


def _masks(prediction, truth) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape or prediction.ndim not in (2, 3):
        raise ValueError(f"two masks (H, W) or (D, H, W) of one shape: found {prediction.shape} and {truth.shape}")
    for mask in (prediction, truth):
        if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
            raise ValueError("a mask holds zeros and ones: threshold probabilities, or pick a label, first")
    return prediction.astype(bool), truth.astype(bool)


def _spacing(spacing_mm: Sequence[float], dims: int) -> tuple[float, ...]:
    spacing = tuple(float(s) for s in spacing_mm)
    if len(spacing) != dims or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing_mm {spacing} is not {dims} numbers above 0, in the order of the mask's axes")
    return spacing
