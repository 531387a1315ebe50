"""`adapt medical export`: MONAI Bundles, and the formats of `adaptsuite.image_export`.

monai-bundle          stock network classes, merged weights, MONAI's own transforms and handlers
monai-bundle-adapter  the same, the weights apart: those of the base, and what the adapter changes in them (small)
Both run by `python -m monai.bundle run` where this package is not installed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adaptsuite import __version__
from adaptsuite import export as exports
from adaptsuite.backbones import parse_backbone
from adaptsuite.errors import UsageError
from adaptsuite.export import Job, Writer
from adaptsuite.identity import fingerprint
from adaptsuite.image_export import FORMATS as IMAGE_FORMATS
from adaptsuite.images import SUFFIXES
from adaptsuite.medical import bundle, bundle_tasks
from adaptsuite.medical.area_rule import PIXEL
from adaptsuite.medical.bundle import Bundle
from adaptsuite.medical.card import RESEARCH
from adaptsuite.medical.findings import CARD
from adaptsuite.medical.pipeline import DOMAIN, SEGMENTATION
from adaptsuite.medical.stock import Network, stock_network

NETWORKS = {
    "class": "timm.create_model with the adapter in its weights",
    "tokens": "a timm transformer, a pooling and a linear layer, all stock classes, with the adapter in their weights",
    "graph": "a graph of torch.export, as no stock class is this network: it needs the named version of torch or newer",
}


def export(folder: str | Path, format: str, out: str | Path) -> dict[str, Any]:
    """Writes a medical adapter as one of FORMATS, as `adaptsuite.export.export` says."""
    return exports.export(DOMAIN, FORMATS, folder, format, out)


def _merged(job: Job) -> tuple[float, list[str]]:
    """Form A."""
    method = job.handle.method
    made = _bundle(job)
    notes = [f"in {job.out}: {bundle.RUN}", f"network: {NETWORKS[made.network.form]}"]
    if method.mergeable is not True:
        notes.append(f"{method.name} is not merged ({method.mergeable}): the graph holds its branches")
    return bundle.write(job.out, made), notes


def _apart(job: Job) -> tuple[float, list[str]]:
    """Form B."""
    method, other = job.handle.method, "--format monai-bundle takes it"
    if not _bakes(job):
        reason = "its merge leaves something to each sample" if method.mergeable is True else method.mergeable
        raise UsageError(
            f"--format monai-bundle-adapter keeps what an adapter changes in weights, {method.name!r} is more than "
            f"that: {reason}; {other}"
        )
    made = _bundle(job)
    if made.network.form == "graph":
        raise UsageError(
            f"--format monai-bundle-adapter needs a network of stock classes, {made.backbone} with its head has none; "
            f"{other}"
        )
    gap = bundle.write(job.out, made, apart=True)
    adapter, base = ((job.out / name).stat().st_size / 1e6 for name in (bundle.ADAPTER, bundle.BASE))
    size = f"{bundle.ADAPTER} {adapter:.2f} MB, {bundle.BASE} {base:.2f} MB: no other base is taken"
    return gap, [f"in {job.out}: {bundle.RUN}", size]


FORMATS: dict[str, Writer] = {"monai-bundle": _merged, "monai-bundle-adapter": _apart, **IMAGE_FORMATS}


def _bakes(job: Job) -> bool:
    """Whether weights alone can hold it."""
    return job.handle.method.mergeable is True and not job.handle.bank.rests(job.handle.name)


def _bundle(job: Job) -> Bundle:
    """The adapter is baked where it can be. Raises UsageError for what MONAI would misread."""
    bundle.needs_monai()
    model, name, merged = job.model, job.handle.method.name, _bakes(job)
    (image,), base = job.domain.sample(model, 3), _base(job)
    with torch.no_grad():
        expected = model(image) / (job.record.temperature or 1.0)
    if merged:
        job.handle.bake()
    network = stock_network(job, image, merged)
    if not network.normalises:
        image = model.normalised(image)
    facts = _facts(job, name, network, fingerprint(base))
    front, labels, task = model.front_end, bundle.channels(job.labels), job.recipe.data.task
    if task == SEGMENTATION:
        outputs = bundle.tensor("image", "classes", labels, front.size)  # logits
        processed = bundle.tensor("image", "segmentation", {"0": "label"}, ["*", "*"], dtype="uint8")
        what, own = "Masks", bundle_tasks.pictures_with_masks(front)
    else:
        outputs = bundle.tensor("tuples", "classes", labels, [])  # logits
        processed = bundle.tensor("probabilities", "classes", labels, [], value_range=[0, 1])
        what, own = "Labels", bundle_tasks.classification(front, task == "multilabel", network.normalises)
    metadata = bundle.metadata(
        f"{what} of pictures: {', '.join(job.labels)}",
        f"{_backbone(job)} adapted by {name}",
        inputs=bundle.tensor("image", "magnitude", bundle.channels(["red", "green", "blue"]), front.size),
        outputs=outputs,
        processed=processed,
        packages=network.packages,
        intended_use=RESEARCH,
        adaptsuite=facts,
    )
    return Bundle(network, base, own, metadata, _readme(job, facts), _backbone(job), image, expected)


def _base(job: Job) -> dict[str, torch.Tensor]:
    """The backbone's own tensors before the adapter."""
    kept = job.handle.adapter.kept
    state = job.model.state_dict() if kept is None else kept
    return {k.removeprefix("backbone."): v.detach().clone() for k, v in state.items() if k.startswith("backbone.")}


