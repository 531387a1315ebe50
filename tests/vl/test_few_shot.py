import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adaptsuite.cli import main
from adaptsuite.errors import DataError, UsageError
from adaptsuite.experiment import _folds
from adaptsuite.recipe import DataSettings
from adaptsuite.vl import synthetic
from adaptsuite.vl.beside import BESIDE, Beside
from adaptsuite.vl.few_shot import FewShotModel, FewShotTask, halves, hits, told
from adaptsuite.vl.pipeline import DOMAIN, task_of
from adaptsuite.vl.tip_adapter import Cache
from adaptsuite.vl.two_tower import load_towers

CLASSES = ("blue circle", "cyan square", "green_cross", "red circle", "white square")
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clip") / "tiny.json"
    path.write_text(json.dumps(OPEN_CLIP))
    return f"open_clip:{path}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six pictures a class for training and three to test."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("shots"), np.random.default_rng(0)
    pictures = synthetic.render(rng.choice(synthetic.NUM_SCENES, 45), rng)
    for i, picture in enumerate(pictures):
        place = root / ("train" if i % 9 < 6 else "test") / CLASSES[i // 9]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.transpose(1, 2, 0)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(backbone, folder) -> Path:
    out = folder.parent / "run"
    options = ["--set", "data.task=base_to_new", "--set", "data.shots=2", "--data", str(folder), "--device", "cpu"]
    model = ["--backbone", backbone, "--random-weights", "--method", "vl.rpo", "--set", "tokens=2", "--epochs", "1"]
    assert main(["vl", "train", *options, *model, "--out", str(out)]) == 0
    return out


def data(folder, task="base_to_new", **more):
    return DataSettings(manifest=str(folder), task=task, **more)


# ---- the protocol


def test_the_first_half_of_the_sorted_classes_trains_and_every_class_is_tested(folder):
    manifest = DOMAIN.table(data(folder))
    (fold,) = _folds(manifest, data(folder, shots=2), 0)
    base = set(CLASSES[:3])
    assert manifest.classes == CLASSES
    assert {manifest.rows[i].label for part in (fold.train, fold.val) for i in part} == base
    assert {manifest.rows[i].label for i in fold.test} == set(CLASSES)
    shots = [manifest.rows[i].label for i in fold.train]
    assert {shots.count(name) for name in base} == {2}
    assert "12 training rows of 2 new classes are left out" in manifest.notes


def test_few_shot_trains_all_classes(folder):
    manifest = DOMAIN.table(data(folder, "few_shot"))
    (fold,) = _folds(manifest, data(folder, "few_shot", shots=3), 0)
    assert {manifest.rows[i].label for i in fold.train} == set(CLASSES) and len(fold.train) == 15


def test_without_a_split_test_rows_are_drawn_once_for_all_seeds(folder):
    found = [DOMAIN.table(data(folder / "train", "few_shot")) for _ in range(2)]
    parts = [[row.extra["split"] for row in manifest.rows] for manifest in found]
    assert parts[0] == parts[1] and set(parts[0]) == {"train", "test"}


def test_rows_compete_within_their_half_alone():
    """4 classes, 2 of them base: a base row's highest score at a new class is no mistake, and the other way round."""
    scores = np.array([[1.0, 0.0, 9.0, 9.0], [9.0, 9.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    targets = np.array([0, 3, 0])
    outputs = np.tile(scores, (1, 1 + len(BESIDE)))
    assert told(outputs, targets, 4, 2)[0].tolist() == [0, 3, 1]
    assert hits(outputs, targets, 4, 2)["adapter"].tolist() == [1, 1, 0]
    assert told(outputs, targets, 4, 4)[0].tolist() == [2, 0, 1]


def test_h_is_the_harmonic_mean_and_zero_where_both_are():
    is_base, groups = np.array([True] * 4 + [False] * 4), [str(i) for i in range(8)]
    found = halves(np.array([1, 1, 1, 0, 1, 0, 0, 0.0]), is_base, groups)
    assert found["base"]["value"] == 0.75 and found["new"]["value"] == 0.25
    assert found["H"]["value"] == pytest.approx(2 * 0.75 * 0.25)
    low, high = found["H"]["ci"]
    assert 0 <= low < found["H"]["value"] < high <= 1
    assert halves(np.zeros(8), is_base, groups)["H"] == {"value": 0.0, "ci": [0.0, 0.0]}
    assert set(halves(np.ones(8), is_base, groups, "probe")) == {"base"}
    assert set(halves(np.ones(4), is_base[:4], groups[:4])) == {"base"}


def test_gain_is_the_difference_of_both_harmonic_means(folder):
    manifest = DOMAIN.table(data(folder))
    rows = [i for i, row in enumerate(manifest.rows) if row.extra["split"] == "test"]
    part = manifest.subset(rows)
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(len(part), 5 * (1 + len(BESIDE))))
    found = task_of(manifest).evaluate(part, manifest.classes, outputs)
    difference = found["H"]["value"] - found["H:zero_shot"]["value"]
    assert found["gain_over_zero_shot"]["value"] == pytest.approx(difference)
    assert "new:probe" not in found and "base:probe" in found


# ---- the model


def test_logits_are_scaled_cosines_with_the_names_and_templates_are_averaged(backbone):
    towers = load_towers(backbone, random_weights=True)
    model = FewShotModel(towers, CLASSES, 3, "a {}.|one {} here", "few_shot").eval()
    image = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, seen = model(image), F.normalize(towers.see(image)[:, 0], dim=-1)
        for c, name in enumerate(CLASSES):
            texts = [t.format(name.replace("_", " ")) for t in ("a {}.", "one {} here")]
            read = F.normalize(towers.read(**towers.tokenizer(texts))[:, 0], dim=-1).mean(0)
            expected = towers.scale * seen @ F.normalize(read, dim=-1)
            torch.testing.assert_close(found[:, c], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(image, first=3), found[:, :3])


def test_new_names_are_no_negatives_in_training(backbone):
    """The loss of a base row is the same whatever the new classes are called."""
    towers = load_towers(backbone, random_weights=True)
    batch = {"image": torch.rand(2, 3, 32, 32), "target": torch.tensor([0, 2])}
    models = [FewShotModel(towers, (*CLASSES[:3], *new), 3, "a {}.", "base_to_new") for new in (("x", "y"), ("z",))]
    losses = [FewShotTask(3).loss(model.eval(), batch).item() for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_of_new_classes_the_cache_says_what_names_say():
    names, features = F.normalize(torch.randn(4, 3), dim=-1), F.normalize(torch.randn(5, 3), dim=-1)
    cache = Cache(features[:2], torch.eye(2), 1.0, 5.5)
    beside = Beside(names, cache, cache, (torch.ones(2, 3), torch.zeros(2)), torch.zeros(4), 20.0)
    scores = dict(zip(BESIDE, beside.scores(features), strict=True))
    torch.testing.assert_close(scores["tip_adapter"][:, 2:], scores["zero_shot"][:, 2:])
    assert (scores["tip_adapter"][:, :2] > scores["zero_shot"][:, :2]).all()
    assert scores["probe"][:, 2:].isinf().all()
    again = Beside.of(beside.tensors()).scores(features)
    for name, other in zip(BESIDE, again, strict=True):
        torch.testing.assert_close(other, scores[name])


# ---- the commands


def test_a_run_shows_base_new_and_h_beside_every_baseline(run):
    report = json.loads((run / "metrics.json").read_text())
    found = report["metrics"]["test"] if "metrics" in report else report["test"]
    for name in ("", ":zero_shot", ":tip_adapter", ":tip_adapter_f", ":names_alone"):
        base, new, both = (found[f"{key}{name}"]["value"] for key in ("base", "new", "H"))
        assert both == pytest.approx(2 * base * new / (base + new) if base + new else 0.0)
    assert {found[f"{key}:names_alone"]["value"] for key in ("base", "new")} <= {1 / 3, 1 / 2}  # one name for all
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Beside the adapter" in page and "zero_shot: cosines with the class names" in page
    lines = (run / "classes.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "path,label,said," + ",".join((*BESIDE, "run")) and len(lines) == 16


def test_evaluate_finds_the_baselines_again(run, folder, capsys):
    assert main(["vl", "evaluate", str(run), "--data", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["metrics"]["test"]
    report = json.loads((run / "metrics.json").read_text())
    found = report["metrics"]["test"] if "metrics" in report else report["test"]
    assert {k: v["value"] for k, v in again.items()} == pytest.approx({k: found[k]["value"] for k in again})


def test_predict_names_the_class_of_a_picture(run, folder, capsys):
    assert main(["vl", "predict", str(run), str(folder / "test" / "red circle"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["predictions"]
    assert len(said) == 3
    for one in said:
        assert set(one["scores"]) == set(CLASSES) and sum(one["scores"].values()) == pytest.approx(1, abs=1e-4)
        assert one["label"] == max(one["scores"], key=one["scores"].get)
    assert main(["vl", "predict", str(run), "--question", "what is it ?"]) == 2
    assert "this adapter names the classes" in capsys.readouterr().err


def test_a_lost_baseline_is_one_line(run, folder, capsys, tmp_path):
    import shutil

    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "beside.safetensors").unlink()
    assert main(["vl", "evaluate", str(copy), "--data", str(folder)]) == 4
    assert "beside.safetensors is missing or damaged" in capsys.readouterr().err


def test_rpo_trains_as_its_paper_says_and_other_methods_by_the_task(backbone, folder):
    from adaptsuite.experiment import complete
    from adaptsuite.recipe import Recipe

    def plan(method, task):
        return complete(DOMAIN, Recipe("vl", backbone=backbone, method=method, data=data(folder, task))).plan

    paper = {"optimizer": "sgd", "lr": 0.01, "batch_size": 4, "epochs": 15}
    assert paper.items() <= plan("vl.rpo", "base_to_new").items()
    assert plan("lora", "few_shot")["lr"] == 2e-4 and plan("lora", "retrieval")["batch_size"] == 128
    assert plan("lora", "vqa")["lr"] == 3e-3


def test_few_shot_command_says_what_train_says(backbone, folder, capsys):
    options = ["--data", str(folder), "--backbone", backbone, "--random-weights", "--method", "lora", "--dry-run"]
    assert main(["vl", "few-shot", *options, "--shots", "3", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["data"]["task"] == "base_to_new" and plan["recipe"]["data"]["shots"] == 3
    assert main(["vl", "few-shot", *options, "--shots", "3", "--all-classes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["data"]["task"] == "few_shot"


def test_what_cannot_be_is_one_line(backbone, folder, tmp_path, capsys):
    options = ["--set", "data.task=base_to_new", "--random-weights", "--method", "vl.rpo", "--dry-run"]
    for more, code, said in (
        (["--backbone", "embedded:vl-tiny", "--data", str(folder)], 2, "towers that were trained to be compared"),
        (["--backbone", backbone, "--data", str(folder), "--set", "data.shots=99"], 3, "99 shots were asked for"),
        (["--backbone", backbone, "--data", str(folder), "--set", "head.template=no place"], 2, "holds {} once"),
        (["--backbone", backbone, "--data", str(folder), "--cv", "split"], 2, "has one test part"),
    ):
        assert main(["vl", "train", *options, *more]) == code
        assert said in capsys.readouterr().err


def test_three_classes_have_no_new_half(folder, tmp_path):
    import shutil

    for name in CLASSES[:3]:
        for part in ("train", "test"):
            shutil.copytree(folder / part / name, tmp_path / part / name)
    with pytest.raises(DataError, match="base_to_new needs four classes, it has 3"):
        DOMAIN.table(data(tmp_path))
    with pytest.raises(UsageError, match="one test part"):
        DOMAIN.table(data(tmp_path, cv="split"))
