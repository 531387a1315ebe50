"""Readers of series without a network, so that what they say can be computed by hand; and a study that says a lot."""

import numpy as np
import pydicom
import pytest
import torch
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from adaptsuite.medical import dicom, results
from adaptsuite.medical.dicom_out import Algorithm

LEVEL = -50  # HU, above which a voxel of a volume is in the mask
GREY = 100  # of a clip


class Brightness:
    """Two classes by the mean brightness of a frame: logits (0, mean / 64 - 1)."""

    classes, segments, temperature, window = ("normal", "lesion"), False, 1.0, None
    points = (results.Point("lesion", (1,), 0.4, "sensitivity>=0.95 on validation rows"),)
    algorithm = Algorithm("brightness", "1", "ab" * 32, "cd" * 32, {"threshold 1": "0.4"})

    def read(self, series):
        places, logits = [], []
        for i, file in enumerate(series.files):
            for k, frame in enumerate(dicom.frames(file)):
                places.append((i, k))
                logits.append((0.0, frame.mean() / 64 - 1))
        if series.nifti is not None:
            values = series.volume().values
            places, logits = [None] * len(values), [(0.0, float(v.mean()) / 64 - 1) for v in values]
        return results.of_logits(series, places, np.array(logits), self.classes, "multiclass", self.points)


class Bright:
    """A mask of what is brighter than LEVEL, in clips than GREY."""

    classes, segments, temperature, window = ("bright",), True, 1.0, None
    points = (results.Point("bright", (0,), 0.05, "f1 on validation rows"),)
    algorithm = Algorithm("bright", "1", "12" * 32, "34" * 32, {"threshold 1": "0.05"})

    def read(self, series):
        if series.placed:
            volume = series.volume()
            masks = [volume.with_values(volume.values > LEVEL)]
        else:
            masks = []
            for file in series.files:
                frames = np.stack([frame.max(-1) for frame in dicom.frames(file)])
                masks.append(results.clip_mask(file, torch.from_numpy(frames > GREY)))
        shares = np.concatenate([mask.values.flatten(1).mean(1).numpy()[:, None] for mask in masks])
        return results.of_masks(series, masks, shares, self.classes, self.points)


@pytest.fixture
def brightness():
    return Brightness()


@pytest.fixture
def bright():
    return Bright()


@pytest.fixture
def talkative():
    """`talkative(folder)` writes two slices that say a lot about somebody into a folder."""

    def write(folder):
        ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
        ds.PatientName, ds.PatientBirthDate, ds.AccessionNumber = "Müller^Jürgen", "19501231", "ACC4711"
        ds.SpecificCharacterSet, ds.OtherPatientIDs, ds.PatientAddress = "ISO_IR 100", "OTHER99", "Gasse 7"
        ds.PatientID, ds.PatientComments, ds.EthnicGroup = "PID-0815", "is afraid of needles", "from Mars"
        ds.ReferringPhysicianName, ds.Occupation = "Weiß^Anna", "glass blower"
        folder.mkdir(parents=True)
        for i in range(2):
            ds.ImagePositionPatient, ds.SOPInstanceUID = [0.0, 0.0, 5.0 * i], generate_uid()
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.save_as(folder / f"{i}.dcm")
        return folder

    return write
