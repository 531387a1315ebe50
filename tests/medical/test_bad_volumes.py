"""Every row of the bad-day matrix for volumes and DICOM: one line that names the file and the reason (exit code 3), or
left out and listed; and no text of the patient in anything that is said or written."""

import gzip
import io
import json
import logging
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import generate_uid

from adaptsuite.errors import DataError
from adaptsuite.medical import dicom
from adaptsuite.medical import dicom_out as out
from adaptsuite.medical import volumes as v

NET = out.Algorithm("lesion net", "1.2", "ab" * 32, "cd" * 32)
SECRETS = {  # of the patient module and around it
    "PatientName": "Zimmermann^Friederike",
    "PatientID": "PX90210",
    "PatientBirthDate": "19470611",
    "OtherPatientIDs": "OLD55512",
    "PatientAddress": "Lindenallee 17",
    "PatientMotherBirthName": "Habermehl",
    "PatientComments": "afraid of needles",
    "InstitutionName": "Klinikum Nord",
    "ReferringPhysicianName": "Oberhauser^Max",
    "StudyDescription": "follow-up of Friederike",
    "AccessionNumber": "ACC77123",
    "StudyDate": "20230319",
}
WORDS = {
    "zimmermann",
    "friederike",
    "px90210",
    "19470611",
    "old55512",
    "lindenallee",
    "habermehl",
    "needles",
    "klinikum",
}
WORDS |= {"oberhauser", "acc77123", "20230319", "secretvendor"}


def signed(ds):
    for keyword, value in SECRETS.items():
        setattr(ds, keyword, value)
    ds.private_block(0x0099, "SECRETVENDOR", create=True).add_new(1, "LO", "Zimmermann again")
    return ds


def slices(folder, heights=(0, 5, 10, 15), **changes):
    """Files 0.dcm, ... of a CT series whose headers tell who it is."""
    folder.mkdir(parents=True, exist_ok=True)
    ds = signed(pydicom.dcmread(get_testdata_file("CT_small.dcm")))
    for i, height in enumerate(heights):
        ds.ImagePositionPatient, ds.SOPInstanceUID = [0.0, 0.0, float(height)], generate_uid()
        ds.file_meta.MediaStorageSOPInstanceUID, ds.InstanceNumber = ds.SOPInstanceUID, i
        for keyword, value in changes.items():
            setattr(ds, keyword, value)
        ds.save_as(folder / f"{i}.dcm")
    return folder


def edited(path, **changes):
    ds = pydicom.dcmread(path)
    for keyword, value in changes.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    ds.save_as(path)


def nifti(path, shape=(6, 5, 4), affine=None, edit=None):
    """A NIfTI file; edit changes bytes of its header: {offset: (format, values...)}."""
    image = nibabel.Nifti1Image(np.arange(np.prod(shape)).reshape(shape).astype(np.int16), np.eye(4))
    if affine is not None:
        image.set_sform(affine, code=1)
    content = bytearray(image.to_bytes())
    for offset, (form, *values) in (edit or {}).items():
        struct.pack_into("<" + form, content, offset, *values)
    path.write_bytes(gzip.compress(bytes(content)) if path.name.endswith(".gz") else bytes(content))
    return path


def bomb(folder, rows, columns, frames=1, syntax="1.2.840.10008.1.2.4.80"):
    """A few bytes that say they are so large."""
    ds = signed(pydicom.dcmread(get_testdata_file("MR_small_jpeg_ls_lossless.dcm")))
    ds.Rows, ds.Columns, ds.NumberOfFrames = rows, columns, frames
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(folder / "a.dcm")
    return folder / "a.dcm"


# ---- one row of the matrix each: (makes the files, what is read, words of the line)


def truncated(tmp_path):
    path = slices(tmp_path) / "2.dcm"
    path.write_bytes(path.read_bytes()[:-900])
    return lambda: dicom.inspect(path, "2.dcm"), ["2.dcm: truncated: its pixels need 32,768 bytes, 32,018 are there"]


