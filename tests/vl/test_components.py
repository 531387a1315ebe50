"""Named pairs and their components through the commands: what trains where, how fast, and what an answer needs."""

import json

import pytest
import torch

from adaptsuite import load_adapter
from adaptsuite.cli import main
from adaptsuite.errors import UsageError
from adaptsuite.experiment import adapt as adapted
from adaptsuite.experiment import complete
from adaptsuite.recipe import Recipe, from_dict, to_toml
from adaptsuite.vl import load
from adaptsuite.vl.pipeline import DOMAIN
from adaptsuite.vl.synthetic import make_dataset


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("vl"), rows=40)


def recipe(backbone, **more):
    return complete(DOMAIN, Recipe("vl", backbone, method=more.pop("method", "vl.routed_lora"), **more))


def test_a_named_pair_is_trained_saved_and_answers(folder, table, tmp_path, adapt):
    backbone = f"pair:hf:{folder('vit')}+hf:{folder('roberta')}"
    out, err = adapt(
        "train", "--data", table, "--backbone", backbone, "--method", "vl.routed_lora", "--set", "rank=4",
        "--epochs", "1", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "part      shared" in out and f"{48 * 32:,} trained" in out, "the v_proj between the widths is told"
    assert "part      pair.text_encoder" in out and f"{2 * 2 * 4 * 64:,} trained" in out
    answerer = load(tmp_path / "run", device="cpu")
    assert answerer.model.settings.prefix == "linear" and answerer.model.front_end.size == (32, 32)
    image, question = table.parent / "images" / "000000.png", "what color is the top left ?"
    assert answerer.answer(image, question) in answerer.labels
    again = load(tmp_path / "run", device="cpu")
    assert (again.scores(image, question) == answerer.scores(image, question)).all()
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert saved["preprocessing"]["tokenizer"]["tokens"] == 18


def test_another_tokenizer_than_in_training_is_noticed(folder, table, tmp_path, adapt):
    import shutil

    shutil.copytree(folder("bert"), tmp_path / "bert")
    backbone = f"pair:embedded:vl-tiny+hf:{tmp_path / 'bert'}"
    chosen = ["--data", table, "--backbone", backbone, "--method", "lora"]
    adapt("train", *chosen, "--epochs", "1", "--out", tmp_path / "run")
    path = tmp_path / "bert" / "tokenizer.json"
    said = json.loads(path.read_text())
    words = said["model"]["vocab"]
    words["red"], words["green"] = words["green"], words["red"]
    path.write_text(json.dumps(said))
    _, err = adapt("predict", tmp_path / "run", "--question", "is it red ?", code=4)
    assert "trained with another tokenizer" in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["bert", "distilbert", "t5", "bart"])
def test_the_image_acts_in_every_text_model(text, folder):
    handle = adapted(DOMAIN, recipe(f"pair:embedded:vl-tiny+hf:{folder(text)}", head={"prefix": "none"}), ("a", "b"))
    assert handle.method.context_dim == 64 and len(handle.sites) == 4
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        batch = DOMAIN.sample(handle.model)
        one, other = (handle.model(**{**batch, "image": torch.full((2, 3, 32, 32), v)}) for v in (0.1, 0.9))
    assert not torch.allclose(one, other)


def test_components_say_what_adapts_what_trains_whole_and_what_rests(folder):
    chosen = {"image_encoder": "adapt", "text_encoder": "adapt"}
    rates = {"image_encoder": 0.1}
    settled = recipe("embedded:vl-tiny", method="lora", components=chosen, component_rates=rates)
    handle = adapted(DOMAIN, settled, ("a", "b"))
    assert {site.component for site in handle.sites} == {"pair.image_encoder", "pair.text_encoder"}
    assert handle.model.image_trains and handle.model.seen_key is None
    scales = {handle.place_of(n): g["lr_scale"] for g in handle.trainable() for n in g["names"]}
    assert {s for p, s in scales.items() if p.startswith("pair.image")} == {0.1}
    assert {s for p, s in scales.items() if p.startswith("pair.text")} == {1.0}
    lines = DOMAIN.trains(handle)
    assert any("pair.image_encoder" in line and "rate x 0.1" in line for line in lines)
    full = adapted(DOMAIN, recipe("embedded:vl-tiny", method="lora", components={"image_encoder": "full"}), ("a", "b"))
    whole = sum(p.numel() for p in full.model.pair.image_encoder.parameters())
    assert full.parameters_count()["trained"] > whole and full.model.image_trains
    still = adapted(DOMAIN, recipe("embedded:vl-tiny", method="lora", components={"head": "freeze"}), ("a", "b"))
    assert not any(still.kind(name) == "head" for name in still.trained()) and not still.model.image_trains


