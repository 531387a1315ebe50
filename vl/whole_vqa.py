"""Questions answered by models that were made to write about pictures (`adaptsuite.vl.whole`)."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite.errors import UsageError
from adaptsuite.method import Method
from adaptsuite.recipe import Recipe
from adaptsuite.vl.domain import said_front_end
from adaptsuite.vl.hosts import chosen, factors_of, parts
from adaptsuite.vl.vqa import Questions
from adaptsuite.vl.whole import WholeModel, WholeTask, load_whole


class WholeQuestions(Questions):
    """The language model adapts, where `components` does not say otherwise."""

    def settle(self, recipe: Recipe, paths: Sequence[Path]) -> Recipe:
        """Sites stay as they are: the parts of a model are known once it is there."""
        return replace(recipe, data=replace(recipe.data, task=self.data_task))

    def model(self, recipe: Recipe, classes: Sequence[str]) -> WholeModel:
        settings = self.head(recipe)
        if settings.prefix is not None or settings.loss != "bce":
            raise UsageError("head.prefix and head.loss say nothing of a model that writes about pictures")
        weights = {"random_weights": recipe.random_weights, "seed": recipe.seeds[0]}
        return load_whole(recipe.backbone, classes, settings, front_end=said_front_end(recipe), **weights)

    def placed(
        self, recipe: Recipe, model: WholeModel, method: Method
    ) -> tuple[Method, tuple[str, ...], dict[str, float]]:
        rates = factors_of(model, recipe.component_rates)
        if method.in_place and not recipe.components:
            return method, (), rates
        language = [part.name for part in parts(model) if part.kind == "language" and part.component]
        method, whole = chosen(model, method, {**dict.fromkeys(language, "adapt"), **recipe.components})
        return method, whole, rates

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> WholeTask:
        return WholeTask()

    def sample(self, model: WholeModel, batch: int = 2) -> dict[str, Tensor]:
        """With one answer for each row, as in training."""
        return super().sample(model, batch) | {"answer": torch.zeros(batch, dtype=torch.long)}

    def describe(self, model: WholeModel) -> dict[str, Any]:
        (height, width), front = model.front_end.size, model.front_end
        line = (
            f"{width} x {height} pixels ({front.fit}, {front.interpolation}) as {len(model.tokenizer.image)} tokens of "
            f"{model.settings.prompt!r}; {len(model.lengths)} answers compared"
        )
        return {"input": line, "front_end": asdict(front), "tokenizer": model.tokenizer.record()}
