"""What retrieval and few-shot classification share: pictures and texts in one space, of two towers."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.domain import HEAD
from adaptsuite.errors import UsageError
from adaptsuite.method import Method, method_class
from adaptsuite.recipe import Recipe
from adaptsuite.vl.domain import PairedDomain
from adaptsuite.vl.hosts import chosen, factors_of
from adaptsuite.vl.two_tower import TwoTower, load_towers


class TowerDomain(PairedDomain):
    """Sites are those of both towers where a role names none. A task gives `build(towers, recipe, classes)`.

    The task model has `towers`, `head`, `see`, `tokenizer` and `front_end`.
    """

    blind = ()

    def defaults(self, method: str) -> dict[str, dict[str, Any]]:
        """RPO as its paper trains it (section 4), others with rates for pretrained towers."""
        plan = {"batch_size": 32, "epochs": 20, "lr": {"full": 1e-5, "linear": 1e-3}.get(method, 2e-4)}
        if method == "vl.rpo":
            paper = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4, "decay_all": True}
            plan = {**paper, "batch_size": 4, "epochs": 15, "warmup": 1 / 15}
        return {"method_settings": {}, "plan": plan}

    def settle(self, recipe: Recipe, paths: Sequence[Path]) -> Recipe:
        return replace(recipe, data=replace(recipe.data, task=self.data_task))

    def model(self, recipe: Recipe, classes: Sequence[str]) -> nn.Module:
        towers = load_towers(recipe.backbone, random_weights=recipe.random_weights, seed=recipe.seeds[0])
        given = {k: v for k, v in recipe.front_end.items() if k in ("fit", "interpolation") and v is not None}
        towers.front_end = front = replace(towers.front_end, **given)
        size = recipe.front_end.get("size")
        if size is not None and (tuple(size) if isinstance(size, Sequence) else (size, size)) != front.size:
            raise UsageError(f"front_end.size={size}: {recipe.backbone} takes {front.size[0]} x {front.size[1]} pixels")
        model = self.build(towers, recipe, classes).eval()
        frozen = not trains_pictures(recipe, towers)
        model.seen_key = (recipe.backbone, recipe.random_weights and recipe.seeds[0], front) if frozen else None
        return model

    def decided(self, recipe: Recipe, model: nn.Module) -> Recipe:
        own = {k: v for k, v in asdict(model.front_end).items() if k in ("size", "fit", "interpolation")}
        return replace(recipe, front_end={**recipe.front_end, **own})

    def placed(
        self, recipe: Recipe, model: nn.Module, method: Method
    ) -> tuple[Method, tuple[str, ...], dict[str, float]]:
        """Both towers and the head, where `components` names none; else those that it names."""
        head = () if recipe.components.get(HEAD) == "freeze" else (HEAD,)
        rates = factors_of(model, recipe.component_rates)
        if not recipe.components:
            return method, head, rates
        method, whole = chosen(model, method, recipe.components)
        return method, tuple(dict.fromkeys((*head, *whole))), rates

    def build(self, towers: TwoTower, recipe: Recipe, classes: Sequence[str]) -> nn.Module:
        raise NotImplementedError

    def sample(self, model: nn.Module, batch: int = 2) -> dict[str, Tensor]:
        """Seeded noise."""
        generator = torch.Generator().manual_seed(0)
        return {"image": torch.rand(batch, 3, *model.front_end.size, generator=generator)}

    def describe(self, model: nn.Module) -> dict[str, Any]:
        front, length = model.front_end, model.tokenizer.max_length
        line = (
            f"{front.size[1]} x {front.size[0]} pixels ({front.fit}, {front.interpolation}); texts of up to {length} "
            "tokens"
        )
        return {"input": line, "front_end": asdict(front)}

    def restored(self, handle: Any, recipe: Recipe, folder: Path) -> None:
        """Nothing lies beside an adapter, unless the task says so."""


def trains_pictures(recipe: Recipe, towers: TwoTower) -> bool:
    """Whether anything in the image tower is trained: a site of its component or of none, or `components`."""
    sites = recipe.method_settings.get("sites") or ()
    parts = [site.rpartition(":")[0] for site in ((sites,) if isinstance(sites, str) else sites)]
    named = any(towers.image_part in name and what != "freeze" for name, what in recipe.components.items())
    everywhere = not recipe.components and any(towers.image_part in part or not part for part in parts)
    return method_class(recipe.method).in_place or named or everywhere
