"""Study folders: what is in them, and what is not, without a word of their headers."""

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.uid import generate_uid

from adaptsuite.errors import DataError
from adaptsuite.medical.dicom import quiet
from adaptsuite.medical.studies import NIFTI, open_folder

SAMPLES = Path(get_testdata_file("DICOMDIR")).parent
CLIP = get_testdata_file("examples_ybr_color.dcm")


def changed(source, path, **changes):
    ds = pydicom.dcmread(get_testdata_file(source))
    with quiet():
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path)
    return path


def test_files_are_grouped_by_study_and_series_wherever_they_lie(tmp_path):
    ct, mr = generate_uid(), generate_uid()
    for i, where in enumerate(("a/b/1", "a/2", "c/3")):
        place = {"ImagePositionPatient": [0, 0, 5 * i], "SOPInstanceUID": generate_uid()}
        changed("CT_small.dcm", tmp_path / where, StudyInstanceUID="1.2.3", SeriesInstanceUID=ct, **place)
    changed("MR_small.dcm", tmp_path / "c" / "4", StudyInstanceUID="1.2.3", SeriesInstanceUID=mr)
    shutil.copy(CLIP, tmp_path / "clip.dcm")
    found = open_folder(tmp_path)
    assert [[(s.modality, len(s.files)) for s in study.series] for study in found.studies] == [
        [("US", 1)],
        [("CT", 3), ("MR", 1)],
    ]
    assert found.studies[1].uid == "1.2.3" and len({s.key for study in found.studies for s in study.series}) == 3
    assert found.studies[1].series[0].volume().shape == (3, 128, 128) and not found.skipped
    assert [row["frames"] for row in found.summary()] == [30, 3, 1]
    assert "1.2.3" not in repr(found) and ct not in repr(found)


def test_what_cannot_be_used_is_listed_with_its_reason(tmp_path):
    shutil.copy(get_testdata_file("DICOMDIR"), tmp_path / "DICOMDIR")
    shutil.copy(CLIP, tmp_path / "clip")
    (tmp_path / "cut.dcm").write_bytes(Path(get_testdata_file("CT_small.dcm")).read_bytes()[:20000])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").touch()
    for name, to in (("reportsi.dcm", "sr.dcm"), ("liver_1frame.dcm", "seg.dcm"), ("rtdose.dcm", "dose.dcm")):
        shutil.copy(get_testdata_file(name), tmp_path / to)
    changed("CT_small.dcm", tmp_path / "none.dcm", StudyInstanceUID="")
    changed("CT_small.dcm", tmp_path / "scout.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    found = open_folder(tmp_path)
    reasons = {s["file"]: s["reason"] for s in found.skipped if "DICOMDIR" not in s["file"]}
    assert [s.modality for study in found.studies for s in study.series] == ["US"]
    assert {name: reason.split(" ")[0] for name, reason in reasons.items()} == {
        "cut.dcm": "truncated:",
        "notes.txt": "not",
        "empty": "the",
        "sr.dcm": "holds",
        "seg.dcm": "holds",
        "dose.dcm": "holds",
        "none.dcm": "has",
        "scout.dcm": "a",
    }
    assert any(s["file"] == "DICOMDIR" and "a list of files" in s["reason"] for s in found.skipped)


def test_all_samples_of_a_real_disc_are_found():
    found = open_folder(SAMPLES)
    assert sum(len(s.files) for study in found.studies for s in study.series) + len(found.skipped) >= 31
    assert {s.modality for study in found.studies for s in study.series} == {"CT", "MR", "CR"}


def test_a_nifti_file_is_a_study_of_its_own(tmp_path):
    nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.diag([1, 2, 3, 1])).to_filename(tmp_path / "head.nii.gz")
    shutil.copy(CLIP, tmp_path / "clip")
    found = open_folder(tmp_path)
    ((us,), (nifti,)) = (study.series for study in found.studies)
    assert (us.modality, nifti.modality, nifti.name) == ("US", NIFTI, "head.nii.gz") and not found.skipped
    assert nifti.volume().shape == (6, 5, 4) and nifti.placed and not us.placed
    alone = open_folder(tmp_path / "head.nii.gz").studies[0]
    assert alone.key == found.studies[1].key and len(alone.uid) == 64


def test_a_single_dicom_file_is_a_study():
    found = open_folder(CLIP)
    assert found.studies[0].series[0].files[0].frames == 30 and found.name == "examples_ybr_color.dcm"
    with pytest.raises(DataError, match="no such file"):
        open_folder("nowhere.dcm")


def test_names_that_tell_the_patient_are_withheld(tmp_path):
    folder = tmp_path / "CompressedSamples_CT1"  # the name of the patient of CT_small
    folder.mkdir()
    shutil.copy(get_testdata_file("CT_small.dcm"), folder / "CompressedSamples.dcm")
    (folder / "CompressedSamples.txt").write_text("x")
    found = open_folder(folder)
    said = [found.name, repr(found), *(s["file"] for s in found.skipped), *(str(s) for s in found.summary())]
    assert not [text for text in said if "ompressed" in text] and "***" in found.name


def test_messages_are_cleaned_of_paths_and_of_text_of_headers(tmp_path):
    folder = tmp_path / "CompressedSamples_CT1"
    folder.mkdir()
    shutil.copy(get_testdata_file("CT_small.dcm"), folder / "1.dcm")
    found = open_folder(folder)
    assert found.clean(f"{folder}/1.dcm: is odd") == "1.dcm: is odd"
    assert "ompressed" not in found.clean(f"no such folder: {folder}/x")
    assert found.clean("patient CompressedSamples^CT1 is odd") == "the reason is withheld: it holds text of a header"
