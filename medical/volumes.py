"""Volumes with their place in the patient: DICOM series, enhanced DICOM files and NIfTI files as one type; and folders.

values[..., d, h, w] lies at affine @ (d, h, w, 1), in millimetres, RAS+: x grows to the patient's right, y to the
front, z to the head. DICOM counts x to the left and y to the back, NIfTI's arrays are indexed (w, h, d): both are
turned here.
"""

import gzip
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from adaptsuite.atomic import write_file
from adaptsuite.errors import DataError, Inexact, UsageError
from adaptsuite.medical import dicom
from adaptsuite.medical.dicom import DicomFile, Unusable, functional_group, quiet

SUFFIXES = (".nii", ".nii.gz")
MOST_VOXELS = 1 << 29  # 2 GiB of float32
MOST_INFLATION = 1032  # bytes that one byte of gzip can become
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
PLANES = {"axial": "SPL", "coronal": "AIL", "sagittal": "LIP"}  # where d, h, w grow to: radiologists see the patient's
# right on the left of axial and coronal slices, and the face on the left of sagittal ones
TOGETHER = 1e-3  # mm: slices at one position
UNEVEN = 0.05  # share by which distances between slices may differ


@dataclass(frozen=True, eq=False, repr=False)
class Volume:
    """Values and where they are; changes give another Volume."""

    values: Tensor  # (D, H, W), or (C, D, H, W), float32: HU for CT
    affine: np.ndarray  # (4, 4) float64
    name: str = "volume"  # in messages
    modality: str = "other"
    files: tuple[DicomFile, ...] = ()  # of each slice, or the one that holds them all; none when the grid is another
    frames: tuple[int, ...] = ()  # of each slice within its file
    notes: tuple[str, ...] = ()  # what was set aside or is unusual

    def __repr__(self) -> str:
        spacing = " x ".join(f"{v:g}" for v in self.spacing_mm)
        return f"Volume({self.name}, {tuple(self.values.shape)}, {spacing} mm, {self.codes}, {self.modality})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return tuple(self.values.shape[-3:])

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Between slices, rows, columns."""
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def codes(self) -> str:
        """Where d, h and w grow to, the nearest of R or L, A or P, S or I: "SPL" for usual axial slices."""
        import nibabel

        return "".join(nibabel.aff2axcodes(self.affine))

    def with_values(self, values: Tensor) -> "Volume":
        """Other values, a mask for instance, on this grid."""
        if tuple(values.shape[-3:]) != self.shape:
            raise UsageError(f"{self.name}: values of {tuple(values.shape)}, its grid has {self.shape}")
        return replace(self, values=values.to(torch.float32))

    def windowed(self, window_hu: tuple[float, float]) -> "Volume":
        """Values in [0, 1] between the ends of a window (centre, width), clipped there."""
        centre, width = window_hu
        if not width > 0:
            raise UsageError(f"window {window_hu!r} is not a centre and a width above 0")
        return replace(self, values=((self.values - centre) / width + 0.5).clamp(0, 1))

    def oriented(self, codes: str) -> "Volume":
        """Axes exchanged and turned so that `codes` holds; no value is changed, and `on_grid` brings them back."""
        import nibabel.orientations as o

        if sorted(codes.translate(str.maketrans("LPI", "RAS"))) != ["A", "R", "S"]:
            raise UsageError(f"orientation {codes!r} does not name R or L, A or P, S or I once each, such as SPL")
        turn = o.ornt_transform(o.io_orientation(self.affine), o.axcodes2ornt(codes))
        channels = self.values.ndim - 3
        order = [*range(channels), *(channels + int(axis) for axis in np.argsort(turn[:, 0]))]
        flips = [channels + int(turn[axis, 0]) for axis in range(3) if turn[axis, 1] < 0]
        values = self.values.permute(order).flip(flips).contiguous()
        affine = self.affine @ o.inv_ornt_aff(turn, self.shape)
        return replace(self, values=values, affine=affine, files=(), frames=())

    def plane(self, name: str) -> "Volume":
        """values[..., i, :, :] are upright slices as radiologists look at them: axial, coronal or sagittal (PLANES)."""
        if name not in PLANES:
            raise UsageError(f"plane {name!r} is not one of {', '.join(PLANES)}")
        return self.oriented(PLANES[name])

    def resampled(self, spacing_mm: Sequence[float], mode: Literal["linear", "nearest"] = "linear") -> "Volume":
        """The same corner voxel, other distances (of slices, rows, columns); linear for images, nearest for masks."""
        if len(spacing_mm) != 3 or not all(0 < v < float("inf") for v in spacing_mm):
            raise UsageError(f"spacing {spacing_mm!r} is not three numbers of millimetres above 0")
        scale = np.array(spacing_mm) / self.spacing_mm
        shape = tuple(int(round((n - 1) / s + 1)) for n, s in zip(self.shape, scale, strict=True))
        if np.prod(shape, dtype=float) > MOST_VOXELS:
            raise UsageError(
                f"{self.name}: spacing {spacing_mm!r} would make {shape} voxels, more than {MOST_VOXELS:,}"
            )
        return self._sampled(self.affine @ np.diag([*scale, 1.0]), shape, mode)

    def on_grid(self, like: "Volume", mode: Literal["linear", "nearest"] = "nearest") -> "Volume":
        """These values on another volume's grid: so a mask comes back to the original, exactly where voxels coincide.

        What lies outside is 0 for nearest, the lowest value for linear.
        """
        found = self._sampled(like.affine, like.shape, mode)
        return replace(found, files=like.files, frames=like.frames)

    def _sampled(self, affine: np.ndarray, shape: tuple[int, ...], mode: str) -> "Volume":
        values = self.values if self.values.ndim == 4 else self.values[None]
        step = np.linalg.inv(self.affine) @ affine  # voxels there -> voxels here
        outside = 0.0 if mode == "nearest" else float(values.min())
        found = torch.empty((len(values), *shape))
        slab = max(1, (1 << 22) // (shape[1] * shape[2]))  # slices at a time: the grid is three times the volume
        for first in range(0, shape[0], slab):
            last = min(first + slab, shape[0])
            found[:, first:last] = _looked_up(values, step, range(first, last), shape, mode, outside)
        return replace(self, values=found.reshape(self.values.shape[:-3] + shape), affine=affine, files=(), frames=())


def _looked_up(values: Tensor, step: np.ndarray, slices: range, shape: Sequence[int], mode: str, outside: float):
    """values (C, D, H, W) at the voxels of some slices of another grid: (C, len(slices), *shape[1:])."""
    d, h, w = (torch.tensor(axis, dtype=torch.float64) for axis in (slices, range(shape[1]), range(shape[2])))
    parts = [(m[0] * d, m[1] * h, m[2] * w + m[3]) for m in step[:3].tolist()]  # float32 suffices for their sums
    at = [p.float()[:, None, None] + q.float()[:, None] + r.float() for p, q, r in parts]  # voxels of `values`
    sizes = values.shape[1:]
    inside = torch.stack([(a > -1) & (a < n) for a, n in zip(at, sizes, strict=True)]).all(0)
    grid = torch.stack([(2 * a + 1) / n - 1 for a, n in zip(at, sizes, strict=True)][::-1], -1)  # x, y, z in [-1, 1]
    kind = "bilinear" if mode == "linear" else "nearest"
    found = torch.nn.functional.grid_sample(
        values[None], grid[None], mode=kind, padding_mode="border", align_corners=False
    )[0]
    return torch.where(inside, found, outside)


def require_same_grid(first: Volume, second: Volume) -> None:
    """Raises DataError that names both, when voxels of one are not where those of the other are."""
    where = f"{second.name} does not lie on the grid of {first.name}"
    if first.shape != second.shape:
        raise DataError(f"{where}: {second.shape} and {first.shape} voxels")
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in first.shape))]).T
    apart = float(np.linalg.norm((first.affine - second.affine) @ corners, axis=0).max())
    if apart > 0.1 * min(first.spacing_mm):
        raise DataError(f"{where}: its voxels are up to {apart:.3g} mm away")


def read_volume(path: str | Path, frame: int | None = None, allow_burned_in: bool = False) -> Volume:
    """A NIfTI file, a DICOM file, or a folder with one series of slices. Raises DataError; frame: as `read_nifti`."""
    path = Path(path)
    if path.name.lower().endswith(SUFFIXES):
        return read_nifti(path, frame)
    if not path.is_dir():
        return read_series([dicom.inspect(path)], allow_burned_in)
    found = scan(path)
    series = [files for files in found.series().values() if not all(f.localizer for f in files)]
    if len(series) != 1:
        others = ", ".join(f"{len(files)} files like {files[0].name}" for files in series[:3])
        others = others or f"{len(found.files)} DICOM files without slices, {len(found.skipped)} others"
        raise DataError(f"the folder holds {len(series)} series of slices, one is expected: {others}")
    return read_series(series[0], allow_burned_in)


# ---- DICOM series


@dataclass(frozen=True)
class _Plane:
    """One slice and where it lies, in DICOM's millimetres (LPS)."""

    file: DicomFile
    frame: int
    position: np.ndarray  # (3,) of its first pixel
    axes: np.ndarray  # (2, 3): directions of a row and of a column
    spacing_mm: tuple[float, float]  # between rows, between columns
    thickness_mm: float | None


