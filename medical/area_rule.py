"""Segmentation that classifies: an image is positive where a large enough area of it is (FetalCLIP-IQA).

The paper (arXiv:2507.22802) calls a frame positive iff at least 1 % of its pixels have a probability above .5: of
224 x 224 pixels 502 are enough, 501 are not. Here both numbers may be chosen together on validation rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaptsuite.medical.clinical import AT_THRESHOLD, evaluate, finding
from adaptsuite.medical.operating_point import PARTNER, choose_threshold, parse

PIXEL, AREA = 0.5, 0.01  # of the paper
PIXELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def area_shares(probabilities, pixels: Sequence[float] = (PIXEL,)) -> np.ndarray:
    """(N, P) share of each image's pixels, or voxels, whose probability is above each of P pixel thresholds.

    probabilities: (N, ...) one map an image, in [0, 1]; logits are refused. Padding counts as pixels, as in the paper:
    crop it first where it shall not. Batches may be joined.
    """
    maps = np.asarray(probabilities)
    if maps.ndim < 3 or not (maps.min() >= 0 and maps.max() <= 1):  # a nan is neither
        raise ValueError(f"probability maps (N, H, W) in [0, 1] are expected, found shape {maps.shape}")
    maps = maps.reshape(len(maps), -1)
    # whole counts over whole sizes: 7 of 100 is then exactly the number that .07 is read as
    return np.stack([np.count_nonzero(maps > pixel, axis=1) for pixel in pixels], 1) / maps.shape[1]


def is_positive(probabilities, pixel: float = PIXEL, area: float = AREA) -> np.ndarray:
    """(N,) bool by the rule: at least `area` of the pixels above `pixel`."""
    return area_shares(probabilities, (pixel,))[:, 0] >= area


def choose_area_rule(
    shares,
    truth,
    target: str,
    patients=None,
    pixels: Sequence[float] = PIXELS,
    **settings: Any,
) -> dict[str, Any]:
    """The record of `choose_threshold` for the best pair of pixel and area threshold on validation rows.

    shares: (N, P) of `area_shares` at these pixel thresholds.  truth: (N,), positive where a mask is not empty.
    The record's `pixel` is the pixel threshold, its `value` the area; `by_pixel` says what the others reached, and
    `paper` what the rule of the paper does on the same rows, where .5 is among the pixel thresholds. Pixel thresholds
    are compared as areas are; of equal ones the nearest to .5 is taken.
    """
    shares, wanted = np.asarray(shares, dtype=float), parse(target)
    if shares.ndim != 2 or shares.shape[1] != len(pixels):
        raise ValueError(f"shares have shape {shares.shape}, (rows, {len(pixels)} pixel thresholds) is expected")
    records = [choose_threshold(shares[:, p], truth, wanted, patients, **settings) for p in range(len(pixels))]
    best = max(range(len(pixels)), key=lambda p: (_rank(records[p]), -abs(pixels[p] - PIXEL)))
    record = {**records[best], "pixel": float(pixels[best]), "by_pixel": _by_pixel(records, pixels)}
    if PIXEL in pixels:
        paper = finding(shares[:, list(pixels).index(PIXEL)], truth, AREA)
        record["paper"] = {"pixel": PIXEL, "value": AREA, "val": evaluate(paper, patients, AT_THRESHOLD)}
    return record


def _rank(record: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Reached before not reached; then what the target's rule puts first; then the higher sensitivity."""
    target = parse(record["target"])
    rates = {name: found["value"] or 0.0 for name, found in record["val"].items()}
    rates["youden"] = rates["sensitivity"] + rates["specificity"] - 1
    name = PARTNER[target.metric] if target.value is not None and record["reached"] else target.metric
    return record["reached"], rates[name], rates["sensitivity"]


def _by_pixel(records: Sequence[Mapping[str, Any]], pixels: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"pixel": float(pixel), "area": r["value"], "reached": r["reached"]}
        | {name: r["val"][name]["value"] for name in AT_THRESHOLD}
        for pixel, r in zip(pixels, records, strict=True)
    ]
