"""Thresholds against a search over all of them, ties, targets that are not reached, and the rule by area."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptsuite.errors import DataError, UsageError
from adaptsuite.medical.area_rule import area_shares, choose_area_rule, is_positive
from adaptsuite.medical.clinical import evaluate, finding
from adaptsuite.medical.operating_point import Target, achieved, choose_threshold, choose_thresholds, cuts, parse

TARGETS = ("sensitivity>=0.95", "specificity>=0.9", "ppv>=0.6", "npv>=0.9", "f1", "youden")


def rows(seed=0, n=120, digits=2):
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.35
    return np.round(1 / (1 + np.exp(-(1.6 * truth - 1 + rng.normal(size=n)))), digits), truth


def rates(probabilities, truth, threshold):
    called = probabilities >= threshold
    tp, fp, fn, tn = (
        (a & b).sum() for a, b in ((called, truth), (called, ~truth), (~called, truth), (~called, ~truth))
    )
    sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
    return {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": tp / (tp + fp),
        "npv": tn / (tn + fn) if tn + fn else -1.0,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "youden": sensitivity + specificity - 1,
    }


def best_of_all(probabilities, truth, target):
    """(sensitivity, specificity) that the module's docstring promises, by trying every probability as threshold."""
    partner = {"sensitivity": "specificity", "npv": "specificity", "specificity": "sensitivity", "ppv": "sensitivity"}
    tried = [rates(probabilities, truth, t) for t in sorted(set(probabilities.tolist()))]
    if target.value is not None:
        tried = [r for r in tried if r[target.metric] >= target.value]
        first = partner[target.metric]
    else:
        first = target.metric
    chosen = max(tried, key=lambda r: (r[first], r["sensitivity"], r["specificity"]))
    return chosen["sensitivity"], chosen["specificity"]


@pytest.mark.parametrize("text", TARGETS)
@given(seed=st.integers(0, 10**6), digits=st.sampled_from([1, 2, 6]))
def test_the_threshold_is_the_best_of_all(text, seed, digits):
    probabilities, truth = rows(seed, 60, digits)
    truth[:2] = [True, False]
    target = parse(text)
    try:
        expected = best_of_all(probabilities, truth, target)
    except ValueError:  # none reaches it
        record = choose_threshold(probabilities, truth, text, repeats=2)
        assert record["value"] is None and not record["reached"]
        return
    record = choose_threshold(probabilities, truth, text, repeats=2)
    found = rates(probabilities, truth, record["value"])
    assert (found["sensitivity"], found["specificity"]) == expected
    assert record["val"]["sensitivity"]["value"] == expected[0]


