"""What experiments add to fit: the head's start, the choice of a rate, pooled evidence over folds and seeds, and who
writes.

Run as a script, this file is the experiment that is killed.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401  (makes adaptsuite importable)

from adaptsuite import applied, experiment
from adaptsuite.domain import Domain
from adaptsuite.errors import Diverged, UsageError
from adaptsuite.manifest import Fold, load_manifest
from adaptsuite.recipe import Recipe


def blobs(classes, rows=30, width=5, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width)) * 3
    y = np.repeat(np.arange(classes), rows)
    return (centres[y] + rng.normal(size=(len(y), width)) * [0.1, 1, 1, 5, 20][:width]).astype(np.float32), y


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_starts_as_scikit_learn_s_regression_on_standardised_features(classes):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = blobs(classes)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(C=experiment.PROBE_C, max_iter=1000)).fit(x, y)
    weight, bias = experiment.linear_probe(x, y, classes)
    logits = x @ weight.T + bias
    powers = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(powers / powers.sum(1, keepdims=True), theirs.predict_proba(x), atol=1e-4)


def test_a_class_without_a_training_row_is_never_predicted_at_the_start():
    x, y = blobs(2)
    weight, bias = experiment.linear_probe(x, y * 2, 3)
    assert set((x @ weight.T + bias).argmax(1)) == {0, 2}


def test_each_label_of_a_multilabel_table_has_its_own_regression():
    from sklearn.linear_model import LogisticRegression

    x, y = blobs(2, width=3)
    targets = np.stack([y == 0, y == 1, np.ones(len(y)), np.zeros(len(y))], 1).astype(np.float32)
    weight, bias = experiment.linear_probe(x, targets, 4)
    said = x @ weight.T + bias > 0
    assert said[:, 2].all() and not said[:, 3].any()
    standard = (x - x.mean(0)) / (x.std(0) + 1e-6)
    theirs = LogisticRegression(C=experiment.PROBE_C, max_iter=1000).fit(standard, y == 0).predict(standard)
    assert (said[:, 0] == theirs).all() and len(set(theirs)) == 2


@pytest.fixture
def manifest(tmp_path):
    lines = ["path,label,group,fold"]
    for i in range(12):
        (tmp_path / f"{i}.wav").write_bytes(b"x")
        lines.append(f"{i}.wav,{'ab'[i % 2]},g{i // 3},{i // 6}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return load_manifest(tmp_path / "manifest.csv")


def outcome(manifest, name, seed, rows, right):
    """An outcome whose first `right` rows are predicted rightly."""
    rows = np.array(rows)
    truth = manifest.subset(rows).targets()
    said = np.where(np.arange(len(rows)) < right, truth, 1 - truth)
    fold = Fold(name, np.array([], int), np.array([], int), rows)
    return SimpleNamespace(fold=fold, seed=seed, outputs={"test": np.eye(2)[said] * 8.0 - 4})


def test_out_of_fold_predictions_are_pooled_and_seeds_give_mean_and_range(manifest):
    outcomes = [
        outcome(manifest, "0", 0, range(6), 6),
        outcome(manifest, "1", 0, range(6, 12), 3),
        outcome(manifest, "0", 1, range(6), 3),
        outcome(manifest, "1", 1, range(6, 12), 3),
    ]
    found = experiment.pooled(Toy(), manifest, outcomes, "test")["accuracy"]
    assert found["value"] == pytest.approx((0.75 + 0.5) / 2) and found["range"] == [0.5, 0.75]
    assert found["seeds"] == 2 and found["ci"][0] < found["value"] < found["ci"][1]
    assert found["spread"]["seeds"] == pytest.approx({"mean": 0.625, "std": 0.25 / 2**0.5, "n": 2})
    by_fold = ((1 + 0.5) / 2, (0.5 + 0.5) / 2)  # each fold's mean over its seeds
    assert found["spread"]["folds"] == pytest.approx({"mean": 0.625, "std": np.std(by_fold, ddof=1), "n": 2})
    one = experiment.pooled(Toy(), manifest, outcomes[:2], "test")["accuracy"]
    assert one["value"] == 0.75 and "range" not in one and list(one["spread"]) == ["folds"]
    assert one["spread"]["folds"] == pytest.approx({"mean": 0.75, "std": 0.5 / 2**0.5, "n": 2})
    assert "spread" not in experiment.pooled(Toy(), manifest, outcomes[:1], "test")["accuracy"]
    lines = experiment.summary({"metrics": {"test": {"accuracy": found}}, "adapter": []})
    assert "folds 0.625 ± 0.177 (2)  seeds 0.625 ± 0.177 (2)" in lines[0] and "standard deviation" in lines[-1]
    assert experiment.pooled(Toy(), manifest, outcomes, "val") == {}


def test_a_fold_that_does_not_define_a_metric_is_not_in_its_spread(manifest):
    one_class = outcome(manifest, "2", 0, [0, 2, 4], 3)  # labels a, a, a
    outcomes = [outcome(manifest, "0", 0, range(6), 5), outcome(manifest, "1", 0, range(6, 12), 3), one_class]
    found = experiment.pooled(Toy(), manifest, outcomes, "test")
    assert found["accuracy"]["spread"]["folds"]["n"] == 3 and found["auroc"]["spread"]["folds"]["n"] == 2


def test_intervals_do_not_shrink_when_seeds_see_the_same_groups_again(manifest):
    once = [outcome(manifest, "0", 0, range(12), 9)]
    often = [outcome(manifest, "0", seed, range(12), 9) for seed in range(8)]
    narrow, wide = (experiment.pooled(Toy(), manifest, o, "test")["accuracy"]["ci"] for o in (often, once))
    assert narrow == pytest.approx(wide)


def test_only_the_first_process_speaks_and_writes(monkeypatch):
    assert experiment.is_main()
    monkeypatch.setenv("RANK", "1")
    assert not experiment.is_main()


def test_a_recipe_without_data_backbone_or_method_says_which_option():
    from adaptsuite.recipe import Recipe

    domain = SimpleNamespace(name="audio", sections={}, suffixes=())
    with pytest.raises(UsageError, match="--data"):
        experiment.settle(domain, Recipe("audio", "b", method="lora"))
    with pytest.raises(UsageError, match="--backbone"):
        experiment.complete(domain, Recipe("audio", method="lora"))
    with pytest.raises(UsageError, match="--method"):
        experiment.complete(domain, Recipe("audio", "b"))


# ---- the choice of a rate


@dataclass(frozen=True)
class Head:
    start: str = "random"


class Points:
    """Files of eight numbers; every access is written down."""

    def __init__(self, paths, targets, read):
        self.paths, self.targets, self.read = list(paths), targets, read

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        import torch

        self.read.append(self.paths[index].stem)
        x = torch.tensor([float(v) for v in self.paths[index].read_text().split()])
        return {"x": x, "label": self.targets[index]}

    def mean_by_row(self, outputs):
        return outputs


class Classify:
    monitor, target = "accuracy", "label"

    def __init__(self, counts, losses, kill):
        self.counts, self.losses, self.kill = counts, losses, kill

    def loss(self, model, batch):
        import torch.nn.functional as F

        self.losses.append(len(batch["x"]))
        if len(self.losses) == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        return F.cross_entropy(model(batch["x"]), batch["label"])

    def predict(self, model, batch):
        return model(batch["x"])

    def embed(self, model, batch):
        return model.backbone(batch["x"])

    def score(self, outputs, targets):
        from adaptsuite.metrics import score

        return score(outputs, targets, "multiclass", probabilities=False)


class Toy(Domain):
    """A domain of three clouds, with a frozen random layer below a head of its own."""

    name, suffixes, train_norms, backbones, sections = "audio", (".txt",), False, (), {"head": Head}

    def __init__(self, kill=0):
        self.read, self.losses, self.counts, self.kill = [], [], [], kill

    def defaults(self, method):
        return {"method_settings": {}, "plan": {"batch_size": 8, "epochs": 4, "lr": 0.01, "device": "cpu"}}

    def model(self, recipe, classes):
        import torch
        from torch import nn

        class Model(nn.Module):
            linear_head = "head"

            def __init__(self):
                super().__init__()
                self.backbone, self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU()), nn.Linear(12, len(classes))

            def forward(self, x):
                return self.head(self.backbone(x))

        torch.manual_seed(recipe.seeds[0])
        return Model().eval()

    def dataset(self, model, paths, targets):
        return Points(paths, targets, self.read)

    def task(self, recipe, classes, counts=None):
        self.counts += [] if counts is None else [counts.tolist()]
        return Classify(counts, self.losses, self.kill)

    def sample(self, model, batch=2):
        import torch

        return torch.randn(batch, 8, generator=torch.Generator().manual_seed(0))

    def header(self, path):
        return None

    def look(self, path):
        return {"remarks": []}

    def prepare(self, model, paths):
        return []

    def describe(self, model):
        return {"input": "8 numbers"}

    def extra(self, handle, dataset, outputs):
        return [{"title": "Of the domain", "text": "toy"}]


def clouds(folder, val=9):
    """A table of 24 training, `val` validation and 9 test rows, the training rows of one class twice as many."""
    rng = np.random.default_rng(0)
    lines = ["path,label,split"]
    for part, num in (("train", 24), ("val", val), ("test", 9)):
        for i in range(num):
            label = (0, 0, 1, 2)[i % 4] if part == "train" else i % 3
            x = rng.normal(size=8) + 2.5 * (np.arange(8) == label)
            (folder / f"{part}{i}.txt").write_text(" ".join(f"{v:.6f}" for v in x))
            lines.append(f"{part}{i}.txt,{'abc'[label]},{part}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


def recipe_of(table, **settings):
    plan = {"weight_decay": 0.0, **settings.pop("plan", {})}
    recipe = Recipe("audio", "toy", method="linear", plan=plan, **settings)
    return replace(recipe, data=replace(recipe.data, manifest=str(table)))


def run_toy(table, out, domain=None, **settings):
    """(result, domain, lines that were said)."""
    domain, said = domain or Toy(), []
    settled, manifest = experiment.settle(domain, recipe_of(table, **settings))
    return experiment.run(domain, settled, manifest, out, said.append), domain, said


def weights_of(out):
    from safetensors.torch import load_file

    return load_file(out / "adapter" / "adapter.safetensors")


def same(a, b):
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_grid_keeps_the_best_rate_and_looks_at_test_rows_only_afterwards(tmp_path):
    table = clouds(tmp_path)
    result, domain, said = run_toy(table, tmp_path / "grid", lr_grid=(1e-6, 0.05, 1e-5))
    alone, _, _ = run_toy(table, tmp_path / "alone", plan={"lr": 0.05})
    rows = result["metrics"]["lr_grid"]
    assert [(row["lr"], row["chosen"]) for row in rows] == [(1e-6, False), (0.05, True), (1e-5, False)]
    assert rows[0]["accuracy"] < rows[1]["accuracy"] == alone["metrics"]["folds"][0]["val"]["accuracy"]
    assert same(weights_of(tmp_path / "grid"), weights_of(tmp_path / "alone"))
    assert result["metrics"]["test"] == alone["metrics"]["test"]
    assert "lr_grid" not in alone["metrics"] and "lr" not in alone["metrics"]["folds"][0]
    assert result["metrics"]["folds"][0]["lr"] == 0.05
    first_test = next(i for i, name in enumerate(domain.read) if name.startswith("test"))
    assert not any(name.startswith(("train", "val")) for name in domain.read[first_test:])
    assert (tmp_path / "grid" / "lr-1e-06" / "log.jsonl").exists() and (tmp_path / "grid" / "lr-0.05").is_dir()
    lines = [f"rate      {r['lr']:g}  accuracy {r['accuracy']:.3f} at epoch {r['best_epoch']}" for r in rows]
    assert said == [*lines, "chosen    0.05"]


def test_a_grid_of_decays_is_judged_with_the_rates_pair_by_pair(tmp_path):
    grids = {"lr_grid": (1e-6, 0.05), "weight_decay_grid": (0.0, 50.0)}
    result, _, said = run_toy(clouds(tmp_path), tmp_path / "run", **grids)
    rows = result["metrics"]["lr_grid"]
    assert [(row["lr"], row["weight_decay"]) for row in rows] == [(1e-6, 0.0), (1e-6, 50.0), (0.05, 0.0), (0.05, 50.0)]
    assert [row["chosen"] for row in rows] == [False, False, True, False]  # a decay of 50 x .05 undoes every step
    assert said[-1] == "chosen    0.05 wd 0" and (tmp_path / "run" / "lr-0.05-wd-50" / "log.jsonl").exists()
    assert "validation rows chose wd 0 of 0, 50 and its epoch" in " ".join(result["warnings"])
    assert "Learning rates and weight decays" in (tmp_path / "run" / "report.html").read_text()
    alone, _, _ = run_toy(clouds(tmp_path), tmp_path / "alone", weight_decay_grid=(0.0, 50.0), plan={"lr": 0.05})
    assert same(weights_of(tmp_path / "run"), weights_of(tmp_path / "alone"))


def test_the_report_and_the_adapter_say_which_rates_were_tried_and_that_validation_chose(tmp_path):
    result, _, _ = run_toy(clouds(tmp_path), tmp_path / "run", lr_grid=(1e-6, 0.01, 0.05))
    notes = " ".join(result["warnings"])
    assert "validation rows chose lr 0.05 of 1e-06, 0.01, 0.05 and its epoch: validation scores are too good" in notes
    assert "lr 0.05 is the highest that was tried: a higher one may be better" in notes
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Learning rates" in page and "1e-06" in page and "validation scores are too good" in page
    record = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert record["lr_grid"] == result["metrics"]["lr_grid"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["lr_grid"] == record["lr_grid"]
    applied.report_adapter(Toy(), tmp_path / "run" / "adapter", *[None] * 5)  # anew, from the run's files
    assert "Learning rates" in (tmp_path / "run" / "report.html").read_text()


def test_equal_rates_are_told_apart_by_log_loss(tmp_path):
    """Nine validation rows tie often: the rate that is surer of the right answers wins."""
    result, _, _ = run_toy(clouds(tmp_path), tmp_path / "run", lr_grid=(0.2, 0.3), plan={"epochs": 12})
    low, high = result["metrics"]["lr_grid"]
    losses = {}
    for row in (low, high):
        log = (tmp_path / "run" / f"lr-{row['lr']:g}" / "log.jsonl").read_text().splitlines()
        epochs = [line for line in map(json.loads, log) if line["event"] == "epoch"]
        losses[row["lr"]] = epochs[row["best_epoch"] - 1]["val"]["log_loss"]
    assert low["accuracy"] == high["accuracy"]
    assert result["metrics"]["folds"][0]["lr"] == min(losses, key=losses.get)


def test_a_rate_that_diverges_is_behind_all_others_and_all_of_them_are_an_error(tmp_path):
    table = clouds(tmp_path)
    plan = {"clip": None, "warmup": 0.0, "optimizer": "sgd"}
    result, _, said = run_toy(table, tmp_path / "run", lr_grid=(1e38, 1e20, 0.01), plan=plan)
    wild, huge, tame = result["metrics"]["lr_grid"]
    assert (wild["stopped"], wild["accuracy"], wild["chosen"], tame["chosen"]) == ("diverged", None, False, True)
    assert said[0] == "rate      1e+38  diverged" and any("lr 1e+38 diverged: 6 steps" in n for n in result["warnings"])
    assert huge["stopped"] == "diverged"  # finite, and more than an adapter may hold
    with pytest.raises(Diverged, match="no rate of lr_grid gave a finite accuracy .* lr 1e[+]38 diverged"):
        run_toy(table, tmp_path / "other", lr_grid=(1e38, 1e20), plan=plan)


def test_the_head_s_rate_keeps_its_ratio(tmp_path):
    plan = {"lr": 0.1, "head_lr": 0.01}
    result, _, _ = run_toy(clouds(tmp_path), tmp_path / "run", lr_grid=(0.05, 0.2), plan=plan)
    assert [row["head_lr"] for row in result["metrics"]["lr_grid"]] == pytest.approx([0.005, 0.02])


@pytest.mark.parametrize("start", ["random", "probe"])
def test_refit_trains_on_both_parts_anew_and_as_long_as_was_best(tmp_path, start):
    table, start = clouds(tmp_path), {"head": {"start": start}}
    result, domain, _ = run_toy(table, tmp_path / "refit", lr_grid=(1e-6, 0.05), refit=True, **start)
    (row,) = (row for row in result["metrics"]["lr_grid"] if row["chosen"])
    assert domain.counts[0] == [12, 6, 6] and domain.counts[-1] == [15, 9, 9]
    log = [json.loads(line) for line in (tmp_path / "refit" / "refit-0.05" / "log.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "epoch" for line in log) == row["best_epoch"]
    assert f"trained anew on 33 rows, 9 of them validation rows, for {row['best_epoch']} of 4 epochs" in " ".join(
        result["warnings"]
    )
    # the same by hand: a run on 33 rows, kept where the chosen rate was best
    merged = tmp_path / "merged.csv"
    merged.write_text(table.read_text().replace(",val", ",train"))
    settings = recipe_of(merged, plan={"lr": 0.05}, **start)
    settled, manifest = experiment.settle(Toy(), replace(settings, data=replace(settings.data, val="none", test=None)))
    kept = by_hand(settled, manifest, row["best_epoch"])
    assert same({n.removeprefix("tensors."): t for n, t in weights_of(tmp_path / "refit").items()}, kept)
    # scores of validation rows are of the fit that did not see them
    before, _, _ = run_toy(table, tmp_path / "before", plan={"lr": 0.05}, **start)
    assert result["metrics"]["val"] == before["metrics"]["val"]
    assert result["metrics"]["test"] != before["metrics"]["test"]


def by_hand(recipe, manifest, epochs):
    """Tensors behind so many epochs of a run on the rows that are not test."""
    from adaptsuite.plan import Plan
    from adaptsuite.trainer import fit

    domain = Toy()
    handle = experiment.adapt(domain, recipe, manifest.classes)
    rows = np.flatnonzero([row.extra["split"] != "test" for row in manifest.rows])
    data = experiment.Parts(domain, manifest).part(handle.model, rows)
    task, plan, seen = domain.task(recipe, manifest.classes), Plan(**recipe.plan), []
    if recipe.head["start"] == "probe":
        experiment.start_head(handle, task, data, plan)
    now = lambda row: seen.append({n.removeprefix("tensors."): t.clone() for n, t in handle.state().items()})  # noqa: E731
    fit(handle.model, task, data, None, plan, None, handle, on_epoch=now)
    return seen[epochs - 1]


def test_refit_without_a_grid_takes_the_rate_of_the_plan(tmp_path):
    result, _, _ = run_toy(clouds(tmp_path), tmp_path / "run", refit=True, plan={"lr": 0.05, "patience": 2})
    assert "trained anew on 33 rows" in " ".join(result["warnings"]) and "lr_grid" not in result["metrics"]
    assert "no validation set" not in (tmp_path / "run" / "report.html").read_text()


def test_every_seed_chooses_for_itself(tmp_path):
    result, _, _ = run_toy(clouds(tmp_path), tmp_path / "run", lr_grid=(0.01, 0.05), seeds=(0, 1))
    assert [(r["seed"], r["lr"]) for r in result["metrics"]["lr_grid"]] == [(0, 0.01), (0, 0.05), (1, 0.01), (1, 0.05)]
    assert sum(row["chosen"] for row in result["metrics"]["lr_grid"]) == 2
    assert (tmp_path / "run" / "seed1" / "lr-0.05" / "log.jsonl").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lr_grid": (0.1, 0.2)}, "lr_grid chooses the learning rate on validation rows, and split has none"),
        ({"refit": True}, "refit chooses the number of epochs on validation rows, and split has none"),
        ({"weight_decay_grid": (0.1,)}, "weight_decay_grid chooses the weight decay on validation rows"),
        ({"weight_decay_grid": (0.1, 0.1), "with_val": True}, "weight_decay_grid=0.1,0.1 names a decay twice"),
        ({"weight_decay_grid": (-0.1,), "with_val": True}, "weight_decay_grid: weight_decay=-0.1: expected"),
        ({"lr_grid": (0.1, 0.1), "with_val": True}, "lr_grid=0.1,0.1 names a rate twice"),
        ({"lr_grid": (0.1, -0.1), "with_val": True}, "lr_grid: lr=-0.1: expected a number above 0"),
        ({"lr_grid": (0.1, 1e-3), "plan": {"min_lr": 1e-2, "lr": 1.0}, "with_val": True}, "lr_grid: min_lr=0.01 is"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_any_work(tmp_path, settings, message):
    recipe = recipe_of(clouds(tmp_path), **{k: v for k, v in settings.items() if k != "with_val"})
    if "with_val" not in settings:
        recipe = replace(recipe, data=replace(recipe.data, val="none"))
    domain = Toy()
    settled, manifest = experiment.settle(domain, recipe)
    with pytest.raises(UsageError, match=message):
        experiment.preview(domain, settled, manifest)
    with pytest.raises(UsageError, match=message):
        experiment.run(domain, settled, manifest, tmp_path / "run")
    assert domain.losses == [] and not (tmp_path / "run").exists()


def test_the_preview_names_the_rates(tmp_path):
    domain, recipe = Toy(), recipe_of(clouds(tmp_path), lr_grid=(0.1, 1e-4), refit=True)
    lines, plan = experiment.preview(domain, *experiment.settle(domain, recipe))
    assert "rates     0.1, 0.0001: validation rows choose" in lines and any(line.startswith("refit") for line in lines)
    assert plan["recipe"]["lr_grid"] == (0.1, 1e-4) and plan["recipe"]["refit"] is True


def test_a_run_killed_in_the_second_rate_goes_on_there_and_ends_the_same(tmp_path):
    table, grid = clouds(tmp_path), {"lr_grid": (1e-6, 0.05, 0.02), "refit": True}
    out, env = tmp_path / "killed", os.environ | {"OMP_NUM_THREADS": "1"}
    # three steps an epoch, four epochs a rate: the 20th step is in the third epoch of the second rate
    done = subprocess.run([sys.executable, __file__, table, out, "20"], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / "lr-0.05" / "checkpoint-6").is_dir() and not (out / "lr-0.02").exists()
    (_, resumed, _), (_, unbroken, _) = (run_toy(table, folder, **grid) for folder in (out, tmp_path / "whole"))
    # the first rate is not trained again, and of the second not its first two epochs
    assert len(resumed.losses) == len(unbroken.losses) - 12 - 6
    assert same(weights_of(out), weights_of(tmp_path / "whole"))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert metrics[0]["lr_grid"] == metrics[1]["lr_grid"] and metrics[0]["test"] == metrics[1]["test"]


# ---- what tasks and adapters are told


def test_a_task_for_training_is_given_the_training_rows_of_each_class(tmp_path):
    _, domain, _ = run_toy(clouds(tmp_path), tmp_path / "run")
    assert set(map(tuple, domain.counts)) == {(12, 6, 6)}


def test_rows_of_several_labels_count_for_each(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.wav").write_bytes(b"x")
    (tmp_path / "manifest.csv").write_text("path,label\na.wav,x;y\nb.wav,y\nc.wav,\n")
    manifest = load_manifest(tmp_path / "manifest.csv", "multilabel")
    assert experiment.class_counts(manifest, np.array([0, 1, 2])).tolist() == [1, 2]
    assert experiment.class_counts(manifest, np.array([1])).tolist() == [0, 1]


def test_an_adapter_keeps_what_the_domain_says_of_its_input(tmp_path):
    from adaptsuite.artifact import read_adapter

    run_toy(clouds(tmp_path), tmp_path / "run")
    record = read_adapter(tmp_path / "run" / "adapter")
    assert record.preprocessing == {"input": "8 numbers"} and "lr_grid" not in record.extra


@pytest.mark.parametrize("backbone", ["embedded:audio-tiny", "ast-tiny"])
def test_what_audio_says_of_its_input_is_json(backbone):
    from adaptsuite.audio.pipeline import DOMAIN

    recipe = experiment.complete(DOMAIN, Recipe("audio", backbone, random_weights=":" not in backbone, method="linear"))
    said = DOMAIN.describe(DOMAIN.model(recipe, ("a", "b")))
    assert json.loads(json.dumps(said, allow_nan=False)) == said and said["front_end"]["sample_rate_hz"] == 16000


if __name__ == "__main__":
    toy = Toy(int(sys.argv[3]))
    run_toy(Path(sys.argv[1]), Path(sys.argv[2]), toy, lr_grid=(1e-6, 0.05, 0.02), refit=True)
