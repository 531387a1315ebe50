"""Bottleneck adapter (Houlsby et al. 2019, arXiv:1902.00751, section 2; parallel form He et al., arXiv:2110.04366)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, Placement, register
from adaptsuite.sites import Site


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
    """Down, GELU, up: one adapter at each site, beside it or behind it."""

    def branch(self, dim: int, dim_out: int) -> InsertBranch:
        return BottleneckBranch(dim, self.bottleneck, dim_out)


class BottleneckBranch(InsertBranch):
    """up(gelu(down(.))). Only `up` starts at zero; with `down` zero as well, as in the PETL-AST code, the pair would be
    a dead point: neither could ever get a gradient.
    """

    def __init__(self, dim: int, bottleneck: int, dim_out: int):
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim_out)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def adapt(self, tokens: Tensor, context) -> Tensor:
        return self.up(F.gelu(self.down(tokens)))
