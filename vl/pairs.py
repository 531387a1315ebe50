"""Rows of questions as batches: what the image encoder saw of each picture, or the picture, beside the words."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite.manifest import Row
from adaptsuite.memory import Memory
from adaptsuite.vl.blind import blank_of
from adaptsuite.vl.data import ImageTexts, image_of
from adaptsuite.vl.paired import PairedModel

AT_ONCE = 64  # pictures


class Pairs(ImageTexts):
    """Map-style dataset of what `AnswerTask` takes, one item a row.

    A picture is replaced by its V (N, D), seen once by the frozen image encoder, where all V fit into `seen` and the
    model's `seen_key` says that nothing in that encoder trains.
    """

    def __init__(
        self, rows: Sequence[Row], model: PairedModel, targets: np.ndarray | None, memory: Memory, seen: Memory
    ):
        super().__init__(rows, model.front_end, model.tokenizer, targets, memory)
        self.tokenizer = model.tokenizer
        self.features = None if model.seen_key is None else self._see(model, seen)

    def _see(self, model: PairedModel, seen: Memory) -> list[Tensor] | None:
        """V of every row; None where they do not fit into memory."""
        paths = list(dict.fromkeys(path for row in self.rows if (path := image_of(row))))
        away = [path for path in paths if (model.seen_key, path) not in seen]
        device = next(model.parameters()).device
        for start in range(0, len(away), AT_ONCE):
            some = away[start : start + AT_ONCE]
            with torch.no_grad():
                found = model.see(torch.stack([self.image(path) for path in some]).to(device)).cpu()
            if not all([seen.keep((model.seen_key, path), v.clone()) for path, v in zip(some, found, strict=True)]):
                return None
        with torch.no_grad():
            none = torch.zeros_like(model.see(self.image(None)[None].to(device)).cpu()[0])
        return [seen[model.seen_key, path] if (path := image_of(row)) else none for row in self.rows]

    def blank(self, model: PairedModel) -> Tensor:
        """(1, N, D) mean V of the rows that have an image."""
        have = [i for i, row in enumerate(self.rows) if image_of(row)] or range(len(self.rows))
        if self.features is not None:
            return blank_of(torch.stack([self.features[i] for i in have]))
        device = next(model.parameters()).device
        with torch.no_grad():  # one at a time: what does not fit into memory as V does not fit as a batch either
            seen = (model.see(self.image(image_of(self.rows[i]))[None].to(device)).cpu().float() for i in have)
            return sum(seen) / len(have)

    def blind(self, kind: str, blank: Tensor) -> "Pairs":
        """The same rows for a baseline: text_only has the mean image everywhere, image_only an empty question."""
        other = copy.copy(self)
        if kind == "text_only":
            other.features = [blank[0]] * len(self.rows)
        else:
            other.text = self.tokenizer([""] * len(self.rows))
        return other

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.features is None:
            return super().__getitem__(index)
        item = {"features": self.features[index], "item": index}
        item |= {name: values[index] for name, values in self.text.items()}
        return item if self.targets is None else item | {"target": self.targets[index]}

    def mean_by_row(self, outputs: np.ndarray) -> np.ndarray:
        """One item is one row."""
        return outputs
