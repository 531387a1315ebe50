"""Results as DICOM objects: segmentations of series, reports on frames of clips, pictures with the mask drawn in.

The standard requires the patient of the source in every object that belongs to a study: names, numbers and dates of
`PATIENT` and `STUDY` are copied into these objects, and nowhere else; no other text of the source is. With a salt they
are replaced, and all UIDs too, each by the same hash everywhere, so that the objects of one delivery still belong
together. Every object is read back and compared before it appears under its name.
"""

import contextlib
import hashlib
import hmac
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptsuite.atomic import write_file
from adaptsuite.errors import DataError, Inexact, UsageError
from adaptsuite.medical import dicom
from adaptsuite.medical.dicom import DicomFile, quiet
from adaptsuite.medical.volumes import Volume

PATIENT = ("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID")
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
IMAGE = (  # numbers and codes of the source that place a result
    "SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames", "ImageType", "PixelSpacing", "SliceThickness",
    "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient", "SamplesPerPixel", "BitsAllocated",
    "PhotometricInterpretation", "DimensionOrganizationType",
)  # fmt: skip
GROUPS = ("PixelMeasuresSequence", "PlaneOrientationSequence", "PlanePositionSequence")
SCHEME = "99ADAPTSUITE"  # of codes for labels that have none of their own
LONGEST_LABEL = 64
DIGITS = 6  # after the point, of numbers in reports
SHORTEST_SALT = 16
COLOURS = np.array([(255, 80, 60), (60, 170, 255), (90, 220, 90), (250, 200, 50), (220, 100, 230), (80, 230, 220)])
PROCEDURES = {
    "US": ("16310003", "SCT", "Ultrasonography"),
    "CT": ("77477000", "SCT", "Computed tomography"),
    "MR": ("113091000", "SCT", "Magnetic resonance imaging"),
}
IMAGING = ("363679005", "SCT", "Imaging procedure")
REMOVED = "UIDs and patient replaced by salted hashes, dates emptied"

Code = tuple[str, str, str]  # value, scheme, meaning


@dataclass(frozen=True)
class Algorithm:
    """What made a result: an adapter on a base, each told by its hash."""

    name: str
    version: str
    adapter_sha256: str
    base_sha256: str
    settings: Mapping[str, str] = field(default_factory=dict)  # threshold, temperature, ...

    @property
    def parameters(self) -> dict[str, str]:
        return {"adapter_sha256": self.adapter_sha256, "base_sha256": self.base_sha256, **self.settings}


@dataclass(frozen=True)
class Label:
    """A class of an adapter, and its code; without one it gets a code of ours."""

    name: str
    kind: Code | None = None  # of CID 7151 for segments, as ("52988006", "SCT", "Lesion")
    category: Code = ("85756007", "SCT", "Tissue")  # of CID 7150

    @property
    def code(self) -> Code:
        return self.kind or (hashlib.sha256(self.name.encode()).hexdigest()[:12], SCHEME, self.name)


@dataclass(frozen=True)
class Finding:
    """What was found on one frame, on a file as a whole, or on all files together."""

    label: Label
    values: Mapping[str, tuple[float, str]]  # name -> number and UCUM unit: {"probability": (0.93, "1")}
    frame: int | None = None  # from 0
    file: int | None = 0  # which of the report's files; None: all
    present: bool | None = None  # what was decided, if anything


def write_seg(
    path: str | Path, mask: Volume, labels: Sequence[Label], algorithm: Algorithm, salt: str | None = None
) -> Path:
    """A DICOM SEG of a mask on the grid of its source, one segment a label: value 1 is labels[0], 0 is background.

    mask: as `Volume.on_grid` gives it for a volume that was read from DICOM. Raises UsageError for another one and for
    values without a label, DataError where the source has no frame of reference, as multi-frame ultrasound.
    """
    import highdicom

    _check_words(labels, algorithm, salt)
    values = _segments(mask, labels)
    if without := [f.name for f in mask.files if not f.frame_of_reference_uid]:
        raise DataError(f"{without[0]}: has no frame of reference, which a SEG needs: write a report or an overlay")
    with _quoting_nothing(f"{mask.name}: no SEG can be made of it"):
        sources = [_origin(file, salt) for file in mask.files]
        made = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=values,
            segmentation_type="BINARY",
            segment_descriptions=[_segment(i, label, algorithm) for i, label in enumerate(labels, 1)],
            **_identity(algorithm, 701),
        )
        _finish(made, sources[0], salt)

    def check(content: bytes) -> bool:
        again = highdicom.seg.segread(io.BytesIO(content))
        return np.array_equal(_pixels(again, [s.SOPInstanceUID for s in sources], mask), values)

    return _publish(path, made, check)


