"""The report's sections and `adapt vision inspect` show what there is, and say what was left out or cannot be."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from adaptsuite import recipe as recipes
from adaptsuite.experiment import adapt as adapted
from adaptsuite.experiment import complete
from adaptsuite.manifest import write_csv
from adaptsuite.recipe import Recipe
from adaptsuite.report import Run, write_run
from adaptsuite.vision.grid import Place
from adaptsuite.vision.pictures import Heat, Look, display, look_figure, overlay, page_figure, png
from adaptsuite.vision.pipeline import DOMAIN
from adaptsuite.vision.sections import Subject, confusions, drawn, sections

BACKBONE, SIZE = "timm:test_vit", 96
LABELS = ["calm", "wild"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """20 pictures of two classes, and the CSV of them."""
    folder, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i in range(20):
        label = LABELS[i % 2]
        values = rng.normal(120, 12 if label == "calm" else 60, (100, 100, 3)) + [40, 0, -40 * (i % 3)]
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / f"p{i:02d}.png")
        rows.append({"path": f"p{i:02d}.png", "label": label, "split": "test" if i % 4 > 1 else "train"})
    write_csv(folder / "table.csv", rows)
    return folder / "table.csv"


def handle_of(method="vision.ila", backbone=BACKBONE, classes=LABELS, **settings):
    front = {"size": (SIZE, SIZE)}
    recipe = Recipe("vision", backbone, method=method, random_weights=True, method_settings=settings, front_end=front)
    recipe = complete(DOMAIN, recipe)
    handle = adapted(DOMAIN, recipe, classes)
    return handle, DOMAIN.decided(recipe, handle.model)


def save(handle, recipe, folder):
    described = DOMAIN.describe(handle.model)
    return handle.save(folder, labels=LABELS, preprocessing=described, recipe=recipes.to_dict(recipe))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return save(*handle_of(), tmp_path_factory.mktemp("run") / "adapter")


def dataset(handle, table, targets=None, num=20):
    paths = sorted(table.parent.glob("*.png"))[:num]
    targets = np.arange(num) % 2 if targets is None else targets
    return DOMAIN.dataset(handle.model, paths, targets)


def scores(said):
    """Logits of these answers."""
    return np.eye(2)[said] * 3.0


# ---- sections


def test_a_report_shows_pictures_confused_classes_and_attention_and_stays_small(table, tmp_path):
    handle, _ = handle_of()
    data = dataset(handle, table)
    said = data.item_targets.copy()
    said[[4, 6, 7]] = 1 - said[[4, 6, 7]]
    found = sections(handle, data, scores(said), LABELS)
    assert [s["title"] for s in found] == [
        "What the model looks at",
        "Classes that are confused most",
        "Whether the blocks attend alike",
    ]
    assert "3 of 17 right answers and 3 of 3 wrong answers" in found[0]["text"]
    assert "20 pictures in batches of at least 20" in found[2]["text"] and "blocks 1, 3" in found[2]["caption"]
    svg = found[0]["figure"].decode()
    assert "Grad-CAM of" in svg and ">wild<" in svg and "but it is calm" in svg and "p04.png" in svg
    assert "image/jpeg" in svg and "image/png" not in svg
    confused = found[1]["figure"].decode()
    assert "calm taken for wild, 2 of 10" in confused and "wild taken for calm, 1 of 10" in confused
    page = write_run(tmp_path, Run("title", labels=LABELS, extra=found))
    assert page.stat().st_size < 3e6


def test_a_report_leaves_the_model_as_it_was_and_its_hooks_too(table):
    handle, _ = handle_of("vision.ila_plus_plus")
    model = handle.model.train()
    next(handle.adapter.parameters()).requires_grad_(False)  # by hand, as no adapter would

    def state():
        kinds = ("_forward_hooks", "_forward_pre_hooks")
        hooks = [len(getattr(m, kind)) for m in model.modules() for kind in kinds]
        marks = [(m.training, m.__dict__.get("fused_attn")) for m in model.modules()]
        learns = [(p.requires_grad, p.grad) for p in model.parameters()]
        return hooks, marks, learns, model.adapter_bank.context, model.adapter_bank.active

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    for outputs in (None, scores(np.arange(20) // 10)):
        sections(handle, dataset(handle, table), outputs, LABELS)
        assert state() == before
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_scores_are_taken_where_none_are_given_and_wrong_ones_are_named_after_them(table):
    handle, _ = handle_of("lora")
    handle.model.classes = ("tame", "unruly")
    found = sections(handle, dataset(handle, table))
    assert "tame" in found[0]["figure"].decode() or "unruly" in found[0]["figure"].decode()
    assert "calm" not in found[0]["figure"].decode() and "joined" not in found[-1]["caption"]


def test_several_labels_a_picture_are_drawn_and_have_no_pairs(table):
    handle, _ = handle_of()
    targets = np.stack([np.arange(20) % 2, np.arange(20) % 3 == 0], 1).astype(int)
    outputs = np.where(targets, 2.0, -2.0)
    outputs[3] *= -1
    found = sections(handle, dataset(handle, table, targets), outputs, LABELS)
    assert [s["title"] for s in found] == ["What the model looks at", "Whether the blocks attend alike"]
    assert "19 right answers and 1 of 1 wrong" in found[0]["text"]


def test_what_a_network_does_not_have_is_said(table):
    handle, _ = handle_of("linear", "timm:test_resnet")
    found = sections(handle, dataset(handle, table), scores(np.zeros(20, dtype=int)), LABELS)
    assert [s["title"] for s in found] == ["What the model looks at", "Classes that are confused most"]
    assert "There is no attention rollout: ResNet has no transformer blocks" in found[0]["text"]
    handle, _ = handle_of()
    found = sections(handle, dataset(handle, table, num=3), scores(np.zeros(3, dtype=int)), LABELS)
    assert "no CKA of the attention: 3 pictures, at least 4 are needed" in found[0]["text"] and len(found) == 2


def test_large_inputs_are_drawn_less_often_on_a_cpu(table, monkeypatch):
    handle, _ = handle_of()
    monkeypatch.setattr("adaptsuite.vision.sections.WORK", 1.0)
    found = sections(handle, dataset(handle, table), scores((np.arange(20) % 4 == 0).astype(int)), LABELS)
    assert "1 of 5 right answers and 1 of 15 wrong answers" in found[0]["text"] and "Few, since" in found[0]["text"]


def test_pictures_are_drawn_by_a_fixed_rule_and_examples_are_no_mistakes(table):
    handle, _ = handle_of()
    data = dataset(handle, table)
    said = data.item_targets.copy()
    said[::3] = 1 - said[::3]
    probabilities = np.where(np.eye(2)[said] == 1, 0.8, 0.2)
    subject = Subject(handle.model, data, np.arange(20), probabilities, LABELS, handle)
    places, _ = drawn(subject)
    assert list(places) == list(drawn(subject)[0]) and list(subject.right[places]) == [True] * 3 + [False] * 3
    shown = []
    subject.shown = lambda place: shown.append(place) or np.zeros((4, 4, 3))
    assert confusions(subject)
    first = shown[:6]  # two of calm, two of wild, two of calm that were taken for wild
    assert [int(data.item_targets[i]) for i in first] == [0, 0, 1, 1, 0, 0]
    assert list(subject.right[first]) == [True] * 4 + [False] * 2


# ---- drawing


def test_heat_lies_where_its_tokens_are_and_the_border_without_tokens_is_pale():
    image = np.full((32, 32, 3), 0.5)
    values = np.zeros((2, 2))
    values[1, 0] = 1
    found = overlay(image, Heat("", values, Place((2, 2), (12, 12), (8, 8))))
    bright = found.sum(2)
    assert found.shape == (32, 32, 3) and np.allclose(found[:8], 0.75) and np.allclose(found[:, 24:], 0.75)
    inner = np.where(np.isclose(bright, 2.25), -1, bright)
    assert np.unravel_index(inner.argmax(), inner.shape) in {(y, x) for y in range(19, 24) for x in range(8, 13)}
    full = overlay(image, Heat("", values, Place((2, 2), (12, 12), (8, 8)), full=4.0))
    assert full[20, 11].sum() < found[20, 11].sum()


def test_a_page_s_photographs_are_jpeg_and_its_text_is_text_in_any_script():
    image = np.random.default_rng(0).random((40, 60, 3))
    assert display(image).shape == (171, 256, 3)
    heat = Heat("Grad-CAM of 黄瓜 $x_1$", np.ones((2, 3)), Place.over((40, 60), (2, 3)))
    figure = look_figure([Look("葉.png", image, "<b>日本</b>", True, [heat]), Look("a", image, "b", None, [])])
    svg = page_figure(figure).decode()
    assert "黄瓜 $x_1$" in svg and "&lt;b&gt;日本&lt;/b&gt;" in svg
    photographs = re.findall(r"data:image/(\w+);base64,([\w+/=]+)", svg)
    assert [kind for kind, _ in photographs] == ["jpeg"] * 3
    assert all(base64.b64decode(data).startswith(b"\xff\xd8\xff") for _, data in photographs)
    assert png(figure).startswith(b"\x89PNG")


# ---- the command


def test_files_are_inspected_by_an_adapter(adapt, adapter, table, tmp_path):
    out = tmp_path / "seen"
    found, err = adapt("inspect", adapter, *sorted(table.parent.glob("p0[0-4].png")), "--out", out, "--json")
    assert [p["path"].rsplit("/")[-1] for p in found["pictures"]] == [f"p0{i}.png" for i in range(5)]
    assert all(p["label"] in LABELS and 0.5 <= p["probability"] <= 1 for p in found["pictures"])
    assert all(len(p["rollout_entropy"]) == 6 for p in found["pictures"])
    assert np.shape(found["cka"]["backbone alone"]) == np.shape(found["cka"]["adapted"]) == (6, 6)
    matrix = np.array(found["cka"]["adapted"], dtype=float)
    assert found["collapse"]["adapted"] == pytest.approx(np.nanmean(matrix[~np.eye(6, dtype=bool)]), abs=1e-5)
    assert [row["grid"] for row in found["blocks"]] == [[6, 6]] * 2 + [[4, 4]] * 2 + [[2, 2]] * 2
    assert [row["block"] for row in found["blocks"] if row["joined_behind"]] == [1, 3]
    assert found["cka_pictures"] == 5 and found["left_out"] == [] and "p00.png" in err
    names = sorted(p.name for p in out.iterdir())
    assert names == [*(f"00{i}-p0{i}.png" for i in range(5)), "inspect.html", "inspect.json"]
    assert json.loads((out / "inspect.json").read_text()) == found
    page = (out / "inspect.html").read_text()
    assert 'src="http' not in page and "<script" not in page
    assert "Tokens of each block" in page


def test_labelled_rows_are_inspected(adapt, adapter, table, tmp_path):
    said, _ = adapt("inspect", adapter, "--data", table, "--out", tmp_path)
    found = json.loads((tmp_path / "inspect.json").read_text())
    assert {p["right"] for p in found["pictures"]} <= {True, False} and len(found["pictures"]) <= 6
    assert all(p["true"] in LABELS for p in found["pictures"]) and found["cka_pictures"] == 10
    assert f"page  {tmp_path}/inspect.html" in said and "mean CKA of different blocks" in said
    assert "Classes that are confused most" in (tmp_path / "inspect.html").read_text()


def test_a_plain_backbone_is_inspected_without_labels(adapt, table, tmp_path):
    options = ("--backbone", BACKBONE, "--random-weights", "--image-size", SIZE, "--json")
    files = sorted(table.parent.glob("*.png"))[:13]
    for number, rows in enumerate([files, ("--data", table, "--test", "split=train")]):
        found, _ = adapt("inspect", *rows, *options, "--out", tmp_path / str(number))
        assert list(found["cka"]) == ["backbone"] and "label" not in found["pictures"][0]
        assert len(found["pictures"]) == len(found["pngs"]) == (13, 6)[number]
        assert found["cka_pictures"] == (13, 10)[number]
    page = (tmp_path / "0" / "inspect.html").read_text()
    assert "The first 12 of 13 pictures; each has a PNG of its own." in page and "confused" not in page


def test_few_pictures_have_no_cka_and_damaged_ones_are_skipped_on_request(adapt, adapter, table, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes((table.parent / "p00.png").read_bytes()[:500])
    files = (table.parent / "p00.png", bad)
    _, err = adapt("inspect", adapter, *files, "--out", tmp_path / "a", code=3)
    assert err.count("\n") == 1 and "bad.png" in err and "--skip-bad" in err
    found, err = adapt("inspect", adapter, *files, "--out", tmp_path / "a", "--skip-bad", "--json")
    assert [s["path"] for s in found["skipped"]] == [str(bad)] and "cka" not in found
    assert "no CKA of the attention: 1 pictures" in found["left_out"][0] and "warning: no CKA" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["ADAPTER", "FILE"], 2, "--out is missing"),
        (["--out", "OUT"], 2, "ADAPTER is missing"),
        (["ADAPTER", "--out", "OUT"], 2, "either FILE... or --data is needed"),
        (["ADAPTER", "FILE", "--data", "TABLE", "--out", "OUT"], 2, "and not both"),
        (["ADAPTER", "FILE", "--out", "FILE"], 2, "is a file, a folder is expected"),
        (["ADAPTER", "FILE", "--out", "OUT", "--image-size", "64"], 2, "need --backbone"),
        (["ADAPTER", "FILE", "--out", "OUT", "--test", "split=test"], 2, "--test needs --data"),
        (["ADAPTER", "nowhere.png", "--out", "OUT"], 3, "nowhere.png: no such file"),
        (["ADAPTER", "TABLE", "--out", "OUT"], 3, "not readable as a picture"),
        (["nowhere", "FILE", "--out", "OUT"], 4, "nowhere"),
        (["ADAPTER", "--data", "TABLE", "--test", "split=none", "--out", "OUT"], 2, "split=none"),
        (
            ["FILE", "--backbone", "timm:test_resnet", "--random-weights", "--image-size", "64", "--out", "OUT"],
            2,
            "ResNet has no transformer blocks",
        ),
    ],
)
def test_what_cannot_be_inspected_is_refused_in_one_line(adapt, adapter, table, tmp_path, arguments, code, said):
    names = {"ADAPTER": adapter, "FILE": table.parent / "p00.png", "TABLE": table, "OUT": tmp_path / "out"}
    _, err = adapt("inspect", *(names.get(a, a) for a in arguments), code=code)
    assert said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_network_of_maps_gets_grad_cam_alone(adapt, table, tmp_path):
    folder = save(*handle_of("linear", "timm:test_resnet"), tmp_path / "adapter")
    found, err = adapt("inspect", folder, table.parent / "p00.png", "--out", tmp_path / "out", "--json")
    assert len(found["pngs"]) == 1 and found["blocks"] == [] and "cka" not in found
    assert any(line.startswith("no attention rollout: ResNet has no transformer blocks") for line in found["left_out"])
