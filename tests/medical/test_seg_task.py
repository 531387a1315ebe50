"""Masks at full size: what is counted, what is decided from areas, and the whole way through the commands."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from adaptsuite.errors import DataError, UsageError
from adaptsuite.experiment import complete, restore
from adaptsuite.front_end import FrontEnd
from adaptsuite.manifest import Manifest, Row, load_manifest, split
from adaptsuite.medical import surface
from adaptsuite.medical.area_rule import AREA, PIXEL, PIXELS, area_shares, is_positive
from adaptsuite.medical.classifier import load
from adaptsuite.medical.findings import EvidenceSettings
from adaptsuite.medical.pipeline import DOMAIN
from adaptsuite.medical.seg_data import Masked, Truth
from adaptsuite.medical.seg_evidence import chosen, evaluate, score
from adaptsuite.medical.seg_predict import Segmenter, labels_of
from adaptsuite.medical.seg_task import (
    ABOVE,
    APART,
    BOTH,
    CALLED,
    LEAST,
    SHARE,
    SIZE,
    TRUE,
    FullSize,
    SegmentationTask,
    at_size,
    choose_rules,
    dice_of,
    finding_scores,
    jaccard_of,
    ruled,
)
from adaptsuite.predict import predict_all
from adaptsuite.recipe import Recipe

PAPER = PIXELS.index(PIXEL)


class Red(nn.Module):
    """A model whose probability of class k is channel k of the picture."""

    def __init__(self, classes=1):
        super().__init__()
        self.classes, self.unused = classes, nn.Parameter(torch.zeros(1))

    def forward(self, image):
        return torch.logit(image[:, : self.classes], eps=1e-6)


def pictures(folder, count=5, size=(30, 44), classes=1):
    """(paths, truths): noise, with a mask of a shifted square in all but the last."""
    rng, paths, truths = np.random.default_rng(0), [], []
    for i in range(count):
        image = (rng.random((*size, 3)) * 120).astype(np.uint8)
        image[5 : 15 + i, 6 : 20 + 2 * i, i % classes] += 130
        mask = np.zeros(size, dtype=np.uint8)
        mask[7 : 16 + i, 4 : 21 + 2 * i] = 1 + i % classes
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / f"m{i}.png")
        paths.append(folder / f"{i}.png")
        truths.append(Truth(f"line {i + 2}", folder / f"m{i}.png" if i < count - 1 else None, (0.5, 2.0)))
    return paths, truths


# ---- at full size


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_full_size_outputs_are_counts_of_the_resized_maps(tmp_path, fit):
    paths, truths = pictures(tmp_path, classes=2)
    front = FrontEnd(size=(16, 24), fit=fit)
    data, task, maps = Masked(paths, truths, front, 2), SegmentationTask("ab"), {}
    found, _ = predict_all(Red(2), FullSize(task, data, maps.__setitem__), data, batch_size=2)
    assert found.shape == (5, 2, ABOVE + len(PIXELS))
    for i, own in enumerate(found):
        truth = data.full_mask(i)
        assert maps[i].shape == (2, 30, 44)
        np.testing.assert_array_equal(own[:, ABOVE:] / own[:, [SIZE]], area_shares(maps[i], PIXELS).astype(np.float32))
        for k in range(2):
            called, there = maps[i][k] > 0.5, truth == k + 1
            expected = surface.compare(called, there, (0.5, 2.0))
            assert own[k, [BOTH, CALLED, TRUE, SIZE]].tolist() == [
                (called & there).sum(), called.sum(), there.sum(), 30 * 44,
            ]  # fmt: skip
            assert dice_of(own)[k] == pytest.approx(expected["dice"], abs=1e-6)
            assert jaccard_of(own)[k] == pytest.approx(expected["jaccard"], abs=1e-6)
            assert own[k, APART] == pytest.approx(expected["hd95_mm"], nan_ok=True, rel=1e-6)


def test_a_map_of_a_padded_input_is_cut_to_its_picture():
    front = FrontEnd(size=(48, 64), fit="pad")
    maps = torch.zeros(1, 48, 64)
    maps[:, 10:38] = 1  # 28 rows: those of a picture of 40 x 92
    found = at_size(maps, (40, 92), front)
    assert found.shape == (1, 40, 92) and found.min() == 1


def test_a_picture_is_said_the_same_alone_and_in_a_batch_and_by_the_object(tmp_path):
    paths, truths = pictures(tmp_path)
    data, task = Masked(paths, truths, FrontEnd(size=(16, 24), fit="squash"), 1), SegmentationTask(["a"])
    several, _ = predict_all(Red(), FullSize(task, data), data, batch_size=4)
    single, _ = predict_all(Red(), FullSize(task, data), data, batch_size=1)
    np.testing.assert_array_equal(several, single)


def test_training_watches_the_same_masks_at_the_input_size(tmp_path):
    paths, truths = pictures(tmp_path, size=(16, 24))
    data, task = Masked(paths, truths, FrontEnd(size=(16, 24), fit="squash"), 1), SegmentationTask(["a"])
    full, _ = predict_all(Red(), FullSize(task, data), data)
    small, present = predict_all(Red(), task, data)
    np.testing.assert_array_equal(full[..., :3], small)
    assert present.tolist() == [[1]] * 4 + [[0]]
    said = task.score(small, present)
    assert said["dice"] == pytest.approx(np.mean(dice_of(small)))
    assert said["dice_present"] == pytest.approx(np.mean(dice_of(small)[:4]))


def test_flipped_views_are_flipped_back(tmp_path):
    image = (torch.rand(2, 3, 8, 10) * 255).to(torch.uint8)
    plain, both = (SegmentationTask(["a"], tta=tta).probabilities(Red(), image) for tta in ("none", "flip"))
    torch.testing.assert_close(plain, both)
    with pytest.raises(UsageError, match="none or flip"):
        SegmentationTask(["a"], tta="ten_crop")


def test_dice_of_two_empty_masks_is_1_and_of_one_is_0():
    counts = np.array([[[0, 0, 0]], [[0, 5, 0]], [[0, 0, 7]], [[2, 4, 4]]])
    assert dice_of(counts).ravel().tolist() == [1, 0, 0, 0.5]
    assert jaccard_of(counts).ravel().tolist() == [1, 0, 0, pytest.approx(1 / 3)]


# ---- from areas to a finding


def row(above, size=224**2, true=0.0, both=0.0):
    """Raw outputs of one class: pixels above .5, and above the others as many."""
    return [both, above, true, size, np.nan, *[above] * len(PIXELS)]


def test_the_papers_rule_calls_502_of_224_squared_pixels_and_not_501():
    raw = np.array([[row(501)], [row(502)]], dtype=np.float32)
    found = ruled(raw, None)
    assert found[:, 0, LEAST].tolist() == [AREA, AREA] and (finding_scores(found)[:, 0] >= 0.5).tolist() == [
        False,
        True,
    ]
    maps = np.zeros((2, 224, 224))
    maps[0].flat[:501], maps[1].flat[:502] = 0.6, 0.6
    assert is_positive(maps).tolist() == [False, True]


@pytest.mark.parametrize(("above", "size"), [(1, 100), (7, 700), (100, 10_000), (656, 65_600)])
def test_an_area_of_exactly_one_percent_is_enough_in_single_precision(above, size):
    raw = np.array([[row(above, size)], [row(above - 1, size)]], dtype=np.float32)
    assert (finding_scores(ruled(raw, None))[:, 0] >= 0.5).tolist() == [True, False]


def test_rules_come_from_validation_rows_and_are_followed():
    rng = np.random.default_rng(0)
    truth = np.arange(40) % 2 == 0
    above = np.where(truth, rng.integers(300, 900, 40), rng.integers(0, 250, 40))
    raw = np.array([[row(a, 10_000, true=50.0 * t)] for a, t in zip(above, truth, strict=True)], dtype=np.float32)
    raw[:, 0, ABOVE:] = raw[:, 0, [CALLED]] * np.linspace(1.8, 0.2, len(PIXELS))
    kept = choose_rules(raw, ["a"], np.arange(40), EvidenceSettings(operating_point="youden"))
    rule = json.loads(json.dumps(kept["threshold"]))["a"]
    assert rule["reached"] and rule["pixel"] == PIXEL and 250 / 10_000 < rule["value"] < 300 / 10_000
    found = ruled(raw, kept["threshold"])
    assert np.array_equal(finding_scores(found)[:, 0] >= 0.5, truth)
    np.testing.assert_allclose(found[:, 0, SHARE], raw[:, 0, ABOVE + PAPER] / 10_000)


def test_without_negatives_the_papers_rule_is_taken_and_said():
    raw = np.array([[row(600, 10_000, true=5.0)], [row(700, 10_000, true=5.0)]], dtype=np.float32)
    kept = choose_rules(raw, ["a"], np.arange(2), EvidenceSettings())
    assert kept["threshold"]["a"]["value"] == AREA and kept["threshold"]["a"]["reached"] is None
    assert "all 2 validation rows are positive" in kept["notes"][0] and "FetalCLIP" in kept["notes"][0]


def test_folds_with_different_rules_are_pooled_by_their_own():
    raw = np.array([[row(200, 10_000)], [row(200, 10_000)]], dtype=np.float32)
    strict, loose = ({"a": {"pixel": 0.5, "value": v}} for v in (0.03, 0.02))
    pooled = np.concatenate([ruled(raw[:1], strict), ruled(raw[1:], loose)])
    assert (finding_scores(pooled)[:, 0] >= 0.5).tolist() == [False, True]


def test_a_rule_of_area_0_calls_every_row():
    raw = np.array([[row(0, 100)], [row(3, 100)]], dtype=np.float32)
    assert (finding_scores(ruled(raw, {"a": {"pixel": 0.5, "value": 0.0}}))[:, 0] >= 0.5).all()


# ---- metrics


def table(count, groups=None, columns=("path", "label", "mask"), classes=("foreground",)):
    rows = [Row(f"/{i}", f"{i}.png", (), i + 2, {"group": f"g{groups[i]}"} if groups else {}) for i in range(count)]
    columns = (*columns, "group") if groups else columns
    return Manifest(tuple(rows), classes, "/", type("P", (), {"name": "m.csv"}), "segmentation", columns)


def outputs(cells):
    """(rows, K, 7) of (both, called, true, apart) of 1000 pixels, by the paper's rule."""
    raw = np.array([[row(c, 1000, t, b) for b, c, t, _ in own] for own in cells], dtype=np.float32)
    raw[..., APART] = [[a for *_, a in own] for own in cells]
    return ruled(raw, None)


