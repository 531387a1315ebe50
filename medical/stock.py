"""Networks as trees of stock classes, which MONAI's ConfigParser builds where this package is not installed.

Of a picture's classifier there are three, the first that holds it is taken:
class   timm.create_model, where the head reads what timm's own classifier reads
tokens  torch.nn.Sequential of a timm transformer, a pooling of its tokens and a torch.nn.Linear
graph   what torch.export traced, as a torch.fx.GraphModule: heads and methods that no stock class has
Weights are merged in the first two; in a graph too, unless the method cannot be merged: its branches are then in it.
Of volumes it is MONAI's own class.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.backbones import parse_backbone, parse_options, shipped
from adaptsuite.errors import UsageError
from adaptsuite.export import Job, trace
from adaptsuite.image_heads import LinearHead

GRAPH = "models/network.pt2"
POOLED = {  # part of adaptsuite.features.pooled -> the same in an expression
    "cls": "tokens[:, 0]",
    "mean": "tokens.mean(1)",
    "std": "(tokens.var(1, unbiased=False) + 1e-6).sqrt()",
    "max": "tokens.amax(1)",
}


@dataclass(frozen=True)
class Network:
    """image (B, C, ...) -> calibrated logits (B, K), or of each pixel or voxel (B, K, ...)."""

    form: str  # class, tokens, graph, or the name of MONAI's class
    config: Mapping[str, Any]  # of inference.json: `network_def`, and what that refers to
    state: Mapping[str, Tensor]  # for its load_state_dict
    prefix: str = ""  # of the backbone's own tensors in `state`
    files: Mapping[str, bytes] = field(default_factory=dict)
    normalises: bool = False  # by itself: the image is then in [0, 1]
    packages: tuple[str, ...] = ()  # beside torch, numpy and MONAI


class Calibrated(nn.Module):
    """image (B, 3, H, W) in [0, 1] -> logits (B, K, ...) over the temperature."""

    def __init__(self, model: nn.Module, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image) / self.temperature


def stock_network(job: Job, image: Tensor, merged: bool) -> Network:
    """Of a model of pictures; merged: its adapter is baked. image: (B, 3, H, W) in [0, 1], to trace it with."""
    if merged and isinstance(job.model.head, LinearHead):
        for make in (_classifier, _tokens):
            if (network := make(job)) is not None and _fits(network):
                return network
    return _graph(job, image)


def _classifier(job: Job) -> Network | None:
    backbone, head = job.model.backbone, job.model.head
    own = ("own",) if getattr(backbone, "global_pool", "") != "token" else ("own", "cls")
    target = _timm(job)
    if target is None or len(head.pool) != 1 or head.pool[0] not in own:
        return None
    name = backbone.pretrained_cfg.get("classifier", "head")
    config = {"network_def": {**target, "num_classes": len(job.labels)}}
    return Network("class", config, _state(job, "", f"{name}."), packages=("timm",))


def _tokens(job: Job) -> Network | None:
    backbone, head = job.model.backbone, job.model.head
    if "own" in head.pool or not hasattr(backbone, "forward_features"):
        return None
    target, stem = (_timm(job), {}) if _timm(job) else _embedded(job)
    if target is None:
        return None
    pool = f"$lambda tokens: torch.cat([{', '.join(POOLED[part] for part in head.pool)}], -1)"
    layers = [
        {**target, "num_classes": 0, "global_pool": ""},
        {"_target_": "torchvision.transforms.v2.Lambda", "lambd": pool},
        {"_target_": "torch.nn.Linear", "in_features": head.in_features, "out_features": head.out_features},
    ]
    config = {**stem, "layers": layers, "network_def": "$torch.nn.Sequential(*@layers)"}
    return Network("tokens", config, _state(job, "0.", "2."), "0.", packages=("timm", "torchvision"))


def _timm(job: Job) -> dict[str, Any] | None:
    """The call that makes the backbone's architecture, at its image size; None for what timm has no name for."""
    source, rest = parse_backbone(job.recipe.backbone)
    known = getattr(job.model.backbone, "pretrained_cfg", None) or {}
    if source not in ("timm", "file") or not known.get("architecture"):
        return None
    name, options, _ = (known["architecture"], {}, None) if source == "file" else parse_options(rest)
    sized = getattr(getattr(job.model.backbone, "patch_embed", None), "img_size", None)
    options |= {"img_size": list(sized)} if sized else {}
    return {"_target_": "timm.create_model", "model_name": name.partition(".")[0], "pretrained": False, **options}


