"""Retrieval: pictures by their captions and captions by their pictures, where a picture may have many captions."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.domain import Said
from adaptsuite.errors import DataError
from adaptsuite.manifest import Fold, Manifest, write_csv
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.recipe import DataSettings, Recipe
from adaptsuite.vl.contrast import contrastive
from adaptsuite.vl.data import load_table, text_of
from adaptsuite.vl.paired import given
from adaptsuite.vl.pairs import Pairs
from adaptsuite.vl.panel import panel
from adaptsuite.vl.scores import RECALLS, chance_recall, mean_interval, retrieval_ranks
from adaptsuite.vl.settings import DualSettings
from adaptsuite.vl.towers import TowerDomain
from adaptsuite.vl.two_tower import TwoTower, cosines

WAYS = ("image_to_text", "text_to_image")
MOST_SCALE = 100.0  # of cosines, as CLIP has it
SHOWN = 8  # pictures of the report
# columns of what is said of a row, whose gallery is its part of the table
TO_TEXT, TO_IMAGE, FIRST, OWN, IMAGES, CAPTIONS, SAID_CAPTION, SAID_IMAGE = range(8)


class DualHead(nn.Module):
    """Projections of both encoders into one space, where they have none, and the scale of cosines."""

    def __init__(self, towers: TwoTower, settings: DualSettings):
        super().__init__()
        if towers.aligned:
            self.image = self.text = nn.Identity()
            scale = float(towers.scale)
        else:
            self.image, self.text = (nn.Linear(width, settings.width) for width in towers.widths)
            scale = 1 / 0.07  # section 2.5 of CLIP's paper
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) scaled cosines of projected image (B, K, E) and text (C, K, E)."""
        return self.log_scale.exp().clamp(max=MOST_SCALE) * cosines(image, text)


class RetrievalModel(nn.Module):
    """Pictures (B, 3, H, W) or what the image tower said of them (B, K, D), and captions -> logits (B, C)."""

    data_task, linear_head = "retrieval", None

    def __init__(self, towers: TwoTower, settings: DualSettings | None = None):
        super().__init__()
        self.towers, self.head = towers, DualHead(towers, settings or DualSettings())
        self.tokenizer, self.front_end, self.see = towers.tokenizer, towers.front_end, towers.see

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor | None = None,
        features: Tensor | None = None,
        embedding: bool = False,
    ) -> Tensor:
        """embedding: unit vectors of each pair (B, 2, K, E) instead, the picture's first."""
        image = self.head.image(self.towers.see(image) if features is None else features)
        text = self.head.text(self.towers.read(input_ids, attention_mask))
        if embedding:
            return torch.stack([F.normalize(image, dim=-1), F.normalize(text, dim=-1)], 1)
        return self.head(image, text)


class RetrievalTask:
    """Contrastive training; an output row is the pair's embeddings, and its target the number of the picture."""

    target, monitor = "target", "mean_recall"

    def _said(self, model: RetrievalModel, batch: dict[str, Tensor], **options) -> Tensor:
        return model(**given(batch, ("input_ids", "attention_mask", "image", "features")), **options)

    def loss(self, model: RetrievalModel, batch: dict[str, Tensor]) -> Tensor:
        return contrastive(self._said(model, batch), batch["target"])

    def predict(self, model: RetrievalModel, batch: dict[str, Tensor]) -> Tensor:
        """(B, 2 K E)"""
        found = self._said(model, batch, embedding=True)
        return found.flatten(1) / found.shape[2] ** 0.5  # so that products are the mean over K

    def embed(self, model: RetrievalModel, batch: dict[str, Tensor]) -> Tensor:
        return self.predict(model, batch)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Mean of the six recalls, each with all these rows as the gallery."""
        to_text, to_image = retrieval_ranks(*gallery(outputs, targets))
        return {"mean_recall": float(np.mean([(r < k).mean() for r in (to_text, to_image) for k in RECALLS]))}


def gallery(outputs: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Similarities (I, C) of pictures and captions, and the picture of each caption (C,), of embeddings of rows."""
    seen, first, of = np.unique(images, return_index=True, return_inverse=True)
    pictures, captions = np.split(outputs, 2, axis=1)
    return pictures[first] @ captions.T, of.reshape(-1)


