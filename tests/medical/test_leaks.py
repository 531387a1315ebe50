"""Duplicates: against numpy's correlation, on pictures that were changed a little, and on BUSI and COVID-CT."""

import csv
import time

import numpy as np
import pytest
from PIL import Image

from adaptsuite.errors import DataError, ResourceError
from adaptsuite.medical import leaks
from adaptsuite.medical.leaks import (
    Pairs,
    all_pairs,
    exact_pairs,
    leak_report,
    merged_groups,
    near_pairs,
    pixel_hash,
    read_grey,
    require_no_near_leak,
    scan,
    thumbnail,
)


def picture(seed, size=(96, 80)):
    """Blobs, as smooth as an ultrasound picture is at 32 x 32."""
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6), dtype=np.uint8))
    return np.asarray(coarse.resize(size[::-1], Image.Resampling.BICUBIC))


def pairs(*rows, correlation=None):
    return Pairs(np.array(rows).reshape(-1, 2), np.array(correlation or [0.97] * len(rows)))


def test_pairs_are_those_of_the_full_correlation_matrix_whatever_the_block():
    pictures = np.stack([thumbnail(picture(i % 30)) for i in range(50)]) + np.random.default_rng(0).normal(
        size=(50, 32, 32)
    ) * np.linspace(0, 40, 50).reshape(-1, 1, 1)
    matrix = np.triu(np.corrcoef(pictures.reshape(50, -1)), 1)
    expected = {tuple(row) for row in np.argwhere(matrix > 0.9).tolist()}
    assert 5 < len(expected) < 25
    for block in (7, 16, 1000):
        found = near_pairs(pictures, 0.9, block)
        assert {tuple(row) for row in found.rows.tolist()} == expected and len(found) == len(expected)
        assert found.correlation == pytest.approx(matrix[tuple(found.rows.T)], abs=1e-6)


def test_a_picture_is_found_again_after_what_an_export_does_to_it(tmp_path):
    whole = picture(0)
    Image.fromarray(whole).save(tmp_path / "a.png")
    Image.fromarray(whole).save(tmp_path / "b.jpg", quality=60)
    Image.fromarray(whole).resize((300, 200)).save(tmp_path / "c.png")
    Image.fromarray(whole[2:, 2:]).save(tmp_path / "d.png")
    Image.fromarray((0.7 * whole + 30).astype(np.uint8)).save(tmp_path / "e.png")
    Image.fromarray(np.stack([whole] * 3, -1)).save(tmp_path / "f.png")
    Image.fromarray(whole[:, ::-1]).save(tmp_path / "mirrored.png")
    Image.fromarray(picture(1)).save(tmp_path / "other.png")
    hashes, thumbnails = scan(sorted(tmp_path.iterdir()))
    found = all_pairs(hashes, thumbnails)
    assert {i for row in found.rows.tolist() for i in row} == set(range(6)) and len(found) == 15
    assert exact_pairs(hashes).rows.tolist() == [[0, 5]]
    assert merged_groups(found, rows=8).tolist() == [0] * 6 + [1, 2]


def test_a_hash_is_of_the_pixels():
    whole = picture(0)
    assert pixel_hash(whole) == pixel_hash(whole.astype(np.int32)) == pixel_hash(np.stack([whole] * 3, -1))
    assert pixel_hash(whole) == pixel_hash(np.asfortranarray(whole))
    changed = whole.copy()
    changed[3, 5] ^= 1
    assert len({pixel_hash(x) for x in (whole, changed, whole.T, whole.reshape(-1), whole.astype(float))}) == 5
    coloured = np.stack([whole, whole, changed], -1)
    assert pixel_hash(coloured) != pixel_hash(whole)


def test_a_thumbnail_is_the_mean_of_areas():
    whole = np.random.default_rng(0).random((64, 96))
    assert thumbnail(whole) == pytest.approx(whole.reshape(32, 2, 32, 3).mean((1, 3)), abs=1e-5)
    assert thumbnail(np.stack([whole] * 3, -1)) == pytest.approx(thumbnail(whole), abs=1e-5)
    for wrong in (np.zeros((4, 4, 4, 4)), np.full((4, 4), np.nan)):
        with pytest.raises(ValueError, match="finite picture"):
            thumbnail(wrong)


@pytest.mark.filterwarnings("error")
def test_pictures_of_one_value_are_like_none_but_their_equals():
    flat = [np.full((40, 40), value, dtype=np.uint8) for value in (0, 7, 7)]
    pictures = [*flat, picture(0)]
    hashes, thumbnails = [pixel_hash(p) for p in pictures], np.stack([thumbnail(p) for p in pictures])
    assert len(near_pairs(thumbnails)) == 0
    assert all_pairs(hashes, thumbnails).rows.tolist() == [[1, 2]]
    assert len(near_pairs(thumbnails[:0])) == 0 and len(all_pairs([], thumbnails[:0])) == 0


