"""Overlap and distances: by hand, by plain loops, and as MONAI has them where both are defined."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptsuite.medical.surface import DISTANCES, border, compare, compare_labels, overlap, summarise


def masks(seed, dims, empty=0.0):
    """Two blobs that overlap, some at the end of the image."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    shape = (18, 21) if dims == 2 else (8, 11, 9)
    base = rng.normal(size=shape)
    return [gaussian_filter(base + 0.7 * rng.normal(size=shape), 2) > 0.02 + empty for _ in range(2)]


def loop_distances(one, other, spacing):
    points = [np.argwhere(loop_border(mask)) * spacing for mask in (one, other)]
    return [np.array([min(np.linalg.norm(p - q) for q in b) for p in a]) for a, b in (points, points[::-1])]


def loop_border(mask):
    result = np.zeros_like(mask)
    for place in np.argwhere(mask):
        for axis in range(mask.ndim):
            for step in (-1, 1):
                near = place.copy()
                near[axis] += step
                outside = not 0 <= near[axis] < mask.shape[axis]
                result[tuple(place)] |= outside or not mask[tuple(near)]
    return result


@pytest.mark.parametrize("dims, spacing", [(2, (1.0, 1.0)), (2, (0.28, 0.9)), (3, (2.5, 0.7, 0.7))])
@pytest.mark.parametrize("seed", range(3))
def test_distances_equal_plain_loops(seed, dims, spacing):
    prediction, truth = masks(seed, dims)
    found = compare(prediction, truth, spacing)
    forth, back = loop_distances(prediction, truth, np.array(spacing))
    assert (border(truth) == loop_border(truth)).all()
    assert found["hd95_mm"] == pytest.approx(max(np.percentile(forth, 95), np.percentile(back, 95)))
    assert found["hd_mm"] == pytest.approx(max(forth.max(), back.max()))
    assert found["assd_mm"] == pytest.approx(np.concatenate([forth, back]).mean())


@pytest.mark.parametrize("dims, spacing", [(2, (1.0, 1.0)), (2, (0.28, 0.9)), (3, (2.5, 0.7, 0.7))])
def test_monai_has_the_same_values_where_both_masks_have_something(dims, spacing):
    import torch
    from monai import metrics as monai

    for seed in range(4):
        prediction, truth = masks(seed, dims)
        found = compare(prediction, truth, spacing)
        two = [torch.tensor(mask)[None, None].float() for mask in (prediction, truth)]
        as_ours = {
            "dice": monai.compute_dice(*two),
            "jaccard": monai.compute_iou(*two),
            "hd95_mm": monai.compute_hausdorff_distance(*two, True, percentile=95, spacing=list(spacing)),
            "hd_mm": monai.compute_hausdorff_distance(*two, True, spacing=list(spacing)),
            "assd_mm": monai.compute_average_surface_distance(*two, True, symmetric=True, spacing=list(spacing)),
        }
        for name, value in as_ours.items():
            assert found[name] == pytest.approx(float(value), rel=1e-5), name


def test_where_a_mask_is_empty_monai_has_nan_and_we_have_the_stated_values():
    import torch
    from monai import metrics as monai

    full, empty = masks(0, 2)[0], np.zeros((18, 21), dtype=bool)
    expected = {"both": (1, 1, np.nan), "prediction": (0, 0, np.inf), "truth": (0, 0, np.inf)}
    cases = {"both": (empty, empty), "prediction": (empty, full), "truth": (full, empty)}
    for name, (prediction, truth) in cases.items():
        found = compare(prediction, truth, (1, 1))
        assert (found["dice"], found["jaccard"]) == expected[name][:2]
        for distance in DISTANCES:
            assert found[distance] == pytest.approx(expected[name][2], nan_ok=True)
        two = [torch.tensor(mask)[None, None].float() for mask in (prediction, truth)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dice = float(monai.compute_dice(*two))
            far = float(monai.compute_hausdorff_distance(*two, True, percentile=95))
        assert np.isnan(dice) == (not truth.any()) and not np.isfinite(far)
        assert float(monai.compute_dice(*two, ignore_empty=False)) == found["dice"]


@given(st.integers(0, 10**6), st.sampled_from([2, 3]))
def test_equal_masks_are_perfect_and_order_does_not_matter(seed, dims):
    prediction, truth = masks(seed, dims, empty=0.25)
    spacing = (2.0, 0.5, 1.0)[:dims]
    if truth.any():
        assert compare(truth, truth, spacing) == {"dice": 1, "jaccard": 1, **dict.fromkeys(DISTANCES, 0)}
    one, other = compare(prediction, truth, spacing), compare(truth, prediction, spacing)
    assert one == pytest.approx(other, nan_ok=True)
    assert one["dice"] == pytest.approx(2 * one["jaccard"] / (1 + one["jaccard"]))
    if np.isfinite(one["hd_mm"]):
        assert one["assd_mm"] <= one["hd_mm"] and one["hd95_mm"] <= one["hd_mm"]


def test_a_shift_by_two_pixels_is_two_spacings_away():
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:10, 5:10] = 1
    moved = np.roll(mask, 2, 1)
    assert compare(mask, moved, (9.0, 0.3))["hd_mm"] == pytest.approx(0.6)
    assert "hd_mm" not in compare(mask, moved) and overlap(mask, moved)["dice"] == pytest.approx(0.6)


