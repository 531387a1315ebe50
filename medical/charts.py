"""Charts of a finding in the report's style: ROC, precision-recall, calibration, predictive values, decision curve.

Each takes what `curves`, `prevalence` and `adaptsuite.metrics.reliability` give, and returns an SVG data address.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptsuite import figures
from adaptsuite.figures import ACCENT, SOFT, WARM

GREY = "#8a96a1"
BAND = {"color": SOFT, "alpha": 0.75, "lw": 0}


def roc(curve: Mapping[str, Any], point: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """curve: `curves.roc_curve`.  point: `clinical.evaluate` at the operating point, drawn with its intervals."""
    with figures.canvas(3.9, 3.9) as figure:
        axis = _square(figure, "1 − specificity", "sensitivity")
        axis.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--")
        axis.fill_between(curve["grid"], _floats(curve["low"]), _floats(curve["high"]), **BAND)
        axis.plot(curve["x"], curve["value"], color=ACCENT, lw=1.5, label=_labelled("AUROC", curve["area"]))
        if point and _has(point, "sensitivity", "specificity"):
            across = {"value": 1 - point["specificity"]["value"], "ci": _mirrored(point["specificity"]["ci"])}
            _cross(axis, across, point["sensitivity"])
        axis.legend(loc="lower right")
        return figures.embed(figure)


def precision_recall(curve: Mapping[str, Any], point: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """curve: `curves.pr_curve`.  point: as in `roc`."""
    with figures.canvas(3.9, 3.9) as figure:
        axis = _square(figure, "sensitivity (recall)", "PPV (precision)")
        axis.axhline(curve["prevalence"], color=GREY, lw=1, ls="--", label=f"prevalence {curve['prevalence']:.2f}")
        axis.fill_between(curve["grid"], _floats(curve["low"]), _floats(curve["high"]), **BAND)
        axis.plot(curve["x"], curve["value"], color=ACCENT, lw=1.5, label=_labelled("AUPRC", curve["area"]))
        if point and _has(point, "sensitivity", "ppv"):
            _cross(axis, point["sensitivity"], point["ppv"])
        axis.legend(loc="lower left")
        return figures.embed(figure)


def calibration(
    before: Sequence[Mapping[str, float]],
    after: Sequence[Mapping[str, float]],
    temperature: float,
    errors: Sequence[float] | None = None,
) -> str:
    """Reliability before and after temperature scaling, side by side; bins of `adaptsuite.metrics.reliability`.

    errors: the two calibration errors, for the titles.
    """
    titles = ["before", f"after T = {temperature:.2f}"]
    if errors is not None:
        titles = [f"{title}:  ECE {error:.3f}" for title, error in zip(titles, errors, strict=True)]
    with figures.canvas(6.8, 4.0) as figure:
        axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
        for column, (bins, title) in enumerate(zip((before, after), titles, strict=True)):
            top, bottom = axes[:, column]
            middle = [(b["low"] + b["high"]) / 2 for b in bins]
            width = [(b["high"] - b["low"]) * 0.92 for b in bins]
            top.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="if honest")
            top.bar(middle, [b["accuracy"] for b in bins], width, color=SOFT)
            top.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", color=ACCENT, lw=1.3, ms=3.5)
            top.set(ylim=(0, 1.02), xlim=(0, 1), title=title)
            bottom.bar(middle, [b["count"] for b in bins], width, color=SOFT)
            bottom.set(xlabel="stated probability")
            bottom.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        axes[0, 0].set_ylabel("share that is true")
        axes[0, 0].legend(loc="upper left")
        axes[1, 0].set_ylabel("predictions")
        return figures.embed(figure)


def predictive_values(curves: Mapping[str, Any]) -> str:
    """PPV and NPV over prevalence (`prevalence.predictive_curves`), on a logarithmic axis: most findings are rare."""
    with figures.canvas(4.6, 3.4) as figure:
        axis = figure.subplots()
        for name, color in (("ppv", ACCENT), ("npv", WARM)):
            own = {key: _floats(curves[name][key]) for key in ("value", "low", "high")}
            axis.fill_between(curves["prevalence"], own["low"], own["high"], color=color, alpha=0.18, lw=0)
            axis.plot(curves["prevalence"], own["value"], color=color, lw=1.5, label=name.upper())
        axis.axvline(curves["here"], color=GREY, lw=1, ls="--", label=f"prevalence here {curves['here']:.2f}")
        ends = min(curves["prevalence"]), max(curves["prevalence"])
        axis.set(xscale="log", xlabel="prevalence", ylim=(0, 1.02), xlim=ends)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.grid(color="#e6eaee", lw=0.7)
        axis.legend(loc="center left")
        return figures.embed(figure)


def decision(curve: Mapping[str, Any], threshold: float | None = None) -> str:
    """Net benefit over threshold probability (`curves.decision_curve`), beside calling every row and none."""
    top = max(curve["prevalence"], *curve["value"])
    with figures.canvas(4.6, 3.4) as figure:
        axis = figure.subplots()
        axis.fill_between(curve["x"], _floats(curve["low"]), _floats(curve["high"]), **BAND)
        axis.plot(curve["x"], curve["all"], color=GREY, lw=1.2, label="call every one")
        axis.axhline(0, color=GREY, lw=1.2, ls=":", label="call none")
        axis.plot(curve["x"], curve["value"], color=ACCENT, lw=1.5, label="call by the model")
        if threshold is not None:
            axis.axvline(threshold, color=WARM, lw=1, ls="--", label=f"operating point {threshold:.2g}")
        axis.set(xlabel="threshold probability", ylabel="net benefit", xlim=(0, 1), ylim=(-0.3 * top, 1.1 * top))
        axis.grid(color="#e6eaee", lw=0.7)
        axis.legend(loc="best")
        return figures.embed(figure)


def _square(figure, xlabel: str, ylabel: str):
    axis = figure.subplots()
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel, aspect="equal")
    axis.grid(color="#e6eaee", lw=0.7)
    return axis


def _cross(axis, across: Mapping[str, Any], up: Mapping[str, Any]) -> None:
    """A point with the intervals of both its coordinates."""
    x, y = across["value"], up["value"]
    if across["ci"]:
        axis.plot(across["ci"], [y, y], color=WARM, lw=1.2)
    if up["ci"]:
        axis.plot([x, x], up["ci"], color=WARM, lw=1.2)
    axis.plot(x, y, "o", color=WARM, ms=5, label="operating point")


def _has(point: Mapping[str, Mapping[str, Any]], *names: str) -> bool:
    return all(point.get(name, {}).get("value") is not None for name in names)


def _mirrored(ends: Sequence[float] | None) -> list[float] | None:
    return [1 - ends[1], 1 - ends[0]] if ends else None


def _labelled(name: str, metric: Mapping[str, Any]) -> str:
    ends = f" ({metric['ci'][0]:.3f} to {metric['ci'][1]:.3f})" if metric["ci"] else ""
    return f"{name} {metric['value']:.3f}{ends}"


def _floats(numbers: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in numbers])
