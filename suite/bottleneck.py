"""Bottleneck adapter (Houlsby et al. 2019, arXiv:1902.00751, section 2; parallel form He et al., arXiv:2110.04366)."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, Placement, register
from adaptsuite.sites import Site


@register("bottleneck")
@dataclass(frozen=True)
class Bottleneck(Method):
    """One adapter per site: `mlp` alone is Pfeiffer's layout, `attn` and `mlp` Houlsby's.

    parallel:   y + A(x), and + x with residual      (x: the site's input, y: its output)
    sequential: A(y),     and + y with residual
    """

    bottleneck: int = 64  # hidden features
    placement: Placement = "parallel"
    residual: bool | None = None  # None: without for parallel, with for sequential; the two that start as the backbone
    sites: tuple[str, ...] = ("mlp",)

    mergeable = "a bottleneck has a nonlinearity between its projections, no weight of the backbone can hold it"
    norms = ("final", "beside")

    def check(self) -> None:
        if self.bottleneck < 1:
            raise UsageError(f"bottleneck: {self.bottleneck} hidden features, there must be at least 1")
        if self.placement not in ("parallel", "sequential"):
            raise UsageError(f"bottleneck: placement is {self.placement!r}, it is parallel or sequential")

    @property
    def with_residual(self) -> bool:
        return self.placement == "sequential" if self.residual is None else self.residual

    @property
    def identity_at_start(self) -> bool:
        return self.with_residual == (self.placement == "sequential")

    def build(self, site: Site) -> nn.Module:
        if self.placement == "parallel" and site.dim != site.dim_out and self.with_residual:
            raise UsageError(
                f"bottleneck: residual needs equal widths, {site.role!r} maps {site.dim} to {site.dim_out}"
            )
        dim = site.dim if self.placement == "parallel" else site.dim_out
        return BottleneckBranch(dim, self.bottleneck, site.dim_out, self.placement, self.with_residual)


class BottleneckBranch(nn.Module):
    """up(gelu(down(.))) beside or behind a site. Zero `up` makes the host equal the backbone at the start; with `down`
    zero as well, as in the PETL-AST code, the pair would be a dead point: neither could ever get a gradient.
    """

    def __init__(self, dim: int, bottleneck: int, dim_out: int, placement: Placement, residual: bool):
        super().__init__()
        self.down = nn.Linear(dim, bottleneck)
        self.up = nn.Linear(bottleneck, dim_out)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.placement, self.residual = placement, residual

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        if self.placement == "parallel":
            y = y + self.up(F.gelu(self.down(x)))
            return y + x if self.residual else y
        z = self.up(F.gelu(self.down(y)))
        return z + y if self.residual else z
