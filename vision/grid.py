"""Where each token of a backbone lies on the image, also where adapters join tokens on the way (adaptsuite.grid)."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.bank import Bank
from adaptsuite.errors import UsageError
from adaptsuite.features import see
from adaptsuite.grid import Shrink
from adaptsuite.sites import Component, component_info, find_sites, patch_maps


@dataclass(frozen=True)
class Place:
    """Where a grid of tokens lies: its sides, the first token's middle and the step to the next, in pixels (y, x)."""

    grid: tuple[int, int]
    first: tuple[float, float]
    step: tuple[float, float]

    @classmethod
    def over(cls, size: Sequence[int], grid: Sequence[int]) -> "Place":
        """Cells that cover an image of height and width `size`."""
        step = tuple(side / n for side, n in zip(size, grid, strict=True))
        return cls(tuple(grid), tuple(s / 2 for s in step), step)

    def joined(self, shrink: Shrink) -> "Place":
        """Behind a convolution over the grid: each new token lies where the middle of its kernel was."""
        starts = [shrink.middles(n).start for n in self.grid]
        first = tuple(f + start * s for f, start, s in zip(self.first, starts, self.step, strict=True))
        return Place(shrink.of(self.grid), first, tuple(s * shrink.stride for s in self.step))

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of the tokens' cells, as matplotlib's imshow takes it."""
        (top, bottom), (left, right) = (
            (f - s / 2, f + (n - 0.5) * s) for f, s, n in zip(self.first, self.step, self.grid, strict=True)
        )
        return left, right, bottom, top

    def spread(self, values: np.ndarray, size: Sequence[int]) -> np.ndarray:
        """(h, w) values of the tokens as (H, W) of the pixels, linear between middles; NaN where no token lies."""
        rows, columns = (_hats(*side) for side in zip(size, self.grid, self.first, self.step, strict=True))
        return rows @ np.asarray(values, dtype=np.float64) @ columns.T


def _hats(pixels: int, tokens: int, first: float, step: float) -> np.ndarray:
    """(pixels, tokens) weights of linear interpolation along one side; NaN for pixels outside all cells."""
    at = (np.arange(pixels) + 0.5 - first) / step
    inside = (at >= -0.5) & (at <= tokens - 0.5)
    weights = np.maximum(0, 1 - abs(at.clip(0, tokens - 1)[:, None] - np.arange(tokens)))
    return np.where(inside[:, None], weights, np.nan)


@dataclass
class Tokens:
    """The tokens of one forward: `prefix` of them stand in front of a grid, and `joins` says behind which blocks which
    branches make the grid smaller. `embedded` is known once the patches were cut."""

    component: Component
    joins: Mapping[int, Sequence[nn.Module]] = field(default_factory=dict)
    embedded: Place | None = None

    @property
    def prefix(self) -> int:
        return self.component.num_prefix_tokens

    @property
    def num_blocks(self) -> int:
        return self.component.num_blocks

    def place(self, block: int | None = None) -> Place:
        """Of the tokens that enter a block; None: of those behind the last."""
        place = self.embedded
        for at in sorted(self.joins):
            for branch in self.joins[at] if block is None or at < block else ():
                place = place.joined(branch.shrink)
        return place

    def joining(self, block: int) -> Iterator[Tensor]:
        """For each joining behind a block: the share (T', T) that each old token has in each new one, rows sum to 1."""
        grid = self.place(block).grid
        for branch in self.joins.get(block, ()):
            yield joining(branch, grid, self.prefix)
            grid = branch.shrink.of(grid)


def joining(branch: nn.Module, grid: Sequence[int], prefix: int) -> Tensor:
    """(P + h' w', P + h w): prefix tokens stay themselves; a new token is made of those under its kernel, by the
    absolute weight of the residual kernel, averaged over features; what a kernel has outside the grid is left out.

    The narrow branch beside the residual is not counted, as attention rollout counts no MLP.
    """
    shrink, (h, w) = branch.shrink, grid
    kernel = getattr(getattr(branch, "residual", None), "weight", None)
    share = torch.ones(shrink.kernel, shrink.kernel) if kernel is None else kernel.detach().float().abs().mean((0, 1))
    share = (share + 1e-12)[None, None]  # a kernel of zeros: all alike
    each = torch.eye(h * w, device=share.device).view(h * w, 1, h, w)
    patches = F.conv2d(each, share, stride=shrink.stride, padding=shrink.padding).flatten(1).T
    return torch.block_diag(torch.eye(prefix, device=share.device), patches / patches.sum(1, keepdim=True))


def component_of(model: nn.Module) -> Component | None:
    """The run of transformer blocks that gets an image's patches; None for models without one."""
    try:
        found = component_info(model)
    except LookupError:  # blocks of a family that is not covered
        return None
    maps = patch_maps(model)
    return next((c for c in found if c.prefix in maps), None)


@contextmanager
def watched(model: nn.Module, size: Sequence[int]) -> Iterator[Tokens]:
    """The tokens of the forward inside the `with`, of images of height and width `size`. Raises UsageError."""
    component = component_of(model)
    if component is None:
        raise UsageError(f"{_name(model)} has no transformer blocks over a grid of patches")
    tokens = Tokens(component, _joins(model, component))

    def cut(module, args, output):
        if output.ndim != 4:
            raise UsageError(f"{_name(model)} cuts patches into {tuple(output.shape)}: a grid of two sides is needed")
        tokens.embedded = Place.over(size, output.shape[2:])

    hook = model.get_submodule(patch_maps(model)[component.prefix]).register_forward_hook(cut)
    try:
        yield tokens
    finally:
        hook.remove()


def _joins(model: nn.Module, component: Component) -> dict[int, list[nn.Module]]:
    """Block -> branches of the adapters that act now."""
    found: dict[int, list[nn.Module]] = {}
    bank = bank_of(model)
    for name in bank.active if bank is not None else ():
        for key, branch in bank.adapters[name].branches.items():
            site = bank.adapters[name].sites[key]
            if getattr(branch, "shrink", None) is not None:
                found.setdefault(site.block, []).append(branch)
    return found


def bank_of(model: nn.Module) -> Bank | None:
    return next((m for m in model.modules() if isinstance(m, Bank)), None)


def block_paths(model: nn.Module, component: Component) -> list[str]:
    """Paths of a component's blocks, in order."""
    return [s.path for s in find_sites(model, "block") if s.component == component.prefix]


def patches(x: Tensor, place: Place) -> Tensor:
    """(B, D, h, w) of tokens (B, T, D): the last h w of them, whatever stands in front (prefix tokens, prompts).

    Raises UsageError where there are too few: they were merged on the way, or are windows.
    """
    h, w = place.grid
    if x.ndim != 3 or x.shape[1] < h * w:
        raise UsageError(f"tokens of shape {tuple(x.shape)} are no grid of {h} x {w}: windows, or merged on the way")
    return x[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))


