"""Metrics of a finding against scikit-learn, intervals against plain loops, and patients against frames."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from adaptsuite.errors import DataError, UsageError
from adaptsuite.medical.clinical import NAMES, SHARES, counts, evaluate, exact, finding, one_vs_rest
from adaptsuite.medical.patients import by_patient, frames_and_patients, truth_by_patient


def table(rows=240, patients=40, seed=0, ties=False):
    """Probabilities, truth and patients of frames that resemble each other within a patient."""
    rng = np.random.default_rng(seed)
    own = rng.integers(0, patients, rows)
    truth = rng.random(rows) < 0.3
    logits = 1.5 * truth - 1 + 0.7 * rng.normal(size=patients)[own] + rng.normal(size=rows)
    return 1 / (1 + np.exp(-(np.round(logits) if ties else logits))), truth, own


def sweeps(seed, patients=60, frames=120):
    """The simulation of medical.md: 9 % positive frames, more in some patients, scores that shift by patient."""
    rng = np.random.default_rng(seed)
    own = np.repeat(np.arange(patients), frames)
    shift, share = 0.7 * rng.normal(size=patients), rng.beta(1, 10, patients)
    truth = rng.random(len(own)) < share[own]
    return 1 / (1 + np.exp(-(2 * truth - 2 + shift[own] + rng.normal(size=len(own))))), truth, own


def reference(probabilities, truth, threshold):
    called = probabilities >= threshold
    bins = np.clip(np.ceil(probabilities * 15).astype(int) - 1, 0, 14)
    gaps = [abs(probabilities[bins == b].sum() - truth[bins == b].sum()) for b in range(15)]
    return {
        "auroc": sk.roc_auc_score(truth, probabilities),
        "auprc": sk.average_precision_score(truth, probabilities),
        "sensitivity": sk.recall_score(truth, called),
        "specificity": sk.recall_score(truth, called, pos_label=0),
        "ppv": sk.precision_score(truth, called),
        "npv": sk.precision_score(truth, called, pos_label=0),
        "f1": sk.f1_score(truth, called),
        "brier": sk.brier_score_loss(truth, probabilities),
        "ece": sum(gaps) / len(truth),
        "log_loss": sk.log_loss(truth, probabilities),
    }


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_every_metric_equals_scikit_learn(threshold, ties):
    probabilities, truth, _ = table(ties=ties)
    found = evaluate(finding(probabilities, truth, threshold))
    expected = reference(probabilities, truth, threshold)
    assert tuple(found) == NAMES and expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-9), name


def test_intervals_are_those_of_a_plain_loop_over_resampled_patients():
    probabilities, truth, own = table(rows=120, patients=15)
    result = evaluate(finding(probabilities, truth, 0.4), own, repeats=40, seed=3)
    names, rng, drawn = list(dict.fromkeys(own.tolist())), np.random.default_rng(3), []
    for _ in range(40):
        taken = [names[i] for i in rng.integers(0, len(names), len(names))]
        rows = np.concatenate([np.flatnonzero(own == name) for name in taken])
        drawn.append(reference(probabilities[rows], truth[rows], 0.4))
    for name, metric in result.items():
        expected = np.quantile([values[name] for values in drawn], [0.025, 0.975])
        if name == "ece":  # turned around its value
            expected = np.maximum(0, 2 * metric["value"] - expected[::-1])
        assert metric["ci"] == pytest.approx(expected, abs=1e-6), name


def test_the_interval_of_the_calibration_error_covers_it_where_percentiles_do_not():
    def sample(seed, rows=400):
        rng = np.random.default_rng(seed)
        logits = 1.5 * rng.normal(size=rows)
        return 1 / (1 + np.exp(-1.5 * logits)), rng.random(rows) < 1 / (1 + np.exp(-logits))

    true, covered, naive = evaluate(finding(*sample(0, 200_000)), repeats=0)["ece"]["value"], 0, 0
    for seed in range(1, 81):
        found = evaluate(finding(*sample(seed)), None, ("ece",), repeats=200, seed=seed)["ece"]
        low, high = found["ci"]
        covered += low <= true <= high
        naive += 2 * found["value"] - high <= true <= 2 * found["value"] - low
    assert covered / 80 > 0.85 and naive / 80 < 0.5


def test_a_probability_at_the_threshold_is_called():
    found = finding([0.2, 0.5, 0.5, 0.8], [0, 0, 1, 1], 0.5)
    assert counts(found) == {"tp": 2, "fp": 1, "fn": 0, "tn": 1}
    result = evaluate(found)
    assert result["sensitivity"]["of"] == [2, 2] and result["specificity"]["of"] == [1, 2]
    assert result["ppv"]["of"] == [2, 3] and result["npv"]["of"] == [1, 1]


def test_a_share_without_an_error_has_the_exact_interval_of_its_patients():
    probabilities, truth = np.array([0.9] * 30 + [0.1] * 10), np.array([1] * 30 + [0] * 10)
    patients = np.repeat(np.arange(8), 5)  # six of them positive
    result = evaluate(finding(probabilities, truth), patients, SHARES)
    assert result["sensitivity"]["ci"] == pytest.approx([0.025 ** (1 / 6), 1])
    assert result["sensitivity"]["note"] == "all of 6 patients: exact interval, patients as trials"
    assert evaluate(finding(probabilities, truth), None, SHARES)["sensitivity"]["ci"][0] == pytest.approx(
        0.025 ** (1 / 30)
    )
    assert evaluate(finding(1 - probabilities, truth), patients, SHARES)["ppv"]["ci"][0] == 0


@pytest.mark.parametrize("trials", [1, 7, 60])
def test_the_exact_interval_is_that_of_clopper_and_pearson(trials):
    from scipy.stats import binomtest

    for value, successes in ((0, 0), (1, trials)):
        expected = binomtest(successes, trials).proportion_ci(0.95, "exact")
        assert exact(value, trials) == pytest.approx((expected.low, expected.high))


@pytest.mark.filterwarnings("error")
def test_what_the_rows_do_not_define_has_a_reason():
    result = evaluate(finding([0.1, 0.2, 0.3], [0, 0, 0]), [1, 2, 3])
    assert result["sensitivity"] == {"value": None, "ci": None, "note": "not defined: no row is positive"}
    assert result["auroc"]["note"] == "not defined: all rows are of one class"
    assert result["ppv"]["note"] == "not defined: no row is called positive"
    assert result["specificity"]["value"] == 1 and result["brier"]["value"] == pytest.approx(0.14 / 3)
    assert "one patient" in evaluate(finding([0.1, 0.8], [0, 1]), [7, 7])["brier"]["note"]
    json.dumps(result, allow_nan=False)


def test_resamples_that_do_not_define_a_metric_are_told():
    truth = np.array([0] * 9 + [1])
    result = evaluate(finding(np.where(truth, 0.4, 0.3), truth), np.arange(10), ("auroc",))
    assert 550 < int(result["auroc"]["note"].split()[2]) < 750


def test_what_cannot_be_scored_is_refused():
    for probabilities, truth, message in (
        ([0.1, 1.2], [0, 1], "no probabilities"),
        ([0.1, np.nan], [0, 1], "row 1 are not finite"),
        ([0.1, 0.2], [0, 2], "other than 0 and 1"),
        ([0.1, 0.2], [0], "one probability and one truth"),
        ([[0.1, 0.2]], [[0, 1]], "one probability and one truth"),
    ):
        with pytest.raises(ValueError, match=message):
            finding(probabilities, truth)
    with pytest.raises(UsageError, match="threshold nan"):
        finding([0.1], [0], np.nan)
    with pytest.raises(UsageError, match="'sens' is unknown"):
        evaluate(finding([0.1, 0.9], [0, 1]), names=("sens",))


def test_one_class_against_the_rest_is_the_finding_of_that_class():
    rng = np.random.default_rng(0)
    probabilities, targets, own = rng.dirichlet([1, 1, 1], 90), rng.integers(0, 3, 90), np.arange(90) // 3
    result = one_vs_rest(probabilities, targets, "abc", own, {"a": 0.3, "b": 0.5, "c": 0.2}, repeats=50)
    assert result["c"] == evaluate(finding(probabilities[:, 2], targets == 2, 0.2), own, repeats=50)
    labels = (rng.random((90, 3)) < 0.4).astype(int)
    alone = one_vs_rest(probabilities, labels, "abc", own, repeats=50)["b"]
    assert alone == evaluate(finding(probabilities[:, 1], labels[:, 1]), own, repeats=50)
    with pytest.raises(ValueError, match="2 classes named beside 3"):
        one_vs_rest(probabilities, targets, "ab")


# from frames to patients


@pytest.mark.parametrize("rule, one", [("mean", np.mean), ("max", np.max), ("noisy-or", lambda p: 1 - np.prod(1 - p))])
def test_a_patient_s_value_is_that_of_a_plain_loop(rule, one):
    probabilities, _, own = table()
    patients = np.array([f"p{i}" for i in own])
    names, values = by_patient(probabilities, patients, rule)
    assert names == list(dict.fromkeys(patients.tolist()))
    assert values == pytest.approx([one(probabilities[patients == name]) for name in names])
    wide = np.stack([probabilities, 1 - probabilities], 1)
    assert by_patient(wide, patients, rule)[1][:, 0] == pytest.approx(values)


def test_noisy_or_holds_for_probabilities_of_zero_and_one():
    assert by_patient([0, 1, 0, 0, 1e-12, 1e-12], [1, 1, 2, 2, 3, 3], "noisy-or")[1] == pytest.approx(
        [1, 0, 2e-12], rel=1e-9
    )
    with pytest.raises(ValueError, match="needs probabilities"):
        by_patient([-1.0], [1], "noisy-or")
    with pytest.raises(UsageError, match="rule 'median' is unknown"):
        by_patient([0.5], [1], "median")


def test_the_truth_of_patients_is_any_frame_s_or_the_one_they_share():
    names, truth = truth_by_patient([0, 1, 0, 0], ["b", "b", "a", "a"])
    assert names == ["b", "a"] and truth.tolist() == [True, False]
    assert truth_by_patient([2, 2, 1], ["b", "b", "a"], "same")[1].tolist() == [2, 1]
    with pytest.raises(DataError, match="1 of 2 patients have rows of several classes"):
        truth_by_patient([2, 1, 1], ["b", "b", "a"], "same")


def test_the_interval_of_patients_is_twice_as_wide_as_that_of_frames_on_sweeps():
    probabilities, truth, own = sweeps(0)
    both = frames_and_patients(finding(probabilities, truth), own)["auroc"]
    assert both["value"] == pytest.approx(0.875, abs=0.005)
    assert both["patients"] == pytest.approx([0.842, 0.904], abs=0.006)  # medical.md: .844 to .901
    assert both["frames"] == pytest.approx([0.863, 0.888], abs=0.004)  # medical.md: .860 to .885
    assert both["wider"] > 2
    assert both["patients"] == evaluate(finding(probabilities, truth), own, ("auroc",))["auroc"]["ci"]


def test_frames_of_their_own_patients_have_one_interval():
    probabilities, truth, _ = table()
    both = frames_and_patients(finding(probabilities, truth), np.arange(240), ("auroc", "f1"))
    assert all(m["wider"] == 1 and m["patients"] == m["frames"] for m in both.values())


def test_only_the_interval_of_patients_covers_the_truth_as_often_as_it_says():
    probabilities, truth, _ = sweeps(99, patients=4000, frames=40)
    true = sk.roc_auc_score(truth, probabilities)
    covered = {"patients": 0, "frames": 0}
    for seed in range(60):
        probabilities, truth, own = sweeps(seed, frames=40)
        both = frames_and_patients(finding(probabilities, truth), own, ("auroc",), repeats=200)["auroc"]
        for unit in covered:
            covered[unit] += both[unit][0] <= true <= both[unit][1]
    assert covered["patients"] / 60 >= 0.85 and covered["frames"] / 60 <= 0.8
