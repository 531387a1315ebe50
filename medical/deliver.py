"""What an adapter said of a series as files: DICOM SEG, TID 1500 SR, Secondary Captures, a NIfTI mask, or JSON.

Objects of DICOM name the patient and the study of their source, as they must to be filed (`dicom_out`), or with a salt
neither; names of files are hashes, and nothing else that is written here holds text of a header.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite.atomic import write_file
from adaptsuite.errors import UsageError, nearest
from adaptsuite.medical import dicom_out
from adaptsuite.medical.dicom_out import Algorithm, Finding, Label
from adaptsuite.medical.results import Result
from adaptsuite.medical.studies import Series
from adaptsuite.medical.volumes import write_mask

FORMATS = ("seg", "sr", "overlay", "nifti", "json")
MOST_OVERLAYS = 16  # of a series: the frames with the largest areas


def fitting(series: Series, segments: bool) -> tuple[str, ...]:
    """The formats for a series, by what the adapter gives: masks or labels."""
    if series.nifti is not None:
        return ("nifti", "json") if segments else ("json",)
    if not segments:
        return ("sr", "json")
    return ("seg", "nifti", "sr", "overlay", "json") if series.placed else ("sr", "overlay", "json")


def require_fitting(series: Series, form: str, segments: bool) -> None:
    """Raises UsageError that names the reason and the formats that fit."""
    if form not in FORMATS:
        raise UsageError(f"--format {form} is not known; {nearest(form, FORMATS)}")
    fits = fitting(series, segments)
    if form in fits:
        return
    if series.nifti is not None and form != "nifti":
        why = "a NIfTI file names no study under which an object of DICOM could be filed"
    elif not segments:
        why = "the adapter gives labels, no masks"
    else:
        why = f"this {series.modality} has no slices with a place in the patient (FrameOfReferenceUID)"
    raise UsageError(f"{series.name}: --format {form} does not fit, {why}: take {' or '.join(fits)}")


def deliver(
    folder: Path,
    result: Result,
    form: str,
    algorithm: Algorithm,
    salt: str | None = None,
    *,
    window: tuple[float, float] | None = None,
    allow_burned_in: bool = False,
) -> list[Path]:
    """Writes the files of one series into a folder and returns their paths; none for json, of which a study has one.

    Raises UsageError for a format that does not fit, DataError for a source that says too little.
    """
    require_fitting(result.series, form, result.segments)
    key = result.series.key
    if form == "seg":
        labels = [Label(name) for name in result.classes]
        return [dicom_out.write_seg(folder / f"seg-{key}.dcm", result.masks[0], labels, algorithm, salt)]
    if form == "nifti":
        return [write_mask(folder / f"mask-{key}.nii.gz", result.masks[0])]
    if form == "sr":
        report = findings(result)
        return [dicom_out.write_sr(folder / f"sr-{key}.dcm", result.series.files, report, algorithm, salt)]
    if form == "overlay":
        return _overlays(folder, result, algorithm, salt, window, allow_burned_in)
    return []


def findings(result: Result) -> list[Finding]:
    """Groups of a report: first of the series, then of each frame.

    Labels: each finding with its probability and whether it is present; each class, where no finding is known. Masks:
    each class with its share of the frame, mm2 and ml; of frames, those that show it.
    """
    rows: list[int | None] = [None, *range(len(result.scores))]
    found = []
    for frame in rows:
        place = None if frame is None else result.places[frame]
        if frame is not None and place is None:  # a slice of another plane than the files': they have none to name
            continue
        file, number = (None, None) if place is None else place
        for name, values, present in _values(result, frame):
            found.append(Finding(Label(name), values, number, file, present))
    return found


def _values(result: Result, frame: int | None) -> list[tuple[str, dict[str, tuple[float, str]], bool | None]]:
    scores = result.whole if frame is None else result.scores[frame]
    if not result.segments and not result.points:
        own = result.probabilities[-1 if frame is None else frame]
        return [(name, {"probability": (float(p), "1")}, None) for name, p in zip(result.classes, own, strict=True)]
    if not result.segments:
        return [
            (p.name, {"probability": (float(scores[i]), "1")}, result.present(i, frame))
            for i, p in enumerate(result.points)
        ]
    units, measures, found = {"area_mm2": ("area", "mm2"), "volume_ml": ("volume", "ml")}, result.measures(frame), []
    for i, point in enumerate(result.points):
        area = measures[result.classes[point.columns[0]]]
        if frame is not None and not scores[i] and not area.get("area_mm2"):
            continue
        share = "largest share of a frame" if frame is None else "share of the frame"
        values = {share: (float(scores[i]), "1")}
        for key, value in area.items():
            values[units[key][0]] = (value, units[key][1])
        found.append((point.name, values, result.present(i, frame)))
    return found


def _overlays(
    folder: Path, result: Result, algorithm: Algorithm, salt: str | None, window: Any, allow_burned_in: bool
) -> list[Path]:
    areas = np.array([np.count_nonzero(result.mask_of(i)) for i in range(len(result.scores))])
    largest = sorted(np.argsort(-areas, kind="stable")[:MOST_OVERLAYS])
    written = []
    for i in (int(i) for i in largest if areas[i]):
        file, frame = result.places[i]
        path = folder / f"overlay-{result.series.key}-{file + 1:04d}-{frame + 1:04d}.dcm"
        options = {"window": window, "allow_burned_in": allow_burned_in}
        source = result.series.files[file]
        written.append(dicom_out.write_overlay(path, source, frame, result.mask_of(i), algorithm, salt, **options))
    return written


def write_findings(folder: Path, facts: dict[str, Any], results: Sequence[Result]) -> Path:
    """findings.json of a study: what every format comes with."""
    content = {**facts, "series": [result.as_dict() for result in results]}
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    return write_file(folder / "findings.json", text + "\n")
