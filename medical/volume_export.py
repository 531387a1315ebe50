"""Adapters of MONAI's 3-D networks as MONAI Bundles: NIfTI in, masks on the same grid out.

Such adapters are made in Python (adaptsuite.medical.seg_volume), so they are exported there too:
`export_volumes(attach(net, ...), "out", classes=..., size=...)`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adaptsuite import __version__
from adaptsuite.bank import base_state
from adaptsuite.errors import UsageError
from adaptsuite.host import Handle
from adaptsuite.identity import Source, fingerprint
from adaptsuite.medical import bundle, bundle_tasks
from adaptsuite.medical.area_rule import PIXEL
from adaptsuite.medical.bundle import Bundle
from adaptsuite.medical.card import RESEARCH
from adaptsuite.medical.stock import volume_network


def export_volumes(
    handle: Handle,
    out: str | Path,
    classes: Sequence[str],
    size: tuple[int, int, int],
    codes: str = "SPL",
    window_hu: tuple[float, float] | None = None,
    spacing_mm: Sequence[float] | None = None,
    overlap: float = 0.5,
    modality: str = "n/a",
    apart: bool = False,
) -> dict[str, Any]:
    """Writes a folder for `python -m monai.bundle run`: {"export", "max_difference", "bytes", "notes"}.

    The network is one of `load_backbone("monai:NAME?OPTION=VALUE&...")` with a logit map a class. What it sees is
    `volume.oriented(codes).windowed(window_hu)`, then what `segment_volume` does with size, spacing_mm and overlap.
    apart: the base's weights and the adapter's in two files, and another base is refused.
    Raises UsageError for another network, and where the method cannot be merged into its weights.
    """
    bundle.needs_monai()
    net, method = handle.model, handle.method
    source: Source | None = getattr(net, "adaptsuite_source", None)
    if source is None:
        raise UsageError(f"this {type(net).__name__} does not tell its name: build it by load_backbone('monai:...')")
    if method.mergeable is not True or handle.bank.rests(handle.name):
        raise UsageError(
            f"a bundle of volumes holds MONAI's own class, so the adapter must be in its weights; {method.name!r} "
            f"cannot be: {method.mergeable}; train lora, or another method that merges"
        )
    base = _weights(handle) if handle.adapter.kept is None else dict(handle.adapter.kept)
    image = torch.rand(1, _channels(net), *size, generator=torch.Generator().manual_seed(0))
    training = net.training
    with torch.no_grad():
        expected = net.eval()(image.to(next(net.parameters()).device)).cpu()
    net.train(training)
    if expected.shape[1:] != (len(classes), *size):
        raise UsageError(
            f"{type(net).__name__} gives {tuple(expected.shape[1:])} of a window of {tuple(size)}, {len(classes)} "
            "classes need as many maps of its size"
        )
    handle.merge()
    try:
        network = volume_network(net, source.name, _weights(handle))
    finally:
        handle.unmerge()
    facts = {"version": __version__, "method": method.name, "base": fingerprint(base), "network": network.form}
    name = source.name.partition("@")[0]
    labels, inputs = bundle.channels(classes), bundle.channels([f"channel {i}" for i in range(image.shape[1])])
    mask = bundle.tensor("image", "segmentation", {"0": "label"}, size, dtype="uint8", value_range=[0, len(classes)])
    metadata = bundle.metadata(
        f"Segmentation of volumes: {', '.join(classes)}",
        f"{name} adapted by {method.name}",
        inputs=bundle.tensor("image", "magnitude", inputs, size, modality=modality, is_patch_data=True),
        outputs=bundle.tensor("image", "classes", labels, size, is_patch_data=True),  # logits
        processed=mask,
        packages=network.packages,
        intended_use=RESEARCH,
        adaptsuite=facts,
    )
    own = bundle_tasks.volumes_with_masks(size, codes, window_hu, spacing_mm, overlap)
    seen = f"Axes grow to {codes}; windows of {' x '.join(map(str, size))} voxels, {overlap:g} of each in the next."
    if window_hu:
        seen += (
            f" Values from {window_hu[0] - window_hu[1] / 2:g} to {window_hu[0] + window_hu[1] / 2:g} become 0 to 1."
        )
    if spacing_mm:
        seen += f" Resampled to {' x '.join(f'{v:g}' for v in spacing_mm)} mm, the probabilities back."
    parts = [
        f"# {method.name} on {name}: {', '.join(classes)}",
        RESEARCH,
        bundle.HOW,
        f"## Input\n\nNIfTI files below the folder. {seen}",
        "## Output\n\nNAME_mask.nii.gz on the grid of NAME.nii.gz: 0 where no class is above "
        f"{PIXEL:g}, else the most probable of {', '.join(f'{k} {v}' for k, v in enumerate(classes, 1))}.",
    ]
    made = Bundle(network, base, own, metadata, "\n\n".join(parts) + "\n", name, image, expected)
    gap = bundle.write(out, made, apart)
    return {
        "export": str(out),
        "format": "monai-bundle-adapter" if apart else "monai-bundle",
        "max_difference": gap,
        "bytes": sum(p.stat().st_size for p in Path(out).rglob("*") if p.is_file()),
        "labels": list(classes),
        "notes": [f"in {out}: {bundle.RUN}"],
    }


def _weights(handle: Handle) -> dict[str, torch.Tensor]:
    """The network's tensors as they are now, without adapters."""
    return {k: v.detach().cpu().clone() for k, v in base_state(handle.model).items()}


def _channels(net: torch.nn.Module) -> int:
    return next(p for p in net.parameters() if p.ndim == 5).shape[1]