def read_series(files: Sequence[DicomFile], allow_burned_in: bool = False) -> Volume:
    """Slices of one series in the order of their positions along the normal; localizers are set aside.

    Raises DataError that names the files where they are of several series, sizes, orientations or spacings, where two
    are at one position or one is missing between others, and where the position or the spacing is not said.
    """
    planes, notes = [], []
    if aside := [f.name for f in files if f.localizer]:
        notes.append(f"{len(aside)} localizers were set aside: {', '.join(aside[:3])}")
    for file in files:
        planes += [] if file.localizer else _planes(file)
    if not planes:
        raise DataError(f"{files[0].name if files else 'no file'}: no slices apart from localizers")
    _require_alike(planes)
    planes = _ordered(planes)
    affine, remark = _placed(planes)
    values = _stacked(planes, allow_burned_in)
    first, sources = planes[0].file, tuple(p.file for p in planes)
    alone = set(sources) == {first}
    return Volume(
        values,
        affine,
        name=first.name if alone else f"{first.name} and {len(planes) - 1} more",
        modality=first.modality,
        files=(first,) if alone else sources,
        frames=tuple(p.frame for p in planes),
        notes=(*notes, *remark),
    )


def _planes(file: DicomFile) -> list[_Plane]:
    if not file.frames:
        raise DataError(f"{file.name}: holds no pixels (modality {file.modality})")
    try:
        with quiet():
            header = dicom.load(file.path)
            return [_plane(file, header, i) for i in range(file.frames)]
    except Unusable as bad:
        raise DataError(f"{file.name}: {bad.reason}") from None
    except Exception as error:
        raise DataError(f"{file.name}: its geometry is damaged ({type(error).__name__})") from None


