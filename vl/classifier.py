"""A saved adapter as one object that answers questions about pictures, or writes captions of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaptsuite import recipe as recipes
from adaptsuite.artifact import read_adapter
from adaptsuite.commands import adapter_folder
from adaptsuite.devices import pick_device
from adaptsuite.errors import DataError, nearest
from adaptsuite.experiment import restore
from adaptsuite.image_classifier import image_of
from adaptsuite.images import fitted
from adaptsuite.plan import Plan
from adaptsuite.vl.captioner import Writing
from adaptsuite.vl.choices import allowed, restricted
from adaptsuite.vl.data import checked_texts
from adaptsuite.vl.pipeline import DOMAIN
from adaptsuite.vl.scores import normalise_answer

Choices = Sequence[str] | Sequence[Sequence[str]] | None


def load(folder: str | Path, device: str = "auto", batch_size: int | None = None) -> "Answerer | Captioner":
    """What an adapter's folder or its run's holds, by its task: `.answer(image, question)` or `.caption(image)`.

    Raises AdapterError for one that does not fit its base.
    """
    return KINDS.get(data_task(folder), Answerer)(folder, device, batch_size)


def data_task(folder: str | Path) -> str:
    """data.task of an adapter's folder or of its run's. Raises AdapterError for what is none."""
    recipe = read_adapter(adapter_folder(str(folder))).extra.get("recipe") or {}
    return recipe.get("data", {}).get("task", "")


class Loaded:
    """A saved adapter on its pair, ready to be asked.

    A picture is a path, a Pillow image, an array or a tensor, as `adaptsuite.image_classifier.image_of` takes it. What
    cannot be used is a DataError.
    """

    def __init__(self, folder: str | Path, device: str = "auto", batch_size: int | None = None):
        self.handle, self.recipe, labels, self.record = restore(DOMAIN, adapter_folder(str(folder)))
        plan = recipes.build(Plan, self.recipe.plan, "plan")
        self.labels, self.task = tuple(labels), DOMAIN.task(self.recipe, labels)
        self.device, self.batch_size = pick_device(device), batch_size or plan.batch_size
        self.model = self.handle.model.to(self.device).eval()

    def batches(self, number: int) -> Iterator[slice]:
        return (slice(start, start + self.batch_size) for start in range(0, number, self.batch_size))

    def run(self, says: Callable[..., torch.Tensor], batch: dict[str, torch.Tensor]) -> np.ndarray:
        """`says` of the model and a batch, on its device, without gradient."""
        with torch.no_grad():
            found = says(self.model, {name: values.to(self.device) for name, values in batch.items()})
        return found.float().cpu().numpy()

    def seen(self, pictures: Sequence[Any]) -> dict[str, torch.Tensor]:
        front = self.model.front_end
        black = torch.zeros(3, *front.resized, dtype=torch.uint8)
        images = [black if picture is None else fitted(image_of(picture), front) for picture in pictures]
        return {"image": torch.stack(images), "has_image": torch.tensor([p is not None for p in pictures])}


class Answerer(Loaded):
    """Answers questions about pictures; None asks without one."""

    def answer(self, image: Any, question: str | Sequence[str], choices: Choices = None) -> Any:
        """The answer with the highest score; a list of them for a list of questions.

        choices: what it is one of, for all questions, or a list of such lists, one for each question (empty: free).
        """
        scores = self.scores(image, question, choices)
        best = [self.labels[k] for k in scores.argmax(1)]
        return best[0] if isinstance(question, str) else best

    def predict(self, image: Any, question: str | Sequence[str], most: int = 5, choices: Choices = None) -> Any:
        """{answer: score} of the `most` highest, best first; a list of them for a list of questions.

        A score is in [0, 1]; with the loss "ce", and of models that write, those of all answers that may be given sum
        to 1. choices: as for `answer`.
        """
        logits = torch.from_numpy(self.scores(image, question, choices))
        one = self.recipe.head.get("loss") == "ce" or getattr(self.model, "whole", False)
        scores = logits.softmax(1) if one else logits.sigmoid()
        named = [
            {self.labels[k]: float(row[k]) for k in row.argsort(descending=True, stable=True)[:most] if fine[k]}
            for row, fine in zip(scores, logits.isfinite(), strict=True)
        ]
        return named[0] if isinstance(question, str) else named

    def scores(self, image: Any, question: str | Sequence[str], choices: Choices = None) -> np.ndarray:
        """(N, K) logits, -inf of what is no choice. image: one for all questions, or a list of one each."""
        questions = [question] if isinstance(question, str) else list(question)
        if not questions:
            raise DataError("no question was given")
        texts = [checked_texts(q, "the question" if len(questions) == 1 else f"question {i + 1}", "question")[0]
                 for i, q in enumerate(questions)]  # fmt: skip
        pictures = list(image) if isinstance(image, list | tuple) else [image] * len(texts)
        if len(pictures) != len(texts):
            raise DataError(f"{len(pictures)} images beside {len(texts)} questions: one for all, or one each")
        found = [
            self.run(self.task.predict, {**self.model.tokenizer(texts[part]), **self.seen(pictures[part])})
            for part in self.batches(len(texts))
        ]
        return restricted(np.concatenate(found), self._checked(choices, len(texts)), self.labels)

    def _checked(self, choices: Choices, number: int) -> list[Sequence[str]]:
        """Of each question. Raises DataError where none of them is an answer that this adapter knows."""
        choices = [] if choices is None else [choices] if isinstance(choices, str) else list(choices)
        several = choices and not isinstance(choices[0], str)
        rows = choices if several else [choices] * number
        if len(rows) != number:
            raise DataError(
                f"choices of {len(rows)} questions beside {number} questions: one list for all, or one each"
            )
        for i, (own, fine) in enumerate(zip(rows, allowed(rows, self.labels), strict=True), 1):
            if not fine.any():
                raise DataError(
                    f"question {i}: none of its choices {', '.join(own)} is among the {len(self.labels)} answers of "
                    f"this adapter; {nearest(normalise_answer(own[0]), self.labels)[:200]}"
                )
        return rows


class Captioner(Loaded):
    """Writes captions of pictures."""

    def caption(self, image: Any) -> Any:
        """What is in a picture; a list of captions for a list of pictures."""
        several = isinstance(image, list | tuple)
        pictures = list(image) if several else [image]
        if not pictures or any(picture is None for picture in pictures):
            raise DataError("no picture was given: a caption is of a picture")
        found = [self.run(Writing().predict, self.seen(pictures[part])) for part in self.batches(len(pictures))]
        texts = [self.model.tokenizer.decode(row) for row in np.concatenate(found).astype(int)]
        return texts if several else texts[0]


KINDS: dict[str, type[Loaded]] = {"vqa": Answerer, "caption": Captioner}