def test_groups_are_joined_along_chains_and_never_parted():
    groups = ["p1", "p1", "p2", "p3", "p4", "p4"]
    assert merged_groups(pairs((1, 2), (2, 3)), groups).tolist() == [0, 0, 0, 0, 1, 1]
    assert merged_groups(pairs((0, 5)), groups).tolist() == [0, 0, 1, 2, 0, 0]
    assert merged_groups(pairs(), groups).tolist() == [0, 0, 1, 2, 3, 3]
    assert merged_groups(pairs((0, 3), (3, 2)), rows=5).tolist() == [0, 1, 0, 0, 2]
    assert merged_groups(pairs(), rows=0).tolist() == []


def test_the_report_lists_what_crosses_parts_labels_and_groups_and_names_no_file():
    found = pairs((0, 1), (1, 2), (2, 3), (3, 4), correlation=[0.96, 0.99, 0.97, 0.98])
    report = leak_report(found, ["train", "train", "test", "", "test"], list("aabbb"), [1, 1, 2, 2, 3])
    assert report["pairs"] == 4 and report["rows"] == 5
    assert report["across_parts"] == [{"rows": [1, 2], "correlation": 0.99, "parts": ["train", "test"]}]
    assert report["across_labels"] == [{"rows": [1, 2], "correlation": 0.99, "labels": ["a", "b"]}]
    assert [p["rows"] for p in report["across_groups"]] == [[1, 2], [3, 4]]
    assert leak_report(pairs(), [], [])["across_parts"] == []
    assert "across_parts" not in leak_report(found)


def test_a_near_leak_stops_and_names_the_rows():
    where = [f"line {i}" for i in range(2, 7)]
    with pytest.raises(DataError, match="t.csv: pictures of two parts .*: line 3 in train and line 4 in test; give"):
        require_no_near_leak(pairs((1, 2)), ["train", "train", "test", "test", "test"], where, "t.csv")
    require_no_near_leak(pairs((1, 2)), ["train"] * 5, where, "t.csv")


def test_files_that_are_no_pictures_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="a.png: no picture that can be read"):
        read_grey(tmp_path / "a.png")
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "b.png")
    assert read_grey(tmp_path / "b.png").max() == 4095


def test_too_many_pairs_are_an_error_and_not_a_full_memory(monkeypatch):
    monkeypatch.setattr(leaks, "MOST", 100)
    with pytest.raises(ResourceError, match="more than 100 pairs correlate above 0.95"):
        near_pairs(np.stack([thumbnail(picture(0))] * 20))


@pytest.mark.slow
def test_ten_thousand_pictures_are_compared_in_half_a_minute_of_one_core():
    start = time.process_time()
    found = near_pairs(np.random.default_rng(0).random((10_000, 32, 32), dtype=np.float32))
    assert len(found) == 0 and time.process_time() - start < 30


def read_table(folder):
    with (folder / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, scan(folder / row["path"] for row in rows)


def test_busi_s_groups_are_found_again(data_dir):
    rows, (hashes, thumbnails) = read_table(data_dir("medical_busi"))
    found = all_pairs(hashes, thumbnails)
    own = merged_groups(found, rows=len(rows))
    listed = np.unique([row["group"] for row in rows], return_inverse=True)[1]
    ours, theirs = (np.triu(g[:, None] == g, 1) for g in (own, listed))
    assert (ours & theirs).sum() == theirs.sum() == 192  # every pair of one group of the table is of one group here
    assert (ours & ~theirs).sum() <= 4  # at .950, where another way to make thumbnails decides
    assert abs(len(set(own.tolist())) - 452) <= 2
    names = [row["path"].split("/")[-1].removesuffix(".jpg") for row in rows]
    differ = leak_report(found, labels=[row["label"] for row in rows])["across_labels"]
    known = {("benign_042", "malignant_051"), ("benign_131", "malignant_051"), ("benign_433", "malignant_145")}
    assert known < {(names[p["rows"][0]], names[p["rows"][1]]) for p in differ}  # those of the README that are here
    assert [[names[i] for i in row] for row in exact_pairs(hashes).rows] == [["benign_433", "malignant_145"]]


def test_covid_ct_s_near_duplicates_are_of_one_patient(data_dir):
    rows, (hashes, thumbnails) = read_table(data_dir("medical_covid_ct"))
    found = all_pairs(hashes, thumbnails)
    report = leak_report(found, *([row[c] for row in rows] for c in ("split", "label", "group")))
    assert report["pairs"] == 12 and not (report["across_parts"] or report["across_labels"] or report["across_groups"])
