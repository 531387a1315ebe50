"""Training in a random subspace, and the local intrinsic dimension of parts of a model that it measures.

Li et al. 2018 (arXiv:1804.08838), section 2; of pretrained models Aghajanyan et al. 2020 (arXiv:2012.13255); of single
modules He et al. 2022 (arXiv:2203.16329), section 3.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import Method, register
from adaptsuite.plan import Plan
from adaptsuite.sites import Site, find_sites

DIMS = (8, 32, 128, 512, 2048)


@register("subspace")
@dataclass(frozen=True)
class Subspace(Method):
    """W + P theta: one vector of `dims` values moves all weights of the sites together (arXiv:1804.08838, eq. 2).

    Each weight follows one of the values, with a sign, both drawn from `seed`; P is an isometry. The vector's learning
    rate is sqrt(weights / dims) times the plan's: then a step is as long as one that trains the weights themselves.
    """

    dims: int = 512
    seed: int = 0
    blocks: tuple[int, ...] | None = None
    sites: tuple[str, ...] = ("attn.qkv", "attn.out", "mlp.in", "mlp.out")

    def check(self) -> None:
        self.expect("dims", self.dims >= 1, "at least 1")
        self.expect("seed", self.seed >= 0, "a whole number from 0")

    def shared(self, sites: list[Site]) -> nn.Module:
        _need_weights(self, sites)
        total = sum(s.dim * s.dim_out for s in sites)
        self.expect("dims", self.dims <= total, f"at most {total}, the number of weights at its sites")
        return Projection(sites, self.dims, self.seed)

    def build(self, site: Site, shared: "Projection") -> nn.Module:
        return SubspaceBranch(site, shared)


class Projection(nn.Module):
    """theta (d,), and how the weights of all sites hang on it: a weight moves by the value number place // 2, negative
    where its place is odd, over the root of how many weights share that value.

    Places are drawn anew from the seed when an adapter is loaded; `checksum` tells whether they are the same.
    """

    def __init__(self, sites: list[Site], dims: int, seed: int):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(dims))
        self.places: dict[str, Tensor] = {}  # until each site's branch takes its own
        generator = torch.Generator().manual_seed(seed)
        at = checksum = 0
        for site in sites:
            num = site.dim * site.dim_out
            value = (torch.randperm(num, generator=generator) + at) % dims  # as often as every other one, or once more
            sign = torch.randint(2, (num,), generator=generator)
            places = (2 * value + sign).to(torch.int32)
            checksum = zlib.crc32(places.numpy().tobytes(), checksum)
            self.places[site.key], at = places, at + num
        counts = at // dims + (torch.arange(dims) < at % dims)
        self.register_buffer("share", counts.rsqrt(), persistent=False)
        self.register_buffer("checksum", torch.tensor(checksum))
        self.lr_scale = {"theta": math.sqrt(at / dims)}

    def values(self) -> Tensor:
        """By place: (2 d,), each value and its negative."""
        theta = self.theta * self.share
        return torch.stack([theta, -theta], 1).flatten()


class SubspaceBranch(nn.Module):
    """The part of P theta that is one site's weight."""

    def __init__(self, site: Site, shared: Projection):
        super().__init__()
        self.__dict__["shared"] = shared  # the adapter owns it, once
        self.shape = (site.dim_out, site.dim)
        self.register_buffer("places", shared.places.pop(site.key), persistent=False)

    def delta(self) -> Tensor:
        return self.shared.values().index_select(0, self.places).view(self.shape)


@dataclass(frozen=True)
class _Everything(Method):
    """W + D with a trained D of W's shape: the whole space that a subspace is compared with."""

    blocks: tuple[int, ...] | None = None
    sites: tuple[str, ...] = ()

    name = "all weights"

    def build(self, site: Site) -> nn.Module:
        _need_weights(self, [site])
        return _EverythingBranch(site)


class _EverythingBranch(nn.Module):
    def __init__(self, site: Site):
        super().__init__()
        self.change = nn.Parameter(torch.zeros(site.dim_out, site.dim))

    def delta(self) -> Tensor:
        return self.change


