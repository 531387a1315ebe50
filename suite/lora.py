"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685, eq. 3), with the rsLoRA scale (arXiv:2312.03732, eq. 5)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.sites import Site


@register("lora")
@dataclass(frozen=True)
class Lora(Method):
    """W + scale * up @ down at weight sites; `down` starts as Kaiming uniform, `up` at zero, as in the paper."""

    rank: int = 8
    alpha: float = 8.0  # scale = alpha / rank
    rslora: bool = False  # scale = alpha / sqrt(rank)
    dropout: float = 0.0  # of the branch's input
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    varying = ("rank", "alpha", "rslora")

    def check(self) -> None:
        if self.rank < 1:
            raise UsageError(f"lora: rank is {self.rank}, it must be at least 1")
        if not (math.isfinite(self.alpha) and 0 < self.alpha <= 1e4):
            raise UsageError(f"lora: alpha is {self.alpha}, it must be above 0 and at most 1e4")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"lora: dropout is {self.dropout}, it must be in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def build(self, site: Site) -> nn.Module:
        if site.weight is None:
            raise UsageError(f"lora needs weights, site {site.role!r} is a module; name attn.q, mlp.in ... as sites")
        return LoraBranch(site.dim, site.dim_out, self.rank, self.scale, self.dropout)


class LoraBranch(nn.Module):
    """y + scale * up(down(dropout(x))); down (R, D), up (D_out, R), no bias."""

    def __init__(self, dim: int, dim_out: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, dim))
        self.up = nn.Parameter(torch.zeros(dim_out, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        hidden = F.linear(x, self.down)
        # autocast chose another precision for the branch, or a copy would change how y lies in memory
        if hidden.dtype != y.dtype or not y.is_contiguous():
            return y + F.linear(hidden, self.up) * self.scale
        # one pass over y instead of three
        rows = torch.addmm(y.flatten(0, -2), hidden.flatten(0, -2), self.up.T, alpha=self.scale)
        return rows.view(y.shape)

    def rows(self, own: Mapping[str, Tensor], there: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The same of rows (B, T, D) with pairs of their own, down (B, R, D), up (B, D_out, R), and scales (B,) where
        those differ; rows that are not `there` (B,) keep y."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        hidden, up = torch.bmm(x, own["down"].mT), own["up"]
        scale = there.to(up.dtype) * own.get("scale", self.scale)
        up = (up * scale[:, None, None]).mT
        return y + torch.bmm(hidden, up) if hidden.dtype != y.dtype else torch.baddbmm(y, hidden, up)

    def delta(self) -> Tensor:
        if self.dropout and self.training:
            raise UsageError("lora: the change of the weight is not one matrix while dropout acts on the site's input")
        return (self.up @ self.down) * self.scale
