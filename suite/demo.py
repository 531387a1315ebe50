"""What every domain's demo shows of itself, and the page that links their reports."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite import __version__
from adaptsuite.atomic import write_file
from adaptsuite.figures import embed

INDEX, EXAMPLES = "index.html", "examples.png"
SIDE = 144  # px of one example on the page


def exhibit(
    folder: Path,
    task: str,
    metric: str,
    value: Mapping[str, Any],
    beside: str,
    examples: Sequence[np.ndarray],
    own: str,
) -> dict[str, Any]:
    """A domain's part of the page, to be joined to its demo's result; writes FOLDER/examples.png.

    value: {"value", "ci"} of the adapter that the report is of.  beside: what is had without it.
    examples: (H, W, 3) uint8 of any size.  own: the command with which one goes on with files of one's own.
    """
    picture = write_file(folder / EXAMPLES, contact_sheet(examples))
    headline = {"task": task, "metric": metric, "beside": beside, **value}
    return {"headline": headline, "examples": str(picture), "own": own}


def contact_sheet(examples: Sequence[np.ndarray]) -> bytes:
    """A PNG of pictures side by side, each SIDE x SIDE; small ones keep their pixels."""
    from PIL import Image

    sheet = Image.new("RGB", (len(examples) * (SIDE + 6) - 6, SIDE), "white")
    for i, picture in enumerate(examples):
        scaling = Image.Resampling.NEAREST if max(picture.shape[:2]) < SIDE // 2 else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(picture).resize((SIDE, SIDE), scaling), (i * (SIDE + 6), 0))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def write_index(out: str | Path, found: Mapping[str, Mapping[str, Any]], seconds: float) -> Path:
    """OUT/index.html of {domain: result of its demo}: for each its headline with the interval, examples, and a link."""
    from adaptsuite.report import page

    out = Path(out)
    parts = [
        {
            "name": name,
            **result["headline"],
            "examples": embed(Path(result["examples"]).read_bytes()),
            "report": Path(os.path.relpath(result["report"], out)).as_posix(),
            "own": result["own"],
        }
        for name, result in found.items()
    ]
    return write_file(out / INDEX, page("demo.html.j2", parts=parts, seconds=seconds, version=__version__))
