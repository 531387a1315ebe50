"""Models that write about pictures, from folders in the hub's layout: likelihoods, training by parts, and answers."""

import csv
import json

import pytest
import torch

from adaptsuite import get_handle
from adaptsuite.errors import UsageError
from adaptsuite.experiment import adapt as adapted
from adaptsuite.experiment import complete
from adaptsuite.recipe import Recipe
from adaptsuite.vl import adapt as adapt_parts
from adaptsuite.vl import load
from adaptsuite.vl.hosts import describe, table
from adaptsuite.vl.pipeline import DOMAIN
from adaptsuite.vl.settings import AnswerSettings
from adaptsuite.vl.synthetic import make_dataset
from adaptsuite.vl.whole import WholeTask, is_whole, load_whole

ANSWERS = ("red", "green", "red circle")
PROJECTOR = {"llava": "multi_modal_projector", "blip2": "language_projection"}
KINDS = tuple(PROJECTOR)


def whole(folder, kind, answers=ANSWERS, **options):
    return load_whole(f"hf:{folder(kind)}", answers, **options)


def asked(model, *questions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(len(questions), 3, *model.front_end.size, generator=generator)
    return {"image": image, **model.tokenizer(questions)}


def test_which_folders_are_whole_models(folder):
    assert is_whole(f"hf:{folder('llava')}") and is_whole(f"file:{folder('blip2')}")
    assert not any(is_whole(name) for name in (f"hf:{folder('clip')}", f"hf:{folder('bert')}", "embedded:vl-tiny"))
    assert not is_whole("hf:nowhere/at-all") and not is_whole(f"pair:embedded:vl-tiny+hf:{folder('bert')}")


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_s_score_is_its_likelihood(kind, folder):
    """As the model's own loss has it: the mean over the tokens of the answer and the end of text."""
    model = whole(folder, kind)
    batch = asked(model, "what color is the top left ?")
    with torch.no_grad():
        found = model(**batch)
        for k, answer in enumerate(ANSWERS):
            words = model.tokenizer.inner.inner(f" {answer}", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*batch["input_ids"][0].tolist(), *words, model.tokenizer.inner.end]])
            labels = ids.clone()
            labels[:, : batch["input_ids"].shape[1]] = -100
            out = model.model(input_ids=ids, pixel_values=model.see(batch["image"]), labels=labels)
            assert float(found[0, k]) == pytest.approx(-float(out.loss) * (len(words) + 1), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_shorter_questions_beside_longer_ones_keep_their_likelihoods(kind, folder):
    model = whole(folder, kind)
    batch = asked(model, "red ?", "what color is the top left green shape ?")
    with torch.no_grad():
        together = model(**batch)
        for i, question in enumerate(("red ?", "what color is the top left green shape ?")):
            alone = model(**{"image": batch["image"][i : i + 1], **model.tokenizer([question])})
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        picked = model(**batch, answer=torch.tensor([2, 0]))
        torch.testing.assert_close(picked, together[[0, 1], [2, 0]])
        assert not torch.allclose(together, model(**{**batch, "image": batch["image"].flip(0)}))


def test_the_loss_is_that_of_the_best_answer_and_ignores_rows_without_one(folder):
    model = whole(folder, "llava")
    batch = asked(model, "red ?", "green ?", "left ?")
    batch["target"] = torch.tensor([[0.3, 1.0, 0.0], [0.0, 0.0, 0.6], [0.0, 0.0, 0.0]])
    with torch.no_grad():
        said = model(**{k: v for k, v in batch.items() if k != "target"})
        loss = WholeTask().loss(model, batch)
    assert float(loss) == pytest.approx(-(float(said[0, 1]) + 0.6 * float(said[1, 2])) / 1.6, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["info", "budget", "doctor"])
def test_the_commands_that_look_take_whole_models(kind, verb, folder, adapt):
    method = () if verb == "info" else ("--method", "lora", "--set", "rank=4")
    found, _ = adapt(verb, "--backbone", f"hf:{folder(kind)}", *method, "--json")
    if verb == "info":
        assert found["sites"]["attn.q"] >= 4 and "tokens of" in found["input"]
    elif verb == "budget":
        assert found["params"]["trained"] == 2 * 2 * 4 * 64
    else:
        rows = {row["component"]: row["trained"] for row in found["components"]}
        assert found["ok"] and sum(rows.values()) == 2 * 2 * 4 * 64
        assert all(not trained for name, trained in rows.items() if "language_model" not in name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_s_components_train_and_answer(kind, folder, tmp_path, adapt):
    """The language model by LoRA, the projector whole and slower, the image tower not at all."""
    data, projector = make_dataset(tmp_path / "data", rows=48), PROJECTOR[kind]
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'domain = "vl"\nbackbone = "hf:{folder(kind)}"\nmethod = "lora"\n[method_settings]\nrank = 4\n'
        '[components]\nvision = "freeze"\nprojector = "full"\nlanguage = "adapt"\n'
        "[component_rates]\nprojector = 0.1\n[plan]\nepochs = 1\nbatch_size = 8\n"
    )
    out, _ = adapt("train", "--recipe", recipe, "--data", data, "--out", tmp_path / "run")
    lines = [line for line in out.splitlines() if line.startswith("part")]
    assert any(projector in line and "rate x 0.1" in line and " 0 frozen" in line for line in lines)
    assert any("vision" in line and " 0 trained" in line for line in lines)
    answerer = load(tmp_path / "run", device="cpu")
    rows = list(csv.DictReader((tmp_path / "run" / "answers.csv").open()))
    images, questions = [data.parent / row["image"] for row in rows], [row["question"] for row in rows]
    assert answerer.answer(images, questions) == [row["said"] for row in rows]
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert saved["preprocessing"]["tokenizer"]["image_tokens"] == {"llava": 16, "blip2": 4}[kind]
    assert any(projector in name for name in answerer.handle.state())


def test_merge_keeps_untouched_towers_bit_equal(folder):
    settled = complete(
        DOMAIN, Recipe("vl", f"hf:{folder('llava')}", method="lora", components={"multi_modal_projector": "full"})
    )
    handle = adapted(DOMAIN, settled, ANSWERS)
    model = handle.model
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        tower = {k: v.clone() for k, v in model.model.model.vision_tower.state_dict().items()}
        batch = asked(model, "red ?", "green ?")
        before = model(**batch)
        get_handle(model).merge()
        torch.testing.assert_close(model(**batch), before, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, tower[k]) for k, v in model.model.model.vision_tower.state_dict().items())


