"""Frozen features and nothing else: k nearest neighbours, and linear heads of a whole grid trained at once.

As in DINOv2's evaluation and in "Towards general purpose vision foundation models for medical image analysis"
(arXiv:2312.02366): what an adapter has to beat.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite import experiment, metrics
from adaptsuite import recipe as recipes
from adaptsuite.cache import Cache
from adaptsuite.domain import HEAD, Domain
from adaptsuite.errors import UsageError
from adaptsuite.features import num_prefix
from adaptsuite.manifest import Manifest, split
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.recipe import Recipe
from adaptsuite.replay import decisive, rows_digest
from adaptsuite.sites import find_sites

K, TEMPERATURE, SMOOTHING = 5, 0.07, 1.0
RATES, BLOCKS, POOLS = (1e-3, 5e-3, 1e-2, 5e-2), (1, 4), (False, True)
STEPS, BATCH = 600, 128


@dataclass(frozen=True)
class Features:
    """Of the last blocks of a backbone, after its final norm."""

    cls: np.ndarray  # (N, blocks, D), the last block last
    mean: np.ndarray  # (N, D) of the last block's patches

    def read(self, blocks: int, pool: bool) -> np.ndarray:
        """(N, blocks D (+ D)): CLS tokens side by side, and the mean of the patches."""
        cls = self.cls[:, -blocks:].reshape(len(self.cls), -1)
        return np.concatenate([cls, self.mean], 1) if pool else cls


class _Reading:
    """A task whose outputs are the features; what several blocks gave is laid side by side."""

    target = "label"

    def __init__(self, backbone: nn.Module, blocks: int):
        self.paths = [site.path for site in find_sites(backbone, "block")][-blocks:]
        if not self.paths:
            raise UsageError(f"probe: {type(backbone).__name__} has no transformer blocks whose tokens could be read")
        self.prefix, self.norm = num_prefix(backbone), getattr(backbone, "norm", None) or nn.Identity()

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        from adaptsuite.images import views

        seen: list[Tensor] = []
        modules = [model.backbone.get_submodule(path) for path in self.paths]
        hooks = [m.register_forward_hook(lambda _, __, out: seen.append(_tokens(out))) for m in modules]
        try:
            model(next(views(batch["image"], model.front_end.size, "none")))
        finally:
            for hook in hooks:
                hook.remove()
        tokens = [self.norm(x) for x in seen]
        cls = [x[:, 0] if self.prefix else x.mean(1) for x in tokens]
        return torch.cat([*cls, tokens[-1][:, self.prefix :].mean(1)], 1)


def _tokens(out: Any) -> Tensor:
    """(B, T, D) of a block's output."""
    x = out[0] if isinstance(out, tuple) else out
    return x.flatten(1, 2) if x.ndim == 4 else x


def features(
    domain: Domain,
    recipe: Recipe,
    manifest: Manifest,
    blocks: int = max(BLOCKS),
    say: Callable[[str], None] = lambda line: None,
) -> Features:
    """Of every row of a table, the mean over its frames; from the cache unless plan.cache is off."""
    model, plan = domain.model(recipe, manifest.classes), recipes.build(Plan, recipe.plan, "plan")
    paths, task = [r.path for r in manifest.rows], _Reading(model.backbone, blocks)

    def computed() -> dict[str, np.ndarray]:
        dataset = domain.dataset(model, paths, None)
        raw, _ = predict_all(model, task, dataset, plan.batch_size, plan.device, workers=plan.workers)
        rows = dataset.mean_by_row(raw).reshape(len(manifest), len(task.paths) + 1, -1)
        return {"cls": rows[:, :-1], "mean": rows[:, -1]}

    if plan.cache == "off":
        return Features(**computed())
    facts = {**decisive(domain, recipe, model, (HEAD,), plan), "reads": task.paths, "rows": rows_digest(paths)}
    cache = Cache()
    found, hit = cache.arrays(facts, computed)
    say(f"cache   features of {len(paths)} rows: {'found' if hit else 'computed'}, in {cache.folder}")
    return Features(**found)


def neighbours(
    known: np.ndarray,
    targets: np.ndarray,
    asked: np.ndarray,
    classes: int,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """(M, K) probabilities: the k nearest of (N, D) by cosine vote with exp(similarity / temperature).

    targets (N,): shares of the votes.  targets (N, K), several labels: ML-kNN (Zhang and Zhou 2007), the posterior of
    each label given how many of the k neighbours have it.
    """
    known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (known, asked))
    k = min(k, len(known) - (targets.ndim == 2))
    if targets.ndim == 2:
        return _ml_knn(known, targets.astype(int), asked, k)
    similarity = asked @ known.T
    nearest = np.argsort(-similarity, 1, kind="stable")[:, :k]
    close = np.take_along_axis(similarity, nearest, 1)
    votes = np.exp((close - close[:, :1]) / temperature)
    out = np.zeros((len(asked), classes))
    for place in range(k):
        np.add.at(out, (np.arange(len(asked)), targets[nearest[:, place]]), votes[:, place])
    return out / out.sum(1, keepdims=True)


