"""Pictures with masks: label maps of files, kept in step with their pictures, and what is done to both in training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptsuite.augment import Augment
from adaptsuite.errors import DataError, UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.images import Picture, inspect, stored
from adaptsuite.medical import data as files
from adaptsuite.medical.data import Frames, Reading
from adaptsuite.memory import Memory

WHOLE = Reading(frames=1, region=False)  # a mask has the grid of its file


@dataclass(frozen=True)
class Truth:
    """What one row's prediction is compared with."""

    name: str  # for people: a line of the table
    mask: Path | None  # None: nothing is there
    spacing_mm: tuple[float, float] | None = None  # of rows and columns; None: distances are in pixels


def read_labels(path: Path, num_classes: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W) uint8: 0, or k for class k; of one class zero and one other value, whichever.

    size: that of the picture. Raises DataError for another one, for other values, for colours, and for damaged files.
    """
    found = inspect(path)
    if size is not None and (found.height, found.width) != size:
        raise DataError(
            f"{path}: the mask has {found.width} x {found.height} pixels, its picture {size[1]} x {size[0]}"
        )
    values = stored(path)
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any() or values.shape[2] == 4 and (values[..., 3] != 255).any():
            raise DataError(f"{path}: a mask in colours: one channel of labels is expected")
        values = values[..., 0]
    there = np.unique(values)
    if num_classes == 1:
        if len(there) > 2 or len(there) == 2 and there[0] != 0:
            raise DataError(
                f"{path}: {len(there)} different values, a mask of one class has 0 and one other (data.classes names "
                "several; JPEG blurs masks)"
            )
        return (values != 0).astype(np.uint8)
    if there.min() < 0 or there.max() > num_classes:
        raise DataError(f"{path}: holds the value {there.max()}, the {num_classes} classes are 1 to {num_classes}")
    return values.astype(np.uint8)


def require_one(header: Picture, path: Path) -> None:
    """Raises DataError for a file of several frames or slices."""
    if header.frames > 1 and files.kind(path) != "picture":
        raise DataError(f"{path}: {header.frames} frames or slices: masks are of one picture a file")


def place(size: Sequence[int], front: FrontEnd) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a picture of `size` within the input, as `adaptsuite.images.fitted` lays it."""
    (tall, wide), (height, width) = size, front.size
    if front.fit == "squash" or tall * width == wide * height:
        return 0, 0, height, width
    if wide * height > tall * width:
        own = round(tall / wide * width)
        return round((height - own) * 0.5), 0, own, width
    own = round(wide / tall * height)
    return 0, round((width - own) * 0.5), height, own


