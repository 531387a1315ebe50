import base64
import csv
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from adaptsuite import figures, metrics, report
from adaptsuite.errors import DataError
from adaptsuite.evidence import Predictions, class_table, confused_pairs, mistakes
from adaptsuite.metrics import evaluate
from adaptsuite.report import (
    Run,
    cell,
    collect_versions,
    comparison_row,
    known_limits,
    read_run,
    render,
    tabulate,
    write_run,
)

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=HYPERLINK(0)",
    "$\\frac{1$ & 50 %",
    "犬 ünï",
    "</style><b>",
    "-1+2",
    "@sum",
]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.sources, self.handlers, self.words = [], [], [], []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                self.sources.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_data(self, data):
        self.words.append(data)


def example(labels=("dog", "rain", "siren"), rows=60, groups=12, task="multiclass", **changes) -> Run:
    """A run with everything in it."""
    rng, num = np.random.default_rng(0), len(labels)
    names = [f"clip{i % groups}" for i in range(rows)] if groups else None
    scores = rng.random((rows, num)) * 0.8
    if task == "multilabel":
        targets = (rng.random((rows, num)) < 0.4).astype(int)
        scores = np.clip(scores + 0.3 * targets, 0, 1)
    else:
        targets = rng.integers(0, num, rows)
        scores[np.arange(rows), targets] += 0.4
        scores /= scores.sum(1, keepdims=True)
    found = evaluate(scores, targets, names, task, repeats=100, classes=labels)
    history = [
        {"epoch": e, "step": e, "loss": 1 / e, "lr": 0.1, "skipped": 0, "seconds": 1.0, "val": {"accuracy": e / 10}}
        for e in range(1, 6)
    ]
    settings = {
        "title": "lora on tiny",
        "task": task,
        "labels": labels,
        "command": "adapt audio train --data data.csv --method lora --out runs/a",
        "recipe": 'method = "lora"\n',
        "adapted": {"backbone": "tiny", "method": "lora", "sites": "12 x attn"},
        "params": {"trained": 1234, "trained_without_head": 1000, "total": 100_000},
        "adapter_bytes": 250_000,
        "budget": {"macs": 5_000_000_000, "batch": 32},
        "data": {"rows": 90, "classes": num, "groups": groups, "sha256": "abc"},
        "metrics": {
            "test": found,
            "val": found,
            "folds": [
                {"name": f"fold={f}", "seed": 0, "test": {"accuracy": 0.5 + f / 100}, "val": {"accuracy": 0.9}}
                for f in (1, 2)
            ],
        },
        "curves": [{"name": "fold=1", "history": history, "best_epoch": 5}],
        "predictions": Predictions([f"a/{i}.wav" for i in range(rows)], targets, scores, names),
        "warnings": ["a/7.wav: truncated, skipped"],
        "limits": ["Recorded in one room."],
        "extra": [{"title": "Slots", "text": "Use of slots.", "table": [{"slot": 0, "share": 0.25}]}],
        "seconds": 41.5,
    }
    return Run(**(settings | changes))


def test_page_shows_what_the_run_knows():
    run = example()
    run = replace(run, comparison=[comparison_row(run), {"method": "linear", "trained": 30, "seconds": 2.0}])
    text = Page(render(run)).text
    value, interval = run.metrics["test"]["accuracy"]["value"], run.metrics["test"]["accuracy"]["ci"]
    for expected in (
        "lora on tiny",
        f"accuracy {value:.3f} 95 %: {interval[0]:.3f} to {interval[1]:.3f}",
        "60 predictions, 12 groups",
        "1,234 (1.234% of 100,000)",
        "0.25 MB",
        "5.000 G",
        "12 x attn",
        "a/7.wav: truncated, skipped",
        "Recorded in one room.",
        "fold=2 0 0.520",
        "Use of slots. slot share 0 0.250",
        "linear 30",
        "adapt audio train --data data.csv",
        'method = "lora"',
        collect_versions()["torch"],
    ):
        assert expected in text, expected


def test_spread_over_folds_and_seeds_is_shown_and_explained():
    run = example()
    assert "standard deviation" not in Page(render(run)).text
    spread = {"folds": {"mean": 0.81, "std": 0.034, "n": 4}, "seeds": {"mean": 0.80, "std": 0.012, "n": 3}}
    metrics = {"test": {"accuracy": {**run.metrics["test"]["accuracy"], "spread": spread}}}
    text = Page(render(replace(run, metrics=metrics))).text
    assert "over folds: 0.810 ± 0.034 (4)" in text and "over seeds: 0.800 ± 0.012 (3)" in text
    assert "over folds, each the mean of its seeds" in text