def truncated_compressed(tmp_path):
    raw = Path(get_testdata_file("examples_ybr_color.dcm")).read_bytes()
    (tmp_path / "a.dcm").write_bytes(raw[: len(raw) // 2])
    return lambda: dicom.read(tmp_path / "a.dcm"), ["a.dcm: ", "damaged"]


def truncated_nifti(tmp_path):
    path = nifti(tmp_path / "a.nii")
    path.write_bytes(path.read_bytes()[:-50])
    return lambda: v.read_nifti(path), ["a.nii: truncated: 6 x 5 x 4 voxels do not fit into"]


def truncated_gzip(tmp_path):
    path = nifti(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:-40])
    return lambda: v.read_nifti(path), ["a.nii.gz: damaged or cut short"]


def dims_32767(tmp_path):
    path = nifti(tmp_path / "a.nii", edit={40: ("4h", 3, 32767, 32767, 32767)})
    return lambda: v.read_nifti(path), ["a.nii: 32767 x 32767 x 32767 voxels are more than 536,870,912"]


def dims_of_a_small_gzip(tmp_path):
    path = nifti(tmp_path / "a.nii.gz", edit={40: ("4h", 3, 800, 800, 800)})
    return lambda: v.read_nifti(path), ["a.nii.gz: truncated: 800 x 800 x 800 voxels do not fit into"]


def singular_affine(tmp_path):
    path = nifti(tmp_path / "a.nii", affine=np.diag([1.0, 0.0, 1.0, 1.0]))
    return lambda: v.read_nifti(path), ["a.nii: its affine is singular"]


def nan_affine(tmp_path):
    path = nifti(tmp_path / "a.nii", edit={280: ("f", float("nan")), 252: ("2h", 0, 1)})
    return lambda: v.read_nifti(path), ["a.nii: its affine is singular"]


def singular_orientation(tmp_path):
    folder = slices(tmp_path, ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    return lambda: v.read_volume(folder), ["0.dcm: ImageOrientationPatient has no two directions at right angles"]


def nan_slope(tmp_path):
    path = nifti(tmp_path / "a.nii", edit={112: ("f", float("nan"))})
    return lambda: v.read_nifti(path), ["a.nii: scl_slope or scl_inter is not finite"]


def nan_slope_of_dicom(tmp_path):
    folder = slices(tmp_path)
    raw = (folder / "1.dcm").read_bytes().replace(b"\x28\x00\x53\x10DS\x02\x001 ", b"\x28\x00\x53\x10DS\x04\x00nan ")
    (folder / "1.dcm").write_bytes(raw)
    return lambda: v.read_volume(folder), ["1.dcm: rescale slope nan and intercept -1024.0 give its pixels no value"]


def nan_voxels(tmp_path):
    image = nibabel.Nifti1Image(np.full((3, 3, 3), np.nan, np.float32), np.eye(4))
    nibabel.save(image, tmp_path / "a.nii")
    return lambda: v.read_nifti(tmp_path / "a.nii"), ["a.nii: holds NaN or infinite values"]


def mask_of_another_shape(tmp_path):
    image, mask = nifti(tmp_path / "image.nii"), nifti(tmp_path / "mask.nii", (6, 5, 3))
    return lambda: v.read_mask(mask, v.read_nifti(image)), [
        "mask.nii does not lie on the grid of",
        "image.nii: (3, 5, 6) and",
    ]


def mask_of_another_place(tmp_path):
    moved = np.eye(4)
    moved[0, 3] = 2
    image, mask = nifti(tmp_path / "image.nii", affine=np.eye(4)), nifti(tmp_path / "mask.nii", affine=moved)
    return lambda: v.read_mask(mask, v.read_nifti(image)), ["mask.nii does not lie", "its voxels are up to 2 mm away"]


def mask_with_halves(tmp_path):
    image = nifti(tmp_path / "image.nii")
    nibabel.save(nibabel.Nifti1Image(np.full((6, 5, 4), 0.5, np.float32), np.eye(4)), tmp_path / "m.nii")
    return lambda: v.read_mask(tmp_path / "m.nii", v.read_nifti(image)), ["m.nii: holds other values than the labels"]


def duplicate_slices(tmp_path):
    folder = slices(tmp_path, heights=(0, 5, 5, 10))
    return lambda: v.read_volume(folder), ["1.dcm and 2.dcm: duplicate slices, at one position"]


def gap(tmp_path):
    folder = slices(tmp_path, heights=(0, 5, 10, 20, 25))
    return lambda: v.read_volume(folder), ["2.dcm and 3.dcm: 10 mm apart, other slices of the series 5 mm"]


def gap_of_three(tmp_path):
    folder = slices(tmp_path, heights=(0, 5, 15))
    return lambda: v.read_volume(folder), ["1.dcm and 2.dcm: 10 mm apart"]


def mixed_series(tmp_path):
    folder = slices(tmp_path)
    edited(folder / "1.dcm", SeriesInstanceUID=generate_uid())
    files = [dicom.inspect(folder / f"{i}.dcm", f"{i}.dcm") for i in range(4)]
    return lambda: v.read_series(files), ["1.dcm: 2 series are mixed (3, 1 slices): another than 0.dcm"]


def other_size(tmp_path):
    folder = slices(tmp_path)
    edited(folder / "2.dcm", Rows=64)
    return lambda: v.read_volume(folder), ["2.dcm: 64 x 128 MONOCHROME2, unlike 128 x 128 MONOCHROME2 of 0.dcm"]


def other_orientation(tmp_path):
    folder = slices(tmp_path)
    edited(folder / "2.dcm", ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    return lambda: v.read_volume(folder), ["2.dcm: another orientation than 0.dcm"]


def other_spacing(tmp_path):
    folder = slices(tmp_path)
    edited(folder / "3.dcm", PixelSpacing=[1, 1])
    return lambda: v.read_volume(folder), ["3.dcm: spacing (1.0, 1.0) mm, unlike (0.661468, 0.661468) mm of 0.dcm"]


def other_frame_of_reference(tmp_path):
    folder = slices(tmp_path)
    edited(folder / "1.dcm", FrameOfReferenceUID=generate_uid())
    return lambda: v.read_volume(folder), ["1.dcm: another frame of reference than 0.dcm"]


def shifted_slice(tmp_path):
    folder = slices(tmp_path)
    edited(folder / "2.dcm", ImagePositionPatient=[7, 0, 10])
    return lambda: v.read_volume(folder), ["2.dcm: is shifted by 7 mm against others"]


def missing_spacing(tmp_path):
    folder = slices(tmp_path)
    for i in range(4):
        edited(folder / f"{i}.dcm", PixelSpacing=None)
    return lambda: v.read_volume(folder), ["0.dcm: PixelSpacing is missing or damaged"]


def missing_thickness(tmp_path):
    folder = slices(tmp_path, heights=(0,))
    edited(folder / "0.dcm", SliceThickness=None, SpacingBetweenSlices=None)
    return lambda: v.read_volume(folder), ["0.dcm: SliceThickness is missing"]


def missing_position(tmp_path):
    folder = slices(tmp_path)
    edited(folder / "1.dcm", ImagePositionPatient=None)
    return lambda: v.read_volume(folder), ["1.dcm: ImagePositionPatient is missing or damaged"]


def spacing_zero_nifti(tmp_path):
    path = nifti(tmp_path / "a.nii", edit={80: ("3f", 0, 0, 0), 252: ("2h", 0, 0)})
    return lambda: v.read_nifti(path), ["a.nii: its spacing is missing: pixdim is 0 x 0 x 0"]


def spacing_in_microns(tmp_path):
    path = nifti(tmp_path / "a.nii", edit={123: ("B", 3)})
    return lambda: v.read_nifti(path), ["a.nii: its spacing is in micron, mm is expected"]


def compressed_without_decoder(tmp_path):
    shutil.copy(get_testdata_file("SC_rgb_jpeg_gdcm.dcm"), tmp_path / "a.dcm")
    return lambda: dicom.read(tmp_path / "a.dcm"), ["a.dcm: JPEG Lossless", "pip install pylibjpeg pylibjpeg-libjpeg"]


def dicomdir_leads_out(tmp_path):
    folder, index = slices(tmp_path / "disc"), pydicom.dcmread(get_testdata_file("DICOMDIR"))
    shutil.copy(get_testdata_file("MR_small.dcm"), tmp_path / "outside.dcm")
    records = [r for r in index.DirectoryRecordSequence if "ReferencedFileID" in r]
    records[4].ReferencedFileID = ["..", "outside.dcm"]
    index.save_as(folder / "DICOMDIR")
    return lambda: v.scan(folder), ["DICOMDIR: entry ", "leads out of the folder"]


def burned_in(tmp_path):
    folder = slices(tmp_path, BurnedInAnnotation="YES")
    return lambda: v.read_volume(folder), ["0.dcm: says that text is burned into its pixels"]


def four_d_nifti(tmp_path):
    path = nifti(tmp_path / "a.nii", (4, 4, 4, 3))
    return lambda: v.read_nifti(path), ["a.nii: 4-D, 3 volumes: choose one by its frame, 0 to 2"]


def five_d_nifti(tmp_path):
    path = nifti(tmp_path / "a.nii", (4, 4, 4, 3, 2))
    return lambda: v.read_nifti(path), ["a.nii: 5-D (4, 4, 4, 3, 2), a volume is 3-D"]


def four_d_dicom(tmp_path):
    folder = slices(tmp_path, heights=(0, 5, 10) * 3)
    return lambda: v.read_volume(folder), ["3 images at each of 3 positions: 4-D, a volume is 3-D"]


def zero_bytes(tmp_path):
    (tmp_path / "a.dcm").touch()
    return lambda: dicom.inspect(tmp_path / "a.dcm"), ["a.dcm: the file is empty (0 bytes)"]


def zero_bytes_nifti(tmp_path):
    (tmp_path / "a.nii").touch()
    return lambda: v.read_nifti(tmp_path / "a.nii"), ["a.nii: the file is empty (0 bytes)"]


def no_such_file(tmp_path):
    return lambda: v.read_volume(tmp_path / "a.nii.gz"), ["a.nii.gz: no such file"]


def not_dicom(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"\x89PNG" + bytes(500))
    return lambda: dicom.inspect(tmp_path / "a.dcm"), ["a.dcm: not a DICOM file"]


def not_nifti(tmp_path):
    (tmp_path / "a.nii").write_bytes(b"hello " * 100)
    return lambda: v.read_nifti(tmp_path / "a.nii"), ["a.nii: damaged or cut short"]


def no_pixels(tmp_path):
    shutil.copy(get_testdata_file("rtplan.dcm"), tmp_path / "a.dcm")
    return lambda: v.read_volume(tmp_path / "a.dcm"), ["a.dcm: holds no pixels (modality RTPLAN)"]


def a_dose(tmp_path):
    shutil.copy(get_testdata_file("rtdose.dcm"), tmp_path / "a.dcm")
    return lambda: v.read_volume(tmp_path / "a.dcm"), ["a.dcm: its frames have no positions of their own"]


def pixels_left_out(tmp_path):
    path = slices(tmp_path) / "0.dcm"
    edited(path, PixelData=None)
    return lambda: dicom.inspect(path, "0.dcm"), ["0.dcm: truncated: its pixels need 32,768 bytes, 0 are there"]


def large_frame(tmp_path):
    path = bomb(tmp_path, 65535, 65535)
    return lambda: dicom.inspect(path), ["a.dcm: 65535 x 65535 pixels are not between 1 and 134,217,728 samples"]


def many_frames(tmp_path):
    path = bomb(tmp_path, 64, 64, 2_000_000_000)
    return lambda: dicom.inspect(path), ["a.dcm: 2,000,000,000 frames are not between 1 and 1,048,576"]


def frames_that_are_not_there(tmp_path):
    path = bomb(tmp_path, 64, 64, 5)
    return lambda: dicom.read(path), ["a.dcm: damaged or cut short"]


def coded_larger_than_said(tmp_path):
    """JPEG-LS of 64 x 64 whose own header asks for 65535 x 65535: its decoder would allocate that."""
    path = bomb(tmp_path, 64, 64)
    raw = path.read_bytes()
    at = raw.index(b"\xff\xf7") + 5
    path.write_bytes(raw[:at] + b"\xff\xff\xff\xff" + raw[at + 4 :])
    return lambda: dicom.read(path), ["a.dcm: frame 0 is coded with 65535 x 65535 pixels, its header says otherwise"]


def deflated_bomb(tmp_path):
    raw = Path(get_testdata_file("image_dfl.dcm")).read_bytes()
    start = (
        144 + pydicom.filereader.read_file_meta_info(get_testdata_file("image_dfl.dcm")).FileMetaInformationGroupLength
    )
    press = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    piece = press.compress(bytes(1 << 24)) + press.flush(zlib.Z_FULL_FLUSH)  # which can follow itself
    packed = 70 * piece + press.flush()  # 1.1 GB in 1 MB
    (tmp_path / "a.dcm").write_bytes(raw[:start] + packed)
    return lambda: dicom.inspect(tmp_path / "a.dcm"), ["a.dcm: unpacks to more than 1,073,741,824 bytes"]


def numbers_that_are_none(tmp_path):
    shutil.copy(get_testdata_file("badVR.dcm"), tmp_path / "a.dcm")
    return lambda: dicom.inspect(tmp_path / "a.dcm"), ["a.dcm: its NumberOfFrames is not a number"]


ROWS = [
    truncated, truncated_compressed, truncated_nifti, truncated_gzip, dims_32767, dims_of_a_small_gzip, singular_affine,
    nan_affine, singular_orientation, nan_slope, nan_slope_of_dicom, nan_voxels, mask_of_another_shape,
    mask_of_another_place, mask_with_halves, duplicate_slices, gap, gap_of_three, mixed_series, other_size,
    other_orientation, other_spacing, other_frame_of_reference, shifted_slice,
    missing_spacing, missing_thickness, missing_position,
    spacing_zero_nifti, spacing_in_microns, compressed_without_decoder, dicomdir_leads_out, burned_in, four_d_nifti,
    five_d_nifti, four_d_dicom, zero_bytes, zero_bytes_nifti, no_such_file, not_dicom, not_nifti, no_pixels, a_dose,
    pixels_left_out, large_frame, many_frames, frames_that_are_not_there, coded_larger_than_said, deflated_bomb,
    numbers_that_are_none,
]  # fmt: skip


def silent(text):
    """Whether a text holds nothing of SECRETS."""
    return not [word for word in WORDS if word in text.lower()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_a_bad_file_is_one_line_with_its_name_and_its_reason(tmp_path, row, recwarn, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    act, words = row(tmp_path)
    capfd.readouterr(), recwarn.clear(), caplog.clear()
    with pytest.raises(DataError) as error:
        act()
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert error.value.exit_code == 3 and error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None  # whose words may quote the file
    assert not list(recwarn) and not caplog.text and capfd.readouterr() == ("", "")
    assert silent(line)


@pytest.mark.parametrize("row", [truncated, zero_bytes, not_dicom, large_frame, many_frames, numbers_that_are_none])
def test_in_a_folder_it_is_left_out_and_listed(tmp_path, row):
    slices(tmp_path / "good")
    _, words = row(tmp_path)
    found = v.scan(tmp_path)
    (bad,) = found.skipped
    assert words[0].partition(": ")[2] in bad["reason"] and words[0].startswith(bad["file"])
    assert len(found.files) >= 4 and silent(json.dumps(found.skipped))


def test_burned_in_text_can_be_allowed(tmp_path):
    folder = slices(tmp_path, BurnedInAnnotation="YES")
    assert v.read_volume(folder, allow_burned_in=True).shape == (4, 128, 128)
    assert v.scan(folder).summary()[0]["burned_in"]


def test_bombs_are_refused_before_memory_is_taken(tmp_path):
    code = (
        "import resource, sys; from adaptsuite.medical import volumes, dicom; import nibabel, pydicom.pixels, pathlib\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 29),) * 2)\n"
        "for path in sys.argv[1:]:\n"
        "    try: volumes.read_volume(path) if '.nii' in path else dicom.read(path)\n"
        "    except ValueError as e: print(type(e).__name__, pathlib.Path(path).name)\n"
    )
    paths = []
    for i, row in enumerate((dims_32767, dims_of_a_small_gzip, large_frame, many_frames, coded_larger_than_said)):
        (tmp_path / str(i)).mkdir()
        row(tmp_path / str(i))
        paths += [str(p) for p in (tmp_path / str(i)).iterdir()]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("DataError") == 5, done.stderr


# ---- anything at all


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "image_dfl.dcm"]
)
def test_a_file_cut_anywhere_is_refused_or_whole(tmp_path, name):
    raw, path = Path(get_testdata_file(name)).read_bytes(), tmp_path / "a.dcm"
    whole, refused = dicom.read(get_testdata_file(name), units="physical"), 0
    for length in np.linspace(0, len(raw) - 1, 60).astype(int):
        path.write_bytes(raw[:length])
        try:
            found = dicom.read(dicom.inspect(path, "a"), units="physical")
        except DataError as error:
            assert str(error).startswith("a: ") and "\n" not in str(error)
            refused += 1
        else:
            assert np.array_equal(found, whole)  # only what comes after the pixels was cut
    assert refused > 50


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "examples_palette.dcm", "MR_small_jpeg_ls_lossless.dcm", "rtdose.dcm"]
)
def test_changed_bytes_never_end_in_another_error(tmp_path, name):
    raw, path, rng = Path(get_testdata_file(name)).read_bytes(), tmp_path / "a.dcm", np.random.default_rng(0)
    header = min(len(raw), 5000)
    for _ in range(150):
        changed = bytearray(raw)
        for at in rng.integers(132, header, rng.integers(1, 6)):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            file = dicom.inspect(path, "a")
            next(dicom.frames(file))
            v.read_series([file])
        except DataError as error:
            assert "\n" not in str(error)


def test_a_nifti_with_changed_bytes_never_ends_in_another_error(tmp_path):
    path, rng = nifti(tmp_path / "a.nii"), np.random.default_rng(0)
    raw = path.read_bytes()
    for _ in range(300):
        changed = bytearray(raw)
        for at in rng.integers(0, 352, rng.integers(1, 4)):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            v.read_nifti(path)
        except DataError as error:
            assert "\n" not in str(error)


# ---- no text of the patient


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("Zimmermann_Friederike/ct/0.dcm", "***/ct/0.dcm"),
        ("ct/PX-90210.dcm", "ct/***"),
        ("born 1947-06-11/ct/0.dcm", "***/ct/0.dcm"),
        ("Zimmer/mann/0.dcm", "***"),
        ("ZIMMERMANN/lindenallee17/0.dcm", "***/***/0.dcm"),
        ("ct/0.dcm", None),
    ],
)
def test_a_path_with_patient_text_is_told_by_its_number_and_the_hash_of_its_bytes(tmp_path, place, kept):
    folder = slices(tmp_path / "made", heights=(0,))
    path = tmp_path / "study" / place
    path.parent.mkdir(parents=True)
    shutil.copy(folder / "0.dcm", path)
    (tmp_path / "study" / "a.txt").touch()
    (file,) = v.scan(tmp_path / "study").files
    if kept is None:
        assert file.name == place
        return
    digest = dicom.content_hash(path)[:12]
    assert file.name == f"{kept} (file 2, sha256 {digest}; what is *** is also text of its header)"
    assert silent(file.name) and silent(repr(file)) and dicom.inspect(path, place).name.startswith(kept)
    with pytest.raises(DataError) as error:
        v.read_series([file, file])
    assert silent(str(error.value)) and digest in str(error.value)