def read_seg(path: str | Path, like: Volume) -> tuple[Volume, tuple[str, ...]]:
    """The segments of a DICOM SEG as values 1, 2, ... on the grid of the volume that it was made on, and their labels.

    Raises DataError that names the file where it is damaged, was made on other images, or its segments overlap.
    """
    import highdicom

    file = dicom.inspect(path)
    if not like.files:
        raise UsageError(f"{like.name}: is not on the grid of its DICOM files")
    uids = [f.uid for f in like.files]
    with _quoting_nothing(f"{file.name}: holds no segments that can be read, or some that overlap"):
        found = highdicom.seg.segread(path)
        series = found.ReferencedSeriesSequence
        sources = {str(item.ReferencedSOPInstanceUID) for s in series for item in s.ReferencedInstanceSequence}
        if not sources or not sources <= set(uids):  # highdicom would give an empty mask
            raise DataError(f"{file.name}: was made on other images than {like.name}")
        values = _pixels(found, uids, like).astype(np.float32)
        labels = tuple(str(item.SegmentLabel) for item in found.SegmentSequence)
    values = values[list(like.frames)] if len(like.files) == 1 else values
    return like.with_values(torch.from_numpy(values)), labels


def write_sr(
    path: str | Path,
    files: DicomFile | Sequence[DicomFile],
    findings: Sequence[Finding],
    algorithm: Algorithm,
    salt: str | None = None,
) -> Path:
    """A report (TID 1500, Comprehensive SR) with one group of measurements a finding, which names its frame.

    For what a SEG cannot hold, multi-frame ultrasound above all. files: of one study; findings say which they are of.
    Raises UsageError for frames and values that are none.
    """
    import highdicom

    files = (files,) if isinstance(files, DicomFile) else tuple(files)
    name = files[0].name
    _check_words([f.label for f in findings], algorithm, salt)
    if not findings:
        raise UsageError(f"{name}: a report without a finding says nothing")
    for finding in findings:
        count = 0 if finding.file is None else files[finding.file].frames
        if finding.frame is not None and not 0 <= finding.frame < count:
            where = name if finding.file is None else files[finding.file].name
            raise UsageError(f"{where}: frame {finding.frame} is not one of its {count}")
        if not finding.values or not np.isfinite([v for v, _ in finding.values.values()]).all():
            raise UsageError(f"{name}: finding {finding.label.name!r} has no values, or some that are not finite")
    with _quoting_nothing(f"{name}: no SR can be made of it"):
        sources = [_origin(file, salt) for file in files]
        made = highdicom.sr.ComprehensiveSR(
            evidence=sources,
            content=_report(files, sources, findings, algorithm)[0],
            is_complete=True,
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            **_identity(algorithm, 702),
        )
        _finish(made, sources[0], salt)
    decided = {None: (), True: ("Present",), False: ("Absent",)}
    wanted = [(_frame_numbers(files, f), f.label.code[2], *_numbers(f), *decided[f.present]) for f in findings]
    return _publish(path, made, lambda content: read_sr(io.BytesIO(content)) == wanted)


def read_sr(source: Any) -> list[tuple]:
    """(frame numbers from 1 or None, label, values ..., decision where there is one) of every group of a report."""
    import highdicom

    groups = highdicom.sr.srread(source).content.get_image_measurement_groups()
    return [
        (
            group.source_images[0].referenced_frame_numbers,
            group.finding_type.meaning,
            *(round(float(m.value), DIGITS) for m in group.get_measurements()),
            *(e.value.meaning for e in group.get_qualitative_evaluations()),
        )
        for group in groups
    ]


