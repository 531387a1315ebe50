"""Baselines that see the text alone or the image alone: what a question gives away, and what a picture does.

They are trained as the adapter is. Without them an accuracy says nothing of whether words were bound to the image.
"""

from torch import Tensor

BLIND = ("text_only", "image_only")


def blank_of(features: Tensor) -> Tensor:
    """(1, N, D) mean of V (B, N, D): what every picture becomes for the baseline that sees text alone."""
    return features.float().mean(0, keepdim=True)
