"""Subgroups: their metrics against scikit-learn, and what a reader of the table must not be able to compute."""

import json

import numpy as np
import pytest
from sklearn import metrics as sk

from adaptsuite.errors import UsageError
from adaptsuite.medical.clinical import finding
from adaptsuite.medical.subgroups import age_band, subgroup_table, suppressed


def table(sizes, seed=0, frames=3):
    """Patients of groups of these sizes; every other patient has the finding in all frames."""
    rng = np.random.default_rng(seed)
    names = np.repeat(list(sizes), list(sizes.values()))
    cells, patients = np.repeat(names, frames), np.repeat(np.arange(len(names)), frames)
    truth = patients % 2 == 0
    p = 1 / (1 + np.exp(-(1.5 * truth - 0.7 + rng.normal(size=len(patients)))))
    return finding(p, truth, 0.5), cells.tolist(), patients


def test_a_group_s_metrics_are_those_of_its_rows_and_the_difference_is_to_all_others():
    found, cells, patients = table({"A": 40, "B": 30, "C": 20})
    rows = {row["site"]: row for row in subgroup_table(found, "site", cells, patients, repeats=200)}
    assert list(rows) == ["all", "A", "B", "C"] and rows["B"]["patients"] == 30 and rows["B"]["rows"] == 90
    own = np.array(cells) == "B"
    auroc = [sk.roc_auc_score(found.truth[m], found.probabilities[m]) for m in (own, ~own)]
    recall = [sk.recall_score(found.truth[m], found.called[m]) for m in (own, ~own)]
    assert rows["B"]["auroc"]["value"] == pytest.approx(auroc[0])
    assert rows["B"]["auroc against the rest"]["value"] == pytest.approx(auroc[0] - auroc[1])
    assert rows["B"]["sensitivity against the rest"]["value"] == pytest.approx(recall[0] - recall[1])
    low, high = rows["B"]["auroc against the rest"]["ci"]
    assert low < auroc[0] - auroc[1] < high
    assert rows["all"]["auroc against the rest"] is None
    json.dumps(rows, allow_nan=False)


def test_the_difference_s_interval_is_that_of_a_plain_loop():
    found, cells, patients = table({"A": 15, "B": 14})
    row = subgroup_table(found, "site", cells, patients, ("sensitivity",), 2, 2, repeats=50, seed=4)[1]
    rng, drawn = np.random.default_rng(4), []
    own = np.array(cells) == "A"
    for _ in range(50):
        taken = np.concatenate([np.flatnonzero(patients == i) for i in rng.integers(0, 29, 29)])
        called, truth, mask = found.called[taken], found.truth[taken], own[taken]
        shares = [called[m & truth].mean() for m in (mask, ~mask)]
        drawn.append(shares[0] - shares[1])
    assert row["sensitivity against the rest"]["ci"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-6)


def test_small_groups_are_neither_counted_nor_named():
    found, cells, patients = table({"A": 40, "B": 30, "DOE^JANE": 1, "E": 4})
    shown = subgroup_table(found, "site", cells, patients, repeats=10, least_patients=5, least_positives=2)
    assert [row["site"] for row in shown] == ["all", "A", "B", "2 groups suppressed"]
    assert shown[-1]["patients"] is None and "fewer than 5 patients" in shown[-1]["why"]
    assert "DOE" not in json.dumps(shown)


@pytest.mark.parametrize(
    "sizes, hidden",
    [
        ({"A": 40, "B": 30, "C": 20, "D": 4}, {"C", "D"}),  # alone, D is the whole less the others
        ({"F": 40, "M": 4}, {"F", "M"}),  # of two, both
        ({"A": 40, "B": 30, "C": 3, "D": 4}, {"B", "C", "D"}),  # C and D together are still too few
        ({"A": 40, "B": 30, "C": 8, "D": 8}, {"C", "D"}),  # together they are not
        ({"A": 40, "B": 30}, set()),
    ],
)
def test_what_is_suppressed_cannot_be_computed_from_the_whole(sizes, hidden):
    found, cells, patients = table(sizes)
    masks = {name: np.array(cells) == name for name in sizes}
    assert set(suppressed(found, masks, patients, 10, 5)) == hidden
    shown = {row["site"] for row in subgroup_table(found, "site", cells, patients, repeats=5)} & set(sizes)
    assert shown == set(sizes) - hidden
    left = sum(size for name, size in sizes.items() if name not in shown)
    assert not hidden or (left >= 10 and len(hidden) > 1)  # all a reader can compute is of that many patients


def test_groups_with_few_patients_of_one_kind_are_suppressed():
    found, cells, patients = table({"A": 40, "B": 30, "C": 20})
    truth = found.truth & ((np.array(cells) != "C") | (patients >= 86))
    masks = {name: np.array(cells) == name for name in "ABC"}
    why = suppressed(finding(found.probabilities, truth), masks, patients, 10, 5)
    assert why["C"] == "fewer than 5 patients with or without the finding" and set(why) == {"B", "C"}


def test_cells_that_are_not_stated_are_a_group():
    found, cells, patients = table({"A": 40, "": 30, None: 20})
    cells = [None if cell == "None" else cell for cell in cells]
    rows = subgroup_table(found, "sex", cells, patients, ("f1",), repeats=5)
    assert [(row["sex"], row["patients"]) for row in rows] == [("all", 90), ("not stated", 50), ("A", 40)]
    with pytest.raises(ValueError, match="2 cells"):
        subgroup_table(found, "sex", ["a", "b"], patients)
    with pytest.raises(UsageError, match="'acc' is unknown"):
        subgroup_table(found, "sex", cells, patients, ("acc",))


@pytest.mark.parametrize(
    "age, band",
    [("045Y", "40-59"), (17, "0-17"), (18.9, "18-39"), ("018M", "0-17"), ("003W", "0-17"), ("102Y", "80+"), ("", "")],
)
def test_ages_fall_into_bands_and_the_oldest_into_an_open_one(age, band):
    assert age_band(age) == band and age_band(None) == ""


def test_text_that_is_no_age_is_refused_without_repeating_it():
    with pytest.raises(ValueError) as error:
        age_band("DOE^JANE")
    assert "DOE" not in str(error.value)
    assert age_band("12", (18, 65)) == "under 18" and age_band("70", (18, 65)) == "65+"
