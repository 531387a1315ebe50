"""Generated ultrasound of patients with and without a lesion: speckle, layers, shadows, masks, and a clip as DICOM.

Frames of one patient show one lesion from slightly different places, so they resemble each other as real ones do: who
counts them as independent gets intervals that are too narrow. Nothing here looks like anybody.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptsuite.manifest import write_csv

SIZE = 128  # px of a side
SITES = ("A", "B")


@dataclass(frozen=True)
class Patient:
    """What stays the same in all frames of one patient."""

    seed: int
    lesion: bool
    centre: tuple[float, float]  # y, x in shares of the side
    radii: tuple[float, float]
    angle: float
    rough: float  # how much the border departs from an ellipse
    echo: float  # brightness of the lesion over that of tissue
    gain: float  # of the machine
    site: str
    age: int


def sample_patient(rng: np.random.Generator, lesion: bool) -> Patient:
    """A lesion is an ellipse of 8 to 22 % of the side, darker than tissue; the darker and rougher ones are easy."""
    site = SITES[int(rng.random() < 0.4)]
    return Patient(
        seed=int(rng.integers(1 << 31)),
        lesion=lesion,
        centre=(float(rng.uniform(0.3, 0.65)), float(rng.uniform(0.3, 0.7))),
        radii=tuple(float(r) for r in rng.uniform(0.08, 0.22, 2)),
        angle=float(rng.uniform(0, np.pi)),
        rough=float(rng.uniform(0.02, 0.2)),
        echo=float(2 ** rng.uniform(-4, -1)),
        gain=float(rng.normal(1.0 if site == "A" else 0.8, 0.08)),
        site=site,
        age=int(np.clip(rng.normal(55, 14), 19, 90)),
    )


def frames(patient: Patient, count: int, size: int = SIZE) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(picture (size, size) uint8, mask (size, size) bool) of a sweep over the patient."""
    from scipy.ndimage import gaussian_filter

    fixed, moving = np.random.default_rng(patient.seed), np.random.default_rng(patient.seed + 1)
    y, x = np.mgrid[:size, :size] / size
    layers = gaussian_filter(fixed.normal(size=(size, size)), (size / 40, size / 5))
    layers = np.exp(0.9 * layers / layers.std() * (0.4 + 0.6 * (y < 0.3)))
    waves = fixed.normal(0, patient.rough, 6)
    phases = fixed.uniform(0, 2 * np.pi, 6)
    for _ in range(count):
        dy, dx = moving.normal(0, 0.02, 2)
        scale = moving.normal(1, 0.08)
        v, u = y - patient.centre[0] - dy, x - patient.centre[1] - dx
        cos, sin = np.cos(patient.angle), np.sin(patient.angle)
        a, b = (cos * u + sin * v) / patient.radii[1], (cos * v - sin * u) / patient.radii[0]
        theta = np.arctan2(b, a)
        border = 1 + sum(w * np.cos((k + 2) * theta + p) for k, (w, p) in enumerate(zip(waves, phases, strict=True)))
        inside = np.hypot(a, b) < border * scale
        mask = inside & patient.lesion
        reflect = np.roll(layers, (int(dy * size), int(dx * size)), (0, 1))
        reflect = np.where(mask, patient.echo * reflect**0.3, reflect).clip(0.02)
        if patient.lesion:  # what lies behind a lesion gets less
            depth = np.maximum.accumulate(mask, 0) & ~mask
            reflect = np.where(depth, reflect * (1 - 0.25 * (1 - patient.echo)), reflect)
        coherent = moving.normal(size=(4, size, size)) * np.sqrt(reflect)
        envelope = np.sqrt((gaussian_filter(coherent, (0, 0.8, 1.6)) ** 2).sum(0))
        decibel = 20 * np.log10(envelope / np.quantile(envelope, 0.99) + 1e-3) - 6 * y
        picture = (decibel + 36) / 36 * 200 * patient.gain
        yield picture.clip(0, 255).astype(np.uint8), mask


def make_dataset(folder: str | Path, patients: int = 60, count: int = 4, size: int = SIZE, seed: int = 0) -> Path:
    """Writes pictures, masks and manifest.csv (path, label, split, group, mask, site, age); returns the table's path.

    Half of the patients have a lesion. Split by patient: half train, a quarter val, a quarter test.
    """
    from PIL import Image

    folder, rng, rows = Path(folder), np.random.default_rng(seed), []
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for p in range(patients):
        patient = sample_patient(rng, lesion=bool(p % 2))
        split = ("train", "train", "val", "test")[p // 2 % 4]
        for i, (picture, mask) in enumerate(frames(patient, count, size)):
            name = f"{p:03d}-{i}.png"
            Image.fromarray(picture).save(folder / "images" / name)
            if patient.lesion:
                Image.fromarray(mask).save(folder / "masks" / name)
            rows.append(
                {
                    "path": f"images/{name}",
                    "label": "lesion" if patient.lesion else "normal",
                    "split": split,
                    "group": f"patient{p:03d}",
                    "mask": f"masks/{name}" if patient.lesion else "",
                    "site": patient.site,
                    "age": patient.age,
                }
            )
    write_csv(folder / "manifest.csv", rows)
    return folder / "manifest.csv"


def write_clip(path: str | Path, patient: Patient, count: int = 12, size: int = SIZE) -> Path:
    """A multi-frame ultrasound DICOM file of an invented study; its identifiers follow from the patient's seed."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

    pictures = np.stack([picture for picture, _ in frames(patient, count, size)])
    study, series, instance = (generate_uid(entropy_srcs=[str(patient.seed), name]) for name in ("a", "b", "c"))
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UltrasoundMultiFrameImageStorage, instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = Dataset()
    file.file_meta = meta
    values = {
        "SOPClassUID": UltrasoundMultiFrameImageStorage,
        "SOPInstanceUID": instance,
        "StudyInstanceUID": study,
        "SeriesInstanceUID": series,
        "Modality": "US",
        "PatientName": "Generated^Nobody",
        "PatientID": f"GENERATED-{patient.seed}",
        "PatientBirthDate": "",
        "PatientSex": "",
        "StudyDate": "20000101",
        "StudyTime": "000000",
        "AccessionNumber": "",
        "ReferringPhysicianName": "",
        "StudyID": "1",
        "SeriesNumber": 1,
        "InstanceNumber": 1,
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "BurnedInAnnotation": "NO",
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": size,
        "Columns": size,
        "NumberOfFrames": count,
        "FrameTime": 40,
        "FrameIncrementPointer": 0x00181063,
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": pictures.tobytes(),
    }
    for keyword, value in values.items():
        setattr(file, keyword, value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path
