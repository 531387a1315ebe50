"""Pictures of what a model looks at: heat over photographs at its right place, CKA matrices, confused classes."""

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from adaptsuite.figures import ACCENT, INK, WARM, canvas, embed
from adaptsuite.vision.grid import Place

SIDE = 256  # pixels of a photograph's longer side in a page
QUALITY = 86  # of its JPEG
EDGE = "#8a96a1"


@dataclass
class Heat:
    """Values of tokens (h, w), zero or more, the place where they lie, and what they are."""

    title: str  # of one or two lines
    values: np.ndarray
    place: Place
    full: float | None = None  # value of the brightest colour; None: the largest


@dataclass
class Look:
    """One picture (H, W, 3) in [0, 1], what was said of it, and what was looked at."""

    name: str
    image: np.ndarray
    said: str  # the line above it
    right: bool | None = None  # None: not known
    heats: list[Heat] = field(default_factory=list)


def overlay(image: np.ndarray, heat: Heat) -> np.ndarray:
    """(H, W, 3): the picture in grey under the heat's colours, from 0 on; pale where no token lies."""
    import matplotlib

    values = heat.place.spread(heat.values, image.shape[:2])
    values /= max(float(heat.values.max()) if heat.full is None else heat.full, 1e-30)
    shown, grey = np.nan_to_num(values)[..., None], (image @ (0.299, 0.587, 0.114))[..., None]
    colours = matplotlib.colormaps["magma"](0.12 + 0.86 * shown[..., 0])[..., :3]
    weight = 0.72 * shown**0.8
    lit = (1 - weight) * (0.25 + 0.55 * grey) + weight * colours
    return np.where(np.isnan(values)[..., None], 0.5 + 0.5 * grey, lit).clip(0, 1)


def look_figure(looks: Sequence[Look]):
    """A figure: a row for each picture, beside it the picture under each heat."""
    columns = 1 + max(len(look.heats) for look in looks)
    tall = max(look.image.shape[0] / look.image.shape[1] for look in looks)
    side = min(2.0, 8.0 / columns)
    with canvas(side * columns, (side * tall + 0.68) * len(looks)) as figure:
        for row, look in zip(_parts(figure, len(looks), 1), looks, strict=True):
            panels = row.subplots(1, columns, squeeze=False)[0]
            color = {True: ACCENT, False: WARM, None: INK}[look.right]
            row.suptitle(_plain(look.said), x=0.006, ha="left", fontsize=9.5, color=color)
            for axis in panels:
                axis.axis("off")
            panels[0].imshow(display(look.image), interpolation="none")
            panels[0].set_title(_lines(f"picture\n{look.name}", side), fontsize=8, pad=3)
            for axis, heat in zip(panels[1:], look.heats, strict=False):
                axis.imshow(display(overlay(look.image, heat)), interpolation="none")
                axis.set_title(_lines(heat.title, side), fontsize=8, pad=3)
        return figure


def cka_figure(matrices: Mapping[str, np.ndarray], joins: Sequence[int] = ()):
    """A figure: matrices of CKA between blocks side by side, one colour scale from 0 to 1.

    joins: blocks behind which tokens are joined, marked in the last matrix. Grey: blocks whose attention does not vary.
    """
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("cka", ["#ffffff", "#dbe7f0", "#7fa9c8", ACCENT, "#143b59"])
    colours = colours.with_extremes(bad="#e3e3e3")
    with canvas(0.9 + 3.25 * len(matrices), 3.6) as figure:
        panels = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axis, (name, matrix) in zip(panels, matrices.items(), strict=True):
            num = len(matrix)
            shown = axis.imshow(np.clip(matrix, 0, 1), cmap=colours, vmin=0, vmax=1, interpolation="none")
            axis.set_title(_plain(name))
            ticks = range(0, num, 1 if num <= 12 else 2 if num <= 24 else 4)
            axis.set(xticks=ticks, yticks=ticks, xlabel="block")
            axis.tick_params(length=0, labelsize=8)
            axis.spines[:].set(visible=True, color=EDGE, linewidth=0.6)
        for place in joins:
            panels[-1].axhline(place + 0.5, color=WARM, lw=1.1)
            panels[-1].axvline(place + 0.5, color=WARM, lw=1.1)
        panels[0].set_ylabel("block")
        bar = figure.colorbar(shown, ax=panels.tolist(), shrink=0.85, aspect=28, label="CKA")
        bar.outline.set(color=EDGE, linewidth=0.6)
        return figure


@dataclass
class Confusion:
    """Pictures of a true class, of the one it was taken for, and of the mistakes: lists of (image, line below it)."""

    title: str
    groups: dict[str, list[tuple[np.ndarray, str]]]


def confusion_figure(pairs: Sequence[Confusion]):
    """A figure: a row for each pair of classes, in it the groups side by side, the last one in another colour."""
    columns = max(sum(map(len, pair.groups.values())) for pair in pairs)
    height, width, _ = next(image for group in pairs[0].groups.values() for image, _ in group).shape
    side = min(1.45, 8.4 / columns)
    with canvas(side * columns + 0.4, (side * height / width + 0.78) * len(pairs)) as figure:
        for row, pair in zip(_parts(figure, len(pairs), 1), pairs, strict=True):
            row.suptitle(_plain(pair.title), x=0.006, ha="left", fontsize=9.5)
            groups = {name: own for name, own in pair.groups.items() if own}
            widths = [len(own) for own in groups.values()]
            spare = columns - sum(widths)
            parts = _parts(row, 1, len(groups) + bool(spare), width_ratios=[*widths, *([spare] if spare else [])])
            for number, (part, name) in enumerate(zip(parts, groups, strict=False)):
                color = WARM if number == len(groups) - 1 else EDGE
                panels = part.subplots(1, len(groups[name]), squeeze=False)[0]
                for axis, (image, line) in zip(panels, groups[name], strict=True):
                    axis.imshow(display(image), interpolation="none")
                    axis.set(xticks=[], yticks=[])
                    axis.spines[:].set(visible=True, color=color)
                    axis.set_xlabel(_plain(line), fontsize=7.5)
                panels[0].set_title(_shortened(name, round(16 * side * len(panels))), fontsize=8.5)
        return figure


def display(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) in [0, 1] with its longer side SIDE."""
    from PIL import Image

    picture = Image.fromarray((image * 255).round().astype(np.uint8))
    scale = SIDE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))


def page_figure(figure) -> bytes:
    """SVG with its photographs as JPEG: text stays sharp, and a page of them stays small."""
    svg = base64.b64decode(embed(figure).partition(",")[2]).decode()
    svg = re.sub(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)", lambda found: _jpeg(found[1]), svg)
    return svg.replace("image-rendering:crisp-edges;image-rendering:pixelated", "").encode()


def _jpeg(png: str) -> str:
    from PIL import Image

    target = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").save(target, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(target.getvalue()).decode()}"


def png(figure) -> bytes:
    """The figure as a PNG of its own."""
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font has not
        figure.savefig(target, format="png", dpi=160, bbox_inches="tight", pad_inches=0.06)
    return target.getvalue()


def _parts(figure, rows: int, columns: int, **options) -> np.ndarray:
    return np.atleast_1d(figure.subfigures(rows, columns, **options))


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return str(text).replace("$", r"\$")


def _lines(text: str, inches: float) -> str:
    """Each line as long as fits above a picture of that width."""
    return "\n".join(_shortened(line, round(14 * inches)) for line in text.splitlines())


def _shortened(text: str, length: int) -> str:
    return _plain(text if len(text) <= length else text[: length - 1] + "…")
