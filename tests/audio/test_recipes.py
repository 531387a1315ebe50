"""The shipped presets: the paper's settings as published, and ours beside them."""

import numpy as np
import pytest
import soundfile
import torch

from adaptsuite import recipe as recipes
from adaptsuite.audio.pipeline import DOMAIN
from adaptsuite.cli import main
from adaptsuite.commands import read_recipe
from adaptsuite.experiment import adapt, complete, restore
from adaptsuite.plan import Plan
from adaptsuite.trainer import _groups


def settled(name, **options):
    return complete(DOMAIN, read_recipe(DOMAIN, {"recipe_name": name, "size": ("front_end.frames", None), **options}))


@pytest.mark.parametrize(
    ("method", "lr"),
    [("bottleneck", 5e-3), ("lora", 5e-3), ("bitfit", 5e-3), ("audio.soft_moa", 5e-3), ("audio.dense_moa", 5e-3)]
    + [("linear", 1e-3), ("full", 5e-5)],
)
def test_the_paper_s_preset_has_the_paper_s_rate_for_each_method(method, lr):
    plan = settled("petl-ast-2024", method=method).plan
    assert plan["lr"] == lr and plan["head_lr"] is None
    assert settled("petl-ast-2024", method=method, lr=0.25).plan["lr"] == 0.25
    ours = settled("fixed", method=method).plan
    assert ours["lr"] == DOMAIN.defaults(method)["plan"]["lr"] and ours["head_lr"] == 1e-3


def test_prompts_and_prefixes_have_the_paper_s_rate_everywhere():
    rates = recipes.load_recipe("petl-ast-2024", "audio", DOMAIN.sections).rates
    assert rates["prompt"] == rates["prefix"] == 1e-2
    assert all(DOMAIN.defaults(name)["plan"]["lr"] == 1e-2 for name in ("prompt", "prefix"))


def test_the_paper_s_preset_is_its_code_and_ours_mends_it():
    paper, ours = settled("petl-ast-2024"), settled("fixed")
    expected = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, "decay_all": True, "warmup": 0.0}
    expected |= {"schedule": "cosine", "batch_size": 32, "epochs": 50, "clip": None}
    assert {key: paper.plan[key] for key in expected} == expected
    assert paper.front_end["reference_compat"] and paper.head["pool"] == "mean" and paper.head["start"] == "random"
    assert (paper.augment["freq_mask"], paper.augment["time_mask"], paper.augment["mixup"]) == (24, 80, 0.0)
    assert not ours.front_end["reference_compat"] and ours.head["start"] == "probe"
    assert not ours.plan["decay_all"] and ours.plan["warmup"] > 0 and ours.augment["mixup"] > 0


def test_weight_decay_reaches_norms_and_biases_in_the_paper_s_preset_only():
    for name, expected in (("petl-ast-2024", {0.1}), ("fixed", {0.0, 0.05})):
        recipe = settled(name, backbone="embedded:audio-tiny")
        groups = _groups(adapt(DOMAIN, recipe, ["a", "b"]), recipes.build(Plan, recipe.plan, "plan"))
        assert {group["weight_decay"] for group in groups} == expected


@pytest.mark.parametrize(("name", "zeroed"), [("petl-ast-2024", True), ("fixed", False)])
def test_both_presets_train(tmp_path, name, zeroed):
    lines = ["path,label,fold"]
    for i in range(12):
        wave = 0.3 * np.sin(2 * np.pi * (300 if i % 2 else 2000) * np.arange(6400) / 16000)
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000)
        lines.append(f"{i}.wav,{'ab'[i % 2]},{i % 3}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    options = ("--data", tmp_path / "manifest.csv", "--test", "fold=2", "--val", "fold=1", "--epochs", "1")
    out = tmp_path / "run"
    line = ["audio", "train", "--recipe", name, "--backbone", "embedded:audio-tiny", *map(str, options)]
    assert main([*line, "--out", str(out)]) == 0
    handle, recipe, *_ = restore(DOMAIN, out / "adapter")
    positions = handle.model.backbone.embeddings.position_embeddings
    assert bool((positions == 0).all()) == zeroed and recipe.front_end["reference_compat"] == zeroed
    assert torch.isfinite(handle.model.head.weight).all()
    again = recipes.load_recipe(out / "recipe.toml", "audio", DOMAIN.sections)
    assert again.rates == recipe.rates and again.plan["lr"] == recipe.plan["lr"]
