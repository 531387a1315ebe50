"""AdaLoRA: a budget of rank that shrinks, and stays where it matters (Zhang et al. 2023, arXiv:2303.10512)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptsuite.method import register
from adaptsuite.rank_allocator import RankAllocation, Triples, best
from adaptsuite.sites import Site

PARTS = {"up": 1, "sigma": 0, "down": 0}  # which dimension of each tensor counts the triples


@register("adalora")
@dataclass(frozen=True)
class AdaLora(RankAllocation):
    """W + alpha / start_rank * up diag(sigma) down, from `start_rank` triples a site to `rank` on average.

    The budget falls as a cubic (eq. 12); every `interval` steps sigma of the triples beyond it is set to zero,
    from where they may recover until the last allocation. That one takes the others' rows and columns away for good.
    """

    start_rank: int = 12
    alpha: float = 12.0
    interval: int = 10  # steps from one allocation to the next

    def check(self) -> None:
        super().check()
        self.expect("start_rank", self.start_rank >= self.rank, f"at least the rank of the end, {self.rank}")
        self.expect("interval", self.interval >= 1, "at least 1")

    def build(self, site: Site) -> nn.Module:
        self.expect_room(site, "start_rank")
        return AdaLoraBranch(site.dim, site.dim_out, self.start_rank, self.alpha / self.start_rank)

    def budget(self, step: int, handle) -> int:
        """Triples of all sites together after a step (eq. 12)."""
        first, last = self.span(handle)
        start, goal = self.start_rank * len(handle.adapter.branches), self.goal(handle)
        if step <= first:
            return start
        if step >= last:
            return goal
        return goal + int((start - goal) * (1 - (step - first) / (last - first)) ** 3)

    def on_step(self, step: int, optimizer, handle) -> None:
        if self.settled(handle):
            return
        branches, (first, last) = list(handle.adapter.branches.values()), self.span(handle)
        if step < last:
            for branch in branches:
                branch.look(self.smoothing)
        if step >= last or (step > first and step % self.interval == 0):
            scores = torch.cat([branch.importance() for branch in branches])
            kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
            kept[best(scores, self.budget(step, handle))] = True
            for branch, own in zip(branches, kept.split([branch.rank for branch in branches]), strict=True):
                if step >= last:
                    branch.keep(own.nonzero()[:, 0], optimizer)
                else:
                    branch.sigma.data.masked_fill_(~own, 0)


class AdaLoraBranch(Triples):
    """up (D_out, R) and down (R, D) start as N(0, .02^2), sigma (R,) at zero."""

    def __init__(self, dim: int, dim_out: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.down = nn.Parameter(torch.randn(rank, dim) * 0.02)
        self.up = nn.Parameter(torch.randn(dim_out, rank) * 0.02)
        self.sigma = nn.Parameter(torch.zeros(rank))

    @property
    def rank(self) -> int:
        return len(self.sigma)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.up, self.sigma, self.down

    def look(self, smoothing: tuple[float, float]) -> None:
        """Takes in |w g| of every entry (eq. 8)."""
        for name in PARTS:
            parameter = getattr(self, name)
            if parameter.grad is not None:
                self.observe(name, (parameter * parameter.grad).abs().detach(), smoothing)

    def importance(self) -> Tensor:
        """(R,): the score of a triple's sigma and the means of its vectors' (eq. 7)."""
        scores = {name: smoothed.score() for name, smoothed in self.scores.items()}
        if not scores:
            return torch.zeros_like(self.sigma)
        return scores["sigma"] + scores["down"].mean(1) + scores["up"].mean(0)

    def keep(self, kept: Tensor, optimizer) -> None:
        """Leaves only these triples, and what the optimiser remembers of them, in place."""
        for name, dim in PARTS.items():
            parameter = getattr(self, name)
            memory = optimizer.state.get(parameter, {})
            for key, value in memory.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    memory[key] = value.index_select(dim, kept)
            parameter.data, parameter.grad = parameter.data.index_select(dim, kept), None
        self.scores = nn.ModuleDict()

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        super().take_shapes(state)
        rank = len(state["sigma"]) if "sigma" in state and state["sigma"].ndim else self.rank
        if rank != self.rank:
            for name, dim in PARTS.items():
                shape = list(getattr(self, name).shape)
                shape[dim] = rank
                getattr(self, name).data = getattr(self, name).data.new_empty(shape)
