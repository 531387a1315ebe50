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
from adaptsuite.errors import DataError
from adaptsuite.experiment import restore
from adaptsuite.image_classifier import image_of
from adaptsuite.images import fitted
from adaptsuite.plan import Plan
from adaptsuite.vl.captioner import Writing
from adaptsuite.vl.data import checked_texts
from adaptsuite.vl.pipeline import DOMAIN


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
        found = [
            self.run(self.task.predict, {**self.model.tokenizer(texts[part]), **self.seen(pictures[part])})
            for part in self.batches(len(texts))
        ]
        return np.concatenate(found)


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
