"""Pictures, DICOM files, folders of one series and NIfTI volumes as frames: the items of one row of a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from adaptsuite import images
from adaptsuite.errors import DataError, UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.image_data import Images, size_remarks
from adaptsuite.images import Picture
from adaptsuite.medical import dicom, volumes
from adaptsuite.memory import Memory

SUFFIXES = (*images.SUFFIXES, ".dcm", ".dicom", *volumes.SUFFIXES)
GREY_LEVELS = (0.005, 0.995)  # quantiles of a volume between which it is shown, where no window is given
LEAST_SIDE = images.LEAST_SIDE


@dataclass(frozen=True)
class Reading:
    """How files of several frames or slices become pictures."""

    frames: int = 8  # of a file or series, evenly spread over it; 0: all
    plane: Literal["axial", "coronal", "sagittal"] = "axial"  # of volumes
    window: tuple[float, float] | None = None  # centre, width in the file's unit (HU for CT); None: the file's own
    region: bool = True  # of ultrasound the picture alone, without the banner around it
    allow_burned_in: bool = False  # read files that say that text is burned into their pixels

    def __post_init__(self) -> None:
        if self.frames < 0:
            raise UsageError(f"front_end.frames={self.frames}: a number of frames, or 0 for all")
        if self.window is not None and (len(self.window) != 2 or not self.window[1] > 0):
            raise UsageError(f"front_end.window={self.window}: centre,width with a width above 0 is expected")

    def chosen(self, count: int) -> list[int]:
        """Which of `count` frames: the middle of each of `frames` equal stretches."""
        if not self.frames or count <= self.frames:
            return list(range(count))
        return [int((i + 0.5) * count / self.frames) for i in range(self.frames)]


def kind(path: Path) -> str:
    """picture, nifti, dicom (one file) or series (a folder)."""
    if path.is_dir():
        return "series"
    name = path.name.lower()
    if name.endswith(volumes.SUFFIXES):
        return "nifti"
    return "picture" if name.endswith(images.SUFFIXES) else "dicom"


def inspect(path: Path, plane: str = "axial") -> Picture:
    """What the header says, without pixels; a series: of its files. Raises DataError that names the file."""
    what = kind(path)
    if what == "picture":
        return images.inspect(path)
    if what == "dicom":
        file = _with_pixels(path)
        return _checked(Picture(path, file.columns, file.rows, file.photometric, "DICOM", file.frames))
    if what == "series":
        files = one_series(path)
        frames = sum(f.frames for f in files)
        if len(files) == 1 or plane == "axial":
            return _checked(Picture(path, files[0].columns, files[0].rows, files[0].photometric, "series", frames))
    volume = volumes.read_volume(path) if what == "nifti" else volumes.read_series(one_series(path))
    depth, height, width = volume.plane(plane).shape
    return _checked(Picture(path, width, height, "F", "NIfTI" if what == "nifti" else "series", depth))


def pictures(path: Path, reading: Reading) -> Iterator[Any]:
    """Pillow images in RGB, the chosen frames of a file in their order. Raises DataError that names the file."""
    from PIL import Image

    what = kind(path)
    if what == "picture":
        yield images.read(path)
        return
    files = one_series(path) if what == "series" else [_with_pixels(path)] if what == "dicom" else []
    if len(files) == 1:
        options = {"window": reading.window, "region": reading.region, "allow_burned_in": reading.allow_burned_in}
        for frame in dicom.frames(files[0], reading.chosen(files[0].frames), **options):
            yield Image.fromarray(frame if frame.shape[2] == 3 else frame[..., 0]).convert("RGB")
        return
    volume = volumes.read_series(files, reading.allow_burned_in) if files else volumes.read_volume(path)
    volume = volume.plane(reading.plane)
    values = volume.windowed(reading.window or own_window(volume.values)).values
    for i in reading.chosen(len(values)):
        yield Image.fromarray((values[i] * 255).round().byte().numpy()).convert("RGB")


def look(path: Path, reading: Reading) -> dict[str, Any]:
    """Facts of a file, decoded whole: {"width", "height", "frames", "remarks"}. Raises DataError."""
    if kind(path) == "picture":
        return {"frames": 1, **images.survey(path)}
    found, remarks = inspect(path, reading.plane), []
    seen = [np.asarray(image) for image in pictures(path, reading)]
    if all((frame == frame.flat[0]).all() for frame in seen):
        remarks.append("one colour all over")
    for file in {"dicom": lambda: [dicom.inspect(path)], "series": lambda: one_series(path)}.get(kind(path), list)():
        remarks += [r for r in file.remarks if r not in remarks]
    return {"width": found.width, "height": found.height, "frames": found.frames, "remarks": remarks}


def one_series(folder: Path) -> tuple[dicom.DicomFile, ...]:
    """The files of the one series of images below a folder. Raises DataError where there is none, or several."""
    listing = volumes.scan(folder)
    series = list(listing.series().values())
    if not series:
        why = f"; {listing.skipped[0]['file']}: {listing.skipped[0]['reason']}" if listing.skipped else ""
        raise DataError(f"{folder}: no DICOM image in this folder{why}")
    if len(series) > 1:
        raise DataError(
            f"{folder}: {len(series)} series ({', '.join(f'{len(s)} x {s[0].modality}' for s in series)}), a row is "
            "one: give each its own folder, or `predict` the whole study"
        )
    return series[0]


def _with_pixels(path: Path) -> dicom.DicomFile:
    file = dicom.inspect(path)
    if not file.frames:
        raise DataError(f"{file.name}: holds no picture ({file.modality})")
    return file


def _checked(found: Picture) -> Picture:
    if min(found.width, found.height) < LEAST_SIDE:
        raise DataError(f"{found.path}: {found.width} x {found.height} pixels, at least {LEAST_SIDE} a side are needed")
    return found


def own_window(values: Tensor) -> tuple[float, float]:
    """(centre, width) between the quantiles GREY_LEVELS of a volume."""
    flat = values.flatten()
    flat = flat[:: max(1, len(flat) // 1_000_000)]
    low, high = (float(q) for q in torch.quantile(flat, torch.tensor(GREY_LEVELS)))
    return (low + high) / 2, max(high - low, 1e-6)


class Frames(Images):
    """Map-style data set of frames: {"image": (3, h, w) uint8 before the crop, "label", "item"}; a row's label is that
    of each of its frames. `rows` says which row an item is of, `starts` which of its frames it is.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        targets: np.ndarray | None,
        front_end: FrontEnd,
        memory: Memory | None = None,
        reading: Reading | None = None,
        headers: dict[tuple[Path, str], Picture] | None = None,
    ):
        super().__init__(paths, targets, front_end, memory)
        self.reading, self._headers = reading or Reading(), {} if headers is None else headers
        chosen = [self.reading.chosen(self.header(p).frames if kind(p) != "picture" else 1) for p in self.paths]
        self.rows = np.repeat(np.arange(len(chosen)), [len(c) for c in chosen])
        self.starts = np.array([i for c in chosen for i in c])
        self._places = np.array([i for c in chosen for i in range(len(c))])

    def header(self, path: Path) -> Picture:
        key = path, self.reading.plane  # a volume has other slices in another plane
        if key not in self._headers:
            self._headers[key] = inspect(*key)
        return self._headers[key]

    @property
    def item_targets(self) -> np.ndarray | None:
        return None if self.targets is None else self.targets.numpy()[self.rows]

    def load(self) -> None:
        for path in self.paths:
            if not all([self._memory.keep(self._key(path, i), image) for i, image in enumerate(self._read(path))]):
                return

    def remarks(self) -> list[str]:
        plain = [path for path in self.paths if kind(path) == "picture"]
        said = Images(plain, None, self.front_end, self._memory).remarks() if plain else []
        others = [path for path in self.paths if kind(path) != "picture"]
        found: dict[str, int] = {}
        for path in others:
            files = {"dicom": lambda p: [dicom.inspect(p)], "series": one_series}.get(kind(path), lambda p: ())(path)
            for remark in {r for file in files for r in file.remarks}:
                found[remark] = found.get(remark, 0) + 1
        said += [f"{count} of {len(others)} DICOM files or series: {remark}" for remark, count in found.items()]
        several = [n for path in others if (n := self.header(path).frames) > self.reading.frames > 0]
        if several:
            said.append(
                f"{len(several)} of {len(self.paths)} files have more than {self.reading.frames} frames or slices (up "
                f"to {max(several)}): {self.reading.frames} of each are read, evenly spread (front_end.frames)"
            )
        return said + (size_remarks([self.header(p) for p in others], self.front_end) if others else [])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, place = self.rows[index], int(self._places[index])
        path = self.paths[row]
        image = self._memory.get(self._key(path, place))
        if image is None:
            read = self._read(path)
            image = read[place]
            for i, other in enumerate(read if self.targets is not None else ()):
                self._memory.keep(self._key(path, i), other)
        item = {"image": image, "item": index}
        return item if self.targets is None else {**item, "label": self.targets[row]}

    def mean_by_row(self, outputs: np.ndarray) -> np.ndarray:
        """(rows, ...): of logits the mean over a row's frames."""
        total = np.zeros((len(self.paths), *outputs.shape[1:]), outputs.dtype)
        np.add.at(total, self.rows, outputs)
        count = np.bincount(self.rows, minlength=len(self.paths))
        return total / count.reshape(-1, *[1] * (outputs.ndim - 1)).astype(outputs.dtype)

    def _read(self, path: Path) -> list[Tensor]:
        return [images.fitted(image, self.front_end) for image in pictures(path, self.reading)]

    def _key(self, path: Path, place: int = 0) -> tuple:
        key = super()._key(path)
        return key if kind(path) == "picture" else (*key, place, self.reading)
