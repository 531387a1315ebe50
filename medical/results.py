"""What an adapter says of one series, and what is decided from it: of each frame and of the series as a whole.

Classification: the probability of a finding sums those of its classes; that of the series is of the mean logits of its
frames. Segmentation: a frame is told by the share of its pixels above the adapter's pixel threshold
(adaptsuite.medical.area_rule), the series by its largest; masks, areas and volumes are of what is above .5.
A finding is present from the adapter's threshold on, where validation rows gave it none from .5 on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from adaptsuite import metrics
from adaptsuite.medical.dicom import DicomFile
from adaptsuite.medical.studies import Series
from adaptsuite.medical.volumes import Volume

MM3_PER_ML = 1000.0
DIGITS = 6  # after the point, of numbers in JSON


@dataclass(frozen=True)
class Point:
    """A finding, and from where on it is called present."""

    name: str
    columns: tuple[int, ...]  # classes whose probabilities it sums; of a segmentation the one class
    threshold: float
    source: str  # what chose the threshold
    pixel: float = 0.5  # of a segmentation: pixels above it count


@dataclass(frozen=True, eq=False)
class Result:
    """Of N frames, K classes and P points."""

    series: Series
    classes: tuple[str, ...]
    points: tuple[Point, ...]
    places: tuple[tuple[int, int] | None, ...]  # of each frame, the file and the frame in it; None: none of its own
    scores: np.ndarray  # (N, P) of the findings: probabilities, or shares of the frame's pixels
    whole: np.ndarray  # (P,)
    probabilities: np.ndarray | None = None  # (N + 1, K) of the classes, the series last; None: a segmentation
    masks: tuple[Volume, ...] = ()  # of the volume, or of each file: 0, or k for class k - 1, on the source's grid
    notes: tuple[str, ...] = field(default=())

    @property
    def segments(self) -> bool:
        return self.probabilities is None

    @property
    def numbers(self) -> list[float]:
        """What the audit log keeps: probabilities of the classes, or shares; of the series."""
        return [round(float(v), DIGITS) for v in (self.whole if self.segments else self.probabilities[-1])]

    def present(self, point: int, frame: int | None = None) -> bool:
        """Whether a finding is, on one frame or in the series."""
        score = self.whole[point] if frame is None else self.scores[frame, point]
        return bool(score >= self.points[point].threshold)

    def measures(self, frame: int | None = None) -> dict[str, dict[str, float]]:
        """class -> {"area_mm2"} of a frame, or {"volume_ml"} of a volume, where the source tells its spacing."""
        found = {}
        for k, name in enumerate(self.classes if self.segments else (), 1):
            values = {}
            if frame is not None:
                mask, i = self._mask_of(frame)
                if _spaced(mask):
                    values["area_mm2"] = float((mask.values[i] == k).sum()) * pixel_mm2(mask)
            elif self.series.placed:
                voxels = sum(float((mask.values == k).sum()) * voxel_mm3(mask) for mask in self.masks)
                values["volume_ml"] = voxels / MM3_PER_ML
            found[name] = {key: round(value, DIGITS) for key, value in values.items()}
        return found

    def _mask_of(self, frame: int) -> tuple[Volume, int]:
        for mask in self.masks:
            if frame < len(mask.values):
                return mask, frame
            frame -= len(mask.values)
        raise IndexError(frame)

    def mask_of(self, frame: int) -> np.ndarray:
        """(H, W) labels of one frame."""
        mask, i = self._mask_of(frame)
        return mask.values[i].numpy().astype(np.int64)

    def as_dict(self) -> dict[str, Any]:
        """As findings.json holds it: numbers, hashes, and names of files without text of their headers."""
        return {
            "series": self.series.key,
            "modality": self.series.modality,
            "files": [f.name for f in self.series.files] or [self.series.name],
            "whole": self._said(None),
            "frames": [{**self._where(i), **self._said(i)} for i in range(len(self.scores))],
            "notes": list(self.notes),
        }

    def _where(self, frame: int) -> dict[str, Any]:
        place = self.places[frame]
        return {"slice": frame} if place is None else {"file": self.series.files[place[0]].name, "frame": place[1]}

    def _said(self, frame: int | None) -> dict[str, Any]:
        scores, kind = self.whole if frame is None else self.scores[frame], "share" if self.segments else "probability"
        found: dict[str, Any] = {
            "findings": {
                p.name: {kind: round(float(scores[i]), DIGITS), "present": self.present(i, frame)}
                for i, p in enumerate(self.points)
            }
        }
        if self.segments:
            return {**found, "measures": self.measures(frame)}
        own = self.probabilities[-1 if frame is None else frame]
        named = {name: round(float(v), DIGITS) for name, v in zip(self.classes, own, strict=True)}
        return {**found, "probabilities": named, "label": max(named, key=named.get)}


def of_logits(
    series: Series,
    places: Sequence[tuple[int, int] | None],
    logits: np.ndarray,
    classes: Sequence[str],
    task: str,
    points: Sequence[Point],
    notes: Sequence[str] = (),
) -> Result:
    """The result of calibrated logits (N, K) of a series' frames."""
    with_mean = np.concatenate([logits, logits.mean(0, keepdims=True)]).astype(np.float64)
    probabilities = metrics.to_probabilities(with_mean, task)
    found = np.stack([np.clip(probabilities[:, p.columns].sum(1), 0, 1) for p in points], 1) if points else None
    found = np.zeros((len(with_mean), 0)) if found is None else found
    return Result(
        series, tuple(classes), tuple(points), tuple(places), found[:-1], found[-1], probabilities, notes=tuple(notes)
    )


