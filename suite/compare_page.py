"""How `adapt DOMAIN compare` shows its rows: table, sentences, and the picture of score against cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptsuite import figures
from adaptsuite.metrics import LOWER
from adaptsuite.report import cell

NOTE = (
    "Intervals are of 95 % over groups of held-out rows. Steps and latencies were taken in turns with full fine-tuning "
    "in one process, as the median ratio; milliseconds are that ratio times full fine-tuning's own median, so the load "
    "of the machine cancels. A probe's step is without the cache of features that its training may use."
)

COSTS = ("no head", "kB", "MMAC", "act. MB", "step/full", "ms", "ms merged")

Row = Mapping[str, Any]


def is_full(row: Row) -> bool:
    """Whether a row is of full fine-tuning, with whatever settings."""
    return row["method"].partition(":")[0] == "full"


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The columns that all outputs show; a cell is text, a number, None or a metric {"value", "ci"}."""
    full_ms = {kind: _full_ms(rows, kind) for kind in ("step", "latency")}
    shown = []
    for row in rows:
        if "failed" in row:
            shown.append({"method": row["method"], "score": "diverged"})
            continue
        score, params = row["score"] or {}, row["params"]
        ends = score.get("range")
        shown.append(
            {
                "method": row["method"],
                row["metric"] or "score": {"value": score.get("value"), "ci": score.get("ci")},
                **({"over seeds": f"{ends[0]:.3f}–{ends[1]:.3f}"} if ends else {}),
                "minus full": row.get("against_full"),
                "trained": params["trained"],
                "no head": params["trained_without_head"],
                "kB": row["adapter_bytes"] / 1e3,
                "MMAC": row["macs_per_item"] / 1e6,
                "act. MB": row["activation_bytes"] / 1e6,
                "step/full": row["step"]["value"],
                "ms": _ms(row["latency"], full_ms["latency"]),
                "ms merged": _ms(row["latency_merged"], full_ms["latency"]),
            }
        )
    empty = {name for name in shown[0] if all(own.get(name) is None for own in shown)} if shown else set()
    return [{name: value for name, value in own.items() if name not in empty} for own in shown]


def parted(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same columns as two tables that fit on a page: scores, with their bars, and costs."""
    shown = table(rows)
    costs = [{name: own[name] for name in ("method", *COSTS) if name in own} for own in shown]
    return [{name: value for name, value in own.items() if name not in COSTS} for own in shown], costs


def _full_ms(rows: Sequence[Row], kind: str) -> float:
    """Full fine-tuning's own milliseconds: the median over all methods' turns."""
    return float(np.median([row[kind]["ms"] / row[kind]["value"] for row in rows if kind in row] or [np.nan]))


def _ms(found: Mapping[str, Any] | None, full: float) -> float | None:
    return None if found is None else found["value"] * full


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows of text."""
    shown = table(rows)
    names = list(dict.fromkeys(name for own in shown for name in own))
    return [names, *([_text(own.get(name)) for name in names] for own in shown)]


def _text(value: Any) -> str:
    if isinstance(value, Mapping) and "value" in value:
        interval = value.get("ci")
        return cell(value["value"]) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
    return cell(value)


def lines(rows: Sequence[Row]) -> list[str]:
    """The table for a terminal."""
    cells = _cells(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{text:<{w}}" if not i else f"{text:>{w}}" for i, (text, w) in enumerate(zip(own, widths, strict=True))
        )
        for own in cells
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The table for a document."""
    header, *cells = _cells(rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(
        f"| {' | '.join(text.replace('|', chr(92) + '|') for text in own)} |\n" for own in (header, rule, *cells)
    )


def progress(row: Row) -> str:
    """What is said as soon as a method is done."""
    if "failed" in row:
        return f"method    {row['method']}  diverged: {row['failed']}"
    return f"method    {row['method']}  {row['metric']} {_text(row['score'])}  {row['fit_seconds']:.0f} s a fit"


# ---- what is to be said


def _better(row: Row) -> float:
    """Score, higher is better."""
    return -row["score"]["value"] if row["metric"] in LOWER else row["score"]["value"]


def scored(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("score") and row["score"].get("value") is not None]


def sentences(rows: Sequence[Row]) -> list[str]:
    """Whether full fine-tuning or an adapter wins, by how much and at what price, and which steps are no quicker."""
    known = scored(rows)
    full = max(filter(is_full, known), key=_better, default=None)
    others = [row for row in known if not is_full(row)]
    told = [f"{row['method']} diverged: {row['failed']}" for row in rows if "failed" in row]
    if full is not None and others:
        told.insert(0, _duel(full, max(others, key=_better)))
    slow = [row for row in others if row["step"]["quartiles"][0] > 1]
    if slow:
        named = ", ".join(f"{row['method']} ({row['step']['value']:.2f})" for row in slow)
        told.append(f"A training step takes longer than one of full fine-tuning with {named}.")
    return told


def _duel(full: Row, best: Row) -> str:
    metric, ours, theirs = full["metric"], best["score"]["value"], full["score"]["value"]
    size = full["params"]["trained"] / best["params"]["trained"]
    gap = best.get("against_full")
    sure = ""
    if gap and gap["ci"]:
        low, high = gap["ci"]
        held = " and holds 0: the rows do not tell them apart" if low <= 0 <= high else ""
        sure = f" The paired interval of the difference is [{low:.3f}, {high:.3f}]{held}."
    name, step = best["method"], best["step"]["value"]
    price = (
        f"{name} trains {size:.3g} times fewer parameters, and its step takes {step:.2f} of full fine-tuning's time."
    )
    if _better(full) > _better(best):
        said = f"Full fine-tuning wins: {metric} {theirs:.3f} against {ours:.3f} of {name}, the best adapter."
    else:
        verb = "is ahead of" if _better(best) > _better(full) else "equals"
        said = f"{name}, the best adapter, {verb} full fine-tuning: {metric} {ours:.3f} against {theirs:.3f}."
    return f"{said}{sure} {price}"


# ---- the picture


def front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Which points no other beats in both, cheapest first; scores: higher is better."""
    order, kept = sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])), []
    for i in order:
        if not kept or scores[i] > scores[kept[-1]]:
            kept.append(i)
    return kept


