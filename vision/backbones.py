"""The small vision backbones that ship with the package."""

from functools import partial

import torch
from torch import nn

from adaptsuite.backbones import shipped

EMBEDDED_POOL = "cls+mean+std"  # of the final norm's tokens, CLS among them: the read-out that its probes are judged by


def embedded(name: str, random_weights: bool = False) -> nn.Module:
    """A backbone that ships with the package: a stock timm VisionTransformer in the precision that its file stores.

    random_weights: fresh ones, whose BatchNorm statistics are taken from generated images; without them a random
    network is an unfairly weak baseline.
    """
    from safetensors.torch import load

    data, record = shipped("vision", name)
    model = vision_transformer(record["config"])
    if random_weights:
        calibrate(model, record["pretrained_cfg"])
    else:
        state = load(data)
        model.to(state["cls_token"].dtype).load_state_dict(state)
    tuples = {key: tuple(v) if isinstance(v, list) else v for key, v in record["pretrained_cfg"].items()}
    model.pretrained_cfg = model.default_cfg = tuples  # JSON has lists, timm wants tuples
    model.adaptsuite_pool = EMBEDDED_POOL
    return model


def vision_transformer(config: dict) -> nn.Module:
    """timm's VisionTransformer over a convolutional stem, without a head; any image size, positions are interpolated.

    config: its own arguments, and "stem": (features, kernel, stride, padding) of each convolution. The last one has a
    bias, those before it BatchNorm and ReLU.
    """
    from timm.layers import HybridEmbed
    from timm.models.vision_transformer import VisionTransformer

    arguments = {k: v for k, v in config.items() if k != "stem"}
    embed = partial(HybridEmbed, backbone=conv_stem(config["stem"]), proj=False)
    return VisionTransformer(patch_size=1, num_classes=0, embed_layer=embed, dynamic_img_size=True, **arguments)


def conv_stem(shape: list[tuple[int, int, int, int]], channels: int = 3) -> nn.Sequential:
    layers = []
    for features, kernel, stride, padding in shape[:-1]:
        conv = nn.Conv2d(channels, features, kernel, stride, padding, bias=False)
        layers += [conv, nn.BatchNorm2d(features), nn.ReLU()]
        channels = features
    features, kernel, stride, padding = shape[-1]
    return nn.Sequential(*layers, nn.Conv2d(channels, features, kernel, stride, padding))


@torch.no_grad()
def calibrate(model: nn.Module, cfg: dict, images: int = 64, seed: int = 0) -> None:
    """Sets the statistics of every BatchNorm to those of generated images, in place; the model is left in eval mode."""
    from adaptsuite.vision.synthetic import sample_images

    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain average
    x = sample_images(images, cfg["input_size"][-1], seed).float() / 255
    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    model.train()((x - mean) / std)
    for m, momentum in zip(norms, kept, strict=True):
        m.momentum = momentum
    model.eval()
