"""What an adapter said of a series, and the files that it becomes: each read back by other libraries than ours."""

import json
from dataclasses import replace
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.data import get_testdata_file

from adaptsuite.errors import UsageError
from adaptsuite.medical import dicom, dicom_out, results
from adaptsuite.medical.deliver import MOST_OVERLAYS, deliver, findings, fitting, require_fitting, write_findings
from adaptsuite.medical.studies import open_folder

SAMPLES = Path(get_testdata_file("DICOMDIR")).parent
CLIP = get_testdata_file("examples_ybr_color.dcm")
CT5N = SAMPLES / "98892001" / "CT5N"


def series_of(path):
    return open_folder(path).studies[0].series[0]


@pytest.fixture
def nifti(tmp_path):
    """A head of 6 slices with voxels of 1.5 x 2 x 3 mm."""
    values = np.full((9, 8, 6), -100, np.float32)
    values[2:5, 3:6, 1:4] = 200
    affine = np.array([[-1.5, 0, 0, 10], [0, 2, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1.0]])
    nibabel.Nifti1Image(values, affine).to_filename(tmp_path / "head.nii")
    return tmp_path / "head.nii"


# ---- results


def test_a_finding_sums_its_classes_and_the_series_is_of_the_mean_logits():
    rng, series = np.random.default_rng(0), series_of(CLIP)
    logits = rng.normal(size=(30, 3)) * 2
    points = (results.Point("tumour", (0, 2), 0.6, "f1"), results.Point("cyst", (1,), 0.3, "f1"))
    found = results.of_logits(
        series, [(0, k) for k in range(30)], logits, ("benign", "cyst", "malignant"), "multiclass", points
    )
    for rows, said in ((logits, found.scores), (logits.mean(0, keepdims=True), found.whole[None])):
        for row, scores in zip(rows, said, strict=True):
            e = [np.exp(v) for v in row]
            assert scores == pytest.approx([(e[0] + e[2]) / sum(e), e[1] / sum(e)], abs=1e-12)
    assert found.present(0, 4) == (found.scores[4, 0] >= 0.6) and found.present(1) == (found.whole[1] >= 0.3)
    assert found.numbers == pytest.approx(found.probabilities[-1], abs=1e-6)


def test_areas_and_volumes_count_pixels_and_voxels_in_millimetres(bright):
    series = series_of(CT5N)
    found, volume = bright.read(series), series.volume()
    ds = [pydicom.dcmread(f) for f in CT5N.iterdir()]
    heights = sorted(float(d.ImagePositionPatient[2]) for d in ds)
    pixel = float(ds[0].PixelSpacing[0]) * float(ds[0].PixelSpacing[1])
    total = 0
    for i in range(5):
        count = sum(v > -50 for v in volume.values[i].flatten().tolist())
        total += count
        assert found.measures(i)["bright"]["area_mm2"] == pytest.approx(count * pixel, rel=1e-5)
        assert found.scores[i, 0] == pytest.approx(count / volume.values[i].numel())
    ml = total * pixel * (heights[-1] - heights[0]) / 4 / 1000
    assert found.measures()["bright"]["volume_ml"] == pytest.approx(ml, rel=1e-4) and ml > 0.05
    assert found.whole[0] == found.scores.max()


def test_a_clip_without_spacing_has_shares_and_no_areas(bright):
    found = bright.read(series_of(CLIP))
    file = found.series.files[0]
    assert file.spacing_mm is None and found.measures(3) == found.measures() == {"bright": {}}
    scaled = replace(file, spacing_mm=(0.5, 0.25))
    mask = results.clip_mask(scaled, found.masks[0].values)
    own = replace(found, series=replace(found.series, files=(scaled,)), masks=(mask,))
    assert own.measures(3)["bright"]["area_mm2"] == pytest.approx(np.count_nonzero(found.mask_of(3)) * 0.125)


def test_thresholds_that_were_not_chosen_say_so():
    columns = {"a": [0], "b": [1], "c": [2]}
    kept = {"a": {"value": 0.2, "target": "f1", "reached": True}, "b": {"value": None, "target": "ppv>=0.9"}}
    a, b, c = results.points_of(columns, kept)
    assert (a.threshold, a.source) == (0.2, "f1 on validation rows")
    assert (b.threshold, b.source) == (0.5, "not chosen on validation rows: ppv>=0.9 was not reached")
    assert (c.threshold, c.source) == (0.5, "not chosen on validation rows")


# ---- files


def test_a_ct_mask_becomes_a_seg_that_gives_the_same_mask(bright, tmp_path):
    found = bright.read(series_of(CT5N))
    (path,) = deliver(tmp_path, found, "seg", bright.algorithm)
    again, labels = dicom_out.read_seg(path, found.series.volume())
    assert torch.equal(again.values, found.masks[0].values) and labels == ("bright",) and again.values.any()
    seg = highdicom.seg.segread(path)
    assert {f.PlanePositionSequence[0].ImagePositionPatient[2] for f in seg.PerFrameFunctionalGroupsSequence} <= {
        float(pydicom.dcmread(f).ImagePositionPatient[2]) for f in CT5N.iterdir()
    }


