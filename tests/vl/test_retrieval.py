import json
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptsuite.cli import main
from adaptsuite.errors import DataError
from adaptsuite.host import attach
from adaptsuite.vl.pipeline import DOMAIN, task_of
from adaptsuite.vl.retrieval import CAPTIONS, FIRST, IMAGES, TO_IMAGE, TO_TEXT, RetrievalModel, RetrievalTask, gallery
from adaptsuite.vl.scores import chance_recall
from adaptsuite.vl.synthetic import make_captions
from adaptsuite.vl.two_tower import load_towers


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return make_captions(tmp_path_factory.mktemp("captions"), rows=60, each=2)


@pytest.fixture(scope="module")
def run(table) -> Path:
    """Trained by the command, for two epochs."""
    out = table.parent / "run"
    options = ["--set", "data.task=retrieval", "--data", str(table), "--backbone", "embedded:vl-tiny"]
    more = ["--method", "lora", "--set", "rank=2", "--epochs", "2", "--batch-size", "32", "--device", "cpu"]
    assert main(["vl", "train", *options, *more, "--out", str(out)]) == 0
    return out


def test_similarities_are_those_of_pictures_and_captions_by_loops():
    rng = np.random.default_rng(0)
    images = np.array([4, 4, 9, 4, 2])
    outputs = rng.normal(size=(5, 6))
    outputs[images == 4, :3] = outputs[0, :3]  # rows of one picture have its embedding
    similarity, of = gallery(outputs, images)
    for i, number in enumerate([2, 4, 9]):
        row = int(np.flatnonzero(images == number)[0])
        for c in range(5):
            assert similarity[i, c] == pytest.approx(sum(outputs[row, k] * outputs[c, 3 + k] for k in range(3)))
    assert of.tolist() == [1, 1, 2, 1, 0]


def test_products_of_output_rows_are_the_mean_of_the_cosines_of_prompts():
    class Towers(torch.nn.Module):
        aligned, scale, tokenizer, front_end = True, torch.tensor(10.0), None, None

        def see(self, image):
            return image

        def read(self, input_ids, attention_mask):
            return input_ids

    torch.manual_seed(0)
    model = RetrievalModel(Towers())
    image, text = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    said = RetrievalTask().predict(model, {"image": image, "input_ids": text, "attention_mask": None})
    pictures, captions = said[:, :20], said[:, 20:]
    logits = model(text, None, image=image)
    torch.testing.assert_close(10 * pictures @ captions.T, logits)
    mean = sum(torch.cosine_similarity(image[1, k], text[2, k], 0) for k in range(4)) / 4
    torch.testing.assert_close(logits[1, 2], 10 * mean)


def test_chance_is_counted():
    assert chance_recall(1, 8) == pytest.approx(1 / 8)
    assert chance_recall(5, 8) == pytest.approx(5 / 8)
    assert chance_recall(2, 6, own=3) == pytest.approx(1 - comb(3, 2) / comb(6, 2))
    assert chance_recall(10, 4, own=2) == 1.0
    rng = np.random.default_rng(0)
    drawn = np.mean([(rng.permutation(12)[:5] < 3).any() for _ in range(4000)])
    assert abs(drawn - chance_recall(5, 12, own=3)) < 0.03


def test_a_row_says_ranks_within_its_own_part(run, table):
    """Galleries of several seeds are never mixed: what is pooled are ranks."""
    report = json.loads((run / "metrics.json").read_text())
    found = report["metrics"]["test"] if "metrics" in report else report["test"]
    pictures, captions = 12, 24
    for k in (1, 5, 10):
        assert found[f"chance:text_to_image_r{k}"]["value"] == pytest.approx(min(k / pictures, 1.0), abs=0.02)
        expected = chance_recall(k, captions, own=2)
        assert found[f"chance:image_to_text_r{k}"]["value"] == pytest.approx(expected, abs=0.03)
        assert 0 <= found[f"image_to_text_r{k}"]["value"] <= 1 and found[f"image_to_text_r{k}"]["ci"]


