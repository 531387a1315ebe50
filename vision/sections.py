"""What a model looks at, as sections of a report: pictures under attention rollout and Grad-CAM, classes that are
confused, and how alike the attention of the blocks is."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.evidence import confused_pairs
from adaptsuite.host import Handle
from adaptsuite.image_data import Images
from adaptsuite.images import crop
from adaptsuite.metrics import to_probabilities
from adaptsuite.trainer import predict_all
from adaptsuite.vision.cka import WORK, Alike, alike, collapse
from adaptsuite.vision.look import grad_cam, rollout, still
from adaptsuite.vision.pictures import (
    Confusion,
    Heat,
    Look,
    cka_figure,
    confusion_figure,
    look_figure,
    page_figure,
)

PICTURED = 3  # right answers that are drawn, and wrong ones
SCORED = 64  # rows that are scored where no scores are given
PAIRS, EXAMPLES, MISTAKES = 3, 2, 2  # pairs of classes that are drawn, pictures of each class, mistakes of each pair


@dataclass
class Subject:
    """A model and the pictures that it is looked at with."""

    model: nn.Module
    dataset: Images
    rows: np.ndarray  # of the data set, those that there are scores of
    probabilities: np.ndarray | None = None  # (rows, K); None: a backbone without a head
    labels: Sequence[str] = ()
    handle: Handle | None = None
    task: str = "multiclass"
    left_out: list[str] = field(default_factory=list)

    @property
    def truth(self) -> np.ndarray | None:
        """(rows,) classes, (rows, K) zeros and ones for several labels; None where it is not known."""
        targets = self.dataset.item_targets
        return None if targets is None or self.probabilities is None else targets[self.rows]

    @property
    def said(self) -> np.ndarray:
        """As `truth`."""
        return self.probabilities >= 0.5 if self.task == "multilabel" else self.probabilities.argmax(1)

    @property
    def right(self) -> np.ndarray:
        """(rows,) bool."""
        same = self.said == self.truth
        return same.all(1) if same.ndim == 2 else same

    def image(self, place: int) -> Tensor:
        """(1, 3, H, W) in [0, 1] as the model takes it, on its device."""
        picture = self.dataset[int(self.rows[place])]["image"]
        return crop(picture, self.model.front_end.size)[None].to(next(self.model.parameters()).device).float() / 255

    def shown(self, place: int) -> np.ndarray:
        """The same as (H, W, 3)."""
        return self.image(place)[0].permute(1, 2, 0).cpu().numpy()

    def names(self, answer) -> str:
        """Of a class, or of a row of zeros and ones."""
        if self.task != "multilabel":
            return self.labels[int(answer)]
        return ", ".join(label for label, there in zip(self.labels, answer, strict=True) if there) or "none"

    @contextlib.contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """What a model is refused with is said once, and the work goes on."""
        try:
            yield
        except UsageError as e:
            if f"{what}: {e}" not in self.left_out:
                self.left_out.append(f"{what}: {e}")


def sections(
    handle: Handle, dataset: Images, outputs: np.ndarray | None = None, labels: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Sections of the report: pictures of right and wrong answers, confused classes, CKA of the blocks' attention.

    outputs: (rows, K) scores of the data set; None: of up to SCORED rows they are taken here.  labels: of the classes.
    The model stays as it is, bit by bit. On a CPU it takes a minute or two at most; what was left out is said.
    """
    with still(handle.model):
        subject, each = subject_of(handle, dataset, outputs, labels), affordable(handle.model)
        places, chosen = drawn(subject, each)
        if each < PICTURED:
            chosen += " Few, since each takes long at this size of input; adapt vision inspect draws any."
        looks, attention = [look(subject, place)[0] for place in places], attention_section(measured(subject))
        return [*looks_section(subject, looks, chosen), *confusions(subject), *attention]


