"""Tables of images and text: what is read, and what stops with one line that names file and line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from adaptsuite.errors import DataError, UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.manifest import split
from adaptsuite.vl.data import (
    ImageTexts,
    answer_set,
    answers_of,
    captions_by_image,
    choices_of,
    image_free,
    image_of,
    labelled,
    load_nlvr,
    load_table,
    load_vqa_rad,
    soft_targets,
    survey,
    text_of,
)
from adaptsuite.vl.tokenizer import WordTokenizer


@pytest.fixture
def table(tmp_path):
    """`table(row, ...)` writes questions.jsonl of dicts or raw lines beside the pictures a.png and b.png."""
    for name, value in (("a.png", 40), ("b.png", 200)):
        Image.new("RGB", (20, 10), (value, 0, 0)).save(tmp_path / name)

    def write(*rows, name="questions.jsonl"):
        lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
        lines = [line.encode() if isinstance(line, str) else line for line in lines]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return tmp_path / name

    return write


GOOD = {"image": "a.png", "question": "What is it?", "answers": ["a cat"]}


def test_questions_of_json_lines(table, tmp_path):
    path = table(
        GOOD,
        "",
        {"image": "b.png", "question": " Is it red? ", "answer": "yes", "id": 7, "note": None},
        {"image": "b.png", "question": "How many?", "answers": [{"answer": "2", "answer_id": i} for i in range(1, 4)]},
        {"question": "Which?", "answers": "left", "choices": ["Left", "right"], "group": "g"},
    )
    found = load_table(path)
    assert [text_of(row) for row in found.rows] == ["What is it?", "Is it red?", "How many?", "Which?"]
    assert [answers_of(row) for row in found.rows] == [("a cat",), ("yes",), ("2", "2", "2"), ("left",)]
    assert [row.line for row in found.rows] == [1, 3, 4, 5]
    assert choices_of(found.rows[3]) == ("Left", "right") and choices_of(found.rows[0]) == ()
    assert found.rows[1].extra["id"] == "7" and found.rows[1].extra["note"] == ""
    assert image_of(found.rows[0]) == tmp_path / "a.png" and image_of(found.rows[3]) is None
    assert load_table(tmp_path).digest == found.digest


def test_rows_without_an_image_are_counted(table):
    found = load_table(table(GOOD, *({"image": v, "question": f"q{v}?", "answer": "x"} for v in ("", None))))
    assert image_free(found) == 2 and found.notes == ("2 of 3 rows have no image",)
    assert len(set(found.groups())) == 3  # each its own group
    assert load_table(table(GOOD)).notes == ()


def test_questions_about_one_image_are_one_group(table):
    found = load_table(table(GOOD, {**GOOD, "question": "And?"}, {**GOOD, "image": "b.png"}))
    assert found.groups().tolist() == [0, 0, 1]


def test_the_same_rows_as_csv(table):
    rows = load_table(table(GOOD, {**GOOD, "image": "b.png", "answers": ["x", "y, z"]})).rows
    text = 'image,question,answers\na.png,What is it?,a cat\nb.png,What is it?,"x|y, z"\n'
    found = load_table(table(text, name="questions.csv")).rows
    assert [(text_of(r), answers_of(r), image_of(r)) for r in rows] == [
        (text_of(r), answers_of(r), image_of(r)) for r in found
    ]


def test_captions_one_a_row_or_many_a_line(table, tmp_path):
    found = load_table(
        table({"image": "a.png", "captions": ["one", "two"]}, {"image": "b.png", "caption": "three"}), "caption"
    )
    assert captions_by_image(found) == ([tmp_path / "a.png", tmp_path / "b.png"], [["one", "two"], ["three"]])
    assert found.groups().tolist() == [0, 0, 1]


MEGABYTE = "a " * 2**19


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "image": "c.png"}, "'c.png' does not exist"),
        ({**GOOD, "image": "../c.png"}, "leads outside"),
        ({**GOOD, "image": "/etc/passwd"}, "is absolute"),
        ({**GOOD, "image": 3}, "'image' is int, the path of a file is expected"),
        ({**GOOD, "image": "."}, "is a folder"),
        ({**GOOD, "question": ""}, "'question' is empty"),
        ({**GOOD, "question": " \n"}, "'question' is empty"),
        ({**GOOD, "question": "?!"}, "'question' has no word: '?!'"),
        ({**GOOD, "question": None}, "'question' holds NoneType"),
        ({**GOOD, "question": ["a", "b"]}, "'question' is a list"),
        ({**GOOD, "question": MEGABYTE}, "'question' has 1,048,576 characters, at most 10,000"),
        ({**GOOD, "question": "a\0b"}, "zero byte"),
        ({**GOOD, "answers": []}, "'answers' is empty"),
        ({**GOOD, "answers": [""]}, "'answers' is empty"),
        ({**GOOD, "answers": [1]}, "'answers' holds int"),
        ({**GOOD, "answers": [MEGABYTE]}, "'answers' has 1,048,576 characters"),
        ({**GOOD, "choices": ["dog", "bird"]}, "answer 'a cat' is not among its choices dog, bird"),
        ({"image": "a.png", "question": "What?"}, "'answers' is missing"),
        ({"image": "a.png", "answers": ["x"]}, "'question' or 'sentence' is missing, it has 'image', 'answers'"),
        ('{"image": "a.png", "question": ', "not JSON"),
        ('{"question": "a", "question": "b"}', "key 'question' is there twice"),
        ("[1, 2]", "list where an object is expected"),
        ("[" * 100_000, "not JSON"),
        (b'{"question": "\xff"}', "not UTF-8 (byte 0xff)"),
        (GOOD, "duplicate of line 1, 'What is it?'"),
    ],
)
def test_a_bad_row_is_one_line_with_file_and_line(table, row, reason):
    with pytest.raises(DataError) as caught:
        load_table(table(GOOD, row))
    message = str(caught.value)
    assert message.startswith("questions.jsonl line 2: ") and reason in message
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "a.png", "caption": ""}, "'caption' is empty"),
        ({"image": "a.png", "captions": []}, "'captions' is empty"),
        ({"image": "a.png", "captions": ["fine", " "]}, "'captions' is empty"),
        ({"image": "a.png", "caption": MEGABYTE}, "'caption' has 1,048,576 characters"),
        ({"caption": "a cat"}, "'image' is empty; a caption without its image cannot be used"),
        ({"image": "gone.png", "caption": "a cat"}, "'gone.png' does not exist"),
    ],
)
def test_a_bad_caption_is_one_line_with_file_and_line(table, row, reason):
    with pytest.raises(DataError) as caught:
        load_table(table({"image": "b.png", "caption": "fine"}, row, name="c.jsonl"), "caption")
    assert str(caught.value).startswith("c.jsonl line 2: ") and reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("image,question,answers\na.png,,x", "q.csv line 2: 'question' is empty"),
        ("image,question,answers\na.png,What", "q.csv line 2: 2 cells, the header has 3"),
        (f"image,question,answers\na.png,{MEGABYTE},x", "q.csv line 2: field larger than field limit"),
        ("image,text\na.png,x", "q.csv line 2: 'question' or 'sentence' is missing"),
        ("image,question,answers", "q.csv has no rows"),
    ],
)
def test_a_bad_csv_is_one_line_too(table, text, reason):
    with pytest.raises(DataError, match=reason):
        load_table(table(text, name="q.csv"))


def test_what_is_not_there_and_unknown_tasks_are_refused(tmp_path, table):
    with pytest.raises(DataError, match="gone.jsonl does not exist"):
        load_table(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match="exactly one .jsonl is expected in a folder, found none"):
        load_table(tmp_path)
    table(GOOD, name="a.jsonl"), table(GOOD, name="b.jsonl")
    with pytest.raises(DataError, match="found a.jsonl, b.jsonl"):
        load_table(tmp_path)
    with pytest.raises(UsageError, match="did you mean caption"):
        load_table(tmp_path, "captoin")
    with pytest.raises(DataError, match="e.jsonl has no rows"):
        load_table(table("", name="e.jsonl"))


def test_questions_to_be_answered_need_no_answers(table):
    path = table({"image": "a.png", "question": "What?"}, {"image": "b.png", "question": "What?", "answers": []})
    assert [answers_of(row) for row in load_table(path, need_answers=False).rows] == [(), ()]


def test_a_damaged_image_names_the_row_or_is_left_out(table, tmp_path):
    path = table(GOOD, {**GOOD, "image": "b.png"}, {"question": "Free?", "answer": "yes"})
    (tmp_path / "b.png").write_bytes(b"no picture")
    found = load_table(path)
    with pytest.raises(DataError, match=r"questions.jsonl line 2: .*b.png: not readable as a picture"):
        survey(found)
    left = found.without(survey(found, skip_bad=True))
    assert [row.line for row in left.rows] == [1, 3] and left.skipped[0]["row"] == "questions.jsonl line 2"


# answers as classes -------------------------------------------------------------------------------------------------


def test_the_answer_set_is_the_frequent_normalised_ones(table):
    answers = ["Two", "2", "the cat", "a cat!", "cat", "dog"]
    rows = load_table(table(*({**GOOD, "question": f"q{i}", "answers": [a]} for i, a in enumerate(answers)))).rows
    assert answer_set(rows) == ("cat", "2", "dog") and answer_set(rows, least=2) == ("cat", "2")
    assert answer_set(rows, most=1) == ("cat",)
    with pytest.raises(DataError, match="occurs 4 times"):
        answer_set(rows, least=4)


def test_an_answer_that_is_not_in_the_label_set_names_its_row(table):
    found = load_table(table(GOOD, {**GOOD, "question": "And?", "answers": ["A dogg"]}))
    assert labelled(found).classes == ("cat", "dogg") and labelled(found).targets().tolist() == [0, 1]
    with pytest.raises(
        DataError, match="questions.jsonl line 2: answer 'dogg' is not in the label set; did you mean dog"
    ):
        labelled(found, ("cat", "dog"))
    assert labelled(found, ("dogg", "cat")).targets().tolist() == [1, 0]


def test_soft_targets_are_the_scores_that_the_answers_would_get(table):
    rows = ["red"] * 7 + ["Blue"] * 2 + ["green"], ["x", "x", "red"], ["unknown"]
    found = load_table(table(*({**GOOD, "question": f"q{i}", "answers": a} for i, a in enumerate(rows))))
    targets = soft_targets(found, ("red", "blue"))
    np.testing.assert_allclose(targets, [[1, (2 * 1 / 3 + 8 * 2 / 3) / 10], [1 / 3, 0], [0, 0]], rtol=1e-6)


# tensors ------------------------------------------------------------------------------------------------------------


def test_rows_become_tensors_and_a_missing_image_is_said_to_be_missing(table):
    found = load_table(table(GOOD, {"question": "Why is this so very long?", "answer": "no"}))
    data = ImageTexts(found.rows, FrontEnd(size=(8, 8)), WordTokenizer(("what",), 8, 6), np.array([1, 0]))
    first, second = data[0], data[1]
    assert first["image"].shape == (3, 8, 8) and first["image"].dtype == torch.uint8
    assert first["image"][0].float().mean() > 30 and second["image"].max() == 0
    assert (first["has_image"], second["has_image"]) == (True, False)
    assert first["input_ids"].shape == second["input_ids"].shape == (6,)
    assert first["target"] == 1 and data.cut == 1 and len(data) == 2
    batch = torch.utils.data.default_collate([first, second])
    assert batch["image"].shape == (2, 3, 8, 8) and batch["has_image"].tolist() == [True, False]


# real data ----------------------------------------------------------------------------------------------------------


def test_nlvr_keeps_statements_made_together_in_one_part(data_dir):
    found = load_nlvr(data_dir("vl_nlvr"))
    assert len(found) == 3957 and found.classes == ("false", "true") and len(set(found.groups())) == 533
    (fold,) = split(found)
    assert fold.sizes["test"] == 990 and fold.sizes["train"] + fold.sizes["val"] == 2967
    assert found.column("path")[0].startswith("images/dev/")
    truth = np.array(found.column("label"))[fold.test]
    assert abs(np.mean(truth == "true") - 0.5616) < 0.001


def test_vqa_rad_keeps_images_apart_and_knows_closed_from_open(data_dir):
    found = load_vqa_rad(data_dir("vl_vqa_rad"))
    assert (len(found), len(set(found.groups()))) == (2838, 251)
    sizes = {kind: len(load_vqa_rad(data_dir("vl_vqa_rad"), kind)) for kind in ("closed", "open")}
    assert sizes == {"closed": 1651, "open": 1187}
    (fold,) = split(found)
    assert fold.sizes["test"] == 534
    images = [{image_of(found.rows[i]) for i in part} for part in (fold.train, fold.val, fold.test)]
    assert not images[0] & images[2] and not images[0] & images[1] and not images[1] & images[2]
    with pytest.raises(UsageError, match="did you mean closed"):
        load_vqa_rad(data_dir("vl_vqa_rad"), "close")
