"""Few-shot classification by class names: adapters of two towers, beside zero-shot, Tip-Adapter and a linear probe.

Of data.task=base_to_new (Zhou et al. 2022, arXiv:2203.05557, section 4.1) only the first half of the sorted classes
trains; test rows of those are told apart among themselves, and those of the other half, never seen, too. H is the
harmonic mean of both accuracies. With data.task=few_shot all classes train.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from adaptsuite.domain import Said
from adaptsuite.errors import AdapterError, DataError, UsageError
from adaptsuite.host import Handle, get_handle
from adaptsuite.manifest import Manifest, Row, load_manifest, matching, split, write_csv
from adaptsuite.metrics import band, resample
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.recipe import DataSettings, Recipe
from adaptsuite.vl.beside import BESIDE, KNOWS_NEW, Beside, make_beside
from adaptsuite.vl.class_names import FewShotModel, FewShotTask, Seeing
from adaptsuite.vl.pairs import Pairs
from adaptsuite.vl.panel import panel
from adaptsuite.vl.scores import mean_interval
from adaptsuite.vl.settings import FewShotSettings
from adaptsuite.vl.towers import TowerDomain
from adaptsuite.vl.two_tower import TwoTower


class FewShot(TowerDomain):
    """Pictures of classes, told apart by the classes' names."""

    data_task = "few_shot"
    settings = FewShotSettings
    backbones = ("open_clip:ViT-B-16/openai",)

    def __init__(self):
        super().__init__()
        self.made: WeakKeyDictionary[nn.Module, Beside] = WeakKeyDictionary()
        self.where: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()

    # ---- data

    def table(self, data: DataSettings) -> Manifest:
        """A folder of classes or a table of path,label; without a column `split` a test part is drawn by seed 0."""
        if data.cv:
            raise UsageError(f"data.cv={data.cv}: {self.data_task} has one test part; name it with --test or `split`")
        found = load_manifest(data.manifest, "multiclass", suffixes=self.suffixes)
        held = _held(found, data.test)
        columns, rows = tuple(dict.fromkeys((*found.columns, "split"))), []
        for row, out in zip(found.rows, held, strict=True):
            part = "test" if out else row.extra.get("split", "train")
            rows.append(replace(row, extra={**row.extra, "text": row.label, "split": part}, files={"image": row.path}))
        return self.parted(replace(found, rows=tuple(rows), columns=columns, task=self.data_task), data)

    def parted(self, manifest: Manifest, data: DataSettings) -> Manifest:
        return manifest

    def num_base(self, classes: Sequence[str]) -> int:
        """How many of the classes, the first ones, have shots."""
        return len(classes)

    def targets(self, manifest: Manifest, classes: Sequence[str]) -> np.ndarray:
        """(rows,) number of the class. DataError for a class that an adapter does not know."""
        return replace(manifest, task="multiclass").targets(classes)

    def shown(self, row: Row) -> str:
        return row.rel

    # ---- the model

    def build(self, towers: TwoTower, recipe: Recipe, classes: Sequence[str]) -> FewShotModel:
        return FewShotModel(towers, classes, self.num_base(classes), self.head(recipe).template, self.data_task)

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> FewShotTask:
        return FewShotTask(self.num_base(classes))

    # ---- baselines

    def beside(
        self,
        recipe: Recipe,
        handle: Handle,
        parts: Mapping[str, Any],
        plan: Plan,
        out: Path,
        labels: Sequence[str],
        say: Callable[[str], None],
    ) -> list[str]:
        """Zero-shot, Tip-Adapter, its tuned form and a linear probe of the same shots, in OUT/beside.safetensors."""
        from safetensors.torch import save_file

        say("baseline  " + ", ".join(BESIDE))
        model, task = handle.model, self.task(recipe, labels)
        said, _ = predict_all(model, task, parts["train"], plan.batch_size, plan.device, workers=plan.workers)
        found = self.made[model] = make_beside(model, parts["train"], parts["val"], said.mean(0), plan)
        save_file({k: v.contiguous() for k, v in found.tensors().items()}, str(out / "beside.safetensors"))
        return []

    def restored(self, handle: Handle, recipe: Recipe, folder: Path) -> None:
        self.where[handle.model] = folder.resolve().parent / "beside.safetensors"

    def beside_of(self, model: FewShotModel) -> Beside:
        """Raises AdapterError where a saved adapter has lost its baselines."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if model not in self.made:
            try:
                self.made[model] = Beside.of(load_file(str(self.where[model])))
            except (OSError, SafetensorError, KeyError) as error:
                raise AdapterError(
                    f"{self.where[model]} is missing or damaged: an accuracy is shown beside its baselines only; "
                    "evaluate the run's folder as `train` wrote it"
                ) from error
        return self.made[model]

    def outputs(
        self,
        model: FewShotModel,
        task: FewShotTask,
        dataset: Pairs,
        plan: Plan,
        batch_size: int | None = None,
        device: str = "",
    ) -> np.ndarray:
        """(rows, 6 C): logits of the adapter, then those of each of BESIDE."""
        batch, device = batch_size or plan.batch_size, device or plan.device
        own, _ = predict_all(model, task, dataset, batch, device, workers=plan.workers)
        with get_handle(model).disabled():
            seen, _ = predict_all(model, Seeing(), dataset, batch, device, workers=plan.workers)
        others = self.beside_of(model).scores(torch.from_numpy(seen))
        return np.concatenate([own, *(o.numpy() for o in others)], 1)

    # ---- evidence

    def answers(self, recipe: Recipe, labels: Sequence[str], outputs: np.ndarray) -> list[dict[str, Any]]:
        """Of the adapter alone, among all classes."""
        shares = torch.from_numpy(outputs[:, : len(labels)]).softmax(1).numpy()
        named = [{label: round(float(s), 6) for label, s in zip(labels, row, strict=True)} for row in shares]
        return [{"label": max(scores, key=scores.get), "scores": scores} for scores in named]

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        """Accuracy of the adapter and of each baseline; gain: over zero-shot, paired by picture."""
        groups = [row.group for row in manifest.rows]
        right = hits(outputs, self.targets(manifest, classes), len(classes), self.num_base(classes))
        found = {_named("accuracy", name): mean_interval(own, groups) for name, own in right.items()}
        return {**found, "gain_over_zero_shot": mean_interval(right["adapter"] - right["zero_shot"], groups)}

    def evidence(
        self, recipe: Recipe, manifest: Manifest, said: Sequence[Said], part: str, out: Path | None
    ) -> list[dict[str, Any]]:
        """classes.csv, what the baselines are, and the first pictures that are told wrong."""
        if not said:
            return []
        classes, base = manifest.classes, self.num_base(manifest.classes)
        lines, wrong = [], []
        for one in said:
            targets = self.targets(one.manifest, classes)
            best = told(one.outputs, targets, len(classes), base)
            for row, target, own in zip(one.manifest.rows, targets, best.T, strict=True):
                names = {n: classes[k] for n, k in zip(("said", *BESIDE), own, strict=True)}
                run = {"run": one.name} if one.name else {}
                lines.append({"path": self.shown(row), "label": classes[target], **names, **run})
                if own[0] != target:
                    wrong.append((row.path, f"said: {classes[own[0]]}\nis: {classes[target]}"))
        if out is not None:
            write_csv(out / "classes.csv", lines)
        sections: list[dict[str, Any]] = [{"title": "Beside the adapter", "text": EXPLAINED}]
        if wrong:
            caption = "The first pictures that are told wrong; all are in classes.csv."
            sections.append({"title": "Wrong classes", "figure": panel(wrong[:8]), "caption": caption})
        return sections


EXPLAINED = (
    "zero_shot: cosines with the class names, no shot is used. tip_adapter: a cache of the shots added to it, and "
    "tip_adapter_f with trained keys; of classes without shots both say what zero_shot says. probe: a logistic "
    "regression on the frozen features, which sees pictures and no names; it knows no new class. names_alone: the mean "
    "scores over the shots for every picture, which sees names and no picture."
)


class BaseToNew(FewShot):
    """The first half of the sorted classes trains, and the rest is told apart by names that were never trained."""

    data_task = "base_to_new"

    def num_base(self, classes: Sequence[str]) -> int:
        return -(-len(classes) // 2)

    def parted(self, manifest: Manifest, data: DataSettings) -> Manifest:
        """Without the training rows of new classes. Raises DataError for fewer than four classes."""
        if len(manifest.classes) < 4:
            raise DataError(f"{manifest.source.name}: base_to_new needs four classes, it has {len(manifest.classes)}")
        base = set(manifest.classes[: self.num_base(manifest.classes)])
        kept = [i for i, row in enumerate(manifest.rows) if row.label in base or row.extra["split"] == "test"]
        note = (
            f"{len(manifest) - len(kept)} training rows of {len(manifest.classes) - len(base)} new classes are left out"
        )
        return replace(manifest.subset(kept), notes=(*manifest.notes, note))

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        """base, new and H of the adapter and of each baseline, and the adapter's gain over zero-shot.

        Rows of base classes alone, as validation rows are, give base alone.
        """
        targets, groups = self.targets(manifest, classes), [row.group for row in manifest.rows]
        base = self.num_base(classes)
        right, is_base = hits(outputs, targets, len(classes), base), targets < base
        found: dict[str, dict] = {}
        for name, own in right.items():
            found |= {_named(key, name): value for key, value in halves(own, is_base, groups, name).items()}
        if is_base.any() and not is_base.all():
            pair = np.stack([right["adapter"], right["zero_shot"]], 1)
            value, draws = resample(lambda w: -np.diff(_harmonic(w, pair, is_base), axis=1)[:, 0], len(pair), groups)
            ends = [float(v) for v in band(draws)] if len(draws) else None
            found["gain_over_zero_shot"] = {"value": float(value), "ci": ends}
        return found


def told(outputs: np.ndarray, targets: np.ndarray, num_classes: int, num_base: int) -> np.ndarray:
    """(6, rows) the class that each says; a row of a base class among base classes, one of a new class among those."""
    scores = outputs.reshape(len(targets), -1, num_classes).transpose(1, 0, 2)
    is_base = np.arange(num_classes) < num_base
    foreign = is_base[None] != (targets < num_base)[:, None]
    return np.where(foreign, -np.inf, scores).argmax(2)


def hits(outputs: np.ndarray, targets: np.ndarray, num_classes: int, num_base: int) -> dict[str, np.ndarray]:
    """(rows,) 1 where right, of the adapter and of each of BESIDE."""
    best = told(outputs, targets, num_classes, num_base)
    return {name: (own == targets).astype(float) for name, own in zip(("adapter", *BESIDE), best, strict=True)}


def halves(
    right: np.ndarray, is_base: np.ndarray, groups: Sequence[str], name: str = "adapter"
) -> dict[str, dict[str, Any]]:
    """base, new and H with 95 % intervals over groups, of those that there are rows for."""
    own = np.asarray(groups)
    found = {
        key: mean_interval(right[rows], own[rows])
        for key, rows in (("base", is_base), ("new", ~is_base))
        if rows.any() and (key == "base" or name in KNOWS_NEW)
    }
    if len(found) == 2:
        value, draws = resample(lambda w: _harmonic(w, right[:, None], is_base)[:, 0], len(right), groups)
        found["H"] = {"value": float(value), "ci": [float(v) for v in band(draws)] if len(draws) else None}
    return found


def _harmonic(weights: np.ndarray, right: np.ndarray, is_base: np.ndarray) -> np.ndarray:
    """(r, m) harmonic means of base and new accuracy for weights (r, rows) and hits (rows, m); 0 where both are 0."""
    with np.errstate(invalid="ignore"):
        b, n = (weights[:, rows] @ right[rows] / weights[:, rows].sum(1, keepdims=True) for rows in (is_base, ~is_base))
        return np.nan_to_num(2 * b * n / (b + n))


def _named(metric: str, name: str) -> str:
    return metric if name == "adapter" else f"{metric}:{name}"


def _held(manifest: Manifest, test: str | None) -> np.ndarray:
    """Mask of the test rows."""
    if test:
        return matching(manifest, "--test", test)
    if "split" in manifest.columns:
        return np.array([cell == "test" for cell in manifest.column("split")])
    held = np.zeros(len(manifest), dtype=bool)
    held[split(manifest)[0].test] = True
    return held
