"""Metrics against scikit-learn, and intervals against a bootstrap in plain loops."""

import json
import time
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from adaptsuite.errors import UsageError
from adaptsuite.metrics import (
    METRICS,
    band,
    bootstrap,
    confusion_matrix,
    evaluate,
    per_class,
    reliability,
    resample,
    score,
)


def multiclass(rows=200, classes=5, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, rows)
    logits = rng.normal(size=(rows, classes)) + 1.5 * np.eye(classes)[targets]
    logits = np.round(logits) if ties else logits
    powers = np.exp(logits)
    return logits, powers / powers.sum(1, keepdims=True), targets


def multilabel(rows=200, classes=5, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    targets = (rng.random((rows, classes)) < 0.3).astype(int)
    logits = rng.normal(size=(rows, classes)) + 2 * targets - 1
    logits = np.round(logits) if ties else logits
    return logits, 1 / (1 + np.exp(-logits)), targets


def sklearn_multiclass(probabilities, targets):
    predicted, classes = probabilities.argmax(1), range(probabilities.shape[1])
    present = [k for k in classes if (targets == k).any()]
    return {
        "accuracy": sk.accuracy_score(targets, predicted),
        "balanced_accuracy": sk.recall_score(targets, predicted, labels=present, average="macro"),
        "macro_f1": sk.f1_score(targets, predicted, labels=present, average="macro"),
        "auroc": np.mean([sk.roc_auc_score(targets == k, probabilities[:, k]) for k in present]),
        "map": np.mean([sk.average_precision_score(targets == k, probabilities[:, k]) for k in present]),
        "log_loss": sk.log_loss(targets, probabilities, labels=classes),
        "ece": loop_ece(probabilities.max(1), predicted == targets),
    }


def sklearn_multilabel(probabilities, targets):
    predicted = (probabilities >= 0.5).astype(int)
    present = [k for k in range(targets.shape[1]) if targets[:, k].any()]
    return {
        "map": sk.average_precision_score(targets[:, present], probabilities[:, present], average="macro"),
        "auroc": sk.roc_auc_score(targets[:, present], probabilities[:, present], average="macro"),
        "macro_f1": sk.f1_score(targets[:, present], predicted[:, present], average="macro"),
        "accuracy": sk.accuracy_score(targets, predicted),
        "log_loss": np.mean(
            [sk.log_loss(t, p, labels=[0, 1]) for t, p in zip(targets.T, probabilities.T, strict=True)]
        ),
        "ece": loop_ece(probabilities.ravel(), targets.ravel()),
    }


def loop_ece(confidence, truth, bins=15):
    total = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - truth[inside].mean())
    return total


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_metric_equals_scikit_learn(seed, ties):
    for make, reference, task in (
        (multiclass, sklearn_multiclass, "multiclass"),
        (multilabel, sklearn_multilabel, "multilabel"),
    ):
        logits, probabilities, targets = make(seed=seed, ties=ties)
        expected = reference(probabilities, targets)
        for outputs in (probabilities,) if ties else (probabilities, logits):  # rounding of exp would undo ties
            found = score(outputs, targets, task)
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name] == pytest.approx(value, abs=1e-9), (task, name)


def test_a_confidence_on_the_edge_of_a_bin_belongs_below_it():
    confidence = np.repeat([0.2, 0.4, 0.6, 0.8, 1.0], 8)[:, None]
    truth = np.random.default_rng(0).integers(0, 2, (40, 1))
    assert score(confidence, truth, "multilabel")["ece"] == pytest.approx(loop_ece(confidence[:, 0], truth[:, 0]))
    assert [row["high"] for row in reliability(confidence, truth, "multilabel")] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_two_classes_have_the_usual_binary_auroc():
    _, probabilities, targets = multiclass(classes=2)
    assert score(probabilities, targets)["auroc"] == pytest.approx(sk.roc_auc_score(targets, probabilities[:, 1]))


