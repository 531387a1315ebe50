"""Masks of pictures by a saved adapter: as an object in Python, and as files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptsuite import recipe as recipes
from adaptsuite.applied import label_files
from adaptsuite.atomic import write_file
from adaptsuite.devices import pick_device
from adaptsuite.errors import DataError, UsageError
from adaptsuite.experiment import restore
from adaptsuite.image_classifier import image_of
from adaptsuite.images import fitted
from adaptsuite.medical import data as files
from adaptsuite.medical.area_rule import AREA, PIXEL
from adaptsuite.medical.seg_data import require_one
from adaptsuite.medical.seg_task import at_size
from adaptsuite.plan import Plan


@dataclass(frozen=True, eq=False)
class Segmented:
    """What an adapter says of one picture, at the picture's own resolution."""

    classes: tuple[str, ...]
    probabilities: np.ndarray  # (K, H, W) float32
    shares: dict[str, float]  # class -> share of the pixels above its rule's pixel threshold
    present: dict[str, bool]  # class -> whether that is at least its rule's area

    @property
    def mask(self) -> np.ndarray:
        return labels_of(self.probabilities)


def labels_of(probabilities: np.ndarray) -> np.ndarray:
    """(H, W) uint8 of (K, H, W): 0, or k where class k is above PIXEL; of several the most probable."""
    return np.where((probabilities > PIXEL).any(0), probabilities.argmax(0) + 1, 0).astype(np.uint8)


class Segmenter:
    """Masks of pictures of any size by the adapter of a folder, or of its run's.

    A picture is a path, a Pillow image, an array or a tensor, as `adaptsuite.image_classifier.ImageClassifier` takes
    it. What cannot be used is a DataError; an adapter of labels is a UsageError.
    """

    def __init__(self, folder: str | Path, device: str = "auto", batch_size: int | None = None):
        from adaptsuite.medical.pipeline import DOMAIN

        folder = Path(folder)
        inner = folder / "adapter"
        self.handle, self.recipe, labels, record = restore(DOMAIN, inner if inner.is_dir() else folder)
        if self.recipe.data.task != "segmentation":
            raise UsageError(f"{folder}: an adapter of labels gives no masks; take adaptsuite.medical.load")
        plan = recipes.build(Plan, self.recipe.plan, "plan")
        self.classes, self.task = tuple(labels), DOMAIN.task(self.recipe, labels)
        self.rules = record.threshold or {name: {"pixel": PIXEL, "value": AREA} for name in labels}
        self.device, self.batch_size = pick_device(device), batch_size or plan.batch_size
        self.model = self.handle.model.to(self.device).eval()

    def predict(self, pictures: Any) -> Segmented | list[Segmented]:
        """Of a picture, or of each of a list of them."""
        several = isinstance(pictures, Sequence) and not isinstance(pictures, str)
        read, found = [self._read(p) for p in (pictures if several else [pictures])], []
        if not read:
            raise DataError("no picture was given")
        front = self.model.front_end
        with torch.no_grad():
            for at in range(0, len(read), self.batch_size):
                own = read[at : at + self.batch_size]
                batch = torch.stack([fitted(image, front) for image in own]).to(self.device)
                maps = self.task.probabilities(self.model, batch)
                found += [at_size(m, (i.height, i.width), front).cpu().numpy() for m, i in zip(maps, own, strict=True)]
        said = [self._said(maps) for maps in found]
        return said if several else said[0]

    def _read(self, picture: Any):
        if not isinstance(picture, str | Path):
            return image_of(picture)
        path = Path(picture)
        require_one(files.inspect(path), path)
        return next(iter(files.pictures(path, self.model.reading)))

    def _said(self, maps: np.ndarray) -> Segmented:
        shares = {
            name: np.count_nonzero(own > self.rules[name]["pixel"]) / own.size
            for name, own in zip(self.classes, maps, strict=True)
        }
        present = {name: share >= self.rules[name]["value"] for name, share in shares.items()}
        return Segmented(self.classes, maps, shares, present)


def write_masks(
    domain,
    folder: str | Path,
    paths: Sequence[str],
    device: str | None = None,
    batch_size: int | None = None,
    skip_bad: bool = False,
    *,
    out: str | Path,
) -> dict[str, Any]:
    """`label_files`, and a PNG of labels for each picture: OUT/00001.png ... in the order of the predictions, which
    name theirs as `mask`; names of files may be those of patients."""
    masks: dict[int, np.ndarray] = {}
    with domain.masks.seen(lambda item, maps: masks.__setitem__(item, labels_of(maps))):
        found = label_files(domain, folder, paths, device, batch_size, skip_bad)
    if not masks:
        raise UsageError(f"{folder}: an adapter of labels gives no masks")
    for item, row in enumerate(found["predictions"]):
        row["mask"] = str(write_file(Path(out) / f"{item + 1:05d}.png", _png(masks[item])))
    return found


def _png(labels: np.ndarray) -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()
