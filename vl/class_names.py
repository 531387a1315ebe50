"""Pictures told apart by the names of their classes: the task model on two towers, and its training on shots."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.vl.paired import given
from adaptsuite.vl.two_tower import TwoTower, cosines

PICTURE = ("image", "features")  # of a batch


class FewShotModel(nn.Module):
    """Pictures (B, 3, H, W), or what the image tower said of them (B, K, E), -> logits (B, C): scaled cosines with the
    embedded names of the classes, of which the first `num_base` have shots."""

    linear_head = None

    def __init__(self, towers: TwoTower, names: Sequence[str], num_base: int, template: str, data_task: str):
        super().__init__()
        if not towers.aligned:
            raise UsageError("few-shot needs towers that were trained to be compared: open_clip:... or hf:... of CLIP")
        self.towers, self.head = towers, nn.Module()  # nothing beside the adapters trains
        self.num_base, self.data_task = num_base, data_task
        self.tokenizer, self.front_end, self.see = towers.tokenizer, towers.front_end, towers.see
        templates = template.split("|")
        texts = [t.format(name.replace("_", " ")) for name in names for t in templates]
        self.templates = len(templates)
        for key, value in towers.tokenizer(texts).items():
            self.register_buffer(key, value, persistent=False)

    def classes(self, first: int | None = None) -> Tensor:
        """(C, K, E) of the first classes, or of all: the mean of unit vectors over templates."""
        rows = None if first is None else first * self.templates
        text = F.normalize(self.towers.read(self.input_ids[:rows], self.attention_mask[:rows]), dim=-1)
        return text.unflatten(0, (-1, self.templates)).mean(1)

    def forward(self, image: Tensor | None = None, features: Tensor | None = None, first: int | None = None) -> Tensor:
        seen = self.towers.see(image) if features is None else features
        return self.towers.scale * cosines(seen, self.classes(first)) + self.towers.bias


class FewShotTask:
    """Cross-entropy among the classes that have shots."""

    target, monitor = "target", "accuracy"

    def __init__(self, num_base: int):
        self.num_base = num_base

    def loss(self, model: FewShotModel, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(**given(batch, PICTURE), first=self.num_base), batch["target"])

    def predict(self, model: FewShotModel, batch: dict[str, Tensor]) -> Tensor:
        return model(**given(batch, PICTURE))

    def embed(self, model: FewShotModel, batch: dict[str, Tensor]) -> Tensor:
        """(B, E) unit vectors of pictures, the mean over prompts."""
        found = given(batch, PICTURE)
        seen = found["features"] if "features" in found else model.see(found["image"])
        return F.normalize(F.normalize(seen, dim=-1).mean(1), dim=-1)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Accuracy among the classes that have shots: validation rows are of no other."""
        return {"accuracy": float((outputs[:, : self.num_base].argmax(1) == targets).mean())}


class Seeing:
    """A task whose outputs are the frozen towers' unit vectors of pictures."""

    target, embed = "target", FewShotTask.embed

    def predict(self, model: FewShotModel, batch: dict[str, Tensor]) -> Tensor:
        return self.embed(model, batch)
