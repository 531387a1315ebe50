"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751, section 2; parallel form He et al., arXiv:2110.04366).

The vision methods of this kind are Bottleneck with other defaults: parallel_adapter, adaptformer, adapter_plus.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, Placement, register
from adaptsuite.sites import Site

Activation = Literal["gelu", "quick_gelu", "relu"]
Scale = float | Literal["learned", "channel"]
Start = Literal["zero", "xavier", "houlsby"]


@dataclass(frozen=True)
class Insert(Method):
    """Settings of every method that puts one narrow module A beside a site or behind it.

    parallel:   y + A(x), and + x with residual      (x: the site's input, y: its output)
    sequential: A(y),     and + y with residual
    Site `mlp` alone is Pfeiffer's layout, `attn` and `mlp` Houlsby's.
    """

    bottleneck: int = 64  # hidden features
    placement: Placement = "parallel"
    residual: bool | None = None  # None: without for parallel, with for sequential; the two that start as the backbone
    sites: tuple[str, ...] = ("mlp",)

    mergeable = "an adapter has a nonlinearity between its projections, no weight of the backbone can hold it"
    norms = ("final", "beside")

    def check(self) -> None:
        if self.bottleneck < 1:
            raise UsageError(f"{self.name}: {self.bottleneck} hidden features, there must be at least 1")
        if self.placement not in ("parallel", "sequential"):
            raise UsageError(f"{self.name}: placement is {self.placement!r}, it is parallel or sequential")

    @property
    def with_residual(self) -> bool:
        return self.placement == "sequential" if self.residual is None else self.residual

    @property
    def identity_at_start(self) -> bool:
        return self.with_residual == (self.placement == "sequential")

    def build(self, site: Site) -> nn.Module:
        if self.placement == "parallel" and site.dim != site.dim_out and self.with_residual:
            raise UsageError(
                f"{self.name}: residual needs equal widths, {site.role!r} maps {site.dim} to {site.dim_out}"
            )
        branch = self.branch(site.dim if self.placement == "parallel" else site.dim_out, site.dim_out)
        branch.placement, branch.residual = self.placement, self.with_residual
        return branch

    def branch(self, dim: int, dim_out: int) -> "InsertBranch":
        raise NotImplementedError


class InsertBranch(nn.Module):
    """The table of `Insert`; a subclass gives A as `adapt`, zero at the start: then the host equals the backbone."""

    placement: Placement = "parallel"
    residual = False

    def adapt(self, tokens: Tensor, context) -> Tensor:
        """A of tokens (B, ..., D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        source = x if self.placement == "parallel" else y
        z = self.adapt(source, context)
        z = z + source if self.residual else z
        return y + z if self.placement == "parallel" else z


@register("bottleneck")
@dataclass(frozen=True)
class Bottleneck(Insert):
    """Down, activation, up: one adapter at each site, beside it or behind it."""

    activation: Activation = "gelu"
    scale: Scale = 1.0  # of A; learned: one trained factor, channel: one per feature
    start: Start = "zero"  # of `up`; else of both projections: xavier, or N(0, .01) cut at two deviations (Houlsby)
    dropout: float = 0.0  # of the hidden features

    varying = ("bottleneck", "start")  # activations are 0 at 0

    def check(self) -> None:
        super().check()
        self.expect_one_of("activation", get_args(Activation))
        self.expect_one_of("start", get_args(Start))
        self.expect("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        number = not isinstance(self.scale, str) and math.isfinite(self.scale) and self.scale != 0
        self.expect("scale", number or self.scale in ("learned", "channel"), "a number but 0, learned or channel")

    @property
    def identity_at_start(self) -> bool:
        return super().identity_at_start and self.start == "zero"

    def branch(self, dim: int, dim_out: int) -> InsertBranch:
        return BottleneckBranch(dim, self.bottleneck, dim_out, self.activation, self.scale, self.start, self.dropout)


@register("parallel_adapter")
@dataclass(frozen=True)
class ParallelAdapter(Bottleneck):
    """Beside attention and MLP: the intra-block adapter of arXiv:2409.11051, whose code has start="xavier"."""

    bottleneck: int = 8
    sites: tuple[str, ...] = ("attn", "mlp")


@register("adaptformer")
@dataclass(frozen=True)
class AdaptFormer(Bottleneck):
    """Beside the MLP, with ReLU and a scale of .1 (Chen et al. 2022, arXiv:2205.13535).

    It reads what the MLP reads, LN(x'), as the paper's equation has it; in the released code it reads x' itself. The
    dropout is the code's.
    """

    activation: Activation = "relu"
    scale: Scale = 0.1
    dropout: float = 0.1


@register("adapter_plus")
@dataclass(frozen=True)
class AdapterPlus(Bottleneck):
    """Behind the whole block, skip included, with one scale per feature (Steitz and Roth 2024, arXiv:2406.06820).

    y + s * A(y) of the block's output y. Both projections start small and not at zero: the start is near the backbone
    and not equal to it, unless start="zero". The authors also drop whole adapters at random (.1), we do not.
    """

    bottleneck: int = 8
    placement: Placement = "sequential"
    sites: tuple[str, ...] = ("block",)
    scale: Scale = "channel"
    start: Start = "houlsby"


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), which differs from GELU by .02 at most."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu, "relu": F.relu}


class BottleneckBranch(InsertBranch):
    """scale * up(dropout(activation(down(.)))). At the start only `up` is zero; with `down` zero as well, as in the
    PETL-AST code, the pair would be a dead point: neither could ever get a gradient.
    """

    def __init__(
        self,
        dim: int,
        bottleneck: int,
        dim_out: int,
        activation: Activation = "gelu",
        scale: Scale = 1.0,
        start: Start = "zero",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.activation, self.dropout = activation, dropout
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim_out)
        if isinstance(scale, str):
            self.scale = nn.Parameter(torch.ones(1 if scale == "learned" else dim_out))
        else:
            self.scale = None if scale == 1 else scale
        if start == "zero":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        else:
            for layer in (self.down, self.up):
                initialise(layer, start)

    def adapt(self, tokens: Tensor, context) -> Tensor:
        h = self.between(self.activate(self.narrow(tokens, context)), context)
        h = F.dropout(h, self.dropout, self.training) if self.dropout else h
        z = self.up(h)
        return z if self.scale is None else z * self.scale

    def narrow(self, tokens: Tensor, context) -> Tensor:
        """Hidden features (B, ..., R) of the tokens, before the activation."""
        return self.down(tokens)

    def activate(self, h: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](h)

    def between(self, h: Tensor, context) -> Tensor:
        """What a subclass does to the hidden features (B, ..., R)."""
        return h


def initialise(layer: nn.Linear | nn.Conv2d, start: Start) -> None:
    nn.init.zeros_(layer.bias)
    if start == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    else:
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
