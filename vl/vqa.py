"""Questions about pictures: answers as classes, soft accuracy, and what text or image alone get right."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from adaptsuite.domain import Said
from adaptsuite.errors import DataError, nearest
from adaptsuite.manifest import Fold, Manifest, write_csv
from adaptsuite.recipe import DataSettings, Recipe
from adaptsuite.vl.blind import BLIND
from adaptsuite.vl.choices import allowed, chance, choices_in, restricted
from adaptsuite.vl.data import answer_set, answers_of, choices_of, image_of, load_table, soft_targets, text_of
from adaptsuite.vl.domain import PairedDomain
from adaptsuite.vl.paired import AnswerTask, PairedModel
from adaptsuite.vl.scores import mean_interval, normalise_answer
from adaptsuite.vl.settings import AnswerSettings

KIND = "kind"  # a column of kinds of questions, each of which gets its own accuracy


class Questions(PairedDomain):
    """Questions, answered by one of the answers of the training rows."""

    data_task = "vqa"
    settings = AnswerSettings

    def table(self, data: DataSettings) -> Manifest:
        """Its classes are the answers of the rows that are not test: an answer seen in test alone cannot be known."""
        manifest = replace(load_table(data.manifest), task=self.data_task)
        column, _, values = (data.test or "split=test").partition("=")
        wanted = {values, *values.split(",")}
        held = [r.extra.get(column) in wanted for r in manifest.rows]
        rows = [r for r, out in zip(manifest.rows, held, strict=True) if not out] or manifest.rows
        return replace(manifest, classes=answer_set(rows))

    def targets(self, manifest: Manifest, classes: Sequence[str]) -> np.ndarray:
        """(rows, K) soft accuracy of each answer. DataError where no row has an answer among them."""
        found = soft_targets(manifest, classes)
        if len(found) and not found.any():
            row = manifest.rows[0]
            given = normalise_answer(answers_of(row)[0])
            raise DataError(
                f"{manifest.where(row)}: answer {given!r} is not in the label set, and no other row has one of it; "
                f"{nearest(given, classes)[:300]}"
            )
        return found

    def doubts(self, recipe: Recipe, manifest: Manifest, folds: Sequence[Fold]) -> list[str]:
        said, known = super().doubts(recipe, manifest, folds), set(manifest.classes)
        for fold in folds:
            held = [manifest.rows[i] for i in (*fold.val, *fold.test)]
            unknown = sum(known.isdisjoint(map(normalise_answer, answers_of(row))) for row in held)
            if unknown:
                said.append(
                    f"{fold.name}: {unknown} of {len(held)} held-back rows have no answer among the {len(known)} that "
                    "can be given: they count as wrong"
                )
            none = sum(not row.any() for row in allowed(list(map(choices_of, held)), manifest.classes))
            if none:
                said.append(f"{fold.name}: {none} of {len(held)} held-back rows have no choice that can be given")
        return said

    def build(self, pair: nn.Module, classes: Sequence[str], **options: Any) -> PairedModel:
        return PairedModel(pair, len(classes), **options)

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> AnswerTask:
        return AnswerTask(self.head(recipe).loss)

    # ---- evidence

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        """Soft accuracy, that of each kind of question, of the blind baselines, and the gain over the better one; of
        multiple choice also that of chance."""
        got, groups = self._scores(manifest, classes, outputs), [row.group for row in manifest.rows]
        found = {name: mean_interval(rows, groups) for name, rows in got.items()}
        if any(choices_in(manifest)):
            found["chance"] = mean_interval(chance(manifest, classes), groups)
        if KIND in manifest.columns:
            kinds = np.array(manifest.column(KIND))
            for kind in sorted(set(kinds) - {""}):
                own = np.flatnonzero(kinds == kind)
                found[f"accuracy:{kind}"] = mean_interval(got["accuracy"][own], [groups[i] for i in own])
        return found

    def _scores(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, np.ndarray]:
        """(rows,) soft accuracy of what the adapter and each baseline answered; gain: paired by row."""
        targets, rows = self.targets(manifest, classes), np.arange(len(manifest))
        outputs = restricted(outputs, choices_in(manifest), classes)
        said = outputs.reshape(len(rows), -1, len(classes)).argmax(2)  # (rows, 3)
        found = {name: targets[rows, said[:, i]] for i, name in enumerate(("accuracy", *BLIND))}
        best = max(BLIND, key=lambda name: found[name].mean())
        return {**found, "gain_over_blind": found["accuracy"] - found[best]}

    def evidence(
        self, recipe: Recipe, manifest: Manifest, said: Sequence[Said], part: str, out: Path | None
    ) -> list[dict[str, Any]]:
        """answers.csv, and what was answered without the text or without the image."""
        if not said:
            return []
        classes = manifest.classes
        lines = [line for one in said for line in self._answered(one, classes)]
        if out is not None:
            write_csv(out / "answers.csv", lines)
        shown = [line for line in lines if not line["score"]][:15]
        return [
            {
                "title": "Blind baselines",
                "text": "text_only was trained with the mean image in place of every image, image_only with an empty "
                "question, both as the adapter was. What they get right needs no binding of words to the image; "
                "gain_over_blind is the accuracy beyond the better one, paired by row.",
            },
            *([{"title": "Wrong answers", "text": "The first of answers.csv.", "table": shown}] if shown else []),
        ]

    def _answered(self, said: Said, classes: Sequence[str]) -> list[dict[str, Any]]:
        targets, choices = self.targets(said.manifest, classes), choices_in(said.manifest)
        outputs = restricted(said.outputs, choices, classes).reshape(len(said.manifest), -1, len(classes))
        best, several = outputs.argmax(2), any(choices)
        return [
            {
                "row": self.shown(row),
                "image": row.rel if image_of(row) else "",
                "question": text_of(row),
                "answers": " | ".join(dict.fromkeys(answers_of(row))),
                **({"choices": " | ".join(choices_of(row))} if several else {}),
                "said": classes[own[0]],
                **{name: classes[k] for name, k in zip(BLIND, own[1:], strict=True)},
                "score": float(target[own[0]]),
                **({"run": said.name} if said.name else {}),
            }
            for row, own, target in zip(said.manifest.rows, best, targets, strict=True)
        ]
