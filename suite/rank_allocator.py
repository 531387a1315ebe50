"""Sites that compete for a budget of rank: the changes of weights as SVD triples, and what decides who gets how many.

A triple is scored by sensitivity times uncertainty, both smoothed over steps (Zhang et al. 2023, arXiv:2303.10512,
eqs. 8 to 11). adaptsuite.adalora takes triples away, adaptsuite.increlora adds them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method
from adaptsuite.sites import Site


@dataclass(frozen=True)
class RankAllocation(Method):
    """Settings of a method whose sites have `rank` triples on average when allocation is over.

    A share `warmup` of the steps comes before allocation, and a share `final` after it. Until it is over no epoch of a
    training is kept: the adapter would not be of the size asked for.
    """

    rank: int = 8
    start_rank: int = 8
    alpha: float = 8.0
    orthogonality: float = 0.5  # weight of the regulariser
    smoothing: tuple[float, float] = (0.85, 0.85)  # of sensitivity, of uncertainty: what stays of the old at a step
    warmup: float = 0.1
    final: float = 0.5
    total_steps: int | None = None  # of the training; None: fit tells
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    reshapes = True

    def check(self) -> None:
        self.expect("rank", self.rank >= 1, "at least 1")
        self.expect("alpha", math.isfinite(self.alpha) and 0 < self.alpha <= 1e4, "above 0 and at most 1e4")
        self.expect("orthogonality", 0 <= self.orthogonality < math.inf, "a number from 0")
        fine = len(self.smoothing) == 2 and all(0 < beta < 1 for beta in self.smoothing)
        self.expect("smoothing", fine, "two numbers between 0 and 1")
        for share in ("warmup", "final"):
            self.expect(share, 0 <= getattr(self, share) < 1, "a share of the steps, in [0, 1)")
        self.expect("warmup", self.warmup + self.final < 1, f"below 1 - final, {1 - self.final:g}")
        self.expect("total_steps", self.total_steps is None or self.total_steps >= 1, "at least 1, or none")

    def without_data(self) -> "RankAllocation":
        """With the number of triples that it ends with."""
        return replace(self, start_rank=self.rank)

    def expect_room(self, site: Site, setting: str) -> None:
        """Raises UsageError for a site that has no weight, or one of a smaller rank than the setting."""
        least, rank = min(site.dim, site.dim_out), getattr(self, setting)
        if site.weight is None:
            raise UsageError(f"{self.name} needs weights, site {site.role!r} is a module; name attn.q, mlp.in ...")
        if rank > least:
            raise UsageError(f"{self.name}: {setting} is {rank}, above {least}: {site.path} has no more")

    def span(self, handle) -> tuple[int, int]:
        """Steps after the first and at the second of which rank is allocated."""
        total = self.total_steps or handle.adapter.total_steps
        if total is None:
            raise UsageError(f"{self.name}: train with fit, or set total_steps: the schedule is a share of them")
        last = total - max(1, round(self.final * total))
        return min(round(self.warmup * total), last), last

    def goal(self, handle) -> int:
        """Triples of all sites together in the end."""
        return self.rank * len(handle.adapter.branches)

    def settled(self, handle) -> bool:
        return sum(branch.rank for branch in handle.adapter.branches.values()) == self.goal(handle)

    def regulariser(self, handle) -> Tensor | None:
        """orthogonality * the mean over all up and down of |P^T P - I|: unsquared, as in the authors' code (eq. 4)."""
        if not self.orthogonality:
            return None
        gaps = [_gap(rows) for branch in handle.adapter.branches.values() for rows in branch.sides() if len(rows)]
        return self.orthogonality * torch.stack(gaps).mean()

    def record(self, handle) -> dict[str, Any]:
        return {"ranks": {key: branch.rank for key, branch in handle.adapter.branches.items()}}

    def sections(self, handle) -> list[dict[str, Any]]:
        ranks = [(handle.adapter.sites[key], branch.rank) for key, branch in handle.adapter.branches.items()]
        text = f"{sum(rank for _, rank in ranks)} triples at {len(ranks)} sites, {self.rank} on average were asked for."
        return [{"title": "Where the rank went", "text": text, "figure": rank_picture(ranks)}]


class Smoothed(nn.Module):
    """Sensitivity and uncertainty of something, as moving averages (eqs. 9 and 10)."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.register_buffer("mean", torch.zeros_like(like))
        self.register_buffer("spread", torch.zeros_like(like))

    def update(self, value: Tensor, smoothing: tuple[float, float]) -> None:
        self.mean.lerp_(value, 1 - smoothing[0])
        self.spread.lerp_((value - self.mean).abs(), 1 - smoothing[1])

    def score(self) -> Tensor:
        return self.mean * self.spread


class Triples(nn.Module):
    """y + scale * up(sigma * down(x)), of R triples; `scores` are there while rank is being allocated."""

    scale: float

    def __init__(self):
        super().__init__()
        self.scores = nn.ModuleDict()

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """up (D_out, R), sigma (R,), down (R, D)."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        up, sigma, down = self.factors()
        return y + F.linear(F.linear(x, down) * (sigma * self.scale), up)

    def delta(self) -> Tensor:
        up, sigma, down = self.factors()
        return up @ (sigma[:, None] * down) * self.scale

    def sides(self) -> tuple[Tensor, Tensor]:
        """The vectors that should be orthonormal, as rows: (R, D_out) and (R, D)."""
        up, _, down = self.factors()
        return up.T, down

    def observe(self, name: str, value: Tensor, smoothing: tuple[float, float]) -> None:
        if name not in self.scores:
            self.scores[name] = Smoothed(value)
        self.scores[name].update(value, smoothing)

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Makes room for the tensors of a saved state; see adaptsuite.host.Handle.load_state."""
        means = {n.split(".")[1]: t for n, t in state.items() if n.startswith("scores.") and n.endswith(".mean")}
        if means.keys() != set(self.scores):
            like = next(self.parameters())
            self.scores = nn.ModuleDict({n: Smoothed(like.new_empty(t.shape)) for n, t in means.items()})


def _gap(rows: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device))


def best(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores, of equals the first: never more and never fewer."""
    return scores.sort(descending=True, stable=True).indices[:count]


def rank_picture(ranks: Sequence[tuple[Site, int]]) -> str:
    """Roles over blocks, shaded and numbered by rank (those of several sites of a role in one block are summed)."""
    import numpy as np

    from adaptsuite import figures

    several = len({s.component for s, _ in ranks}) > 1
    places = [(f"{s.component} {s.role}" if several else s.role, -1 if s.block is None else s.block) for s, _ in ranks]
    rows, columns = list(dict.fromkeys(name for name, _ in places)), sorted({block for _, block in places})
    table = np.full((len(rows), len(columns)), np.nan)
    for (name, block), (_, rank) in zip(places, ranks, strict=True):
        row, column = rows.index(name), columns.index(block)
        table[row, column] = np.nansum([table[row, column], rank])
    with figures.canvas(1.8 + 0.42 * len(columns), 0.9 + 0.34 * len(rows)) as figure:
        axis = figure.subplots()
        axis.imshow(table, cmap="Blues", vmin=0, vmax=max(1, np.nanmax(table)), aspect="auto")
        axis.set_xticks(range(len(columns)), ["none" if c < 0 else c for c in columns])
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xlabel("block")
        for (row, column), rank in np.ndenumerate(table):
            if np.isfinite(rank):
                ink = "white" if rank > 0.6 * np.nanmax(table) else figures.INK
                axis.text(column, row, f"{rank:.0f}", ha="center", va="center", color=ink)
        return figures.embed(figure)
