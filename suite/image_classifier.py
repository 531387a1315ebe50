"""A saved adapter as one object that labels pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite import recipe as recipes
from adaptsuite.devices import pick_device
from adaptsuite.domain import Domain
from adaptsuite.errors import DataError
from adaptsuite.experiment import restore
from adaptsuite.images import fitted, read
from adaptsuite.metrics import to_probabilities
from adaptsuite.plan import Plan


class ImageClassifier:
    """Labels of pictures of any size, by an adapter of `domain`.

    A picture is a path, a Pillow image, an array or a tensor: (H, W, 3), (3, H, W) or (H, W), uint8 or float in [0, 1].
    It is resized, cropped and normalised as in training. What cannot be used is a DataError.
    """

    domain: Domain

    def __init__(self, folder: str | Path, device: str = "auto", batch_size: int | None = None):
        folder = Path(folder)
        inner = folder / "adapter"
        self.handle, self.recipe, labels, self.record = restore(
            self.domain, inner if (inner / "adapter.json").is_file() else folder
        )
        plan = recipes.build(Plan, self.recipe.plan, "plan")
        self.labels, self.task = tuple(labels), self.domain.task(self.recipe, labels)
        self.device, self.batch_size = pick_device(device), batch_size or plan.batch_size
        self.model = self.handle.model.to(self.device).eval()

    def predict(self, pictures: Any) -> Any:
        """{label: probability} of a picture, a list of them of a list; they sum to 1 unless the task is multilabel.

        They are calibrated where the adapter keeps a temperature.
        """
        several = _several(pictures)
        scores = self._run(pictures if several else [pictures], self.task.predict)
        found = to_probabilities(self.domain.calibrated(scores, self.record.kept), self.recipe.data.task)
        named = [{label: float(p) for label, p in zip(self.labels, row, strict=True)} for row in found]
        return named if several else named[0]

    def embed(self, pictures: Any) -> np.ndarray:
        """(D,) float32 that the head reads of one picture, (N, D) of a list."""
        several = _several(pictures)
        features = self._run(pictures if several else [pictures], self.task.embed)
        return features if several else features[0]

    def frames(self, picture: Any) -> Iterable[Any]:
        """Pillow images whose scores are averaged: of a picture itself."""
        return [image_of(picture)]

    def _run(self, pictures: Iterable[Any], says) -> np.ndarray:
        """(N, K): `says` of each picture, the mean over its frames."""
        found: list[np.ndarray] = []
        ready: list[Tensor] = []
        rows: list[int] = []
        with torch.no_grad():
            for row, picture in enumerate(pictures):
                for image in self.frames(picture):
                    ready.append(fitted(image, self.model.front_end))
                    rows.append(row)
                    if len(ready) == self.batch_size:
                        found.append(self._batch(ready, says))
                        ready = []
            if ready:
                found.append(self._batch(ready, says))
        if not rows:
            raise DataError("no picture was given")
        outputs = np.concatenate(found)
        total = np.zeros((rows[-1] + 1, *outputs.shape[1:]), outputs.dtype)
        np.add.at(total, rows, outputs)
        return total / np.bincount(rows).astype(outputs.dtype)[:, None]

    def _batch(self, ready: Sequence[Tensor], says) -> np.ndarray:
        return says(self.model, {"image": torch.stack(list(ready)).to(self.device)}).float().cpu().numpy()


def _several(pictures: Any) -> bool:
    """A list, a tuple, or a batch of four dimensions."""
    if isinstance(pictures, np.ndarray | Tensor):
        return pictures.ndim == 4
    return isinstance(pictures, Sequence) and not isinstance(pictures, str)


def image_of(picture: Any):
    """A Pillow image in RGB. Raises DataError for what is no picture."""
    from PIL import Image

    if isinstance(picture, str | Path):
        return read(Path(picture))
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    values = picture.detach().cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or not values.size or (values.ndim == 3 and values.shape[2] not in (1, 3)):
        raise DataError(f"a picture of shape {values.shape}: (H, W, 3), (3, H, W) or (H, W) is expected")
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise DataError("a float picture with values outside [0, 1], NaN or infinite: scale it first")
        values = (values * 255).round()
    elif values.dtype != np.uint8:
        raise DataError(f"a picture of {values.dtype}: uint8, or float in [0, 1], is expected")
    return Image.fromarray(values.squeeze().astype(np.uint8)).convert("RGB")