def _facts(job: Job, method: str, network: Network, base: str) -> dict[str, Any]:
    """What metadata.json says beyond MONAI's own keys; thresholds are of the probabilities that the bundle writes."""
    record = job.record
    points = record.threshold if isinstance(record.threshold, Mapping) else {}
    wanted = ("value", "target", "pixel")
    return {
        "version": __version__,
        "method": method,
        "recipe_hash": record.recipe_hash,
        "base": record.base["fingerprint"],  # as its source stores it
        "base_as_loaded": base,  # float32, positions at this image size: that of models/base.pt
        "network": network.form,
        "activation": "softmax" if job.recipe.data.task == "multiclass" else "sigmoid",
        "temperature": record.temperature,  # the network's logits are divided by it already
        "thresholds": {name: {k: point[k] for k in wanted if k in point} for name, point in points.items()},
    }


def _readme(job: Job, facts: Mapping[str, Any]) -> str:
    """How the bundle is run and what it says, then the model card of the adapter's run where there is one."""
    resized = job.domain.describe(job.model)["input"].partition(";")[0]
    views = job.recipe.front_end.get("tta", "none")
    parts = [
        f"# {facts['method']} on {_backbone(job)}: {', '.join(job.labels)}",
        RESEARCH,
        bundle.HOW,
        "## Input",
        f"Pictures ({', '.join(SUFFIXES)}) below the folder: {resized}. Frames of DICOM files and slices of volumes "
        "must be pictures first.",
        *([f"The adapter averages over views ({views}), the bundle takes one."] if views != "none" else []),
        "## Output",
        *(_masks(job, facts) if job.recipe.data.task == SEGMENTATION else _labels(job, facts)),
        "## Network",
        f"{NETWORKS[facts['network']]}.",
    ]
    run = job.record.folder.absolute().parent
    card = next((folder / CARD for folder in (run, run.parent) if (folder / CARD).is_file()), None)
    if card is not None:
        parts.append(card.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def _labels(job: Job, facts: Mapping[str, Any]) -> list[str]:
    temperature, kind = facts["temperature"], facts["activation"]
    calibrated = f"calibrated at temperature {temperature:.3f}" if temperature else "not calibrated"
    points = [
        f"- {name}: positive at or above {point['value']:.4f} ({point['target']} on validation rows)."
        for name, point in facts["thresholds"].items()
        if point["value"] is not None
    ]
    return [
        f"`predictions.csv`: a row a picture, a probability a class ({', '.join(job.labels)}; {kind}, {calibrated}).",
        "\n".join(points) or "No threshold was chosen.",
    ]


def _masks(job: Job, facts: Mapping[str, Any]) -> list[str]:
    named = ", ".join(f"{k} {name}" for k, name in enumerate(job.labels, 1))
    rules = [
        f"- {name}: there where at least {point['value']:.4g} of the pixels are above {point['pixel']:g}."
        for name, point in facts["thresholds"].items()
    ]
    return [
        f"`NAME_mask.png` at the size of each picture: 0 where no class is above {PIXEL:g}, else the most probable of "
        f"{named}.",
        "\n".join(rules) or "No rule was chosen for how much of a class counts as a finding.",
    ]


def _backbone(job: Job) -> str:
    """Its name; of a folder or file only that it is one."""
    source, name = parse_backbone(job.recipe.backbone)
    local = source == "file" or Path(name).exists() or "@" in name
    return f"a local {source} model" if local else job.recipe.backbone