class Retrieval(TowerDomain):
    """Captions of pictures; a row a caption."""

    data_task = "retrieval"
    settings = DualSettings

    def table(self, data: DataSettings) -> Manifest:
        return replace(load_table(data.manifest, "caption"), task=self.data_task, classes=("caption",))

    def targets(self, manifest: Manifest, classes: Sequence[str]) -> np.ndarray:
        """(rows,) number of the row's picture."""
        numbers: dict[Path, int] = {}
        return np.array([numbers.setdefault(row.path, len(numbers)) for row in manifest.rows], dtype=np.int64)

    def doubts(self, recipe: Recipe, manifest: Manifest, folds: Sequence[Fold]) -> list[str]:
        """Raises DataError for a part with one picture: nothing can be told apart there."""
        for fold in folds:
            for part in ("train", "val", "test"):
                rows = getattr(fold, part)
                if len(rows) and len({manifest.rows[i].path for i in rows}) < 2:
                    raise DataError(f"{fold.name}: {part} has one picture, two are needed to tell them apart")
        return []

    def defaults(self, method: str) -> dict[str, dict[str, Any]]:
        """Large batches: every other pair of one is a negative."""
        given = super().defaults(method)
        plan = {"batch_size": 128, "epochs": 30, "lr": {"full": 1e-4}.get(method, 1e-3), "weight_decay": 0.01}
        return {**given, "plan": plan}

    def build(self, towers: TwoTower, recipe: Recipe, classes: Sequence[str]) -> RetrievalModel:
        return RetrievalModel(towers, self.head(recipe))

    def sample(self, model: RetrievalModel, batch: int = 2) -> dict[str, Tensor]:
        return {**super().sample(model, batch), **model.tokenizer(["a red circle , a blue square"] * batch)}

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> RetrievalTask:
        return RetrievalTask()

    # ---- evidence

    def outputs(
        self,
        model: RetrievalModel,
        task: RetrievalTask,
        dataset: Pairs,
        plan: Plan,
        batch_size: int | None = None,
        device: str = "",
    ) -> np.ndarray:
        """(rows, 8) ranks and what was retrieved, with the data set's rows as the gallery."""
        batch, device = batch_size or plan.batch_size, device or plan.device
        embeddings, images = predict_all(model, task, dataset, batch, device, workers=plan.workers)
        similarity, of = gallery(embeddings, images)
        to_text, to_image = retrieval_ranks(similarity, of)
        _, first = np.unique(of, return_index=True)
        found = np.zeros((len(of), 8))
        found[:, TO_TEXT], found[:, TO_IMAGE] = to_text[of], to_image
        found[first, FIRST] = 1
        found[:, OWN], found[:, IMAGES], found[:, CAPTIONS] = np.bincount(of)[of], len(first), len(of)
        found[:, SAID_CAPTION], found[:, SAID_IMAGE] = similarity.argmax(1)[of], first[similarity.argmax(0)]
        return found

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        """Recalls both ways and, beside each, what drawing blindly would find; queries are resampled by group."""
        found: dict[str, dict] = {}
        groups = np.array([row.group for row in manifest.rows])
        for way, column in zip(WAYS, (TO_TEXT, TO_IMAGE), strict=True):
            asked = outputs[:, FIRST] == 1 if column == TO_TEXT else np.ones(len(outputs), dtype=bool)
            rows, own = outputs[asked], groups[asked]
            right, of = (OWN, CAPTIONS) if column == TO_TEXT else (None, IMAGES)
            for k in RECALLS:
                found[f"{way}_r{k}"] = mean_interval((rows[:, column] < k).astype(float), own)
                chance = [chance_recall(k, int(row[of]), 1 if right is None else int(row[right])) for row in rows]
                found[f"chance:{way}_r{k}"] = {"value": float(np.mean(chance)), "ci": None}
        return found

    def evidence(
        self, recipe: Recipe, manifest: Manifest, said: Sequence[Said], part: str, out: Path | None
    ) -> list[dict[str, Any]]:
        """retrieved.csv, and the first pictures whose best caption is another's."""
        if not said:
            return []
        lines = [line for one in said for line in retrieved(one)]
        if out is not None:
            write_csv(out / "retrieved.csv", lines)
        wrong = [picture for one in said for picture in wrongly(one)][:SHOWN]
        text = (
            "Every picture and every caption of the part is in the gallery. chance: is what drawing blindly finds, "
            "counted and not estimated: a baseline that sees no picture, or no caption, scores all alike and finds "
            "nothing more. Equal scores count as the foreign one's."
        )
        sections: list[dict[str, Any]] = [{"title": "Blind baselines", "text": text}]
        if wrong:
            figure, shown = panel(wrong), [line for line in lines if line["caption_rank"]][:15]
            caption = "The first pictures whose best caption is another's; all are in retrieved.csv."
            sections.append({"title": "Wrong captions", "figure": figure, "caption": caption, "table": shown})
        return sections


def wrongly(said: Said) -> list[tuple[Path, str]]:
    """Pictures whose best caption is another's, with that caption and one of their own."""
    rows, found = said.manifest.rows, said.outputs
    return [
        (rows[i].path, f"found: {text_of(rows[int(found[i, SAID_CAPTION])])}\nis: {text_of(rows[i])}")
        for i in np.flatnonzero((found[:, FIRST] == 1) & (found[:, TO_TEXT] > 0))
    ]


def retrieved(said: Said) -> list[dict[str, Any]]:
    """For each row the rank of its picture's best own caption and of its picture, and what stood first instead."""
    rows = said.manifest.rows
    return [
        {
            "row": f"line {row.line}",
            "image": row.rel,
            "caption": text_of(row),
            "caption_rank": int(line[TO_TEXT]),
            "first_caption": text_of(rows[int(line[SAID_CAPTION])]),
            "image_rank": int(line[TO_IMAGE]),
            "first_image": rows[int(line[SAID_IMAGE])].rel,
            **({"run": said.name} if said.name else {}),
        }
        for row, line in zip(rows, said.outputs, strict=True)
    ]
