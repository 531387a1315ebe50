"""A saved adapter as one object that labels pictures."""

from pathlib import Path

from adaptsuite.image_classifier import ImageClassifier
from adaptsuite.vision.pipeline import DOMAIN


def load(folder: str | Path, device: str = "auto", batch_size: int | None = None) -> "Classifier":
    """The classifier of an adapter's folder or of its run's. Raises AdapterError for one that does not fit its base."""
    return Classifier(folder, device, batch_size)


class Classifier(ImageClassifier):
    """`adaptsuite.vision.load(folder)`."""

    domain = DOMAIN
