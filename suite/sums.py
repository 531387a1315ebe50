"""Sums of what adapters change, for each kind of method: (terms, elementwise, rank) -> a method and its tensors.

Low-rank pairs are summed by concatenating ranks, bottlenecks by concatenating widths, vectors as they are. Negation
negates one of two factors (Zhang et al. 2023, arXiv:2306.14870, section 3): negated both, they would cancel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptsuite.artifact import Record
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.method import Method

SHARED_START = 0.5  # cosine of two `down` factors; independent draws of n values are within a few 1 / sqrt(n) of zero

Sum = tuple[Method, dict[str, Tensor], dict[str, Any]]  # the third: facts for the record


@dataclass(frozen=True)
class Term:
    """One adapter of a sum."""

    name: str
    factor: float
    record: Record

    def get(self, tensor: str) -> Tensor:
        return self.record.tensors[tensor].double()

    def __str__(self) -> str:
        return f"{self.name} ({self.record.folder})"


def _keys(terms: list[Term]) -> list[str]:
    return [f"branches.{site.key}" for site in terms[0].record.sites]


def _shares(terms: list[Term]) -> list[float]:
    """Of `down` factors that are averaged: to negate or to scale an adapter must leave them as they are."""
    total = sum(abs(t.factor) for t in terms)
    return [abs(t.factor) / total for t in terms]


def _same_start(terms: list[Term], names: list[str]) -> None:
    for name in names:
        first = terms[0].get(name)
        for term in terms[1:]:
            other = term.get(name)
            if other.shape != first.shape:
                raise AdapterError(
                    f"elementwise: {term} has {tuple(other.shape)} at {name}, expected {tuple(first.shape)}"
                )
            cosine = float(torch.nn.functional.cosine_similarity(first.flatten(), other.flatten(), dim=0))
            if cosine < SHARED_START:
                raise AdapterError(
                    f"elementwise: {term} and {terms[0]} did not start from the same values (cosine {cosine:.2f} at "
                    f"{name}): their factors cannot be summed apart; leave elementwise out"
                )


def low_rank(terms: list[Term], elementwise: bool, rank: int | None) -> Sum:
    """Concatenated ranks: sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 | w_2 s_2 B_2 ...] [A_1 ; A_2 ; ...], at scale 1."""
    whole, pairs = sum(t.record.method.rank for t in terms), {}
    for key in _keys(terms):
        ups = [t.factor * t.record.method.scale * t.get(f"{key}.up") for t in terms]
        pairs[key] = torch.cat(ups, 1), torch.cat([t.get(f"{key}.down") for t in terms])
    exact, errors = pairs, {}
    if elementwise:
        if rank is not None:
            raise UsageError("rank is for exact sums; an elementwise sum has the rank of its adapters")
        _same_start(terms, [f"{key}.down" for key in _keys(terms)])
        pairs, whole = {key: _apart(terms, key) for key in exact}, terms[0].record.method.rank
    elif rank is not None:
        if not 1 <= rank <= whole:
            raise UsageError(f"rank is {rank}, expected 1 to {whole}, the rank of the exact sum")
        pairs, whole = {key: truncated(*pair, rank) for key, pair in exact.items()}, rank
    if pairs is not exact:
        errors = _errors(exact, pairs)
    method = replace(terms[0].record.method, rank=whole, alpha=float(whole), rslora=False, dropout=0.0)
    tensors = {f"{key}.{part}": t for key, pair in pairs.items() for part, t in zip(("up", "down"), pair, strict=True)}
    how = f"rank {whole}, " + ("elementwise" if elementwise else "exact" if rank is None else "cut by SVD")
    return method, tensors, {"how": how, **errors}


def _apart(terms: list[Term], key: str) -> tuple[Tensor, Tensor]:
    up = sum(t.factor * t.record.method.scale * t.get(f"{key}.up") for t in terms)
    return up, sum(share * t.get(f"{key}.down") for share, t in zip(_shares(terms), terms, strict=True))


def truncated(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The pair of this rank nearest to up @ down in the Frobenius norm (Eckart and Young), both sides of one size."""
    (left, a), (right, b) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(a @ b.T, full_matrices=False)
    root = s[:rank].sqrt()
    missing = max(0, rank - len(s))  # a layer narrower than the rank
    pad = torch.nn.functional.pad
    return pad(left @ u[:, :rank] * root, (0, missing)), pad((root[:, None] * v[:rank]) @ right.T, (0, 0, 0, missing))