def write_overlay(
    path: str | Path,
    file: DicomFile,
    frame: int,
    mask: np.ndarray,
    algorithm: Algorithm,
    salt: str | None = None,
    *,
    window: tuple[float, float] | None = None,
    region: bool = True,
    allow_burned_in: bool = False,
) -> Path:
    """A Secondary Capture of one frame with a mask (H, W) of labels drawn over it in colours; no text is drawn.

    region: ultrasound is cut to its picture, which leaves the banner with the patient's name out. With a salt, a frame
    that may show text, was not cut and does not say that it shows none is refused (DataError), unless that is allowed.
    """
    import highdicom

    _check_words([], algorithm, salt)
    if mask.shape != (file.rows, file.columns):
        raise UsageError(f"{file.name}: a mask of {mask.shape}, its frames have {(file.rows, file.columns)}")
    cut = region and file.region is not None
    unknown = file.burned_in is None and not cut and file.modality in dicom.MAY_SHOW_TEXT
    if salt is not None and unknown and not allow_burned_in:
        raise DataError(f"{file.name}: does not say whether text is burned into its pixels: look at it, then allow it")
    picture = dicom.read(file, [frame], window=window, region=region, allow_burned_in=allow_burned_in)[0]
    if cut:
        top, bottom, left, right = file.region
        mask = mask[top:bottom, left:right]
    drawn = draw(picture, mask)
    with _quoting_nothing(f"{file.name}: no Secondary Capture can be made of it"):
        source = _origin(file, salt)
        made = highdicom.sc.SCImage(
            pixel_array=drawn,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),  # wanted by highdicom; emptied below, since nobody knows it for a clip
            study_instance_uid=source.StudyInstanceUID,
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            **_identity(algorithm, 703),
        )
        made.PatientOrientation, made.ConversionType = None, "WSD"
        if file.burned_in is not None:
            made.BurnedInAnnotation = "YES" if file.burned_in else "NO"
        made.SourceImageSequence = [_reference(file, source, frame)]
        hashes = ", ".join(f"{name}={value}" for name, value in algorithm.parameters.items())
        made.DerivationDescription = f"Mask drawn over the frame by {algorithm.name} {algorithm.version}, {hashes}"
        _finish(made, source, salt)
    return _publish(path, made, lambda content: np.array_equal(_decoded(content), drawn))