def test_metrics_of_one_class_are_those_of_its_cases():
    cells = [(80, 100, 90, 4.0), (0, 0, 50, np.inf), (0, 0, 0, np.nan), (0, 30, 0, np.inf), (60, 70, 80, 8.0)]
    found = evaluate(table(5), ["foreground"], outputs([[c] for c in cells]), repeats=50)
    dice = [160 / 190, 0, 1, 0, 120 / 150]
    assert found["dice"]["value"] == pytest.approx(np.mean(dice))
    assert found["dice_present"]["value"] == pytest.approx(np.mean([dice[0], dice[1], dice[4]]))
    assert found["jaccard"]["value"] == pytest.approx(np.mean([80 / 110, 0, 1, 0, 60 / 90]))
    assert found["hd95_px"]["value"] == pytest.approx(6.0) and "2 cases with one mask empty" in found["hd95_px"]["note"]
    assert found["sensitivity"]["value"] == pytest.approx(2 / 3) and found["specificity"]["value"] == 0.5
    assert found["f1"]["value"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["auroc"]["value"] == pytest.approx((2 + 2 + 0.5) / 6)
    assert all(low <= high for low, high in (m["ci"] for m in found.values() if m["ci"]))


def test_with_a_spacing_distances_are_in_millimetres_and_values_agree_with_score():
    cells = [[(80, 100, 90, 4.0)], [(0, 0, 0, np.nan)]]
    manifest = table(2, columns=("path", "mask", "spacing_mm"))
    found = evaluate(manifest, ["foreground"], outputs(cells), repeats=20)
    assert "hd95_mm" in found and "hd95_px" not in found
    assert score(manifest, ["foreground"], outputs(cells)) == {
        k: m["value"] for k, m in found.items() if m["value"] is not None
    }


def test_several_classes_have_their_mean_and_each_its_own():
    cells = [[(80, 100, 90, 4.0), (0, 0, 0, np.nan)], [(0, 0, 50, np.inf), (10, 20, 20, 1.0)]]
    found = evaluate(table(2), ["liver", "lesion"], outputs(cells), repeats=20)
    assert found["dice"]["value"] == pytest.approx(np.mean([160 / 190, 1, 0, 0.5]))
    assert found["dice liver"]["value"] == pytest.approx(np.mean([160 / 190, 0]))
    assert found["dice_present"]["value"] == pytest.approx(np.mean([160 / 190, np.mean([0, 0.5])]))
    assert {"hd95_px lesion", "auroc liver", "f1 lesion"} <= set(found)


def test_intervals_draw_patients_and_not_rows():
    rng = np.random.default_rng(0)
    level = np.repeat(rng.uniform(0.2, 0.9, 12), 10)
    cells = [[(int(100 * v), 100, 100, 1.0)] for v in level]
    patients = [i // 10 for i in range(120)]
    wide, narrow = (evaluate(table(120, g), ["foreground"], outputs(cells))["dice"]["ci"] for g in (patients, None))
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_examples_go_from_the_worst_to_the_best_and_show_false_ones():
    cells = [[(10 * i, 100, 100, 1.0)] for i in range(10)] + [[(0, c, 0, np.inf)] for c in (5, 80, 0)]
    assert chosen(outputs(cells)) == [0, 2, 4, 5, 7, 9, 11, 10]


# ---- tables


def written(folder, rows, header="path,mask,label,group"):
    (folder / "manifest.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def test_tables_of_masks_need_no_labels_and_keep_their_classes(tmp_path):
    pictures(tmp_path, 4)
    settings = Recipe("medical").data
    found = DOMAIN.table(
        replace(settings, manifest=str(written(tmp_path, ["0.png,m0.png,,", "1.png,,,"])), task="segmentation")
    )
    assert found.classes == ("foreground",) and found.rows[0].files["mask"].name == "m0.png" and not found.rows[1].files
    assert found.without({1: "bad"}).classes == ("foreground",)
    assert [t.name for t in DOMAIN.targets(found, ("foreground",))] == ["line 2", "line 3"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0.png,m0.png,a,g", "0.png,m1.png,b,g"], "line 3: duplicate of line 2"),
        (["0.png,,a,g", "1.png,,b,h"], "'mask' is empty in every row"),
        (["0.png,none.png,a,g"], "line 2: 'none.png' does not exist"),
        (["0.png,../m0.png,a,g"], "leads outside"),
    ],
)
def test_tables_of_masks_that_cannot_be_right_are_refused(tmp_path, rows, said):
    pictures(tmp_path, 3)
    data = replace(Recipe("medical").data, manifest=str(written(tmp_path, rows)), task="segmentation")
    with pytest.raises(DataError, match=said):
        DOMAIN.table(data)


def test_spacings_are_one_or_two_numbers(tmp_path):
    pictures(tmp_path, 3)
    for cell, expected in (("0.5", (0.5, 0.5)), ("0.5 0.25", (0.5, 0.25)), ("0", None), ("a", None), ("1 2 3", None)):
        data = replace(
            Recipe("medical").data,
            manifest=str(written(tmp_path, [f"0.png,m0.png,{cell}"], "path,mask,spacing_mm")),
            task="segmentation",
        )
        if expected:
            assert DOMAIN.targets(DOMAIN.table(data), ("foreground",))[0].spacing_mm == expected
        else:
            with pytest.raises(DataError, match="line 2: spacing_mm"):
                DOMAIN.table(data)


def test_splits_of_masks_keep_groups_and_labels_in_proportion(tmp_path):
    pictures(tmp_path, 1)
    for i in range(40):
        (tmp_path / f"p{i}.png").write_bytes((tmp_path / "0.png").read_bytes())
    rows = [f"p{i}.png,{'m0.png' if i % 4 else ''},{'ill' if i % 4 else 'well'},g{i // 2}" for i in range(40)]
    found = load_manifest(written(tmp_path, rows), "segmentation", files=("mask",), classes=("foreground",))
    fold = split(found, seed=1)[0]
    assert all(fold.sizes.values())
    for part in ("val", "test"):
        labels = {found.rows[i].label for i in getattr(fold, part)}
        assert labels == {"ill", "well"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"front_end": {"fit": "crop"}}, "front_end.fit=crop: a mask covers the whole picture"),
        ({"front_end": {"ratio": 1.2}}, "front_end.ratio=1.2"),
        ({"head": {"kind": "ifa"}}, "head.kind=ifa gives no masks"),
        ({"head": {"balance": "weights"}}, "for labels, not for masks"),
        ({"augment": {"mixup": 0.2}}, "augment.mixup is not for masks"),
    ],
)
def test_recipes_that_masks_cannot_follow_are_refused(changes, said):
    recipe = Recipe("medical", backbone="embedded:vision-tiny", method="lora", **changes)
    with pytest.raises(UsageError, match=said):
        complete(DOMAIN, replace(recipe, data=replace(recipe.data, task="segmentation")))


