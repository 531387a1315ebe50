"""What retrieval and few-shot classification share: pictures and texts in one space, of two towers."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import method_class
from adaptsuite.recipe import Recipe
from adaptsuite.vl.domain import PairedDomain, said_front_end
from adaptsuite.vl.two_tower import TwoTower, load_towers


class TowerDomain(PairedDomain):
    """Sites are those of both towers where a role names none. A task gives `build(towers, recipe, classes)`.

    The task model has `towers`, `head`, `see`, `tokenizer` and `front_end`.
    """

    blind = ()
    text_model = None

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
        said, (height, width) = said_front_end(recipe), towers.front_end.size
        if tuple(said.get("size", towers.front_end.size)) != (height, width):
            asked = recipe.front_end["size"]
            raise UsageError(f"front_end.size={asked}: {recipe.backbone} takes {height} x {width} pixels")
        towers.front_end = front = replace(towers.front_end, **said)
        model = self.build(towers, recipe, classes).eval()
        frozen = not trains_pictures(recipe, towers)
        model.seen_key = (recipe.backbone, recipe.random_weights and recipe.seeds[0], front) if frozen else None
        return model

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
