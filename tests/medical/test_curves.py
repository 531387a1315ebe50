"""Curves against scikit-learn, bands against plain loops, and charts that can be drawn from what is defined."""

import base64
import json

import numpy as np
import pytest
from sklearn import metrics as sk

from adaptsuite.errors import DataError
from adaptsuite.medical import charts
from adaptsuite.medical.clinical import evaluate, finding
from adaptsuite.medical.curves import GRID, decision_curve, pr_curve, roc_curve
from adaptsuite.medical.prevalence import predictive_curves
from adaptsuite.metrics import reliability


def table(rows=90, patients=18, seed=0, digits=6):
    rng = np.random.default_rng(seed)
    own = np.arange(rows) % patients
    truth = rng.random(rows) < 0.4
    logits = 1.5 * truth - 1 + 0.5 * rng.normal(size=patients)[own] + rng.normal(size=rows)
    return np.round(1 / (1 + np.exp(-logits)), digits), truth, own


def resamples(patients, repeats, seed):
    """Row numbers of each resample, as adaptsuite.metrics draws them."""
    names, rng = list(dict.fromkeys(patients.tolist())), np.random.default_rng(seed)
    for _ in range(repeats):
        taken = [names[i] for i in rng.integers(0, len(names), len(names))]
        yield np.concatenate([np.flatnonzero(patients == name) for name in taken])


@pytest.mark.parametrize("digits", [1, 6])
def test_the_points_are_scikit_learn_s(digits):
    probabilities, truth, own = table(digits=digits)
    found = finding(probabilities, truth)
    curve = roc_curve(found, own, repeats=10)
    fpr, tpr, _ = sk.roc_curve(truth, probabilities, drop_intermediate=False)
    assert curve["x"] == pytest.approx(fpr.tolist()) and curve["value"] == pytest.approx(tpr.tolist())
    assert curve["area"]["value"] == pytest.approx(sk.auc(fpr, tpr))
    curve = pr_curve(found, own, repeats=10)
    precision, recall, _ = sk.precision_recall_curve(truth, probabilities)
    order = np.lexsort((-precision, recall))
    kept = order[recall[order] > 0]  # scikit-learn goes on from the first cut with all positives: as many points
    assert set(zip(np.round(recall[kept], 9), np.round(precision[kept], 9), strict=True)) <= set(
        zip(np.round(curve["x"], 9), np.round(curve["value"], 9), strict=True)
    )
    assert curve["prevalence"] == truth.mean() == pytest.approx(curve["value"][-1])


@pytest.mark.parametrize("digits", [1, 6])
def test_bands_are_those_of_a_plain_loop(digits):
    probabilities, truth, own = table(digits=digits)
    found = finding(probabilities, truth)
    tpr, ppv = [], []
    for rows in resamples(own, 25, 3):
        p, t = probabilities[rows], truth[rows]
        cuts = [p >= cut for cut in sorted(set(p.tolist()), reverse=True)]
        points = [((c & ~t).sum() / (~t).sum(), (c & t).sum() / t.sum(), (c & t).sum() / c.sum()) for c in cuts]
        tpr.append([max([0.0, *(s for f, s, _ in points if f <= x + 1e-12)]) for x in GRID])
        ppv.append([next(v for _, s, v in points if s >= x - 1e-12) for x in GRID])
    for curve, drawn in ((roc_curve(found, own, 25, 3), tpr), (pr_curve(found, own, 25, 3), ppv)):
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        assert curve["low"] == pytest.approx(low, abs=1e-6) and curve["high"] == pytest.approx(high, abs=1e-6)


def test_net_benefit_is_that_of_its_definition():
    probabilities, truth, own = table()
    curve = decision_curve(finding(probabilities, truth), own, (0.1, 0.4, 0.8), repeats=30)
    for x, value, everybody in zip(curve["x"], curve["value"], curve["all"], strict=True):
        called = probabilities >= x
        expected = ((called & truth).sum() - (called & ~truth).sum() * x / (1 - x)) / len(truth)
        assert value == pytest.approx(expected)
        assert everybody == pytest.approx((truth.sum() - (~truth).sum() * x / (1 - x)) / len(truth))
    assert all(
        low <= value <= high for low, value, high in zip(curve["low"], curve["value"], curve["high"], strict=True)
    )


@pytest.mark.filterwarnings("error")
def test_rows_of_one_class_have_no_curve_and_one_patient_no_band():
    for curve in (roc_curve, pr_curve):
        with pytest.raises(DataError, match="all rows are of one class"):
            curve(finding([0.1, 0.2], [0, 0]))
        alone = curve(finding([0.1, 0.2], [0, 1]), [7, 7])
        assert set(alone["low"]) == {None} and alone["area"]["ci"] is None
        json.dumps(alone, allow_nan=False)


def svg(address):
    kind, _, data = address.partition(";base64,")
    assert kind == "data:image/svg+xml"
    return base64.b64decode(data).decode()


@pytest.mark.filterwarnings("error")
def test_charts_are_drawn_with_bands_and_without():
    probabilities, truth, own = table()
    logits = np.log(probabilities / (1 - probabilities))[:, None]
    bins = [reliability(logits / t, truth[:, None], "multilabel", False) for t in (1, 2)]
    for patients in (own, np.zeros(90)):
        found = finding(probabilities, truth, 0.4)
        point = evaluate(found, patients, repeats=20)
        roc = svg(charts.roc(roc_curve(found, patients, 20), point))
        assert f"AUROC {sk.roc_auc_score(truth, probabilities):.3f}" in roc and "operating point" in roc
        assert "AUPRC" in svg(charts.precision_recall(pr_curve(found, patients, 20), point))
        assert "NPV" in svg(charts.predictive_values(predictive_curves(found, patients, repeats=20)))
        assert "operating point 0.4" in svg(charts.decision(decision_curve(found, patients, repeats=20), 0.4))
        assert "after T = 2.00:  ECE 0.050" in svg(charts.calibration(*bins, 2.0, (0.1, 0.05)))
        never = evaluate(finding(probabilities, truth, 1.0), patients, repeats=5)
        assert "operating point" not in svg(charts.precision_recall(pr_curve(found, patients, 5), never))
