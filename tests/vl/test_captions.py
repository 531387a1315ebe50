"""Captions: the loss that learns to write them, writing under cache and beams, and the commands."""

import csv
import json
import math
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from adaptsuite.cli import main
from adaptsuite.errors import DataError
from adaptsuite.host import attach
from adaptsuite.manifest import Manifest, Row
from adaptsuite.recipe import DataSettings
from adaptsuite.verify import perturb, verify
from adaptsuite.vl import load, synthetic
from adaptsuite.vl.backbones import DecoderPair, causal_model, encoder_pair
from adaptsuite.vl.captioner import CaptionModel, CaptionTask, next_token_losses
from adaptsuite.vl.captions import pictures
from adaptsuite.vl.pipeline import DOMAIN
from adaptsuite.vl.pretrain import RECORD
from adaptsuite.vl.pretrain_decoder import RECORD as DECODER
from adaptsuite.vl.settings import CaptionSettings
from adaptsuite.vl.tokenizer import CLS, PAD, SEP, SpellingTokenizer

SITES = ("language_model:attn.q", "language_model:attn.v")
TEXTS = ["red circle top left", "a dog , blue square"]


def captioner(prefix="plain", tokens="cls", **settings):
    """Random weights, large enough that pictures and words move what is said."""
    torch.manual_seed(0)
    small = {**DECODER, "decoder": {**DECODER["decoder"], "n_layer": 2}}
    image = encoder_pair(RECORD)
    pair = DecoderPair(image.image_encoder, causal_model(small), SpellingTokenizer.of(DECODER["tokenizer"]),
                       image.adaptsuite_front_end)  # fmt: skip
    with torch.no_grad():
        for p in pair.language_model.parameters():
            p.add_(torch.randn_like(p), alpha=0.15)
    pair.requires_grad_(False)
    return CaptionModel(pair, CaptionSettings(prefix=prefix, **settings), tokens).eval()


def batch(model, texts: Sequence[str] = TEXTS):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (len(texts), 3, 32, 32), dtype=torch.uint8)
    return {**model.tokenizer(texts), "image": image}


def adapted(method="vl.routed_lora", prefix="plain", tokens="cls", **settings):
    model = captioner(prefix, tokens, words=8, beams=3)
    handle = attach(model, method, sample=batch(model), head="head", rank=4, sites=SITES, **settings)
    perturb([p for name, p in handle.trained().items() if name.startswith("branches")], 3)
    return model, handle


# ---- the loss


def by_hand(logits, ids, mask):
    """Mean over captions of the mean loss of each number behind the first, in float64."""
    total = 0.0
    for b in range(len(ids)):
        length = int(mask[b].sum())
        for t in range(length - 1):
            row = logits[b, t].double()
            told = float(row[ids[b, t + 1]]) - math.log(sum(math.exp(z) for z in row.tolist()))
            total -= told / (length - 1) / len(ids)
    return total


def test_the_loss_is_that_of_loops():
    model = captioner()
    given = batch(model)
    expected = by_hand(model(**given), given["input_ids"], given["attention_mask"])
    assert float(CaptionTask().loss(model, given)) == pytest.approx(expected, rel=1e-5)


def test_the_position_that_must_emit_the_first_word_is_trained():
    """The reference's caption loss left it out."""
    model = captioner()
    given = batch(model)
    logits = model(**given).requires_grad_()
    next_token_losses(logits, given["input_ids"], given["attention_mask"]).sum().backward()
    first = given["input_ids"][:, 1]
    assert (logits.grad[torch.arange(2), 0, first] < -0.1).all()  # more of the first word is less loss
    assert (given["input_ids"][:, 0] == model.tokenizer.begin).all()


def test_number_0_is_a_word_like_any_other_and_padding_is_none():
    """The reference passed over number 0, whatever it stood for."""
    ids, logits = torch.tensor([[7, 0, 3, 0, 0]]), torch.randn(1, 5, 9)
    losses = next_token_losses(logits, ids, torch.tensor([[1, 1, 1, 1, 0]]))[0]
    expected = [-torch.log_softmax(logits[0, t], 0)[ids[0, t + 1]] for t in range(3)]
    assert_close(losses, torch.stack([*expected, torch.zeros(())]))


def test_words_and_positions_are_embedded_once():
    """The reference ran the embedding stage twice."""
    model = captioner("none")
    text = model.tokenizer(TEXTS[:1])
    said = model.pair.language_model(input_ids=text["input_ids"]).logits
    assert_close(model(**text, features=torch.randn(1, 1, 64)), said)


def test_a_plain_prefix_stands_before_the_words_and_takes_their_places():
    model = captioner(tokens="patches")
    given = batch(model, TEXTS[:1])
    v = model.pair.encode_image(given["image"])[:, 1:]
    words = model.pair.language_model.get_input_embeddings()(given["input_ids"])
    said = model.pair.language_model(inputs_embeds=torch.cat([v, words], 1)).logits
    assert_close(model(**given), said[:, 16:])