def _plane(file: DicomFile, header: Any, i: int) -> _Plane:
    def numbers(group: str, keyword: str, count: int) -> list[float]:
        place = functional_group(header, i, group)
        if place is None and file.frames > 1 and keyword == "ImagePositionPatient":
            raise Unusable("its frames have no positions of their own: a clip or a dose, not a volume of slices")
        found = [float(v) for v in dicom.values(header if place is None else place, keyword)]
        if len(found) != count or not np.isfinite(found).all():
            raise Unusable(f"{keyword} is missing or damaged: it cannot be placed in a volume")
        return found

    axes = np.array(numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-2:
        raise Unusable("ImageOrientationPatient has no two directions at right angles")
    rows, columns = numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    if min(rows, columns) <= 0:
        raise Unusable(f"PixelSpacing {rows:g} x {columns:g} mm is not above 0")
    measures = functional_group(header, i, "PixelMeasuresSequence") or header
    thickness = [float(v) for k in ("SpacingBetweenSlices", "SliceThickness") for v in dicom.values(measures, k)]
    thick = next((abs(v) for v in thickness if v and np.isfinite(v)), None)
    position = np.array(numbers("PlanePositionSequence", "ImagePositionPatient", 3))
    return _Plane(file, i, position, axes, (rows, columns), thick)


def _require_alike(planes: Sequence[_Plane]) -> None:
    first = planes[0]

    def refuse(other: _Plane, what: str) -> None:
        raise DataError(f"{other.file.name}: {what} {first.file.name}: they are not one volume")

    for p in planes:
        a, b = p.file, first.file
        if a.series != b.series:
            counts = Counter(q.file.series for q in planes)
            refuse(p, f"{len(counts)} series are mixed ({', '.join(map(str, counts.values()))} slices): another than")
        if (a.rows, a.columns, a.photometric) != (b.rows, b.columns, b.photometric):
            refuse(p, f"{a.rows} x {a.columns} {a.photometric}, unlike {b.rows} x {b.columns} {b.photometric} of")
        if a.frame_of_reference_uid != b.frame_of_reference_uid:
            refuse(p, "another frame of reference than")
        if np.abs(p.axes - first.axes).max() > 1e-3:
            refuse(p, "another orientation than")
        if not np.allclose(p.spacing_mm, first.spacing_mm, rtol=1e-3):
            refuse(p, f"spacing {p.spacing_mm} mm, unlike {first.spacing_mm} mm of")


def _ordered(planes: Sequence[_Plane]) -> list[_Plane]:
    """By position along the normal, which is told by the order of row and column, not by names or numbers."""
    normal = np.cross(*planes[0].axes)
    heights = np.array([p.position @ normal for p in planes])
    order = np.argsort(heights, kind="stable")
    planes, gaps = [planes[i] for i in order], np.diff(heights[order])
    if (together := np.flatnonzero(gaps <= TOGETHER)).size:
        _refuse_together(planes, gaps, int(together[0]))
    if gaps.size:
        step = float(np.percentile(gaps, 50, method="lower"))
        uneven = np.flatnonzero(np.abs(gaps - step) > UNEVEN * step)
        if uneven.size:
            i = int(uneven[0])
            raise DataError(
                f"{_where(planes[i])} and {_where(planes[i + 1])}: {gaps[i]:.4g} mm apart, other slices of the series "
                f"{step:.4g} mm: slices are missing or too many"
            )
    return planes


def _refuse_together(planes: Sequence[_Plane], gaps: np.ndarray, i: int) -> None:
    sizes = np.diff(np.flatnonzero(np.concatenate([[True], gaps > TOGETHER, [True]])))
    if len(set(sizes.tolist())) == 1 and (len(sizes) > 1 or sizes[0] > 2):
        raise DataError(
            f"{_where(planes[0])}: {sizes[0]} images at each of {len(sizes)} positions: 4-D, a volume is 3-D; "
            "give the files of one time or one weighting"
        )
    raise DataError(f"{_where(planes[i])} and {_where(planes[i + 1])}: duplicate slices, at one position")


def _where(plane: _Plane) -> str:
    return plane.file.name + (f" frame {plane.frame}" if plane.file.frames > 1 else "")


def _placed(planes: Sequence[_Plane]) -> tuple[np.ndarray, list[str]]:
    """The affine of slices in order, and a remark where they are not stacked at right angles."""
    first, last = planes[0], planes[-1]
    normal, notes = np.cross(*first.axes), []
    if len(planes) > 1:
        step = (last.position - first.position) / (len(planes) - 1)
        expected = first.position + np.arange(len(planes))[:, None] * step
        shift = np.linalg.norm(np.array([p.position for p in planes]) - expected, axis=1)
        if shift.max() > 0.5 * max(min(first.spacing_mm), UNEVEN * np.linalg.norm(step)):
            raise DataError(f"{_where(planes[int(shift.argmax())])}: is shifted by {shift.max():.3g} mm against others")
        if (tilt := np.degrees(np.arccos(min(1.0, step @ normal / np.linalg.norm(step))))) > 0.5:
            notes.append(f"slices are stacked at {tilt:.1f} degrees to their normal (gantry tilt), kept in the affine")
    elif first.thickness_mm is None:
        raise DataError(f"{_where(first)}: SliceThickness is missing, and one slice alone tells no other")
    else:
        step = normal * first.thickness_mm
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 3] = step, first.position
    affine[:3, 1], affine[:3, 2] = first.axes[1] * first.spacing_mm[0], first.axes[0] * first.spacing_mm[1]
    return LPS_TO_RAS @ affine, notes