def test_page_loads_and_runs_nothing():
    html = render(example())
    page = Page(html)
    assert page.sources and all(source.startswith("data:image/") for source in page.sources)
    assert "script" not in page.tags and "link" not in page.tags
    assert "http" not in html.replace("http-equiv", "")


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_text_from_data_is_escaped_everywhere(tmp_path, task):
    nasty = NASTY[0]
    run = example(
        NASTY,
        task=task,
        title=nasty,
        command=nasty,
        recipe=nasty,
        warnings=[nasty],
        limits=[nasty],
        adapted={nasty: nasty},
        data={nasty: {nasty: [nasty]}},
        extra=[{"title": nasty, "text": nasty, "table": [{nasty: nasty}], "caption": nasty}],
        comparison=[{"method": nasty, nasty: {"value": 0.5, "ci": None, "note": nasty}}],
        versions={"adaptsuite": nasty},
        monitor=nasty,
    )
    said = run.predictions
    run = replace(run, predictions=Predictions([nasty] * 60, said.targets, said.probabilities, NASTY * 7 + NASTY[:4]))
    page = Page(write_run(tmp_path, run).read_text())
    assert "script" not in page.tags and not page.handlers and "b" in page.tags  # our own <b> in the cards
    assert page.tags.count("style") == 1
    assert all(source.startswith("data:image/") for source in page.sources)
    assert nasty in page.text  # shown as text
    for source in page.sources:
        assert b"<script" not in base64.b64decode(source.partition(",")[2])


@pytest.mark.parametrize("num", [2, 50, 150])
def test_page_holds_few_and_many_classes(num):
    page = render(example([f"a rather long class name {i}" for i in range(num)], rows=4 * num))
    assert len(page) < 1_500_000
    assert page.count("a rather long class name 1<") >= 1


def test_run_folder_reads_back_as_the_same_page(tmp_path):
    for task in ("multiclass", "multilabel"):
        run = example(["a;b" if task == "multiclass" else "a", "=b", "'c"], task=task)
        page = write_run(tmp_path / task, run).read_text()
        again = read_run(tmp_path / task)
        assert Page(render(again)).text == Page(page).text
        assert again.predictions.targets.tolist() == run.predictions.targets.tolist()
        np.testing.assert_allclose(again.predictions.probabilities, run.predictions.probabilities, atol=1e-6)


def test_run_folder_holds_its_files(tmp_path):
    write_run(tmp_path, example(groups=None))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.json",
        "predictions.csv",
        "recipe.toml",
        "report.html",
        "run.json",
    ]
    assert (tmp_path / "recipe.toml").read_text() == 'method = "lora"\n'
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["versions"]["adaptsuite"] and record["data"]["sha256"] == "abc" and record["seeds"] == [0]
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["accuracy"]["ci"]


def test_spreadsheet_runs_no_cell_of_the_predictions(tmp_path):
    run = example(NASTY)
    said = run.predictions
    run = replace(run, predictions=Predictions(["=1+1", "+a", "-a", "@a"] * 15, said.targets, said.probabilities))
    write_run(tmp_path, run)
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows[1:5]] == ["'=1+1", "'+a", "'-a", "'@a"]
    cells = [c for row in rows for c in row if c[:1] in tuple("=+-@\t\r")]
    assert all(re.fullmatch(r"-?[\d.e-]+", c) for c in cells)
    assert "'=HYPERLINK(0)" in {row[1] for row in rows}
    assert read_run(tmp_path).predictions.paths[:4] == ["=1+1", "+a", "-a", "@a"]


def test_folders_of_the_user_are_not_in_run_and_page(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/ada/work"))
    command = "adapt audio train --data /home/ada/work/x.csv --out /home/ada/out"
    run = example(command=command, warnings=["/home/ada/work/a.wav: short"])
    write_run(tmp_path, run)
    for name in ("run.json", "report.html"):
        text = (tmp_path / name).read_text()
        assert "/home/ada" not in text and "~/out" in text and "./x.csv" in text
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert report._shareable("a/b") == "a/b"


def test_numbers_that_are_none_become_null(tmp_path):
    write_run(tmp_path, example(metrics={"test": {"auroc": {"value": math.nan, "ci": None}}}, seconds=np.float32(2)))
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"test": {"auroc": {"value": None, "ci": None}}}


