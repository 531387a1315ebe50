"""From pictures to labels: the task model (normalisation, backbone, head), its loss and its scores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.augment import Augment, augment, mix
from adaptsuite.domain import Domain
from adaptsuite.errors import UsageError
from adaptsuite.front_end import Fit, FrontEnd, Interpolation, load
from adaptsuite.image_data import Images, size_remarks
from adaptsuite.image_heads import LayersHead, LinearHead
from adaptsuite.images import SUFFIXES, Picture, inspect, survey, views
from adaptsuite.losses import class_weights, logit_adjusted
from adaptsuite.memory import Memory
from adaptsuite.metrics import score
from adaptsuite.recipe import Recipe


@dataclass(frozen=True)
class FrontEndSettings:
    """Section `front_end` of a recipe; None means the backbone's own."""

    size: tuple[int, ...] | int | None = None  # pixels: one number, or height,width
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    ratio: float | None = None  # a picture is resized to so many times the input's size, then cropped
    fit: Fit | None = None  # crop (the short side is fitted), squash (both sides are) or pad (the long side is)
    tta: Literal["none", "flip", "five_crop", "ten_crop"] = "none"  # views whose scores are averaged

    def __post_init__(self) -> None:
        if isinstance(self.size, tuple) and len(self.size) != 2:
            raise UsageError(f"front_end.size={self.size}: one number, or height,width is expected")


@dataclass(frozen=True)
class HeadSettings:
    """Section `head` of a recipe."""

    kind: Literal["linear", "ifa"] = "linear"  # ifa: of the CLS tokens behind all blocks
    pool: str | None = None  # linear: of own, cls, mean, std, max by +, or pool, both; None: the backbone's own choice
    start: Literal["probe", "random"] = "probe"  # from a logistic regression on frozen features (arXiv:2202.10054)
    balance: Literal["none", "weights", "logits"] = "none"  # rare classes: weighed by 1/frequency, or logits adjusted
    tau: float = 1.0  # of balance=logits (arXiv:2007.07314)


class ImageModel(nn.Module):
    """image (B, 3, H, W) in [0, 1] -> logits (B, K): normalisation, the backbone, what the head reads, the head."""

    def __init__(self, backbone: nn.Module, front_end: FrontEnd, num_classes: int, head: HeadSettings | None = None):
        super().__init__()
        head = head or HeadSettings()
        self.front_end, self.backbone = front_end, backbone
        for name in ("mean", "std"):
            value = torch.tensor(getattr(front_end, name)).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        if head.kind == "ifa":
            if head.pool is not None:
                raise UsageError(f"head.pool={head.pool!r}: a head of kind {head.kind} has a reading of its own")
            self.head = LayersHead(backbone, num_classes)
        else:
            pool = head.pool or getattr(backbone, "adaptsuite_pool", "own")
            self.head = LinearHead(backbone, num_classes, pool)

    @property
    def linear_head(self) -> str:
        """Path of the linear layer that ends the head."""
        return "head" if isinstance(self.head, LinearHead) else "head.dense"

    def normalised(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std

    def forward(self, image: Tensor, embedding: bool = False) -> Tensor:
        """embedding: what the linear layer reads (B, features) instead of logits."""
        read = self.head.read(self.backbone, self.normalised(image))
        return read if embedding else self.head(read)


class ImageTask:
    """Classification of pictures: cross-entropy for one label, binary cross-entropy for several."""

    target = "label"

    def __init__(
        self,
        classes: Sequence[str],
        task: str = "multiclass",
        augment: Augment | None = None,
        head: HeadSettings | None = None,
        tta: str = "none",
        counts: np.ndarray | None = None,
    ):
        if task not in ("multiclass", "multilabel"):
            raise UsageError(f"images: task {task!r} is not known; it is multiclass or multilabel")
        self.classes, self.task, self.augment, self.tta = tuple(classes), task, augment or Augment(), tta
        self.balance, self.tau = (head or HeadSettings()).balance, (head or HeadSettings()).tau
        if self.balance != "none" and task != "multiclass":
            raise UsageError(
                f"head.balance={self.balance} is for one label a picture; several have none or balanced draws"
            )
        self.counts = None if counts is None else torch.as_tensor(counts, dtype=torch.float32)
        self.weights = class_weights(counts) if counts is not None and self.balance == "weights" else None
        self.monitor = "accuracy" if task == "multiclass" else "map"

    def loss(self, model: ImageModel, batch: dict[str, Any]) -> Tensor:
        a, target = self.augment, batch["label"]
        target = F.one_hot(target, len(self.classes)).float() if self.task == "multiclass" else target.float()
        image = augment(batch["image"], model.front_end.size, a)
        image, target = mix(image, target, a)
        logits = model(image)
        if self.task == "multilabel":
            smooth = target * (1 - a.label_smoothing) + a.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, smooth)
        if self.balance == "logits":
            logits = logit_adjusted(logits, self.counts.to(logits.device), self.tau)
        weights = None if self.weights is None else self.weights.to(logits)
        return F.cross_entropy(logits, target, weights, label_smoothing=a.label_smoothing)

    def drawn(self, model: ImageModel) -> list[str]:
        """Fields of `augment` that draw at random in training."""
        return self.augment.drawn(model.front_end.resized != model.front_end.size)

    def predict(self, model: ImageModel, batch: dict[str, Any]) -> Tensor:
        return self._mean(model, batch["image"])

    def embed(self, model: ImageModel, batch: dict[str, Any]) -> Tensor:
        return self._mean(model, batch["image"], embedding=True)

    def _mean(self, model: ImageModel, image: Tensor, **options: Any) -> Tensor:
        found = [model(view, **options) for view in views(image, model.front_end.size, self.tta)]
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        return score(outputs, targets, self.task, probabilities=False)