def of_masks(
    series: Series,
    masks: Sequence[Volume],
    shares: np.ndarray,
    classes: Sequence[str],
    points: Sequence[Point],
    notes: Sequence[str] = (),
) -> Result:
    """The result of label masks on the grids of a series' volume, or of each of its files.

    shares: (N, K) of each class by the pixel threshold of its point, frame after frame as the masks stand.
    """
    index, places = {id(f): i for i, f in enumerate(series.files)}, []
    for mask in masks:
        files = mask.files * len(mask.values) if len(mask.files) == 1 else mask.files
        own = zip(files, mask.frames, strict=True) if files else [None] * len(mask.values)
        places += [None if place is None else (index[id(place[0])], place[1]) for place in own]
    found = shares[:, [p.columns[0] for p in points]]
    given = (tuple(classes), tuple(points), tuple(places))
    return Result(series, *given, found, found.max(0), masks=tuple(masks), notes=tuple(notes))


def clip_mask(file: DicomFile, labels: Tensor) -> Volume:
    """Label masks (F, H, W) of a file's frames, which have no place; where it tells no spacing, in pixels."""
    affine = np.diag([1.0, *(file.spacing_mm or (1.0, 1.0)), 1.0])
    return Volume(labels.float(), affine, file.name, file.modality, files=(file,), frames=tuple(range(file.frames)))


def thresholds(points: Sequence[Point]) -> dict[str, Any]:
    """For JSON: finding -> its thresholds and what chose them."""
    return {p.name: {"threshold": p.threshold, "pixel": p.pixel, "source": p.source} for p in points}


def points_of(columns: Mapping[str, Sequence[int]], kept: Mapping[str, Mapping[str, Any]] | None) -> tuple[Point, ...]:
    """Points of findings, with the thresholds that an adapter keeps: {finding: record of choose_threshold}."""
    found = []
    for name, own in columns.items():
        record = (kept or {}).get(name) or {}
        value, chosen = record.get("value"), record.get("target", "")
        if value is not None and record.get("reached"):
            source = f"{chosen} on validation rows"
        else:
            why = record.get("rule", "") if value is not None else f"{chosen} was not reached" if chosen else ""
            source = "not chosen on validation rows" + (f": {why}" if why else "")
        found.append(Point(name, tuple(own), 0.5 if value is None else float(value), source, record.get("pixel", 0.5)))
    return tuple(found)


def pixel_mm2(mask: Volume) -> float:
    return float(np.linalg.norm(np.cross(mask.affine[:3, 1], mask.affine[:3, 2])))


def voxel_mm3(mask: Volume) -> float:
    return float(abs(np.linalg.det(mask.affine[:3, :3])))


def _spaced(mask: Volume) -> bool:
    """Whether its affine is in millimetres, not in pixels of a file without spacing."""
    return not mask.files or all(f.frame_of_reference_uid or f.spacing_mm for f in mask.files)
