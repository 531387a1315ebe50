"""What `MedicalDomain` does where the task is segmentation: the same hooks as `adaptsuite.domain.Domain`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from adaptsuite.domain import Said
from adaptsuite.errors import DataError, UsageError
from adaptsuite.front_end import load
from adaptsuite.host import Handle
from adaptsuite.image_task import ImageDomain, given_front_end
from adaptsuite.manifest import Manifest, Row, load_manifest
from adaptsuite.medical import seg_evidence
from adaptsuite.medical.findings import EvidenceSettings
from adaptsuite.medical.seg_data import WHOLE, MaskAugment, Masked, Truth, read_labels, require_known
from adaptsuite.medical.seg_task import SHARE, FullSize, SegmentationTask, choose_rules, finding_scores, ruled
from adaptsuite.medical.segmentation import LEVELS, MaskHead, SegmentationModel
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.recipe import DataSettings, Recipe

CLASSES = ("foreground",)
See = Callable[[int, np.ndarray], Any]


class Segmentation:
    """Pictures with masks; the table's column `mask` names the files, an empty cell says that nothing is there."""

    def __init__(self, domain: ImageDomain):
        self.domain = domain  # whose decoded files and headers are shared
        self.see: See = lambda item, maps: None

    # ---- data

    def table(self, data: DataSettings) -> Manifest:
        classes = data.classes or CLASSES
        if len(set(classes)) < len(classes):
            raise UsageError(f"data.classes={','.join(classes)}: a name is there twice")
        found = load_manifest(data.manifest, data.task, files=("mask",), folders=True, classes=classes)
        if not any(row.files for row in found.rows):
            raise DataError(f"{found.source.name}: the column 'mask' is empty in every row: nothing can be learned")
        for row in found.rows:
            _spacing(found, row)
        return found

    def targets(self, manifest: Manifest, classes: Sequence[str]) -> np.ndarray:
        """(rows,) Truths."""
        if tuple(manifest.classes) != tuple(classes):
            theirs, ours = ", ".join(classes), ", ".join(manifest.classes)
            raise DataError(f"{manifest.source.name}: masks of {ours}, the adapter's are of {theirs} (data.classes)")
        found = np.empty(len(manifest), dtype=object)
        for i, row in enumerate(manifest.rows):
            found[i] = Truth(self.domain.shown(row), row.files.get("mask"), _spacing(manifest, row))
        return found

    def dataset(self, model: SegmentationModel, paths: Sequence[Path], targets: np.ndarray | None) -> Masked:
        d = self.domain
        return Masked(paths, targets, model.front_end, len(model.classes), d.memory, model.reading, d.headers)

    def further(self, manifest: Manifest, row: Row) -> list[str]:
        """Reads the row's mask."""
        if (mask := row.files.get("mask")) is None:
            return []
        header = self.domain.header(row.path)
        try:
            read_labels(mask, len(manifest.classes), (header.height, header.width))
        except DataError as e:
            raise DataError(f"{row.path}: {e}") from None
        return []

    def prepare(self, model: SegmentationModel, paths: Sequence[Path]) -> list[str]:
        data = self.dataset(model, paths, None)
        data.load()
        return data.remarks()

    # ---- the model

    def settle(self, recipe: Recipe, paths: Sequence[Path] = ()) -> Recipe:
        """Refuses what masks cannot follow; the whole picture is seen: squashed to the input's size, or padded."""
        front, head = recipe.front_end, MaskHead(**recipe.head)
        for name, known in (("fit", ("squash", "pad")), ("ratio", (1.0,))):
            if front.get(name) not in (None, *known):
                shown = " or ".join(map(str, known))
                raise UsageError(f"front_end.{name}={front[name]}: a mask covers the whole picture, so {shown} here")
        if head.kind not in LEVELS:
            raise UsageError(f"head.kind={head.kind} gives no masks: take {' or '.join(LEVELS)}")
        if head.pool is not None or head.balance != "none":
            raise UsageError("head.pool and head.balance are for labels, not for masks")
        require_known(MaskAugment(**recipe.augment), segments=True)
        data = replace(recipe.data, classes=recipe.data.classes or CLASSES)
        return replace(recipe, data=data, front_end={**front, "fit": front.get("fit") or "squash", "ratio": 1.0})

    def model(self, recipe: Recipe, classes: Sequence[str]) -> SegmentationModel:
        given = {"fit": "squash", "ratio": 1.0, **given_front_end(recipe)}
        backbone, front = load(recipe.backbone, random_weights=recipe.random_weights, seed=recipe.seeds[0], **given)
        model = SegmentationModel(backbone, front, len(classes), MaskHead(**recipe.head)).eval()
        model.classes = tuple(classes)
        free = {name: recipe.front_end[name] for name in FREE if name in recipe.front_end}
        model.reading = replace(WHOLE, **free)
        return model

    def decided(self, recipe: Recipe, model: SegmentationModel) -> Recipe:
        """With the backbone's own preprocessing, and the blocks that the head reads."""
        front = {**recipe.front_end, **asdict(model.front_end), **asdict(model.reading)}
        return replace(recipe, front_end=front, head={**recipe.head, "after": tuple(model.taps.after)})

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> SegmentationTask:
        tta = recipe.front_end.get("tta", "none")
        return SegmentationTask(classes, MaskAugment(**recipe.augment), MaskHead(**recipe.head), tta)

    def describe(self, model: SegmentationModel) -> dict[str, Any]:
        own = ImageDomain.describe(self.domain, model)
        head = type(model.head).__name__
        line = f"{own['input']}; masks by {head} of what lies behind {_listed(model.taps.after)}"
        return {**own, "input": line, "reading": asdict(model.reading), "classes": list(model.classes)}

    # ---- what it says, and what that is worth

    def outputs(
        self,
        model: SegmentationModel,
        task: SegmentationTask,
        dataset: Masked,
        plan: Plan,
        batch_size: int | None = None,
        device: str = "",
    ) -> np.ndarray:
        """(rows, K, ...) of `FullSize`."""
        batch, device = batch_size or plan.batch_size, device or plan.device
        return predict_all(model, FullSize(task, dataset, self.see), dataset, batch, device, workers=plan.workers)[0]

    @contextlib.contextmanager
    def seen(self, see: See) -> Iterator[None]:
        """Inside the `with` see(row, maps (K, H, W)) gets the probabilities that `outputs` counts."""
        before, self.see = self.see, see
        try:
            yield
        finally:
            self.see = before

    def answers(self, labels: Sequence[str], outputs: np.ndarray) -> list[dict[str, Any]]:
        """Of each row the classes that are there by their rules, and as `scores` their area shares."""
        there = finding_scores(outputs) >= 0.5
        return [
            {
                "label": ";".join(name for name, one in zip(labels, own, strict=True) if one),
                "scores": {name: round(float(v), 6) for name, v in zip(labels, shares, strict=True)},
            }
            for own, shares in zip(there, outputs[..., SHARE], strict=True)
        ]

    def keep(self, recipe: Recipe, manifest: Manifest, outputs: np.ndarray) -> dict[str, Any]:
        settings = EvidenceSettings(**recipe.evidence)
        return choose_rules(outputs, manifest.classes, manifest.groups(), settings)

    def calibrated(self, outputs: np.ndarray, kept: dict[str, Any]) -> np.ndarray:
        return ruled(outputs, kept.get("threshold"))

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        return seg_evidence.evaluate(manifest, classes, outputs)

    def score(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, float]:
        return seg_evidence.score(manifest, classes, outputs)

    def evidence(self, said: Sequence[Said]) -> list[dict[str, Any]]:
        return seg_evidence.sections(said, said[0].manifest.classes) if said else []

    def extra(self, handle: Handle, dataset: Masked, outputs: np.ndarray | None) -> list[dict[str, Any]]:
        """Pictures with outlines, by the same path as all else."""
        if outputs is None or dataset.truths is None:
            return []
        model, rows, maps = handle.model, seg_evidence.chosen(outputs), {}
        task = SegmentationTask(model.classes)
        part = _Rows(dataset, rows)
        device = next(model.parameters()).device
        predict_all(model, FullSize(task, dataset, maps.__setitem__), part, batch_size=4, device=device)
        return [seg_evidence.examples(dataset, outputs, {row: maps[row] for row in rows}, model.classes)]


FREE = ("window", "plane", "allow_burned_in")  # of Reading: what else is fixed by masks


class _Rows:
    """Some items of a data set, under their own numbers."""

    def __init__(self, dataset: Masked, rows: Sequence[int]):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.rows[index]]


def _spacing(manifest: Manifest, row: Row) -> tuple[float, float] | None:
    """Of rows and columns from the column `spacing_mm`: one number, or two with a blank between."""
    if "spacing_mm" not in manifest.columns:
        return None
    try:
        found = [float(v) for v in row.extra["spacing_mm"].split()]
        rows, columns = found * 2 if len(found) == 1 else found
    except ValueError:
        rows = columns = 0.0
    if not (0 < rows < np.inf and 0 < columns < np.inf):
        raise DataError(
            f"{manifest.where(row)}: spacing_mm {row.extra['spacing_mm']!r} is not one or two numbers above 0, of rows "
            "and columns"
        )
    return rows, columns


def _listed(after: Sequence[int]) -> str:
    return f"{', '.join(map(str, after))} blocks" if len(after) > 1 else f"{after[0]} blocks"
