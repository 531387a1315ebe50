"""How a backbone sees: the size and normalisation of its images, and what of its features a head reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError, nearest

POOLS = ("own", "cls", "mean", "std", "max")
ALIASES = {"pool": "mean", "both": "cls+mean"}
Fit = Literal["squash", "crop"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]


@dataclass(frozen=True)
class FrontEnd:
    """How a picture becomes the backbone's input; part of every adapter file."""

    size: tuple[int, int] = (224, 224)  # height and width in pixels
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of values in [0, 1]; the input is (x - mean) / std
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    ratio: float = 1.0  # a picture is resized to `ratio` x the input's size; the input is a crop of that
    fit: Fit = "crop"  # crop: the short side is fitted and the middle kept; squash: both sides, whatever their ratio

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise UsageError(f"front_end.ratio is {self.ratio}: pictures are cropped, so at least 1 is needed")
        if not all(s > 0 for s in self.std):
            raise UsageError(f"front_end.std is {self.std}, every value must be above 0")

    @property
    def resized(self) -> tuple[int, int]:
        """Height and width of a picture before the crop."""
        return round(self.size[0] * self.ratio), round(self.size[1] * self.ratio)


def own_front_end(backbone: nn.Module) -> FrontEnd:
    """What the backbone's own configuration says: timm's `pretrained_cfg`, or an image processor's settings."""
    given = getattr(backbone, "adaptsuite_front_end", None)
    if given is not None:
        return FrontEnd(**given)
    if not getattr(backbone, "pretrained_cfg", None):
        return FrontEnd()
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(backbone)
    return FrontEnd(
        size=tuple(config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] in Interpolation.__args__ else "bicubic",
        ratio=1 / config["crop_pct"] if config["crop_pct"] <= 1 else 1.0,
        fit="squash" if config["crop_mode"] == "squash" else "crop",
    )


def with_size(backbone: nn.Module, size: tuple[int, int]) -> None:
    """Makes the backbone take images of `size`: positions are resampled, which its source's fingerprint excepts.

    Raises UsageError for a size that it would cut off or cannot take.
    """
    embed, name = getattr(backbone, "patch_embed", None), type(backbone).__name__
    sides = getattr(embed, "feat_ratio", None)
    for side, step in zip(size, sides(as_scalar=False) if sides else (1, 1), strict=True):
        if side < step or side % step:
            raise UsageError(f"image size {_by(size)}: this {name} cuts patches of {step}, multiples of it are needed")
    before = {k: v.shape for k, v in backbone.state_dict().items()}
    try:
        with torch.no_grad():
            if hasattr(backbone, "set_input_size"):
                backbone.set_input_size(img_size=size)
            _see_shapes(backbone, size)
    except (AssertionError, RuntimeError, ValueError) as e:
        raise UsageError(f"image size {_by(size)}: this {name} cannot take it ({_line(e)})") from e
    source = getattr(backbone, "adaptsuite_source", None)
    after = {k: list(v.shape) for k, v in backbone.state_dict().items()}
    if source is not None:
        source.resized.update({k: shape for k, shape in after.items() if list(before.get(k, ())) != shape})


def _see_shapes(backbone: nn.Module, size: tuple[int, int]) -> None:
    """A forward without values."""
    from adaptsuite.probe import meta_copy

    first = next(p for p in backbone.parameters() if p.ndim == 4)
    image = torch.empty(1, first.shape[1], *size, device="meta")
    see(meta_copy(backbone).eval(), image, own=hasattr(backbone, "forward_head"))


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass
class Seen:
    """The final features of a batch: prefix tokens (B, P, D), the others (B, N, D), and the backbone's own pooling."""

    prefix: Tensor
    patches: Tensor
    own: Tensor | None


def see(backbone: nn.Module, image: Tensor, own: bool = False) -> Seen:
    """Features of normalised images (B, 3, H, W), after the final norm; own: also what the backbone itself pools."""
    if not hasattr(backbone, "forward_features"):  # transformers
        tokens = backbone(pixel_values=image).last_hidden_state
        prefix = 0 if tokens.ndim == 4 else num_prefix(backbone)
        tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
        return Seen(tokens[:, :prefix], tokens[:, prefix:], tokens[:, 0] if prefix else tokens.mean(1))
    x = backbone.forward_features(image)
    pooled = backbone.forward_head(x, pre_logits=True) if own else None
    if x.ndim == 4:
        channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
        x = x.flatten(1, 2) if channels_last else x.flatten(2).transpose(1, 2)
    elif isinstance(getattr(backbone, "norm", None), nn.Identity):  # averaged backbones have their norm behind the mean
        x = getattr(backbone, "fc_norm", nn.Identity())(x)
    prefix = num_prefix(backbone)
    return Seen(x[:, :prefix], x[:, prefix:], pooled)


def num_prefix(backbone: nn.Module) -> int:
    """CLS, distillation and register tokens in front of the patches."""
    if isinstance(known := getattr(backbone, "num_prefix_tokens", None), int):
        return known
    from adaptsuite.sites import component_info

    return next((c.num_prefix_tokens for c in component_info(backbone)), 0)


def width(backbone: nn.Module) -> int:
    """D of the features."""
    known = getattr(backbone, "num_features", None) or getattr(getattr(backbone, "config", None), "hidden_size", None)
    if not known:
        raise UsageError(f"{type(backbone).__name__} does not tell the width of its features")
    return known


def pool_parts(pool: str, backbone: nn.Module) -> tuple[str, ...]:
    """The parts that a head reads, joined by + in `pool`. Raises UsageError for one that is not there."""
    parts = tuple(ALIASES.get(pool, pool).split("+"))
    for part in parts:
        if part not in POOLS:
            raise UsageError(f"head.pool={pool!r}: {part!r} is not known; {nearest(part, (*POOLS, *ALIASES))}")
        if part == "cls" and not num_prefix(backbone):
            raise UsageError(f"head.pool={pool!r}: this {type(backbone).__name__} has no CLS token; take mean or own")
    return parts


def pooled(seen: Seen, parts: Sequence[str]) -> Tensor:
    """(B, D times the parts): own; cls, the first token; mean, std and max over all tokens, CLS and registers too."""
    tokens = torch.cat([seen.prefix, seen.patches], 1)
    forms = {
        "own": lambda: seen.own,
        "cls": lambda: seen.prefix[:, 0],
        "mean": lambda: tokens.mean(1),
        "std": lambda: (tokens.var(1, unbiased=False) + 1e-6).sqrt(),
        "max": lambda: tokens.amax(1),
    }
    return torch.cat([forms[part]() for part in parts], -1)
