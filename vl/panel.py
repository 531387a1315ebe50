"""Pictures side by side, for reports."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from adaptsuite import figures
from adaptsuite.images import read


def panel(pictures: Sequence[tuple[Path, str]], width: int = 44, most: int = 3) -> str:
    """A figure of pictures, above each its text; a line of it is wrapped, into at most `most`."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    with figures.canvas(2.4 * columns, 2.9 * rows) as figure:
        for axis, (path, text) in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, strict=False):
            image = read(path)
            image.thumbnail((256, 256))
            axis.imshow(image)
            lines = [line for part in text.split("\n") for line in textwrap.wrap(part, width)[:most]]
            axis.set_title("\n".join(lines).replace("$", r"\$"), fontsize=6)
        for axis in figure.axes:
            axis.set_axis_off()
        return figures.embed(figure)