def test_short_names_are_found_as_words_only(tmp_path):
    folder = slices(tmp_path / "x", heights=(0,), PatientName="Li^Wu", PatientID="77")
    for place, hidden in (("li_wu.dcm", True), ("77.dcm", True), ("clinic.dcm", False), ("1977.dcm", False)):
        shutil.copy(folder / "0.dcm", tmp_path / place)
        assert (dicom.inspect(tmp_path / place, place).name != place) == hidden


def test_a_wreck_is_named_without_what_is_left_of_its_header(tmp_path):
    folder = slices(tmp_path / "x", heights=(0,))
    raw, path = (folder / "0.dcm").read_bytes(), tmp_path / "zimmermann.dcm"
    path.write_bytes(raw[: raw.index(b"Friederike") + 400])
    with pytest.raises(DataError) as error:
        dicom.inspect(path)
    assert silent(str(error.value).replace(str(tmp_path), "")) and "sha256" in str(error.value)


def test_one_file_tells_what_the_path_of_another_must_not_say(tmp_path):
    study = slices(tmp_path / "study" / "Zimmermann")
    (study / "empty.dcm").touch()
    (study / ".hidden").touch()
    found = v.scan(tmp_path / "study")
    assert len(found.skipped) == 2 and silent(json.dumps(found.skipped)) and silent(json.dumps(found.summary()))