def test_smallest_run_has_a_page(tmp_path):
    page = Page(write_run(tmp_path, Run("bare")).read_text())
    assert "bare" in page.text and "img" not in page.tags
    assert render(read_run(tmp_path)) == (tmp_path / "report.html").read_text()
    undefined = {"accuracy": {"value": None, "ci": None, "note": "not defined: every row is of one class"}}
    assert "not defined: every row is of one class" in Page(render(Run("a", metrics={"test": undefined}))).text


def test_damaged_run_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="is no run folder: run.json is missing"):
        read_run(tmp_path)
    write_run(tmp_path, example())
    (tmp_path / "run.json").write_text('{"title": "a", "surprise": 1}')
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_run(tmp_path)


# ---- what the predictions show


def scored(task="multiclass", rows=60, copies=1):
    said = example(rows=rows, task=task).predictions
    return metrics.prepare(np.repeat(said.probabilities, copies, 0), np.repeat(said.targets, copies, 0), task, True)


def test_class_table_agrees_with_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support

    found = scored()
    expected = precision_recall_fscore_support(found.truth.argmax(1), found.predicted.argmax(1))
    rows = {row["class"]: row for row in class_table(found, [0, 1, 2], None)}
    for k in range(3):
        values = [rows[k][name]["value"] for name in ("precision", "recall", "f1")]
        assert values == pytest.approx([e[k] for e in expected[:3]])
        assert rows[k]["rows"] == expected[3][k]
    f1 = [row["f1"]["value"] for row in class_table(found, [0, 1, 2], None)]
    assert f1 == sorted(f1)


def test_class_intervals_resample_groups_and_not_rows():
    single = class_table(scored(), list("abc"), None)
    grouped = class_table(scored(copies=20), list("abc"), [f"g{i // 20:03d}" for i in range(1200)])
    narrow = class_table(scored(copies=20), list("abc"), None)
    for one, many, wrong in zip(single, grouped, narrow, strict=True):
        assert one["recall"]["ci"] == pytest.approx(many["recall"]["ci"], abs=0.04)  # copies are no evidence
        assert np.ptp(wrong["recall"]["ci"]) < 0.5 * np.ptp(many["recall"]["ci"])


def test_class_interval_covers_the_true_recall_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        right = rng.random(80) < 0.7
        found = metrics.prepare(np.stack([right, ~right], 1).astype(float), np.zeros(80, int), "multiclass", True)
        low, high = class_table(found, ["a", "b"], None)[0]["recall"]["ci"]
        hits += low <= 0.7 <= high
    assert 180 <= hits <= 200  # 95 % of 200 is 190, four standard deviations are 12


def test_class_without_rows_has_no_rates():
    found = metrics.prepare(np.eye(3)[[0, 1, 1, 0]], np.array([0, 1, 0, 0]), "multiclass", True)
    absent = class_table(found, list("abc"), None)[-1]
    none = {"value": None, "ci": None}
    assert absent == {"class": "c", "rows": 0, "recall": none, "precision": none, "f1": none}


def test_one_group_gives_no_interval():
    assert class_table(scored(), list("abc"), ["one"] * 60)[0]["recall"]["ci"] is None


def test_mistakes_are_wrong_and_the_surest_come_first():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.95, 0.05]])
    said = Predictions(list("abcd"), np.array([1, 1, 0, 1]), probabilities, list("xyzw"), ["r1"] * 4)
    found = mistakes(said, metrics.prepare(probabilities, said.targets, "multiclass", True), ["no", "yes"])
    assert [(row["path"], row["true"], row["predicted"], row["probability"]) for row in found] == [
        ("d", "yes", "no", 0.95),
        ("a", "yes", "no", 0.9),
        ("c", "no", "yes", 0.6),
    ]
    assert found[1]["p(true)"] == pytest.approx(0.1) and (found[1]["group"], found[1]["run"]) == ("x", "r1")
    many = Predictions(list("ab"), np.array([[1, 0], [0, 1]]), np.array([[0.1, 0.7], [0.2, 0.9]]))
    found = mistakes(many, metrics.prepare(many.probabilities, many.targets, "multilabel", True), ["no", "yes"])
    assert found == [
        {"path": "a", "label": "no", "is": "there", "probability": 0.1},
        {"path": "a", "label": "yes", "is": "absent", "probability": 0.7},
    ]


