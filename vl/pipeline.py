"""What the commands need of images and text: questions as rows, answers as classes, blind baselines beside them all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite.backbones import load_backbone
from adaptsuite.domain import Domain, Said
from adaptsuite.errors import DataError, UsageError, nearest
from adaptsuite.experiment import adapt
from adaptsuite.front_end import Fit, FrontEnd, Interpolation
from adaptsuite.host import Handle
from adaptsuite.images import SUFFIXES, inspect, survey
from adaptsuite.manifest import Fold, Manifest, Row, write_csv
from adaptsuite.memory import Memory
from adaptsuite.method import method_class
from adaptsuite.plan import Plan
from adaptsuite.recipe import DataSettings, Recipe
from adaptsuite.vl.backbones import EncoderPair
from adaptsuite.vl.blind import BLIND, Twin, load_twins, train_twins
from adaptsuite.vl.data import answer_set, answers_of, image_free, image_of, load_table, soft_targets, text_of
from adaptsuite.vl.paired import AnswerSettings, AnswerTask, PairedModel, Tokens
from adaptsuite.vl.pairs import Pairs
from adaptsuite.vl.scores import mean_interval, normalise_answer

TEXT = "text_encoder"  # the component whose sites are meant where a role names none
KIND = "kind"  # a column of kinds of questions, each of which gets its own accuracy


@dataclass(frozen=True)
class PairFrontEnd:
    """Section `front_end` of a recipe; None means the backbone's own."""

    size: tuple[int, ...] | int | None = None  # pixels, in whole patches: one number, or height,width
    fit: Fit = "squash"  # a crop could cut off what is asked for
    interpolation: Interpolation | None = None
    tokens: Tokens = "cls"  # of the image encoder's output, what adapters and prefix are given

    def __post_init__(self) -> None:
        if isinstance(self.size, tuple) and len(self.size) != 2:
            raise UsageError(f"front_end.size={self.size}: one number, or height,width is expected")