@pytest.mark.parametrize("task, make", [("multiclass", multiclass), ("multilabel", multilabel)])
def test_the_interval_is_that_of_a_plain_loop_over_resampled_groups(task, make):
    _, probabilities, targets = make(rows=60)
    groups = np.random.default_rng(5).integers(0, 12, 60)
    reference = {"multiclass": sklearn_multiclass, "multilabel": sklearn_multilabel}[task]
    names, rng, drawn = list(dict.fromkeys(groups.tolist())), np.random.default_rng(7), []
    for _ in range(40):
        taken = [names[g] for g in rng.integers(0, len(names), len(names))]
        rows = np.concatenate([np.flatnonzero(groups == name) for name in taken])
        drawn.append(reference(probabilities[rows], targets[rows]))
    result = evaluate(probabilities, targets, groups, task, seed=7, repeats=40)
    for name, row in result.items():
        expected = np.quantile([values[name] for values in drawn], [0.025, 0.975])
        assert row["ci"] == pytest.approx(expected, abs=1e-6), name
        alone = bootstrap(probabilities, targets, groups, name, repeats=40, seed=7, task=task)
        assert alone == pytest.approx(expected, abs=1e-6), name


def test_a_function_is_resampled_as_a_named_metric_is():
    logits, _, targets = multiclass(rows=80)
    groups = np.arange(80) // 4
    found = bootstrap(logits, targets, groups, lambda o, t: (o.argmax(1) == t).mean(), repeats=200, seed=3)
    assert found == pytest.approx(bootstrap(logits, targets, groups, "accuracy", repeats=200, seed=3))


def test_any_statistic_is_resampled_as_a_plain_loop_over_groups_does():
    values, groups = np.random.default_rng(0).normal(size=40), np.random.default_rng(5).integers(0, 9, 40)

    def mean_and_share(weights):
        return np.stack([weights @ values, weights @ (values > 0)], 1) / weights.sum(1)[:, None]

    value, draws = resample(mean_and_share, 40, groups, repeats=30, seed=7)
    assert value == pytest.approx([values.mean(), (values > 0).mean()])
    names, rng = list(dict.fromkeys(groups.tolist())), np.random.default_rng(7)
    for drawn in draws:
        taken = [names[g] for g in rng.integers(0, len(names), len(names))]
        rows = np.concatenate([np.flatnonzero(groups == name) for name in taken])
        assert drawn == pytest.approx([values[rows].mean(), (values[rows] > 0).mean()], abs=1e-6)
    assert band(draws) == pytest.approx(np.quantile(draws, [0.025, 0.975], axis=0))
    assert resample(mean_and_share, 40, [1] * 40)[1].shape == (0, 2)


@pytest.mark.filterwarnings("error")
def test_a_band_is_of_the_draws_that_are_defined():
    draws = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [3.0, np.inf], [np.inf, np.nan]])
    assert band(draws, level=1)[:, 0].tolist() == [1, 3] and np.isnan(band(draws)[:, 1]).all()
    assert np.isnan(band(np.empty((0, 2)))).all()


def test_rows_of_one_group_widen_the_interval():
    logits, _, targets = multiclass(rows=60)
    apart = bootstrap(logits, targets, None, repeats=500)
    together = bootstrap(np.repeat(logits, 10, 0), np.repeat(targets, 10), np.repeat(np.arange(60), 10), repeats=500)
    naive = bootstrap(np.repeat(logits, 10, 0), np.repeat(targets, 10), None, repeats=500)
    assert together == pytest.approx(apart)  # copies tell nothing new
    assert naive[1] - naive[0] < 0.5 * (apart[1] - apart[0])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for seed in range(300):
        right = rng.random(100) < 0.7
        outputs = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9])
        low, high = bootstrap(outputs, np.zeros(100, dtype=int), None, repeats=300, seed=seed)
        covered += low <= 0.7 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_group_names_may_be_text_and_seeds_repeat():
    logits, _, targets = multiclass()
    names = np.array([f"g{i // 3}" for i in range(200)])
    assert evaluate(logits, targets, names, seed=1) == evaluate(logits, targets, np.arange(200) // 3, seed=1)
    assert bootstrap(logits, targets, names, seed=1) != bootstrap(logits, targets, names, seed=2)


# what the rows do not define


def test_absent_classes_are_left_out_and_counted():
    logits, probabilities, targets = multiclass(classes=6)
    kept = ~np.isin(targets, (2, 5))
    found = score(logits[kept], targets[kept])
    expected = sklearn_multiclass(probabilities[kept], targets[kept])
    assert found.pop("absent_classes") == 2
    assert found == pytest.approx(expected)
    result = evaluate(logits[kept], targets[kept], repeats=20, classes=list("abcdef"))
    assert result["auroc"]["note"] == "without 2 of 6 classes that no row has: c, f"
    assert "note" not in result["accuracy"] and "note" not in result["log_loss"]


@pytest.mark.filterwarnings("error")
def test_rows_of_one_class_have_an_accuracy_and_a_reason_for_the_rest():
    logits, _, targets = multiclass()
    logits, targets = logits[targets == 1], targets[targets == 1]
    found = score(logits, targets)
    assert found["accuracy"] == found["balanced_accuracy"] and "auroc" not in found and found["absent_classes"] == 4
    result = evaluate(logits, targets)
    assert result["auroc"] == {
        "value": None,
        "ci": None,
        "note": "not defined: no class is in some rows and not in others",
    }
    assert result["accuracy"]["ci"][0] < result["accuracy"]["value"] < result["accuracy"]["ci"][1]


@pytest.mark.filterwarnings("error")
def test_labels_that_are_always_or_never_there():
    _, probabilities, targets = multilabel()
    targets[:, 0], targets[:, 1] = 1, 0
    found = score(probabilities, targets, "multilabel")
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(targets[:, 2:], probabilities[:, 2:]))
    assert found["map"] == pytest.approx(
        sk.average_precision_score(targets[:, [0, 2, 3, 4]], probabilities[:, [0, 2, 3, 4]])
    )
    targets[:] = 0
    found = evaluate(probabilities, targets, task="multilabel", repeats=20)
    assert found["map"]["value"] is None and found["accuracy"]["value"] is not None


