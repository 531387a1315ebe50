"""A saved adapter as one object that answers questions about pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptsuite import recipe as recipes
from adaptsuite.devices import pick_device
from adaptsuite.errors import DataError
from adaptsuite.experiment import restore
from adaptsuite.image_classifier import image_of
from adaptsuite.images import fitted
from adaptsuite.plan import Plan
from adaptsuite.vl.data import checked_texts
from adaptsuite.vl.pipeline import DOMAIN


def load(folder: str | Path, device: str = "auto", batch_size: int | None = None) -> "Answerer":
    """The answerer of an adapter's folder or of its run's. Raises AdapterError for one that does not fit its base."""
    return Answerer(folder, device, batch_size)


class Answerer:
    """`adaptsuite.vl.load(folder)`.

    A picture is a path, a Pillow image, an array or a tensor, as `adaptsuite.image_classifier.image_of` takes it; None
    asks without one. What cannot be used is a DataError.
    """

    def __init__(self, folder: str | Path, device: str = "auto", batch_size: int | None = None):
        inner = Path(folder) / "adapter"
        self.handle, self.recipe, labels, self.record = restore(
            DOMAIN, inner if (inner / "adapter.json").is_file() else folder
        )
        plan = recipes.build(Plan, self.recipe.plan, "plan")
        self.labels, self.task = tuple(labels), DOMAIN.task(self.recipe, labels)
        self.device, self.batch_size = pick_device(device), batch_size or plan.batch_size
        self.model = self.handle.model.to(self.device).eval()

    def answer(self, image: Any, question: str | Sequence[str]) -> Any:
        """The answer with the highest score; a list of them for a list of questions."""
        scores = self.scores(image, question)
        best = [self.labels[k] for k in scores.argmax(1)]
        return best[0] if isinstance(question, str) else best

    def predict(self, image: Any, question: str | Sequence[str], most: int = 5) -> Any:
        """{answer: score} of the `most` highest, best first; a list of them for a list of questions.

        A score is in [0, 1]; with the loss "ce" all of them sum to 1.
        """
        logits = torch.from_numpy(self.scores(image, question))
        scores = logits.softmax(1) if self.recipe.head.get("loss") == "ce" else logits.sigmoid()
        named = [
            {self.labels[k]: float(row[k]) for k in row.argsort(descending=True, stable=True)[:most]} for row in scores
        ]
        return named[0] if isinstance(question, str) else named

    def scores(self, image: Any, question: str | Sequence[str]) -> np.ndarray:
        """(N, K) logits. image: one for all questions, or a list of one each."""
        questions = [question] if isinstance(question, str) else list(question)
        if not questions:
            raise DataError("no question was given")
        texts = [checked_texts(q, "the question" if len(questions) == 1 else f"question {i + 1}", "question")[0]
                 for i, q in enumerate(questions)]  # fmt: skip
        pictures = list(image) if isinstance(image, list | tuple) else [image] * len(texts)
        if len(pictures) != len(texts):
            raise DataError(f"{len(pictures)} images beside {len(texts)} questions: one for all, or one each")
        found = []
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = {**self.model.tokenizer(texts[part]), **self._seen(pictures[part])}
            with torch.no_grad():
                said = self.task.predict(self.model, {k: v.to(self.device) for k, v in batch.items()})
            found.append(said.float().cpu().numpy())
        return np.concatenate(found)

    def _seen(self, pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
        front = self.model.front_end
        black = torch.zeros(3, *front.resized, dtype=torch.uint8)
        images = [black if picture is None else fitted(image_of(picture), front) for picture in pictures]
        return {"image": torch.stack(images), "has_image": torch.tensor([p is not None for p in pictures])}