class VlDomain(Domain):
    """Questions about pictures, answered by one of the answers of the training rows."""

    name = "vl"
    suffixes = SUFFIXES
    sections = {"front_end": PairFrontEnd, "head": AnswerSettings}
    train_norms = False
    backbones = ("embedded:vl-tiny",)

    def __init__(self):
        self.memory, self.seen = Memory(), Memory()
        self.twins: WeakKeyDictionary[nn.Module, dict[str, Twin]] = WeakKeyDictionary()
        # where the twins of a restored model lie, and its recipe
        self.beside_it: WeakKeyDictionary[nn.Module, tuple[Path, Recipe]] = WeakKeyDictionary()

    # ---- data

    def table(self, data: DataSettings) -> Manifest:
        """Its classes are the answers of the rows that are not test: an answer seen in test alone cannot be known."""
        manifest = load_table(data.manifest)
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

    def dataset(self, model: PairedModel, paths: Sequence[Path], targets: np.ndarray | None) -> Pairs:
        """Pictures with empty questions."""
        rows = [Row(p, str(p), (), 0, {"text": "", "answers": "[]"}, {} if p.is_dir() else {"image": p}) for p in paths]
        return Pairs(rows, model, targets, self.memory, self.seen)

    def rows(self, model: PairedModel, manifest: Manifest, targets: np.ndarray | None) -> Pairs:
        return Pairs(manifest.rows, model, targets, self.memory, self.seen)

    def header(self, path: Path) -> Any:
        return None if path.is_dir() else inspect(path)  # a row without an image has the table's folder

    def look(self, path: Path) -> dict[str, Any]:
        return {"remarks": []} if path.is_dir() else survey(path)

    def prepare(self, model: PairedModel, paths: Sequence[Path]) -> list[str]:
        """Every picture is seen once, by a frozen image encoder, before anything is trained."""
        if self.memory.crowded:
            self.memory = Memory()
        if self.seen.crowded:
            self.seen = Memory()
        self.dataset(model, list(dict.fromkeys(paths)), None)
        return []

    def doubts(self, recipe: Recipe, manifest: Manifest, folds: Sequence[Fold]) -> list[str]:
        said = []
        if number := image_free(manifest):
            said.append(f"{number} of {len(manifest)} rows have no image: adapters get zeros there, and no prefix")
        known = set(manifest.classes)
        for fold in folds:
            held = [manifest.rows[i] for i in (*fold.val, *fold.test)]
            unknown = sum(known.isdisjoint(map(normalise_answer, answers_of(row))) for row in held)
            if unknown:
                said.append(
                    f"{fold.name}: {unknown} of {len(held)} held-back rows have no answer among the {len(known)} that "
                    "can be given: they count as wrong"
                )
        return said

    def shown(self, row: Row) -> str:
        return f"line {row.line}"

    # ---- the model

    def defaults(self, method: str) -> dict[str, dict[str, Any]]:
        """Sites of the text encoder. Rates are those that trained well on the embedded pair."""
        known = {f.name: f.default for f in fields(method_class(method))}
        settings = {"sites": known["sites"]} if known.get("sites") else {}
        if method in ("lora", "vl.routed_lora"):
            settings |= {"rank": 16, "alpha": 16.0}
        lr = {"full": 3e-4, "linear": 3e-3}.get(method, 3e-3)
        plan = {"lr": lr, "batch_size": 128, "epochs": 20, "weight_decay": 0.0, "warmup": 0.05}
        return {"method_settings": settings, "plan": plan}

    def settle(self, recipe: Recipe, paths: Sequence[Path]) -> Recipe:
        settings = dict(recipe.method_settings)
        if settings.get("sites"):
            sites = (settings["sites"],) if isinstance(settings["sites"], str) else settings["sites"]
            settings["sites"] = tuple(site if ":" in site else f"{TEXT}:{site}" for site in sites)
        return replace(recipe, method_settings=settings, data=replace(recipe.data, task="free"))

    def model(self, recipe: Recipe, classes: Sequence[str]) -> PairedModel:
        pair = load_backbone(recipe.backbone, random_weights=recipe.random_weights, seed=recipe.seeds[0])
        if not isinstance(pair, EncoderPair):
            raise UsageError(
                f"{recipe.backbone} is {type(pair).__name__}, no pair of an image and a text encoder; there is: "
                + ", ".join(self.backbones)
            )
        given = {k: v for k, v in recipe.front_end.items() if k in ("size", "fit", "interpolation") and v is not None}
        if isinstance(given.get("size"), int):
            given["size"] = (given["size"], given["size"])
        front = replace(FrontEnd(**pair.adaptsuite_front_end), **given)
        patch = pair.image_encoder.patch_embed.patch_size
        if any(side % step for side, step in zip(front.size, patch, strict=True)):
            raise UsageError(f"front_end.size={front.size}: multiples of {patch[0]} x {patch[1]} pixels are needed")
        settings = AnswerSettings(**recipe.head)
        tokens = recipe.front_end.get("tokens", "cls")
        model = PairedModel(pair, len(classes), settings, tokens, front, trains_image(recipe)).eval()
        # V of a picture stands for it as long as nothing in the image encoder is trained
        key = (recipe.backbone, recipe.random_weights and recipe.seeds[0], front, tokens)
        model.seen_key = None if model.image_trains else key
        return model

    def decided(self, recipe: Recipe, model: PairedModel) -> Recipe:
        own = {k: v for k, v in asdict(model.front_end).items() if k in ("size", "fit", "interpolation")}
        return replace(recipe, front_end={**recipe.front_end, **own})

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> AnswerTask:
        return AnswerTask(recipe.head.get("loss", "bce"))

    def sample(self, model: PairedModel, batch: int = 2) -> dict[str, Tensor]:
        """Seeded noise, and questions of five words."""
        generator = torch.Generator().manual_seed(0)
        text = model.tokenizer(["what color is it ?"] * batch)
        return {"image": torch.rand(batch, 3, *model.front_end.size, generator=generator), **text}

    def describe(self, model: PairedModel) -> dict[str, Any]:
        height, width = model.front_end.size
        line = (
            f"{width} x {height} pixels ({model.front_end.fit}, {model.front_end.interpolation}) as {model.tokens} "
            f"tokens, prefix {model.settings.prefix}; up to {model.tokenizer.max_length - 2} words"
        )
        return {"input": line, "front_end": asdict(model.front_end), "tokenizer": model.tokenizer.record()}

    # ---- blind baselines

    def beside(
        self,
        recipe: Recipe,
        handle: Handle,
        parts: Mapping[str, Any],
        plan: Plan,
        out: Path,
        labels: Sequence[str],
        say: Callable[[str], None],
    ) -> list[str]:
        """Two baselines that start and train as the adapter did; OUT/blind keeps them: a run makes them once."""
        start = partial(adapt, self, recipe, labels)
        task = self.task(recipe, labels)
        self.twins[handle.model] = train_twins(start, handle.model, task, parts, plan, out / "blind", list(labels), say)
        return ["the blind baselines were not trained anew on validation rows, as the adapter was"] * recipe.refit

    def restored(self, handle: Handle, recipe: Recipe, folder: Path) -> None:
        self.beside_it[handle.model] = folder.resolve().parent / "blind", recipe

    def outputs(
        self,
        model: PairedModel,
        task: AnswerTask,
        dataset: Pairs,
        plan: Plan,
        batch_size: int | None = None,
        device: str = "",
    ) -> np.ndarray:
        """(rows, 3 K): scores of the adapter, then those of each blind baseline."""
        if model not in self.twins:
            folder, recipe = self.beside_it[model]
            self.twins[model] = load_twins(folder, partial(self.model, recipe), self.sample)
        found = [super().outputs(model, task, dataset, plan, batch_size, device)]
        for kind, twin in self.twins[model].items():
            blind = dataset.blind(kind, twin.blank)
            found.append(super().outputs(twin.handle.model, task, blind, plan, batch_size, device))
        return np.concatenate(found, 1)

    # ---- evidence

    def evaluate(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, dict]:
        """Soft accuracy, that of each kind of question, of the blind baselines, and the gain over the better one."""
        got, groups = self._scores(manifest, classes, outputs), [row.group for row in manifest.rows]
        found = {name: mean_interval(rows, groups) for name, rows in got.items()}
        if KIND in manifest.columns:
            kinds = np.array(manifest.column(KIND))
            for kind in sorted(set(kinds) - {""}):
                own = np.flatnonzero(kinds == kind)
                found[f"accuracy:{kind}"] = mean_interval(got["accuracy"][own], [groups[i] for i in own])
        return found

    def score(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, float]:
        return {name: metric["value"] for name, metric in self.evaluate(manifest, classes, outputs).items()}

    def _scores(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, np.ndarray]:
        """(rows,) soft accuracy of what the adapter and each baseline answered; gain: paired by row."""
        targets, rows = self.targets(manifest, classes), np.arange(len(manifest))
        said = outputs.reshape(len(rows), -1, len(classes)).argmax(2)  # (rows, 3)
        found = {name: targets[rows, said[:, i]] for i, name in enumerate(("accuracy", *BLIND))}
        best = max(BLIND, key=lambda name: found[name].mean())
        return {**found, "gain_over_blind": found["accuracy"] - found[best]}

    def predictions(self, manifest, classes, outputs, runs=None) -> None:
        """A row may have several right answers, so there is no table of one class against the others."""

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
        targets = self.targets(said.manifest, classes)
        best = said.outputs.reshape(len(said.manifest), -1, len(classes)).argmax(2)
        return [
            {
                "row": self.shown(row),
                "image": row.rel if image_of(row) else "",
                "question": text_of(row),
                "answers": " | ".join(dict.fromkeys(answers_of(row))),
                "said": classes[own[0]],
                **{name: classes[k] for name, k in zip(BLIND, own[1:], strict=True)},
                "score": float(target[own[0]]),
                **({"run": said.name} if said.name else {}),
            }
            for row, own, target in zip(said.manifest.rows, best, targets, strict=True)
        ]


def trains_image(recipe: Recipe) -> bool:
    """Whether anything in the image encoder is trained."""
    sites = recipe.method_settings.get("sites") or ()
    return method_class(recipe.method).in_place or any(not site.startswith(f"{TEXT}:") for site in sites)


DOMAIN = VlDomain()
