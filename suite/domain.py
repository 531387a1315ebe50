"""What a domain gives to the commands: its files, its task model, its losses, and what its evidence is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from adaptsuite import metrics
from adaptsuite.errors import UsageError
from adaptsuite.evidence import Predictions
from adaptsuite.host import Handle
from adaptsuite.manifest import Fold, Manifest, Row, load_manifest
from adaptsuite.method import Method
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.recipe import DataSettings, Recipe

HEAD = "head"  # where a domain's task model keeps its output layer


@dataclass(frozen=True, eq=False)
class Said:
    """What one adapter said of rows that it never saw."""

    manifest: Manifest  # the rows
    outputs: np.ndarray  # (rows, K) calibrated scores
    raw: np.ndarray  # (rows, K) before calibration
    kept: Mapping[str, Any]  # `Domain.keep`
    name: str = ""  # of its run
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)  # of the adapter: backbone, method, trained, hashes


class Domain(ABC):
    """One domain; its task model is a root with a `head`, whose input is one batch."""

    name: str
    suffixes: tuple[str, ...]  # of its files
    sections: dict[str, type]  # recipe section -> dataclass of its settings
    train_norms: bool  # whether methods' norms train here
    backbones: tuple[str, ...]  # names to try first

    # ---- data

    def table(self, data: DataSettings) -> Manifest:
        """The table of samples. Raises DataError."""
        return load_manifest(data.manifest, data.task, suffixes=self.suffixes)

    def targets(self, manifest: Manifest, classes: Sequence[str]) -> np.ndarray:
        """(rows, ...) what the rows of a table are compared with."""
        return manifest.targets(classes)

    @abstractmethod
    def dataset(self, model: nn.Module, paths: Sequence[Path], targets: np.ndarray | None) -> Any:
        """Map-style dataset; `mean_by_row` joins the outputs of several items of one row. Where there are several,
        `rows` says which row each item is of, and `starts` where in it."""

    def rows(self, model: nn.Module, manifest: Manifest, targets: np.ndarray | None) -> Any:
        """The same of a table's rows, where an item is more than the file of its row."""
        return self.dataset(model, [r.path for r in manifest.rows], targets)

    @abstractmethod
    def header(self, path: Path) -> Any:
        """A cheap look at one file, without decoding it. Raises DataError for what is seen to be unusable."""

    @abstractmethod
    def look(self, path: Path) -> dict[str, Any]:
        """Facts of one file, decoded; `remarks` lists what may be wrong. Raises DataError where it cannot be used."""

    def further(self, manifest: Manifest, row: Row) -> list[str]:
        """Looks whole at what a row names beside its file, such as a mask; remarks on it. Raises DataError as `look`,
        in a line that starts with the row's path."""
        return []

    @abstractmethod
    def prepare(self, model: nn.Module, paths: Sequence[Path]) -> list[str]:
        """Before any work: reads what fits into memory, and says what its reader should know, such as resampling."""

    def doubts(self, recipe: Recipe, manifest: Manifest, folds: Sequence[Fold]) -> list[str]:
        """What speaks against a split, to be said before training. Raises DataError where the recipe asks for that."""
        return []

    def shown(self, row: Row) -> str:
        """What outputs call a row."""
        return row.rel

    def notes(self, model: nn.Module, paths: Sequence[Path]) -> list[str]:
        """What is said once of all files of a command."""
        return []

    # ---- the model

    @abstractmethod
    def defaults(self, method: str) -> dict[str, dict[str, Any]]:
        """{"method_settings": ..., "plan": ...} of a method in this domain."""

    def defaults_of(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """The same of a recipe, where not the method alone decides."""
        return self.defaults(recipe.method)

    def settle(self, recipe: Recipe, paths: Sequence[Path]) -> Recipe:
        """The recipe with everything decided that the data decides, such as the input's length."""
        return recipe

    @abstractmethod
    def model(self, recipe: Recipe, classes: Sequence[str]) -> nn.Module:
        """The task model on its backbone, without an adapter, in eval mode.

        Its `linear_head` is the path of the linear layer that ends its head, None where there is none.
        """

    def decided(self, recipe: Recipe, model: nn.Module) -> Recipe:
        """The recipe with what the backbone decided written out: what an adapter keeps."""
        return recipe

    def placed(
        self, recipe: Recipe, model: nn.Module, method: Method
    ) -> tuple[Method, tuple[str, ...], dict[str, float]]:
        """(method with its sites, paths of modules that train whole, {path: factor of the learning rate}) of a recipe's
        adapter. Raises UsageError for components that cannot be chosen."""
        if recipe.components or recipe.component_rates:
            raise UsageError(f"components are not chosen in domain {self.name}: leave components and component_rates")
        return method, (HEAD,), {}

    def trains(self, handle: Handle) -> list[str]:
        """What is said of an adapter's parts before it is trained, line by line."""
        return []

    @abstractmethod
    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> Any:
        """Loss and scores (adaptsuite.trainer.Task), and `embed(model, batch)`: (B, D), what a linear head reads.

        counts: (K,) training rows of each class, given where the task is for training.
        """

    @abstractmethod
    def sample(self, model: nn.Module, batch: int = 2) -> Any:
        """Arguments of one forward of the task model, for probe, doctor and budget."""

    @abstractmethod
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """What `info` says of the model's input, as JSON can hold it: an adapter keeps it as its preprocessing.

        {"input": all of it in a line, ...}.
        """

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
        """Trains what an adapter is judged beside, such as baselines that see less, once the adapter has been trained.

        recipe: of this one adapter, as it was started.  parts: its "train" and "val" data.  out: the run's folder.
        Returns notes for the report.
        """
        return []

    def restored(self, handle: Handle, recipe: Recipe, folder: Path) -> None:  # noqa: B027 (most domains need none)
        """Told of every saved adapter that was loaded: what lies beside its folder may belong to it."""

    # ---- what it says, and what that is worth

    def outputs(
        self, model: nn.Module, task: Any, dataset: Any, plan: Plan, batch_size: int | None = None, device: str = ""
    ) -> np.ndarray:
        """(rows, K) scores, before `calibrated`."""
        batch, device = batch_size or plan.batch_size, device or plan.device
        raw, _ = predict_all(model, task, dataset, batch, device, workers=plan.workers)
        return dataset.mean_by_row(raw)

    def keep(self, recipe: Recipe, manifest: Manifest, outputs: np.ndarray) -> dict[str, Any]:
        """What validation rows decide once training has ended: records of the adapter, such as its temperature."""
        return {}

    def calibrated(self, outputs: np.ndarray, kept: dict[str, Any]) -> np.ndarray:
        """Scores as an adapter with these records gives them."""
        return outputs / (kept.get("temperature") or 1.0)

    def answers(self, recipe: Recipe, labels: Sequence[str], outputs: np.ndarray) -> list[dict[str, Any]]:
        """{"label", "scores": {label: number}} of each row, as `predict` says it."""
        found = []
        for scores in metrics.to_probabilities(outputs, recipe.data.task):
            named = {label: round(float(s), 6) for label, s in zip(labels, scores, strict=True)}
            if recipe.data.task == "multilabel":
                label = ";".join(k for k, v in named.items() if v >= 0.5)
            else:
                label = max(named, key=named.get)
            found.append({"label": label, "scores": named})
        return found

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        """{metric: {"value", "ci", "note"?}} of calibrated scores of a table's rows."""
        targets, groups = self.targets(manifest, classes), manifest.groups()
        return metrics.evaluate(outputs, targets, groups, manifest.task, classes=classes, probabilities=False)

    def score(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, float]:
        """The same values without intervals."""
        return metrics.score(outputs, self.targets(manifest, classes), manifest.task, probabilities=False)

    def predictions(
        self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray, runs: Sequence[str] | None = None
    ) -> Predictions | None:
        """The rows of the report's evidence; None where they have no classes."""
        return Predictions(
            paths=[self.shown(r) for r in manifest.rows],
            targets=self.targets(manifest, classes),
            probabilities=metrics.to_probabilities(outputs, manifest.task),
            groups=[r.group for r in manifest.rows] if "group" in manifest.columns else None,
            runs=runs,
        )

    def extra(self, handle: Handle, dataset: Any, outputs: np.ndarray | None) -> list[dict[str, Any]]:
        """Sections of the report that only this domain has, of one adapter. outputs: (rows, K) scores of the rows."""
        return []

    def evidence(
        self, recipe: Recipe, manifest: Manifest, said: Sequence[Said], part: str, out: Path | None
    ) -> list[dict[str, Any]]:
        """The same of all adapters of a run together, on rows of `part` of the table.

        A section may have `facts`, for JSON. out: the run's folder, for files beside the report; None: there is none.
        """
        return []