def _stacked(planes: Sequence[_Plane], allow_burned_in: bool) -> Tensor:
    """(D, H, W) or (C, D, H, W) in physical units."""
    file = planes[0].file
    if len(planes) * file.rows * file.columns * file.channels > MOST_VOXELS:
        raise DataError(f"{file.name}: {len(planes)} x {file.rows} x {file.columns} voxels, at most {MOST_VOXELS:,}")
    values = torch.empty((file.channels, len(planes), file.rows, file.columns))
    for source, group in itertools.groupby(enumerate(planes), key=lambda item: item[1].file):
        slices = list(group)
        wanted = [plane.frame for _, plane in slices]
        found = dicom.frames(source, wanted, units="physical", allow_burned_in=allow_burned_in)
        for (i, _), frame in zip(slices, found, strict=True):
            values[:, i] = torch.from_numpy(frame).permute(2, 0, 1)
    return values if file.channels > 1 else values[0]


# ---- NIfTI


def read_nifti(path: str | Path, frame: int | None = None, shown: str | None = None) -> Volume:
    """A 3-D NIfTI file, or one frame of a 4-D one; slope applied. Raises DataError that names the file."""
    import nibabel

    path = Path(path)
    name = str(path) if shown is None else shown
    if not path.is_file():
        raise DataError(f"{name}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty (0 bytes)")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{name}: not a NIfTI file, their names end in {' or '.join(SUFFIXES)}")
    try:
        with quiet():
            image = nibabel.load(path)
            if not isinstance(image, nibabel.Nifti1Image):  # of which NIfTI-2 is a kind
                raise Unusable("not a NIfTI file")
            name, notes = _nifti_name(path, shown, image.header), _check_nifti(path, image, frame)
            data = image.dataobj
            values = np.asarray(data, dtype=np.float32) if len(image.shape) == 3 else data[..., frame or 0]
    except Unusable as bad:
        raise DataError(f"{name}: {bad.reason}") from None
    except Exception as error:
        raise DataError(f"{name}: damaged or cut short ({type(error).__name__})") from None
    values = torch.from_numpy(np.ascontiguousarray(np.asarray(values).T, dtype=np.float32))  # (w, h, d) -> (d, h, w)
    if not values.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinite values")
    return Volume(values, image.affine[:, [2, 1, 0, 3]].astype(np.float64), name=name, notes=notes)