def test_pydicoms_own_words_are_never_passed_on(tmp_path):
    """pydicom's errors quote the value that they could not read."""
    folder = slices(tmp_path, heights=(0,))
    raw = (folder / "0.dcm").read_bytes()
    at = raw.index(b"\x28\x00\x10\x00US")  # Rows becomes text
    (folder / "0.dcm").write_bytes(raw[:at] + b"\x28\x00\x10\x00LO\x0a\x00Zimmermann" + raw[at + 10 :])
    with pytest.raises(DataError) as error:
        dicom.inspect(folder / "0.dcm", "0.dcm")
    assert silent(str(error.value)) and str(error.value).startswith("0.dcm: ")


def test_nothing_written_or_printed_holds_a_text_value_of_the_patient(tmp_path, capfd, caplog, recwarn):
    """A study in a folder with the patient's name, good and bad files, and all outputs with a salt."""
    caplog.set_level(logging.DEBUG)
    study = tmp_path / "study"
    series = slices(study / "Zimmermann_Friederike")
    shutil.copy(series / "0.dcm", study / "PX90210 copy.dcm")
    (study / "cut.dcm").write_bytes((series / "1.dcm").read_bytes()[:3000])
    clip = signed(pydicom.dcmread(get_testdata_file("examples_palette.dcm")))
    clip.save_as(study / "us.dcm")
    recwarn.clear(), caplog.clear()

    listing = v.scan(study)
    volume = v.read_series(next(files for files in listing.series().values() if files[0].modality == "CT"))
    us = next(f for f in listing.files if f.modality == "US")
    results, salt = tmp_path / "results", "twenty-one characters"
    mask = volume.with_values(volume.values > 200)
    made = [
        out.write_seg(results / "seg.dcm", mask, [out.Label("lesion")], NET, salt),
        out.write_sr(
            results / "sr.dcm", us, [out.Finding(out.Label("view"), {"probability": (0.5, "1")}, 0)], NET, salt
        ),
        out.write_overlay(results / "sc.dcm", us, 0, np.zeros((us.rows, us.columns), np.uint8), NET, salt),
        v.write_mask(results / "mask.nii.gz", mask),
    ]
    said = [json.dumps([listing.summary(), listing.skipped]), repr(listing), repr(volume), *map(str, volume.notes)]
    said += [remark for file in listing.files for remark in file.remarks] + [p.name for p in results.rglob("*")]
    print(*said)

    with dicom.quiet():
        patient = dicom.texts(pydicom.dcmread(series / "0.dcm", specific_tags=[k for k in SECRETS]))
    assert {"Zimmermann^Friederike", "PX90210", "Lindenallee 17"} <= patient
    contents = [p.read_bytes() for p in made if p.suffix == ".dcm"] + [gzip.decompress(made[3].read_bytes())]
    streams = [*capfd.readouterr(), caplog.text, *(str(w.message) for w in recwarn)]
    for text in {*patient, *WORDS}:
        assert not [s for s in streams if text.lower() in s.lower()], text
        assert not [c for c in contents if text.lower().encode() in c.lower()], text
    assert (
        len(contents) == 4
        and listing.skipped
        and all("***" in s["file"] or "cut" in s["file"] for s in listing.skipped)
    )