def draw(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 and labels (H, W) -> (H, W, 3): areas tinted, their outlines in full colour."""
    shown = np.broadcast_to(picture, (*picture.shape[:2], 3)).astype(np.float64)
    padded = np.pad(mask, 1, mode="edge")
    around = [padded[y : y + len(mask), x : x + mask.shape[1]] for y, x in ((0, 1), (2, 1), (1, 0), (1, 2))]
    edge = (mask > 0) & np.any([other != mask for other in around], axis=0)
    colour = COLOURS[(mask.astype(np.int64) - 1) % len(COLOURS)]
    share = np.where(edge, 1.0, np.where(mask > 0, 0.35, 0.0))[..., None]
    return np.rint(shown * (1 - share) + colour * share).astype(np.uint8)


def remapped_uid(uid: str, salt: str) -> str:
    """Another UID (2.25., PS3.5 B.2): the same one for the same salt, and none of the old without it."""
    digest = hmac.new(salt.encode(), uid.encode(), hashlib.sha256).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


# ---- what belongs to the source


def _origin(file: DicomFile, salt: str | None) -> Any:
    """A Dataset that stands for the source: what places the result, its patient and study, and nothing else."""
    import pydicom

    header, kept = dicom.load(file.path), pydicom.Dataset()
    for keyword in IMAGE:
        if keyword in header:
            kept[keyword] = header[keyword]
    for keyword in UIDS:
        if uid := str(header.get(keyword) or ""):
            setattr(kept, keyword, uid if salt is None else remapped_uid(uid, salt))
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if keyword in header:
            setattr(kept, keyword, [_placing(item) for item in header[keyword].value])
    for keyword in (*PATIENT, *STUDY):
        setattr(kept, keyword, _legal(header, keyword) if salt is None else "")
    if salt is not None and kept.get("PatientID") is not None:
        number = f"{header.get('IssuerOfPatientID', '')}/{header.get('PatientID', '')}"
        kept.PatientID = kept.PatientName = hmac.new(salt.encode(), number.encode(), hashlib.sha256).hexdigest()[:16]
        kept.PatientSex = _legal(header, "PatientSex")
    if not kept.IssuerOfPatientID:
        del kept.IssuerOfPatientID  # the only one that may not be empty
    kept.SpecificCharacterSet = "ISO_IR 192"  # UTF-8 holds every name, and every label
    return kept


def _placing(item: Any) -> Any:
    """The functional groups of a frame that say where it lies."""
    import pydicom

    kept = pydicom.Dataset()
    for keyword in GROUPS:
        if keyword in item:
            kept[keyword] = item[keyword]
    return kept


def _legal(header: Any, keyword: str) -> str:
    """A value as text; dates, times and sexes that are none are left empty, as the standard allows."""
    from pydicom.valuerep import DA, TM

    value = str(header.get(keyword) or "").strip()
    try:
        if value and keyword.endswith("Date"):
            DA(value)
        if value and keyword.endswith("Time"):
            TM(value)
    except ValueError:
        return ""
    return "" if keyword == "PatientSex" and value not in ("M", "F", "O") else value


def _finish(made: Any, source: Any, salt: str | None) -> None:
    """Patient and study exactly as in `source`, whichever way highdicom would have copied them."""
    for keyword in (*PATIENT, *STUDY):
        if keyword in source:
            setattr(made, keyword, source[keyword].value)
    made.SpecificCharacterSet = source.SpecificCharacterSet
    if salt is not None:
        made.PatientIdentityRemoved, made.DeidentificationMethod = "YES", REMOVED
        made.LongitudinalTemporalInformationModified = "REMOVED"


def _reference(file: DicomFile, source: Any, frame: int) -> Any:
    import pydicom

    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    if file.frames > 1:
        item.ReferencedFrameNumber = frame + 1
    item.PurposeOfReferenceCodeSequence = [_coded(("121322", "DCM", "Source image for image processing operation"))]
    return item


# ---- what belongs to the result


def _identity(algorithm: Algorithm, series_number: int) -> dict[str, Any]:
    """New UIDs, and the equipment: its serial number is the hash of the adapter."""
    import highdicom

    import adaptsuite

    return {
        "series_instance_uid": highdicom.UID(),
        "series_number": series_number,
        "sop_instance_uid": highdicom.UID(),
        "instance_number": 1,
        "manufacturer": "adaptsuite",
        "manufacturer_model_name": algorithm.name,
        "software_versions": adaptsuite.__version__,
        "device_serial_number": algorithm.adapter_sha256,
        "series_description": algorithm.name,
    }


def _check_words(labels: Sequence[Label], algorithm: Algorithm, salt: str | None) -> None:
    """Raises UsageError for what the elements of DICOM cannot hold, and for a salt that can be guessed."""
    for word in (*(label.name for label in labels), algorithm.name, algorithm.version):
        if not word.strip() or len(word) > LONGEST_LABEL or "\\" in word or not word.isprintable():
            raise UsageError(f"{word!r} is not 1 to {LONGEST_LABEL} printable characters without backslashes")
    for name, value in algorithm.parameters.items():
        if {",", "=", "\\"} & set(f"{name}{value}"):
            raise UsageError(f"setting {name}={value} holds a comma, an equals sign or a backslash")
    for digest in (algorithm.adapter_sha256, algorithm.base_sha256):
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise UsageError(f"{digest!r} is not a sha256 in hexadecimal")
    if salt is not None and len(salt) < SHORTEST_SALT:
        raise UsageError(f"a salt of {len(salt)} characters can be guessed, at least {SHORTEST_SALT} are needed")


def _coded(code: Code) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(value=code[0], scheme_designator=code[1], meaning=code[2])


def _segments(mask: Volume, labels: Sequence[Label]) -> np.ndarray:
    """(F, H, W) of the source's frames."""
    if not mask.files or mask.values.ndim != 3:
        raise UsageError(f"{mask.name}: is not on the grid of its DICOM files; `on_grid` brings a mask back there")
    values = mask.values.numpy()
    if not np.array_equal(values, values.round()) or values.min() < 0 or values.max() > len(labels) or not labels:
        raise UsageError(f"{mask.name}: holds other values than 0 to {len(labels)}, the number of labels")
    if len(mask.files) > 1 and any(file.frames > 1 for file in mask.files):
        raise DataError(f"{mask.name}: slices in several multi-frame files: a SEG refers to one, or to single slices")
    if mask.files[0].frames == 1:
        return values.astype(np.uint8 if len(labels) < 256 else np.uint16)
    whole = np.zeros((mask.files[0].frames, *values.shape[1:]), np.uint8 if len(labels) < 256 else np.uint16)
    whole[list(mask.frames)] = values
    return whole


def _segment(number: int, label: Label, algorithm: Algorithm) -> Any:
    import highdicom
    from pydicom.sr.codedict import codes

    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=label.name,
        segmented_property_category=_coded(label.category),
        segmented_property_type=_coded(label.code),
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name=algorithm.name,
            version=algorithm.version,
            family=codes.DCM.ArtificialIntelligence,
            source="adaptsuite",
            parameters=algorithm.parameters,
        ),
    )