def feature_map(model: nn.Module, image: Tensor) -> tuple[Tensor, Place]:
    """Final features (B, D, h, w) of images (B, 3, H, W), and where they lie on them.

    model: a task model or a plain backbone, the one that carries the adapter; images as it takes them. The features are
    behind the final norm; timm's own `forward_intermediates` gives them a wrong shape where tokens were joined.
    """
    backbone, size = getattr(model, "backbone", model), image.shape[2:]
    image = model.normalised(image) if hasattr(model, "normalised") else image
    if component_of(model) is None or channels_last(model):
        found = _last_map(backbone, image)
        return found, Place.over(size, found.shape[2:])
    with watched(model, size) as tokens:
        seen = see(backbone, image)
    return patches(seen.patches, tokens.place()), tokens.place()


def _last_map(backbone: nn.Module, image: Tensor) -> Tensor:
    if hasattr(backbone, "forward_features"):
        x = backbone.forward_features(image)
    else:
        x = backbone(pixel_values=image).last_hidden_state
    if x.ndim != 4:
        raise UsageError(f"{_name(backbone)} gives {tuple(x.shape)}: its last features stand on no grid that is known")
    return x.permute(0, 3, 1, 2) if channels_last(backbone) else x


def channels_last(model: nn.Module) -> bool:
    """Whether maps are (B, h, w, D), as in Swin."""
    return getattr(getattr(model, "backbone", model), "output_fmt", "NCHW") == "NHWC"


def _name(model: nn.Module) -> str:
    return type(getattr(model, "backbone", model)).__name__
