"""Generated ultrasound: the same again, masks that are the lesion, patients that stay in one part."""

import csv

import numpy as np
from PIL import Image

from adaptsuite.medical import dicom
from adaptsuite.medical.synthetic import frames, make_dataset, sample_patient, write_clip


def patient(seed, lesion=True):
    return sample_patient(np.random.default_rng(seed), lesion)


def test_the_same_patient_gives_the_same_frames_and_another_others():
    first, again, other = (list(frames(patient(s), 2)) for s in (0, 0, 1))
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0][0], other[0][0])


def test_a_lesion_is_darker_than_what_is_beside_it_and_health_has_none():
    for seed in range(8):
        for picture, mask in frames(patient(seed), 2):
            assert 0.005 < mask.mean() < 0.4
            rows = mask.any(1)
            assert picture[mask].mean() < picture[rows][~mask[rows]].mean() - 5
        assert not any(mask.any() for _, mask in frames(patient(seed, lesion=False), 1))


def test_frames_of_one_patient_are_more_alike_than_those_of_two():
    from scipy.ndimage import gaussian_filter

    def correlation(a, b):
        return np.corrcoef(gaussian_filter(a.astype(float), 3).ravel(), gaussian_filter(b.astype(float), 3).ravel())[
            0, 1
        ]

    own, others = [], []
    for seed in range(6):
        (a, _), (b, _) = frames(patient(seed), 2)
        (c, _), *_ = frames(patient(seed + 20), 1)
        own.append(correlation(a, b))
        others.append(correlation(a, c))
    assert np.mean(own) > np.mean(others) + 0.1


def test_a_patient_lies_in_one_part_and_masks_are_where_the_table_says(tmp_path):
    table = make_dataset(tmp_path, patients=10, count=2, size=48)
    rows = list(csv.DictReader(table.open()))
    parts = {}
    for row in rows:
        parts.setdefault(row["group"], set()).add(row["split"])
        assert (row["label"] == "lesion") == bool(row["mask"])
        if row["mask"]:
            assert np.asarray(Image.open(tmp_path / row["mask"])).any()
    assert len(rows) == 20 and all(len(own) == 1 for own in parts.values())
    assert {part for own in parts.values() for part in own} == {"train", "val", "test"}


def test_a_clip_is_read_back_frame_by_frame(tmp_path):
    path = write_clip(tmp_path / "study" / "clip.dcm", patient(3), count=3, size=64)
    file = dicom.inspect(path)
    assert (file.modality, file.frames, file.burned_in) == ("US", 3, False)
    pictures = np.stack([picture for picture, _ in frames(patient(3), 3, 64)])
    assert np.array_equal(dicom.read(path, window=(127.5, 256))[..., 0], pictures)