class Masked(Frames):
    """Map-style data set: {"image": (3, h, w) uint8, "item"}, with truths "mask": (h, w) uint8 and "present": (K,) too.

    The whole picture is squashed or padded to the front end's size, its mask by the nearest pixel.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        truths: Sequence[Truth] | None,
        front_end: FrontEnd,
        num_classes: int,
        memory: Memory | None = None,
        reading: Reading = WHOLE,
        headers: dict | None = None,
    ):
        super().__init__(paths, None, front_end, memory, replace(reading, frames=1, region=False), headers)
        self.truths, self.num_classes = None if truths is None else list(truths), num_classes
        for path in self.paths:
            require_one(self.header(path), path)

    @property
    def item_targets(self) -> np.ndarray | None:
        """(N, K) zeros and ones: which classes each mask holds; reads all masks."""
        if self.truths is None:
            return None
        return np.stack([_present(self.mask(i), self.num_classes) for i in range(len(self))])

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of the picture itself."""
        header = self.header(self.paths[index])
        return header.height, header.width

    def full_mask(self, index: int) -> np.ndarray:
        """(H, W) uint8 labels at the picture's own resolution."""
        truth = self.truths[index]
        if truth.mask is None:
            return np.zeros(self.size(index), dtype=np.uint8)
        return read_labels(truth.mask, self.num_classes, self.size(index))

    def mask(self, index: int) -> Tensor:
        """(h, w) uint8 labels at the input's size."""
        f = self.front_end
        key = (self.truths[index].mask, "mask", f.size, f.fit, self.num_classes)
        mask = self._memory.get(key)
        if mask is None:
            full = torch.from_numpy(self.full_mask(index))[None, None]
            top, left, height, width = place(self.size(index), self.front_end)
            mask = torch.zeros(self.front_end.size, dtype=torch.uint8)
            resized = F.interpolate(full, (height, width), mode="nearest-exact")[0, 0]
            mask[top : top + height, left : left + width] = resized
            if self.truths[index].mask is not None:
                self._memory.keep(key, mask)
        return mask

    def picture(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8 at its own resolution."""
        return np.asarray(next(iter(files.pictures(self.paths[index], self.reading))))

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        image = self._memory.get(self._key(path))
        if image is None:
            image = self._read(path)[0]
            if self.truths is not None:
                self._memory.keep(self._key(path), image)
        if self.truths is None:
            return {"image": image, "item": index}
        mask = self.mask(index)
        return {"image": image, "item": index, "mask": mask, "present": _present(mask, self.num_classes)}


def _present(mask: Tensor, num_classes: int) -> np.ndarray:
    return np.isin(np.arange(1, num_classes + 1), mask.numpy()).astype(np.uint8)


# ---- augmentation


@dataclass(frozen=True)
class MaskAugment(Augment):
    """Section `augment` of a recipe; what stands below is for segmentation: the mask moves with its picture."""

    rotate: float = 0.0  # degrees, up to
    zoom: float = 0.0  # larger or smaller by up to this share
    shift: float = 0.0  # along each side, by up to this share of it
    gamma: float = 0.0  # picture ** exp(u), u up to this

    def __post_init__(self) -> None:
        for name, most in (("rotate", 180), ("zoom", 0.9), ("shift", 0.9), ("gamma", 3)):
            if not 0 <= getattr(self, name) <= most:
                raise UsageError(f"augment.{name}={getattr(self, name):g}: 0 to {most:g} is expected")

    @property
    def moves(self) -> bool:
        return bool(self.rotate or self.zoom or self.shift)


def require_known(a: MaskAugment, segments: bool) -> None:
    """Raises UsageError for settings that the task would not follow."""
    mixing = ("rand_augment", "erase", "mixup", "cutmix", "label_smoothing")
    moving = ("rotate", "zoom", "shift", "gamma")
    for name in mixing if segments else moving:
        if getattr(a, name):
            what = "masks" if segments else "labels"
            raise UsageError(f"augment.{name} is not for {what}; there is {', '.join(moving if segments else mixing)}")
    if segments and a.crop == "resized":
        raise UsageError("augment.crop=resized is not for masks: augment.zoom and augment.shift move both")


def augmented(image: Tensor, mask: Tensor, a: MaskAugment) -> tuple[Tensor, Tensor]:
    """image (B, 3, H, W) uint8 -> in [0, 1], and mask (B, H, W) moved in step with it; each pair has its own draws.

    Beyond the picture both are 0. Intensities change in the picture only.
    """
    image = image.float() / 255
    for wanted, dim in ((a.flip, -1), (a.flip_vertical, -2)):
        if wanted:
            turned = torch.rand(len(image), device=image.device) < 0.5
            image = torch.where(turned[:, None, None, None], image.flip(dim), image)
            mask = torch.where(turned[:, None, None], mask.flip(dim), mask)
    if a.moves:
        grid = F.affine_grid(_turns(len(image), image.shape[-2:], a).to(image), image.shape, align_corners=False)
        image = F.grid_sample(image, grid, align_corners=False)
        labels = F.grid_sample(mask[:, None].float(), grid, mode="nearest", align_corners=False)
        mask = labels[:, 0].to(mask.dtype)
    if a.colour:
        bright, contrast = (1 + a.colour * (2 * torch.rand(2, len(image), 1, 1, 1) - 1)).to(image)
        image = ((image - 0.5) * contrast + 0.5) * bright
    image = image.clamp(0, 1)
    if a.gamma:
        image = image ** (a.gamma * (2 * torch.rand(len(image), 1, 1, 1) - 1)).exp().to(image)
    return image, mask


def _turns(count: int, size: Sequence[int], a: MaskAugment) -> Tensor:
    """(B, 2, 3) maps from places of the new picture to the old, in [-1, 1] along both sides."""
    angle, up, x, y = (2 * torch.rand(count) - 1 for _ in range(4))
    angle, scale = angle * math.radians(a.rotate), 1 / (1 + a.zoom * up)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    ratio = size[0] / size[1]  # a circle stays one in pictures that are no squares
    rows = [cos, -sin * ratio, 2 * a.shift * x, sin / ratio, cos, 2 * a.shift * y]
    return torch.stack(rows, -1).view(count, 2, 3)