@pytest.mark.filterwarnings("error")
def test_one_group_or_one_row_has_values_and_no_interval():
    logits, _, targets = multiclass(rows=20)
    result = evaluate(logits, targets, ["a"] * 20)
    assert result["accuracy"]["value"] == score(logits, targets)["accuracy"]
    assert result["accuracy"]["ci"] is None and "one group" in result["accuracy"]["note"]
    assert bootstrap(logits, targets, ["a"] * 20) is None
    assert bootstrap(logits, targets, ["a"] * 20, lambda o, t: 1.0) is None
    assert evaluate(logits[:1], targets[:1])["accuracy"]["ci"] is None


@pytest.mark.filterwarnings("error")
def test_resamples_that_do_not_define_a_metric_are_told():
    targets = np.array([0] * 9 + [1])
    outputs = np.where(targets[:, None] == 1, [0.2, 0.8], [0.7, 0.3])
    result = evaluate(outputs, targets, repeats=200)
    assert result["auroc"]["value"] == 1 and result["auroc"]["ci"] == [1, 1]
    count = int(result["auroc"]["note"].split()[2])
    assert 100 < count < 160  # 1 - .9 ** 10 = .65 of them have the one row
    assert "note" not in result["accuracy"]


@pytest.mark.filterwarnings("error")
def test_constant_and_huge_outputs_give_finite_values():
    targets = np.arange(40) % 4
    assert score(np.zeros((40, 4)), targets)["auroc"] == 0.5
    assert score(np.zeros((40, 4)), targets)["log_loss"] == pytest.approx(np.log(4))
    for task, labels in (("multiclass", targets), ("multilabel", np.eye(4)[targets])):
        values = score(1e6 * (np.eye(4)[targets] - 0.5), labels, task)
        assert all(np.isfinite(v) for v in values.values()) and values["accuracy"] == 1
        values = score(-1e6 * (np.eye(4)[targets] - 0.5), labels, task)
        assert all(np.isfinite(v) for v in values.values()) and values["log_loss"] > 9


def test_results_are_plain_numbers():
    logits, _, targets = multiclass(rows=30)
    json.dumps([evaluate(logits, targets, repeats=10), score(logits, targets), per_class(logits, targets, "abcde")])
    json.dumps([reliability(logits, targets)], allow_nan=False)


@pytest.mark.parametrize(
    "outputs, targets, task, message",
    [
        (np.zeros((0, 3)), [], "multiclass", r"outputs have shape \(0, 3\)"),
        (np.zeros(3), [0, 1, 2], "multiclass", r"outputs have shape \(3,\)"),
        ([[0, 1], [np.nan, 0]], [0, 1], "multiclass", "outputs of row 1 are not finite"),
        ([[0, 1], [np.inf, 0]], [0, 1], "multiclass", "outputs of row 1 are not finite"),
        (np.zeros((2, 3)), [0], "multiclass", r"targets have shape \(1,\) beside outputs \(2, 3\)"),
        (np.zeros((2, 3)), [0, 3], "multiclass", "target 3 is none of the classes 0 to 2"),
        (np.zeros((2, 3)), [0, -1], "multiclass", "target -1 is none of the classes"),
        (np.zeros((2, 3)), [0, 1], "multilabel", "beside outputs"),
        (np.zeros((1, 2)), [[0, 2]], "multilabel", "other than 0 and 1"),
    ],
)
def test_outputs_and_targets_that_do_not_fit_are_refused(outputs, targets, task, message):
    with pytest.raises(ValueError, match=message):
        score(outputs, targets, task)


