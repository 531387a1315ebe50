"""What experiments add to fit: the head's start, pooled evidence over folds and seeds, and who writes."""

from types import SimpleNamespace

import numpy as np
import pytest

from adaptsuite import experiment
from adaptsuite.errors import UsageError
from adaptsuite.manifest import Fold, load_manifest


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
    found = experiment.pooled(manifest, outcomes, "test")["accuracy"]
    assert found["value"] == pytest.approx((0.75 + 0.5) / 2) and found["range"] == [0.5, 0.75]
    assert found["seeds"] == 2 and found["ci"][0] < found["value"] < found["ci"][1]
    assert found["spread"]["seeds"] == pytest.approx({"mean": 0.625, "std": 0.25 / 2**0.5, "n": 2})
    by_fold = ((1 + 0.5) / 2, (0.5 + 0.5) / 2)  # each fold's mean over its seeds
    assert found["spread"]["folds"] == pytest.approx({"mean": 0.625, "std": np.std(by_fold, ddof=1), "n": 2})
    one = experiment.pooled(manifest, outcomes[:2], "test")["accuracy"]
    assert one["value"] == 0.75 and "range" not in one and list(one["spread"]) == ["folds"]
    assert one["spread"]["folds"] == pytest.approx({"mean": 0.75, "std": 0.5 / 2**0.5, "n": 2})
    assert "spread" not in experiment.pooled(manifest, outcomes[:1], "test")["accuracy"]
    lines = experiment.summary({"metrics": {"test": {"accuracy": found}}, "adapter": []})
    assert "folds 0.625 ± 0.177 (2)  seeds 0.625 ± 0.177 (2)" in lines[0] and "standard deviation" in lines[-1]
    assert experiment.pooled(manifest, outcomes, "val") == {}


def test_a_fold_that_does_not_define_a_metric_is_not_in_its_spread(manifest):
    one_class = outcome(manifest, "2", 0, [0, 2, 4], 3)  # labels a, a, a
    outcomes = [outcome(manifest, "0", 0, range(6), 5), outcome(manifest, "1", 0, range(6, 12), 3), one_class]
    found = experiment.pooled(manifest, outcomes, "test")
    assert found["accuracy"]["spread"]["folds"]["n"] == 3 and found["auroc"]["spread"]["folds"]["n"] == 2


def test_intervals_do_not_shrink_when_seeds_see_the_same_groups_again(manifest):
    once = [outcome(manifest, "0", 0, range(12), 9)]
    often = [outcome(manifest, "0", seed, range(12), 9) for seed in range(8)]
    narrow, wide = (experiment.pooled(manifest, o, "test")["accuracy"]["ci"] for o in (often, once))
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
