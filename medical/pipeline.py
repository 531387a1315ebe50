"""What the commands need of the medical domain: files of clinics, thresholds that validation rows chose, evidence by
patient, and no word about one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from adaptsuite.domain import Said
from adaptsuite.evidence import Predictions
from adaptsuite.host import Handle
from adaptsuite.image_task import FrontEndSettings, ImageDomain
from adaptsuite.images import Picture
from adaptsuite.manifest import Fold, Manifest, Row, load_manifest
from adaptsuite.medical import data as files
from adaptsuite.medical import findings, leaks
from adaptsuite.medical.data import SUFFIXES, Frames, Reading
from adaptsuite.medical.findings import EvidenceSettings
from adaptsuite.medical.seg_data import MaskAugment, require_known
from adaptsuite.medical.seg_domain import Segmentation
from adaptsuite.medical.segmentation import MaskHead, SegmentationModel
from adaptsuite.recipe import DataSettings, Recipe


@dataclass(frozen=True)
class MedicalFrontEnd(FrontEndSettings):
    """Section `front_end` of a recipe: that of pictures, and how files of several frames become them (Reading)."""

    frames: int = Reading.frames
    plane: Literal["axial", "coronal", "sagittal"] = Reading.plane
    window: tuple[float, float] | None = Reading.window
    region: bool = Reading.region
    allow_burned_in: bool = Reading.allow_burned_in


SEGMENTATION = "segmentation"  # data.task; everything of it is in `Segmentation`


class MedicalDomain(ImageDomain):
    """Pictures, DICOM and NIfTI of patients, who are the groups."""

    name = "medical"
    suffixes = SUFFIXES
    sections = {"front_end": MedicalFrontEnd, "head": MaskHead, "augment": MaskAugment, "evidence": EvidenceSettings}
    backbones = (
        "embedded:vision-tiny",
        "timm:NAME, of timm.list_models()",
        "open_clip:NAME/TAG",
        "monai:NAME, of monai.networks.nets",
        "file:FOLDER in timm's layout",
        "hf:FOLDER",
    )

    def __init__(self):
        super().__init__()
        self.headers: dict[tuple[Path, str], Picture] = {}  # of Frames, by file and plane
        self.masks = Segmentation(self)
        self._leaks: dict[str, dict[str, int]] = {}  # by the table's digest

    def defaults(self, method: str) -> dict[str, dict[str, Any]]:
        """Rates that trained well on few pictures."""
        lr = {"full": 1e-4, "linear": 1e-3}.get(method, 2e-3)
        return {"method_settings": {}, "plan": {"lr": lr, "head_lr": 1e-3, "batch_size": 16, "epochs": 15}}

    # ---- data

    def table(self, data: DataSettings) -> Manifest:
        if data.task == SEGMENTATION:
            return self.masks.table(data)
        return load_manifest(data.manifest, data.task, suffixes=self.suffixes, folders=True)

    def targets(self, manifest: Manifest, classes: Sequence[str]) -> np.ndarray:
        segments = manifest.task == SEGMENTATION
        return self.masks.targets(manifest, classes) if segments else super().targets(manifest, classes)

    def further(self, manifest: Manifest, row: Row) -> list[str]:
        return self.masks.further(manifest, row) if manifest.task == SEGMENTATION else []

    def prepare(self, model: nn.Module, paths: Sequence[Path]) -> list[str]:
        return self.masks.prepare(model, paths) if _segments(model) else super().prepare(model, paths)

    def settle(self, recipe: Recipe, paths: Sequence[Path]) -> Recipe:
        if recipe.data.task == SEGMENTATION:
            return self.masks.settle(recipe)
        MaskHead(**recipe.head).require_labels()
        require_known(MaskAugment(**recipe.augment), segments=False)
        return super().settle(recipe, paths)

    def model(self, recipe: Recipe, classes: Sequence[str]) -> nn.Module:
        if recipe.data.task == SEGMENTATION:
            return self.masks.model(recipe, classes)
        model = super().model(recipe, classes)
        model.reading = reading(recipe)
        return model

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> Any:
        if recipe.data.task == SEGMENTATION:
            return self.masks.task(recipe, classes, counts)
        return super().task(recipe, classes, counts)

    def decided(self, recipe: Recipe, model: nn.Module) -> Recipe:
        if _segments(model):
            return self.masks.decided(recipe, model)
        recipe = super().decided(recipe, model)
        return replace(recipe, front_end={**recipe.front_end, **asdict(model.reading)})

    def dataset(self, model: nn.Module, paths: Sequence[Path], targets: np.ndarray | None) -> Frames:
        if _segments(model):
            return self.masks.dataset(model, paths, targets)
        return Frames(paths, targets, model.front_end, self.memory, model.reading, self.headers)

    def header(self, path: Path) -> Picture:
        key = path, Reading.plane
        if key not in self.headers:
            self.headers[key] = files.inspect(path)
        return self.headers[key]

    def look(self, path: Path) -> dict[str, Any]:
        return files.look(path, Reading())

    def notes(self, model: nn.Module, paths: Sequence[Path]) -> list[str]:
        return self.dataset(model, paths, None).remarks()

    def describe(self, model: nn.Module) -> dict[str, Any]:
        if _segments(model):
            return self.masks.describe(model)
        own = super().describe(model)
        r = model.reading
        window = "the file's own window" if r.window is None else f"window {r.window[0]:g}, {r.window[1]:g}"
        several = f"{r.frames or 'all'} frames or {r.plane} slices of a file, {window}"
        return {**own, "input": f"{own['input']}; {several}", "reading": asdict(r)}

    # ---- splits

    def doubts(self, recipe: Recipe, manifest: Manifest, folds: Sequence[Fold]) -> list[str]:
        """Groups that are missing, a finding that is not named, pictures that are nearly the same in two parts."""
        said = []
        if "group" not in manifest.columns:
            said.append(
                "no column 'group': every file counts as a patient of its own, so that splits may leak and intervals "
                "be too narrow"
            )
        settings = EvidenceSettings(**recipe.evidence)
        if manifest.task != SEGMENTATION and not findings.findings(manifest.classes, manifest.task, settings):
            said.append(
                f"which of {' and '.join(manifest.classes)} is the finding is not known, so no threshold is chosen: "
                "say it with --set evidence.positive=CLASS"
            )
        for column in settings.subgroups:
            manifest.column(column)
        if settings.near_duplicates == "off":
            return said
        pairs = self._pairs(manifest)
        for fold in folds:
            parts = [""] * len(manifest)
            for part in fold.sizes:
                for i in getattr(fold, part):
                    parts[i] = part
            if settings.near_duplicates == "stop":
                leaks.require_no_near_leak(pairs, parts, [self.shown(r) for r in manifest.rows], manifest.source.name)
            report = leaks.leak_report(pairs, parts, [r.label for r in manifest.rows], manifest.groups())
            self._leaks[manifest.digest] = {k: v if isinstance(v, int) else len(v) for k, v in report.items()}
            if across := report["across_parts"]:
                shown = "; ".join(
                    f"{self.shown(manifest.rows[p['rows'][0]])} ({p['parts'][0]}) and "
                    f"{self.shown(manifest.rows[p['rows'][1]])} ({p['parts'][1]}), correlation {p['correlation']:.3f}"
                    for p in across[:3]
                )
                said.append(f"{fold.name}: {len(across)} pairs of nearly the same picture lie in two parts: {shown}")
        if across := report["across_labels"]:
            said.append(f"{len(across)} pairs of nearly the same picture have different labels: look at them")
        return said

    def _pairs(self, manifest: Manifest) -> leaks.Pairs:
        def grey(path: Path) -> np.ndarray:
            middle = list(files.pictures(path, Reading(frames=1)))
            return np.asarray(middle[0].convert("L"))

        return leaks.all_pairs(*leaks.scan([r.path for r in manifest.rows], grey))

    # ---- evidence

    def outputs(self, model: nn.Module, task: Any, dataset: Any, *settings: Any, **named: Any) -> np.ndarray:
        own = self.masks.outputs if _segments(model) else super().outputs
        return own(model, task, dataset, *settings, **named)

    def calibrated(self, outputs: np.ndarray, kept: dict[str, Any]) -> np.ndarray:
        return self.masks.calibrated(outputs, kept) if outputs.ndim == 3 else super().calibrated(outputs, kept)

    def answers(self, recipe: Recipe, labels: Sequence[str], outputs: np.ndarray) -> list[dict[str, Any]]:
        if recipe.data.task == SEGMENTATION:
            return self.masks.answers(labels, outputs)
        return super().answers(recipe, labels, outputs)

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        own = self.masks.evaluate if manifest.task == SEGMENTATION else super().evaluate
        return own(manifest, classes, outputs)

    def score(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, float]:
        own = self.masks.score if manifest.task == SEGMENTATION else super().score
        return own(manifest, classes, outputs)

    def keep(self, recipe: Recipe, manifest: Manifest, outputs: np.ndarray) -> dict[str, Any]:
        if manifest.task == SEGMENTATION:
            return self.masks.keep(recipe, manifest, outputs)
        return findings.decide(manifest, manifest.classes, outputs, EvidenceSettings(**recipe.evidence))

    def evidence(
        self, recipe: Recipe, manifest: Manifest, said: Sequence[Said], part: str, out: Path | None
    ) -> list[dict[str, Any]]:
        if not said:
            return []
        if manifest.task == SEGMENTATION:
            return self.masks.evidence(said)
        settings, classes = EvidenceSettings(**recipe.evidence), manifest.classes
        splits = [
            {"part": part, "rows": len(s.manifest), "patients": len(set(s.manifest.groups())), "run": s.name}
            for s in said
        ]
        return findings.sections(said, classes, settings, part, splits, self._leaks.get(manifest.digest, {}), out)

    def shown(self, row: Row) -> str:
        """A row by its line, or a hash: names of files may be those of patients."""
        return f"line {row.line}" if row.line else f"file {hashlib.sha256(row.rel.encode()).hexdigest()[:10]}"

    def predictions(
        self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray, runs: Sequence[str] | None = None
    ) -> Predictions | None:
        if manifest.task == SEGMENTATION:
            return None
        said = super().predictions(manifest, classes, outputs, runs)
        if said is None or said.groups is None:
            return said
        codes = np.unique(np.asarray(said.groups), return_inverse=True)[1]
        return replace(said, groups=[f"P{code + 1:04d}" for code in codes])

    def extra(self, handle: Handle, dataset: Frames, outputs: np.ndarray | None) -> list[dict[str, Any]]:
        """Pictures of the rows that it was most sure of, right and wrong."""
        from adaptsuite.medical.pictures import examples

        if _segments(handle.model):
            return self.masks.extra(handle, dataset, outputs)
        return [] if outputs is None else examples(dataset, outputs, handle.model.classes)


def _segments(model: nn.Module) -> bool:
    return isinstance(model, SegmentationModel)


def reading(recipe: Recipe) -> Reading:
    """What the recipe says of files with several frames."""
    own = {f.name for f in fields(Reading)}
    return Reading(**{k: v for k, v in recipe.front_end.items() if k in own})


DOMAIN = MedicalDomain()