def test_what_trained_whole_is_in_the_adapter_s_folder(tmp_path):
    settled = recipe("embedded:vl-tiny", method="lora", components={"image_encoder": "full"})
    handle = adapted(DOMAIN, settled, ("a", "b"))
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(0.01)
    batch = DOMAIN.sample(handle.model)
    other = DOMAIN.model(settled, ("a", "b"))
    load_adapter(other, handle.save(tmp_path / "adapter"), sample=batch)
    with torch.no_grad():
        assert torch.equal(other(**batch), handle.model(**batch))


def test_components_survive_a_recipe_s_file(tmp_path):
    import tomllib

    given = Recipe("vl", components={"image_encoder": "full", "a.b": "freeze"}, component_rates={"image_encoder": 0.1})
    assert from_dict(tomllib.loads(to_toml(given)), DOMAIN.sections) == given


@pytest.mark.parametrize(
    "setting, message",
    [
        ("components.imge_encoder=full", "part 'imge_encoder' is not in the model; did you mean"),
        ("components.image_encoder=tune", "'tune' is none of freeze, adapt and full"),
        ("components.text_encoder=freeze", "no part is adapted: name one of"),
        ("component_rates.image_encoder=0", "it must be above 0"),
        ("component_rates.txt=0.1", "part 'txt' is not in the model"),
    ],
)
def test_components_that_cannot_be_are_exit_2(setting, message, adapt):
    _, err = adapt("doctor", "--backbone", "embedded:vl-tiny", "--method", "lora", "--set", setting, code=2)
    assert message in err and err.count("\n") == 1, err


def test_other_domains_have_no_components(capsys):
    arguments = ["--backbone", "embedded:vision-tiny", "--method", "lora", "--set", "components.head=freeze"]
    assert main(["vision", "doctor", *arguments]) == 2
    assert "components are not chosen in domain vision" in capsys.readouterr().err


def test_full_fine_tuning_cannot_be_put_on_components():
    with pytest.raises(UsageError, match="method 'full' has no sites"):
        adapted(DOMAIN, recipe("embedded:vl-tiny", method="full", components={"image_encoder": "adapt"}), ("a", "b"))


@pytest.mark.parametrize(
    "backbone, code, message",
    [
        ("pair:timm:vit_tiny_patch16_224", 2, "pair:IMAGE+TEXT is expected"),
        ("pair:timm:vit_tinny_patch16_224+embedded:vl-tiny", 2, "did you mean vit_tiny"),
        ("pair:embedded:vl-tiny+hf:./nowhere", 2, "it has no config.json"),
        ("embedded:vision-tiny", 2, "no pair of an image and a text encoder"),
    ],
)
def test_backbones_that_are_no_pair_are_one_line(backbone, code, message, adapt):
    _, err = adapt("doctor", "--backbone", backbone, "--method", "lora", code=code)
    assert message in err and err.count("\n") == 1, err


def test_a_folder_without_a_tokenizer_is_exit_5(folder, tmp_path, adapt):
    import shutil

    shutil.copytree(folder("bert"), tmp_path / "bert", ignore=shutil.ignore_patterns("tokenizer*"))
    backbone = f"pair:embedded:vl-tiny+hf:{tmp_path / 'bert'}"
    _, err = adapt("doctor", "--backbone", backbone, "--method", "lora", code=5)
    assert "its tokenizer cannot be had" in err and err.strip().count("\n") == 0, err
