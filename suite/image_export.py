"""Adapters of images as models that other tools load, compared with them before they are there.

timm: a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`.  torch, onnx: one file, pixels in, logits
out, the normalisation inside.  peft: LoRA alone.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite import export as exports
from adaptsuite.atomic import write_folder
from adaptsuite.backbones import parse_backbone
from adaptsuite.errors import UsageError
from adaptsuite.export import Job, Writer, agree, write_onnx, write_peft, write_torch
from adaptsuite.image_heads import LinearHead
from adaptsuite.image_task import ImageModel


class Classifier(nn.Module):
    """image (B, 3, H, W) in [0, 1] -> logits (B, K)."""

    def __init__(self, model: ImageModel):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image)


def _graph(write: Callable[..., float]) -> Writer:
    def run(job: Job) -> tuple[float, list[str]]:
        facts = exports.metadata(job, **job.domain.describe(job.model)["front_end"])
        (image,) = job.domain.sample(job.model, 3)
        gap = exports.write_graph(job, write, Classifier(job.model), {"image": image}, facts)
        height, width = job.model.front_end.size
        shape = f"input image (B, {image.shape[1]}, {height}, {width}) float32 in [0, 1], {_prepared(job)}"
        return gap, [f"{shape}; output logits (B, {len(job.labels)}), whose {facts['activation']} are probabilities"]

    return run


def _prepared(job: Job) -> str:
    front = job.model.front_end
    how = {"squash": "resized to", "pad": "padded with black to"}.get(front.fit, "its short side fitted to")
    return f"{how} {front.resized[0]} x {front.resized[1]} ({front.interpolation}), then the middle"


# ---- timm


def _timm(job: Job) -> tuple[float, list[str]]:
    """Merged weights under timm's own names with its config.json, head and labels in it."""
    model = job.model
    name = _only_timm(job)
    (image,) = job.domain.sample(model, 3)
    with torch.no_grad():
        expected = model(image)
    job.handle.bake()
    config = _config(job, name)
    classifier = model.backbone.pretrained_cfg.get("classifier", "head")
    state = dict(model.backbone.state_dict())
    state |= {f"{classifier}.{k}": v for k, v in model.head.state_dict().items()}
    gaps = []

    def write(temp: Path) -> None:
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in state.items()}, temp / "model.safetensors", {"format": "pt"})
        (temp / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        gaps.append(agree(str(job.out), _as_timm_says(temp, model.normalised(image)), expected))

    write_folder(job.out, write)
    return gaps[0], [f'timm.create_model("local-dir:{job.out}", pretrained=True); inputs are {_prepared(job)}']


def _only_timm(job: Job) -> str:
    """The architecture's name in timm. Raises UsageError for what its classifiers cannot hold."""
    source, rest = parse_backbone(job.recipe.backbone)
    method, head, other = job.handle.method, job.model.head, "--format torch and onnx take it"
    known = getattr(job.model.backbone, "pretrained_cfg", None) or {}
    if source not in ("timm", "file") or not known.get("architecture"):
        raise UsageError(f"--format timm: {job.recipe.backbone} is no architecture that timm has a name for; {other}")
    own = ("own",) if getattr(job.model.backbone, "global_pool", "") != "token" else ("own", "cls")
    if not isinstance(head, LinearHead) or len(head.pool) != 1 or head.pool[0] not in own:
        said = "+".join(getattr(head, "pool", ("ifa",)))
        raise UsageError(f"--format timm reads its backbone's own pooling, this head {said}: train with head.pool=own")
    if method.mergeable is not True:
        raise UsageError(f"--format timm needs merged weights, {method.name!r} has none: {method.mergeable}; {other}")
    return known["architecture"] if source == "file" else rest.partition(".")[0]


def _config(job: Job, name: str) -> dict[str, Any]:
    """timm's config.json: architecture, image size, what the input is normalised by, the labels."""
    front, backbone = job.model.front_end, job.model.backbone
    arguments = {"img_size": list(front.size)} if hasattr(getattr(backbone, "patch_embed", None), "img_size") else {}
    return {
        "architecture": name,
        "num_classes": len(job.labels),
        "num_features": backbone.num_features,
        "global_pool": getattr(backbone, "global_pool", "avg"),
        "model_args": arguments,
        "label_names": job.labels,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [len(front.mean), *front.size],
            "fixed_input_size": bool(arguments),
            "interpolation": front.interpolation,
            "crop_pct": 1 / front.ratio,
            "crop_mode": {"squash": "squash", "pad": "border"}.get(front.fit, "center"),
            "mean": list(front.mean),
            "std": list(front.std),
            "num_classes": len(job.labels),
            "first_conv": backbone.pretrained_cfg.get("first_conv"),
            "classifier": backbone.pretrained_cfg.get("classifier", "head"),
        },
    }


def _as_timm_says(folder: Path, image: Tensor) -> Tensor:
    import timm

    with torch.no_grad():
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(image)


# ---- peft


def _peft(job: Job) -> tuple[float, list[str]]:
    model = job.model
    (image,) = job.domain.sample(model)
    gap = write_peft(job.handle, "backbone", job.out, lambda part: part(model.normalised(image)))
    return gap, [f"for {job.recipe.backbone} without its head, which is not in it"]


FORMATS: dict[str, Writer] = {
    "timm": _timm,
    "torch": _graph(write_torch),
    "onnx": _graph(write_onnx),
    "peft": _peft,
}
