"""Pretraining of the language model that writes captions, and what it left in the package."""

import json
from importlib.resources import files
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adaptsuite.backbones import load_backbone
from adaptsuite.vl import pretrain_decoder, synthetic
from adaptsuite.vl.backbones import causal_model
from adaptsuite.vl.captioner import next_token_losses
from adaptsuite.vl.pretrain_decoder import RECORD, Settings, losses, sentences
from adaptsuite.vl.tokenizer import SpellingTokenizer

WEIGHTS = files("adaptsuite.vl") / "weights"
SMALL = Settings(texts=16)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def pair():
    return load_backbone("embedded:vl-tiny-decoder")


def test_half_of_the_sentences_are_captions_and_few_words_are_strange():
    texts = sentences(Settings(texts=400, strange=0.1), rng())
    assert len(texts) == 400 and sum(text.count(",") == 3 for text in texts) > 100
    known, words = set(synthetic.words()), [word for text in texts for word in text.split()]
    assert abs(np.mean([word not in known for word in words]) - 0.1) < 0.02
    assert {word for text in sentences(Settings(strange=0), rng()) for word in text.split()} <= known


def test_every_position_a_caption_can_have_behind_a_prefix_is_trained():
    tokenizer, seen = SpellingTokenizer.of(RECORD["tokenizer"]), []

    def model(input_ids, attention_mask, position_ids):
        seen.append(position_ids)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(tokenizer)))

    found = losses(model, tokenizer, Settings(texts=512), rng())["word"]
    assert set(range(64 + 20)) <= set(seen[0].flatten().tolist()) <= set(range(tokenizer.max_length))
    assert float(found) == pytest.approx(np.log(len(tokenizer)), rel=1e-5)  # of logits that know nothing


def test_a_second_of_pretraining_leaves_weights_that_load(tmp_path):
    from safetensors.torch import load_file

    pretrain_decoder.main(["--minutes", str(1 / 60), "--texts", "8", "--seed", "3", "--out", str(tmp_path)])
    log = json.loads((tmp_path / "vl-tiny-decoder.log.json").read_text())
    assert log["settings"]["seed"] == 3 and log["history"][0]["texts"] == 8
    state = load_file(tmp_path / "vl-tiny-decoder.safetensors")
    assert not causal_model(RECORD).transformer.load_state_dict(state).missing_keys


# ---- the shipped weights


def test_the_shipped_weights_are_small_and_carry_licence_and_record():
    from safetensors import safe_open

    path = WEIGHTS / "vl-tiny-decoder.safetensors"
    assert len(path.read_bytes()) <= 1.5e6
    with safe_open(str(path), "pt") as f:
        metadata, state = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    assert metadata["licence"] == "Apache-2.0"
    assert {key: json.loads(metadata[key]) for key in RECORD} == json.loads(json.dumps(RECORD))
    assert all(v.dtype == torch.float16 and bool(v.isfinite().all()) for v in state.values())


def test_the_language_model_stands_beside_the_image_encoder_of_vl_tiny(pair):
    import transformers

    assert type(pair.language_model) is transformers.GPT2LMHeadModel
    other = load_backbone("embedded:vl-tiny").image_encoder.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in pair.image_encoder.state_dict().items())
    head, words = pair.language_model.lm_head.weight, pair.language_model.transformer.wte.weight
    assert head is words and not pair.training and words.dtype == torch.float32


def test_it_knows_how_a_caption_goes_and_random_weights_do_not(pair):
    text = pair.tokenizer(synthetic.captions(rng(5).integers(0, synthetic.NUM_SCENES, 100), rng(6)))
    ids, mask = text["input_ids"], text["attention_mask"]

    def loss(model):
        with torch.no_grad():
            return float(next_token_losses(model(input_ids=ids, attention_mask=mask).logits, ids, mask).mean())

    least = np.log(synthetic.NUM_SCENES * 24) / (ids.shape[1] - 1)  # what no language model can know
    fresh = load_backbone("embedded:vl-tiny-decoder", random_weights=True)
    assert least - 0.05 < loss(pair.language_model) < least + 0.2 < 3 < loss(fresh.language_model)


def test_the_card_and_the_log_say_how_the_weights_were_made():
    log = json.loads((WEIGHTS / "vl-tiny-decoder.log.json").read_text())
    assert log["history"][-1]["caption"] < log["history"][-1]["caption_least"] + 0.2
    card = (WEIGHTS / "CARD.md").read_text()
    assert "vl-tiny-decoder" in card and f"--minutes {log['settings']['minutes']:g}" in card