def _ml_knn(known: np.ndarray, targets: np.ndarray, asked: np.ndarray, k: int, s: float = SMOOTHING) -> np.ndarray:
    own = known @ known.T
    np.fill_diagonal(own, -np.inf)
    counts = targets[np.argsort(-own, 1, kind="stable")[:, :k]].sum(1)  # (N, K) neighbours with the label
    prior = (s + targets.sum(0)) / (2 * s + len(targets))
    has, has_not = (
        np.stack([((counts == c) & (targets == flag)).sum(0) for c in range(k + 1)], 1) for flag in (1, 0)
    )  # (K, k + 1)
    given = (s + has) / (s * (k + 1) + has.sum(1, keepdims=True))
    given_not = (s + has_not) / (s * (k + 1) + has_not.sum(1, keepdims=True))
    seen = targets[np.argsort(-(asked @ known.T), 1, kind="stable")[:, :k]].sum(1)  # (M, K)
    labels = np.arange(targets.shape[1])
    yes, no = prior * given[labels, seen], (1 - prior) * given_not[labels, seen]
    return yes / (yes + no)


def grid_heads(
    x: Sequence[np.ndarray], targets: np.ndarray, classes: int, rates: Sequence[float] = RATES, seed: int = 0
) -> list[list[nn.Linear]]:
    """One linear head for each (input, rate), all trained at once on the summed loss: SGD, momentum .9, cosine.

    x: inputs (N, F_i), one for each choice of blocks and pooling.  The loss of a head has no gradient in another's
    weights, so each trains as it would alone.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs, target = [torch.from_numpy(v).float() for v in x], torch.from_numpy(targets)
    heads = [[nn.Linear(v.shape[1], classes) for _ in rates] for v in inputs]
    groups = []
    for row in heads:
        for head, rate in zip(row, rates, strict=True):
            nn.init.normal_(head.weight, std=0.01, generator=generator)
            nn.init.zeros_(head.bias)
            groups.append({"params": list(head.parameters()), "lr": rate})
    optimiser = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    several = target.ndim == 2
    for _ in range(STEPS):
        rows = torch.randint(len(target), (min(BATCH, len(target)),), generator=generator)
        loss = sum(
            F.binary_cross_entropy_with_logits(head(v[rows]), target[rows].float())
            if several
            else F.cross_entropy(head(v[rows]), target[rows])
            for v, row in zip(inputs, heads, strict=True)
            for head in row
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return heads


def probe(
    domain: Domain, recipe: Recipe, manifest: Manifest, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """kNN and the grid's best head on the test rows: {"knn", "linear"}: metrics, and the head's "choice" and "grid".

    The head is chosen on validation rows, then trained anew on training and validation rows. kNN knows both.
    """
    fold = split(manifest, recipe.data.test, recipe.data.val, recipe.data.cv, recipe.seeds[0], recipe.data.shots)[0]
    if not len(fold.val) or not len(fold.test):
        raise UsageError("probe: validation rows choose the head and test rows judge it; the split lacks one of them")
    found, classes = features(domain, recipe, manifest, say=say), len(manifest.classes)
    targets, blocks = manifest.targets(), [b for b in BLOCKS if b <= found.cls.shape[1]]
    choices = [(b, pool) for b in blocks for pool in POOLS]
    inputs = [found.read(*choice) for choice in choices]
    heads = grid_heads([x[fold.train] for x in inputs], targets[fold.train], classes, seed=recipe.seeds[0])
    monitor = "accuracy" if targets.ndim == 1 else "map"
    grid = [
        {"blocks": b, "mean_patch": pool, "lr": rate, monitor: _score(head, x[fold.val], targets[fold.val], monitor)}
        for (b, pool), x, row in zip(choices, inputs, heads, strict=True)
        for rate, head in zip(RATES, row, strict=True)
    ]
    best = max(grid, key=lambda row: row[monitor])
    own = inputs[choices.index((best["blocks"], best["mean_patch"]))]
    rows = np.concatenate([fold.train, fold.val])
    ((head,),) = grid_heads([own[rows]], targets[rows], classes, (best["lr"],), seed=recipe.seeds[0])
    near = neighbours(found.read(1, False)[rows], targets[rows], found.read(1, False)[fold.test], classes)
    said = {"knn": near, "linear": _outputs(head, own[fold.test])}
    test = manifest.subset(fold.test)
    result = {
        name: metrics.evaluate(
            out, targets[fold.test], test.groups(), manifest.task, classes=manifest.classes, probabilities=name == "knn"
        )
        for name, out in said.items()
    }
    return {**result, "choice": best, "grid": grid, "k": K, "temperature": TEMPERATURE}


def run(domain: Domain, recipe: Recipe, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """`probe` of a recipe's table and backbone."""
    settled, manifest = experiment.settle(domain, replace(recipe, method="linear"))
    return probe(domain, settled, manifest, say)


@torch.no_grad()
def _outputs(head: nn.Linear, x: np.ndarray) -> np.ndarray:
    return head(torch.from_numpy(x).float()).numpy()


def _score(head: nn.Linear, x: np.ndarray, targets: np.ndarray, monitor: str) -> float:
    task = "multiclass" if targets.ndim == 1 else "multilabel"
    return metrics.score(_outputs(head, x), targets, task, probabilities=False)[monitor]
