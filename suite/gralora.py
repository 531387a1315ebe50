"""GraLoRA: low-rank adaptation of each block of a weight (Jung et al. 2025, arXiv:2505.20355, section 3)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.sites import Site


@register("gralora")
@dataclass(frozen=True)
class GraLora(Method):
    """W + scale * (a grid of k x k blocks, each of rank / k, plus a plain LoRA of `hybrid_rank` over all of it).

    As many values as LoRA of rank + hybrid_rank, and a change of rank k * rank + hybrid_rank. `up` starts at zero.
    """

    rank: int = 8  # of all k blocks that read the same features together
    granularity: int = 2  # k; the paper takes 2 up to rank 32, and 4 above
    hybrid_rank: int = 0
    alpha: float = 8.0  # scale = alpha / (rank + hybrid_rank)
    dropout: float = 0.0  # of the branch's input
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    def check(self) -> None:
        self.expect("granularity", self.granularity >= 1, "at least 1")
        fits = self.rank >= 1 and self.rank % self.granularity == 0
        self.expect("rank", fits, f"a whole multiple of granularity, {self.granularity}")
        self.expect("hybrid_rank", self.hybrid_rank >= 0, "at least 0")
        self.expect("alpha", math.isfinite(self.alpha) and 0 < self.alpha <= 1e4, "above 0 and at most 1e4")
        self.expect("dropout", 0 <= self.dropout < 1, "in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + self.hybrid_rank)

    def build(self, site: Site) -> nn.Module:
        k, least = self.granularity, min(site.dim, site.dim_out)
        if site.weight is None:
            raise UsageError(f"gralora needs weights, site {site.role!r} is a module; name attn.q, mlp.in ... as sites")
        if site.dim % k or site.dim_out % k:
            raise UsageError(f"gralora: granularity {k} does not divide {site.path}, {site.dim} to {site.dim_out}")
        if max(self.rank, self.hybrid_rank) > least:
            raise UsageError(f"gralora: rank {max(self.rank, self.hybrid_rank)} is above {least}, all {site.path} has")
        return GraLoraBranch(site.dim, site.dim_out, self)


class GraLoraBranch(nn.Module):
    """down (k, R, D / k) and up (k, D_out / k, R): block (j, i) of the change is up[j][:, i part] down[i][j part]."""

    def __init__(self, dim: int, dim_out: int, method: GraLora):
        super().__init__()
        self.k, self.scale, self.dropout = method.granularity, method.scale, method.dropout
        self.down = _kaiming(self.k, method.rank, dim // self.k)
        self.up = nn.Parameter(torch.zeros(self.k, dim_out // self.k, method.rank))
        if method.hybrid_rank:
            self.hybrid_down = _kaiming(method.hybrid_rank, dim)
            self.hybrid_up = nn.Parameter(torch.zeros(dim_out, method.hybrid_rank))
        else:
            self.hybrid_down = self.hybrid_up = None

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = torch.einsum("...id,ird->...ir", x.unflatten(-1, (self.k, -1)), self.down)  # (B, ..., k, R)
        h = h.unflatten(-1, (self.k, -1)).transpose(-3, -2).flatten(-2)  # what was read for block j, of all i
        z = torch.einsum("...jr,jor->...jo", h, self.up).flatten(-2)
        if self.hybrid_up is not None:
            z = z + F.linear(F.linear(x, self.hybrid_down), self.hybrid_up)
        return y + z * self.scale

    def delta(self) -> Tensor:
        if self.dropout and self.training:
            raise UsageError("gralora: the change of the weight is not one matrix while dropout acts on the input")
        down = self.down.unflatten(1, (self.k, -1))  # (i, j, R / k, D / k)
        up = self.up.unflatten(2, (self.k, -1))  # (j, D_out / k, i, R / k)
        change = torch.einsum("joir,ijrd->joid", up, down).flatten(2).flatten(0, 1)
        if self.hybrid_up is not None:
            change = change + self.hybrid_up @ self.hybrid_down
        return change * self.scale


def _kaiming(*shape: int) -> nn.Parameter:
    """Uniform as nn.Linear starts, by the last dimension."""
    bound = 1 / math.sqrt(shape[-1])
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
