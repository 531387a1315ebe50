"""Segmentation on any image backbone: heads that read the maps behind its blocks, and their losses.

A mask holds 0 for background and k for class k; a head gives one logit map a class at the input's resolution, and each
class is decided on its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.features import num_prefix
from adaptsuite.front_end import FrontEnd
from adaptsuite.grid import to_map
from adaptsuite.image_task import HeadSettings
from adaptsuite.sites import BANK, find_sites, patch_maps

LEVELS = {"linear": 1, "unet": 4}  # maps that are read where `after` is not said
GROUPS = 8  # of its norms: they have no running statistics, so small batches and training mode change nothing
STEEPEST = 4  # channels double with each level, up to so many times `width`


@dataclass(frozen=True)
class MaskHead(HeadSettings):
    """Section `head` of a recipe; unet and what stands below it are for segmentation."""

    kind: Literal["linear", "ifa", "unet"] = "linear"
    after: tuple[int, ...] = ()  # masks: read behind so many blocks (FetalCLIP: 6,8,12,24); none: 4 or the last
    width: int = 32  # unet: channels at the input's resolution
    loss: Literal["dice", "dice_ce"] = "dice_ce"
    smooth: float = 1.0  # of the Dice loss, in pixels

    def require_labels(self) -> None:
        """Raises UsageError for settings of masks."""
        plain = MaskHead()
        for name in ("after", "width", "loss", "smooth"):
            if getattr(self, name) != getattr(plain, name):
                raise UsageError(f"head.{name} is for masks: add --set data.task=segmentation")
        if self.kind == "unet":
            raise UsageError("head.kind=unet gives masks: add --set data.task=segmentation")

    def __post_init__(self) -> None:
        if self.width < GROUPS or self.width % GROUPS:
            raise UsageError(f"head.width={self.width}: a multiple of {GROUPS} is needed")
        if not self.smooth > 0:
            raise UsageError(f"head.smooth={self.smooth:g}: a number above 0, or empty masks divide by 0")


class Taps:
    """Where a backbone's maps (B, D, h, w) are taken from: behind some of its blocks, or timm's stages without blocks.

    after: how many blocks lie before each; none: `levels` of them evenly up to the last. Hooks last one forward only,
    so that they see what adapters have done, whenever those came.
    """

    def __init__(self, backbone: nn.Module, after: Sequence[int] = (), levels: int = 4):
        try:
            sites = find_sites(backbone, "block")
        except LookupError:
            sites = []
        images = patch_maps(backbone)
        sites = [s for s in sites if not images or s.component in images]  # one tower of two may read text
        self.batch_first, self.stages = all(s.batch_first for s in sites), not sites
        if self.stages:
            stages = getattr(backbone, "feature_info", None)
            if stages is None or not hasattr(backbone, "forward_intermediates"):
                raise UsageError(
                    f"{type(backbone).__name__} has neither transformer blocks nor timm's stages: no masks can be read"
                )
            dims = [stage["num_chs"] for stage in stages]
        else:
            dims = [s.dim for s in sites]
        self.after = _spread(after, len(dims), levels)
        self.dims = [dims[n - 1] for n in self.after]
        self.paths = [] if self.stages else [sites[n - 1].path for n in self.after]
        self.patches = next(iter(images.values()), None)
        self.prefix = num_prefix(backbone)

    def __call__(self, backbone: nn.Module, image: Tensor, shrunk: Any = None) -> list[Tensor]:
        """Maps of normalised images (B, 3, H, W), from early to late.

        shrunk: (number of blocks) -> grid behind them, where an adapter joins tokens; None: no adapter does.
        """
        if self.stages:
            wanted = [n - 1 for n in self.after]
            return backbone.forward_intermediates(image, indices=wanted, intermediates_only=True)
        caught: dict[str, Tensor] = {}

        def keep(path: str):
            return lambda module, args, output: caught.__setitem__(path, output[0] if _several(output) else output)

        watched = [*self.paths, *([self.patches] if self.patches else [])]
        hooks = [backbone.get_submodule(path).register_forward_hook(keep(path)) for path in dict.fromkeys(watched)]
        try:
            run(backbone, image)
        finally:
            for hook in hooks:
                hook.remove()
        patches = caught.get(self.patches)
        grid = tuple(patches.shape[2:]) if patches is not None and patches.ndim == 4 else None
        grids = [shrunk(n) if shrunk else grid for n in self.after]
        return [self._map(caught[path], own) for path, own in zip(self.paths, grids, strict=True)]

    def _map(self, tokens: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        if tokens.ndim == 3 and not self.batch_first:
            tokens = tokens.transpose(0, 1)
        # prompts stand between the prefix and the patches
        more = max(0, tokens.shape[1] - self.prefix - grid[0] * grid[1]) if tokens.ndim == 3 and grid else 0
        return to_map(tokens, self.prefix + more, grid)[1]


def _spread(after: Sequence[int], depth: int, levels: int) -> list[int]:
    if not after:
        return sorted({max(1, round(depth * (i + 1) / levels)) for i in range(levels)})
    if list(after) != sorted(set(after)) or not 1 <= after[0] <= after[-1] <= depth:
        raise UsageError(f"head.after={','.join(map(str, after))}: rising numbers of 1 to {depth} blocks are expected")
    return list(after)


def _several(output: Any) -> bool:
    return isinstance(output, tuple | list)


def run(backbone: nn.Module, image: Tensor) -> None:
    """One forward of an image backbone of timm, transformers, open_clip or MONAI."""
    if hasattr(backbone, "forward_features"):
        backbone.forward_features(image)
    elif hasattr(backbone, "config"):
        backbone(pixel_values=image)
    else:
        backbone(image)


# ---- heads


class LinearMasks(nn.Module):
    """A 1x1 convolution on the normalised last map, then bilinear (the linear head of arXiv:2312.02366)."""

    def __init__(self, dims: Sequence[int], num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(dims[-1])
        self.dense = nn.Conv2d(dims[-1], num_classes, 1)
        nn.init.trunc_normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, maps: Sequence[Tensor], image: Tensor) -> Tensor:
        return _to(self.dense(_normed(self.norm, maps[-1])), image.shape[2:])


class UNetMasks(nn.Module):
    """A 2-D UNETR (arXiv:2103.10504, figure 2, as FetalCLIP-IQA has it): from the last map up to the image itself.

    Of maps from early to late, number i of them is brought to 1 / 2^(i + 1) of the input's sides, whatever grid it has,
    and joined on the way up; the image joins at full resolution. Bilinear steps stand in place of transposed
    convolutions, since patches of 14 or 16 pixels have no power of two in common, and GroupNorm in place of
    InstanceNorm, which would take out how bright a whole map is.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, width: int = 32, channels: int = 3):
        super().__init__()
        widths = [width * min(2 ** (i + 1), STEEPEST) for i in range(len(dims))]
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.reduce = nn.ModuleList(nn.Conv2d(dim, wide, 1) for dim, wide in zip(dims, widths, strict=True))
        below = [*widths[1:], 0]
        self.blocks = nn.ModuleList(_Block(own + under, own) for own, under in zip(widths, below, strict=True))
        self.stem = _Block(channels, width)
        self.last = _Block(width + widths[0], width)
        self.dense = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps: Sequence[Tensor], image: Tensor) -> Tensor:
        x = None
        for i in reversed(range(len(maps))):
            own = self.reduce[i](_normed(self.norms[i], maps[i]))
            size = [-(-side // 2 ** (i + 1)) for side in image.shape[2:]]
            if x is None:  # no finer than the backbone saw it
                size = [min(side, have) for side, have in zip(size, own.shape[2:], strict=True)]
            own = _to(own, size)
            x = self.blocks[i](own if x is None else torch.cat([own, _to(x, size)], 1))
        return self.dense(self.last(torch.cat([self.stem(image), _to(x, image.shape[2:])], 1)))


class _Block(nn.Module):
    """Two 3x3 convolutions around a residual path."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, out), nn.GroupNorm(GROUPS, out)
        self.around = nn.Conv2d(dim, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(self.conv1(x)), 0.01)
        return F.leaky_relu(self.norm2(self.conv2(y)) + self.around(x), 0.01)


def _normed(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Over the channels of (B, D, h, w)."""
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _to(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class SegmentationModel(nn.Module):
    """image (B, 3, H, W) in [0, 1] -> logits (B, K, H, W): normalisation, backbone, head."""

    linear_head = None  # none ends it that a logistic regression on pooled features could start

    def __init__(self, backbone: nn.Module, front_end: FrontEnd, num_classes: int, head: MaskHead | None = None):
        super().__init__()
        head = head or MaskHead()
        if head.kind not in LEVELS:
            raise UsageError(f"head.kind={head.kind} gives no masks: take {' or '.join(LEVELS)}")
        if head.kind == "linear" and len(head.after) > 1:
            raise UsageError(f"head.after={','.join(map(str, head.after))}: a linear head reads one map")
        self.front_end, self.backbone = front_end, backbone
        for name in ("mean", "std"):
            value = torch.tensor(getattr(front_end, name)).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.taps = Taps(backbone, head.after, LEVELS[head.kind])
        if head.kind == "linear":
            self.head = LinearMasks(self.taps.dims, num_classes)
        else:
            self.head = UNetMasks(self.taps.dims, num_classes, head.width, len(front_end.mean))

    def forward(self, image: Tensor, embedding: bool = False) -> Tensor:
        """embedding: the mean of the last map (B, D) instead of logits."""
        image = (image - self.mean) / self.std
        maps = self.taps(self.backbone, image, self._shrunk())
        return maps[-1].mean((2, 3)) if embedding else self.head(maps, image)

    def _shrunk(self):
        """Grid behind a number of blocks, where an adapter joins tokens (adaptsuite.grid); None where none does."""
        bank = self._modules.get(BANK)
        if bank is None or not bank.shrinks:
            return None
        blocks = find_sites(self, "block")

        def grid(number: int) -> tuple[int, ...] | None:
            behind = number < len(blocks)
            return bank.grid_at(blocks[number]) if behind else bank.final_grid(blocks[-1].component)

        return grid


# ---- losses


def planes(mask: Tensor, num_classes: int) -> Tensor:
    """(B, K, ...) float32 zeros and ones of label maps (B, ...)."""
    values = torch.arange(1, num_classes + 1, device=mask.device).view(1, -1, *[1] * (mask.ndim - 1))
    return (mask[:, None] == values).float()


def dice_loss(logits: Tensor, truth: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - (2 sum p t + s) / (sum p + sum t + s), sums over the pixels of one image and class, the mean over (B, K).

    logits, truth: (B, K, ...).  An empty mask costs P / (P + s) where P pixels are predicted, so that it has a
    gradient; with the s of 1e-5 of MONAI's DiceLoss it costs 1 whatever is predicted.
    """
    p, dims = logits.float().sigmoid(), tuple(range(2, logits.ndim))
    both, sizes = (p * truth).sum(dims), p.sum(dims) + truth.sum(dims)
    return (1 - (2 * both + smooth) / (sizes + smooth)).mean()


def dice_ce_loss(logits: Tensor, truth: Tensor, smooth: float = 1.0) -> Tensor:
    """`dice_loss` plus the binary cross-entropy of all pixels and classes."""
    return dice_loss(logits, truth, smooth) + F.binary_cross_entropy_with_logits(logits.float(), truth)


LOSSES = {"dice": dice_loss, "dice_ce": dice_ce_loss}