class ImageDomain(Domain):
    """What the commands need of a domain of pictures; domains derive theirs from it."""

    name: str
    suffixes = SUFFIXES
    train_norms = False
    sections = {"front_end": FrontEndSettings, "head": HeadSettings, "augment": Augment}
    backbones: tuple[str, ...]

    def __init__(self):
        self.memory = Memory()

    def model(self, recipe: Recipe, classes: Sequence[str]) -> ImageModel:
        given = given_front_end(recipe)
        backbone, front = load(recipe.backbone, random_weights=recipe.random_weights, seed=recipe.seeds[0], **given)
        model = ImageModel(backbone, front, len(classes), self.sections["head"](**recipe.head)).eval()
        model.classes = tuple(classes)  # for pictures of the report
        return model

    def decided(self, recipe: Recipe, model: ImageModel) -> Recipe:
        """With the backbone's own preprocessing and pool, so that an adapter does not depend on what they become."""
        recipe = replace(recipe, front_end={**recipe.front_end, **asdict(model.front_end)})
        if not isinstance(model.head, LinearHead):
            return recipe
        return replace(recipe, head={**recipe.head, "pool": "+".join(model.head.pool)})

    def dataset(self, model: ImageModel, paths: Sequence[Path], targets: np.ndarray | None) -> Images:
        return Images(paths, targets, model.front_end, self.memory)

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> ImageTask:
        head, changes = self.sections["head"](**recipe.head), self.sections["augment"](**recipe.augment)
        return ImageTask(classes, recipe.data.task, changes, head, recipe.front_end.get("tta", "none"), counts)

    def sample(self, model: ImageModel, batch: int = 2) -> tuple[Tensor]:
        """Seeded noises."""
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(batch, len(model.front_end.mean), *model.front_end.size, generator=generator),)

    def header(self, path: Path) -> Picture:
        return inspect(path)

    def prepare(self, model: ImageModel, paths: Sequence[Path]) -> list[str]:
        """Decodes what fits into memory, so that training and scoring do not stop at a damaged file halfway."""
        if self.memory.crowded:
            self.memory = Memory()
        dataset = self.dataset(model, paths, np.zeros(len(paths), dtype=np.int64))
        dataset.load()
        return dataset.remarks()

    def look(self, path: Path) -> dict[str, Any]:
        """What `check` says of one file, decoded whole; raises DataError where it cannot be used."""
        return survey(path)

    def notes(self, model: ImageModel, paths: Sequence[Path]) -> list[str]:
        """What is said once of all files of a command."""
        return size_remarks([inspect(path) for path in paths], model.front_end)

    def describe(self, model: ImageModel) -> dict[str, Any]:
        front = model.front_end
        (height, width), (tall, wide) = front.size, front.resized
        mean, std = (" ".join(f"{v:.3g}" for v in values) for values in (front.mean, front.std))
        line = (
            f"{width} x {height} pixels of {wide} x {tall} ({front.fit}, {front.interpolation}), mean {mean}, std {std}"
        )
        return {"input": line, "front_end": asdict(front)}


def given_front_end(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of the FrontEnd itself; the rest of its section is the domain's."""
    own = {f.name for f in fields(FrontEnd)}
    return {k: v for k, v in recipe.front_end.items() if k in own and v is not None}
