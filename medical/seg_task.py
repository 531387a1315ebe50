"""Segmentation as a task: the loss, and predictions at each picture's own resolution.

`FullSize` is the one path by which probability maps come to the size of their pictures and are counted: thresholds,
metrics, `predict` and the report all use it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import DataError, UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.medical import surface
from adaptsuite.medical.area_rule import AREA, PIXEL, PIXELS, choose_area_rule
from adaptsuite.medical.findings import EvidenceSettings
from adaptsuite.medical.seg_data import MaskAugment, Masked, augmented, place
from adaptsuite.medical.segmentation import LOSSES, MaskHead, planes

# what is known of one class in one picture, in pixels of its own resolution
BOTH, CALLED, TRUE, SIZE, APART = range(5)  # in both masks, in each of them, of the picture; hd95 in mm or pixels
ABOVE = 5  # raw: from here on how many lie above each of PIXELS
SHARE, LEAST = 5, 6  # by an adapter's rule: the area share, and the share from which a picture is positive


class SegmentationTask:
    """Masks of K classes; `predict` gives (B, K, 3) pixels in both masks, in the prediction and in the truth."""

    target, monitor = "present", "dice"

    def __init__(
        self,
        classes: Sequence[str],
        augment: MaskAugment | None = None,
        head: MaskHead | None = None,
        tta: str = "none",
    ):
        if tta not in ("none", "flip"):
            raise UsageError(f"front_end.tta={tta}: of masks the views are none or flip")
        self.classes, self.augment, self.tta = tuple(classes), augment or MaskAugment(), tta
        self.head = head or MaskHead()

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        image, mask = augmented(batch["image"], batch["mask"], self.augment)
        return LOSSES[self.head.loss](model(image), planes(mask, len(self.classes)), self.head.smooth)

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """(B, K, h, w) float32 of uint8 pictures (B, 3, h, w) at the input's size."""
        image = image.float() / 255
        found = model(image).float().sigmoid()
        return (found + model(image.flip(-1)).float().sigmoid().flip(-1)) / 2 if self.tta == "flip" else found

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        called = self.probabilities(model, batch["image"]) > PIXEL
        truth = planes(batch["mask"], len(self.classes)).bool()
        return torch.stack([mask.flatten(2).sum(-1) for mask in (called & truth, called, truth)], -1)

    def embed(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """(B, D): the mean of the last map."""
        return model(batch["image"].float() / 255, embedding=True)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Mean Dice over pictures and classes, 1 where both masks are empty; dice_present: where the truth is not."""
        dice, there = dice_of(outputs), outputs[..., TRUE] > 0
        return {"dice": float(dice.mean()), "dice_present": float(dice[there].mean()) if there.any() else float("nan")}


def dice_of(counts: np.ndarray) -> np.ndarray:
    """2 BOTH / (CALLED + TRUE) of (..., 3 or more), 1 where both masks are empty."""
    sizes = counts[..., CALLED] + counts[..., TRUE]
    return np.where(sizes > 0, 2 * counts[..., BOTH] / np.maximum(sizes, 1), 1.0)


def jaccard_of(counts: np.ndarray) -> np.ndarray:
    """BOTH / (CALLED + TRUE - BOTH), 1 where both masks are empty."""
    either = counts[..., CALLED] + counts[..., TRUE] - counts[..., BOTH]
    return np.where(either > 0, counts[..., BOTH] / np.maximum(either, 1), 1.0)


# ---- at full size


def at_size(maps: Tensor, size: Sequence[int], front: FrontEnd) -> Tensor:
    """Probability maps (K, h, w) of the input at a picture's own size (K, *size): its place there, bilinear."""
    top, left, height, width = place(size, front)
    maps = maps[:, top : top + height, left : left + width]
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=False)[0]