def test_confused_pairs_are_counted_by_direction():
    matrix = np.array([[5, 2, 0], [3, 4, 0], [0, 0, 9]])
    assert confused_pairs(matrix, list("abc")) == [
        {"true": "b", "predicted": "a", "times": 3, "of": 7},
        {"true": "a", "predicted": "b", "times": 2, "of": 7},
    ]


def test_limits_follow_from_the_numbers():
    def limits(run, part="test"):
        return " ".join(known_limits(run, part))

    run = example(groups=None, rows=30)
    assert "name the source in a column 'group'" in limits(run)
    assert "One seed" in limits(run)
    assert "Only 12 groups" in limits(example())
    assert "Fewer than 5 held-out rows of" in limits(example(rows=12))
    assert "Only" not in limits(example(groups=30)) and "name the source" not in limits(example(groups=30))
    assert "One seed" not in limits(example(seeds=[0, 1]))
    only = replace(run, metrics={"val": run.metrics["val"]})
    assert "these numbers are too good" in limits(only, "val")
    assert "these numbers are too good" in render(only) and "which also chose the epoch" in render(only)
    sure = {"accuracy": {"value": 1.0, "ci": [1.0, 1.0]}}
    assert "no error was seen" in limits(replace(run, metrics={"test": sure}))


def test_samples_seen_by_several_seeds_count_once():
    said = example(rows=12).predictions
    targets, probabilities = np.tile(said.targets, 3), np.tile(said.probabilities, (3, 1))
    twice = Predictions(list(said.paths) * 3, targets, probabilities, list(said.groups) * 3, ["s"] * 36)
    assert "Fewer than 5 held-out rows of" in " ".join(known_limits(example(predictions=twice), "test"))


# ---- cells and figures


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (True, "yes"),
        (12345, "12,345"),
        (np.int64(7), "7"),
        (0.12345, "0.123"),
        (41.25, "41.2"),
        (1234.5, "1,234"),
        (math.nan, "–"),
        ("<b>", "<b>"),
        ([1, 2], "1, 2"),
        ({"train": 5}, "train 5"),
    ],
)
def test_cell_is_text_for_people(value, text):
    assert cell(value) == text


def test_bars_stand_where_the_values_are():
    whole, none = {"value": 0.5, "ci": [0.25, 0.75]}, {"value": None, "ci": None}
    rows = [{"m": "a", "x": whole}, {"m": "b", "x": none}, {"m": "c"}]
    table = tabulate(rows, "unit")
    assert [c["numeric"] for c in table["columns"]] == [False, True]
    bar = {"low": 25.0, "width": 50.0, "dot": 50.0}
    assert table["rows"][0][1] == {"text": "0.500", "interval": "0.250–0.750", "bar": bar}
    assert table["rows"][1][1]["bar"] is None and table["rows"][2][1]["text"] == "–"
    bar = tabulate(rows, "column")["rows"][0][1]["bar"]
    assert (bar["low"], bar["dot"]) == (4.5, 50.0)
    assert tabulate(rows)["columns"][1]["scale"] is None


def test_figures_are_images_and_nothing_else():
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([1, 2])
    assert figures.embed(figure).startswith("data:image/svg+xml;base64,")
    assert figures.embed(b"\x89PNG rest").startswith("data:image/png;base64,")
    for wrong in ("https://example.org/a.png", "javascript:alert(1)", b"<html>"):
        with pytest.raises(ValueError):
            figures.embed(wrong)


def test_charts_are_the_same_at_every_drawing():
    assert render(example(finished="now")) == render(example(finished="now"))


def test_undefined_scores_leave_gaps_in_the_curves():
    rows = [
        {"epoch": e, "loss": None if e == 2 else 1.0, "val": {"accuracy": None if e == 1 else 0.5}} for e in (1, 2, 3)
    ]
    assert figures.learning_curves([{"name": "a", "history": rows, "best_epoch": 2}], "accuracy")
    rows = [{"epoch": 1, "loss": 1.0, "val": {}}]
    assert figures.learning_curves([{"name": "a", "history": rows, "best_epoch": 1}], "accuracy")
    assert figures.learning_curves([], "accuracy") is None