def _nifti_name(path: Path, shown: str | None, header: Any) -> str:
    """The text fields of a NIfTI header are free: some programs put a patient's number there."""
    found = (bytes(header[k]).decode("latin-1") for k in ("descrip", "aux_file", "intent_name"))
    return dicom.named(path, shown, dicom.needles(text.strip("\0 ") for text in found))


def _check_nifti(path: Path, image: Any, frame: int | None) -> tuple[str, ...]:
    """Raises Unusable for what the header alone tells; returns remarks."""
    header, shape = image.header, image.shape
    size = np.prod(shape, dtype=float)
    if not 3 <= len(shape) <= 4 or min(shape) < 1 or image.get_data_dtype().fields:
        raise Unusable(f"{len(shape)}-D {shape}, a volume is 3-D with one number a voxel")
    if np.prod(shape[:3], dtype=float) > MOST_VOXELS:
        raise Unusable(f"{' x '.join(map(str, shape))} voxels are more than {MOST_VOXELS:,}")
    there = path.stat().st_size * (MOST_INFLATION if path.name.lower().endswith(".gz") else 1)
    if size * image.get_data_dtype().itemsize + image.dataobj.offset > there:
        raise Unusable(f"truncated: {' x '.join(map(str, shape))} voxels do not fit into {path.stat().st_size:,} bytes")
    if len(shape) == 4 and shape[3] > 1 and (frame is None or not 0 <= frame < shape[3]):
        raise Unusable(f"4-D, {shape[3]} volumes: choose one by its frame, 0 to {shape[3] - 1}")
    with image.file_map["image"].get_prepare_fileobj("rb") as file:
        raw = type(header).from_fileobj(file, check=False)  # a slope of NaN or a spacing of 0 nibabel makes 1
    if not np.isfinite([raw["scl_slope"], raw["scl_inter"]]).all():
        raise Unusable("scl_slope or scl_inter is not finite: what its numbers mean is unknown")
    if not int(raw["sform_code"]) and not (raw["pixdim"][1:4] > 0).all():
        raise Unusable(f"its spacing is missing: pixdim is {' x '.join(f'{v:g}' for v in raw['pixdim'][1:4])}")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise Unusable("its affine is singular: voxels have no place or no size")
    if (unit := header.get_xyzt_units()[0]) not in ("mm", "unknown"):
        raise Unusable(f"its spacing is in {unit}, mm is expected")
    known = int(header["qform_code"]) or int(header["sform_code"])
    return () if known else ("its header gives no orientation (qform and sform codes are 0), RAS is taken",)