def test_evaluate_says_what_training_said(run, table, capsys):
    assert main(["vl", "evaluate", str(run), "--data", str(table), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["metrics"]["test"]
    report = json.loads((run / "metrics.json").read_text())
    found = report["metrics"]["test"] if "metrics" in report else report["test"]
    assert {k: v["value"] for k, v in again.items()} == pytest.approx({k: found[k]["value"] for k in again})


def test_the_report_shows_what_was_found_and_pictures_that_were_not(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Blind baselines" in page and "chance:text to image r1" in page
    lines = (run / "retrieved.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("row,image,caption,caption_rank,first_caption") and len(lines) == 25


def test_pooled_rows_count_each_picture_once(table):
    task = task_of(DOMAIN.table(_data(table)))
    manifest = DOMAIN.table(_data(table)).subset([0, 1, 2, 3])
    outputs = np.zeros((4, 8))
    outputs[:, FIRST], outputs[:, TO_TEXT], outputs[:, TO_IMAGE] = [1, 0, 1, 0], [0, 0, 3, 3], [0, 2, 0, 0]
    outputs[:, CAPTIONS], outputs[:, IMAGES], outputs[:, 3] = 20, 10, 2
    found = task.evaluate(manifest, ("caption",), outputs)
    assert found["image_to_text_r1"]["value"] == 0.5 and found["image_to_text_r5"]["value"] == 1.0
    assert found["text_to_image_r1"]["value"] == 0.75


def test_blind_towers_find_nothing_and_chance_is_the_floor(table):
    """One embedding for every picture: all scores are equal, and equal is not found."""
    outputs = np.random.default_rng(0).normal(size=(20, 8))
    outputs[:, :4] = outputs[0, :4]
    found = RetrievalTask().score(outputs, np.arange(20) // 2)
    assert found["mean_recall"] < 0.5 * chance_recall(10, 10)


def test_training_aligns_the_embedded_pair_beyond_chance():
    """Thirty steps of projections alone on 64 scenes."""
    from adaptsuite.vl import synthetic

    rng = np.random.default_rng(0)
    scenes = rng.choice(synthetic.NUM_SCENES, 64, replace=False)
    model = RetrievalModel(load_towers("embedded:vl-tiny"))
    text = model.tokenizer(synthetic.captions(scenes, rng))
    with torch.no_grad():
        features = model.see(torch.from_numpy(synthetic.render(scenes, rng)))
    handle = attach(
        model, "linear", head="head", sample={"features": features[:2], **{k: v[:2] for k, v in text.items()}}
    )
    task, batch = RetrievalTask(), {"features": features, **text, "target": torch.arange(64)}
    optimizer = torch.optim.AdamW([p for g in handle.trainable() for p in g["params"]], lr=3e-3)
    before = task.score(task.predict(model, batch).detach().numpy(), np.arange(64))["mean_recall"]
    for _ in range(30):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    after = task.score(task.predict(model, batch).detach().numpy(), np.arange(64))["mean_recall"]
    assert before < 0.2 and after > before + 0.2


def test_pictures_are_seen_once_where_the_image_tower_is_frozen(table):
    from dataclasses import replace

    from adaptsuite.experiment import complete
    from adaptsuite.recipe import Recipe

    recipe = Recipe("vl", backbone="embedded:vl-tiny", method="lora", data=replace(_data(table)))
    manifest = DOMAIN.table(recipe.data)
    for sites, seen in ((("attn.q",), False), (("text_encoder:attn.q",), True), (("image_encoder:attn.q",), False)):
        settled = complete(DOMAIN, replace(recipe, method_settings={"sites": sites}))
        model = DOMAIN.model(settled, ("caption",))
        item = DOMAIN.rows(model, manifest.subset([0, 1]), DOMAIN.targets(manifest.subset([0, 1]), ()))[0]
        assert ("features" in item) == seen and ("image" in item) != seen


def test_what_cannot_be_retrieved_is_one_line(table, tmp_path, capsys):
    options = ["--set", "data.task=retrieval", "--backbone", "embedded:vl-tiny", "--method", "lora", "--dry-run"]
    bad = tmp_path / "empty.jsonl"
    image = next((table.parent / "images").iterdir())
    (tmp_path / "a.png").write_bytes(image.read_bytes())
    for line, said in (
        ({"image": "a.png", "caption": " "}, "'caption' is empty"),
        ({"image": "away.png", "caption": "a"}, "'away.png' does not exist"),
        ({"image": "a.png", "caption": "a" * 1_000_000}, "1,000,000 characters"),
        ({"image": "", "caption": "a"}, "'image' is empty"),
    ):
        bad.write_text(json.dumps(line))
        assert main(["vl", "train", *options, "--data", str(bad)]) == 3
        assert said in capsys.readouterr().err


def test_a_part_with_one_picture_is_refused(table):
    from adaptsuite.manifest import Fold

    manifest = DOMAIN.table(_data(table))
    one = np.flatnonzero([row.path == manifest.rows[0].path for row in manifest.rows])
    fold = Fold("split", np.arange(10, 20), np.array([], dtype=np.int64), one)
    with pytest.raises(DataError, match="test has one picture"):
        task_of(manifest).doubts(None, manifest, [fold])


def _data(table):
    from adaptsuite.recipe import DataSettings

    return DataSettings(manifest=str(table), task="retrieval")