def pareto(rows: Sequence[Row]) -> str | None:
    """Score over trained parameters and over the time of a step; the line joins what nothing beats in both."""
    rows = scored(rows)
    if not rows:
        return None
    panels = (
        ("trained parameters", [row["params"]["trained"] for row in rows], "log"),
        ("time of a step, full fine-tuning = 1", [row["step"]["value"] for row in rows], "linear"),
    )
    metric, values = rows[0]["metric"], [row["score"]["value"] for row in rows]
    with figures.canvas(10.4, 4.6) as figure:
        for axis, (name, costs, scale) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
            axis.set_xscale(scale)
            _points(axis, rows, costs)
            axis.set_xlabel(name)
            axis.margins(x=0.12)
            axis.grid(color="#e6eaee", lw=0.7)
        figure.axes[0].set_ylabel(metric.replace("_", " "))
        figure.axes[0].set_ylim(*_between(values)[:: -1 if metric in LOWER else 1])  # better is up
        figure.draw_without_rendering()  # names are placed once the layout is settled
        for axis, (_, costs, _) in zip(figure.axes, panels, strict=True):
            _names(figure, axis, [row["method"] for row in rows], costs, values)
        return figures.embed(figure)


def caption(rows: Sequence[Row]) -> str:
    """What the picture shows, and how sure its heights are."""
    widths = [np.ptp(row["score"]["ci"]) for row in scored(rows) if row["score"].get("ci")]
    sure = (
        f" Intervals of the scores are {np.median(widths):.3f} wide, the median of all: see the table."
        if widths
        else ""
    )
    return f"Orange: full fine-tuning. The line joins the methods that no other beats in both score and cost.{sure}"


def _between(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis on which values are told apart; intervals would go beyond it."""
    room = 0.3 * (max(values) - min(values)) or 0.02
    return min(values) - room, max(values) + room


def _points(axis, rows: Sequence[Row], costs: Sequence[float]) -> None:
    values = [row["score"]["value"] for row in rows]
    best = front(costs, [_better(row) for row in rows])
    axis.plot([costs[i] for i in best], [values[i] for i in best], color=figures.SOFT, lw=1.6, zorder=1)
    for i, row in enumerate(rows):
        color = figures.WARM if is_full(row) else figures.ACCENT
        axis.plot(costs[i], values[i], "o", color=color, ms=5.5 if i in best else 4, zorder=2)


def _names(figure, axis, names: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
    """Writes each name where it covers no point and no other name, as near to its point as it can be."""
    places = axis.transData.transform(np.column_stack([xs, ys]))
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    inside = axis.get_window_extent()
    unit = figure.dpi / 72
    for i in np.argsort(-places[:, 1]):
        width, height = 4.4 * len(names[i]) * unit, 9 * unit
        x, y = places[i]
        tries = [
            (dx, dy)
            for r in (0, 1, 2, 3, 4, 5)
            for dy in (r * height, -r * height)
            for dx in (7 * unit, -7 * unit - width)
        ]

        def box(offset, x=x, y=y, width=width, height=height):
            left, bottom = x + offset[0], y + offset[1] - height / 2
            return left, bottom, left + width, bottom + height

        free = (t for t in tries if _fits(box(t), [o for j, o in enumerate(taken) if j != i], inside))
        dx, dy = next(free, tries[0])
        taken.append(box((dx, dy)))
        far = abs(dy) > height
        axis.annotate(
            names[i].replace("$", r"\$"),
            (xs[i], ys[i]),
            (dx / unit, dy / unit),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": "#b8c2ca", "lw": 0.6} if far else None,
        )


def _fits(box, taken, inside) -> bool:
    left, bottom, right, top = box
    if left < inside.x0 or right > inside.x1 or bottom < inside.y0 or top > inside.y1:
        return False
    return all(right < a or c < left or top < b or d < bottom for a, b, c, d in taken)