def read_mask(path: str | Path, like: Volume, shown: str | None = None) -> Volume:
    """Whole numbers from 0 on the grid of `like`, from a NIfTI file that may have its axes in another order.

    Raises DataError for other values, and where its voxels are not those of `like`.
    """
    mask = read_nifti(path, shown=shown).oriented(like.codes)
    if not torch.equal(mask.values, mask.values.round()) or mask.values.min() < 0:
        raise DataError(f"{mask.name}: holds other values than the labels 0, 1, 2, ...")
    require_same_grid(like, mask)
    return replace(mask, affine=like.affine, files=like.files, frames=like.frames)


def write_mask(path: str | Path, mask: Volume) -> Path:
    """A NIfTI file (.nii or .nii.gz) of labels with the affine of its grid, read back before it appears.

    Of text it holds nothing, in its header as in that of gzip. Raises UsageError for another suffix.
    """
    import nibabel

    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise UsageError(f"{path.name}: a mask is written as .nii or .nii.gz")
    labels = mask.values.numpy()
    array = labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.int32).T
    affine = mask.affine[:, [2, 1, 0, 3]]
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)  # without the shear of a tilted gantry, which it cannot hold: the sform is used
    content = image.to_bytes()
    again = nibabel.Nifti1Image.from_bytes(content)
    if not np.array_equal(np.asarray(again.dataobj), labels.T) or not np.allclose(again.affine, affine, atol=1e-3):
        raise Inexact("the mask does not read back as it was written")
    return write_file(path, gzip.compress(content, mtime=0) if path.name.lower().endswith(".gz") else content)


# ---- folders


@dataclass(frozen=True)
class Listing:
    """The files of a folder."""

    files: tuple[DicomFile, ...]
    skipped: tuple[Mapping[str, str], ...]  # {"file", "reason"} of everything else
    nifti: tuple[tuple[Path, str], ...] = field(default=(), repr=False)  # of these, the NIfTI files, and their names
    needles: frozenset[str] = field(default=frozenset(), repr=False)  # of the text that all headers hold

    def series(self) -> dict[str, tuple[DicomFile, ...]]:
        """Files that hold pixels by `DicomFile.series`, in the order of their names."""
        groups: dict[str, list[DicomFile]] = {}
        for file in self.files:
            if file.frames:
                groups.setdefault(file.series, []).append(file)
        return {key: tuple(files) for key, files in groups.items()}

    def summary(self) -> list[dict[str, Any]]:
        """One entry a series, for people and JSON."""
        return [
            {
                "series": key,
                "modality": files[0].modality,
                "files": len(files),
                "frames": sum(f.frames for f in files),
                "sizes": sorted({f"{f.rows} x {f.columns}" for f in files}),
                "burned_in": any(f.burned_in for f in files),
            }
            for key, files in self.series().items()
        ]


