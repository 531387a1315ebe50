"""Multiple choice: answers are taken from a question's own choices, and chance is said beside them."""

from collections.abc import Sequence

import numpy as np

from adaptsuite.manifest import Manifest
from adaptsuite.vl.data import answers_of, choices_of
from adaptsuite.vl.scores import answer_scores, normalise_answer


def allowed(choices: Sequence[Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """(N, K) bool, which answers each question may get: all where it has no choices."""
    index = {text: k for k, text in enumerate(classes)}
    found = np.array([[not own] * len(classes) for own in choices], dtype=bool).reshape(len(choices), len(classes))
    for row, own in zip(found, choices, strict=True):
        row[[index[text] for text in map(normalise_answer, own) if text in index]] = True
    return found


def restricted(outputs: np.ndarray, choices: Sequence[Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """Scores (N, M K) of M models, -inf where an answer is no choice of its question."""
    fine = np.tile(allowed(choices, classes), (1, outputs.shape[1] // len(classes)))
    return np.where(fine, outputs, -np.inf)


def choices_in(manifest: Manifest) -> list[tuple[str, ...]]:
    return [choices_of(row) for row in manifest.rows]


def chance(manifest: Manifest, classes: Sequence[str]) -> np.ndarray:
    """(N,) soft accuracy that a blind draw among a row's choices gets on average; of all answers where it has none."""
    found = []
    for row in manifest.rows:
        drawn = set(map(normalise_answer, choices_of(row))) or set(classes)
        found.append(sum(score for text, score in answer_scores(answers_of(row)).items() if text in drawn) / len(drawn))
    return np.array(found)
