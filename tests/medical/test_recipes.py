"""Shipped presets: the papers' settings, alive on the papers' architecture, and ours on generated patients."""

import json

import pytest

from adaptsuite import experiment
from adaptsuite.commands import read_recipe
from adaptsuite.host import Handle
from adaptsuite.medical import presets
from adaptsuite.medical.pipeline import DOMAIN
from adaptsuite.medical.synthetic import make_dataset
from adaptsuite.recipe import load_recipe, shipped_recipes

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 56, "layers": 24, "width": 64, "patch_size": 14, "head_width": 32},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


def test_there_are_three():
    assert shipped_recipes("medical") == ["fetalclip-iqa", "fetalclip-iqa-seg", "fixed"]


@pytest.mark.parametrize("name", ["fetalclip-iqa", "fetalclip-iqa-seg"])
def test_the_papers_adapter_is_that_of_the_preset(name):
    recipe = load_recipe(name, "medical", DOMAIN.sections)
    preset = presets.preset("fetalclip-iqa-seg" if name.endswith("seg") else "fetalclip-iqa-cls")
    assert recipe.method == preset.method
    assert {
        k: tuple(v) if isinstance(v, list | tuple) else v for k, v in recipe.method_settings.items()
    } == preset.settings


@pytest.mark.parametrize("name", ["fetalclip-iqa", "fetalclip-iqa-seg"])
def test_the_papers_recipe_runs_on_a_small_network_of_its_shape(name, tmp_path):
    config = tmp_path / "fetal.json"
    config.write_text(json.dumps(SMALL))
    table = make_dataset(tmp_path / "data", patients=8, count=1, size=64)
    options = {
        "recipe_name": name,
        "data": str(table),
        "backbone": f"open_clip:{config}",
        "random_weights": True,
        "size": ("front_end.size", None),
        "setting": ["seeds=0", "plan.device=cpu", "evidence.near_duplicates=off"],
    }
    settled, manifest = experiment.settle(DOMAIN, read_recipe(DOMAIN, options))
    handle = experiment.adapt(DOMAIN, settled, manifest.classes)
    assert isinstance(handle, Handle)
    # (4 D + D) r + r (D + 4 D) + r (D + D) a block
    per_block = 8 * (5 * 64 + 5 * 64 + 2 * 64)
    assert handle.parameters_count()["trained_without_head"] == 24 * per_block


def test_the_papers_count_on_its_own_width():
    assert 24 * 8 * (5 * 1024 + 5 * 1024 + 2 * 1024) == 2_359_296


def test_ours_trains_and_keeps_what_validation_chose(tmp_path):
    table = make_dataset(tmp_path / "data", patients=16, count=2, size=60)
    options = {
        "recipe_name": "fixed",
        "data": str(table),
        "epochs": 1,
        "size": ("front_end.size", 60),
        "setting": ["seeds=0", "plan.device=cpu", "evidence.near_duplicates=off"],
    }
    settled, manifest = experiment.settle(DOMAIN, read_recipe(DOMAIN, options))
    result = experiment.run(DOMAIN, settled, manifest, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert record["threshold"]["lesion"]["target"] == "sensitivity>=0.9"
    assert "Finding: lesion" in result["metrics"]["evidence"]
