"""Questions in a table through the commands: a run and its blind baselines, what is loaded again, and bad input."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from adaptsuite.cli import main
from adaptsuite.errors import DataError, UsageError
from adaptsuite.experiment import adapt as adapted
from adaptsuite.experiment import complete
from adaptsuite.plan import Plan
from adaptsuite.recipe import DataSettings, Recipe
from adaptsuite.verify import verify
from adaptsuite.vl import load
from adaptsuite.vl.blind import BLIND
from adaptsuite.vl.data import soft_targets
from adaptsuite.vl.pipeline import DOMAIN, TASKS, task_of
from adaptsuite.vl.synthetic import make_dataset

BACKBONE = ("--backbone", "embedded:vl-tiny")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("vl"), rows=60)


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    """(folder of a short training, its result)."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--data", str(table), *BACKBONE, "--method", "vl.routed_lora", "--epochs", "2", "--batch-size", "16"]
    assert main(["vl", "train", *arguments, "--set", "rank=4", "--out", str(out)]) == 0
    return out, json.loads((out / "metrics.json").read_text())


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_accuracy_stands_beside_its_blind_baselines(run):
    for part in ("test", "val"):
        found = run[1][part]
        assert {"accuracy", *BLIND, "gain_over_blind"} <= set(found)
        best = max(found[name]["value"] for name in BLIND)
        assert found["gain_over_blind"]["value"] == pytest.approx(found["accuracy"]["value"] - best)
        assert all(len(found[name]["ci"]) == 2 for name in ("accuracy", *BLIND))


def test_the_baselines_are_blind(run):
    """Another picture moves image_only alone, another question text_only alone."""
    answerer = load(run[0], device="cpu")
    model = answerer.model
    text = model.tokenizer(["what shape is the top left ?", "is the top left red ?"])
    v = torch.randn(2, 1, 64)
    table = DOMAIN.dataset(model, [run[0], run[0]], None)  # folders: rows without an image

    def said(words, features):
        table.text, table.features = {k: t[words] for k, t in text.items()}, list(features)
        found = DOMAIN.outputs(model, answerer.task, table, Plan(device="cpu"))
        return np.split(found, 3, 1)

    first, other_image, other_text = said([0, 0], v[[0, 0]]), said([0, 0], v[[1, 1]]), said([1, 1], v[[0, 0]])
    moved = [
        [not np.array_equal(a, b) for a, b in zip(first, other, strict=True)] for other in (other_image, other_text)
    ]
    assert moved == [[True, False, True], [True, True, False]]


def test_answers_csv_has_every_held_back_row(run, table):
    rows = list(csv.DictReader((run[0] / "answers.csv").open()))
    held = [row for row in lines_of(table) if row["split"] == "test"]
    assert [row["question"] for row in rows] == [row["question"] for row in held]
    accuracy = np.mean([float(row["score"]) for row in rows])
    assert accuracy == pytest.approx(run[1]["test"]["accuracy"]["value"])
    assert all(float(row["score"]) == (row["said"] == row["answers"]) for row in rows)
    assert all(row[name] for row in rows for name in BLIND)


def test_a_loaded_adapter_answers_as_the_run_did(run, table):
    answerer = load(run[0], device="cpu")
    rows = list(csv.DictReader((run[0] / "answers.csv").open()))
    images = [table.parent / row["image"] for row in rows]
    questions = [row["question"] for row in rows]
    assert answerer.answer(images, questions) == [row["said"] for row in rows]
    assert answerer.answer(images[0], questions[0]) == rows[0]["said"]
    best = answerer.predict(images[0], questions[0], most=3)
    assert next(iter(best)) == rows[0]["said"] and list(best.values()) == sorted(best.values(), reverse=True)
    array = torch.from_numpy(np.asarray(Image.open(images[0])).copy())
    assert np.allclose(answerer.scores(array, questions[0]), answerer.scores(images[0], questions[0]), atol=1e-6)


def test_questions_may_go_without_an_image(run):
    answerer = load(run[0], device="cpu")
    assert answerer.answer(None, "what color is it ?") in answerer.labels


def test_evaluate_says_what_train_said(run, table, adapt):
    found, _ = adapt("evaluate", run[0], "--data", table, "--json")
    for name in ("accuracy", *BLIND):
        assert found["metrics"]["test"][name]["value"] == pytest.approx(run[1]["test"][name]["value"])