def _embedded(job: Job) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """timm's VisionTransformer over a stem of convolutions, as the embedded backbones are, and what it refers to."""
    source, name = parse_backbone(job.recipe.backbone)
    stem = getattr(getattr(job.model.backbone, "patch_embed", None), "backbone", None)
    if source != "embedded" or not isinstance(stem, nn.Sequential):
        return None, {}
    record = shipped(name.partition("-")[0], name)[1]
    embed = {"_target_": "timm.layers.HybridEmbed", "_mode_": "callable", "proj": False}
    target = {
        "_target_": "timm.models.vision_transformer.VisionTransformer",
        **{k: v for k, v in record["config"].items() if k != "stem"},
        "patch_size": 1,
        "dynamic_img_size": True,
        "embed_layer": {**embed, "backbone": "$torch.nn.Sequential(*@stem)"},
    }
    return target, {"stem": [_layer(module) for module in stem]}


def _layer(module: nn.Module) -> dict[str, Any]:
    """One layer of a stem."""
    names = {
        nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding"),
        nn.BatchNorm2d: ("num_features",),
        nn.ReLU: (),
    }[type(module)]
    found = {name: getattr(module, name) for name in names}
    found |= {"bias": module.bias is not None} if isinstance(module, nn.Conv2d) else {}
    found = {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
    return {"_target_": f"torch.nn.{type(module).__name__}", **found}


def _state(job: Job, backbone: str, head: str) -> dict[str, Tensor]:
    """Merged tensors under these prefixes, the temperature within the head's."""
    state = {f"{backbone}{k}": v.detach() for k, v in job.model.backbone.state_dict().items()}
    scale = 1 / (job.record.temperature or 1.0)
    return state | {f"{head}{k}": v.detach() * scale for k, v in job.model.head.state_dict().items()}


def _fits(network: Network) -> bool:
    """Whether the classes take these tensors: timm gives some architectures other norms with another pooling."""
    from monai.bundle import ConfigParser

    try:
        built = ConfigParser(dict(network.config)).get_parsed_content("network_def")
    except RuntimeError:
        return False
    shapes = {k: v.shape for k, v in built.state_dict().items()}
    return shapes == {k: v.shape for k, v in network.state.items()}


def _graph(job: Job, image: Tensor) -> Network:
    program = trace(Calibrated(job.model, job.record.temperature or 1.0).eval(), {"image": image})
    archive = io.BytesIO()
    torch.export.save(program, archive)
    load = f"torch.export.load(@bundle_root + '/{GRAPH}')"
    # constants of the graph lie on the device that it was traced on; its module alone refuses eval()
    config = {
        "traced": f"$move_to_device_pass({load}, str(@device)).module(check_guards=False)",
        "network_def": {"_target_": "torch.fx.GraphModule", "root": "@traced", "graph": "$@traced.graph"},
    }
    module = program.module(check_guards=False)
    state = torch.fx.GraphModule(module, module.graph).state_dict()
    return Network("graph", config, state, files={GRAPH: archive.getvalue()}, normalises=True)


def volume_network(net: nn.Module, name: str, state: Mapping[str, Tensor]) -> Network:
    """MONAI's own class. name: of `load_backbone`.  Raises UsageError where it is not what the name builds."""
    source, rest = parse_backbone(re.sub(r" \(random weights, seed \d+\)$", "", name))
    kind, options, _ = parse_options(rest)
    if source != "monai":
        raise UsageError(f"backbone {name}: bundles of volumes are of monai: networks")
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    config = {"network_def": {"_target_": f"monai.networks.nets.{kind}", **options}}
    network = Network(kind, config, dict(state), packages=("einops", "nibabel"))
    if not _fits(network):
        raise UsageError(f"backbone {name} does not build this {type(net).__name__}: give its options in the name")
    return network
