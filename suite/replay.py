"""Training and scoring on the cached features of a frozen prefix, in place of running it in every epoch."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from adaptsuite import __version__
from adaptsuite.batches import data_mark, seed_all
from adaptsuite.cache import GIB, MIB, Cache
from adaptsuite.devices import autocast, pick_device, to_device
from adaptsuite.domain import Domain
from adaptsuite.errors import ResourceError
from adaptsuite.frozen import Cut, NoPrefix, find_cut
from adaptsuite.host import Handle
from adaptsuite.identity import describe_base
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.recipe import Recipe

ENTERED = "entered"  # key of a batch, and name of an array: what enters the cut
PIECE = 256 * MIB  # of features in memory while they are computed
PROBES = (2, 3)  # samples of the two batches that a cut is learnt from
CLOSE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # of the largest value: how far a stored row may be off


class CachedRows:
    """The items of a data set as what enters the trained part: {"entered", its input as zeros, "label", "item", ...}.

    entries: of one view, or of several of which every draw takes one.  places: (items,) where they are in an entry.
    """

    def __init__(
        self, dataset, entries: Sequence[dict[str, np.ndarray]], places: np.ndarray, target: str, blank: Tensor
    ):
        self.dataset, self.entries, self.places, self.target, self.blank = dataset, entries, places, target, blank
        self.labels = torch.as_tensor(dataset.item_targets)

    @property
    def digest(self) -> str:
        return f"cached, {data_mark(self.dataset)}"

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        view = int(torch.randint(len(self.entries), ())) if len(self.entries) > 1 else 0
        stored = {name: torch.from_numpy(np.array(a[self.places[index]])) for name, a in self.entries[view].items()}
        return {**stored, "item": index, self.target: self.labels[index]}

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {**default_collate(items), self.dataset.input: self.blank.expand(len(items), *self.blank.shape)}

    def __getattr__(self, name: str) -> Any:
        """What else a data set tells: `item_targets`, `mean_by_row`, `rows`, `starts`."""
        if name == "dataset" or name.startswith("__"):  # not yet there while a copy is made
            raise AttributeError(name)
        return getattr(self.dataset, name)


class FromCache:
    """A task that takes batches of CachedRows, and others as before."""

    def __init__(self, task, cut: Cut):
        self.task, self.cut = task, cut

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return self._said(self.task.loss, model, batch)

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return self._said(self.task.predict, model, batch)

    def embed(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        if ENTERED in batch and self.cut.path == model.linear_head:
            return batch[ENTERED]
        return self._said(self.task.embed, model, batch)

    def _said(self, says: Callable, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        if ENTERED not in batch:
            return says(model, batch)
        with self.cut.entering(batch[ENTERED]):
            return says(model, batch)

    def __getattr__(self, name: str) -> Any:
        if name == "task" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.task, name)


@dataclass
class _Entering:
    """A task whose outputs are what enters the cut; what else of a batch is not its input is collected in `rest`."""

    task: Any
    cut: Cut
    input: str
    view: int | None = None  # of the training's augmentation; None: as scoring sees it
    rest: dict[str, list[np.ndarray]] = field(default_factory=dict)

    @property
    def target(self) -> str:
        return self.task.target

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        if self.view is not None:
            seed_all("view", self.view, batch["item"].tolist())
        x = self.cut.enter(self.task.predict if self.view is None else self.task.loss, batch)
        for name, values in batch.items():
            if name not in (self.input, self.target, "item"):
                self.rest.setdefault(name, []).append(values.cpu().numpy())
        return x


@dataclass
class CachedParts:
    """Parts of a table that are read from the cache, as adaptsuite.experiment.Parts gives them from files."""

    parts: Any
    cut: Cut
    still: tuple[np.ndarray, list[dict[str, np.ndarray]]]  # (items,) the table's row of each item, rising; the entry
    views: tuple[np.ndarray, list[dict[str, np.ndarray]]]  # the same of views of training rows; none: `still`
    target: str
    blank: Tensor  # zeros of the shape of one input

    def part(self, model: nn.Module, indices: np.ndarray, training: bool = False):
        dataset = self.parts.part(model, indices)
        if dataset is None:
            return None
        rows, entries = self.views if training and self.views[1] else self.still
        ends = (np.searchsorted(rows, indices, side) for side in ("left", "right"))
        places = np.concatenate([np.arange(first, last) for first, last in zip(*ends, strict=True)])
        return CachedRows(dataset, entries, places, self.target, self.blank)

    def task(self, task) -> FromCache:
        return FromCache(task, self.cut)


def cached(
    domain: Domain, recipe: Recipe, handle: Handle, parts, plan: Plan, say: Callable[[str], None] = lambda line: None
):
    """`parts` whose features come from the cache, where `plan.cache` asks for that and it can be; else `parts` itself.

    auto: where no block trains (probes, prototypes) and nothing is drawn at random in training.  N: wherever a block
    lies before what trains, on N views of every training row where something is drawn.
    Raises UsageError where N views cannot be had.
    """
    if plan.cache == "off":
        return parts
    asked, known = plan.cache != "auto", hasattr(parts.part(handle.model, parts.used[:1]), "input")
    if not asked and (handle.sites or handle.adapter.kept is not None or not known):
        return parts
    try:
        if not known:
            raise NoPrefix(f"rows of the domain {domain.name!r} cannot be kept as features")
        return _Making(domain, recipe, handle, parts, plan).made(say)
    except (NoPrefix, ResourceError) as error:
        if asked:
            raise type(error)(f"plan.cache={plan.cache}: {error}") from error
        say(f"cache     off: {error}")
        return parts


class _Making:
    """The entries of one adapter's frozen prefix, found or computed."""

    def __init__(self, domain: Domain, recipe: Recipe, handle: Handle, parts, plan: Plan):
        self.domain, self.recipe, self.handle, self.plan = domain, recipe, handle, plan
        self.parts, self.model, self.cache = parts, handle.model, Cache()
        self.device = pick_device(plan.device)
        self.model.to(self.device)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise NoPrefix("several processes train")
        if plan.compile:
            raise NoPrefix("the model is compiled whole")
        self.dataset = parts.part(self.model, parts.used)
        self.task = domain.task(recipe, parts.manifest.classes)
        self.base = decisive(domain, recipe, self.model, handle.adapter.head, plan)
        self.computed = self.bytes = 0

    def made(self, say: Callable[[str], None]) -> CachedParts:
        start, num_views = time.perf_counter(), self._num_views()
        batches = [self._batch(range(PROBES[0])), self._batch(range(-PROBES[1], 0))]
        with torch.no_grad(), autocast(self.device, self.plan.precision):
            cut = find_cut(self.handle, self.task.predict, batches[0])
            self.entered = cut.learn(self.task.predict, batches)
            if not num_views and not torch.equal(cut.enter(self.task.loss, batches[0]), self.entered[0]):
                raise NoPrefix("training sees its samples otherwise than scoring does")
        still = self._entries(cut, self.parts.used, [None])
        views = self._entries(cut, self.parts.trained, range(num_views))
        blank = torch.zeros_like(batches[0][self.dataset.input][0], device="cpu")
        say(self._line(num_views, time.perf_counter() - start))
        return CachedParts(self.parts, cut, still, views, self.task.target, blank)

    def _num_views(self) -> int:
        """0: what scoring sees is what training sees. Raises NoPrefix where no views can be kept."""
        if not hasattr(self.task, "drawn"):
            raise NoPrefix(f"what {type(self.task).__name__} draws at random in training is not told apart")
        drawn = self.task.drawn(self.model)
        if mixed := [name for name in drawn if name in ("mixup", "cutmix")]:
            raise NoPrefix(f"augment.{mixed[0]} mixes samples anew in every step")
        if drawn and self.plan.cache == "auto":
            raise NoPrefix(
                f"augment.{drawn[0]} draws at random; plan.cache=N trains on N cached views of each sample, "
                "the frozen part being run N times instead of once an epoch"
            )
        return self.plan.cache if drawn else 0

    def _batch(self, indices: Sequence[int]) -> dict[str, Any]:
        items = [self.dataset[i % len(self.dataset)] for i in indices]
        return to_device(default_collate(items), self.device)

    def _entries(self, cut: Cut, rows: np.ndarray, views: Sequence[int | None]):
        """(items,) the row of each item of these rows, and an entry for each view."""
        dataset = self.parts.part(self.model, rows)
        found = [self._entry(cut, dataset, rows, view) for view in views]
        return rows[dataset.rows] if hasattr(dataset, "rows") else rows, found

    def _entry(self, cut: Cut, dataset, rows: np.ndarray, view: int | None) -> dict[str, np.ndarray]:
        facts = self._facts(cut, rows, view)
        found = self.cache.get(facts)
        if found is None or not self._is_right(found, len(dataset), view):
            size = len(dataset) * self.entered[0][0].numel() * 4
            found = self.cache.put(facts, size, partial(self._write, cut, dataset, view))
            self.computed += 1
        self.bytes += sum(array.nbytes for array in found.values())
        return found

    def _facts(self, cut: Cut, rows: np.ndarray, view: int | None) -> dict[str, Any]:
        paths = [self.parts.manifest.rows[i].path for i in rows]
        facts = {**self.base, "cut": cut.path, "rows": rows_digest(paths)}
        return facts if view is None else {**facts, "augment": self.recipe.augment, "view": view}

    def _is_right(self, found: dict[str, np.ndarray], num: int, view: int | None) -> bool:
        """Whether an entry has the right shape and, where nothing was drawn, what the cut was learnt from."""
        x = found.get(ENTERED)
        if x is None or x.shape != (num, *self.entered[0].shape[1:]):
            return False
        stored = np.concatenate([x[: PROBES[0]], x[-PROBES[1] :]])
        now = torch.cat(self.entered).float().cpu().numpy()
        wide = CLOSE[self.plan.precision] * np.abs(now).max()
        return view is not None or num < sum(PROBES) or float(np.abs(stored - now).max()) <= wide

    def _write(self, cut: Cut, dataset, view: int | None, folder: Path) -> None:
        num, shape, batch = len(dataset), self.entered[0].shape[1:], self.plan.batch_size
        task = _Entering(self.task, cut, dataset.input, view)
        out = np.lib.format.open_memmap(folder / f"{ENTERED}.npy", "w+", np.float32, (num, *shape))
        step = max(PIECE // (shape.numel() * 4 * batch), 1) * batch
        for at in range(0, num, step):
            indices, settings = range(at, min(at + step, num)), {"workers": self.plan.workers}
            settings["precision"] = self.plan.precision
            out[at : at + step], _ = predict_all(
                self.model, task, dataset, batch, self.device, indices=indices, **settings
            )
        out.flush()
        for name, pieces in task.rest.items():
            np.save(folder / f"{name}.npy", np.concatenate(pieces))

    def _line(self, views: int, seconds: float) -> str:
        what = f"{len(self.dataset)} samples{f', {views} views of training rows' if views else ''}"
        how = f"computed in {seconds:.1f} s" if self.computed else "found"
        where = f"{self.cache.folder} (at most {self.cache.limit / GIB:g} GiB)"
        return f"cache     {what}, {self.bytes / MIB:.1f} MiB of frozen features: {how}, in {where}"


def decisive(domain: Domain, recipe: Recipe, model: nn.Module, head: Sequence[str], plan: Plan) -> dict[str, Any]:
    """What decides the features of a file, whatever is read of them. head: modules of the model that do not."""
    return {
        "versions": [__version__, torch.__version__],
        "base": describe_base(model, head),
        "input": domain.describe(model),
        "front_end": recipe.front_end,
        "head": {name: recipe.head.get(name) for name in ("kind", "pool")},
        "computed": [pick_device(plan.device).type, plan.precision],
    }


def rows_digest(paths: Sequence[Path]) -> str:
    """sha256 over what the files hold, in their order; of a folder, over all files below it."""
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        digest.update(f"{path.suffix}\0{len(files)}\0".encode())
        for file in files:
            stat = file.stat()
            digest.update(_file_digest(file, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@lru_cache(1 << 16)
def _file_digest(path: Path, size: int, changed_ns: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
