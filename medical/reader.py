"""An adapter that reads series: all their frames or slices, calibrated, each traced back to its file."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from adaptsuite import recipe as recipes
from adaptsuite.experiment import restore
from adaptsuite.images import fitted
from adaptsuite.medical import dicom, results
from adaptsuite.medical.area_rule import AREA, PIXEL
from adaptsuite.medical.data import Reading, own_window
from adaptsuite.medical.dicom_out import LONGEST_LABEL, Algorithm
from adaptsuite.medical.findings import EvidenceSettings, findings
from adaptsuite.medical.results import Point, Result
from adaptsuite.medical.seg_predict import labels_of
from adaptsuite.medical.seg_task import at_size
from adaptsuite.medical.studies import Series
from adaptsuite.medical.volumes import Volume
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.reading import read_json

AT_ONCE = 128  # frames in memory


class Reader(Protocol):
    """What `adaptsuite.medical.serve` needs of whoever reads series."""

    classes: tuple[str, ...]
    points: tuple[Point, ...]
    segments: bool  # masks, not labels
    algorithm: Algorithm
    temperature: float
    window: tuple[float, float] | None  # in which overlays are shown

    def read(self, series: Series) -> Result:
        """Raises DataError for a series that cannot be read."""


class AdapterReader:
    """A saved adapter, its backbone loaded anew. Raises AdapterError as `restore`."""

    def __init__(
        self,
        folder: str | Path,
        device: str | None = None,
        batch_size: int | None = None,
        allow_burned_in: bool = False,
    ):
        from adaptsuite.medical.pipeline import DOMAIN, reading

        self.handle, self.recipe, labels, record = restore(DOMAIN, folder)
        self.model, self.classes = self.handle.model, tuple(labels)
        self.task, self.segments = DOMAIN.task(self.recipe, labels), self.recipe.data.task == "segmentation"
        own = reading(self.recipe)
        self.reading = replace(own, frames=0, allow_burned_in=own.allow_burned_in or allow_burned_in)
        plan = recipes.build(Plan, self.recipe.plan, "plan")
        self.device, self.batch_size = device or plan.device, batch_size or plan.batch_size
        self.temperature, self.window = record.temperature or 1.0, self.reading.window
        self.points = _points(self.classes, self.recipe, record.threshold)
        self.algorithm = _algorithm(record, self.temperature, self.points)

    def read(self, series: Series) -> Result:
        return self._masked(series) if self.segments else self._labelled(series)

    # ---- labels

    def _labelled(self, series: Series) -> Result:
        places, found, notes = [], [], _remarks(series)
        pictures = _shown(series, self.reading, notes)
        while chunk := list(islice(pictures, AT_ONCE)):
            places += [place for place, _ in chunk]
            images = _Pictures([fitted(image, self.model.front_end) for _, image in chunk])
            found.append(predict_all(self.model, self.task, images, self.batch_size, self.device)[0])
        logits = np.concatenate(found) / self.temperature
        return results.of_logits(series, places, logits, self.classes, self.recipe.data.task, self.points, notes)

    # ---- masks

    def _masked(self, series: Series) -> Result:
        if not series.placed:
            found = [self._clip(series, i) for i in range(len(series.files))]
            masks, shares = [mask for mask, _ in found], [own for _, own in found]
            return results.of_masks(series, masks, np.concatenate(shares), self.classes, self.points, _remarks(series))
        volume = series.volume(self.reading.allow_burned_in)
        if not volume.files:  # NIfTI: in the plane that people look at, and back
            shown = volume.plane(self.reading.plane)
            grey = shown.windowed(self.reading.window or own_window(shown.values)).values
            labels, shares = self._maps(_picture(own) for own in grey)
            mask = shown.with_values(labels).on_grid(volume)
        else:  # each slice as its file shows it
            labels, shares = self._maps(_slices(volume, self.reading))
            mask = volume.with_values(labels)
        notes = [*_remarks(series), *volume.notes]
        return results.of_masks(series, [mask], shares, self.classes, self.points, notes)

    def _clip(self, series: Series, i: int) -> tuple[Volume, np.ndarray]:
        file = series.files[i]
        labels, shares = self._maps(map(_picture, dicom.frames(file, **_options(self.reading))))
        return results.clip_mask(file, labels), shares

    def _maps(self, pictures: Iterable[Any]) -> tuple[Tensor, np.ndarray]:
        """Labels (F, H, W) of pictures of one size, and each class's share of them by its point's pixel threshold."""
        pictures, labels, shares = iter(pictures), [], []
        while chunk := list(islice(pictures, AT_ONCE)):
            size = (chunk[0].height, chunk[0].width)
            images = _Pictures([fitted(image, self.model.front_end) for image in chunk])
            maps = predict_all(self.model, _Maps(self.task), images, self.batch_size, self.device)[0]
            for own in torch.from_numpy(maps):
                full = at_size(own, size, self.model.front_end).numpy()
                labels.append(torch.from_numpy(labels_of(full)))
                above = [np.count_nonzero(own > p.pixel) for own, p in zip(full, self.points, strict=True)]
                shares.append(np.array(above) / full[0].size)
        return torch.stack(labels), np.stack(shares)


class _Maps:
    """The task as `predict_all` calls it: outputs are probability maps at the input's size."""

    target = "present"

    def __init__(self, task: Any):
        self.task = task

    def predict(self, model: torch.nn.Module, batch: dict[str, Any]) -> Tensor:
        return self.task.probabilities(model, batch["image"])


