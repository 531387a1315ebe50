"""KAdaptation: weight changes as sums of Kronecker products (He et al. 2022, arXiv:2203.16329)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.sites import Site, find_sites


@register("kadaptation")
@dataclass(frozen=True)
class KAdaptation(Method):
    """W + scale * sum_i (s_i t_i^T) kron (u_i v_i^T), i = 1 ... factor, and one shift of the biases for each block.

    The slow factors s, t (factor values each) are shared by all blocks, for each role and component; the fast ones u, v
    belong to a site. The shift is shared by a block's sites of one width, and left out where a site has no bias.
    With `select` the blocks are those of the smallest local intrinsic dimension (section 3): `prepare` measures them,
    by trainings of `select_epochs`, and gives the method with `blocks` in its place.
    """

    factor: int = 32
    # The release has 160, on slow factors within .01: together a sixth of ours, whose terms start by reading the input
    # with unit vectors, so that learning rates of LoRA fit.
    scale: float = 1.0
    dropout: float = 0.0  # of the values of the weight's change; .5 in the release
    blocks: tuple[int, ...] | None = None
    select: int | None = None
    select_epochs: int = 5
    sites: tuple[str, ...] = ("attn.q", "attn.v")

    def check(self) -> None:
        self.expect("factor", self.factor >= 1, "at least 1")
        self.expect("scale", math.isfinite(self.scale) and self.scale != 0, "a number but 0")
        self.expect("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self.expect("select", self.select is None or self.select >= 1, "at least 1, or none")
        self.expect("select", self.select is None or self.blocks is None, "none where blocks are named")
        self.expect("select_epochs", self.select_epochs >= 1, "at least 1")

    def prepare(self, model: nn.Module, task, train, val, plan, say: Callable[[str], None] = print) -> "KAdaptation":
        from adaptsuite.subspace import local_intrinsic_dimension

        if self.select is None:
            return self
        num = len({site.block for site in find_sites(model, self.sites)})
        self.expect("select", self.select <= num, f"at most {num}, the number of blocks")
        plan = replace(plan, epochs=min(plan.epochs, self.select_epochs))
        say(f"select    {self.select} of {num} blocks by local intrinsic dimension, trainings of {plan.epochs} epochs")
        table = local_intrinsic_dimension(model, task, train, val, plan, sites=self.sites)
        for row in table:
            found = "none that is enough" if row["dimension"] is None else row["dimension"]
            say(f"          {row['part']}: dimension {found}, {row['start']:.3f} to {row['full']:.3f} in full")
        chosen = easiest_blocks(table, self.select)
        say(f"          chosen: {', '.join(map(str, chosen))}")
        return replace(self, blocks=chosen, select=None)

    def without_data(self) -> "KAdaptation":
        return self if self.select is None else replace(self, blocks=tuple(range(self.select)), select=None)

    def shared(self, sites: list[Site]) -> nn.Module:
        if self.select is not None:
            raise UsageError("kadaptation: select leaves the blocks to the data: call prepare first, or name blocks")
        widths = {width for site in sites for width in (site.dim, site.dim_out)}
        common = math.gcd(*widths)
        if common % self.factor:
            fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            found = ", ".join(map(str, sorted(widths)))
            raise UsageError(
                f"kadaptation: factor is {self.factor}, its sites are {found} wide; factors that divide them: {fits}"
            )
        return Slow(sites, self.factor)

    def build(self, site: Site, shared: "Slow") -> nn.Module:
        if site.weight is None:
            raise UsageError(f"kadaptation needs weights, site {site.role!r} is a module; name attn.q ... as sites")
        return KAdaptationBranch(site, shared, self)


def easiest_blocks(table: Sequence[dict], count: int) -> tuple[int, ...]:
    """The blocks of smallest dimension; of equals, and of those without one, the blocks that gain most."""
    order = sorted(table, key=lambda row: (row["dimension"] or math.inf, row["start"] - row["full"]))
    return tuple(sorted(block for row in order[:count] for block in row["blocks"]))


class Slow(nn.Module):
    """What sites share: s and t (factor, factor) of each component and role, shifts (D_out,) of each block."""

    def __init__(self, sites: list[Site], factor: int):
        super().__init__()
        self.s, self.t, self.shift = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        bound = math.sqrt(3 / factor)  # rows of length 1, on average
        for site in sites:
            if (key := self.key(site)) not in self.s:
                for side in (self.s, self.t):
                    side[key] = nn.Parameter(torch.empty(factor, factor).uniform_(-bound, bound))
            if (key := self.shift_key(site)) and key not in self.shift:
                self.shift[key] = nn.Parameter(torch.zeros(site.dim_out))

    @staticmethod
    def key(site: Site) -> str:
        return f"{site.component}/{site.role}".replace(".", "/")

    @staticmethod
    def shift_key(site: Site) -> str | None:
        """None where nothing could hold a shift, or nothing would see it (keys)."""
        held = site.bias is not None and site.role != "attn.k"
        return f"{site.component.replace('.', '/')}/{site.block}:{site.dim_out}" if held else None


class KAdaptationBranch(nn.Module):
    """(s t^T) kron (u v^T) = (s kron u) (t kron v)^T: the sum is a product `up` (D_out, n) times `down` (n, D), whose
    factors are never multiplied out in a forward. u starts at zero; in the release v does too, a dead point.
    """

    def __init__(self, site: Site, shared: Slow, method: KAdaptation):
        super().__init__()
        self.__dict__["shared"] = shared  # the adapter owns it, once
        self.key, self.shift_key = shared.key(site), shared.shift_key(site)
        self.scale, self.dropout, n = method.scale, method.dropout, method.factor
        bound = math.sqrt(3 * n / site.dim)
        self.u = nn.Parameter(torch.zeros(n, site.dim_out // n))
        self.v = nn.Parameter(torch.empty(n, site.dim // n).uniform_(-bound, bound))

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        if self.dropout and self.training:
            y = y + F.linear(x, F.dropout(self.delta(), self.dropout))
        else:
            up, down = self.factors()
            y = y + F.linear(F.linear(x, down), up) * self.scale
        return y if self.shift_key is None else y + self.row_shift()

    def factors(self) -> tuple[Tensor, Tensor]:
        s, t = self.shared.s[self.key], self.shared.t[self.key]
        up, down = (torch.einsum("ic,ip->icp", slow, fast).flatten(1) for slow, fast in ((s, self.u), (t, self.v)))
        return up.T, down

    def delta(self) -> Tensor:
        up, down = self.factors()
        return (up @ down) * self.scale

    def row_shift(self) -> Tensor:
        return self.shared.shift[self.shift_key]