@pytest.mark.parametrize("head", [{"kind": "unet"}, {"width": 16}, {"after": (2, 4)}, {"loss": "dice"}])
def test_a_head_of_masks_for_labels_is_refused(head):
    recipe = Recipe("medical", backbone="embedded:vision-tiny", method="lora", head=head)
    with pytest.raises(UsageError, match="masks: add --set data.task=segmentation"):
        complete(DOMAIN, recipe)


def test_classes_of_masks_for_labels_are_refused(study, adapt):
    _, err = adapt("train", "--data", study, *OPTIONS[2:], "--set", "data.classes=a", "--dry-run", code=2)
    assert "data.classes names what masks hold" in err


# ---- the commands


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A table of 24 small pictures of 12 patients, a bright square in two of three."""
    folder, rng, rows = tmp_path_factory.mktemp("study"), np.random.default_rng(0), []
    for i in range(24):
        image = (rng.random((40, 56)) * 90).astype(np.uint8)
        mask = np.zeros_like(image)
        if i % 3:
            top, left = rng.integers(4, 16, 2)
            image[top : top + 18, left : left + 22] += 120
            mask[top : top + 18, left : left + 22] = 255
        Image.fromarray(image).save(folder / f"patient_smith_{i}.png")
        Image.fromarray(mask).save(folder / f"m{i}.png")
        part = ("train", "train", "val", "test")[i // 6]
        rows.append(f"patient_smith_{i}.png,{f'm{i}.png' if i % 3 else ''},smith{i // 2},{part}")
    return written(folder, rows, "path,mask,group,split")


OPTIONS = ("--set", "data.task=segmentation", "--backbone", "embedded:vision-tiny", "--image-size", "48")


@pytest.mark.parametrize("kind", ["unet", "linear"])
def test_training_evaluation_prediction_and_report_of_masks(study, tmp_path, adapt, kind):
    out = tmp_path / "run"
    settings = ("--set", f"head.kind={kind}", "--set", "head.width=8", "--set", "evidence.operating_point=f1")
    plan = ("--method", "lora", "--epochs", "3", "--batch-size", "4", "--lr", "0.003")
    found, _ = adapt("train", "--data", study, *OPTIONS, *settings, *plan, "--out", out, "--json")
    test = found["metrics"]["test"]
    assert {"dice", "dice_present", "jaccard", "hd95_px", "f1", "sensitivity", "auroc"} <= set(test)
    again, _ = adapt("evaluate", out, "--data", study, "--json")
    assert again["metrics"]["test"] == test
    record = json.loads((out / "adapter" / "adapter.json").read_text())
    assert record["labels"] == ["foreground"] and record["threshold"]["foreground"]["pixel"] in PIXELS
    page = (out / "report.html").read_text()
    assert "Masks of each class" in page and "smith" not in page
    charts = [base64.b64decode(found) for found in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    examples = [chart for chart in charts if b"<image" in chart]
    assert len(examples) == 1 and b"line " in examples[0] and not any(b"smith" in chart for chart in charts)
    adapt("report", out, "--data", study, "--out", tmp_path / "again")
    assert "foreground by area" in (tmp_path / "again" / "report.html").read_text()
    files = sorted(study.glob("patient_*.png"))[:4]
    said, _ = adapt("predict", out, *files, "--masks", tmp_path / "masks", "--json")
    segmenter = load(out)
    assert isinstance(segmenter, Segmenter)
    for own, file in zip(said["predictions"], files, strict=True):
        whole = segmenter.predict(file)
        assert np.array_equal(np.asarray(Image.open(own["mask"])), whole.mask) and whole.mask.shape == (40, 56)
        assert own["scores"]["foreground"] == pytest.approx(whole.shares["foreground"], abs=1e-6)
        assert (own["label"] == "foreground") == whole.present["foreground"]
        assert "smith" not in own["mask"]


def test_the_masks_of_evaluate_are_those_of_predict(study, tmp_path, adapt):
    out = tmp_path / "run"
    plan = ("--method", "lora", "--epochs", "1", "--batch-size", "4")
    adapt("train", "--data", study, *OPTIONS, *plan, "--out", out, "--json")
    handle, recipe, labels, record = restore(DOMAIN, out / "adapter")
    manifest = DOMAIN.table(replace(recipe.data, manifest=str(study)))
    data = DOMAIN.dataset(handle.model, [r.path for r in manifest.rows], DOMAIN.targets(manifest, labels))
    maps = {}
    task = DOMAIN.task(recipe, labels)
    predict_all(handle.model, FullSize(task, data, maps.__setitem__), data, batch_size=1)
    said = Segmenter(out, batch_size=1).predict([r.path for r in manifest.rows])
    for i, own in enumerate(said):
        assert np.array_equal(own.probabilities, maps[i]) and np.array_equal(own.mask, labels_of(maps[i]))


@pytest.mark.parametrize("kind", ["unet", "linear"])
def test_doctor_finds_adapters_below_masks_alive(adapt, kind):
    found, _ = adapt("doctor", *OPTIONS, "--set", f"head.kind={kind}", "--method", "lora", "--json")
    assert found["ok"] and not [row for row in found["rows"] if row["state"] == "dead"]


def test_an_adapter_of_masks_embeds_pictures(study, tmp_path, adapt):
    plan = ("--method", "linear", "--epochs", "1", "--batch-size", "4", "--val", "none", "--out", tmp_path / "run")
    adapt("train", "--data", study, *OPTIONS, *plan)
    found, _ = adapt("embed", tmp_path / "run", study / "patient_smith_0.png", "--out", tmp_path / "e.npz", "--json")
    assert found["rows"] == 1 and found["features"] == 128


def test_a_damaged_mask_stops_before_training_or_is_left_out(study, tmp_path, adapt):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(study, folder)
    (folder / "m1.png").write_bytes((folder / "m1.png").read_bytes()[:50])
    _, err = adapt("train", "--data", folder, *OPTIONS, "--method", "lora", "--out", tmp_path / "r", code=3)
    assert "line 3" in err and "damaged" in err and not (tmp_path / "r").exists()
    found, _ = adapt("check", "--data", folder, "--set", "data.task=segmentation", "--json", "--skip-bad")
    assert found["ok"] and len(found["skipped"]) == 1 and found["rows"] == 23


def test_masks_of_other_classes_than_the_adapters_are_refused(study):
    manifest = DOMAIN.table(
        replace(Recipe("medical").data, manifest=str(study), task="segmentation", classes=("cyst", "tumour"))
    )
    with pytest.raises(DataError, match=r"masks of cyst, tumour, the adapter's are of foreground"):
        DOMAIN.targets(manifest, ("foreground",))


@pytest.mark.slow
def test_lesions_of_real_ultrasound_are_found(data_dir, tmp_path, adapt):
    """Two epochs on the copy's own split; calling every pixel has a Dice of about .15 where there is a lesion."""
    options = ("--set", "data.task=segmentation", "--backbone", "embedded:vision-tiny", "--image-size", "96")
    plan = ("--set", "head.kind=unet", "--set", "head.width=8", "--set", "plan.head_lr=0.003", "--epochs", "2")
    out = ("--method", "lora", "--out", tmp_path / "run", "--json")
    found, _ = adapt("train", "--data", data_dir("medical_busi"), *options, *plan, *out)
    assert found["metrics"]["test"]["dice_present"]["value"] > 0.3