def _errors(exact: Mapping[str, tuple[Tensor, Tensor]], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """|found - exact| / |exact| in the Frobenius norm, of all sites together and of the worst one."""
    norms = {key: (_norm(*pair), _norm(*_minus(pairs[key], pair))) for key, pair in exact.items()}
    size, off = (sum(n[i] ** 2 for n in norms.values()) ** 0.5 for i in (0, 1))
    worst, (own, wrong) = max(norms.items(), key=lambda item: item[1][1] / (item[1][0] or 1.0))
    site = worst.removeprefix("branches.").replace("/", ".")
    return {"relative_error": off / (size or 1.0), "worst": {"site": site, "relative_error": wrong / (own or 1.0)}}


def _minus(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([a[0], -b[0]], 1), torch.cat([a[1], b[1]])


def _norm(up: Tensor, down: Tensor) -> float:
    """Frobenius norm of up @ down, which is never formed."""
    return float(torch.linalg.norm(torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T))


def wide(terms: list[Term], elementwise: bool, rank: int | None) -> Sum:
    """Concatenated hidden features: the sum of up_i(f(down_i(x))) is one bottleneck of all their widths."""
    _no_rank(terms, rank, "a bottleneck has a nonlinearity between its factors: an SVD cannot make it narrower")
    first = terms[0].record.method
    for term in terms[1:]:
        for setting in ("placement", "with_residual", "activation"):
            ours, theirs = getattr(term.record.method, setting), getattr(first, setting)
            if ours != theirs:
                raise AdapterError(f"{term} has {setting}={ours!r}, {terms[0]} {theirs!r}: their sum is no bottleneck")
    total = sum(t.factor for t in terms)
    if first.with_residual != (first.placement == "sequential") and abs(total - 1) > 1e-9:
        raise AdapterError(
            f"{terms[0]}: its residual counts as part of its change, so weights must sum to 1, not {total:g}"
        )
    tensors = {}
    names = [f"{key}.down.weight" for key in _keys(terms)]
    if elementwise:
        _same_start(terms, names)
    join: Callable = (lambda parts, dim: sum(parts)) if elementwise else torch.cat
    shares = _shares(terms) if elementwise else [1.0] * len(terms)
    for key in _keys(terms):
        scales = [t.factor * _scale(t, key) for t in terms]
        ups = [s.reshape(-1, 1) * t.get(f"{key}.up.weight") for s, t in zip(scales, terms, strict=True)]
        tensors[f"{key}.up.weight"] = join(ups, 1)
        tensors[f"{key}.up.bias"] = sum(s * t.get(f"{key}.up.bias") for s, t in zip(scales, terms, strict=True))
        for part in ("weight", "bias"):
            downs = [share * t.get(f"{key}.down.{part}") for share, t in zip(shares, terms, strict=True)]
            tensors[f"{key}.down.{part}"] = join(downs, 0)
    width = first.bottleneck if elementwise else sum(t.record.method.bottleneck for t in terms)
    how = f"{width} hidden features, " + ("elementwise" if elementwise else "exact: the widths are concatenated")
    return replace(first, bottleneck=width, scale=1.0, dropout=0.0), tensors, {"how": how}


def _scale(term: Term, key: str) -> Tensor:
    stored = term.record.tensors.get(f"{key}.scale")
    return torch.tensor(term.record.method.scale, dtype=torch.float64) if stored is None else stored.double()


def affine(terms: list[Term], elementwise: bool, rank: int | None) -> Sum:
    """Scales and shifts of features, as changes of 1 and 0: (g W, g b + s) is linear in both."""
    _no_rank(terms, rank, "vectors have no rank")
    tensors = {}
    for name in terms[0].record.tensors:
        if name.startswith("branches."):
            start = 1.0 if name.endswith(".gain") else 0.0
            tensors[name] = start + sum(t.factor * (t.get(name) - start) for t in terms)
    return terms[0].record.method, tensors, {"how": "exact"}


def _no_rank(terms: list[Term], rank: int | None, why: str) -> None:
    if rank is not None:
        raise UsageError(f"rank is for lora, these are {terms[0].record.method.name}: {why}")


SUMS: dict[str, Callable[[list[Term], bool, int | None], Sum]] = {
    "lora": low_rank,
    **dict.fromkeys(("bottleneck", "parallel_adapter", "adaptformer", "adapter_plus"), wide),
    **dict.fromkeys(("ssf", "bitfit", "film", "linear"), affine),
}
