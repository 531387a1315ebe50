"""The medical domain from table to report: frames of one row, records of validation rows, evidence without names."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from adaptsuite import applied, experiment
from adaptsuite.commands import read_recipe
from adaptsuite.domain import Said
from adaptsuite.errors import DataError, UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.manifest import load_manifest
from adaptsuite.medical import findings
from adaptsuite.medical.data import Frames, Reading, inspect, kind, look, one_series, pictures
from adaptsuite.medical.findings import EvidenceSettings, _called, _together
from adaptsuite.medical.pipeline import MedicalDomain

SMALL = FrontEnd(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
NAME = "Doe_Jane_19470229"


def write_table(folder, count=24, group=True, twin=False):
    """Bright discs against rings, two pictures a patient whose name is in the path."""
    rng, rows = np.random.default_rng(0), []
    y, x = np.mgrid[:48, :48]
    for i in range(count):
        label = ("normal", "lesion")[i // 2 % 2]
        r = np.hypot(y - rng.uniform(16, 32), x - rng.uniform(16, 32))
        shape = r < 10 if label == "lesion" else abs(r - 10) < 2
        picture = rng.normal(80, 20, (48, 48)) + 120 * shape
        name = f"{NAME}_{i}.png"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / name)
        split = "test" if i % 6 > 3 else "val" if i % 6 > 1 else "train"
        rows.append(f"{name},{label},{split}" + (f",{NAME}_{i // 2}" if group else ""))
    if twin:
        (folder / "twin.png").write_bytes((folder / f"{NAME}_0.png").read_bytes())
        rows.append(f"twin.png,normal,test,{NAME}_other")
    header = "path,label,split" + (",group" if group else "")
    (folder / "manifest.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def recipe_of(data, domain, *settings):
    options = {"data": str(data), "backbone": "embedded:vision-tiny", "method": "lora", "epochs": 2, "batch_size": 8}
    settings = ["front_end.size=48", "plan.device=cpu", *settings]
    return read_recipe(domain, {**options, "setting": settings, "size": ("front_end.size", None)})


# ---- files to frames


def test_kinds_of_files_and_how_many_frames_they_have(tmp_path):
    clip = get_testdata_file("examples_ybr_color.dcm")
    found = inspect(Path(clip))
    assert (found.frames, found.height, found.width) == (30, 240, 320)
    frames = list(pictures(found.path, Reading(frames=4)))
    assert len(frames) == 4 and {f.mode for f in frames} == {"RGB"}
    assert (
        kind(tmp_path) == "series" and kind(tmp_path / "a.nii.gz") == "nifti" and kind(tmp_path / "a.png") == "picture"
    )


def test_frames_are_the_middles_of_equal_stretches():
    assert Reading(frames=3).chosen(30) == [5, 15, 25]
    assert Reading(frames=8).chosen(5) == list(range(5))
    assert Reading(frames=0).chosen(30) == list(range(30))


def test_a_volume_is_read_as_slices_of_the_plane_asked_for(tmp_path):
    import nibabel

    values = np.zeros((6, 20, 30), np.float32)  # (w, h, d)
    values[:, :, 12:] = 100
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 1.0, 1.0, 1.0])), tmp_path / "v.nii.gz")
    with pytest.raises(DataError, match="6 x 20 pixels"):
        inspect(tmp_path / "v.nii.gz")
    found = inspect(tmp_path / "v.nii.gz", "sagittal")
    assert (found.frames, found.height, found.width) == (6, 30, 20)
    slices = [np.asarray(p) for p in pictures(tmp_path / "v.nii.gz", Reading(plane="sagittal", window=(50, 100)))]
    assert len(slices) == 6
    assert slices[0][0].max() == 255 and slices[0][-1].max() == 0  # the head is up, where z is large


def test_a_plane_is_followed_by_a_domain_that_has_looked_at_the_files_before(tmp_path):
    """The header that a table is checked by is that of axial slices."""
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.random.rand(12, 20, 30).astype(np.float32), np.eye(4)), tmp_path / "v.nii.gz")
    domain, path = MedicalDomain(), tmp_path / "v.nii.gz"
    assert domain.header(path).frames == 30
    for plane, slices in (("sagittal", 12), ("coronal", 20), ("axial", 30)):
        reading = Reading(frames=0, plane=plane)
        data = Frames([path], None, SMALL, reading=reading, headers=domain.headers)
        assert len(data) == slices and data[slices - 1]["image"].shape == (3, 32, 32)


def test_outputs_of_a_row_are_the_mean_over_its_frames(tmp_path):
    Image.new("L", (20, 20), 90).save(tmp_path / "a.png")
    clip = Path(get_testdata_file("examples_ybr_color.dcm"))
    data = Frames([tmp_path / "a.png", clip], np.array([0, 1]), SMALL, reading=Reading(frames=3))
    assert len(data) == 4 and data.rows.tolist() == [0, 1, 1, 1] and data.starts.tolist() == [0, 5, 15, 25]
    assert data.item_targets.tolist() == [0, 1, 1, 1]
    items = [data[i] for i in range(4)]
    assert {tuple(i["image"].shape) for i in items} == {(3, 32, 32)} and [int(i["label"]) for i in items] == [
        0,
        1,
        1,
        1,
    ]
    assert not torch.equal(items[1]["image"], items[3]["image"])
    data.load()
    assert torch.equal(data[3]["image"], items[3]["image"])
    outputs = np.arange(8, dtype=np.float32).reshape(4, 2)
    assert np.allclose(data.mean_by_row(outputs), [[0, 1], [4, 5]])
    assert any("30 frames" in r or "to 30" in r for r in data.remarks())


def test_a_folder_row_is_one_series_and_two_are_refused(tmp_path):
    import shutil

    shutil.copy(get_testdata_file("CT_small.dcm"), tmp_path / "a.dcm")
    assert len(one_series(tmp_path)) == 1
    table = tmp_path.parent / f"{tmp_path.name}.csv"
    table.write_text(f"path,label\n{tmp_path.name},x\n")
    assert load_manifest(table, folders=True).rows[0].path == tmp_path.resolve()
    with pytest.raises(DataError, match="is a folder"):
        load_manifest(table)
    shutil.copy(get_testdata_file("MR_small.dcm"), tmp_path / "b.dcm")
    with pytest.raises(DataError, match="2 series"):
        one_series(tmp_path)


def test_a_dicom_file_without_pixels_is_refused():
    with pytest.raises(DataError, match="holds no picture"):
        inspect(Path(get_testdata_file("rtplan.dcm")))


def test_look_decodes_and_remarks(tmp_path):
    found = look(Path(get_testdata_file("CT_small.dcm")), Reading())
    assert (found["width"], found["height"], found["frames"]) == (128, 128, 1)


# ---- the finding


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("COVID", "NonCOVID"), {"COVID": [0]}),
        (("benign", "malignant"), {"malignant": [1]}),
        (("0", "1"), {"1": [1]}),
        (("cat", "dog"), {}),
        (("no", "normal"), {}),
        (("a", "b", "c"), {"a": [0], "b": [1], "c": [2]}),
    ],
)
def test_of_two_classes_the_finding_is_the_one_whose_opposite_is_named(classes, expected):
    assert findings.findings(classes, "multiclass", EvidenceSettings()) == expected


def test_several_classes_can_be_one_finding():
    classes = ("benign", "malignant", "normal")
    found = findings.findings(classes, "multiclass", EvidenceSettings(positive=("benign", "malignant")))
    assert found == {"benign or malignant": [0, 1]}
    outputs = np.log([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])
    assert np.allclose(findings.probability(outputs, [0, 1], "multiclass"), [0.5, 0.2])
    assert findings.truth(np.array([0, 1, 2]), [0, 1]).tolist() == [True, True, False]
    with pytest.raises(UsageError, match="no class 'benin'"):
        findings.findings(classes, "multiclass", EvidenceSettings(positive=("benin",)))
    with pytest.raises(UsageError, match="every class"):
        findings.findings(classes, "multiclass", EvidenceSettings(positive=classes))


def test_rows_of_folds_with_other_thresholds_are_called_by_their_own(tmp_path):
    manifest = load_manifest(write_table(tmp_path, 12), "multiclass")
    rng = np.random.default_rng(0)
    p = rng.uniform(0.01, 0.99, 12)
    p[3] = 0.3  # on its threshold: called
    outputs = np.log(np.stack([p, 1 - p], 1))
    cuts = [0.3] * 6 + [0.8] * 6
    parts = [
        Said(
            manifest.subset(range(at, at + 6)),
            outputs[at : at + 6],
            outputs[at : at + 6],
            {"threshold": {"lesion": {"value": v, "target": "f1"}}},
        )
        for at, v in ((0, 0.3), (6, 0.8))
    ]
    rows = _together(parts)
    own = findings._finding(rows, "lesion", [0], manifest.classes)
    assert manifest.classes[0] == "lesion" and own.threshold == 0.5
    assert _called(rows, "lesion", own).called.tolist() == [
        bool(a >= b or np.isclose(a, b, atol=1e-12)) for a, b in zip(p, cuts, strict=True)
    ]


# ---- end to end


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, out = write_table(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("run") / "out"
    domain = MedicalDomain()
    recipe, manifest = experiment.settle(domain, recipe_of(folder, domain, "evidence.operating_point=f1"))
    return folder, out, experiment.run(domain, recipe, manifest, out)


def test_validation_rows_leave_temperature_or_reason_and_threshold(run):
    _, out, result = run
    record = json.loads((out / "adapter" / "adapter.json").read_text())
    point = record["threshold"]["lesion"]
    assert point["target"] == "f1" and 0 <= point["value"] <= 1
    assert record.get("temperature") or any("no temperature" in w for w in result["warnings"])


def test_evidence_is_in_json_report_and_card(run):
    _, out, result = run
    found = result["metrics"]["evidence"]["Finding: lesion"]["metrics"]
    assert set(found) >= {"auroc", "auprc", "f1", "sensitivity", "specificity", "brier", "ece"}
    page = (out / "report.html").read_text()
    assert "lesion: ROC" in page and "Patients against frames" in page and "Examples" in page
    assert (out / "model_card.md").read_text().startswith("# lesion")


def test_no_file_that_a_run_writes_names_a_patient(run):
    _, out, _ = run
    for file in out.rglob("*"):
        if file.is_file() and file.suffix in (".html", ".json", ".jsonl", ".csv", ".md", ".toml"):
            assert NAME not in file.read_text(errors="ignore"), file
    assert "line 6" in (out / "predictions.csv").read_text()


def test_evaluate_gives_calibrated_scores_and_the_stored_operating_point(run):
    folder, out, result = run
    found = applied.score_adapter(MedicalDomain(), out / "adapter", str(folder), None, "cpu", None).result["metrics"]
    for name, metric in result["metrics"]["test"].items():
        assert found["test"][name]["value"] == pytest.approx(metric["value"], abs=1e-5)
    before, after = (m["evidence"]["Finding: lesion"]["metrics"]["sensitivity"] for m in (result["metrics"], found))
    assert before["value"] == after["value"]


def test_a_classifier_gives_the_same_probabilities(run):
    from adaptsuite.medical import load

    folder, out, _ = run
    rows = (out / "predictions.csv").read_text().splitlines()
    names = rows[0].split(",")
    line = next(i for i, row in enumerate((folder / "manifest.csv").read_text().splitlines()) if ",test," in row)
    said = dict(zip(names, rows[1].split(","), strict=True))
    own = load(out, device="cpu").predict([folder / f"{NAME}_{line - 1}.png"])[0]
    assert said["path"] == f"line {line + 1}"
    assert own["lesion"] == pytest.approx(float(said["p(lesion)"]), abs=1e-4)


def test_nearly_the_same_picture_in_two_parts_is_told_and_can_stop(tmp_path):
    folder, domain = write_table(tmp_path, twin=True), MedicalDomain()
    recipe, manifest = experiment.settle(domain, recipe_of(folder, domain))
    folds = experiment._folds(manifest, recipe.data, 0)
    said = domain.doubts(recipe, manifest, folds)
    assert any("line 2 (train) and line 26 (test)" in s for s in said)
    recipe, manifest = experiment.settle(domain, recipe_of(folder, domain, "evidence.near_duplicates=stop"))
    with pytest.raises(DataError, match="line 2 in train and line 26 in test"):
        domain.doubts(recipe, manifest, folds)


def test_a_table_without_groups_and_an_unnamed_finding_are_told(tmp_path):
    folder, domain = write_table(tmp_path, group=False), MedicalDomain()
    recipe, manifest = experiment.settle(domain, recipe_of(folder, domain))
    text = (folder / "manifest.csv").read_text().replace("normal", "round").replace("lesion", "square")
    (folder / "manifest.csv").write_text(text)
    recipe, manifest = experiment.settle(domain, recipe_of(folder, domain))
    said = domain.doubts(recipe, manifest, experiment._folds(manifest, recipe.data, 0))
    assert any("no column 'group'" in s for s in said) and any("evidence.positive" in s for s in said)