def test_no_accuracy_without_baselines(run, table, adapt, tmp_path):
    shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    _, err = adapt("evaluate", tmp_path / "adapter", "--data", table, code=4)
    assert "blind baselines" in err and err.count("\n") == 1
    assert load(tmp_path / "adapter", device="cpu").answer(None, "is it red ?")  # an answer needs none


def test_predict_of_pictures_and_of_a_table(run, table, adapt, tmp_path):
    image = table.parent / "images" / "000000.png"
    found, _ = adapt("predict", run[0], image, "--question", "is it red ?", "--question", "what is it ?", "--json")
    assert [row["question"] for row in found["predictions"]] == ["is it red ?", "what is it ?"]
    asked = write(table.parent / "asked.jsonl", {"image": "images/000001.png", "question": "is it red ?"})
    found, _ = adapt("predict", run[0], "--data", asked, "--out", tmp_path / "said.csv", "--json")
    (row,) = csv.DictReader((tmp_path / "said.csv").open())
    assert (
        row["answer"]
        == found["predictions"][0]["answer"]
        == load(run[0], device="cpu").answer(table.parent / "images" / "000001.png", "is it red ?")
    )


def test_answers_are_those_of_rows_that_are_not_test(tmp_path):
    rows = [{"question": f"q {i}?", "answers": [answer], "split": split} for i, (answer, split) in enumerate(
        [("yes", "train"), ("No", "val"), ("maybe", "test"), ("yes", "test")]
    )]  # fmt: skip
    manifest = DOMAIN.table(DataSettings(manifest=str(write(tmp_path / "t.jsonl", *rows))))
    assert manifest.classes == ("no", "yes")  # equally frequent: by name
    assert np.array_equal(DOMAIN.targets(manifest, manifest.classes), soft_targets(manifest, ("no", "yes")))
    found = DOMAIN.evaluate(manifest.subset([2, 3]), manifest.classes, np.tile([[0.0, 1.0]], (2, 3)))
    assert found["accuracy"]["value"] == 0.5  # maybe cannot be answered and counts as wrong


def test_questions_are_what_is_meant_where_no_task_is_named():
    """Adapters that were saved before there were others are of questions too."""
    for task in ("multiclass", "free", "vqa"):
        recipe = Recipe("vl", "embedded:vl-tiny", method="lora", data=DataSettings(task=task))
        assert complete(DOMAIN, recipe).data.task == "vqa"


def test_every_task_is_told_by_recipe_table_and_model(table):
    for name, task in TASKS.items():
        assert task_of(DataSettings(task=name)) is task and task.data_task == name
        assert task_of(Recipe("vl", data=DataSettings(task=name))) is task
    manifest = DOMAIN.table(DataSettings(manifest=str(table)))
    model = DOMAIN.model(complete(DOMAIN, Recipe("vl", "embedded:vl-tiny", method="lora")), ("a", "b"))
    assert task_of(manifest) is task_of(model) is TASKS["vqa"]


def test_roles_without_a_component_are_those_of_the_text_encoder():
    recipe = Recipe("vl", "embedded:vl-tiny", method="bottleneck", method_settings={"sites": ("mlp",)})
    assert complete(DOMAIN, recipe).method_settings["sites"] == ("text_encoder:mlp",)


@pytest.mark.parametrize("method", ["bitfit", "full", "linear", "vl.routed_bottleneck", "prefix"])
def test_other_methods_live_on_the_pair(method):
    handle = adapted(DOMAIN, complete(DOMAIN, Recipe("vl", "embedded:vl-tiny", method=method)), ("a", "b", "c"))
    found = verify(handle, DOMAIN.sample(handle.model), fresh=True)
    assert found.ok, found.problems


