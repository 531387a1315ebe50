"""A saved adapter as one object that labels pictures and studies."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from adaptsuite.image_classifier import ImageClassifier
from adaptsuite.medical.data import pictures
from adaptsuite.medical.pipeline import DOMAIN


def load(folder: str | Path, device: str = "auto", batch_size: int | None = None) -> "Classifier":
    """The classifier of an adapter's folder or of its run's. Raises AdapterError for one that does not fit its base."""
    return Classifier(folder, device, batch_size)


class Classifier(ImageClassifier):
    """`adaptsuite.medical.load(folder)`."""

    domain = DOMAIN

    def frames(self, picture: Any) -> Iterable[Any]:
        """Of a path to DICOM, a series' folder or NIfTI the frames that training would read of it."""
        if isinstance(picture, str | Path):
            return pictures(Path(picture), self.model.reading)
        return super().frames(picture)
