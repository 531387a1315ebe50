"""Factor-tuning, tensor-train form (Jie and Deng 2023, arXiv:2212.03145, section 3)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.sites import Site


@register("fact")
@dataclass(frozen=True)
class Fact(Method):
    """W + scale * V C U^T; U and V (D, R) are one pair for the whole backbone, a small core C belongs to each weight.

    A weight that maps a D to b D features consists of D x D parts, each with its own R x R core: three in a fused qkv,
    four in each layer of an MLP. Where b is no whole number (SwiGLU) the last part is cut, which the paper has not.
    Backbones whose width changes (Swin) have one pair for each width. V starts at zero.
    """

    rank: int = 16
    scale: float = 1.0  # the paper chooses among .01, .1, 1, 10, 100 on validation data
    dropout: float = 0.0  # behind the core; .1 in the authors' code
    sites: tuple[str, ...] = ("attn.qkv", "attn.out", "mlp.in", "mlp.out")

    def check(self) -> None:
        self.expect("rank", self.rank >= 1, "at least 1")
        self.expect("scale", math.isfinite(self.scale) and self.scale != 0, "a number but 0")
        self.expect("dropout", 0 <= self.dropout < 1, "in [0, 1)")

    def shared(self, sites: list[Site]) -> nn.Module:
        return Factors(sites, self.rank)

    def build(self, site: Site, shared: "Factors") -> nn.Module:
        if site.weight is None:
            raise UsageError(f"fact needs weights, site {site.role!r} is a module; name attn.qkv, mlp.in ... as sites")
        return FactBranch(site, shared, self)


def _width(site: Site) -> int:
    """D, the width of the tokens that a weight reads or writes."""
    return site.dim_out if site.role in ("attn.out", "mlp.out") else site.dim


class Factors(nn.Module):
    """U and V (D, R) of each component and width."""

    def __init__(self, sites: list[Site], rank: int):
        super().__init__()
        self.u, self.v = nn.ParameterDict(), nn.ParameterDict()
        for key, width in {self.key(s): _width(s) for s in sites}.items():
            bound = 1 / math.sqrt(width)  # as nn.Linear starts, in the authors' code too
            self.u[key] = nn.Parameter(torch.empty(width, rank).uniform_(-bound, bound))
            self.v[key] = nn.Parameter(torch.zeros(width, rank))

    @staticmethod
    def key(site: Site) -> str:
        return f"{site.component.replace('.', '/')}/{_width(site)}"


class FactBranch(nn.Module):
    """y + scale * V(C(U^T x)); core (b R, a R) of a weight that maps a D to b D features."""

    def __init__(self, site: Site, shared: Factors, method: Fact):
        super().__init__()
        self.__dict__["shared"] = shared  # the adapter owns it, once
        self.key, self.dim, self.dim_out, self.width = shared.key(site), site.dim, site.dim_out, _width(site)
        self.rank, self.scale, self.dropout = method.rank, method.scale, method.dropout
        self.ins, self.outs = -(-site.dim // self.width), -(-site.dim_out // self.width)
        bound = 1 / math.sqrt(self.ins * self.rank)
        self.core = nn.Parameter(torch.empty(self.outs * self.rank, self.ins * self.rank).uniform_(-bound, bound))

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        u, v = self.shared.u[self.key], self.shared.v[self.key]
        if missing := self.ins * self.width - self.dim:
            x = F.pad(x, (0, missing))
        x = x.unflatten(-1, (self.ins, self.width))
        h = F.linear(F.linear(x, u.T).flatten(-2), self.core)  # (B, ..., b R)
        h = F.dropout(h, self.dropout, self.training) if self.dropout else h
        z = F.linear(h.unflatten(-1, (self.outs, self.rank)), v).flatten(-2)
        return y + z[..., : self.dim_out] * self.scale

    def delta(self) -> Tensor:
        u, v = self.shared.u[self.key], self.shared.v[self.key]
        core = self.core.unflatten(0, (self.outs, -1)).unflatten(2, (self.ins, -1))  # (b, R, a, R)
        parts = torch.einsum("or,jril,dl->joid", v, core, u).flatten(2).flatten(0, 1)
        return parts[: self.dim_out, : self.dim] * self.scale