def test_without_a_salt_the_patient_is_in_dicom_objects_and_nowhere_else(tmp_path, capfd):
    volume = v.read_volume(slices(tmp_path / "Zimmermann"))
    mask = volume.with_values(volume.values > 200)
    seg = out.write_seg(tmp_path / "out" / "seg.dcm", mask, [out.Label("lesion")], NET)
    nii = v.write_mask(tmp_path / "out" / "mask.nii", mask)
    assert str(pydicom.dcmread(seg).PatientName) == "Zimmermann^Friederike"
    assert silent(nii.read_bytes().decode("latin-1")) and silent("".join(capfd.readouterr()))
    assert b"Habermehl" not in seg.read_bytes() and b"Klinikum" not in seg.read_bytes()


def test_writing_errors_quote_nothing(tmp_path):
    folder = slices(tmp_path, heights=(0,))
    with dicom.quiet():
        ds = pydicom.dcmread(folder / "0.dcm")
        ds.SOPClassUID, item = "1.2.3", Dataset()
        ds.OtherPatientIDsSequence = [item]
        ds.save_as(folder / "0.dcm")
    volume = v.read_volume(folder)
    with pytest.raises(DataError) as error:
        out.write_seg(tmp_path / "seg.dcm", volume.with_values(volume.values > 0), [out.Label("a")], NET)
    assert "no SEG can be made of it" in str(error.value) and silent(str(error.value))


def test_a_fragment_that_is_no_picture_is_refused(tmp_path):
    ds = signed(pydicom.dcmread(get_testdata_file("MR_small_jp2klossless.dcm")))
    ds.PixelData = encapsulate([b"Zimmermann" * 50])
    ds.save_as(tmp_path / "a.dcm")
    with pytest.raises(DataError) as error:
        dicom.read(dicom.inspect(tmp_path / "a.dcm", "a.dcm"))
    assert "frame 0 cannot be decoded" in str(error.value) and silent(str(error.value))
    assert io.BytesIO(ds.PixelData).getbuffer().nbytes > 500
