"""Every shipped recipe: it can be read, plans a training on a backbone at hand, and costs what `adapt recipes` says."""

import importlib
import json
import re
from dataclasses import replace

import pytest

from adaptsuite import experiment
from adaptsuite.cli import COMMANDS, main
from adaptsuite.recipe import load_recipe, shipped_recipes

SHIPPED = [(domain, name) for domain in COMMANDS for name in shipped_recipes(domain)]
NEED_A_TOKENIZER = ("clip-rpo", "llava-vqa", "routing-vqa")  # planned in tests/vl/test_recipes.py
FETALCLIP = {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14}
SMALL = {"image_size": 56, "layers": 24, "width": 64, "patch_size": 14, "head_width": 32}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
UNITS = {"": 1, "k": 1e3, "M": 1e6}


def domain_of(name):
    return importlib.import_module(f"adaptsuite.{name}.pipeline").DOMAIN


def fetalclip(folder, vision, width):
    path = folder / "FetalCLIP.json"
    path.write_text(json.dumps({"embed_dim": width, "vision_cfg": vision, "text_cfg": TEXT}))
    return f"open_clip:{path}"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Generated data of each domain, as few rows as can be split."""
    folder, made = tmp_path_factory.mktemp("data"), {}
    few = {
        "audio": {"num_classes": 2, "clips_per_class": 12, "seconds": 0.5},
        "vision": {"cultivars": 2, "shots": 4, "tests": 2, "size": 48},
        "medical": {"patients": 16, "count": 1, "size": 60},
        "vl": {"rows": 40},
    }
    for domain, settings in few.items():
        made[domain] = importlib.import_module(f"adaptsuite.{domain}.synthetic").make_dataset(
            folder / domain, **settings
        )
    return made


@pytest.mark.parametrize(("domain", "name"), [one for one in SHIPPED if one[1] not in NEED_A_TOKENIZER])
def test_every_recipe_plans_a_training(domain, name, tables, tmp_path, capsys):
    backbone = {"vl": "embedded:vl-tiny", "audio": "embedded:audio-tiny"}.get(domain, "embedded:vision-tiny")
    more = ["--backbone", backbone]
    if name.startswith("fetalclip"):
        more = ["--backbone", fetalclip(tmp_path, SMALL, 32), "--random-weights", "--image-size", "56"]
    command = [domain, "train", "--recipe", name, "--data", str(tables[domain]), *more, "--dry-run"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "trainable" in out and "split " in out


def test_the_list_names_every_recipe_with_its_cost_and_paper(capsys):
    assert main(["recipes", "--json"]) == 0
    said = capsys.readouterr()
    rows = json.loads(said.out)["recipes"]
    assert [(row["domain"], row["name"]) for row in rows] == SHIPPED
    for row in rows:
        assert re.match(r"[\d.]+ [kMG] values", row["cost"]) and f"{row['cost']}; {row['epochs']} epochs" in said.err
        assert row["domain"] in row["method"] or "." not in row["method"]
    papers = {row["name"]: row["paper"] for row in rows if row["paper"]}
    assert len(papers) == 9 and all("arXiv:" in paper for paper in papers.values())


def test_a_run_s_recipe_states_no_cost_but_its_own():
    from adaptsuite.recipe import digest, resolved

    recipe = load_recipe("fixed", "vision", domain_of("vision").sections)
    assert recipe.cost and resolved(recipe, domain_of("vision").sections).cost == ""
    assert digest(recipe) == digest(replace(recipe, cost=""))


def of_size(domain, name):
    """Costly to make: with weights of an architecture of the paper's size."""
    return () if load_recipe(name, domain).backbone.startswith("embedded:") else pytest.mark.slow


@pytest.mark.parametrize(
    ("domain", "name"),
    [pytest.param(*one, marks=of_size(*one)) for one in SHIPPED if one[1] not in ("llava-vqa", "routing-vqa")],
)
def test_a_stated_cost_is_what_is_counted(domain, name, tmp_path):
    recipe = load_recipe(name, domain, domain_of(domain).sections)
    if not recipe.backbone.startswith("embedded:"):
        recipe = replace(recipe, random_weights=True)
    if name.startswith("fetalclip"):
        recipe = replace(recipe, backbone=fetalclip(tmp_path, FETALCLIP, 768))
    if name == "clip-rpo":
        recipe = replace(recipe, backbone="open_clip:ViT-B-16")
    found = experiment.budget_of(domain_of(domain), replace(recipe, plan={**recipe.plan, "batch_size": 2}))
    number, unit, gmacs = re.match(r"([\d.]+) ([kM]?) ?values beside the head, ([\d.]+) GMACs", recipe.cost).groups()
    assert found.params["trained_without_head"] == pytest.approx(float(number) * UNITS[unit], rel=5e-3)
    assert found.macs_per_item == pytest.approx(float(gmacs) * 1e9, rel=5e-3)


def test_the_stated_cost_of_the_largest_follows_from_their_widths():
    routing = 24 * 2 * 128 * (1024 + 1024)  # q and v of RoBERTa-large
    assert load_recipe("routing-vqa", "vl").cost.startswith(f"{routing / 1e6:.3g} M values")
    lora = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # four of attention, three of the SwiGLU
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    said = load_recipe("llava-vqa", "vl").cost
    assert said.startswith(
        f"{(lora + projector) / 1e6:.0f} M values ({lora / 1e6:.0f} M in LoRA, {projector / 1e6:.0f} M "
    )
