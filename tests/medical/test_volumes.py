"""Volumes: where voxels lie, against the geometry of the files; back to the original grid; folders."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from adaptsuite.errors import DataError, UsageError
from adaptsuite.medical import dicom
from adaptsuite.medical import volumes as v
from adaptsuite.medical.volumes import Volume

SAMPLES = Path(get_testdata_file("DICOMDIR")).parent
NIFTI = Path(nibabel.__file__).parent / "tests" / "data"
AXIAL = (1, 0, 0, 0, 1, 0)
LPS_TO_RAS = np.array([-1, -1, 1])


def series(folder, positions, axes=AXIAL, size=(6, 5), spacing=(2.0, 3.0), **changes):
    """Files 000.dcm, ... of one CT series whose pixels are all different."""
    template = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    template.SeriesInstanceUID, template.Rows, template.Columns = generate_uid(), *size
    template.PixelSpacing, template.ImageOrientationPatient = list(spacing), list(axes)
    for i, position in enumerate(positions):
        template.SOPInstanceUID = template.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        template.ImagePositionPatient, template.InstanceNumber = [float(p) for p in position], i + 1
        template.PixelData = (np.arange(math.prod(size)) + 100 * i).astype("<i2").tobytes()
        for keyword, value in changes.items():
            setattr(template, keyword, value)
        template.save_as(folder / f"{i:03}.dcm")
    return [dicom.inspect(path) for path in sorted(folder.glob("*.dcm"))]


def phantom(shape=(5, 6, 7), affine=None, channels=()):
    values = torch.arange(math.prod((*channels, *shape)), dtype=torch.float32).reshape(*channels, *shape)
    return Volume(values, np.diag([3.0, 2.0, 1.0, 1.0]) if affine is None else affine)


# ---- series


def test_slices_are_ordered_by_position_and_not_by_name():
    files = [dicom.inspect(path) for path in sorted((SAMPLES / "98892001" / "CT5N").iterdir())]
    volume = v.read_series(files)
    assert volume.shape == (5, 16, 16) and volume.values.dtype == torch.float32 and volume.modality == "CT"
    heights = [float(pydicom.dcmread(file.path).ImagePositionPatient[2]) for file in volume.files]
    assert heights == sorted(heights) and [f.path.name for f in volume.files] == [f.path.name for f in files][::-1]
    for values, file in zip(volume.values, volume.files, strict=True):
        ds = pydicom.dcmread(file.path)
        assert np.array_equal(values, ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept))
    assert volume.spacing_mm == pytest.approx((2.5, 0.488281, 0.488281)) and volume.codes == "SPL"


@pytest.mark.parametrize("seed", range(4))
def test_every_voxel_lies_where_the_standard_says(tmp_path, seed):
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    row, column, normal = turn[0], turn[1], np.cross(turn[0], turn[1])
    origin, order = rng.normal(size=3) * 50, rng.permutation(4)
    positions = [origin + 2.5 * k * normal for k in order]
    files = series(tmp_path, positions, axes=(*row, *column), spacing=(2.0, 3.0))
    volume = v.read_series(files)
    for d, h, w in itertools.product(range(4), range(6), range(5)):
        place = origin + 2.5 * d * normal + 2.0 * h * column + 3.0 * w * row  # PS3.3 C.7.6.2.1.1, in LPS
        np.testing.assert_allclose((volume.affine @ (d, h, w, 1))[:3], place * LPS_TO_RAS, atol=1e-4)
        stored = 5 * h + w + 100 * int(np.flatnonzero(order == d)[0])
        assert volume.values[d, h, w] == stored - 1024


def test_one_slice_is_a_volume_as_thick_as_it_says():
    volume = v.read_volume(get_testdata_file("CT_small.dcm"))
    assert volume.shape == (1, 128, 128) and volume.spacing_mm == pytest.approx((5, 0.661468, 0.661468))


def test_localizers_are_set_aside_and_said(tmp_path):
    series(tmp_path, [(0, 0, z) for z in (5, 10, 15, 20)])
    scout = pydicom.dcmread(tmp_path / "003.dcm")
    scout.ImageType, scout.ImageOrientationPatient = ["ORIGINAL", "PRIMARY", "LOCALIZER"], [0, 1, 0, 0, 0, -1]
    scout.save_as(tmp_path / "003.dcm")
    volume = v.read_volume(tmp_path)
    assert volume.shape == (3, 6, 5) and volume.notes == ("1 localizers were set aside: 003.dcm",)


def test_a_tilted_gantry_is_kept_in_the_affine_and_said(tmp_path):
    volume = v.read_series(series(tmp_path, [(0, 2 * k, 5 * k) for k in range(4)]))
    np.testing.assert_allclose(volume.affine[:3, 0], (0, -2, 5))
    assert "gantry tilt" in volume.notes[0] and "21.8 degrees" in volume.notes[0]


def test_colour_slices_have_their_channels_in_front(tmp_path):
    files = series(tmp_path, [(0, 0, 0), (0, 0, 5)])
    for file in files:
        ds = pydicom.dcmread(file.path)
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated = ds.BitsStored = 8
        ds.PixelRepresentation, ds.PixelData = 0, bytes(range(90))
        del ds.PixelPaddingValue
        ds.save_as(file.path)
    volume = v.read_volume(tmp_path)
    assert volume.values.shape == (3, 2, 6, 5) and volume.shape == (2, 6, 5)
    assert volume.values[:, 0, 0, 1].tolist() == [3, 4, 5]


def enhanced(path, heights):
    """One file with a frame at every height."""
    ds = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    for keyword in (
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        del ds[keyword]
    shared, orientation, measures, values = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient, measures.PixelSpacing, measures.SliceThickness = list(AXIAL), [2.0, 3.0], 4.0
    values.RescaleSlope, values.RescaleIntercept = 1, -1000
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence, ds.SharedFunctionalGroupsSequence = [values], [shared]
    groups = []
    for height in heights:
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient, group.PlanePositionSequence = [0.0, 0.0, float(height)], [position]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence, ds.NumberOfFrames = groups, len(heights)
    ds.Rows, ds.Columns = 6, 5
    ds.PixelData = np.repeat(np.arange(len(heights)), 30).astype("<i2").tobytes()
    ds.save_as(path)
    return path


def test_an_enhanced_file_is_ordered_by_the_positions_of_its_frames(tmp_path):
    volume = v.read_volume(enhanced(tmp_path / "a.dcm", [12, 0, 8, 4]))
    assert volume.frames == (1, 3, 2, 0) and len(volume.files) == 1
    assert volume.values[:, 0, 0].tolist() == [-999, -997, -998, -1000]
    assert volume.spacing_mm == pytest.approx((4, 2, 3))


# ---- NIfTI


@pytest.mark.parametrize("name", ["anatomical.nii", "reoriented_anat_moved.nii", "standard.nii.gz"])
def test_nifti_values_and_places_are_nibabels(name):
    volume, image = v.read_nifti(NIFTI / name), nibabel.load(NIFTI / name)
    np.testing.assert_allclose(volume.values.numpy(), image.get_fdata().T, rtol=1e-6)
    for index in itertools.product(*((0, n - 1) for n in volume.shape)):
        np.testing.assert_allclose(volume.affine @ (*index, 1), image.affine @ (*index[::-1], 1), atol=1e-9)
    assert volume.spacing_mm == pytest.approx(tuple(image.header.get_zooms()[::-1]))


def test_of_a_4d_file_one_frame_is_chosen_and_none_is_averaged():
    path = NIFTI / "functional.nii"
    with pytest.raises(DataError, match="4-D, 20 volumes: choose one by its frame, 0 to 19"):
        v.read_nifti(path)
    np.testing.assert_allclose(v.read_nifti(path, frame=7).values.numpy(), nibabel.load(path).get_fdata()[..., 7].T)
    with pytest.raises(DataError, match="choose one by its frame"):
        v.read_nifti(path, frame=20)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_nifti_mask_comes_back_with_the_affine_of_its_source(tmp_path, suffix):
    volume = v.read_nifti(NIFTI / "anatomical.nii")
    mask = volume.with_values((volume.values > 5000) * 1 + (volume.values > 9000) * 1)
    path = v.write_mask(tmp_path / f"mask{suffix}", mask)
    again, source = nibabel.load(path), nibabel.load(NIFTI / "anatomical.nii")
    assert np.array_equal(again.affine, source.affine) and again.shape == source.shape
    assert again.get_data_dtype() == np.uint8 and np.array_equal(np.asarray(again.dataobj).T, mask.values)
    found = v.read_mask(path, volume)
    assert torch.equal(found.values, mask.values) and np.array_equal(found.affine, volume.affine)
    assert again.header["sform_code"] == again.header["qform_code"] == 1 and again.header.get_xyzt_units()[0] == "mm"
    if suffix == ".nii.gz":
        assert path.read_bytes()[3:8] == bytes(5)  # gzip keeps neither the name of the file nor the time


def test_a_mask_of_a_dicom_series_lies_where_nibabel_expects_it(tmp_path):
    volume = v.read_series(series(tmp_path, [(0, 1 * k, 5 * k) for k in range(3)]))
    image = nibabel.load(v.write_mask(tmp_path / "m.nii.gz", volume.with_values(volume.values > -900)))
    for index in itertools.product(*((0, n - 1) for n in volume.shape)):
        np.testing.assert_allclose(image.affine @ (*index[::-1], 1), volume.affine @ (*index, 1), atol=1e-4)


def test_a_mask_with_its_axes_in_another_order_is_put_in_place(tmp_path):
    volume = v.read_nifti(NIFTI / "anatomical.nii")
    mask = volume.with_values(volume.values > 5000)
    path = v.write_mask(tmp_path / "mask.nii", mask.oriented("PIR"))
    assert nibabel.load(path).shape != nibabel.load(NIFTI / "anatomical.nii").shape
    assert torch.equal(v.read_mask(path, volume).values, mask.values)


# ---- orientation and grids

CODES = ["".join(c) for names in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*names)]


@pytest.mark.parametrize("codes", CODES)
def test_turning_moves_no_voxel_and_comes_back_exactly(codes):
    rng = np.random.default_rng(len(codes))
    affine = np.eye(4)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] * (3, 2, 1)
    affine[:3, 3] = 10, -20, 30
    volume = phantom(affine=affine)
    turned = volume.oriented(codes)
    assert sorted(turned.values.flatten()) == sorted(volume.values.flatten())
    inverse = np.linalg.inv(volume.affine)
    for index in itertools.product(*map(range, turned.shape)):
        d, h, w = np.rint((inverse @ turned.affine @ (*index, 1))[:3]).astype(int)
        assert turned.values[index] == volume.values[d, h, w]
    back = turned.on_grid(volume)
    assert torch.equal(back.values, volume.values) and np.array_equal(back.affine, volume.affine)
    assert turned.codes == codes


def test_planes_are_upright_with_the_patients_right_on_the_left():
    affine = np.diag([1.0, 1.0, 1.0, 1.0])[[2, 1, 0, 3]]  # d, h, w grow to S, A, R
    values = torch.zeros(9, 9, 9)
    values[8, 4, 4], values[4, 8, 4], values[4, 4, 8] = 1, 2, 3  # head, face, right hand
    volume = Volume(values, affine)
    assert volume.codes == "SAR"

    def where(plane, value):
        return tuple(torch.nonzero(volume.plane(plane).values == value)[0].tolist())

    assert (where("axial", 1), where("axial", 2), where("axial", 3)) == ((8, 4, 4), (4, 0, 4), (4, 4, 0))
    assert (where("coronal", 1), where("coronal", 2), where("coronal", 3)) == ((4, 0, 4), (8, 4, 4), (4, 4, 0))
    assert (where("sagittal", 1), where("sagittal", 2), where("sagittal", 3)) == ((4, 0, 4), (4, 4, 0), (0, 4, 4))


@pytest.mark.parametrize("shape", [(5, 6, 7), (1, 6, 7)])
def test_resampling_a_linear_field_gives_the_field(shape):
    affine = np.array([[0, 0.3, 1, 5], [0.2, 2, 0, -3], [3, 0, 0, 9], [0, 0, 0, 1]])
    index = torch.tensor(list(itertools.product(*map(range, shape))), dtype=torch.float64)

    def field(matrix, grid):
        places = grid @ torch.tensor(matrix[:3, :3]).T + torch.tensor(matrix[:3, 3])
        return places @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    volume = Volume(field(affine, index).float().reshape(shape), affine)
    found = volume.resampled((1.5, 1.0, 0.7))
    assert found.spacing_mm == pytest.approx((1.5, 1.0, 0.7))
    index = torch.tensor(list(itertools.product(*map(range, found.shape))), dtype=torch.float64)
    here = index @ torch.tensor(np.linalg.inv(affine) @ found.affine)[:3, :3].T
    inside = (here <= torch.tensor(shape) - 1 + 1e-6).all(1)
    assert inside.float().mean() > 0.6
    expected = field(found.affine, index).float()
    torch.testing.assert_close(found.values.flatten()[inside], expected[inside], atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("channels", [(), (2,)])
def test_a_mask_of_a_finer_grid_comes_back_bit_by_bit(channels):
    volume = phantom(channels=channels)
    mask = volume.with_values(volume.values % 3)
    fine = mask.plane("coronal").resampled((0.5, 0.5, 0.5), "nearest")
    assert torch.equal(fine.on_grid(volume).values, mask.values)


def test_a_mask_made_on_a_network_grid_is_delivered_on_the_original_one(tmp_path):
    volume = v.read_series(series(tmp_path, [(0, 0, 5 * k) for k in range(6)], size=(40, 50)))
    network = volume.plane("axial").resampled((4, 2.5, 2.5)).windowed((0, 400))
    made = network.with_values((network.values > 0.2).float()).on_grid(volume)
    assert made.shape == volume.shape and np.array_equal(made.affine, volume.affine)
    assert made.files == volume.files and set(made.values.unique().tolist()) <= {0.0, 1.0}


def test_outside_is_background():
    far = phantom(affine=np.array([[3.0, 0, 0, 500], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    assert (phantom().on_grid(far).values == 0).all()
    low = phantom().with_values(phantom().values - 1024)
    assert (low.on_grid(far, "linear").values == -1024).all()


def test_a_window_maps_its_ends_to_zero_and_one():
    volume = phantom((1, 1, 5)).with_values(torch.tensor([[[-1000.0, -160, 40, 240, 3000]]]))
    assert volume.windowed((40, 400)).values.flatten().tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("spacing", [(1.5, 1.0, 0.7), (4.0, 3.0, 2.5), (3.0, 4.0, 6.0)])
def test_series_and_resampling_agree_with_monai(tmp_path, spacing):
    from monai.transforms import LoadImage, Spacing

    (tmp_path / "a").mkdir()
    files = series(tmp_path / "a", [(7, 8, 3 * k) for k in range(4)], size=(20, 30))
    volume = v.read_series(files)  # in the order of InstanceNumber too, by which MONAI sorts
    theirs = LoadImage(reader="PydicomReader", ensure_channel_first=True)(str(tmp_path / "a"))  # (1, W, H, D)
    assert torch.equal(theirs.as_tensor()[0].permute(2, 1, 0), volume.values)
    np.testing.assert_allclose(theirs.affine.numpy()[:, [2, 1, 0, 3]], volume.affine, atol=1e-4)
    resample = Spacing(spacing, mode="bilinear", padding_mode="border")
    expected = resample(as_meta_tensor(volume))
    found = volume.resampled(spacing)
    np.testing.assert_allclose(found.affine, expected.affine.numpy(), atol=1e-6)
    inside = found.values != volume.values.min()
    assert found.shape == tuple(expected.shape[1:])
    torch.testing.assert_close(found.values[inside], expected.as_tensor()[0][inside], atol=0.05, rtol=1e-4)


def as_meta_tensor(volume):
    from monai.data import MetaTensor

    return MetaTensor(volume.values[None], affine=torch.tensor(volume.affine))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.oriented("RAR"), "does not name R or L"),
        (lambda x: x.plane("oblique"), "not one of axial, coronal, sagittal"),
        (lambda x: x.resampled((1, 1, 0)), "three numbers of millimetres above 0"),
        (lambda x: x.resampled((1e-4, 1e-4, 1e-4)), "more than 536,870,912"),
        (lambda x: x.windowed((40, -1)), "a width above 0"),
        (lambda x: x.with_values(torch.zeros(3, 3, 3)), "its grid has (5, 6, 7)"),
    ],
)
def test_what_cannot_be_asked_of_a_volume_is_said(change, reason):
    with pytest.raises(UsageError) as error:
        change(phantom())
    assert reason in str(error.value)


# ---- folders


def test_a_folder_is_listed_with_what_was_left_out(tmp_path):
    series(tmp_path, [(0, 0, 5 * k) for k in range(3)])
    (tmp_path / "b").mkdir()
    shutil.copy(get_testdata_file("examples_ybr_color.dcm"), tmp_path / "b" / "clip")
    shutil.copy(get_testdata_file("reportsi.dcm"), tmp_path / "report.dcm")
    shutil.copy(tmp_path / "001.dcm", tmp_path / "b" / "again.dcm")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.dcm").touch()
    found = v.scan(tmp_path)
    assert {s["file"]: s["reason"] for s in found.skipped} == {
        ".DS_Store": "hidden",
        "b/again.dcm": "a second copy of 001.dcm",
        "empty.dcm": "the file is empty (0 bytes)",
        "notes.txt": "not a DICOM file ('DICM' is not at byte 128)",
    }
    assert sorted((s["modality"], s["files"], s["frames"]) for s in found.summary()) == [("CT", 3, 3), ("US", 1, 30)]
    assert [f.name for f in found.files] == ["000.dcm", "001.dcm", "002.dcm", "report.dcm", "b/clip"]
    assert "1.2.840" not in json.dumps(found.summary()) and "1.3.6.1" not in json.dumps(found.summary())


def test_links_are_not_followed_out_of_the_folder(tmp_path):
    study, outside = tmp_path / "study", tmp_path / "outside"
    study.mkdir()
    outside.mkdir()
    series(study, [(0, 0, 5 * k) for k in range(2)])
    series(outside, [(0, 0, 0)])
    os.symlink(outside / "000.dcm", study / "file.dcm")
    os.symlink(outside, study / "folder")
    os.symlink(study, study / "loop")
    found = v.scan(study)
    assert len(found.files) == 2 and sorted(s["file"] for s in found.skipped) == ["file.dcm", "folder", "loop"]


def test_what_a_dicomdir_names_and_is_not_there_is_listed(tmp_path):
    shutil.copytree(SAMPLES, tmp_path / "disc")
    (tmp_path / "disc" / "98892001" / "CT5N" / "2062").unlink()
    found = v.scan(tmp_path / "disc")
    missing = [s for s in found.skipped if "named there" in s["reason"]]
    assert len(missing) == 1 and missing[0]["file"].startswith("DICOMDIR entry ")


def test_real_series_are_read_or_refused_with_their_reason():
    found = v.scan(SAMPLES)
    read, reasons = 0, []
    for files in found.series().values():
        try:
            read += v.read_series(files).values.isfinite().all().item()
        except DataError as error:
            reasons.append(str(error))
    assert read == 5 and len(reasons) == 8
    for words, count in (
        ("202.5 mm apart, other slices of the series 1.25 mm", 1),
        ("another orientation than", 3),
        ("no slices apart from localizers", 1),
        ("ImageOrientationPatient is missing", 3),
    ):
        assert sum(words in reason for reason in reasons) == count


def test_a_folder_with_two_series_is_not_guessed_at(tmp_path):
    series(tmp_path, [(0, 0, 5 * k) for k in range(3)])
    shutil.copy(get_testdata_file("MR_small.dcm"), tmp_path / "z.dcm")
    with pytest.raises(
        DataError, match="holds 2 series of slices, one is expected: 3 files like 000.dcm, 1 files like z"
    ):
        v.read_volume(tmp_path)
