"""A saved adapter as one object that labels pictures and studies."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adaptsuite.artifact import read_adapter
from adaptsuite.image_classifier import ImageClassifier
from adaptsuite.medical.data import pictures
from adaptsuite.medical.pipeline import DOMAIN, SEGMENTATION
from adaptsuite.medical.seg_predict import Segmenter


def load(folder: str | Path, device: str = "auto", batch_size: int | None = None) -> "Classifier | Segmenter":
    """The classifier of an adapter's folder or of its run's, or its Segmenter, by what the adapter was trained for.

    Raises AdapterError for an adapter that does not fit its base.
    """
    inner = Path(folder) / "adapter"
    recipe = read_adapter(inner if inner.is_dir() else folder).extra.get("recipe") or {}
    segments = recipe.get("data", {}).get("task") == SEGMENTATION
    return (Segmenter if segments else Classifier)(folder, device, batch_size)


class Classifier(ImageClassifier):
    """`adaptsuite.medical.load(folder)`."""

    domain = DOMAIN

    def frames(self, picture: Any) -> Iterable[Any]:
        """Of a path to DICOM, a series' folder or NIfTI the frames that training would read of it."""
        if isinstance(picture, str | Path):
            return pictures(Path(picture), self.model.reading)
        return super().frames(picture)
