"""Prevalence: probabilities that a model of the other place would have said, EM, and predictive values by Bayes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from adaptsuite.errors import DataError
from adaptsuite.medical.clinical import evaluate, finding
from adaptsuite.medical.prevalence import estimate_prevalence, predictive_curves, predictive_values, to_prevalence

PRIORS = np.array([0.5, 0.3, 0.2])


def gaussians(priors, rows, seed=0):
    """Classes, and their exact posteriors at PRIORS, of unit normals around 0, 1.5 and 3."""
    rng = np.random.default_rng(seed)
    targets = rng.choice(3, rows, p=priors)
    x = rng.normal(size=rows) + 1.5 * targets
    return targets, density(x) * PRIORS / (density(x) @ PRIORS)[:, None], x


def density(x):
    return np.exp(-0.5 * (x[:, None] - 1.5 * np.arange(3)) ** 2)


def test_corrected_posteriors_are_those_of_a_model_of_the_other_place():
    _, posteriors, x = gaussians(PRIORS, 200)
    new = np.array([0.1, 0.2, 0.7])
    expected = density(x) * new / (density(x) @ new)[:, None]
    assert to_prevalence(posteriors, PRIORS, new) == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_the_correction_is_elkan_s_and_goes_back(p, old, new):
    found = to_prevalence(p, old, new)
    elkan = new * (p - p * old) / (old - p * old + new * p - old * new)  # theorem 2
    assert found == pytest.approx(elkan, abs=1e-9)
    assert to_prevalence(found, new, old) == pytest.approx(p, abs=1e-9)
    assert to_prevalence([[1 - p, p]], [1 - old, old], [1 - new, new])[0, 1] == pytest.approx(found)


def test_a_threshold_that_moves_along_calls_the_same_rows():
    p = np.random.default_rng(0).random(500)
    moved = to_prevalence(0.37, 0.3, 0.05)
    assert ((p >= 0.37) == (to_prevalence(p, 0.3, 0.05) >= moved)).all()


def test_em_finds_the_prevalence_of_unlabelled_rows():
    new = np.array([0.1, 0.2, 0.7])
    targets, posteriors, _ = gaussians(new, 4000, seed=1)
    found = estimate_prevalence(posteriors, PRIORS, np.arange(4000) // 4)
    assert [m["value"] for m in found] == pytest.approx(np.bincount(targets) / 4000, abs=0.03)
    assert sum(m["value"] for m in found) == pytest.approx(1)
    assert all(m["ci"][0] < share < m["ci"][1] for m, share in zip(found, new, strict=True))


def test_em_is_the_fixed_point_of_saerens_equation():
    _, posteriors, _ = gaussians([0.2, 0.2, 0.6], 300)
    found = np.array([m["value"] for m in estimate_prevalence(posteriors, PRIORS, repeats=2)])
    again = to_prevalence(posteriors, PRIORS, found).mean(0)
    assert again == pytest.approx(found, abs=1e-6)
    two = posteriors[:, 0]
    absent, present = estimate_prevalence(two, 0.5, repeats=2)
    guess = 0.5
    for _ in range(3000):
        guess = to_prevalence(two, 0.5, guess).mean()
    assert present["value"] == pytest.approx(guess, abs=1e-6) and absent["value"] == pytest.approx(1 - guess, abs=1e-6)


def test_predictive_values_at_the_prevalence_of_the_rows_are_those_of_the_rows():
    rng = np.random.default_rng(0)
    truth = rng.random(300) < 0.2
    probabilities = 1 / (1 + np.exp(-(2 * truth - 1 + rng.normal(size=300))))
    found, patients = finding(probabilities, truth, 0.4), np.arange(300) // 3
    curves = predictive_curves(found, patients, [truth.mean(), 0.01], repeats=100)
    assert curves["ppv"]["value"][0] == pytest.approx(sk.precision_score(truth, probabilities >= 0.4))
    assert curves["npv"]["value"][0] == pytest.approx(sk.precision_score(~truth, probabilities < 0.4))
    assert curves["here"] == truth.mean() and curves["ppv"]["value"][1] < 0.1
    own = evaluate(found, patients, ("sensitivity", "specificity"))
    ppv, npv = predictive_values(own["sensitivity"]["value"], own["specificity"]["value"], 0.01)
    assert (curves["ppv"]["value"][1], curves["npv"]["value"][1]) == pytest.approx((ppv, npv))
    assert curves["ppv"]["low"][0] < curves["ppv"]["value"][0] < curves["ppv"]["high"][0]


@pytest.mark.filterwarnings("error")
def test_what_is_not_defined_or_no_prevalence_is_told():
    curves = predictive_curves(finding([0.1, 0.2], [0, 1], 0.9), None, [0.1], repeats=5)
    assert curves["ppv"]["value"] == [None] and curves["npv"]["value"] == pytest.approx([0.9])
    with pytest.raises(DataError, match="all rows are of one class"):
        predictive_curves(finding([0.1, 0.2], [0, 0]))
    for old, new in ((0, 0.5), (0.5, 1), ([0.5, 0.4], [0.5, 0.5])):
        with pytest.raises(ValueError, match="a number in"):
            to_prevalence([[0.5, 0.5]], old, new)
    with pytest.raises(ValueError, match="do not fit"):
        to_prevalence([[0.2, 0.8]], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5])
    with pytest.raises(ValueError, match="no probabilities"):
        estimate_prevalence([1.2], 0.5)
