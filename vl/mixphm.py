"""MixPHM: a mixture of parameterised hypercomplex adapters behind the feed-forward (Jiang and Zheng 2023,
arXiv:2303.01239).

A projection is H = sum_i A_i kron (S_i T_i), i = 1 ... n (eq. 4): A (n, n, n) is one for all layers, S (n, D_in / n, r)
and T (n, r, D_out / n) are a layer's own. Experts share the way down and differ in the way up. A training step takes
one expert of each layer at random; evaluation takes the mean of their weights, which is made once.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.bottleneck import ACTIVATIONS, Activation, Insert, InsertBranch
from adaptsuite.compacter import SlowFactors, phm
from adaptsuite.errors import UsageError
from adaptsuite.method import Placement, register
from adaptsuite.sites import Site

LAMBDA = 3.9e-3  # of off-diagonal correlations; about 1 / 256


@register("vl.mixphm")
@dataclass(frozen=True)
class MixPhm(Insert):
    """Four factorised hypercomplex adapters after the feed-forward, one at random in a training step, one mean after.

    Where we depart from the release: `up` starts at zero, so that the start is the backbone, and its experts differ
    from the first step on (there they are copies of one); the mean is that of the weights H (there of the factors S and
    T, whose product is another matrix, anew in every forward); summaries leave padding out. Its weight of the alignment
    is .2 times .2.
    """

    bottleneck: int | None = None  # None: width / 12, in whole multiples of n
    placement: Placement = "sequential"
    experts: int = 4
    n: int = 4  # Kronecker products in a sum
    rank: int = 8  # of the factors that are multiplied with A
    activation: Activation = "gelu"
    dropout: float = 0.5  # of the hidden features
    redundancy: float = 0.2  # weights of the regulariser's terms; 0: left out
    alignment: float = 0.04

    def check(self) -> None:
        if self.bottleneck is not None:
            super().check()
        for name in ("experts", "n", "rank"):
            self.expect(name, getattr(self, name) >= 1, "at least 1")
        self.expect("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        inside = all(site.rpartition(":")[2] != "block" for site in self.sites)
        self.expect("sites", inside, "places inside blocks, such as mlp")
        for name in ("redundancy", "alignment"):
            self.expect(name, 0 <= getattr(self, name) < math.inf, "a number from 0")

    @property
    def roles(self) -> tuple[str, ...]:
        """With what the last block of each component gives, which alignment compares with."""
        components = dict.fromkeys(site.rpartition(":")[:2] for site in self.sites)
        return (*self.sites, *(f"{name}{colon}block?" for name, colon in components if self.alignment))

    def shared(self, sites: list[Site]) -> nn.Module:
        return SlowFactors(self.n, self.n**-0.5)  # of a size that keeps that of the tokens

    def build(self, site: Site, shared: SlowFactors) -> nn.Module | None:
        if site.role == "block":
            return Summary() if site.block == site.depth - 1 else None
        branch = super().build(site)
        branch.__dict__["shared"] = shared  # the adapter owns it, once
        return branch

    def branch(self, dim: int, dim_out: int) -> InsertBranch:
        hidden = self.bottleneck or max(1, dim // 12 // self.n) * self.n
        for width in (dim, hidden, dim_out):
            if width % self.n:
                raise UsageError(f"{self.name}: n is {self.n}, which does not divide {width} features")
        return MixPhmBranch(dim, hidden, dim_out, self)

    def regulariser(self, handle) -> Tensor | None:
        """The terms of the forward that ran last in training (section 3.3), means over a component's layers, then over
        components. Raises UsageError where a reentrant checkpoint has cut them off."""
        adapter, terms = handle.adapter, {}
        seen = {key: branch.seen for key, branch in adapter.branches.items()}
        for branch in adapter.branches.values():
            branch.seen = None  # its graph is not to outlive the step
        ends = {key for key, branch in adapter.branches.items() if isinstance(branch, Summary)}
        summaries = {adapter.sites[key].component: seen[key] for key in ends}
        for key, own in seen.items():
            if own is not None and key not in ends:
                component = adapter.sites[key].component
                terms.setdefault(component, []).append(self._term(*own, summaries.get(component)))
        return torch.stack([torch.stack(own).mean() for own in terms.values()]).mean() if terms else None

    def _term(self, up: Tensor, residual: Tensor, mask: Tensor | None, summary: Tensor | None) -> Tensor:
        if not up.requires_grad:
            raise UsageError(
                f"{self.name}: reentrant checkpoints hide the adapters' outputs from its regulariser; take "
                "use_reentrant=False, or redundancy=0 and alignment=0"
            )
        batch, (real, sample) = len(up), flat(mask, up)
        up, residual = (t.float().flatten(0, -2)[real] for t in (up, residual))
        found = self.redundancy * redundancy(up, residual, batch)
        if summary is not None:
            found = found + self.alignment * alignment(up, summary.float(), sample[real])
        return found


def flat(mask: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of tokens (B, ..., D) in a row: which are real (M,) bool, and of which sample each is (M,)."""
    shape = tokens.shape[:-1]
    sample = torch.arange(shape[0], device=tokens.device).view(-1, *[1] * (len(shape) - 1)).expand(shape).flatten()
    fits = mask is not None and mask.shape == shape
    return mask.bool().flatten() if fits else torch.ones_like(sample, dtype=torch.bool), sample