class FullSize:
    """A task whose outputs are what is counted at full size: (B, K, ABOVE + len(PIXELS)), nan where no truth is given.

    see(item, maps (K, H, W)): also gets each picture's probabilities; may get those of one picture again.
    """

    target = "present"

    def __init__(
        self, task: SegmentationTask, dataset: Masked, see: Callable[[int, np.ndarray], Any] = lambda item, maps: None
    ):
        self.task, self.dataset, self.see = task, dataset, see

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        maps = self.task.probabilities(model, batch["image"])
        return torch.stack([self._counted(int(i), own) for i, own in zip(batch["item"], maps, strict=True)])

    def _counted(self, item: int, maps: Tensor) -> Tensor:
        full = at_size(maps, self.dataset.size(item), self.dataset.front_end).cpu().numpy()
        self.see(item, full)
        truth = None if self.dataset.truths is None else self.dataset.full_mask(item)
        spacing = None if truth is None else self.dataset.truths[item].spacing_mm or (1.0, 1.0)
        return torch.tensor([_of_class(own, truth, k, spacing) for k, own in enumerate(full, 1)])


def _of_class(probabilities: np.ndarray, truth: np.ndarray | None, label: int, spacing) -> list[float]:
    called = probabilities > PIXEL
    above = [np.count_nonzero(probabilities > pixel) for pixel in PIXELS]
    size, count = probabilities.size, np.count_nonzero(called)
    if truth is None:
        return [np.nan, count, np.nan, size, np.nan, *above]
    there = truth == label
    apart = surface.compare(called, there, spacing)["hd95_mm"]
    return [np.count_nonzero(called & there), count, np.count_nonzero(there), size, apart, *above]


# ---- from areas to a finding


def choose_rules(
    outputs: np.ndarray, classes: Sequence[str], patients: np.ndarray, settings: EvidenceSettings
) -> dict[str, Any]:
    """Records of an adapter from validation rows, outputs (rows, K, ...) of `FullSize`: "threshold", "notes".

    Of each class the pixel and the area threshold (`adaptsuite.medical.area_rule`) that reach the operating point;
    where they cannot be chosen the paper's, whose record has `reached` None, and a note.
    """
    rules, notes, outputs = {}, [], outputs.astype(float)  # in which 1 of 100 is the number that .01 is read as
    for k, name in enumerate(classes):
        own = outputs[:, k]
        shares, truth = own[:, ABOVE:] / own[:, [SIZE]], own[:, TRUE] > 0
        try:
            rule = choose_area_rule(shares, truth, settings.operating_point, patients, assured=settings.assured)
            notes += [f"{name}: {note}" for note in rule["notes"]]
            why = "" if rule["reached"] else f"{rule['target']} is not reached"
        except DataError as e:
            rule, why = {}, str(e)
        if why:
            notes.append(f"{name}: {why}; the area rule of FetalCLIP-IQA is taken (1 % of pixels above .5)")
            rule = {**rule, "pixel": PIXEL, "value": AREA, "reached": None, "rule": why}
        rules[name] = rule
    return {"threshold": rules, "notes": notes}


def ruled(outputs: np.ndarray, rules: Mapping[str, Mapping[str, Any]] | None) -> np.ndarray:
    """(rows, K, 7) of `FullSize`'s outputs: as they are up to APART, then SHARE and LEAST by each class's rule."""
    rules = list((rules or {}).values()) or [{"pixel": PIXEL, "value": AREA}] * outputs.shape[1]
    outputs, found = outputs.astype(float), np.empty((*outputs.shape[:2], LEAST + 1))
    found[..., :ABOVE] = outputs[..., :ABOVE]
    for k, rule in enumerate(rules):
        found[:, k, SHARE] = outputs[:, k, ABOVE + PIXELS.index(rule["pixel"])] / outputs[:, k, SIZE]
        found[:, k, LEAST] = rule["value"]
    return found


def finding_scores(outputs: np.ndarray) -> np.ndarray:
    """(rows, K) share / (share + least), from .5 on positive: so that adapters with different rules can be pooled."""
    share, least = outputs[..., SHARE], outputs[..., LEAST]
    return np.where(share > 0, share / np.maximum(share + least, 1e-300), np.where(least > 0, 0.0, 0.5))
