"""The shipped presets: the paper's settings as published, and ours beside them."""

import pytest
import torch

from adaptsuite import recipe as recipes
from adaptsuite.commands import read_recipe
from adaptsuite.experiment import adapt, complete
from adaptsuite.plan import Plan
from adaptsuite.vision.pipeline import DOMAIN


def settled(name, **options):
    return complete(DOMAIN, read_recipe(DOMAIN, {"recipe_name": name, "size": ("front_end.size", None), **options}))


def test_the_papers_preset_is_its_code():
    recipe = settled("ufgir-ila")
    expected = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "batch_size": 8, "epochs": 50, "clip": 1.0}
    expected |= {"warmup_steps": 500, "min_lr": 1e-5, "schedule": "cosine", "head_lr": None}
    assert {key: recipe.plan[key] for key in expected} == expected
    assert recipe.lr_grid == (0.3, 0.1, 0.03, 0.01, 0.003) and recipe.refit and recipe.seeds == (1, 10, 100)
    front = recipe.front_end
    assert front["fit"] == "squash" and front["ratio"] == 1.34 and front["mean"] == (0.485, 0.456, 0.406)
    assert recipe.augment["crop"] == "random" and recipe.augment["flip"] and recipe.head["pool"] == "cls"
    method = recipe.method_settings
    assert (recipe.method, method["start"], method["residual"]) == ("vision.ila_plus_plus", "xavier", "near_ones")


def test_the_papers_preset_counts_the_cls_token_too():
    import timm

    from adaptsuite import budget
    from adaptsuite.method import resolve

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    recipe = settled("ufgir-ila")
    found = budget(model, resolve(recipe.method, **recipe.method_settings), torch.empty(1, 3, 224, 224, device="meta"))
    assert found.params["trained"] == 354_032 + 768


def test_another_method_beside_a_preset_leaves_its_settings_and_a_rate_leaves_its_grid():
    recipe = settled("ufgir-ila", method="lora", lr=0.02)
    assert recipe.method_settings == {} or "start" not in recipe.method_settings
    assert recipe.lr_grid == () and recipe.plan["lr"] == 0.02


@pytest.mark.parametrize("name", recipes.shipped_recipes("vision"))
def test_every_preset_makes_an_adapter_on_a_small_backbone(name):
    recipe = settled(name, backbone="timm:test_vit", random_weights=True)
    handle = adapt(DOMAIN, recipe, ["a", "b", "c"])
    plan = recipes.build(Plan, recipe.plan, "plan")
    assert handle.parameters_count()["trained"] > 0 and plan.epochs >= 40
    assert recipes.from_dict(recipes.to_dict(recipe), DOMAIN.sections) == recipe
