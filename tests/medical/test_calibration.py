"""Temperature scaling: it finds the temperature that was applied, never makes the loss worse, and refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn import metrics as sk

from adaptsuite.errors import DataError
from adaptsuite.medical.calibration import calibration, fit_temperature, nll
from adaptsuite.metrics import score


def honest(task, rows=4000, seed=0):
    """Logits that state their probabilities truly, and targets drawn from them."""
    rng = np.random.default_rng(seed)
    if task == "multilabel":
        logits = 1.5 * rng.normal(size=(rows, 3))
        return logits, (rng.random((rows, 3)) < 1 / (1 + np.exp(-logits))).astype(int)
    logits = 1.5 * rng.normal(size=(rows, 4))
    noisy = logits + rng.gumbel(size=logits.shape)  # its argmax is a draw from the softmax
    return logits, noisy.argmax(1)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("applied", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_applied_is_found(task, applied):
    logits, targets = honest(task)
    assert fit_temperature(applied * logits, targets, task) == pytest.approx(applied, rel=0.06)


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_loss_is_the_lowest_of_a_search_over_temperatures(task):
    logits, targets = honest(task, rows=150, seed=3)
    logits = 3 * logits
    temperature = fit_temperature(logits, targets, task)
    best = minimize_scalar(lambda t: nll(logits, targets, task, np.exp(t)), bounds=(-3, 3), method="bounded")
    assert nll(logits, targets, task, temperature) <= best.fun + 1e-12
    assert nll(logits, targets, task) == pytest.approx(score(logits, targets, task, False)["log_loss"])


def test_a_finding_with_one_logit_is_a_label():
    logits, targets = honest("multilabel")
    one = fit_temperature(2 * logits[:, 0], targets[:, 0], "multilabel")
    assert one == pytest.approx(2, rel=0.06)
    assert one == fit_temperature(2 * logits[:, :1], targets[:, :1], "multilabel")
    two = np.stack([np.zeros(len(logits)), 2 * logits[:, 0]], 1)  # the softmax of two logits says the same
    assert fit_temperature(two, targets[:, 0]) == pytest.approx(one)
    with pytest.raises(ValueError, match="task='multilabel'"):
        fit_temperature(logits[:, :1], targets[:, 0])


@given(st.integers(0, 10**6), st.integers(2, 5), st.floats(1e-6, 1e6))
def test_the_loss_of_the_fitted_rows_never_rises(seed, classes, scale):
    rng = np.random.default_rng(seed)
    logits, targets = scale * rng.normal(size=(12, classes)), rng.integers(0, classes, 12)
    try:
        temperature = fit_temperature(logits, targets)
    except DataError:
        return
    assert temperature > 0 and np.isfinite(temperature)
    assert nll(logits, targets, temperature=temperature) <= nll(logits, targets)


@pytest.mark.parametrize(
    "logits, targets, task, message",
    [
        ([[2, 0], [1, 0]], [0, 0], "multiclass", "the 2 validation rows are of one class"),
        ([0.3, -0.2], [1, 1], "multilabel", "the 2 validation rows are of one class"),
        ([[2, 0], [0, 3], [1, 0]], [0, 1, 0], "multiclass", "all 3 validation rows are right"),
        ([0.5, -2.0], [1, 0], "multilabel", "all 2 validation rows are right"),
        ([[0, 2], [3, 0]], [0, 1], "multiclass", "or the opposite"),
        ([[0, 0], [0, 0]], [0, 1], "multiclass", "say nothing of the targets"),
    ],
)
def test_rows_that_no_temperature_fits_are_refused(logits, targets, task, message):
    with pytest.raises(DataError, match=message):
        fit_temperature(logits, targets, task)


def test_the_table_before_and_after_equals_scikit_learn():
    logits, targets = honest("multilabel", rows=1000)
    logits, targets, patients = 3 * logits[:, 0], targets[:, 0], np.arange(1000) // 5
    rows = {row["metric"]: row for row in calibration(logits, targets, 3.0, patients, "multilabel", repeats=200)}
    for cell, temperature in (("before", 1), ("after", 3)):
        p = 1 / (1 + np.exp(-logits / temperature))
        assert rows["brier"][cell]["value"] == pytest.approx(sk.brier_score_loss(targets, p))
        assert rows["log_loss"][cell]["value"] == pytest.approx(sk.log_loss(targets, p))
        assert rows["ece"][cell]["value"] == pytest.approx(score(p[:, None], targets[:, None], "multilabel")["ece"])
    assert all(row["change"]["ci"][1] < 0 for row in rows.values())  # overconfident by 3: all of them better
    assert rows["ece"]["change"]["value"] == pytest.approx(
        rows["ece"]["after"]["value"] - rows["ece"]["before"]["value"]
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_the_brier_score_of_classes_is_scaled_as_scikit_learn_s(classes):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(80, classes)), rng.integers(0, classes, 80)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    row = next(row for row in calibration(logits, targets, 2.0, repeats=20) if row["metric"] == "brier")
    expected = sk.brier_score_loss(targets, p if classes > 2 else p[:, 1])
    assert row["before"]["value"] == pytest.approx(expected)
