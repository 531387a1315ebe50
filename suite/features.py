"""What of a backbone's features a head reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError, nearest

POOLS = ("own", "cls", "mean", "std", "max")
ALIASES = {"pool": "mean", "both": "cls+mean"}


@dataclass
class Seen:
    """The final features of a batch: prefix tokens (B, P, D), the others (B, N, D), and the backbone's own pooling."""

    prefix: Tensor
    patches: Tensor
    own: Tensor | None


def see(backbone: nn.Module, image: Tensor, own: bool = False) -> Seen:
    """Features of normalised images (B, 3, H, W), after the final norm; own: also what the backbone itself pools."""
    library = type(backbone).__module__.partition(".")[0]
    if library in ("open_clip", "monai"):
        return (_see_open_clip if library == "open_clip" else _see_monai)(backbone, image, own)
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


def _see_open_clip(tower: nn.Module, image: Tensor, own: bool) -> Seen:
    """own: the embedding that texts are compared with, of another width than the tokens."""
    normed = tower.attn_pool is None  # else the norm stands behind the pooling
    found = tower.forward_intermediates(
        image, 1, normalize_intermediates=normed, intermediates_only=not own, output_fmt="NLC", output_extra_tokens=True
    )
    (prefix,), (patches,) = found["image_intermediates_prefix"], found["image_intermediates"]
    return Seen(prefix, patches, found.get("image_features"))


def _see_monai(vit: nn.Module, image: Tensor, own: bool) -> Seen:
    """MONAI's ViT returns a tuple, whose first item is the head's output where there is a head."""
    tokens, hidden = vit(image)
    tokens, prefix = (vit.norm(hidden[-1]), 1) if vit.classification else (tokens, 0)
    return Seen(tokens[:, :prefix], tokens[:, prefix:], tokens[:, 0] if prefix else tokens.mean(1))


def num_prefix(backbone: nn.Module) -> int:
    """CLS, distillation and register tokens in front of the patches."""
    if isinstance(known := getattr(backbone, "num_prefix_tokens", None), int):
        return known
    from adaptsuite.sites import component_info

    return next((c.num_prefix_tokens for c in component_info(backbone)), 0)


def width(backbone: nn.Module, part: str = "cls") -> int:
    """D of the tokens, or of what the backbone itself pools (part "own")."""
    config = getattr(backbone, "config", None)
    known = getattr(backbone, "num_features", None) or getattr(config, "hidden_size", None)
    if part == "own":
        known = getattr(backbone, "head_hidden_size", None) or getattr(backbone, "output_dim", None) or known
    if not known and type(backbone).__name__ in ("VisionTransformer", "ViT"):  # of open_clip, of MONAI
        from adaptsuite.sites import find_sites

        known = find_sites(backbone, "block")[-1].dim
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
