"""Captions of pictures: written by a language model, scored by BLEU and CIDEr-D, beside one that sees no picture."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from adaptsuite.domain import Said
from adaptsuite.manifest import Manifest, Row, write_csv
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.recipe import DataSettings, Recipe
from adaptsuite.vl.backbones import DecoderPair
from adaptsuite.vl.captioner import CaptionModel, CaptionTask, Writing
from adaptsuite.vl.data import load_table, text_of
from adaptsuite.vl.domain import PairedDomain
from adaptsuite.vl.pairs import Pairs
from adaptsuite.vl.panel import panel
from adaptsuite.vl.scores import caption_scores, cider_d, mean_interval
from adaptsuite.vl.settings import CaptionSettings

TEXT_ONLY = "text_only"
SHOWN = 8  # pictures of the report


class Captions(PairedDomain):
    """Captions, written word by word; a picture may have several of them in the table."""

    data_task = "caption"
    settings = CaptionSettings
    text_model = "language_model"
    blind = (TEXT_ONLY,)  # without words there is nothing to write: image_only would be the adapter itself
    backbones = ("embedded:vl-tiny-decoder",)
    pair_kind = DecoderPair

    def table(self, data: DataSettings) -> Manifest:
        return replace(load_table(data.manifest, "caption"), task=self.data_task)

    def targets(self, manifest: Manifest, classes: Sequence[str]) -> None:
        """The words are in the rows themselves."""

    def build(self, pair: nn.Module, classes: Sequence[str], **options: Any) -> CaptionModel:
        return CaptionModel(pair, **options)

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> CaptionTask:
        return CaptionTask()

    # ---- evidence

    def outputs(
        self,
        model: nn.Module,
        task: CaptionTask,
        dataset: Pairs,
        plan: Plan,
        batch_size: int | None = None,
        device: str = "",
    ) -> np.ndarray:
        """(rows, 2) texts: the caption of the row's picture, and the one of the baseline."""
        batch, device = batch_size or plan.batch_size, device or plan.device
        found = [written(model, dataset, batch, device)]
        for kind, twin in self.beside_of(model).items():
            blind = dataset.blind(kind, twin.blank)
            found.append(written(twin.handle.model, blind, batch, device))
        return np.array(found).T

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        """CIDEr-D and BLEU of the captions and of the baseline's; gain: CIDEr-D, paired by picture."""
        shown = pictures(manifest, outputs)
        groups, references = [p.row.group for p in shown], [p.references for p in shown]
        own, blind = (caption_scores([p.said[i] for p in shown], references, groups) for i in (0, 1))
        gain = np.subtract(*(cider_d([p.said[i] for p in shown], references) for i in (0, 1)))
        return {
            "cider_d": own["cider_d"],
            TEXT_ONLY: blind["cider_d"],
            "gain_over_blind": mean_interval(gain, groups),
            **{name: own[name] for name in ("bleu4", "bleu3", "bleu2", "bleu1")},
            f"{TEXT_ONLY}:bleu4": blind["bleu4"],
        }

    def evidence(
        self, recipe: Recipe, manifest: Manifest, said: Sequence[Said], part: str, out: Path | None
    ) -> list[dict[str, Any]]:
        """captions.csv, pictures with what was written of them, and what was written without a picture."""
        if not said:
            return []
        lines, shown = [], []
        for one in said:
            own = pictures(one.manifest, one.outputs)
            values = cider_d([p.said[0] for p in own], [p.references for p in own])
            shown += list(zip(values, own, strict=True))
            lines += [_line(p, value, one.name) for value, p in zip(values, own, strict=True)]
        if out is not None:
            write_csv(out / "captions.csv", lines)
        order = sorted(range(len(shown)), key=lambda i: -shown[i][0])
        chosen = [shown[i][1] for i in dict.fromkeys((*order[: SHOWN // 2], *order[-SHOWN // 2 :]))]
        return [
            {
                "title": "Blind baseline",
                "text": "text_only was trained as the adapter was, with the mean image in place of every image: it "
                "writes one caption for all pictures, and what that gets needs no picture. gain_over_blind is the "
                "CIDEr-D beyond it, paired by picture. image_only has no meaning here: a caption has no text that "
                "could be left out. CIDEr-D weighs words by how rare they are in these references, so that values "
                "of different tables cannot be compared.",
            },
            {
                "title": "Captions",
                "figure": panel([(p.row.path, f"said: {p.said[0]}\nis: {p.references[0]}") for p in chosen]),
                "caption": "The best and the worst by CIDEr-D; all are in captions.csv.",
                "table": [_line(p, v, "") for v, p in (shown[i] for i in order[-SHOWN // 2 :])],
            },
        ]


@dataclass(frozen=True)
class Captioned:
    """A picture, its captions in the table, and what was written of it by the adapter and by the baseline."""

    row: Row  # its first
    references: list[str]
    said: tuple[str, str]


def pictures(manifest: Manifest, outputs: np.ndarray) -> list[Captioned]:
    """The pictures of a table's rows, each once for every time that its rows are there, as of several seeds."""
    found: dict[tuple[Path, int], Captioned] = {}
    times: Counter[int] = Counter()
    for row, said in zip(manifest.rows, outputs, strict=True):
        first = Captioned(row, [], tuple(map(str, said)))
        found.setdefault((row.path, times[id(row)]), first).references.append(text_of(row))
        times[id(row)] += 1
    return list(found.values())


def written(model: CaptionModel, dataset: Pairs, batch_size: int, device: str) -> list[str]:
    """A caption for each row, written once for each picture."""
    first: dict[Path, int] = {}
    places = [first.setdefault(row.path, i) for i, row in enumerate(dataset.rows)]
    numbers, _ = predict_all(model, Writing(), dataset, batch_size, device, indices=list(first.values()))
    texts = dict(zip(first.values(), map(model.tokenizer.decode, numbers.astype(int)), strict=True))
    return [texts[i] for i in places]


def _line(picture: Captioned, value: float, run: str) -> dict[str, Any]:
    return {
        "image": picture.row.rel,
        "said": picture.said[0],
        TEXT_ONLY: picture.said[1],
        "cider_d": round(float(value), 3),
        "captions": " | ".join(picture.references),
        **({"run": run} if run else {}),
    }
