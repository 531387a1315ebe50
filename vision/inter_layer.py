"""Inter-layer adapters between frozen blocks (Rios et al. 2024, arXiv:2409.11051): down-sampling and stay modules.

Both add a narrow, spatial branch to the tokens that a block gave; a down-sampling module also joins neighbours, so that
all later blocks work on a smaller grid. Grids of any shape, any number of prefix tokens, rotary positions.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.bottleneck import BottleneckBranch
from adaptsuite.errors import UsageError
from adaptsuite.grid import Shrink, from_map, to_map
from adaptsuite.method import Method, register
from adaptsuite.sites import CLS_TOKENS, Site

Norm = Literal["batch", "layer", "group"]
Residual = Literal["mean", "ones", "near_ones", "avg_pool"]
Start = Literal["zero", "xavier"]


@register("vision.ila")
@dataclass(frozen=True)
class InterLayer(Method):
    """Down-sampling modules behind two blocks: the rest of the network is cheaper than the backbone alone.

    locations: blocks, from 0, behind which tokens are joined; None: those that end the first and the second third, 3
    and 7 of 12.  An image's grid of 14 x 14 becomes 12 x 12 and 10 x 10.
    The paper trains the CLS token as well and starts `up` as Xavier, the residual kernel near ones, which multiplies
    constant tokens by 9 beside an unchanged CLS; here a kernel of means keeps them as they are.
    """

    locations: tuple[int, ...] | None = None
    kernel: int = 3
    stride: int = 1
    padding: int = 0
    bottleneck: int = 8  # hidden features
    norm: Norm = "batch"  # layer or group where samples may not meet: private training, batches of one
    residual: Residual = "mean"  # start of the joining kernel: 1/k^2, ones, the reference's N(1, 1e-3); or a fixed mean
    dropout: float = 0.1
    start: Start = "zero"  # of `up`; xavier: as in the reference
    train_cls: bool = False
    sites: tuple[str, ...] = ("block",)

    mergeable = "a module between blocks mixes tokens, no weight of the backbone can hold it"
    norms = ()
    stay = False  # a module without down-sampling behind every other block
    intra = False  # adapters inside all blocks

    def check(self) -> None:
        for name, choices in (("norm", Norm), ("residual", Residual), ("start", Start)):
            if getattr(self, name) not in get_args(choices):
                raise UsageError(f"{self.name}: {name} is {getattr(self, name)!r}, it is {_either(get_args(choices))}")
        if self.bottleneck < 1:
            raise UsageError(f"{self.name}: {self.bottleneck} hidden features, there must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{self.name}: dropout is {self.dropout}, it must be in [0, 1)")
        if self.sites != ("block",):
            raise UsageError(f"{self.name}: its modules stand behind blocks; leave sites at block")
        _ = self.shrink  # raises for a geometry that cannot be

    @property
    def shrink(self) -> Shrink:
        return Shrink(self.kernel, self.stride, self.padding)

    @property
    def identity_at_start(self) -> bool:
        return self.locations == () and self.start == "zero"

    @property
    def roles(self) -> tuple[str, ...]:
        return ("block", *(("attn", "mlp") if self.intra else ()), *(("cls",) if self.train_cls else ()))

    def base(self, site: Site, module: nn.Module) -> tuple[str, ...]:
        return tuple(n for n in CLS_TOKENS if n in module._parameters) if site.role == "cls" else ()

    def build(self, site: Site) -> nn.Module | None:
        if site.role in ("attn", "mlp"):
            return BottleneckBranch(site.dim, self.bottleneck, site.dim_out, start=self.start)
        if site.role != "block":
            return None
        down = site.block in self.places(site.depth)
        if not down and not self.stay:
            return None
        branch = InterLayerBranch(site.dim, site.prefix_tokens, self, self.shrink if down else None)
        if site.block == site.depth - 1:
            branch.exempt = dict.fromkeys(SPATIAL, "behind the last block a head may read CLS alone, or no CLS")
        return branch

    def places(self, depth: int) -> tuple[int, ...]:
        """The blocks behind which tokens are joined. Raises UsageError for blocks that are not there."""
        if self.locations is None:
            if depth < 3:
                raise UsageError(f"{self.name}: {depth} blocks have no ends of thirds; name locations= yourself")
            return depth // 3 - 1, 2 * depth // 3 - 1
        for place in self.locations:
            if not 0 <= place < depth - 1:
                raise UsageError(
                    f"{self.name}: location {place}: behind which of the blocks 0 to {depth - 2} is expected (behind "
                    "the last one no block would use it)"
                )
        return self.locations


@register("vision.ila_plus")
@dataclass(frozen=True)
class InterLayerPlus(InterLayer):
    """`vision.ila`, and a module that keeps the grid behind each of the other blocks.

    As in the paper one stands behind the last block too; where the head reads CLS alone, its spatial values (168 of
    13,336) change nothing.
    """

    stay = True


@register("vision.ila_plus_plus")
@dataclass(frozen=True)
class InterLayerPlusPlus(InterLayer):
    """`vision.ila`, and two parallel bottleneck adapters inside every block, beside attention and MLP."""

    intra = True


# what only patches, or only prefix tokens, go through
SPATIAL = tuple(
    f"{name}.{kind}" for name in ("depthwise", "norms.1", "mix", "mix_prefix") for kind in ("weight", "bias")
)


class InterLayerBranch(nn.Module):
    """out = RSDS(x) + dropout(SDS(x)) of a block's output x (B, P + h w, D) or (B, h, w, D).

    SDS: z = gelu(norm(down(x))); of the grid mix(gelu(norm(depthwise k x k (z)))), of the prefix tokens mix_prefix(z);
    up(gelu(norm(both together))).  RSDS: a depthwise k x k convolution over D without bias, prefix tokens as they are.
    With `shrink` None the grid stays: the convolution is padded and RSDS is the identity.
    """

    needs_grid = True

    def __init__(self, dim: int, prefix_tokens: int, method: InterLayer, shrink: Shrink | None):
        super().__init__()
        width, kernel = method.bottleneck, method.kernel
        self.prefix, self.shrink = prefix_tokens, shrink
        stride, padding = (1, kernel // 2) if shrink is None else (shrink.stride, shrink.padding)
        self.down = nn.Linear(dim, width)
        self.depthwise = nn.Conv2d(width, width, kernel, stride, padding, groups=width)
        self.mix = nn.Linear(width, width)
        self.mix_prefix = nn.Linear(width, width) if prefix_tokens else None
        self.norms = nn.ModuleList(NORMS[method.norm](width) for _ in range(3))
        self.up = nn.Linear(width, dim)
        self.dropout = method.dropout
        self.residual = None if shrink is None else Residuals(dim, shrink, method.residual)
        for layer in (self.down, self.depthwise, self.mix, self.mix_prefix, self.up):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        if method.start == "zero":
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        again = context is not None and context.recomputed
        z = F.gelu(self.norms[0](self.down(y), again))
        front, grid = to_map(z, self.prefix, context.grid if context is not None else None)
        if self.shrink is not None:
            self.shrink.of(grid.shape[2:])  # says what is wrong with a grid that is too small
        grid = self.depthwise(grid).permute(0, 2, 3, 1)  # (B, h, w, R)
        grid = self.mix(F.gelu(self.norms[1](grid, again)))
        if y.ndim == 3:
            grid = grid.flatten(1, 2)
            if self.mix_prefix is not None:
                grid = torch.cat([self.mix_prefix(front), grid], 1)
        s = self.up(F.gelu(self.norms[2](grid, again)))
        s = F.dropout(s, self.dropout, self.training)
        if self.residual is None:
            return y + s
        front, grid = to_map(y, self.prefix, context.grid if context is not None else None)
        return from_map(front, self.residual(grid), y) + s


class Residuals(nn.Module):
    """The joining of neighbours that the residual stream itself goes through, (B, D, h, w) -> (B, D, h', w')."""

    def __init__(self, dim: int, shrink: Shrink, start: Residual):
        super().__init__()
        self.shrink, k = shrink, shrink.kernel
        if start == "avg_pool":
            self.weight = None
            return
        self.weight = nn.Parameter(torch.full((dim, 1, k, k), 1 / k**2 if start == "mean" else 1.0))
        if start == "near_ones":
            nn.init.normal_(self.weight, 1.0, 1e-3)

    def forward(self, grid: Tensor) -> Tensor:
        k, stride, padding = self.shrink.kernel, self.shrink.stride, self.shrink.padding
        if self.weight is None:
            return F.avg_pool2d(grid, k, stride, padding)
        return F.conv2d(grid, self.weight, stride=stride, padding=padding, groups=len(self.weight))


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of the last dimension, whose running statistics a recomputed forward leaves alone."""

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        momentum = 0.0 if again else self.momentum
        args = (self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps)
        return F.batch_norm(x.flatten(0, -2), *args).unflatten(0, x.shape[:-1])


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        return super().forward(x)


class GroupNorm(nn.GroupNorm):
    """Group norm of tokens (B, ..., R), over the tokens of each sample and each of up to four groups of features."""

    def __init__(self, width: int):
        super().__init__(next(n for n in (4, 3, 2, 1) if width % n == 0), width)

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


NORMS = {"batch": BatchNorm, "layer": LayerNorm, "group": GroupNorm}


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
