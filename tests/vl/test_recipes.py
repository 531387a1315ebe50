"""The shipped recipes: what they say, and that each one plans a training on a backbone that is at hand."""

import pytest
from PIL import Image

from adaptsuite.commands import read_recipe
from adaptsuite.experiment import complete
from adaptsuite.recipe import shipped_recipes
from adaptsuite.vl.pipeline import DOMAIN
from adaptsuite.vl.synthetic import make_dataset


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("vl"), rows=40)


def read(name, **options):
    return read_recipe(DOMAIN, {"recipe_name": name, "size": ("front_end.size", None), **options})


def at_hand(name, folder):
    """A small backbone of the kind that a recipe names, from files alone."""
    if name == "routing-vqa":
        return f"pair:hf:{folder('clip')}+hf:{folder('roberta')}"
    return {"llava-vqa": lambda: f"hf:{folder('llava')}"}.get(name, lambda: "embedded:vl-tiny")()


def test_every_recipe_is_known():
    assert set(shipped_recipes("vl")) == {"clip-rpo", "llava-vqa", "mixphm-vqa", "nlvr", "routing-vqa", "vqa-rad"}


@pytest.mark.parametrize("name", ["llava-vqa", "mixphm-vqa", "nlvr", "routing-vqa", "vqa-rad"])
def test_a_recipe_plans_a_training(name, folder, table, adapt):
    out, _ = adapt("train", "--recipe", name, "--backbone", at_hand(name, folder), "--data", table, "--dry-run")
    assert "trainable" in out and "part " in out and "split " in out


def test_clip_rpo_plans_a_training(folder, tmp_path, adapt):
    for name in ("cat", "dog", "hen", "owl"):
        (tmp_path / name).mkdir()
        for i in range(24):
            Image.new("RGB", (32, 32), (10 * i, 9, 9)).save(tmp_path / name / f"{i}.png")
    out, _ = adapt(
        "train", "--recipe", "clip-rpo", "--backbone", f"hf:{folder('clip')}", "--data", tmp_path, "--dry-run"
    )
    assert "vl.rpo" in out


def test_the_paper_s_routing_is_its_text():
    recipe = complete(DOMAIN, read("routing-vqa"))
    plan = {"lr": 3e-4, "batch_size": 512, "epochs": 20, "warmup": 0.05}
    assert {key: recipe.plan[key] for key in plan} == plan
    method = recipe.method_settings
    assert (method["rank"], method["alpha"], method["routing"]) == (128, 128.0, "mul_expand")
    assert method["sites"] == ("text_encoder:attn.q", "text_encoder:attn.v")


def test_the_paper_s_mixture_is_its_script():
    recipe = complete(DOMAIN, read("mixphm-vqa"))
    plan = {"lr": 5e-3, "batch_size": 16, "patience": 20, "warmup": 0.05, "clip": 5.0}
    assert {key: recipe.plan[key] for key in plan} == plan and recipe.seeds == (13, 21, 42, 87, 100)
    method = {"experts": 4, "n": 4, "rank": 8, "dropout": 0.5, "redundancy": 0.2, "bottleneck": None}
    assert {key: recipe.method_settings[key] for key in method} == method


def test_nlvr_and_vqa_rad_plan_on_their_data(data_dir, adapt):
    for name, folder, answers in (("nlvr", "vl_nlvr", 2), ("vqa-rad", "vl_vqa_rad", 300)):
        found, _ = adapt("train", "--recipe", name, "--data", data_dir(folder), "--dry-run", "--json")
        assert found["splits"][0]["test"] in (990, 534) and found["params"]["trained"] > answers