def scan(folder: str | Path) -> Listing:
    """Every DICOM file below a folder, and what was left out with its reason: hidden files, links that lead out of the
    folder, second copies, damaged and other files.

    A DICOMDIR is not believed: what lies in the folder is read, what it names beyond that is listed; when it points
    out of the folder, the folder is refused. Raises DataError.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{folder}: no such folder")
    root, seen, needles = root.resolve(), [], set()
    for path, reason in _walk(root):
        file, found = None, frozenset()
        if reason is None:
            try:
                file, found = dicom.facts(path)
            except Unusable as bad:
                reason, found = bad.reason, bad.needles
        needles |= found
        seen.append((path, file, reason))
    names = {  # given last: the header of one file may tell what the path of another must not
        path: dicom.named(path, path.relative_to(root).as_posix(), needles, number)
        for number, (path, *_) in enumerate(seen, 1)
    }
    seen = _without_copies(seen, names)
    skipped = [{"file": names[path], "reason": reason} for path, file, reason in seen if file is None]
    skipped += _named_but_missing(root, [path for path, *_ in seen])
    files = tuple(replace(file, name=names[path]) for path, file, _ in seen if file)
    nifti = ((p, names[p]) for p, _, reason in seen if p.name.lower().endswith(SUFFIXES) and _is_other(reason))
    return Listing(files, tuple(skipped), tuple(nifti), frozenset(needles))


def _is_other(reason: str | None) -> bool:
    """Whether a file was looked into, and is of another kind than DICOM."""
    return reason is not None and reason.startswith("not a DICOM file")


def _walk(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Files in the order of their names, and why one is not looked into."""
    for folder, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        for name in sorted([*files, *(f for f in folders if (Path(folder) / f).is_symlink())]):
            path = Path(folder) / name
            if any(part.startswith(".") for part in path.relative_to(root).parts):
                yield path, "hidden"
            elif path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(root)):
                yield path, "a link to a folder or out of this one, not followed"
            elif name.upper() == "DICOMDIR":
                yield path, "a list of files; they are found without it"
            else:
                yield path, None


def _without_copies(seen: list, names: Mapping[Path, str]) -> list:
    first: dict[str, Path] = {}
    for i, (path, file, _) in enumerate(seen):
        if file is None or (other := first.setdefault(file.uid or str(path), path)) == path:
            continue
        if dicom.content_hash(other) == dicom.content_hash(path):
            seen[i] = (path, None, f"a second copy of {names[other]}")
    return seen


def _named_but_missing(root: Path, paths: Sequence[Path]) -> list[dict[str, str]]:
    """What DICOMDIRs name and the folder does not hold. Raises DataError for entries that lead out of it."""
    there = {str(path).casefold() for path in paths}
    missing = []
    for index in (path for path in paths if path.name.upper() == "DICOMDIR"):
        where = "/".join(["DICOMDIR"] if index.parent == root else ["...", "DICOMDIR"])
        for number, parts in enumerate(_entries(index), 1):
            if any(part in ("", ".", "..") or {"/", "\\", ":"} & set(part) for part in parts):
                raise DataError(f"{where}: entry {number} leads out of the folder: it is not a study to be read")
            if parts and str(index.parent.joinpath(*parts)).casefold() not in there:
                missing.append({"file": f"{where} entry {number}", "reason": "named there, but not in the folder"})
    return missing


def _entries(index: Path) -> list[list[str]]:
    try:
        with quiet():
            records = dicom.load(index).get("DirectoryRecordSequence") or ()
            return [[str(v) for v in dicom.values(item, "ReferencedFileID")] for item in records]
    except Exception:  # damaged: nothing is lost, it is not needed
        return []
