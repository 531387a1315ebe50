"""Masks of volumes by MONAI's 3-D networks (UNETR, SwinUNETR): patches to train on, sliding windows to predict with.

Networks come from `load_backbone("monai:SwinUNETR?in_channels=1&out_channels=K")`, adapters by `attach(net, ...,
head="out")`; a network gives K logits a voxel, each class decided on its own as in pictures.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.medical import surface
from adaptsuite.medical.area_rule import PIXEL
from adaptsuite.medical.seg_task import SegmentationTask
from adaptsuite.medical.segmentation import LOSSES, planes
from adaptsuite.medical.volumes import Volume, require_same_grid


class Patches:
    """Map-style data set of `per_volume` random patches of each volume: {"image": (C, d, h, w) float32, "mask":
    (d, h, w) uint8, "present": (K,)}.

    volumes: pairs of a volume, its values scaled for the network, and its mask (0, or k for class k) on the same grid.
    share: of the patches that are centred on a labelled voxel, where there is one. Smaller volumes are padded by 0.
    """

    def __init__(
        self,
        volumes: Sequence[tuple[Volume, Volume]],
        size: tuple[int, int, int],
        num_classes: int = 1,
        per_volume: int = 4,
        share: float = 0.5,
    ):
        for volume, mask in volumes:
            require_same_grid(volume, mask)
        self.volumes, self.size, self.num_classes = list(volumes), tuple(size), num_classes
        self.per_volume, self.share = per_volume, share
        self._labelled = [mask.values.nonzero() for _, mask in volumes]

    def __len__(self) -> int:
        return len(self.volumes) * self.per_volume

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = index // self.per_volume
        volume, mask = self.volumes[number]
        labelled = self._labelled[number]
        if len(labelled) and float(torch.rand(())) < self.share:
            middle = labelled[int(torch.randint(len(labelled), ()))].tolist()
        else:
            middle = [int(torch.randint(n, ())) for n in mask.shape]
        image = volume.values if volume.values.ndim == 4 else volume.values[None]
        corner = [min(max(0, m - s // 2), max(0, n - s)) for m, s, n in zip(middle, self.size, mask.shape, strict=True)]
        image, labels = (_cut(values, corner, self.size) for values in (image, mask.values[None]))
        labels = labels[0].to(torch.uint8)
        present = np.isin(np.arange(1, self.num_classes + 1), labels.numpy()).astype(np.uint8)
        return {"image": image, "item": index, "mask": labels, "present": present}


def _cut(values: Tensor, corner: Sequence[int], size: Sequence[int]) -> Tensor:
    window = tuple(slice(c, c + s) for c, s in zip(corner, size, strict=True))
    found = values[(slice(None), *window)]
    pad = [p for have, want in zip(reversed(found.shape[1:]), reversed(size), strict=True) for p in (0, want - have)]
    return torch.nn.functional.pad(found, pad)


class VolumeTask(SegmentationTask):
    """`SegmentationTask` of patches, which are not augmented."""

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        truth = planes(batch["mask"], len(self.classes))
        return LOSSES[self.head.loss](model(batch["image"]), truth, self.head.smooth)

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        found = model(image).float().sigmoid()
        return (found + model(image.flip(-1)).float().sigmoid().flip(-1)) / 2 if self.tta == "flip" else found


def segment_volume(
    net: nn.Module,
    volume: Volume,
    size: tuple[int, int, int],
    spacing_mm: Sequence[float] | None = None,
    overlap: float = 0.5,
    batch_size: int = 1,
) -> Volume:
    """Probabilities (K, D, H, W) on the volume's own grid, of any size, by windows of `size` that overlap.

    Values are those that the network was trained on (`Volume.windowed`). spacing_mm: of the training; the volume is
    resampled to it and the probabilities back. Windows are weighed by a Gaussian (MONAI's sliding_window_inference).
    """
    from monai.inferers import sliding_window_inference

    if not 0 <= overlap < 1:
        raise UsageError(f"overlap {overlap:g} of windows is not in [0, 1)")
    near = volume if spacing_mm is None else volume.resampled(spacing_mm)
    values = near.values if near.values.ndim == 4 else near.values[None]
    device, training = next(net.parameters()).device, net.training
    net.eval()
    try:
        with torch.no_grad():
            logits = sliding_window_inference(
                values[None].to(device), size, batch_size, net, overlap=overlap, mode="gaussian"
            )
    finally:
        net.train(training)
    found = near.with_values(logits[0].float().sigmoid().cpu())
    return found if spacing_mm is None else found.on_grid(volume, "linear")


def compare_volumes(probabilities: Volume, mask: Volume, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """class -> dice, jaccard, hd95_mm, hd_mm and assd_mm (`surface.compare`) of probabilities above PIXEL."""
    require_same_grid(probabilities, mask)
    truth = mask.values.numpy()
    return {
        name: surface.compare(own.numpy() > PIXEL, truth == k, mask.spacing_mm)
        for k, (name, own) in enumerate(zip(classes, probabilities.values, strict=True), 1)
    }