def subject_of(
    handle: Handle, dataset: Images, outputs: np.ndarray | None = None, labels: Sequence[str] | None = None
) -> Subject:
    model, targets, rows = handle.model, dataset.item_targets, np.arange(len(dataset))
    if outputs is None:
        rows = np.unique(np.linspace(0, len(dataset) - 1, min(SCORED, len(dataset))).round().astype(int))
        device = next(model.parameters()).device
        outputs, _ = predict_all(model, _Middles(), dataset, device=device, indices=rows.tolist())
    labels = labels or getattr(model, "classes", None) or [f"class {k}" for k in range(outputs.shape[1])]
    task = "multilabel" if targets is not None and targets.ndim == 2 else "multiclass"
    return Subject(model, dataset, rows, to_probabilities(outputs, task), list(labels), handle, task)


class _Middles:
    """A task whose outputs are the scores of the pictures' middles."""

    target = "label"

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        return model(crop(batch["image"], model.front_end.size).float() / 255)


# ---- pictures


def affordable(model: nn.Module) -> int:
    """How many right answers are drawn for a report, and wrong ones: fewer of a large model and input on a CPU."""
    pixels = model.front_end.size[0] * model.front_end.size[1]
    work = 2.5 * sum(p.numel() for p in model.parameters()) * pixels / 256  # forwards a picture, tokens of 16 x 16
    return PICTURED if next(model.parameters()).device.type != "cpu" else min(PICTURED, max(1, int(WORK / work)))


def drawn(subject: Subject, each: int = PICTURED) -> tuple[np.ndarray, str]:
    """Places of the answers that are drawn, `each` of right and of wrong ones, and how they were chosen."""
    rng, places, said = np.random.default_rng(0), [], []
    for name, own in (("right", np.flatnonzero(subject.right)), ("wrong", np.flatnonzero(~subject.right))):
        places.append(np.sort(rng.permutation(own)[:each]))
        said.append(f"{len(places[-1])} of {len(own)} {name} answers")
    text = f"Drawn at random (seed 0), whatever they look like: {' and '.join(said)}{_of_some(subject)}."
    return np.concatenate(places), text


def _of_some(subject: Subject) -> str:
    num = len(subject.rows)
    return (
        f", of the {num} of {len(subject.dataset)} rows that were scored for it" if num < len(subject.dataset) else ""
    )


def look(subject: Subject, place: int) -> tuple[Look, dict[str, Any]]:
    """One picture with its heats, and the same in numbers: {"path", "label", "probability", "true", "right",
    "rollout_entropy" (of each block), "tokens"}, as far as they are known."""
    path = subject.dataset.paths[int(subject.rows[place])]
    said, right, classes, facts = _answer(subject, place)
    image, heats = subject.image(place), []
    with subject.noting("no attention rollout"):
        found = rollout(subject.model, image)
        shares = found.maps[0].cpu().numpy()
        even = float(shares.mean())
        title = f"rollout\nup to {shares.max() / even:.1f} x an even share"
        heats.append(Heat(title, shares, found.tokens.embedded, max(float(shares.max()), 2 * even)))
        facts |= {"rollout_entropy": found.entropy[0].tolist(), "tokens": found.tokens}
    with subject.noting("no Grad-CAM"):
        heats += _evidence(subject, image, classes) if classes else []
    return Look(path.name, subject.shown(place), said, right, heats), {"path": str(path), **facts}


def _evidence(subject: Subject, image: Tensor, classes: Sequence[int]) -> list[Heat]:
    """Grad-CAM of some classes, on one scale."""
    heats = []
    for k in classes:
        cam, place = grad_cam(subject.model, image, torch.tensor([k], device=image.device))
        title = "Grad-CAM of" if cam.any() else "Grad-CAM: no token speaks for"
        heats.append(Heat(f"{title}\n{subject.labels[k]}", cam[0].cpu().numpy(), place))
    full = max(float(heat.values.max()) for heat in heats)
    return [replace(heat, full=full) for heat in heats]


def _answer(subject: Subject, place: int) -> tuple[str, bool | None, list[int], dict[str, Any]]:
    """What was said of a picture: a line, whether it is right, the classes to look for, the same as facts."""
    if subject.probabilities is None:
        return "", None, [], {}
    scores, name = subject.probabilities[place], subject.names(subject.said[place])
    facts: dict[str, Any] = {"label": name, "probability": float(scores.max())}
    line, classes = f"{name}  {scores.max():.2f}", [int(scores.argmax())]
    if subject.truth is None:
        return line, None, classes, facts
    true, right = subject.names(subject.truth[place]), bool(subject.right[place])
    if right:
        line += ", right"
    elif subject.task == "multilabel":
        line += f", but it is {true}"
    else:
        classes.append(int(subject.truth[place]))
        line += f", but it is {true}  {scores[classes[1]]:.2f}"
    return line, right, classes, {**facts, "true": true, "right": right}