def _pixels(found: Any, uids: Sequence[str], mask: Volume) -> np.ndarray:
    """Labels (F, H, W) of a segmentation, of the source's instances or of the frames of the one it has."""
    options = {"combine_segments": True, "assert_missing_frames_are_empty": True, "ignore_spatial_locations": True}
    if len(uids) == 1 and mask.files[0].frames > 1:
        frames = range(1, mask.files[0].frames + 1)
        return found.get_pixels_by_source_frame(uids[0], source_frame_numbers=list(frames), **options)
    return found.get_pixels_by_source_instance(uids, **options)


def _report(files: Sequence[DicomFile], sources: Sequence[Any], findings: Sequence[Finding], algorithm: Algorithm):
    from highdicom import sr
    from pydicom.sr.codedict import codes

    device = sr.DeviceObserverIdentifyingAttributes(
        uid=f"2.25.{int(algorithm.adapter_sha256[:32], 16)}",
        name=algorithm.name,
        manufacturer_name="adaptsuite",
        model_name=f"base {algorithm.base_sha256}",
        serial_number=algorithm.adapter_sha256,
    )
    observer = sr.ObserverContext(codes.DCM.Device, observer_identifying_attributes=device)
    return sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_coded(PROCEDURES.get(files[0].modality, IMAGING)),
        imaging_measurements=[_group(number, files, sources, f, algorithm) for number, f in enumerate(findings, 1)],
        title=codes.DCM.ImagingMeasurementReport,
    )


def _group(
    number: int, files: Sequence[DicomFile], sources: Sequence[Any], finding: Finding, algorithm: Algorithm
) -> Any:
    import highdicom
    from highdicom import sr
    from pydicom.sr.codedict import codes

    numbers, decision = _frame_numbers(files, finding), []
    if finding.present is not None:
        value = codes.cid241.Present if finding.present else codes.cid241.Absent
        decision = [sr.QualitativeEvaluation(name=_coded(Label("decision").code), value=value)]
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=highdicom.UID(), identifier=f"{finding.label.name} {number}"),
        finding_type=_coded(finding.label.code),
        algorithm_id=sr.AlgorithmIdentification(
            name=algorithm.name,
            version=algorithm.version,
            parameters=[f"{name}={value}" for name, value in algorithm.parameters.items()],
        ),
        measurements=[
            sr.Measurement(name=_coded(Label(name).code), value=float(value), unit=_coded((unit, "UCUM", unit)))
            for name, (value, unit) in finding.values.items()
        ],
        qualitative_evaluations=decision,
        source_images=[
            sr.SourceImageForMeasurementGroup(s.SOPClassUID, s.SOPInstanceUID, referenced_frame_numbers=numbers)
            for s in (sources if finding.file is None else [sources[finding.file]])
        ],
    )


def _frame_numbers(files: Sequence[DicomFile], finding: Finding) -> list[int] | None:
    return None if finding.frame is None or files[finding.file].frames == 1 else [finding.frame + 1]


def _numbers(finding: Finding) -> list[float]:
    return [round(float(value), DIGITS) for value, _ in finding.values.values()]


# ---- writing


def _publish(path: str | Path, made: Any, same: Callable[[bytes], bool]) -> Path:
    """Encodes, reads back, compares, and only then lets the file appear. Raises Inexact when something is lost."""
    import pydicom

    path, buffer = Path(path), io.BytesIO()
    with _quoting_nothing("the result cannot be encoded"):
        made.save_as(buffer, enforce_file_format=True)
        again = pydicom.dcmread(io.BytesIO(buffer.getvalue()))
        kept = all(str(again.get(k)) == str(made.get(k)) for k in (*PATIENT, *STUDY, *UIDS, "SeriesDescription"))
        if not (kept and same(buffer.getvalue())):
            raise Inexact("the result does not read back as it was written")
    return write_file(path, buffer.getvalue())


@contextlib.contextmanager
def _quoting_nothing(what: str) -> Iterator[None]:
    """Errors of pydicom and highdicom quote the values that they do not like."""
    try:
        with quiet():
            yield
    except (DataError, Inexact):
        raise
    except Exception as error:
        raise DataError(f"{what} ({type(error).__name__})") from None


def _decoded(content: bytes) -> np.ndarray:
    import pydicom

    return pydicom.dcmread(io.BytesIO(content)).pixel_array