def test_the_record_says_what_it_rests_on():
    probabilities, truth = rows()
    patients = np.arange(120) // 4
    record = choose_threshold(probabilities, truth, "sensitivity>=0.95", patients)
    at = finding(probabilities, truth, record["value"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["target"] == "sensitivity>=0.95" and record["reached"] and record["notes"] == []
    assert (record["rows"], record["positives"], record["patients"]) == (120, truth.sum(), 30)
    assert record["positive_patients"] == len(set(patients[truth]))
    assert sum(record["counts"].values()) == 120 and record["counts"]["tp"] >= 0.95 * truth.sum()
    assert record["val"] == evaluate(at, patients, tuple(record["val"]))
    assert "highest specificity" in record["rule"]


def test_a_threshold_lies_between_two_probabilities_and_rounding_moves_no_row_across():
    probabilities = np.array([0.9, 0.7, 0.4, 0.1])
    record = choose_threshold(probabilities, [1, 1, 0, 0], "youden")
    assert record["value"] == pytest.approx(0.55)
    close = np.array([0.5, np.nextafter(0.5, 0), 0.2])
    record = choose_threshold(close, [1, 0, 0], "youden")
    assert (close >= record["value"]).tolist() == [True, False, False]
    own = cuts(np.array([0.2, 0.9, 0.2, 0.5]))
    assert own.thresholds.tolist() == [0.7, 0.35, 0.0] and own.ends.tolist() == [1, 2, 4]


def test_of_equal_thresholds_the_more_sensitive_and_then_the_higher_is_taken():
    truth = np.array([1, 0, 1, 0], dtype=bool)  # youden is 0.5 when one or three rows are called
    record = choose_threshold(np.array([0.8, 0.6, 0.4, 0.2]), truth, "youden")
    assert record["value"] == pytest.approx(0.3) and record["val"]["sensitivity"]["value"] == 1


def test_a_target_at_the_very_share_is_reached():
    probabilities = np.linspace(1, 0.5, 20)
    truth = np.ones(20, dtype=bool)
    probabilities, truth = np.append(probabilities, [0.51, 0.1]), np.append(truth, [False, False])
    record = choose_threshold(probabilities, truth, "sensitivity>=0.95")
    assert record["counts"] == {"tp": 19, "fp": 0, "fn": 1, "tn": 2}  # 19 / 20 is the number that .95 is read as


@pytest.mark.filterwarnings("error")
def test_a_target_that_is_not_reached_has_no_threshold_and_says_how_near_it_came():
    record = choose_threshold([0.9, 0.8, 0.7, 0.2], [0, 1, 1, 0], "ppv>=0.9", repeats=50)
    assert record["value"] is None and record["reached"] is False
    assert record["notes"] == ["ppv>=0.9 is not reached on 4 validation rows: the nearest is 0.667 at 0.45"]
    with pytest.raises(DataError, match="no threshold: ppv>=0.9 was not reached"):
        achieved(record, [0.3, 0.6], [0, 1])


def test_a_threshold_that_calls_every_row_tells_nothing_and_says_so():
    record = choose_threshold([0.9, 0.8, 0.3, 0.2], [0, 0, 0, 1], "sensitivity>=0.95")
    assert record["value"] == 0 and record["reached"] and "calling every row positive" in record["notes"][0]


def test_an_assured_target_holds_in_that_share_of_patient_resamples():
    probabilities, truth = rows(3, 400, 6)
    patients = np.arange(400) // 4
    plain = choose_threshold(probabilities, truth, "sensitivity>=0.9", patients)
    sure = choose_threshold(probabilities, truth, "sensitivity>=0.9", patients, assured=0.95)
    assert choose_threshold(probabilities, truth, "sensitivity>=0.9", patients, assured=0.01)["val"] == plain["val"]
    assert sure["value"] < plain["value"] and "95% of patient resamples" in sure["rule"]
    rng, held = np.random.default_rng(5), []
    for _ in range(300):
        taken = np.concatenate([np.arange(4) + 4 * i for i in rng.integers(0, 100, 100)])
        held.append(rates(probabilities[taken], truth[taken], sure["value"])["sensitivity"] >= 0.9)
    assert np.mean(held) > 0.9
    none = choose_threshold([0.9, 0.8, 0.7, 0.2], [0, 1, 1, 0], "ppv>=0.6", assured=0.99)
    assert not none["reached"] and "in 99% of patient resamples" in none["notes"][0]
    for target, share in (("f1", 0.9), ("ppv>=0.6", 90)):
        with pytest.raises(UsageError, match="is a share between 0 and 1, for a target with a value"):
            choose_threshold(probabilities, truth, target, assured=share)
    with pytest.raises(DataError, match="one patient"):
        choose_threshold([0.9, 0.1], [1, 0], "sensitivity>=0.9", [1, 1], assured=0.9)


def test_what_was_chosen_on_validation_rows_is_measured_on_others():
    probabilities, truth = rows(0)
    record = choose_threshold(probabilities, truth, "sensitivity>=0.95")
    others, their = rows(1)
    result = achieved(record, others, their, np.arange(120) // 3)
    expected = rates(others, their, record["value"])
    assert result["test"]["sensitivity"]["value"] == pytest.approx(expected["sensitivity"])
    assert result["met"] == (expected["sensitivity"] >= 0.95) and result["threshold"] == record["value"]
    assert achieved(choose_threshold(probabilities, truth, "f1"), others, their)["met"] is None


def test_each_class_has_a_threshold_of_its_own():
    rng = np.random.default_rng(0)
    probabilities, targets = rng.dirichlet([1, 1, 1], 90), rng.integers(0, 3, 90)
    records = choose_thresholds(probabilities, targets, "abc", "youden", repeats=5)
    assert records["b"] == choose_threshold(probabilities[:, 1], targets == 1, "youden", repeats=5)


def test_targets_are_read_strictly():
    assert parse(" specificity >= .9 ") == Target("specificity", 0.9) and str(parse("ppv>=0.80")) == "ppv>=0.8"
    for text in ("sensitivity", "sensitivity>0.9", "accuracy>=0.9", "ppv>=1.2", "ppv>=0", "ppv>=1.2.3", "f1>=0.5", ""):
        with pytest.raises(UsageError, match="is not understood; examples: sensitivity>=0.95"):
            parse(text)
    for truth, kind in (([1, 1], "positive"), ([0, 0], "negative")):
        with pytest.raises(DataError, match=f"all 2 validation rows are {kind}"):
            choose_threshold([0.2, 0.4], truth, "f1")


# the rule by area


@pytest.mark.parametrize("pixels, positive", [(501, False), (502, True)])
def test_an_image_of_224_is_positive_from_502_pixels_on(pixels, positive):
    flat = np.full(224 * 224, 0.5)  # .5 itself is not above .5
    flat[:pixels] = 0.500001
    image = np.random.default_rng(0).permutation(flat).reshape(1, 224, 224)
    assert is_positive(image).tolist() == [positive]
    assert is_positive(image.astype(np.float32)).tolist() == [positive]


@given(st.integers(1, 99))
def test_an_area_of_exactly_the_share_is_enough(percent):
    image = (np.arange(100) < percent).astype(float).reshape(1, 10, 10)
    assert is_positive(image, area=percent / 100)[0] and not is_positive(image, area=(percent + 0.5) / 100)[0]


def test_shares_are_counted_in_volumes_too_and_logits_are_refused():
    maps = np.random.default_rng(0).random((3, 4, 5, 6))
    shares = area_shares(maps, (0.2, 0.7))
    assert shares == pytest.approx(np.stack([(maps > p).mean((1, 2, 3)) for p in (0.2, 0.7)], 1))
    for wrong in (maps - 1, maps * np.nan, maps[0, 0, 0]):
        with pytest.raises(ValueError, match="probability maps"):
            area_shares(wrong)


def test_area_and_pixel_threshold_are_the_best_pair():
    rng = np.random.default_rng(0)
    truth = np.arange(40) < 15
    maps = 0.35 * rng.random((40, 16, 16))
    maps[:15, 3:9, 3:9] += 0.3  # lesions, above .6 in a small part
    maps[15:30, :8, :8] += 0.22  # larger spots, above .5 in a small part
    pixels = (0.3, 0.5, 0.6)
    shares = area_shares(maps, pixels)
    record = choose_area_rule(shares, truth, "youden", np.arange(40) // 2, pixels)
    assert record["pixel"] == 0.6
    called = (maps > record["pixel"]).mean((1, 2)) >= record["value"]
    tried = [
        rates(shares[:, p], truth, area)["youden"] for p in range(len(pixels)) for area in set(shares[:, p].tolist())
    ]
    assert rates(called.astype(float), truth, 1)["youden"] == max(tried)
    assert [row["pixel"] for row in record["by_pixel"]] == list(pixels)
    assert record["paper"]["val"]["f1"]["value"] == pytest.approx(
        rates(is_positive(maps).astype(float), truth, 1)["f1"]
    )
    assert achieved(record, shares[:, pixels.index(record["pixel"])], truth)["test"]["f1"]["value"] == pytest.approx(
        record["val"]["f1"]["value"]
    )
    json.dumps(record, allow_nan=False)


def test_of_equal_pixel_thresholds_the_one_nearest_to_a_half_is_taken():
    maps = np.zeros((4, 4, 4))
    maps[:2, :2, :2] = 1
    pixels = (0.1, 0.4, 0.9)
    record = choose_area_rule(area_shares(maps, pixels), [1, 1, 0, 0], "f1", pixels=pixels)
    assert record["pixel"] == 0.4 and record["value"] == pytest.approx(0.125) and "paper" not in record
    with pytest.raises(ValueError, match=r"\(rows, 2 pixel thresholds\)"):
        choose_area_rule(area_shares(maps, pixels), [1, 1, 0, 0], "f1", pixels=(0.1, 0.2))
