"""Compacter: adapters of hypercomplex projections (Karimi Mahabadi et al. 2021, arXiv:2106.04647, sections 3.1 to 3.3).

A projection is a sum of Kronecker products of slow factors, n x n, that all adapters of a host share, and fast ones of
rank one. Other methods of this kind import `phm` and `SlowFactors`.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from adaptsuite.bottleneck import ACTIVATIONS, Activation, Insert, InsertBranch
from adaptsuite.errors import UsageError
from adaptsuite.method import Placement, register
from adaptsuite.sites import Site

Start = Literal["zero", "glorot"]


def phm(slow: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """sum_i A_i kron (S_i T_i): slow (n, n, n), left (..., n, P, r), right (..., n, r, Q) -> (..., n P, n Q)."""
    products = torch.einsum("iab,...ipr,...irq->...apbq", slow, left, right)
    return products.flatten(-2).flatten(-3, -2)


class SlowFactors(nn.Module):
    """A (n, n, n), drawn from N(0, std^2)."""

    def __init__(self, n: int, std: float):
        super().__init__()
        self.a = nn.Parameter(torch.randn(n, n, n) * std)


@register("compacter")
@dataclass(frozen=True)
class Compacter(Insert):
    """y + up(activation(down(y))) behind attention and MLP; down and up are sum_i A_i kron (s_i t_i^T), with biases.

    One A (n, n, n) is shared by all projections of the host. The norms of the backbone train as well (table 1).
    """

    bottleneck: int | None = None  # hidden features; None: width / 32, in whole multiples of n
    placement: Placement = "sequential"
    sites: tuple[str, ...] = ("attn", "mlp")
    n: int = 4  # Kronecker products in a sum
    activation: Activation = "gelu"
    start: Start = "zero"  # of t of the way up; else Glorot as the other fast factors, as in the authors' code
    slow_std: float = 0.01  # of A at the start; 1e-4 in the released configuration
    all_norms: bool = True

    def check(self) -> None:
        if self.bottleneck is not None:
            super().check()
        self.expect("n", self.n >= 1, "at least 1")
        self.expect("slow_std", 0 < self.slow_std < math.inf, "a number above 0")  # 0 is a dead point
        self.expect_one_of("activation", get_args(Activation))
        self.expect_one_of("start", get_args(Start))

    @property
    def identity_at_start(self) -> bool:
        return super().identity_at_start and self.start == "zero"

    @property
    def roles(self) -> tuple[str, ...]:
        return (*self.sites, "norm?") if self.all_norms else self.sites

    def base(self, site: Site, module: nn.Module) -> tuple[str, ...]:
        return tuple(n for n, p in module._parameters.items() if p is not None) if site.role == "norm" else ()

    def shared(self, sites: list[Site]) -> nn.Module:
        return SlowFactors(self.n, self.slow_std)

    def build(self, site: Site, shared: SlowFactors) -> nn.Module | None:
        if site.role == "norm":
            return None
        branch = super().build(site)
        branch.__dict__["shared"] = shared  # the adapter owns it, once
        return branch

    def branch(self, dim: int, dim_out: int) -> InsertBranch:
        hidden = self.bottleneck or max(1, dim // 32 // self.n) * self.n
        for width in (dim, hidden, dim_out):
            if width % self.n:
                raise UsageError(f"{self.name}: n is {self.n}, which does not divide {width} features")
        return CompacterBranch(dim, hidden, dim_out, self)


@register("compacter_plus_plus")
@dataclass(frozen=True)
class CompacterPlusPlus(Compacter):
    """Compacter behind the MLP alone."""

    sites: tuple[str, ...] = ("mlp",)


class CompacterBranch(InsertBranch):
    """Two hypercomplex projections with the activation between; n (D + hidden) / n fast values each way."""

    shared: SlowFactors

    def __init__(self, dim: int, hidden: int, dim_out: int, method: Compacter):
        super().__init__()
        n, self.activation = method.n, method.activation
        self.down_s, self.down_t = _glorot(n, dim // n, 1), _glorot(n, 1, hidden // n)
        self.up_s, self.up_t = _glorot(n, hidden // n, 1), _glorot(n, 1, dim_out // n)
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(dim_out))
        if method.start == "zero":
            nn.init.zeros_(self.up_t)

    def adapt(self, tokens: Tensor, context) -> Tensor:
        h = tokens @ phm(self.shared.a, self.down_s, self.down_t) + self.down_bias
        return ACTIVATIONS[self.activation](h) @ phm(self.shared.a, self.up_s, self.up_t) + self.up_bias


def _glorot(n: int, rows: int, columns: int) -> nn.Parameter:
    """(n, rows, columns), each of the n uniform within sqrt(6 / (rows + columns))."""
    bound = math.sqrt(6 / (rows + columns))
    return nn.Parameter(torch.empty(n, rows, columns).uniform_(-bound, bound))
