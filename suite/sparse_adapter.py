"""SparseAdapter: a mask over any method's matrices, fixed before training (He et al. 2022, arXiv:2210.04284).

`sparse:lora`, `sparse:convpass`, `sparse:audio.soft_moa` ...: the method with its own settings, and a `density`. Only
the values that are kept train, are counted and are stored (adaptsuite.sparse_matrices).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from adaptsuite.bank import EMPTY
from adaptsuite.bottleneck import Bottleneck
from adaptsuite.errors import UsageError
from adaptsuite.method import Method, method_class, register, resolve
from adaptsuite.rank_allocator import best
from adaptsuite.sparse_matrices import dense_state, is_masked, maskable, matrices, parts, take_mask, whole

Score = Literal["snip", "grasp", "synflow", "magnitude", "random"]
Loss = Callable[[], Tensor]
ROUNDS = 100  # of SynFlow


@dataclass(frozen=True)
class Masked(Method):
    """What a mask adds to a method. One ranking goes over all its matrices; its vectors stay whole, and so do trained
    copies of base tensors.

    A random mask is there from `attach` on. The others come with the first step of `fit`, by the values after
    `score_after` steps on its batches: every score has the value as a factor, so a zero `up` would be cut whole, and
    beside it SNIP and SynFlow see nothing in `down`. Training then starts from the values before these steps, which
    decide the mask and nothing else.
    """

    density: float = 0.6  # share that is KEPT, 1 - sparsity; the authors' code calls this very share its sparsity
    score: Score = "snip"
    score_after: int = 10  # steps; as many batches are scored behind them, at least one

    inner: ClassVar[type[Method]]
    varying = ()

    def check(self) -> None:
        super().check()
        self.expect("density", 0 < self.density <= 1, "above 0 and at most 1: it is the share of values that is kept")
        self.expect_one_of("score", get_args(Score))
        self.expect("score_after", self.score_after >= 0, "at least 0")

    def __reduce__(self):
        return functools.partial(resolve, self.name, **_settings(self, type(self))), ()

    @property
    def reshapes(self) -> bool:
        return self.score != "random"

    def without_data(self) -> Method:
        return replace(self, score="random")

    def settled(self, handle) -> bool:
        return any(map(is_masked, matrices(handle.adapter)))

    def bind(self, model: nn.Module, adapter: nn.Module) -> None:
        super().bind(model, adapter)
        for part in parts(adapter):
            maskable(part)
        places = matrices(adapter)
        self.num_kept(sum(whole(place).numel() for place in places))
        if self.score == "random":
            self.cut(adapter, [torch.rand(whole(place).shape) for place in places])

    def begin(self, optimizer, handle, loss: Callable[[int], Tensor]) -> None:
        if self.settled(handle):
            return
        start, steps = {name: value.clone() for name, value in handle.state().items()}, self.score_after
        for step in range(steps):
            optimizer.zero_grad()
            loss(step).backward()
            optimizer.step()
        places = matrices(handle.adapter)
        if zero := sum(not whole(place).count_nonzero() for place in places):
            raise UsageError(
                f"{self.name}: {zero} of {len(places)} matrices are zero after {steps} warm-up steps, and so are their "
                f"scores by {self.score}: raise score_after"
            )
        scored = range(steps, steps + max(1, steps))
        scores = SCORES[self.score](self, handle.adapter, [functools.partial(loss, step) for step in scored])
        optimizer.zero_grad()
        optimizer.state.clear()
        handle.load_state(start)
        self.cut(handle.adapter, scores)

    def num_kept(self, total: int) -> int:
        """How many of so many values are kept; UsageError for none."""
        if not total:
            raise UsageError(f"{self.name}: {self.inner.name} has no matrices of its own to mask at its sites")
        if not (kept := round(self.density * total)):
            raise UsageError(f"{self.name}: a density of {self.density:g} keeps none of {total:,} values; raise it")
        return kept

    def cut(self, adapter: nn.Module, scores: Sequence[Tensor]) -> None:
        """Keeps the values of the highest scores, exactly `num_kept`, wherever they are."""
        flat = torch.cat([score.detach().float().cpu().flatten() for score in scores])
        if not flat.isfinite().all():
            raise UsageError(f"{self.name}: scores by {self.score} are not finite: lower the learning rate")
        mask = torch.zeros(len(flat), dtype=torch.bool)
        mask[best(flat, self.num_kept(len(flat)))] = True
        sizes = [score.numel() for score in scores]
        for place, own in zip(matrices(adapter), mask.split(sizes), strict=True):
            take_mask(*place, own)

    def record(self, handle) -> dict[str, Any]:
        places = matrices(handle.adapter)
        kept, total = sum(m._parameters[n].numel() for m, n in places), sum(whole(p).numel() for p in places)
        return {**super().record(handle), "mask": {"kept": kept, "of": total}}

    def plain(self, record):
        tensors, settings = dict(record.tensors), _settings(self, self.inner)
        for site in record.sites:
            start = f"branches.{site.key}."
            own = {n.removeprefix(start): tensors.pop(n) for n in record.tensors if n.startswith(start)}
            tensors |= {start + n: t for n, t in dense_state(self.build(site), own).items()}
        recipe = record.extra.get("recipe")
        recipe = {"recipe": {**recipe, "method": self.inner.name, "method_settings": settings}} if recipe else {}
        return replace(record, method=self.inner(**settings), tensors=tensors, extra={**record.extra, **recipe})


def _settings(method: Method, kind: type[Method]) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(kind)}


@functools.cache
def masked(name: str) -> type[Masked]:
    """The method of `sparse:NAME`. Raises UsageError for methods that take no mask, with the reason."""
    inner, reason = method_class(name.removeprefix("sparse:")), None
    if issubclass(inner, Masked):
        reason = "is masked already"
    elif inner.name.startswith("peft:"):
        reason = "keeps its tensors as peft does"
    elif inner.in_place or inner.reshapes is not False:
        reason = "changes the backbone itself" if inner.in_place else "changes its tensors while it trains"
    if reason:
        raise UsageError(f"method {name!r} cannot be: {inner.name} {reason}")
    facts = {"name": name, "inner": inner, "__module__": __name__, "__doc__": f"{inner.name} under a mask."}
    return make_dataclass(f"Sparse{inner.__name__}", (), bases=(Masked, inner), namespace=facts, frozen=True)


@register("sparse_adapter")
@dataclass(frozen=True)
class SparseAdapter(Masked, Bottleneck):
    """A bottleneck of whose values 60 % are kept."""

    inner = Bottleneck


@register("large_sparse")
@dataclass(frozen=True)
class LargeSparse(SparseAdapter):
    """Four times as wide, a quarter kept: as many values in matrices as the dense bottleneck has."""

    bottleneck: int = 256
    density: float = 0.25


# ---- how much each value of the matrices matters


def snip(method: Masked, adapter: nn.Module, losses: Sequence[Loss]) -> list[Tensor]:
    """|dL/dm| at a mask m of ones: |w g|, g of all batches together (Lee et al. 2019, arXiv:1810.02340)."""
    values = [whole(place) for place in matrices(adapter)]
    return [(w * g).abs() for w, g in zip(values, _gradients(values, losses), strict=True)]


def grasp(method: Masked, adapter: nn.Module, losses: Sequence[Loss]) -> list[Tensor]:
    """w Hg, what the squared norm of the gradient loses without the value (Wang et al. 2020, arXiv:2002.07376).

    Of the loss as it is: the authors divide the logits by 200 first.
    """
    values = [whole(place) for place in matrices(adapter)]

    def along(loss: Loss) -> Tensor:
        graph = torch.autograd.grad(loss(), values, create_graph=True, materialize_grads=True)
        return sum((a * b).sum() for a, b in zip(graph, total, strict=True))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # fused ones have no second derivative
        total = _gradients(values, losses)
        curved = _gradients(values, [functools.partial(along, loss) for loss in losses])
    return [w * h for w, h in zip(values, curved, strict=True)]


def synflow(method: Masked, adapter: nn.Module, losses: Sequence[Loss]) -> list[Tensor]:
    """|w dR/dw|, R the sum of the branches' outputs for ones, all their values made positive: no data are looked at.

    In rounds, whose density falls as a power (Tanaka et al. 2020, arXiv:2006.05467, algorithm 1): what one has cut
    carries nothing in the next. The branches run by themselves, as in the code of SparseAdapter.
    """
    parameters = [p for part in parts(adapter) for p in part.parameters()]
    before, values = [p.detach().clone() for p in parameters], [whole(place) for place in matrices(adapter)]
    sizes = [w.numel() for w in values]
    with torch.no_grad():
        for p in parameters:
            p.abs_()
    try:
        for turn in range(1, ROUNDS + 1):
            flow = _gradients(values, [functools.partial(_flow, adapter, key) for key in adapter.branches])
            scores = torch.cat([(w * g).detach().abs().flatten() for w, g in zip(values, flow, strict=True)])
            left = torch.zeros_like(scores)
            left[best(scores, round(method.density ** (turn / ROUNDS) * len(scores)))] = 1
            with torch.no_grad():
                for w, own in zip(values, left.split(sizes), strict=True):
                    w.mul_(own.view_as(w))
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
    return list(scores.split(sizes))


def _flow(adapter: nn.Module, key: str) -> Tensor:
    branch, site = adapter.branches[key], adapter.sites[key]
    if hasattr(branch, "delta"):
        return branch.delta().sum()
    like = next(branch.parameters())
    try:
        return branch(like.new_ones(1, 1, site.dim), like.new_zeros(1, 1, site.dim_out), EMPTY).sum()
    except Exception as e:  # one that needs a grid, or the forward around it
        kind = type(branch).__name__
        raise UsageError(f"score synflow runs each branch by itself, which {kind} does not do: take snip") from e


def magnitude(method: Masked, adapter: nn.Module, losses: Sequence[Loss]) -> list[Tensor]:
    return [whole(place).abs() for place in matrices(adapter)]


def _gradients(values: Sequence[Tensor], losses: Sequence[Loss]) -> list[Tensor]:
    """Summed over the losses, one graph at a time."""
    total = [torch.zeros_like(value) for value in values]
    for loss in losses:
        for own, g in zip(total, torch.autograd.grad(loss(), values, materialize_grads=True), strict=True):
            own += g.detach()
    return total


SCORES = {"snip": snip, "grasp": grasp, "synflow": synflow, "magnitude": magnitude}