def looks_section(subject: Subject, looks: Sequence[Look], chosen: str) -> list[dict[str, Any]]:
    if not any(own.heats for own in looks):
        return []
    caption = (
        "Rollout: how much of each patch is in what the head reads, followed through the attention of all blocks "
        "(arXiv:2005.00928); full colour: the largest share, at least twice an even one. Grad-CAM: the tokens entering "
        "the last block that speak for a class (arXiv:1610.02391); full colour: the largest value of a picture, for "
        "both classes. Pale: no token stands there any more, its neighbours took it up where tokens were joined."
    )
    text = " ".join([chosen, *(f"There is {line}." for line in subject.left_out)])
    figure = page_figure(look_figure(looks))
    return [{"title": "What the model looks at", "text": text, "figure": figure, "caption": caption}]


# ---- confused classes


def confusions(subject: Subject) -> list[dict[str, Any]]:
    """The pairs of classes that are confused most: pictures of both, and of what was mistaken."""
    if subject.task == "multilabel" or subject.truth is None:
        return []
    counts = np.zeros((len(subject.labels),) * 2, dtype=int)
    np.add.at(counts, (subject.truth, subject.said), 1)
    pairs = [_confusion(subject, pair) for pair in confused_pairs(counts, subject.labels)[:PAIRS]]
    if not pairs:
        return []
    caption = (
        "Below an example: the probability of its class. Below a mistake: of what it was taken for, in brackets of "
        f"what it is. Drawn at random (seed 0), examples from right answers where there are any{_of_some(subject)}."
    )
    figure = page_figure(confusion_figure(pairs))
    return [{"title": "Classes that are confused most", "figure": figure, "caption": caption}]


def _confusion(subject: Subject, pair: dict[str, Any]) -> Confusion:
    true, other = (list(subject.labels).index(pair[key]) for key in ("true", "predicted"))
    rng, p = np.random.default_rng(0), subject.probabilities
    wrong = rng.permutation(np.flatnonzero((subject.truth == true) & (subject.said == other)))[:MISTAKES]

    def examples(k: int) -> list[tuple[np.ndarray, str]]:
        own = rng.permutation(np.setdiff1d(np.flatnonzero(subject.truth == k), wrong))
        own = own[np.argsort(~subject.right[own], kind="stable")][:EXAMPLES]
        return [(subject.shown(i), f"{p[i, k]:.2f}") for i in own]

    groups = {
        pair["true"]: examples(true),
        pair["predicted"]: examples(other),
        "mistaken": [(subject.shown(i), f"{p[i, other]:.2f} ({p[i, true]:.2f})") for i in wrong],
    }
    return Confusion(f"{pair['true']} taken for {pair['predicted']}, {pair['times']} of {pair['of']}", groups)


# ---- attention of the blocks


def measured(subject: Subject, work: float | None = WORK) -> Alike | None:
    """None where it was left out, which is noted."""
    with subject.noting("no CKA of the attention"):
        return alike(subject.model, subject.handle, range(len(subject.rows)), subject.image, work)
    return None


def attention_section(found: Alike | None) -> list[dict[str, Any]]:
    if found is None:
        return []
    means = ", ".join(f"{name} {collapse(matrix):.2f}" for name, matrix in found.matrices.items())
    text = (
        f"CKA between the attention of every two blocks (arXiv:2010.15327), of {found.images} pictures in batches of "
        f"at least {found.batch}. A band along the diagonal: each block attends in its own way, its neighbours' alike. "
        f"Dark squares: many blocks repeat one another. Mean of different blocks: {means}."
    )
    joined = f"Lines: tokens were joined behind blocks {', '.join(map(str, found.joins))}." if found.joins else ""
    figure = cka_figure(found.matrices, found.joins)
    return [{"title": "Whether the blocks attend alike", "text": text, "figure": figure, "caption": joined}]