def redundancy(up: Tensor, residual: Tensor, batch: int) -> Tensor:
    """lambda / B * sum_{i != j} C_ij^2, C = normalised(up)^T normalised(residual), of tokens (M, D) of B samples."""
    c = F.normalize(up, dim=1).T @ F.normalize(residual, dim=1)  # (D, D)
    return LAMBDA * (c.square().sum() - c.diagonal().square().sum()) / batch


def alignment(up: Tensor, summary: Tensor, sample: Tensor) -> Tensor:
    """Minus the Jensen-Shannon bound on the information that tokens (M, D) have of their own sample's summary (B, D).

    Nowozin et al. 2016, arXiv:1606.00709: E_others[softplus(s)] - E_own[log 2 - softplus(-s)], less log 2. A batch of
    one has no others.
    """
    s = up @ summary.T  # (M, B)
    own = F.one_hot(sample, len(summary)).bool()
    positive = (math.log(2) - F.softplus(-s[own])).mean()
    negative = (F.softplus(s) - math.log(2)).masked_fill(own, 0).sum() / (len(s) * max(len(summary) - 1, 1))
    return negative - positive


class Summary(nn.Module):
    """Leaves tokens as they are, and keeps the mean of each sample's (B, D)."""

    seen: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor, context: Any) -> Tensor:
        if self.training and torch.is_grad_enabled():
            mask = None if context is None else context.token_mask
            real, _ = flat(mask, y)
            real = real.view(*y.shape[:-1], 1).to(y.dtype).flatten(1, -2)
            self.seen = (y.flatten(1, -2) * real).sum(1) / real.sum(1).clamp(min=1)
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "seen"}


class MixPhmBranch(InsertBranch):
    """up_e(dropout(activation(down(.)))) with an expert e drawn anew in every training forward, from torch's generator:
    a checkpoint draws it again, and no expert is without a gradient for DDP to wait for."""

    stochastic = True  # training differs from evaluation by design
    shared: SlowFactors

    def __init__(self, dim: int, hidden: int, dim_out: int, method: MixPhm):
        super().__init__()
        n, rank, experts = method.n, method.rank, method.experts
        self.activation, self.dropout = method.activation, method.dropout
        self.watched = bool(method.redundancy or method.alignment)
        self.down_left = nn.Parameter(torch.randn(n, dim // n, rank) / dim**0.5)
        self.down_right = nn.Parameter(torch.randn(n, rank, hidden // n) / rank**0.5)
        self.down_bias = nn.Parameter(torch.zeros(hidden))
        self.up_left = nn.Parameter(torch.randn(experts, n, hidden // n, rank) / hidden**0.5)
        self.up_right = nn.Parameter(torch.zeros(experts, n, rank, dim_out // n))
        self.up_bias = nn.Parameter(torch.zeros(experts, dim_out))
        self.kept: tuple[Any, tuple[Tensor, Tensor, Tensor]] | None = None
        self.seen: tuple[Tensor, Tensor, Tensor | None] | None = None  # up, residual, mask of the last training forward

    def adapt(self, tokens: Tensor, context: Any) -> Tensor:
        down, up, bias = self.one() if self.training else self.mean()
        h = ACTIVATIONS[self.activation](tokens @ down + self.down_bias)
        z = F.dropout(h, self.dropout, self.training) @ up + bias
        if self.watched and self.training:
            self.seen = z, tokens, None if context is None else context.token_mask
        return z

    def one(self) -> tuple[Tensor, Tensor, Tensor]:
        """down (D, H), and up (H, D_out) and bias (D_out,) of a random expert."""
        self.kept = None
        expert = torch.randint(len(self.up_bias), (1,), device=self.up_bias.device)
        left, right, bias = (p.index_select(0, expert)[0] for p in (self.up_left, self.up_right, self.up_bias))
        slow = self.shared.a
        return phm(slow, self.down_left, self.down_right), phm(slow, left, right), bias

    def mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same of all experts' mean; kept as long as no parameter changes, unless it needs a gradient."""
        params = (self.shared.a, *self.parameters())
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(p.requires_grad for p in params)):
            return self.averaged()
        state = [(p.data_ptr(), p._version, p.dtype) for p in params]
        if self.kept is None or self.kept[0] != state:
            kind = self.up_bias.device.type  # what is kept must serve every mode
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
                self.kept = state, self.averaged()
        return self.kept[1]

    def averaged(self) -> tuple[Tensor, Tensor, Tensor]:
        slow = self.shared.a
        up = phm(slow, self.up_left, self.up_right).mean(0)
        return phm(slow, self.down_left, self.down_right), up, self.up_bias.mean(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None, "seen": None}
