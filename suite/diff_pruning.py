"""Diff pruning: a change of few weights, found by gates and then tuned (Guo et al. 2021, arXiv:2012.07463).

First every weight has a change and a gate that chance may shut, and the expected number of open ones is penalised (the
hard concrete gates of Louizos et al. 2018, arXiv:1712.01312). Then the largest changes of all sites stay, and train
alone. Stored are these values and their int32 places (adaptsuite.sparse_matrices).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.rank_allocator import best
from adaptsuite.sites import Site
from adaptsuite.sparse_matrices import is_masked, maskable, matrices, take_mask, whole


@dataclass(frozen=True)
class Gate:
    """A number in [0, 1] that is 0 or 1 most of the time: clamp(sigmoid(logit(u) + alpha) * (high - low) + low)."""

    low: float = -1.5
    high: float = 1.5

    def value(self, alpha: Tensor, draw: bool) -> Tensor:
        """draw: with a new u in (0, 1) for each entry; else with u = 1/2."""
        noise = torch.rand_like(alpha).logit() if draw else 0.0
        return ((noise + alpha).sigmoid() * (self.high - self.low) + self.low).clamp(0, 1)

    def chance(self, alpha: Tensor) -> Tensor:
        """That it is not 0."""
        return (alpha - math.log(-self.low / self.high)).sigmoid()


@register("diff_pruning")
@dataclass(frozen=True)
class DiffPruning(Method):
    """W + z * w, with one gate z for each weight; structured: times one for each matrix. Biases stay.

    The authors train w at 1e-5, gates at .1 and the kept values at 5e-5: lr 1e-5, gate_rate 1e4. At the rates of
    adapters that would shut or open a gate in one step. Their code adds the penalties of both kinds of gates; here
    their chances are multiplied, as in the paper: that is the number of weights that change.
    """

    keep: float = 0.005  # share of the sites' weights
    gated: float = 0.5  # share of the steps before the cut; 0: a random choice, from the start
    structured: bool = False
    penalty: float = 1.25e-7  # of an open gate
    start: float = 5.0  # alpha
    stretch: tuple[float, float] = (-1.5, 1.5)
    gate_rate: float = 100.0  # learning rate of gates, as a multiple of that of w
    kept_rate: float = 5.0  # the same of what is kept, after the cut
    total_steps: int | None = None  # of the training; None: fit tells
    sites: tuple[str, ...] = ("attn.qkv", "attn.out", "mlp.in", "mlp.out")

    varying = ()

    def check(self) -> None:
        self.expect("keep", 0 < self.keep <= 1, "above 0 and at most 1: it is the share that changes")
        self.expect("gated", 0 <= self.gated < 1, "a share of the steps, in [0, 1)")
        self.expect("penalty", 0 <= self.penalty < math.inf, "a number from 0")
        self.expect("start", math.isfinite(self.start), "a number")
        fine = len(self.stretch) == 2 and self.stretch[0] < 0 and self.stretch[1] > 1
        self.expect("stretch", fine and all(map(math.isfinite, self.stretch)), "two numbers, below 0 and above 1")
        for rate in ("gate_rate", "kept_rate"):
            self.expect(rate, 0 < getattr(self, rate) < math.inf, "a number above 0")
        self.expect("total_steps", self.total_steps is None or self.total_steps >= 1, "at least 1, or none")

    @property
    def reshapes(self) -> bool:
        return self.gated > 0

    def without_data(self) -> "DiffPruning":
        """With the values that it ends with; while there are gates, it trains twice as many as the sites have."""
        return replace(self, gated=0.0)

    def build(self, site: Site) -> nn.Module:
        if site.weight is None:
            raise UsageError(f"diff_pruning needs weights, site {site.role!r} is a module; name attn.q, mlp.in ...")
        rates = {"change": 1.0, "alpha": self.gate_rate, "group": self.gate_rate}, {"change": self.kept_rate}
        return DiffBranch(site.dim, site.dim_out, self.start, self.structured, Gate(*self.stretch), rates)

    def bind(self, model: nn.Module, adapter: nn.Module) -> None:
        for branch in adapter.branches.values():
            maskable(branch)
        sizes = [whole(place).shape for place in matrices(adapter)]
        self.num_kept(sum(map(math.prod, sizes)))
        if not self.gated:
            self.cut(adapter, torch.cat([torch.rand(math.prod(size)) for size in sizes]))

    def num_kept(self, total: int) -> int:
        if not (kept := round(self.keep * total)):
            raise UsageError(f"diff_pruning: keep={self.keep:g} of {total:,} weights leaves none; raise it")
        return kept

    def regulariser(self, handle) -> Tensor | None:
        """penalty * the expected number of weights that change."""
        if self.settled(handle) or not self.penalty:
            return None
        return self.penalty * sum(branch.expected() for branch in handle.adapter.branches.values())

    def on_step(self, step: int, optimizer, handle) -> None:
        if self.settled(handle):
            return
        total = self.total_steps or handle.adapter.total_steps
        if total is None:
            raise UsageError("diff_pruning: train with fit, or set total_steps: the cut comes after a share of them")
        if step + 1 >= min(round(self.gated * total), total - 1):
            sizes = [branch.gated_change(draw=False) for branch in handle.adapter.branches.values()]
            self.cut(handle.adapter, torch.cat([change.detach().abs().flatten().cpu() for change in sizes]))

    def cut(self, adapter: nn.Module, scores: Tensor) -> None:
        """Leaves the weights of the highest scores a change, without gates."""
        branches, mask = list(adapter.branches.values()), torch.zeros(len(scores), dtype=torch.bool)
        mask[best(scores, self.num_kept(len(scores)))] = True
        for branch, own in zip(branches, mask.split([branch.change.numel() for branch in branches]), strict=True):
            branch.settle()
            take_mask(branch, "change", own)

    def settled(self, handle) -> bool:
        return all(map(is_masked, matrices(handle.adapter)))

    def record(self, handle) -> dict[str, Any]:
        branches = handle.adapter.branches.items()
        kept = {key: b._parameters["change"].numel() for key, b in branches if is_masked((b, "change"))}
        return {"weights": {"kept": kept, "of": sum(b.change.numel() for _, b in branches)}}


class DiffBranch(nn.Module):
    """z * change (D_out, D), with gates `alpha` (D_out * D,) and, structured, `group` (1,) while they are being found.

    Gates are flat for optimisers, which decay matrices: a gate is no weight.
    """

    exempt = {name: "a gate that is open or shut for sure has no gradient" for name in ("alpha", "group")}

    def __init__(self, dim: int, dim_out: int, start: float, structured: bool, gate: Gate, rates: tuple[dict, dict]):
        super().__init__()
        self.start, self.structured, self.gate, self.rates = start, structured, gate, rates
        self.change = nn.Parameter(torch.zeros(dim_out, dim))
        self.open()

    @property
    def stochastic(self) -> bool:
        return self.alpha is not None

    @property
    def lr_scale(self) -> dict[str, float]:
        return self.rates[0 if self.stochastic else 1]

    def open(self) -> None:
        """Gates at their start."""
        like, flag = self._parameters["change"], self._parameters["change"].requires_grad
        self.alpha = nn.Parameter(like.new_full((self.change.numel(),), self.start), flag)
        self.group = nn.Parameter(like.new_full((1,), self.start), flag) if self.structured else None

    def settle(self) -> None:
        """The change as the gates leave it, and no gates."""
        if self.alpha is not None:
            self.change.data = self.gated_change(draw=False).detach()
            self.alpha = self.group = None

    def gated_change(self, draw: bool) -> Tensor:
        change = self.change * self.gate.value(self.alpha, draw).view(self.change.shape)
        return change if self.group is None else change * self.gate.value(self.group, draw)

    def expected(self) -> Tensor:
        """Number of weights that change: for each the chance that its gates are open."""
        count = self.gate.chance(self.alpha).sum()
        return count if self.group is None else count * self.gate.chance(self.group).squeeze()

    def delta(self) -> Tensor:
        return self.change if self.alpha is None else self.gated_change(draw=self.training)

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        if "alpha" not in state:
            self.alpha = self.group = None
        elif self.alpha is None:
            self.open()
