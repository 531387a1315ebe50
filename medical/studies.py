"""A study folder: which studies and series it holds, told by cheap headers alone, and what cannot be used and why.

Studies and series are told apart by their UIDs, wherever below the folder their files lie. Names in here hold no text
of any header; keys are hashes of UIDs, of a NIfTI file that of its bytes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adaptsuite.errors import DataError
from adaptsuite.medical import dicom, volumes
from adaptsuite.medical.dicom import DicomFile, Unusable
from adaptsuite.medical.volumes import Volume

NIFTI = "NIfTI"
VOLUMETRIC = ("CT", "MR", "PT", "NM")  # whose slices make a volume
NO_IMAGES = ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "RTIMAGE", "SR", "PR", "KO", "ECG")  # made of images by others


@dataclass(frozen=True)
class Series:
    """Files that belong together: of one DICOM series, or one NIfTI file."""

    key: str
    name: str  # in messages
    modality: str  # of DICOM, or NIFTI
    files: tuple[DicomFile, ...] = ()  # in the order of their names
    nifti: Path | None = field(default=None, repr=False)

    @property
    def placed(self) -> bool:
        """Whether its slices have a place in the patient: those of volumes have, clips and single pictures have not."""
        stacked = self.modality in VOLUMETRIC and all(f.frame_of_reference_uid for f in self.files)
        return self.nifti is not None or stacked

    def volume(self, allow_burned_in: bool = False) -> Volume:
        """Its values with their place. Raises DataError where slices are missing or have none."""
        if self.nifti is not None:
            return volumes.read_nifti(self.nifti, shown=self.name)
        return volumes.read_series(self.files, allow_burned_in)


@dataclass(frozen=True)
class Study:
    """The series of one study, in the order of their modalities and keys."""

    key: str
    uid: str = field(repr=False)  # of a NIfTI file its hash
    series: tuple[Series, ...]


@dataclass(frozen=True)
class StudyFolder:
    """What a folder, or a single file, holds."""

    name: str  # of the folder, in messages
    studies: tuple[Study, ...]
    skipped: tuple[Mapping[str, str], ...]  # {"file", "reason"} of everything else
    needles: frozenset[str] = field(repr=False)
    paths: Mapping[str, str] = field(repr=False)  # path -> what to call it

    def clean(self, text: str) -> str:
        """A message without paths and without any text of a header."""
        for path in sorted(self.paths, key=len, reverse=True):
            text = text.replace(path, self.paths[path])
        return "the reason is withheld: it holds text of a header" if dicom.tells(text, self.needles) else text

    def summary(self) -> list[dict[str, Any]]:
        """One entry a series, for people and JSON."""
        return [
            {
                "study": study.key,
                "series": series.key,
                "modality": series.modality,
                "files": max(1, len(series.files)),
                "frames": sum(f.frames for f in series.files) or None,
            }
            for study in self.studies
            for series in study.series
        ]


def open_folder(path: str | Path) -> StudyFolder:
    """The studies of a folder and those below it, or of one DICOM or NIfTI file.

    Listed in `skipped`: what `volumes.scan` leaves out, a DICOMDIR among it, objects without pixels, those that are no
    images (segmentations, doses, reports) and localizers. Raises DataError for a path that is none.
    """
    path = Path(path)
    listing = volumes.scan(path) if path.is_dir() else _single(path)
    nifti = {name: file for file, name in listing.nifti}
    skipped = [s for s in listing.skipped if s["file"] not in nifti]
    studies: dict[str, dict[str, list[DicomFile]]] = {}
    for file in listing.files:
        if reason := _no_image(file):
            skipped.append({"file": file.name, "reason": reason})
        else:
            studies.setdefault(file.study_uid, {}).setdefault(file.series, []).append(file)
    found = [_study(uid, series) for uid, series in studies.items()]
    found += [_nifti_study(file, name) for name, file in nifti.items()]
    name = _folder_name(path, listing)
    paths = {str(f.path): f.name for f in listing.files} | {str(file): name for name, file in nifti.items()}
    paths |= {str(path): name, str(path.resolve()): name} if path.is_dir() else {str(path): paths.get(str(path), name)}
    return StudyFolder(name, tuple(found), tuple(skipped), listing.needles, paths)


def _single(path: Path) -> volumes.Listing:
    if path.name.lower().endswith(volumes.SUFFIXES) and path.is_file():
        return volumes.Listing((), (), nifti=((path, path.name),))
    try:
        file, needles = dicom.facts(path)
    except Unusable as bad:
        raise DataError(f"{dicom.named(path, path.name, bad.needles)}: {bad.reason}") from None
    file = replace(file, name=dicom.named(path, path.name, needles))
    return volumes.Listing((file,), (), needles=needles)


def _folder_name(path: Path, listing: volumes.Listing) -> str:
    """Its last part, withheld where it holds text of a header."""
    name, inside = path.resolve().name or "folder", [f.path for f in listing.files]
    if inside:
        return dicom.named(inside[0], name, listing.needles)
    return "***" if dicom.tells(name, listing.needles) else name


def _no_image(file: DicomFile) -> str:
    if not (file.study_uid and file.series_uid and file.uid):
        return "has no StudyInstanceUID, SeriesInstanceUID or SOPInstanceUID: it belongs to no study"
    if not file.frames or file.modality in NO_IMAGES:
        return f"holds no image (modality {file.modality})"
    if file.photometric == "other":
        return f"its colours are of a kind that is not read; {', '.join(dicom.GREY + dicom.COLOUR)} are"
    return "a localizer, on which others were planned" if file.localizer else ""


def _study(uid: str, series: Mapping[str, list[DicomFile]]) -> Study:
    found = [Series(key, f"series {key}", files[0].modality, tuple(files)) for key, files in series.items()]
    ordered = tuple(sorted(found, key=lambda s: (s.modality, s.key)))
    return Study(hashlib.sha256(uid.encode()).hexdigest()[:16], uid, ordered)


def _nifti_study(path: Path, name: str) -> Study:
    digest = dicom.content_hash(path)
    return Study(digest[:16], digest, (Series(digest[:12], name, NIFTI, nifti=path),))