def test_each_label_is_compared_on_its_own():
    prediction, truth = np.array([[0, 1, 1], [2, 2, 0]]), np.array([[0, 1, 0], [2, 2, 2]])
    found = compare_labels(prediction, truth, {1: "liver", 2: "lesion", 3: "spleen"}, (1, 1))
    assert found["liver"]["dice"] == pytest.approx(2 / 3) and found["lesion"]["dice"] == pytest.approx(4 / 5)
    assert found["spleen"]["dice"] == 1 and np.isnan(found["spleen"]["hd95_mm"])


@pytest.mark.parametrize(
    "prediction, truth, spacing, message",
    [
        (np.zeros((2, 2)), np.zeros((2, 3)), None, "of one shape"),
        (np.zeros(4), np.zeros(4), None, "of one shape"),
        (np.full((2, 2), 0.3), np.zeros((2, 2)), None, "threshold probabilities"),
        (np.full((2, 2), 2), np.zeros((2, 2)), None, "pick a label"),
        (np.zeros((2, 2)), np.zeros((2, 2)), (1, 1, 1), "is not 2 numbers above 0"),
        (np.zeros((2, 2)), np.zeros((2, 2)), (0, 1), "is not 2 numbers above 0"),
    ],
)
def test_masks_that_cannot_be_compared_are_refused(prediction, truth, spacing, message):
    with pytest.raises(ValueError, match=message):
        compare(prediction, truth, spacing)


# cases to patients


@pytest.mark.filterwarnings("error")
def test_means_are_of_the_cases_that_have_a_value_and_say_how_many_have_not():
    cases = [{"dice": d, "hd95_mm": h} for d, h in ((0.8, 2.0), (0.6, 4.0), (0.0, np.inf), (1.0, np.nan), (0.9, 3.0))]
    found = summarise(cases, ["a", "a", "b", "c", "d"], repeats=300)
    assert found["dice"]["value"] == pytest.approx(0.66) and "note" not in found["dice"]
    assert found["hd95_mm"]["value"] == pytest.approx(3.0) and found["hd95_mm"]["cases"] == 3
    assert found["hd95_mm"]["note"].startswith(
        "1 cases with one mask empty are left out; 1 cases with both masks empty are left out"
    )
    assert found["hd95_mm median"]["value"] == 3.0 and found["hd95_mm median"]["cases"] == 4  # of 2, 3, 4, inf
    assert found["hd95_mm median"]["ci"] is None and "infinite" in found["hd95_mm median"]["note"]
    json.dumps(found, allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_where_every_case_is_missed_there_is_no_distance():
    found = summarise([{"dice": 0.0, "hd95_mm": np.inf}] * 3, repeats=20)
    assert found["hd95_mm"]["value"] is None and found["hd95_mm median"]["value"] is None
    assert summarise([{"hd95_mm": np.nan}] * 3, repeats=20)["hd95_mm median"]["value"] is None


def test_the_interval_of_a_mean_is_that_of_a_plain_loop_over_patients():
    rng = np.random.default_rng(0)
    dice, patients = rng.random(60), np.arange(60) // 4
    found = summarise([{"dice": d, "hd95_mm": 10 * d} for d in dice], patients, repeats=80, seed=3)
    drawn, medians, draws = [], [], np.random.default_rng(3)
    for _ in range(80):
        taken = np.concatenate([dice[patients == p] for p in draws.integers(0, 15, 15)])
        drawn.append(taken.mean())
        medians.append(np.quantile(10 * taken, 0.5, method="inverted_cdf"))
    assert found["dice"]["ci"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-6)
    assert found["hd95_mm median"]["ci"] == pytest.approx(np.quantile(medians, [0.025, 0.975]), abs=1e-6)
