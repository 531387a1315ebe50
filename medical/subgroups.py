"""A finding's metrics in subgroups (site, device, sex, age band), without saying anything of a few people.

A group of fewer than `least_patients`, or with fewer than `least_positives` patients who have, or who lack, the
finding, is suppressed: its metrics would be noise, its counts could point at persons, and its name may be one. A single
suppressed group could be computed from the whole and the others, so the smallest shown groups are suppressed with it
until those hidden are two at least and together large enough (complementary suppression). Each column is protected on
its own: of columns that nest (a device within a site), show one.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptsuite import metrics
from adaptsuite.errors import UsageError
from adaptsuite.medical.clinical import LEVEL, NAMES, Finding, interval_of, values

SHOWN = ("auroc", "sensitivity", "specificity")
LEAST_PATIENTS, LEAST_POSITIVES = 10, 5
ALL, NOT_STATED, SUPPRESSED = "all", "not stated", "suppressed"
BANDS = (0, 18, 40, 60, 80)  # years in which an age band starts; the last has no end


def subgroup_table(
    found: Finding,
    column: str,
    cells: Sequence[Any],
    patients=None,
    names: Sequence[str] = SHOWN,
    least_patients: int = LEAST_PATIENTS,
    least_positives: int = LEAST_POSITIVES,
    repeats: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> list[dict[str, Any]]:
    """Rows of a report's table: first all, then each value of the column, by falling size, the suppressed last.

    cells: (N,) values of the rows, empty or None where not stated. A row has the column's value, patients, rows, each
    metric as {"value", "ci"}, and `METRIC against the rest`, the difference to all other rows on the same resamples.
    The suppressed share one row, that says how many and why. Differences of many groups are many tests: some will
    exclude zero by chance.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise UsageError(f"metric {unknown[0]!r} is unknown; there is: {', '.join(NAMES)}")
    people = np.arange(len(found.truth)) if patients is None else np.asarray(patients)
    masks = _masks(cells, len(found.truth))
    hidden = suppressed(found, masks, people, least_patients, least_positives)
    shown = sorted((name for name in masks if name not in hidden), key=lambda name: (-masks[name].sum(), name))
    value, draws = _resampled(found, [masks[name] for name in shown], people, names, repeats, seed)
    table = [_row(column, ALL, np.ones(len(people), dtype=bool), people)]
    table += [_row(column, name, masks[name], people) for name in shown]
    for i, row in enumerate(table):
        for k, name in enumerate(names):
            row[name] = _metric(value[i, 0, k], draws[:, i, 0, k], level, repeats)
            row[f"{name} against the rest"] = _metric(value[i, 1, k], draws[:, i, 1, k], level, repeats) if i else None
    return table + ([_hidden_row(column, hidden)] if hidden else [])


def suppressed(
    found: Finding, masks: dict[str, np.ndarray], people: np.ndarray, least_patients: int, least_positives: int
) -> dict[str, str]:
    """Group -> why its numbers are not shown; empty when all may be.

    masks: group -> (N,) rows.  people: (N,) patient of each row.
    """
    hidden = {}
    for name, mask in masks.items():
        if why := _too_small(found, mask, people, least_patients, least_positives):
            hidden[name] = why
    sizes = {name: len(np.unique(people[mask])) for name, mask in masks.items()}
    for name in sorted(masks, key=lambda name: (sizes[name], name)) if hidden else ():
        together = np.logical_or.reduce([masks[other] for other in hidden])
        if not _too_small(found, together, people, least_patients, least_positives):  # so they are two at least
            break
        hidden.setdefault(name, "with its numbers those of another group could be computed")
    return hidden


def _too_small(found: Finding, mask: np.ndarray, people: np.ndarray, least: int, positives: int) -> str:
    """The reason, in words that tell no count."""
    if len(np.unique(people[mask])) < least:
        return f"fewer than {least} patients"
    with_it, without = (len(np.unique(people[mask & kind])) for kind in (found.truth, ~found.truth))
    if min(with_it, without) < positives:
        return f"fewer than {positives} patients with or without the finding"
    return ""


def _masks(cells: Sequence[Any], rows: int) -> dict[str, np.ndarray]:
    names = np.array([str(cell).strip() if cell is not None else "" for cell in cells], dtype=object)
    if names.shape != (rows,):
        raise ValueError(f"{len(names)} cells of a subgroup column beside {rows} rows")
    names[names == ""] = NOT_STATED
    return {name: names == name for name in sorted(set(names))}


def _resampled(found: Finding, masks: Sequence[np.ndarray], people, names, repeats: int, seed: int):
    """(G + 1, 2, M) values and their draws: of all and of each group, itself and its difference to the rest."""

    def statistic(weights):
        whole = values(found, weights, names)
        parts = [np.stack([whole, np.full_like(whole, np.nan)], 1)]
        for mask in masks:
            own, rest = (values(found, weights * kind, names) for kind in (mask, ~mask))
            parts.append(np.stack([own, own - rest], 1))
        return np.stack(parts, 1)

    return metrics.resample(statistic, len(found.truth), people, repeats, seed)


def _row(column: str, name: str, mask: np.ndarray, people: np.ndarray) -> dict[str, Any]:
    return {column: name, "patients": len(np.unique(people[mask])), "rows": int(mask.sum())}


def _hidden_row(column: str, hidden: dict[str, str]) -> dict[str, Any]:
    what = "1 group" if len(hidden) == 1 else f"{len(hidden)} groups"
    return {
        column: f"{what} {SUPPRESSED}",
        "patients": None,
        "rows": None,
        "why": "; ".join(sorted(set(hidden.values()))),
    }


def _metric(value: float, draws: np.ndarray, level: float, repeats: int) -> dict[str, Any]:
    if np.isnan(value):
        return {"value": None, "ci": None}
    return {"value": float(value), **interval_of(draws, level, repeats)}


def age_band(age: Any, starts: Sequence[int] = BANDS) -> str:
    """`40-59` of 45, of `045Y` (DICOM's age string) or of `018M`; `80+` for the oldest; empty where not stated.

    Raises ValueError for text that is no age, without repeating it.
    """
    if age is None or age == "":
        return ""
    match = re.fullmatch(r"\s*(\d{1,3})(?:\.\d+)?\s*([DWMY]?)\s*", str(age).upper())
    if not match:
        raise ValueError("an age is a number of years, or digits and D, W, M or Y as in DICOM")
    years = int(match[1]) / {"D": 365.25, "W": 52.18, "M": 12}.get(match[2], 1)
    place = max((i for i, start in enumerate(starts) if start <= years), default=None)
    if place is None:
        return f"under {starts[0]}"
    return f"{starts[place]}+" if place == len(starts) - 1 else f"{starts[place]}-{starts[place + 1] - 1}"
