"""Contrastive training of two towers (Radford et al. 2021, arXiv:2103.00020, figure 3) with many captions an image."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(logits: Tensor, images: Tensor) -> Tensor:
    """Symmetric cross-entropy of pairs: row i of logits (B, B) against every caption, column i against every image.

    images: (B,) which image each pair is of. A further caption of an image is right for it too, so pairs of one image
    are no negatives of each other; with one caption an image this is CLIP's loss.
    """
    same = images[:, None] == images[None]
    others = same & ~torch.eye(len(images), dtype=torch.bool, device=images.device)
    logits, own = logits.masked_fill(others, float("-inf")), torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
