"""What is done to training pictures: each draws for itself."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from adaptsuite.images import crop


@dataclass(frozen=True)
class Augment:
    """Section `augment` of a recipe: what happens to training pictures."""

    crop: Literal["random", "resized", "middle"] = "random"  # a window of the input's size; resized: of any size
    flip: bool = True  # left and right, half of the pictures
    flip_vertical: bool = False
    rand_augment: int = 0  # operations on each picture (arXiv:1909.13719); 0: off
    magnitude: int = 9  # of those, 0 to 30
    colour: float = 0.0  # brightness, contrast and saturation by up to this share
    erase: float = 0.0  # probability that a rectangle is blanked
    mixup: float = 0.0  # alpha of the Beta distribution (arXiv:1710.09412); 0: off
    cutmix: float = 0.0  # the same for patches of another picture (arXiv:1905.04899); with both, one of them at random
    label_smoothing: float = 0.0  # share of the target given to all classes alike; to 1/2 each for several labels

    def drawn(self, slack: bool) -> list[str]:
        """Fields that draw at random. slack: whether pictures are larger than the input."""
        names = ("flip", "flip_vertical", "rand_augment", "colour", "erase", "mixup", "cutmix")
        crops = self.crop == "resized" or (self.crop == "random" and slack)
        return ["crop"] * crops + [name for name in names if getattr(self, name)]


def augment(image: Tensor, size: tuple[int, int], a: Augment) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, *size) in [0, 1], each picture with draws of its own."""
    if not a.drawn(slack=tuple(image.shape[-2:]) != tuple(size)):
        return crop(image, size).float() / 255
    return torch.stack([_augmented(picture, size, a) for picture in image])


def _augmented(picture: Tensor, size: tuple[int, int], a: Augment) -> Tensor:
    from torchvision.transforms import v2

    if a.crop == "resized":
        picture = v2.RandomResizedCrop(size, antialias=True)(picture)
    elif a.crop == "middle":
        picture = crop(picture, size)
    else:
        slack = [have - want for have, want in zip(picture.shape[-2:], size, strict=True)]
        corner = [int(torch.randint(n + 1, ())) for n in slack]
        picture = crop(picture, size, *corner)
    if a.flip and torch.rand(()) < 0.5:
        picture = picture.flip(-1)
    if a.flip_vertical and torch.rand(()) < 0.5:
        picture = picture.flip(-2)
    if a.rand_augment:
        picture = v2.RandAugment(a.rand_augment, a.magnitude)(picture)
    if a.colour:
        picture = v2.ColorJitter(a.colour, a.colour, a.colour)(picture)
    picture = picture.float() / 255
    return v2.RandomErasing(a.erase)(picture) if a.erase else picture


def mix(image: Tensor, target: Tensor, a: Augment) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix of a batch with itself in another order; target (B, K) shares."""
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(a, kind)]
    if not kinds or len(image) < 2:
        return image, target
    kind = kinds[int(torch.randint(len(kinds), ()))]
    alpha, other = getattr(a, kind), torch.randperm(len(image), device=image.device)
    share = float(np.random.beta(alpha, alpha))
    if kind == "mixup":
        image = share * image + (1 - share) * image[other]
    else:
        h, w = image.shape[-2:]
        tall, wide = (round(side * math.sqrt(1 - share)) for side in (h, w))
        top, left = int(torch.randint(h - tall + 1, ())), int(torch.randint(w - wide + 1, ()))
        image = image.clone()
        window = (..., slice(top, top + tall), slice(left, left + wide))
        image[window] = image[other][window]
        share = 1 - tall * wide / (h * w)
    return image, share * target + (1 - share) * target[other]
