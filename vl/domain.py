"""What every task of images and text shares: pictures seen once, sites of the text model, baselines that are blind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite.artifact import read_adapter
from adaptsuite.domain import HEAD, Domain
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.experiment import adapt
from adaptsuite.front_end import FrontEnd
from adaptsuite.host import Handle
from adaptsuite.images import SUFFIXES, inspect, survey
from adaptsuite.manifest import Fold, Manifest, Row
from adaptsuite.memory import Memory
from adaptsuite.method import Method, method_class
from adaptsuite.plan import Plan
from adaptsuite.recipe import Recipe
from adaptsuite.vl.backbones import DecoderPair, EncoderPair, Sighted
from adaptsuite.vl.blind import BLIND, Twin, load_twins, train_twins
from adaptsuite.vl.data import image_free
from adaptsuite.vl.hosts import chosen, describe, factors_of, table
from adaptsuite.vl.named import load_pair
from adaptsuite.vl.pairs import Pairs
from adaptsuite.vl.settings import HeadSettings, PairFrontEnd


class PairedDomain(Domain):
    """A frozen image encoder, a text model with adapters, and pictures with texts; what is asked of them is a task's.

    A task names itself and its settings, and gives `table`, `targets`, `build`, `task`, `evaluate` and `evidence`.
    """

    name = "vl"
    suffixes = SUFFIXES
    sections = {"front_end": PairFrontEnd, "head": HeadSettings}
    train_norms = False
    data_task: str  # the value of data.task
    settings: type  # its part of section `head`
    text_model: str | None = "text_encoder"  # the component whose sites are meant where a role names none; None: all
    pair_kind: type[Sighted] = EncoderPair  # what its backbones are
    blind: tuple[str, ...] = BLIND  # its baselines
    backbones = ("embedded:vl-tiny",)

    def __init__(self):
        self.memory, self.seen = Memory(), Memory()
        self.twins: WeakKeyDictionary[nn.Module, dict[str, Twin]] = WeakKeyDictionary()
        # where the twins of a restored model lie, and its recipe
        self.beside_it: WeakKeyDictionary[nn.Module, tuple[Path, Recipe]] = WeakKeyDictionary()

    # ---- data

    def dataset(self, model: nn.Module, paths: Sequence[Path], targets: np.ndarray | None) -> Pairs:
        """Pictures with empty texts."""
        rows = [Row(p, str(p), (), 0, {"text": "", "answers": "[]"}, {} if p.is_dir() else {"image": p}) for p in paths]
        return Pairs(rows, model, targets, self.memory, self.seen)

    def rows(self, model: nn.Module, manifest: Manifest, targets: np.ndarray | None) -> Pairs:
        return Pairs(manifest.rows, model, targets, self.memory, self.seen)

    def header(self, path: Path) -> Any:
        return None if path.is_dir() else inspect(path)  # a row without an image has the table's folder

    def look(self, path: Path) -> dict[str, Any]:
        return {"remarks": []} if path.is_dir() else survey(path)

    def prepare(self, model: nn.Module, paths: Sequence[Path]) -> list[str]:
        """Every picture is seen once, by a frozen image encoder, before anything is trained."""
        if self.memory.crowded:
            self.memory = Memory()
        if self.seen.crowded:
            self.seen = Memory()
        self.dataset(model, list(dict.fromkeys(paths)), None)
        return []

    def doubts(self, recipe: Recipe, manifest: Manifest, folds: Sequence[Fold]) -> list[str]:
        if number := image_free(manifest):
            return [f"{number} of {len(manifest)} rows have no image: adapters get zeros there, and no prefix"]
        return []

    def shown(self, row: Row) -> str:
        return f"line {row.line}"

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
            settings["sites"] = tuple(site if ":" in site else f"{self.text_model}:{site}" for site in sites)
        return replace(recipe, method_settings=settings, data=replace(recipe.data, task=self.data_task))

    def model(self, recipe: Recipe, classes: Sequence[str]) -> nn.Module:
        pair, trains = self.pair(recipe), trains_image(recipe, self.text_model)
        front, tokens = given_front_end(recipe, pair), recipe.front_end.get("tokens", "cls")
        options = {"settings": self.head(recipe), "tokens": tokens, "front_end": front, "image_trains": trains}
        model = self.build(pair, classes, **options).eval()
        # V of a picture stands for it as long as nothing in the image encoder is trained
        model.seen_key = None if trains else (recipe.backbone, recipe.random_weights and recipe.seeds[0], front, tokens)
        return model

    def pair(self, recipe: Recipe) -> nn.Module:
        """The image encoder and the text model of a recipe."""
        pair = load_pair(
            recipe.backbone,
            causal=self.pair_kind is DecoderPair,
            random_weights=recipe.random_weights,
            seed=recipe.seeds[0],
            size=recipe.front_end.get("size"),
        )
        if not isinstance(pair, self.pair_kind):
            raise UsageError(
                f"{recipe.backbone} is {type(pair).__name__}, no pair of {self.pair_kind.parts}, as "
                f"data.task={self.data_task} needs; there is: {', '.join(self.backbones)}"
            )
        return pair

    def build(self, pair: nn.Module, classes: Sequence[str], **options: Any) -> nn.Module:
        """The task model. options: settings (`head`), tokens, front_end, image_trains.

        It has `see` (pictures to V), `tokenizer`, `data_task`, and the options as attributes.
        """
        raise NotImplementedError

    def head(self, recipe: Recipe) -> Any:
        """This task's part of section `head`. Raises UsageError for what is set of another's."""
        own, whole = {f.name for f in fields(self.settings)}, {f.name: f.default for f in fields(HeadSettings)}
        for name, value in recipe.head.items():
            if name not in own and value != whole[name]:
                raise UsageError(f"head.{name}={value} says nothing where data.task={self.data_task}")
        return self.settings(**{name: value for name, value in recipe.head.items() if name in own})

    def decided(self, recipe: Recipe, model: nn.Module) -> Recipe:
        own = {k: v for k, v in asdict(model.front_end).items() if k in ("size", "fit", "interpolation")}
        settings = getattr(model, "settings", None)
        prefix = {"prefix": settings.prefix} if hasattr(settings, "prefix") else {}
        return replace(recipe, front_end={**recipe.front_end, **own}, head={**recipe.head, **prefix})

    def placed(
        self, recipe: Recipe, model: nn.Module, method: Method
    ) -> tuple[Method, tuple[str, ...], dict[str, float]]:
        """The text model's sites (or all of them) and the head, where `components` does not say otherwise."""
        head = () if recipe.components.get(HEAD) == "freeze" else (HEAD,)
        rates = factors_of(model, recipe.component_rates)
        if not recipe.components:
            return method, head, rates
        unsaid = {} if self.text_model is None else {self.text_model: "adapt"}
        method, whole = chosen(model, method, {**unsaid, **recipe.components})
        return method, tuple(dict.fromkeys((*head, *whole))), rates

    def trains(self, handle: Handle) -> list[str]:
        return describe(table(handle))

    def sample(self, model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
        """Seeded noise, and questions of five words."""
        generator = torch.Generator().manual_seed(0)
        text = model.tokenizer(["what color is it ?"] * batch)
        return {"image": torch.rand(batch, 3, *model.front_end.size, generator=generator), **text}

    def describe(self, model: nn.Module) -> dict[str, Any]:
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
        """Baselines that start and train as the adapter did; OUT/blind keeps them: a run makes them once."""
        start = partial(adapt, self, recipe, labels)
        task = self.task(recipe, labels)
        folder = out / "blind"
        self.twins[handle.model] = train_twins(
            start, handle.model, task, parts, plan, folder, list(labels), say, self.blind
        )
        return ["the blind baselines were not trained anew on validation rows, as the adapter was"] * recipe.refit

    def restored(self, handle: Handle, recipe: Recipe, folder: Path) -> None:
        """Raises AdapterError where words have other numbers now than in training."""
        then, now = (read_adapter(folder).preprocessing or {}).get("tokenizer"), handle.model.tokenizer.record()
        if then and then.get("sha256") != now.get("sha256"):
            raise AdapterError(f"{folder}: trained with another tokenizer than the one of {now['source']} now")
        self.beside_it[handle.model] = folder.resolve().parent / "blind", recipe

    def outputs(
        self,
        model: nn.Module,
        task: Any,
        dataset: Pairs,
        plan: Plan,
        batch_size: int | None = None,
        device: str = "",
    ) -> np.ndarray:
        """(rows, 3 K): scores of the adapter, then those of each blind baseline."""
        found = [super().outputs(model, task, dataset, plan, batch_size, device)]
        for kind, twin in self.beside_of(model).items():
            blind = dataset.blind(kind, twin.blank)
            found.append(super().outputs(twin.handle.model, task, blind, plan, batch_size, device))
        return np.concatenate(found, 1)

    def beside_of(self, model: nn.Module) -> dict[str, Twin]:
        """The baselines of an adapter's model. Raises AdapterError where a saved one has lost them."""
        if model not in self.twins:
            folder, recipe = self.beside_it[model]
            self.twins[model] = load_twins(folder, partial(self.model, recipe), self.sample, self.blind)
        return self.twins[model]

    # ---- evidence

    def calibrated(self, outputs: np.ndarray, kept: dict[str, Any]) -> np.ndarray:
        """As they are: what is said may be words."""
        return outputs

    def score(self, manifest: Manifest, classes: Sequence[str], outputs: np.ndarray) -> dict[str, float]:
        return {name: metric["value"] for name, metric in self.evaluate(manifest, classes, outputs).items()}

    def predictions(self, manifest, classes, outputs, runs=None) -> None:
        """A row may have several right answers, so there is no table of one class against the others."""


def said_front_end(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of size (height, width), fit and interpolation."""
    said = {k: v for k, v in recipe.front_end.items() if k in ("size", "fit", "interpolation") and v is not None}
    if isinstance(said.get("size"), int):
        said["size"] = (said["size"], said["size"])
    return said


def given_front_end(recipe: Recipe, pair: nn.Module) -> FrontEnd:
    """How pictures are seen: as the pair's image encoder wants it, where the recipe says nothing else."""
    front = replace(FrontEnd(**pair.adaptsuite_front_end), **{"fit": "squash", **said_front_end(recipe)})
    patch = pair.patch_size
    if patch and any(side % step for side, step in zip(front.size, patch, strict=True)):
        raise UsageError(f"front_end.size={front.size}: multiples of {patch[0]} x {patch[1]} pixels are needed")
    return front


def trains_image(recipe: Recipe, text_model: str) -> bool:
    """Whether anything in the image encoder is trained."""
    sites = recipe.method_settings.get("sites") or ()
    elsewhere = any(name not in (text_model, HEAD) and what != "freeze" for name, what in recipe.components.items())
    return (
        method_class(recipe.method).in_place
        or elsewhere
        or any(not site.startswith(f"{text_model}:") for site in sites)
    )
