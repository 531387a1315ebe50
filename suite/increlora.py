"""IncreLoRA: rank grows one triple at a time where it matters (Zhang et al. 2023, arXiv:2308.12043)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import register
from adaptsuite.rank_allocator import RankAllocation, Triples, best
from adaptsuite.sites import Site

START = 1e-5  # sigma of a triple that begins to act


@register("increlora")
@dataclass(frozen=True)
class IncreLora(RankAllocation):
    """W + alpha / R * sum_k sigma_k up_k down_k of R triples, from `start_rank` at each site to `rank` on average.

    Beside its triples each site has a reserve, whose vectors learn and do not act. At equal intervals the `top` most
    important sites make theirs a triple, and get a new one; at the last the reserves go. Two departures: the authors'
    reserve acts with a sigma of 1e-5, and growth there shrinks what a site has learnt by R / (R + 1), for which sigma
    makes up here.
    """

    start_rank: int = 1
    orthogonality: float = 0.1
    top: int = 8  # sites that grow at once

    def check(self) -> None:
        super().check()
        self.expect("start_rank", 1 <= self.start_rank <= self.rank, f"from 1 to the rank of the end, {self.rank}")
        self.expect("top", self.top >= 1, "at least 1")

    def build(self, site: Site) -> nn.Module:
        self.expect_room(site, "rank")
        return IncreLoraBranch(site.dim, site.dim_out, self.start_rank, self.alpha, self.rank > self.start_rank)

    def budget(self, step: int, handle) -> int:
        """Triples of all sites together after a step: `top` more at equal intervals."""
        (first, last), start = self.span(handle), self.start_rank * len(handle.adapter.branches)
        rounds = -(-(self.goal(handle) - start) // self.top)
        if rounds > last - first:
            have = f"{rounds} rounds of growth do not fit into {last - first} steps"
            raise UsageError(f"increlora: {have}: raise top ({self.top}), or train longer")
        past = min(max(step - first, 0), last - first) * rounds // (last - first)
        return min(start + past * self.top, self.goal(handle))

    def on_step(self, step: int, optimizer, handle) -> None:
        if self.settled(handle):
            return
        branches = list(handle.adapter.branches.values())
        for branch in branches:
            branch.look(self.smoothing)
        missing = self.budget(step, handle) - sum(branch.rank for branch in branches)
        order = best(self.importance(branches), len(branches)).tolist() if missing > 0 else []
        while missing > 0:
            able = [branches[i] for i in order if branches[i].rank < branches[i].full][:missing]
            for branch in able:
                branch.grow()
            missing -= len(able)
        if self.settled(handle):
            for branch in branches:
                branch.stop()

    def importance(self, branches: list["IncreLoraBranch"]) -> Tensor:
        """(sites,), the same on all processes, which see other samples."""
        scores = torch.stack([branch.importance() for branch in branches])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(scores)
        return scores


class IncreLoraBranch(Triples):
    """Triples as lists of down (1, D), up (D_out, 1) and sigma (1,), drawn as in AdaLoRA; while it grows, the last
    down and up are the reserve and have no sigma."""

    def __init__(self, dim: int, dim_out: int, rank: int, alpha: float, growing: bool):
        super().__init__()
        self.alpha, self.full = alpha, min(dim, dim_out)
        self.down = nn.ParameterList([torch.randn(1, dim) * 0.02 for _ in range(rank + growing)])
        self.up = nn.ParameterList([torch.randn(dim_out, 1) * 0.02 for _ in range(rank + growing)])
        self.sigma = nn.ParameterList([torch.zeros(1) for _ in range(rank)])
        self.register_buffer("seed", torch.randint(2**31, ()))  # of the reserves to come
        self.seen: list[Tensor] = []  # the change, and its gradient of this step's backward passes together

    @property
    def rank(self) -> int:
        return len(self.sigma)

    @property
    def growing(self) -> bool:
        return len(self.down) > self.rank

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        up, down = [*self.up][: self.rank], [*self.down][: self.rank]
        return torch.cat(up, 1), torch.cat([*self.sigma]), torch.cat(down)

    def sides(self) -> tuple[Tensor, Tensor]:
        return torch.cat([*self.up], 1).T, torch.cat([*self.down])

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        if self.growing and torch.is_grad_enabled():  # importance needs the gradient of the change itself
            return y + F.linear(x, self.delta())
        return super().forward(x, y, context)

    def delta(self) -> Tensor:
        change = super().delta()
        if self.growing and torch.is_grad_enabled():
            reserve = self.up[-1] @ self.down[-1] * (START * self.scale)
            change = change + (reserve - reserve.detach())  # it learns and does not act
            if self.training and change.requires_grad:
                change.register_hook(lambda gradient: self.see(change.detach(), gradient))
        return change

    def see(self, change: Tensor, gradient: Tensor) -> None:
        self.seen = [change, gradient + self.seen[1] if self.seen else gradient]

    def look(self, smoothing: tuple[float, float]) -> None:
        """Takes in sum |change * its gradient| / sqrt(number of values), of all micro-batches of the step together."""
        if self.seen:
            change, gradient = (t.to(self.sigma[0].dtype) for t in self.seen)
            value, self.seen = (change * gradient).abs().sum() / math.sqrt(change.numel()), []
            if value.isfinite():  # a step that was skipped before may have left what is not
                self.observe("change", value, smoothing)

    def importance(self) -> Tensor:
        return self.scores["change"].score() if self.scores else torch.zeros_like(self.sigma[0][0])

    def grow(self) -> None:
        """The reserve becomes a triple; what is there keeps its size, though the scale falls."""
        generator = torch.Generator().manual_seed(int(self.seed) + self.rank)
        with torch.no_grad():
            for sigma in self.sigma:
                sigma.mul_((self.rank + 1) / self.rank)
        self.sigma.append(torch.full_like(self.sigma[0], START))
        for vectors in (self.down, self.up):
            vectors.append((torch.randn(vectors[0].shape, generator=generator) * 0.02).to(vectors[0]))

    def stop(self) -> None:
        """Leaves the triples alone: no reserve, no scores."""
        self.down, self.up = (nn.ParameterList([*own][: self.rank]) for own in (self.down, self.up))
        self.scores, self.seen = nn.ModuleDict(), []

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        super().take_shapes(state)
        for name in ("down", "up", "sigma"):
            own, count = [*getattr(self, name)], sum(n.startswith(f"{name}.") for n in state)
            if count and count != len(own):
                more = [nn.Parameter(torch.empty_like(own[0]), own[0].requires_grad) for _ in range(count - len(own))]
                setattr(self, name, nn.ParameterList([*own[:count], *more]))