def test_parts_by_python(folder):
    """`adaptsuite.vl.adapt` on the task model: a table before training, then any loop."""
    model = whole(folder, "blip2")
    choice = {"decoder": "adapt", "qformer.encoder": "adapt", "language_projection": "full"}
    batch = asked(model, "red ?", "green ?")
    handle = adapt_parts(model, "lora", choice, {"qformer.encoder": 0.5}, sample=batch, rank=4, alpha=4.0)
    assert any("qformer" in line and "rate x 0.5" in line for line in describe(table(handle)))
    optimizer = torch.optim.AdamW([{"params": g["params"], "lr": 3e-2 * g["lr_scale"]} for g in handle.trainable()])
    batch["target"] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = WholeTask().loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        assert model(**{k: v for k, v in batch.items() if k != "target"}).argmax(1).tolist() == [0, 2]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("front_end.size=64", "takes pictures of (32, 32) pixels"),
        ("head.prefix=linear", "say nothing of a model that writes"),
        ("head.prompt=Question: {}", "<image> and {} are needed"),
        ("components.vison_tower=freeze", "did you mean"),
    ],
)
def test_settings_that_mean_nothing_are_exit_2(setting, message, folder, adapt):
    _, err = adapt("doctor", "--backbone", f"hf:{folder('llava')}", "--method", "lora", "--set", setting, code=2)
    assert message in err and err.strip().count("\n") == 0, err


def test_an_empty_answer_list_or_a_prompt_twice_is_refused(folder):
    with pytest.raises(UsageError, match="each once"):
        whole(folder, "llava", settings=AnswerSettings(prompt="<image><image>{}"))
