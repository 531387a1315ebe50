"""What masks are worth: overlap, surface distances and the finding by area, with intervals over resampled patients."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from adaptsuite import figures
from adaptsuite.domain import Said
from adaptsuite.figures import ACCENT, WARM
from adaptsuite.manifest import Manifest
from adaptsuite.medical import charts, clinical, curves, surface
from adaptsuite.medical.area_rule import AREA, PIXEL
from adaptsuite.medical.seg_data import Masked
from adaptsuite.medical.seg_task import APART, CALLED, SIZE, TRUE, dice_of, finding_scores, jaccard_of

CALLS = ("f1", "sensitivity", "specificity")  # of the finding by the area rule
EXAMPLES = 8  # pictures
REPEATS = 1000
BOTH_ARE = "A row of which mask and prediction are empty has a Dice of 1, and no distance."


def evaluate(
    manifest: Manifest, classes: Sequence[str], outputs: np.ndarray, repeats: int = REPEATS
) -> dict[str, dict[str, Any]]:
    """{metric: {"value", "ci", "note"?}} of (rows, K, 7) `ruled` outputs.

    One class: dice, dice_present (rows whose truth is not empty), jaccard, hd95_px or hd95_mm and its median, then of
    "the mask is not empty" f1, sensitivity and specificity by the area rule, and auroc by the area above PIXEL.
    Several: the mean of the first three over classes, and all of them for each, as "dice NAME".
    """
    patients = manifest.groups()
    each = [_of_class(manifest, outputs[:, k], patients, repeats) for k in range(len(classes))]
    if len(classes) == 1:
        return each[0]
    found = _overlaps(outputs, patients, repeats)
    for name, own in zip(classes, each, strict=True):
        found |= {f"{metric} {name}": value for metric, value in own.items()}
    return found


def _of_class(manifest: Manifest, own: np.ndarray, patients: np.ndarray, repeats: int) -> dict[str, dict[str, Any]]:
    found = _overlaps(own[:, None], patients, repeats)
    unit = "hd95_mm" if "spacing_mm" in manifest.columns else "hd95_px"
    apart = surface.summarise([{"hd95_mm": value} for value in own[:, APART]], patients, repeats)
    found |= {name.replace("hd95_mm", unit): value for name, value in apart.items()}
    found |= clinical.evaluate(_finding(own), patients, CALLS, repeats)
    return found | clinical.evaluate(_by_area(own), patients, ("auroc",), repeats)


def _overlaps(outputs: np.ndarray, patients: np.ndarray, repeats: int) -> dict[str, dict[str, Any]]:
    """Means over classes, then rows; (rows, K, ...)."""
    dice, jaccard = dice_of(outputs), jaccard_of(outputs)
    cases = [{"dice": d, "jaccard": j} for d, j in zip(dice.mean(1), jaccard.mean(1), strict=True)]
    whole = surface.summarise(cases, patients, repeats)
    there = outputs[..., TRUE] > 0
    rows = there.any(1)
    if rows.any():
        own = np.where(there, dice, 0).sum(1)[rows] / there.sum(1)[rows]
        present = surface.summarise([{"dice": d} for d in own], patients[rows], repeats)["dice"]
    else:
        present = {"value": None, "ci": None, "note": "not defined: every mask is empty"}
    return {"dice": whole["dice"], "dice_present": present, "jaccard": whole["jaccard"]}


def _finding(own: np.ndarray) -> clinical.Finding:
    """The finding of one class by its rule, (rows, 7)."""
    return clinical.finding(finding_scores(own[:, None])[:, 0], own[:, TRUE] > 0)


def _by_area(own: np.ndarray) -> clinical.Finding:
    """The finding by the area above PIXEL, which is the same measure whatever rule was chosen."""
    return clinical.finding(own[:, CALLED] / own[:, SIZE], own[:, TRUE] > 0, AREA)


def score(manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, float]:
    """The same values without intervals, where they are defined."""
    found = evaluate(manifest, classes, outputs, repeats=1)
    return {name: own["value"] for name, own in found.items() if own["value"] is not None}


# ---- sections of the report


def sections(said: Sequence[Said], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Tables and the ROC curve of each class; of several seeds the first."""
    first = [s for s in said if s.seed == said[0].seed]
    manifest = replace(first[0].manifest, rows=tuple(r for s in first for r in s.manifest.rows))
    outputs = np.concatenate([s.outputs for s in first])
    patients = manifest.groups()
    found, table = [], []
    for k, name in enumerate(classes):
        own = _of_class(manifest, outputs[:, k], patients, REPEATS)
        truth = outputs[:, k, TRUE] > 0
        table.append({"class": name, "rows": len(truth), "rows with it": int(truth.sum()), **own})
        found.append(_rule_section(first, name, outputs[:, k], patients))
        if truth.any() and not truth.all():
            point = clinical.evaluate(_finding(outputs[:, k]), patients, ("sensitivity", "specificity"))
            curve = charts.roc(curves.roc_curve(_by_area(outputs[:, k]), patients), point)
            caption = f"By the share of pixels above {PIXEL:g}. Cross: by the rule that validation rows chose."
            found.append({"title": f"{name} by area: ROC", "figure": curve, "caption": caption})
    return [{"title": "Masks of each class", "text": BOTH_ARE, "table": table}, *found]