def test_without_an_image_the_prefix_takes_no_place():
    model, plain = captioner(), captioner("none")
    given = {**batch(model), "has_image": torch.tensor([True, False])}
    assert_close(model(**given)[1], plain(**given)[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(**given)[0], plain(**given)[0], atol=1e-2)


@pytest.mark.parametrize("prefix", ["plain", "linear", "mapper", "none"])
def test_padding_and_other_rows_change_nothing(prefix):
    model = captioner(prefix, mapper_tokens=4, mapper_width=16, mapper_layers=1)
    both = batch(model)
    length = int(both["attention_mask"][0].sum())
    alone = {k: v[:1] if k == "image" else v[:1, :length] for k, v in both.items()}
    assert_close(model(**both)[:1, :length], model(**alone), atol=1e-4, rtol=1e-4)


def test_next_word_scores_are_those_of_loops():
    model, task = captioner(), CaptionTask()
    given = batch(model)
    logits, ids, mask = model(**given), given["input_ids"], given["attention_mask"]
    hits = total = loss = 0
    for b in range(2):
        for t in range(int(mask[b].sum()) - 1):
            hits, total = hits + int(logits[b, t].argmax() == ids[b, t + 1]), total + 1
            loss -= float(torch.log_softmax(logits[b, t], 0)[ids[b, t + 1]])
    found = task.score(task.predict(model, given).numpy(), ids.numpy())
    assert found == pytest.approx({"log_loss": loss / total, "next_word": hits / total}, rel=1e-4)


# ---- adapters on it


@pytest.mark.parametrize("prefix", ["plain", "linear", "mapper"])
def test_a_fresh_adapter_is_alive_and_changes_nothing(prefix):
    model = captioner(prefix, "all", mapper_tokens=4, mapper_width=16, mapper_layers=1)
    sample = batch(model)
    handle = attach(model, "vl.routed_lora", sample=sample, head="head", rank=4, sites=SITES)
    found = verify(handle, sample, fresh=True)
    assert found.ok and found.identity == 0, found.problems
    assert {handle.kind(name) for name in handle.trained()} <= {"adapter", "head"}  # no norm, no bias


def test_the_image_reaches_routed_adapters_and_not_plain_ones():
    for method, moves in (("vl.routed_lora", True), ("lora", False)):
        model, _ = adapted(method, prefix="none")
        given = batch(model)
        assert torch.equal(model(**given), model(**{**given, "image": given["image"].flip(0)})) is not moves


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_the_plain_ones(reentrant):
    found = []
    for checkpointed in (False, True):
        model, handle = adapted()
        if checkpointed:
            model.pair.language_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        given, task = batch(model), CaptionTask()
        first, second = task.loss(model, given), task.loss(model, {**given, "image": given["image"].flip(0)})
        (first + 2 * second).backward()  # each backward needs the V of its own forward
        found.append({name: p.grad.clone() for name, p in handle.trained().items()})
    for name, gradient in found[0].items():
        assert gradient.abs().sum() > 0
        assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


# ---- writing


@pytest.mark.parametrize("routing, tokens", [("mul_expand", "cls"), ("add", "patches")])
def test_greedy_writing_with_a_cache_is_that_of_whole_forwards(routing, tokens):
    model, _ = adapted(routing=routing, tokens=tokens)
    image = batch(model)["image"]
    said = model.generate(image=image, num_beams=1)
    for b in range(2):
        numbers = [model.tokenizer.begin]
        while len(numbers) <= 8 and numbers[-1] != model.tokenizer.end:
            ids = torch.tensor([numbers])
            numbers.append(int(model(ids, torch.ones_like(ids), image=image[b : b + 1])[0, -1].argmax()))
        assert said[b].tolist() == (numbers[1:] + [model.tokenizer.end] * 8)[:8]
    assert not torch.equal(said[0], said[1])


def test_beams_of_a_batch_are_those_of_each_picture_alone():
    model, _ = adapted()
    image = batch(model, TEXTS * 2)["image"]
    together = model.generate(image=image)
    for b in range(4):
        assert torch.equal(together[b], model.generate(image=image[b : b + 1])[0])


def test_beams_find_what_is_at_least_as_likely_as_greedy():
    model, _ = adapted()
    image = batch(model)["image"]

    def likelihood(said):
        ids = torch.cat([torch.full((2, 1), CLS), said], 1)
        return -next_token_losses(model(ids, torch.ones_like(ids), image=image), ids, torch.ones_like(ids)).sum(1)

    # all of one length: beams are ranked by the mean over words
    greedy, beams = (likelihood(model.generate(image=image, num_beams=n, min_new_tokens=8)) for n in (1, 8))
    assert (beams >= greedy - 1e-4).all()


def test_a_picture_is_seen_once_however_much_is_written():
    model, _ = adapted()
    calls = []
    model.pair.image_encoder.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    model.generate(image=batch(model)["image"], num_beams=3)
    assert len(calls) == 1


# ---- words as numbers


@given(st.text(max_size=60))
def test_any_text_can_be_spelled_and_read_again(text):
    tokenizer = SpellingTokenizer(("red", "circle"), max_length=400)
    numbers = tokenizer.encode(text)
    assert numbers[0] == CLS and numbers[-1] == SEP and all(0 <= n < len(tokenizer) for n in numbers)
    assert tokenizer.encode(tokenizer.decode(numbers)) == numbers and tokenizer.cut(text) == 0


def test_known_words_have_one_number_and_others_their_letters():
    tokenizer = SpellingTokenizer(("red", "circle"))
    assert tokenizer.decode(tokenizer.encode("a red Circle")) == "a red circle"
    assert len(tokenizer.encode("red circle")) == 4 and len(tokenizer.encode("a red circle")) == 6
    assert SpellingTokenizer(("red",), max_length=5).cut("a red dog") == 4


def test_the_mask_says_what_padding_is_and_no_number_does():
    text = SpellingTokenizer(("red",))(["red", "red red"])
    assert text["input_ids"].tolist() == [[CLS, 4, SEP, PAD], [CLS, 4, 4, SEP]]
    assert text["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


# ---- scores


def test_a_picture_counts_once_for_each_time_that_its_rows_are_there(tmp_path):
    """Several captions of a picture are its references; a second seed brings the same rows again."""
    rows = [Row(tmp_path / name, name, (), i, {"text": text}) for i, (name, text) in enumerate(
        [("a.png", "red circle"), ("a.png", "circle , red"), ("b.png", "blue square")]
    )]  # fmt: skip
    manifest = Manifest(tuple(rows), ("caption",), tmp_path, tmp_path / "t.jsonl", "caption")
    twice = manifest.subset([0, 1, 2, 0, 1, 2])
    said = np.array([["s", "t"], ["s", "t"], ["u", "t"], ["x", "t"], ["x", "t"], ["y", "t"]])
    found = pictures(twice, said)
    assert [p.said[0] for p in found] == ["s", "u", "x", "y"]
    assert [len(p.references) for p in found] == [2, 1, 2, 1]


# ---- the commands

BACKBONE = ("--backbone", "embedded:vl-tiny-decoder", "--set", "data.task=caption")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return synthetic.make_captions(tmp_path_factory.mktemp("captions"), rows=40, each=2)


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    """(folder of a short training, its metrics)."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = ["--method", "vl.routed_lora", "--set", "rank=4", "--set", "head.beams=2", "--set", "head.words=24"]
    arguments = ["--data", str(table), *BACKBONE, *settings, "--epochs", "2", "--batch-size", "16"]
    assert main(["vl", "train", *arguments, "--out", str(out)]) == 0
    return out, json.loads((out / "metrics.json").read_text())


def written(run):
    return list(csv.DictReader((run[0] / "captions.csv").open()))


def test_every_score_stands_beside_that_of_a_baseline_without_pictures(run):
    for part in ("test", "val"):
        found = run[1][part]
        assert {"cider_d", "text_only", "gain_over_blind", "bleu4", "text_only:bleu4"} <= set(found)
        gain = found["cider_d"]["value"] - found["text_only"]["value"]
        assert found["gain_over_blind"]["value"] == pytest.approx(gain)
    assert "image_only" not in run[1]["test"]
    assert "image_only has no meaning here" in (run[0] / "report.html").read_text()


def test_the_baseline_writes_one_caption_for_all_pictures(run, table):
    rows = written(run)
    assert len(rows) == 8 and len({row["text_only"] for row in rows}) == 1
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    held = {line["image"]: " | ".join(line["captions"]) for line in lines if line["split"] == "test"}
    assert {row["image"]: row["captions"] for row in rows} == held


def test_a_loaded_adapter_writes_what_the_run_did(run, table, adapt):
    captioner, rows = load(run[0], device="cpu"), written(run)
    images = [table.parent / row["image"] for row in rows]
    assert captioner.caption(images) == [row["said"] for row in rows]
    assert captioner.caption(Image.open(images[0])) == rows[0]["said"]
    found, _ = adapt("predict", run[0], *images[:2], "--json")
    assert [row["caption"] for row in found["predictions"]] == [row["said"] for row in rows[:2]]
    with pytest.raises(DataError, match="no picture"):
        captioner.caption([None])


def test_evaluate_says_what_train_said(run, table, adapt, tmp_path):
    found, _ = adapt("evaluate", run[0], "--data", table, "--json")
    for name in ("cider_d", "text_only", "bleu4"):
        assert found["metrics"]["test"][name]["value"] == pytest.approx(run[1]["test"][name]["value"])
    shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    _, err = adapt("evaluate", tmp_path / "adapter", "--data", table, code=4)
    assert "blind baselines" in err and err.count("\n") == 1


def test_predict_of_a_table_writes_a_caption_for_each_picture(run, table, adapt, tmp_path):
    found, _ = adapt("predict", run[0], "--data", table, "--out", tmp_path / "said.csv", "--json")
    rows = list(csv.DictReader((tmp_path / "said.csv").open()))
    assert [row["image"] for row in rows] == [json.loads(line)["image"] for line in table.read_text().splitlines()]
    assert rows == found["predictions"]
    _, err = adapt("predict", run[0], table.parent / "images" / "000000.png", "--question", "why ?", code=2)
    assert "writes captions" in err


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "gone.png"}, "line 2: 'gone.png' does not exist"),
        ({"image": ""}, "line 2: 'image' is empty"),
        ({"image": "broken.png"}, "broken.png"),
        ({"captions": [""]}, "line 2: 'captions' is empty"),
        ({"captions": []}, "line 2: 'captions' is empty"),
        ({"captions": ["a red circle", "x" * 1_000_000]}, "line 2: 'captions' has 1,000,000 characters"),
    ],
)
def test_bad_rows_are_one_line_and_exit_3(row, message, adapt, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    lines = [{"image": "a.png", "captions": ["a red circle"]}, {"image": "a.png", "captions": ["a cross"], **row}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--method", "lora", "--out", tmp_path / "o", "--val", "none")
    _, err = adapt("train", "--data", tmp_path / "t.jsonl", *BACKBONE, *options, code=3)
    assert message in err and err.count("\n") == 1, err


def test_a_pair_that_cannot_write_is_refused(adapt):
    settings = ("--method", "lora", "--set", "data.task=caption")
    _, err = adapt("doctor", "--backbone", "embedded:vl-tiny", *settings, code=2)
    assert "no pair of an image encoder and a causal language model" in err and err.count("\n") == 1


def test_doctor_finds_every_method_alive(adapt):
    for method in ("vl.routed_lora", "vl.routed_bottleneck", "bitfit"):
        found, _ = adapt("doctor", *BACKBONE, "--method", method, "--json")
        assert found["ok"]


def test_info_says_where_adapters_of_a_writing_pair_can_go(adapt):
    found, _ = adapt("info", *BACKBONE, "--json")
    assert found["sites"]["attn.q"] == 8 and "prefix plain" in found["input"]


# ---- a language model of one's own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 in the hub's layout, whose number 0 is a word and whose tokenizer adds neither begin nor end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    at = tmp_path_factory.mktemp("gpt2")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    texts = synthetic.captions(np.arange(0, 40000, 100), np.random.default_rng(0))
    inner.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    inner.add_special_tokens(["<|endoftext|>"])
    end = inner.token_to_id("<|endoftext|>")
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(at)
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=2, n_positions=96, vocab_size=end + 1, bos_token_id=end, eos_token_id=end
    )
    GPT2LMHeadModel(config).save_pretrained(at)
    return at


def test_a_language_model_of_a_folder_is_trained_saved_and_loaded(folder, table, adapt, tmp_path):
    """Narrower than the image's features: a projection is trained and the prefix is linear."""
    backbone = ("--backbone", f"pair:embedded:vl-tiny+hf:{folder}", "--set", "data.task=caption")
    settings = ("--method", "vl.routed_lora", "--set", "rank=4", "--set", "head.words=10", "--set", "head.beams=2")
    out = tmp_path / "run"
    adapt("train", "--data", table, *backbone, *settings, "--epochs", 1, "--out", out)
    rows = list(csv.DictReader((out / "captions.csv").open()))
    model = load(out, device="cpu")
    assert model.caption([table.parent / row["image"] for row in rows]) == [row["said"] for row in rows]
    tokenizer = model.model.tokenizer
    text = tokenizer(["!!", "red circle"])  # "!" is number 0
    assert text["input_ids"][0, :4].tolist() == [tokenizer.begin, 0, 0, tokenizer.end]
    assert text["attention_mask"].sum(1).tolist() == [4, text["input_ids"].shape[1]]
    assert [tokenizer.decode(row) for row in text["input_ids"]] == ["!!", "red circle"]


def test_tables_are_told_by_their_task(table, tmp_path):
    manifest = DOMAIN.table(DataSettings(manifest=str(table), task="caption"))
    assert manifest.task == "caption" and len(manifest) == len({(r.rel, r.extra["text"]) for r in manifest.rows})