def test_unknown_names_and_wrong_lengths_are_refused():
    logits, probabilities, targets = multiclass()
    with pytest.raises(UsageError, match="did you mean accuracy"):
        bootstrap(logits, targets, None, "acuracy")
    with pytest.raises(UsageError, match="no metrics for task 'free'"):
        score(logits, targets, "free")
    with pytest.raises(ValueError, match="3 groups beside 200 rows"):
        evaluate(logits, targets, [1, 2, 3])
    with pytest.raises(ValueError, match="no probabilities"):
        score(logits, targets, probabilities=True)
    assert score(probabilities, targets, probabilities=False)["log_loss"] > score(probabilities, targets)["log_loss"]


# tables and time


def test_the_confusion_matrix_and_the_class_table_equal_scikit_learn():
    logits, probabilities, targets = multiclass(ties=True)
    predicted = probabilities.argmax(1)
    assert (confusion_matrix(logits, targets) == sk.confusion_matrix(targets, predicted)).all()
    table = per_class(probabilities, targets, "abcde")
    precision, recall, f1, support = sk.precision_recall_fscore_support(targets, predicted)
    for k, row in enumerate(table):
        assert row["label"] == "abcde"[k] and row["support"] == support[k]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision[k], recall[k], f1[k]))
        assert row["auroc"] == pytest.approx(sk.roc_auc_score(targets == k, probabilities[:, k]))
        assert row["average_precision"] == pytest.approx(sk.average_precision_score(targets == k, probabilities[:, k]))
    alone = per_class(logits[targets == 1], targets[targets == 1], "abcde")
    assert alone[0]["recall"] is None and alone[0]["f1"] is None and alone[1]["auroc"] is None


def test_the_bins_of_the_reliability_table_make_up_the_calibration_error():
    for task, make in (("multiclass", multiclass), ("multilabel", multilabel)):
        logits, _, targets = make()
        bins = reliability(logits, targets, task)
        total = sum(row["count"] for row in bins)
        assert total == (targets.size if task == "multilabel" else len(targets))
        gap = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in bins) / total
        assert gap == pytest.approx(score(logits, targets, task)["ece"])
        assert all(row["low"] < row["confidence"] <= row["high"] for row in bins)


@pytest.mark.parametrize("task, make", [("multiclass", multiclass), ("multilabel", multilabel)])
def test_a_thousand_resamples_of_every_metric_take_under_three_seconds(task, make):
    logits, _, targets = make(rows=1000, classes=50)
    start = time.process_time()
    result = evaluate(logits, targets, np.arange(1000) // 2, task)
    assert time.process_time() - start < 3
    assert result.keys() == METRICS[task].keys() and not any(
        "resamples" in row.get("note", "") for row in result.values()
    )


def test_large_tables_make_do_with_fewer_resamples_and_say_so(monkeypatch):
    monkeypatch.setattr("adaptsuite.metrics.WORK", 200 * 5 * 150)
    logits, _, targets = multiclass()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate(logits, targets)
    assert result["auroc"]["note"] == "interval from 150 resamples"
    assert result["accuracy"]["note"] == "interval from 750 resamples"


def test_top_five_accuracy_equals_scikit_learn_s_and_stands_only_beside_many_classes():
    logits, probabilities, targets = multiclass(classes=30)
    expected = sk.top_k_accuracy_score(targets, probabilities, k=5, labels=range(30))
    assert score(logits, targets)["top5_accuracy"] == pytest.approx(expected)
    found = evaluate(logits, targets, np.arange(200) // 2)["top5_accuracy"]
    assert found["ci"][0] < found["value"] < found["ci"][1]
    for few in (multiclass(classes=10)[::2], multilabel(classes=30)[::2]):
        task = "multilabel" if few[1].ndim == 2 else "multiclass"
        assert "top5_accuracy" not in score(*few, task) and "top5_accuracy" not in evaluate(*few, task=task)