def test_a_clip_becomes_a_report_with_a_group_for_each_frame(brightness, tmp_path):
    found = brightness.read(series_of(CLIP))
    (path,) = deliver(tmp_path, found, "sr", brightness.algorithm)
    groups = highdicom.sr.srread(path).content.get_image_measurement_groups()
    assert len(groups) == 31 and groups[0].source_images[0].referenced_frame_numbers is None
    assert [g.source_images[0].referenced_frame_numbers for g in groups[1:]] == [[k + 1] for k in range(30)]
    for group, score in zip(groups, [found.whole[0], *found.scores[:, 0]], strict=True):
        (number,) = group.get_measurements()
        (decision,) = group.get_qualitative_evaluations()
        assert float(number.value) == pytest.approx(score, abs=1e-6) and group.finding_type.meaning == "lesion"
        assert decision.value.meaning == ("Present" if score >= 0.4 else "Absent")
    assert pydicom.dcmread(path).ContentTemplateSequence[0].TemplateIdentifier == "1500"


def test_a_report_on_a_series_names_the_file_of_each_slice_and_all_of_them(brightness, tmp_path):
    found = brightness.read(series_of(CT5N))
    (path,) = deliver(tmp_path, found, "sr", brightness.algorithm)
    groups = highdicom.sr.srread(path).content.get_image_measurement_groups()
    uids = [f.uid for f in found.series.files]
    assert [i.referenced_sop_instance_uid for i in groups[0].source_images] == uids
    assert [g.source_images[0].referenced_sop_instance_uid for g in groups[1:]] == uids
    evidence = pydicom.dcmread(path).CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0]
    assert {item.ReferencedSOPInstanceUID for item in evidence.ReferencedSOPSequence} == set(uids)


def test_a_report_on_masks_has_areas_of_the_frames_that_show_it(bright, tmp_path):
    found = bright.read(series_of(CT5N))
    found.masks[0].values[2] = 0
    found.scores[2] = 0
    said = findings(found)
    assert [f.file for f in said if f.frame is not None] == [place[0] for i, place in enumerate(found.places) if i != 2]
    assert set(said[0].values) == {"largest share of a frame", "volume"} and said[0].values["volume"][1] == "ml"
    assert said[1].values["area"] == (found.measures(0)["bright"]["area_mm2"], "mm2")
    assert dicom_out.read_sr(deliver(tmp_path, found, "sr", bright.algorithm)[0])[0][1] == "bright"


def test_without_a_known_finding_a_report_has_the_classes_and_no_decision(brightness):
    found = replace(brightness.read(series_of(CLIP)), points=())
    said = findings(found)
    assert [(f.label.name, f.present) for f in said[:2]] == [("normal", None), ("lesion", None)] and len(said) == 62


def test_overlays_are_of_the_frames_with_the_largest_areas(bright, tmp_path):
    found = bright.read(series_of(CLIP))
    paths = deliver(tmp_path, found, "overlay", bright.algorithm)
    areas = [np.count_nonzero(found.mask_of(i)) for i in range(30)]
    largest = sorted(sorted(range(30), key=lambda i: -areas[i])[:MOST_OVERLAYS])
    shown = [pydicom.dcmread(p).SourceImageSequence[0].ReferencedFrameNumber - 1 for p in paths]
    assert shown == largest
    frame, mask = dicom.read(found.series.files[0], [shown[0]])[0], found.mask_of(shown[0])
    assert np.array_equal(pydicom.dcmread(paths[0]).pixel_array, dicom_out.draw(frame, mask))


def test_a_nifti_mask_keeps_spacing_and_place(bright, nifti, tmp_path):
    found = bright.read(series_of(nifti))
    (path,) = deliver(tmp_path / "out", found, "nifti", bright.algorithm)
    image, source = nibabel.load(path), nibabel.load(nifti)
    assert np.allclose(image.affine, source.affine) and image.header.get_zooms() == (1.5, 2.0, 3.0)
    assert np.array_equal(np.asarray(image.dataobj), np.asarray(source.dataobj) > -50)
    assert found.measures()["bright"]["volume_ml"] == pytest.approx(27 * 9 / 1000)


def test_findings_json_has_every_frame_and_says_what_was_decided(brightness, tmp_path):
    found = brightness.read(series_of(CLIP))
    path = write_findings(tmp_path, {"study": "x"}, [found])
    (series,) = json.loads(path.read_text())["series"]
    assert [(f["file"], f["frame"]) for f in series["frames"]] == [("examples_ybr_color.dcm", k) for k in range(30)]
    whole = series["whole"]["findings"]["lesion"]
    assert whole == {"probability": round(found.whole[0], 6), "present": bool(found.whole[0] >= 0.4)}


# ---- formats that do not fit


@pytest.mark.parametrize(
    ("source", "segments", "form", "reason"),
    [
        (CLIP, True, "seg", "this US has no slices with a place .* take sr or overlay or json"),
        (CLIP, True, "nifti", "this US has no slices with a place .* take sr or overlay or json"),
        (CLIP, False, "seg", "the adapter gives labels, no masks: take sr or json"),
        (CT5N, False, "overlay", "the adapter gives labels, no masks: take sr or json"),
        (CT5N, False, "nifti", "the adapter gives labels, no masks: take sr or json"),
        ("nifti", True, "sr", "a NIfTI file names no study .* take nifti or json"),
        ("nifti", True, "seg", "a NIfTI file names no study .* take nifti or json"),
        ("nifti", False, "nifti", "the adapter gives labels, no masks: take json"),
        (CLIP, True, "dicom", "--format dicom is not known; there is: json, nifti, overlay, seg, sr"),
    ],
)
def test_a_format_that_does_not_fit_is_refused_with_those_that_do(nifti, source, segments, form, reason):
    series = series_of(nifti if source == "nifti" else source)
    with pytest.raises(UsageError, match=reason) as error:
        require_fitting(series, form, segments)
    assert "\n" not in str(error.value) and form not in fitting(series, segments)