def test_an_adapted_image_encoder_is_run_at_every_step(table):
    sites = ("image_encoder:attn.q", "text_encoder:attn.q")
    recipe = complete(DOMAIN, Recipe("vl", "embedded:vl-tiny", method="lora", method_settings={"sites": sites}))
    handle = adapted(DOMAIN, recipe, ("a", "b"))
    assert verify(handle, DOMAIN.sample(handle.model), fresh=True).ok
    manifest = DOMAIN.table(DataSettings(manifest=str(table))).subset(range(3))
    item = DOMAIN.rows(handle.model, manifest, None)[0]
    assert "image" in item and "features" not in item


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "gone.png"}, "line 2: 'gone.png' does not exist"),
        ({"question": ""}, "line 2: 'question' is empty"),
        ({"question": "?!"}, "line 2: 'question' has no word"),
        ({"question": "x" * 1_000_000}, "line 2: 'question' has 1,000,000 characters"),
        ({"answers": ["green"], "choices": ["red", "blue"]}, "line 2: answer 'green' is not among its choices"),
        ({"answers": []}, "line 2: 'answers' is empty"),
        ({"image": "broken.png"}, "line 2: .*broken.png"),
    ],
)
def test_bad_rows_are_one_line_and_exit_3(row, message, adapt, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    good = {"image": "a.png", "question": "what is it?", "answers": ["red"]}
    path = write(tmp_path / "t.jsonl", good, good | {"question": "and now?"} | row)
    _, err = adapt(
        "train", "--data", path, *BACKBONE, "--method", "lora", "--out", tmp_path / "o", "--val", "none", code=3
    )
    assert re.search(message, err) and err.count("\n") == 1, err


def test_a_table_of_other_answers_is_refused(run, adapt, tmp_path):
    path = write(tmp_path / "t.jsonl", {"question": "why?", "answers": ["because"]})
    _, err = adapt("evaluate", run[0], "--data", path, code=3)
    assert "line 1: answer 'because' is not in the label set" in err and err.count("\n") == 1


@pytest.mark.parametrize("settings, message", [
    (("sites=txt_encoder:attn.q",), "component 'txt_encoder' is not in the model"),
    (("head.prefix=plian",), "head.prefix"),
    (("front_end.size=30",), "multiples of 8 x 8"),
    (("routing=mull",), "routing"),
    (("data.task=multilabel",), "data.task=multilabel is no task of images and text"),
    (("data.task=captions",), "expected multiclass or multilabel"),
    (("head.beams=2",), "head.beams=2 says nothing where data.task=vqa"),
])  # fmt: skip
def test_unknown_names_are_exit_2(settings, message, adapt, table):
    changes = [part for setting in settings for part in ("--set", setting)]
    _, err = adapt("doctor", *BACKBONE, "--method", "vl.routed_lora", *changes, code=2)
    assert message in err and err.count("\n") == 1, err


def test_image_free_rows_are_counted(adapt, tmp_path):
    rows = [{"question": f"question {i} ?", "answers": ["yes", "no"][i % 2]} for i in range(8)]
    found, _ = adapt("check", "--data", write(tmp_path / "t.jsonl", *rows), "--val", "none", "--json")
    assert found["ok"] and any("8 of 8 rows have no image" in line for line in found["warnings"])


@pytest.mark.parametrize(
    "question, message", [("", "is empty"), ("x" * 20_000, "20,000 characters"), ("??", "no word")]
)
def test_bad_questions_to_a_loaded_adapter(run, question, message):
    with pytest.raises(DataError, match=message):
        load(run[0], device="cpu").answer(None, question)


def test_a_backbone_that_is_no_pair_is_refused():
    with pytest.raises(UsageError, match="no pair of an image and a text encoder"):
        DOMAIN.model(Recipe("vl", "embedded:vision-tiny"), ("a",))


def test_an_exported_model_says_the_same(run, adapt, tmp_path):
    adapt("export", run[0], "--format", "torch", "--out", tmp_path / "m.pt2")
    extra = {"adaptsuite.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    said, answerer = json.loads(extra["adaptsuite.json"]), load(run[0], device="cpu")
    text = answerer.model.tokenizer(["is the top left red ?"])
    length = answerer.model.tokenizer.max_length
    padded = [torch.nn.functional.pad(text[k], (0, length - text[k].shape[1])) for k in ("input_ids", "attention_mask")]
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    expected = answerer.scores(image[0], "is the top left red ?")
    assert np.allclose(program(image.float() / 255, *padded).detach().numpy(), expected, atol=1e-4)
    assert said["labels"] == list(answerer.labels) and said["activation"] == "sigmoid"
