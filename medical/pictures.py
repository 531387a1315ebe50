"""Pictures of the report: what a model was sure of, right and wrong. No name of a file or a patient stands beside."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from adaptsuite import figures
from adaptsuite.medical.data import Frames
from adaptsuite.metrics import to_probabilities

EACH = 6  # pictures of a row


def examples(dataset: Frames, outputs: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One section: the surest right answers above the surest wrong ones. outputs: (rows, K) scores."""
    targets = dataset.targets.numpy()
    if targets.ndim != 1:
        return []
    p = to_probabilities(outputs, "multiclass")
    said, sure = p.argmax(1), p.max(1)
    order = np.argsort(-sure, kind="stable")
    rows = [
        ("right", order[said[order] == targets[order]][:EACH]),
        ("wrong", order[said[order] != targets[order]][:EACH]),
    ]
    rows = [(name, own) for name, own in rows if len(own)]
    middle = {
        row: items[len(items) // 2]
        for row in {int(r) for _, own in rows for r in own}
        if len(items := np.flatnonzero(dataset.rows == row))
    }
    with figures.canvas(1.5 * EACH, 1.95 * len(rows)) as figure:
        axes = figure.subplots(len(rows), EACH, squeeze=False)
        for line, (name, own) in zip(axes, rows, strict=True):
            for axis in line:
                axis.set_axis_off()
            for axis, row in zip(line, own, strict=False):
                axis.imshow(dataset[middle[int(row)]]["image"].permute(1, 2, 0).numpy())
                axis.set_title(f"{name}: {classes[said[row]]} {sure[row]:.2f}\nis {classes[targets[row]]}", fontsize=7)
        picture = figures.embed(figure)
    caption = "The middle frame of each row; above what it was surest of and right, below surest and wrong."
    return [{"title": "Examples", "figure": picture, "caption": caption}]
