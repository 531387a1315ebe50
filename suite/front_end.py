"""How an image backbone sees: the size and the normalisation of its input."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn

from adaptsuite.backbones import load_backbone, parse_options
from adaptsuite.errors import UsageError
from adaptsuite.features import see
from adaptsuite.sites import example_input

Fit = Literal["squash", "crop", "pad"]
Interpolation = Literal["bicubic", "bilinear", "lanczos", "nearest"]


@dataclass(frozen=True)
class FrontEnd:
    """How a picture becomes the backbone's input; part of every adapter file."""

    size: tuple[int, int] = (224, 224)  # height and width in pixels
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of values in [0, 1]; the input is (x - mean) / std
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bicubic"
    ratio: float = 1.0  # a picture is resized to `ratio` x the input's size; the input is a crop of that
    # crop: the short side is fitted and the middle kept; squash: both sides, whatever their ratio; pad: the long side
    # is fitted, the rest is black
    fit: Fit = "crop"

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
    """What the backbone's own configuration says: timm's `pretrained_cfg`, or open_clip's `preprocess_cfg`."""
    given = getattr(backbone, "adaptsuite_front_end", None)
    if given is not None:
        if not set(given) <= {f.name for f in fields(FrontEnd)}:
            name = getattr(getattr(backbone, "adaptsuite_source", None), "name", type(backbone).__name__)
            raise NotForPictures(f"backbone {name} takes no pictures; adapt DOMAIN info lists those of a domain")
        return FrontEnd(**given)
    if type(backbone).__module__.startswith("monai."):
        (image,), _ = example_input(backbone)
        return FrontEnd(size=tuple(image.shape[-2:]))
    if not getattr(backbone, "pretrained_cfg", None):
        return _hub_front_end(backbone)
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


def _hub_front_end(backbone: nn.Module) -> FrontEnd:
    """Of transformers' models: what their folder's preprocessor_config.json says, where there is one."""
    config = getattr(backbone, "config", None)
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    given: dict[str, Any] = {"size": (size, size) if isinstance(size, int) else tuple(size)} if size else {}
    said = preprocessor(getattr(getattr(backbone, "adaptsuite_source", None), "name", ""))
    given |= {key: tuple(said[f"image_{key}"]) for key in ("mean", "std") if f"image_{key}" in said}
    if said:
        given["interpolation"] = {0: "nearest", 1: "lanczos", 2: "bilinear"}.get(said.get("resample"), "bicubic")
        given["fit"] = "crop" if said.get("do_center_crop") else "squash"
    return FrontEnd(**given)


def preprocessor(name: str) -> dict[str, Any]:
    """The values of a hf: or file: backbone's preprocessor_config.json; none of a model that has no such file."""
    source, _, rest = name.removesuffix(")").partition(" (")[0].partition(":")
    if source not in ("hf", "file"):
        return {}
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(parse_options(rest)[0])[0]
    except OSError:
        return {}
    except ValueError as e:
        raise UsageError(f"{name}: its preprocessor_config.json cannot be read ({_line(e)})") from e


class NotForPictures(UsageError):
    """A network that takes no pictures, or gives no tokens to read: volumes, bags, maps."""


def image_tower(model: nn.Module) -> nn.Module:
    """The model; of one with towers for images and texts the image tower, which knows its preprocessing.

    Raises NotForPictures for a tower that is no transformer, and for networks that do not read pictures of 3 channels.
    """
    kind, library = type(model).__name__, type(model).__module__.partition(".")[0]
    for name in ("image_encoder", "vision_model"):  # of a pair, of transformers' two towers
        if isinstance(getattr(model, name, None), nn.Module):
            return getattr(model, name)
    if library == "monai":
        embed = getattr(getattr(model, "patch_embedding", None), "patch_embeddings", None)
        if kind != "ViT" or not isinstance(embed, nn.Conv2d) or embed.in_channels != 3:
            raise NotForPictures(
                f"monai's {kind} as it is here reads no pictures into tokens; "
                "a ViT does: monai:ViT?spatial_dims=2&in_channels=3&img_size=224,224&patch_size=16,16"
            )
    if library != "open_clip" or not hasattr(model, "visual"):
        return model
    tower, config = model.visual, model.visual.preprocess_cfg
    tower = getattr(tower, "trunk", tower)  # open_clip's wrapper of a timm model
    if not hasattr(tower, "forward_features") and not hasattr(tower, "transformer"):
        raise NotForPictures(f"open_clip's {type(tower).__name__} is no transformer: its features cannot be read here")
    size = config["size"]
    tower.adaptsuite_front_end = {
        "size": (size, size) if isinstance(size, int) else tuple(size),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "fit": {"shortest": "crop", "longest": "pad"}.get(config["resize_mode"], "squash"),
    }
    return tower


def load(
    name: str,
    *,
    size: int | Sequence[int] | None = None,
    random_weights: bool = False,
    seed: int = 0,
    **changes: object,
) -> tuple[nn.Module, FrontEnd]:
    """A backbone for images of `size` (None: as it was trained), and how it sees. changes: other fields of FrontEnd."""
    backbone = load_backbone(name, random_weights=random_weights, seed=seed, part=image_tower)
    own = own_front_end(backbone)
    size = own.size if size is None else (size, size) if isinstance(size, int) else tuple(size)
    front = replace(own, size=size, **changes)
    if front.size != own.size:
        with_size(backbone, front.size)
    return backbone, front


def with_size(backbone: nn.Module, size: tuple[int, int]) -> None:
    """Makes the backbone take images of `size`: positions are resampled, which its source's fingerprint excepts.

    Raises UsageError for a size that it would cut off or cannot take.
    """
    embed, name = getattr(backbone, "patch_embed", None), type(backbone).__name__
    sides, open_clip = getattr(embed, "feat_ratio", None), hasattr(backbone, "ln_post")
    steps = sides(as_scalar=False) if sides else backbone.patch_size if open_clip else (1, 1)
    for side, step in zip(size, steps, strict=True):
        if side < step or side % step:
            raise UsageError(f"image size {_by(size)}: this {name} cuts patches of {step}, multiples of it are needed")
    before = {k: v.shape for k, v in backbone.state_dict().items()}
    try:
        with torch.no_grad():
            if hasattr(backbone, "set_input_size"):
                backbone.set_input_size(img_size=size)
            if open_clip:
                _resample_positions(backbone, size)
            _see_shapes(backbone, size)
    except (AssertionError, RuntimeError, ValueError) as e:
        raise UsageError(f"image size {_by(size)}: this {name} cannot take it ({_line(e)})") from e
    source = getattr(backbone, "adaptsuite_source", None)
    after = {k: list(v.shape) for k, v in backbone.state_dict().items()}
    if source is not None:
        source.resized.update({k: shape for k, shape in after.items() if list(before.get(k, ())) != shape})


def _resample_positions(tower: nn.Module, size: tuple[int, int]) -> None:
    from open_clip.model import resize_pos_embed

    tower.image_size, key = size, "visual.positional_embedding"
    tower.grid_size = tuple(side // step for side, step in zip(size, tower.patch_size, strict=True))
    state = {key: tower.positional_embedding.detach()}
    resize_pos_embed(state, SimpleNamespace(visual=tower))
    tower.positional_embedding = nn.Parameter(state[key])


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
