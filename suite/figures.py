"""The report's charts, as SVG in data addresses: sharp at every size, nothing is loaded from elsewhere."""

import base64
import io
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

INK, ACCENT, SOFT, WARM = "#26323d", "#2b6a99", "#c9d8e4", "#c4622d"
STYLE = {
    "svg.fonttype": "none",  # text stays text: the browser has the glyphs of every script
    "svg.hashsalt": "adaptsuite",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a96a1",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
}
NAMED, COUNTED = 60, 16  # classes up to which a confusion matrix names them, and writes its counts


def learning_curves(curves: Sequence[Mapping[str, Any]], monitor: str) -> str | None:
    """Training loss and validation monitor over epochs; curves: {"name", "history" (of FitResult), "best_epoch"}."""
    curves = [c for c in curves if c["history"]]
    if not curves:
        return None
    validated = any(row["val"] for c in curves for row in c["history"])
    with canvas(7.2 if validated else 3.6, 2.6) as figure:
        axes = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
        axes[0].set_title("training loss")
        for number, curve in enumerate(curves):
            label = _plain(curve["name"]) if 1 < len(curves) <= 8 else None
            color = ACCENT if len(curves) == 1 else _color(number, len(curves))
            epochs = [row["epoch"] for row in curve["history"]]
            axes[0].plot(epochs, [_number(row["loss"]) for row in curve["history"]], color=color, lw=1.3, label=label)
            if not validated:
                continue
            values = [_number(row["val"].get(monitor)) for row in curve["history"]]
            axes[1].plot(epochs, values, color=color, lw=1.3, label=label)
            if 0 < curve["best_epoch"] <= len(values):
                best = curve["best_epoch"]
                axes[1].plot(best, values[best - 1], "o", color=color, ms=4)
        if validated:
            axes[1].set_title(f"validation {_plain(monitor).replace('_', ' ')}  (dot: the epoch that was kept)")
        for axis in axes:
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(color="#e6eaee", lw=0.7)
        if 1 < len(curves) <= 8:
            axes[-1].legend(loc="best", ncols=1 + (len(curves) > 4))
        return _address(figure)


def confusion(matrix: np.ndarray, labels: Sequence[str]) -> str:
    """Rows true, columns predicted; shade: share of the row."""
    num = len(labels)
    side = min(8.6, 1.9 + (0.52 if num <= COUNTED else 0.13) * num)
    small = 8.5 if num <= COUNTED else max(3.6, 300 / num)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    with canvas(side, side) as figure:
        axis = figure.subplots()
        axis.imshow(share**0.5, cmap=_shades(), vmin=0, vmax=1, interpolation="none")  # root: rare ones show too
        axis.spines[:].set_visible(True)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        if num <= NAMED:
            names = [_shortened(label, 22) for label in labels]
            axis.set_xticks(range(num), names, rotation=90 if num > 6 or max(map(len, names)) > 6 else 0)
            axis.set_yticks(range(num), names)
            axis.tick_params(labelsize=small if num > COUNTED else 8.5, length=0, pad=2)
        else:
            axis.set_xticks([])
            axis.set_yticks([])
        if num <= COUNTED:
            for (row, column), count in np.ndenumerate(matrix):
                if count:
                    ink = "white" if share[row, column] > 0.36 else INK
                    axis.text(column, row, f"{count}", ha="center", va="center", color=ink, fontsize=small)
        return _address(figure)


def reliability(bins: Sequence[Mapping[str, float]]) -> str:
    """Share of truth over stated probability, and the size of the bins (those of `adaptsuite.metrics.reliability`)."""
    with canvas(3.9, 4.1) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        middle = [(b["low"] + b["high"]) / 2 for b in bins]
        width = [(b["high"] - b["low"]) * 0.92 for b in bins]
        top.plot([0, 1], [0, 1], color="#8a96a1", lw=1, ls="--", label="if honest")
        top.bar(middle, [b["accuracy"] for b in bins], width, color=SOFT)
        top.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], "o-", color=ACCENT, lw=1.3, ms=3.5)
        top.set(ylim=(0, 1.02), xlim=(0, 1), ylabel="share that is true")
        top.legend(loc="upper left")
        bottom.bar(middle, [b["count"] for b in bins], width, color=SOFT)
        bottom.set(xlabel="stated probability", ylabel="predictions")
        bottom.yaxis.get_major_locator().set_params(integer=True, nbins=3)
        return _address(figure)


def embed(figure: Any) -> str:
    """A data address of a matplotlib figure, or of the bytes of a PNG, JPEG or SVG; an address is given back."""
    if isinstance(figure, str):
        if not figure.startswith("data:image/"):
            raise ValueError("a figure is a matplotlib figure, image bytes or a data:image/ address")
        return figure
    if hasattr(figure, "savefig"):
        return _address(figure)
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"<?xml": "svg+xml", b"<svg": "svg+xml"}
    kind = next((kind for start, kind in kinds.items() if bytes(figure[:8]).startswith(start)), None)
    if kind is None:
        raise ValueError("image bytes are PNG, JPEG or SVG")
    return f"data:image/{kind};base64,{base64.b64encode(figure).decode()}"


@contextmanager
def canvas(width: float, height: float):
    """A matplotlib figure of that many inches, in the report's style; drawn on inside the `with`."""
    import logging

    import matplotlib
    from matplotlib.figure import Figure

    fonts = logging.getLogger("matplotlib.font_manager")
    level, silent = fonts.level, logging.ERROR  # a label of another script: the browser will draw it
    fonts.setLevel(silent)
    with matplotlib.rc_context(STYLE):
        yield Figure((width, height), layout="constrained")
    fonts.setLevel(level)


def _address(figure) -> str:
    import warnings

    import matplotlib

    target = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(target, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(target.getvalue()).decode()}"


def _plain(text: Any) -> str:
    """Text that matplotlib does not read as a formula."""
    return str(text).replace("$", r"\$")


def _shortened(text: str, length: int) -> str:
    return _plain(text if len(text) <= length else text[: length - 1] + "…")


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _color(number: int, total: int):
    import matplotlib

    return matplotlib.colormaps["viridis"](0.1 + 0.75 * number / max(1, total - 1))


def _shades():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", ["#ffffff", "#dbe7f0", "#7fa9c8", ACCENT, "#143b59"])