class _Pictures:
    """A data set of pictures at the input's size."""

    def __init__(self, images: list[Tensor]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "item": index}


def _remarks(series: Series) -> list[str]:
    """What makes its files doubtful, each thing once."""
    return list(dict.fromkeys(remark for file in series.files for remark in file.remarks))


# ---- pictures


def _shown(series: Series, reading: Reading, notes: list[str]) -> Iterator[tuple[tuple[int, int] | None, Any]]:
    """(place, Pillow image) of every frame, as `adaptsuite.medical.data.pictures` shows them in training.

    place: file and frame; None where a slice is none of the files'.
    """
    if series.nifti is None and (len(series.files) == 1 or not series.placed):
        for i, file in enumerate(series.files):
            for k, frame in enumerate(dicom.frames(file, region=reading.region, **_options(reading))):
                yield (i, k), _picture(frame)
        return
    volume = series.volume(reading.allow_burned_in)
    notes += volume.notes
    places, shown = _places(volume, series, reading.plane), volume.plane(reading.plane)
    values = shown.windowed(reading.window or own_window(shown.values)).values
    for place, own in zip(places, values, strict=True):
        yield place, _picture(own)


def _places(volume: Volume, series: Series, plane: str) -> list[tuple[int, int] | None]:
    """Of each slice of a plane: its file and frame, where the plane is the one that the files have."""
    depth = volume.shape[0]
    numbers = replace(volume, values=torch.arange(float(depth)).view(-1, 1, 1).expand(depth, 2, 2)).plane(plane).values
    if not volume.files or len(numbers) != depth or not (numbers == numbers[:, :1, :1]).all():
        return [None] * volume.plane(plane).shape[0]
    index = {id(f): i for i, f in enumerate(series.files)}
    files = volume.files * depth if len(volume.files) == 1 else volume.files
    return [(index[id(files[i])], volume.frames[i]) for i in numbers[:, 0, 0].int().tolist()]


def _slices(volume: Volume, reading: Reading) -> Iterator[Any]:
    files = volume.files * len(volume.frames) if len(volume.files) == 1 else volume.files
    for file, frame in zip(files, volume.frames, strict=True):
        yield from map(_picture, dicom.frames(file, [frame], **_options(reading)))


def _options(reading: Reading) -> dict[str, Any]:
    return {"window": reading.window, "allow_burned_in": reading.allow_burned_in}


def _picture(values: np.ndarray | Tensor) -> Any:
    """A Pillow image in RGB of (H, W, 1 or 3) uint8, or of (H, W) in [0, 1]."""
    from PIL import Image

    if isinstance(values, Tensor):
        return Image.fromarray((values * 255).round().byte().numpy()).convert("RGB")
    return Image.fromarray(values if values.shape[2] == 3 else values[..., 0]).convert("RGB")


# ---- what the adapter keeps


def _points(classes: tuple[str, ...], recipe: Any, kept: dict[str, Any] | None) -> tuple[Point, ...]:
    if recipe.data.task != "segmentation":
        columns = findings(classes, recipe.data.task, EvidenceSettings(**recipe.evidence))
        return results.points_of(columns, kept)
    rule = {"value": AREA, "pixel": PIXEL, "rule": "the area rule of FetalCLIP-IQA is taken"}
    return results.points_of({name: [k] for k, name in enumerate(classes)}, {n: rule for n in classes} | (kept or {}))


def _algorithm(record: Any, temperature: float, points: tuple[Point, ...]) -> Algorithm:
    """Its hash is that of adapter.json, which covers weights, labels, threshold and temperature."""
    sha256 = read_json(record.folder / "adapter.json")["sha256"]
    settings = {"temperature": f"{temperature:.6g}"}
    settings |= {f"threshold {i}": f"{p.threshold:.6g}" for i, p in enumerate(points, 1)}
    name = f"adaptsuite medical {record.method.name}"[:LONGEST_LABEL]
    return Algorithm(name, sha256[:12], sha256, record.base["fingerprint"], settings)