def _need_weights(method: Method, sites: Sequence[Site]) -> None:
    for site in sites:
        if site.weight is None:
            raise UsageError(
                f"{method.name} moves weights, site {site.role!r} is a module; name attn.qkv, mlp.in ... as sites"
            )


# ---- local intrinsic dimension


def local_intrinsic_dimension(
    model: nn.Module,
    task,
    train,
    val,
    plan: Plan,
    *,
    sites: Sequence[str] = Subspace.sites,
    dims: Sequence[int] = DIMS,
    share: float = 0.9,
    least: float = 0.1,
    by: Literal["block", "role"] = "block",
    head: Sequence[str] | None = None,
    sample: Any = None,
) -> list[dict[str, Any]]:
    """How many dimensions each block, or the sites of each role, needs to be worth nearly what all its weights are.

    Rows {"part", "blocks", "sites", "weights", "start", "full", "scores" {d: score}, "dimension"}: scores of the head
    alone, of the part trained in full, and in subspaces of rising d, up to the first that has `share` of the gain
    full - start. That d is the dimension; None where no d is enough, and for parts that gain less than `least` of what
    the best part gains. Scores are the best `task.monitor` on val.

    Each score is a training by `plan`: 1 + up to (1 + len(dims)) for each part. The model is left as it was, on the
    plan's device.  head: paths trained beside, in every training; None: the model's own head.  sample: as `attach`
    takes it; None: what the task calls the model with.
    """
    if val is None:
        raise UsageError("the local intrinsic dimension is measured by validation scores: give validation rows")
    head = [s.path for s in find_sites(model, "head?")] if head is None else list(head)
    sample = _first_call(model, task, val, plan) if sample is None else sample

    def score(method) -> float:
        return _score(model, method, task, train, val, plan, head, sample)

    start, table = score("linear" if head else None), []
    for part, roles, blocks in _parts(model, sites, by):
        chosen = {"sites": roles, "blocks": blocks}
        weights = sum(s.dim * s.dim_out for s in find_sites(model, roles) if blocks is None or s.block in blocks)
        scores = {"start": start, "full": score(_Everything(**chosen)), "scores": {}, "dimension": None}
        table.append({"part": part, **chosen, "weights": weights, **scores})
    best = max(row["full"] for row in table) - start
    for row in table:
        gain, chosen = row["full"] - start, {"sites": row["sites"], "blocks": row["blocks"]}
        for d in sorted(d for d in dims if d <= row["weights"]) if gain > 0 and gain >= least * best else ():
            row["scores"][d] = score(Subspace(d, plan.seed, **chosen))
            if row["scores"][d] >= start + share * gain:
                row["dimension"] = d
                break
    return table


def _parts(model: nn.Module, roles: Sequence[str], by: str) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """(name, roles, blocks) of each part."""
    if by == "role":
        yield from ((role, (role,), None) for role in roles)
    else:
        for block in sorted({s.block for s in find_sites(model, roles) if s.block is not None}):
            yield f"block {block}", tuple(roles), (block,)


def _first_call(model: nn.Module, task, data, plan: Plan) -> tuple[tuple, dict[str, Any]] | None:
    """Arguments of the model's first call when the task predicts; None where it calls only parts of the model."""
    from adaptsuite.predict import predict_all

    seen: list[tuple] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        predict_all(model, task, data, 1, plan.device, indices=[0], precision=plan.precision)
    finally:
        hook.remove()
    return seen[0] if seen else None


def _score(model: nn.Module, method, task, train, val, plan: Plan, head: Sequence[str], sample: Any) -> float:
    """The best score that the method reaches by the plan; without a method, the model's own."""
    from adaptsuite.predict import predict_all
    from adaptsuite.trainer import fit

    monitor = plan.monitor or task.monitor
    if method is None:
        outputs, targets = predict_all(model, task, val, plan.batch_size, plan.device, precision=plan.precision)
        return task.score(outputs, targets)[monitor]
    torch.manual_seed(plan.seed)
    handle = attach(model, method, "measured", sample, head=head)
    try:
        found = fit(model, task, train, val, plan, handle=handle).best.get(monitor)
    finally:
        handle.detach()
    return -math.inf if found is None else found  # never finite