def _rule_section(first: Sequence[Said], name: str, own: np.ndarray, patients: np.ndarray) -> dict[str, Any]:
    """What the chosen rule and the paper's call right."""
    rules = [s.kept["threshold"][name] for s in first if s.kept.get("threshold")]
    lines = list(dict.fromkeys(_rule_line(rule) for rule in rules)) or [_rule_line({"pixel": PIXEL, "value": AREA})]
    by = {"chosen on validation rows": _finding(own), "the paper's": _by_area(own)}
    names = ("f1", "sensitivity", "specificity", "ppv", "npv")
    values = {rule: clinical.evaluate(found, patients, names) for rule, found in by.items()}
    return {
        "title": f"{name} by area",
        "text": "A picture is positive where a large enough share of it is. " + " ".join(lines),
        "table": [{"rule": rule, **metrics} for rule, metrics in values.items()],
        "facts": {"rules": rules, **values},
    }


def _rule_line(rule: dict[str, Any]) -> str:
    chosen = f", chosen for {rule['target']}" if rule.get("reached") else ", the paper's"
    return f"At least {rule['value']:.3%} of the pixels above {rule['pixel']:g}{chosen}."


def examples(
    dataset: Masked, outputs: np.ndarray, maps: dict[int, np.ndarray], classes: Sequence[str]
) -> dict[str, Any]:
    """The section of pictures with the outlines of truth and prediction; maps: row -> (K, H, W), of `chosen` rows."""
    columns = min(4, len(maps))
    lines = -(-len(maps) // columns)
    with figures.canvas(2.1 * columns, 2.3 * lines) as figure:
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for axis in axes:
            axis.set_axis_off()
        for axis, (row, own) in zip(axes, maps.items(), strict=False):
            axis.imshow(dataset.picture(row))
            truth = dataset.full_mask(row)
            for k, probabilities in enumerate(own, 1):
                for mask, color in ((truth == k, WARM), (probabilities > PIXEL, ACCENT)):
                    if mask.any():
                        axis.contour(np.pad(mask, 1), [0.5], colors=[color], linewidths=1, extent=_extent(mask))
            shown = "empty" if not truth.any() else f"Dice {dice_of(outputs[row]).mean():.2f}"
            axis.set_title(f"{dataset.truths[row].name}: {shown}", fontsize=7)
        picture = figures.embed(figure)
    what = f"{', '.join(classes)}: " if classes != ("foreground",) else ""
    caption = (
        f"{what}truth in orange, prediction in blue. From the lowest Dice to the highest among rows with a mask, then "
        "rows without one where most was predicted."
    )
    return {"title": "Examples", "figure": picture, "caption": caption}


def _extent(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Where a mask with a border of one pixel lies, so that outlines close at the edge."""
    height, width = mask.shape
    return -1.5, width + 0.5, -1.5, height + 0.5


def chosen(outputs: np.ndarray) -> list[int]:
    """Rows to show: evenly from the lowest to the highest Dice of those with a mask; the most false of the others."""
    dice, there = dice_of(outputs).mean(1), (outputs[..., TRUE] > 0).any(1)
    with_mask = np.flatnonzero(there)[np.argsort(dice[there], kind="stable")]
    without = np.flatnonzero(~there)
    false = (outputs[without][..., CALLED] / outputs[without][..., SIZE]).sum(1) if len(without) else np.empty(0)
    without = without[np.argsort(-false, kind="stable")][: EXAMPLES // 4]
    count = min(len(with_mask), EXAMPLES - len(without))
    places = np.linspace(0, len(with_mask) - 1, count).round().astype(int) if count else []
    return [*(int(with_mask[i]) for i in places), *map(int, without)]
