"""Multiple choice: what is said is one of a question's choices, in evaluation, in predict and in Python."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from adaptsuite.errors import DataError
from adaptsuite.recipe import DataSettings
from adaptsuite.vl import load
from adaptsuite.vl.choices import allowed, chance, restricted
from adaptsuite.vl.pipeline import DOMAIN

CLASSES = ("red", "green", "blue", "yes")


def rows(folder, number=24):
    """Questions of three choices, and free ones among them."""
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    found = []
    for i in range(number):
        answer = CLASSES[i % 3]
        row = {"image": "a.png", "question": f"what color is it {i} ?", "answers": [answer], "group": f"g{i}",
               "split": ("train", "val", "test")[i % 4 if i % 4 < 3 else 0]}  # fmt: skip
        found.append(row | ({"choices": [answer, CLASSES[(i + 1) % 3], "Purple"]} if i // 4 % 2 else {}))
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(folder)))
    return folder / "t.jsonl"


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    from adaptsuite.cli import main

    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = ["--data", str(table), "--backbone", "embedded:vl-tiny", "--method", "lora", "--epochs", "1"]
    assert main(["vl", "train", *arguments, "--out", str(out)]) == 0
    return out


def test_a_question_s_choices_are_normalised_and_unknown_ones_cannot_win():
    found = allowed([("The red", "purple"), (), ("purple",)], CLASSES)
    assert found.tolist() == [[True, False, False, False], [True] * 4, [False] * 4]
    outputs = np.arange(8.0).reshape(1, 8)  # two models
    assert restricted(outputs, [("green", "blue")], CLASSES).reshape(2, 4).argmax(1).tolist() == [2, 2]


def test_evaluation_looks_among_the_choices_alone(table):
    manifest = DOMAIN.table(DataSettings(manifest=str(table)))
    classes = manifest.classes
    best = np.zeros((len(manifest), 3 * len(classes)))
    best[:, classes.index("blue") :: len(classes)] = 1.0
    best[:, classes.index("red") :: len(classes)] = 0.5
    found = DOMAIN.evaluate(manifest, classes, best)
    expected = [
        answer == (("blue" if "blue" in choices else "red" if "red" in choices else None) if choices else "blue")
        for row in manifest.rows
        for answer, choices in [(json.loads(row.extra["answers"])[0], json.loads(row.extra["choices"]))]
    ]
    assert found["accuracy"]["value"] == pytest.approx(np.mean(expected))


def test_chance_is_the_mean_over_what_may_be_said(table):
    manifest = DOMAIN.table(DataSettings(manifest=str(table)))
    own = chance(manifest, manifest.classes)
    assert np.allclose(own, 1 / 3)  # of three choices, or of three answers
    found = DOMAIN.evaluate(manifest, manifest.classes, np.zeros((len(manifest), 9)))
    assert found["chance"]["value"] == pytest.approx(1 / 3)


def test_answers_of_a_run_are_choices(run):
    lines = list(csv.DictReader((run / "answers.csv").open()))
    several = [line for line in lines if line["choices"]]
    assert several and all(line["said"] in line["choices"].lower().split(" | ") for line in several)
    assert all(line[name] in line["choices"].lower() for line in several for name in ("text_only", "image_only"))
    assert "chance" in json.loads((run / "metrics.json").read_text())["test"]


def test_a_loaded_adapter_answers_by_one_of_the_choices(run, table):
    answerer, image = load(run, device="cpu"), table.parent / "a.png"
    free = answerer.answer(image, "what color is it ?")
    others = [label for label in answerer.labels if label != free]
    assert answerer.answer(image, "what color is it ?", choices=others) in others
    assert answerer.answer(image, ["is it ?", "what ?"], choices=[others[:1], []])[0] == others[0]
    scores = answerer.predict(image, "what ?", choices=[others[0], "purple"])
    assert list(scores) == others[:1]
    with pytest.raises(DataError, match="question 1: none of its choices purple is among the 3 answers"):
        answerer.answer(image, "what ?", choices=["purple"])
    with pytest.raises(DataError, match="choices of 3 questions beside 1 questions"):
        answerer.answer(image, "what ?", choices=[["red"], ["red"], ["red"]])


def test_predict_takes_choices_from_the_line_and_from_the_table(run, table, adapt):
    image = table.parent / "a.png"
    found, _ = adapt("predict", run, image, "--question", "what ?", "--choice", "green", "--choice", "blue", "--json")
    assert set(found["predictions"][0]["scores"]) == {"green", "blue"}
    found, _ = adapt("predict", run, "--data", table, "--json")
    assert [len(row["scores"]) for row in found["predictions"]] == [2 if i // 4 % 2 else 3 for i in range(24)]
    _, err = adapt("predict", run, image, "--question", "what ?", "--choice", "purple", code=3)
    assert "none of its choices purple" in err and err.count("\n") == 1
    _, err = adapt("predict", run, "--data", table, "--choice", "red", code=2)
    assert "--choice is for --question" in err and err.count("\n") == 1
