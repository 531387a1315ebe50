"""Pretraining's parts, the weights that it left in the package, and the pair as it is loaded from there."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from adaptsuite.backbones import load_backbone
from adaptsuite.errors import UsageError
from adaptsuite.front_end import own_front_end
from adaptsuite.pretraining import keep_average
from adaptsuite.vl import pretrain, synthetic
from adaptsuite.vl.backbones import embedded, encoder_pair
from adaptsuite.vl.pretrain import RECORD, Heads, Settings, hide, new_pair
from adaptsuite.vl.tokenizer import MASK, PAD, SEP, WordTokenizer

SMALL = Settings(scenes=16, loose=4, texts=16)
WEIGHTS = files("adaptsuite.vl") / "weights"


def rng(seed=0):
    return np.random.default_rng(seed)


def test_every_loss_trains_one_encoder_and_leaves_the_other_alone():
    """What makes the pair unimodal: no loss has a gradient in both."""
    pair = new_pair(0).train()
    heads = Heads(pair.tokenizer.num_known)
    for draw, own, other in (
        (pretrain.scene_losses, pair.image_encoder, pair.text_encoder),
        (pretrain.loose_losses, pair.image_encoder, pair.text_encoder),
        (pretrain.order_losses, pair.text_encoder, pair.image_encoder),
        (pretrain.word_losses, pair.text_encoder, pair.image_encoder),
    ):
        for value in draw(pair, heads, SMALL, rng()).values():
            pair.zero_grad(set_to_none=True)
            value.backward(retain_graph=True)
            assert sum(p.grad.abs().sum() for p in own.parameters() if p.grad is not None) > 0
            assert all(p.grad is None for p in other.parameters())


def test_the_two_cross_entropies_are_those_of_a_loop():
    logits, colours, shapes = torch.randn(3, 4, 12), torch.randint(8, (3, 4)), torch.randint(4, (3, 4))
    value = 0.0
    for b in range(3):
        for t in range(4):
            row = logits[b, t].double()
            value -= (
                torch.log_softmax(row[:8], 0)[colours[b, t]] / 12 + torch.log_softmax(row[8:], 0)[shapes[b, t]] / 12
            )
    assert_close(pretrain._two(logits, colours, shapes).double(), value)


def test_each_patch_is_told_the_object_of_its_own_cell():
    assert pretrain.cell_of_patch().tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


def test_only_words_are_hidden_and_only_hidden_words_are_to_be_restored():
    tokenizer = WordTokenizer(synthetic.words(), buckets=50)
    ids = tokenizer(synthetic.captions(np.arange(400), rng()) + ["red"])["input_ids"]
    shown, wanted = hide(ids, tokenizer, Settings(masked=0.2, strange=0.1), rng())
    masked = wanted >= 0
    assert torch.equal(shown[masked], torch.full_like(shown[masked], MASK))
    assert torch.equal(wanted[masked], ids[masked])
    strange = (shown != ids) & ~masked
    assert (shown[strange] >= tokenizer.num_known).all() and (shown[strange] < len(tokenizer)).all()
    word = ids > SEP
    assert not (masked | strange)[~word].any() and PAD in ids
    assert abs(masked[word].float().mean() - 0.2) < 0.02 and abs(strange[word].float().mean() - 0.1) < 0.02


def test_the_mean_leaves_padding_out():
    tokens, mask = torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert_close(pretrain.mean_pool(tokens, mask), torch.stack([tokens[0, :2].mean(0), tokens[1].mean(0)]))


def test_the_average_follows_the_weights():
    average, model = nn.Linear(2, 2), nn.Linear(2, 2)
    wanted = average.weight.detach().lerp(model.weight.detach(), 0.25)
    keep_average(average, model, 0.75)
    assert_close(average.weight.detach(), wanted)


def test_losses_fall_when_trained():
    torch.manual_seed(0)
    pair = new_pair(0).train()
    heads = Heads(pair.tokenizer.num_known)
    optimiser = torch.optim.AdamW([*pair.parameters(), *heads.parameters()], lr=2e-3)
    seen = []
    for step in range(40):
        losses = pretrain.scene_losses(pair, heads, SMALL, rng(step % 2))
        losses |= pretrain.word_losses(pair, heads, SMALL, rng(step % 2))
        total = sum(losses.values())
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        seen.append(total.item())
    assert np.mean(seen[-4:]) < 0.75 * np.mean(seen[:2])


def test_a_second_of_pretraining_leaves_weights_that_load(tmp_path):
    settings = ("--minutes", str(1 / 60), "--scenes", "8", "--loose", "2", "--texts", "8", "--seed", "3")
    pretrain.main([*settings, "--out", str(tmp_path)])
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["settings"]["seed"] == 3 and log["history"][0]["scenes"] == 8
    from safetensors.torch import load_file

    assert not encoder_pair(RECORD).load_state_dict(load_file(tmp_path / "vl-tiny.safetensors")).missing_keys
    assert not list(tmp_path.glob("*.part"))


# the shipped pair ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    return load_backbone("embedded:vl-tiny")


def test_the_shipped_weights_are_small_finite_and_carry_licence_and_record():
    from safetensors import safe_open

    path = WEIGHTS / "vl-tiny.safetensors"
    assert len(path.read_bytes()) <= 6e6
    with safe_open(str(path), "pt") as f:
        metadata, state = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    assert metadata["licence"] == "Apache-2.0"
    assert {key: json.loads(metadata[key]) for key in RECORD} == json.loads(json.dumps(RECORD))
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
    assert all(bool(v.isfinite().all()) for v in state.values())


def test_the_pair_is_two_stock_classes_of_one_width(pair):
    import timm
    import transformers

    assert type(pair.image_encoder) is timm.models.vision_transformer.VisionTransformer
    assert type(pair.text_encoder) is transformers.BertModel
    assert pair.image_encoder.embed_dim == pair.text_encoder.config.hidden_size == pretrain.DIM
    assert not pair.training and next(pair.parameters()).dtype == torch.float32
    assert pair.tokenizer == WordTokenizer.of(RECORD["tokenizer"])
    front = own_front_end(pair)
    assert front.size == (32, 32) and front == own_front_end(pair.image_encoder)


def test_pictures_and_texts_become_tokens_of_one_width(pair):
    picture = torch.from_numpy(synthetic.render(np.arange(2), rng()))
    text = pair.tokenizer(["what color is the top left ?", "Is there an effusion, or is the lung clear?"])
    with torch.no_grad():
        image, words = pair(picture, **text)
        assert image.shape == (2, 17, 64) and words.shape == (2, 13, 64)
        assert_close(pair.encode_image(picture.float() / 255), image)
        wide = torch.zeros(1, 3, 32, 128, dtype=torch.uint8)
        assert pair.encode_image(wide).shape == (1, 65, 64)


def test_padding_behind_changes_no_word(pair):
    with torch.no_grad():
        alone = pair.encode_text(**pair.tokenizer(["is it red ?"]))
        padded = pair.encode_text(**pair.tokenizer(["is it red ?", "is the top left of the picture red ?"]))
    assert_close(padded[0, : alone.shape[1]], alone[0], atol=1e-5, rtol=0)


def test_random_weights_are_others_for_another_seed_and_never_the_shipped_ones(pair):
    first, again, other = (load_backbone("embedded:vl-tiny", random_weights=True, seed=s) for s in (0, 0, 1))
    for name in ("image_encoder.blocks.1.mlp.fc1.weight", "text_encoder.encoder.layer.1.output.dense.weight"):
        own, same, new, shipped = (m.state_dict()[name] for m in (first, again, other, pair))
        assert torch.equal(own, same) and not torch.equal(own, new) and not torch.equal(own, shipped)


def test_an_unknown_embedded_pair_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="vl-tiny"):
        embedded("vl-tinny")


def ridge(x, y, penalty=1e-2):
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    return torch.linalg.solve(x.T @ x + penalty * len(x) * torch.eye(x.shape[1]).double(), x.T @ y.double())


def test_a_linear_head_reads_the_scene_from_cls_of_the_shipped_weights_and_not_of_random_ones(pair):
    scenes = rng(5).integers(0, synthetic.NUM_SCENES, 900)
    picture = torch.from_numpy(synthetic.render(scenes, rng(6)))
    truth = torch.from_numpy(synthetic.objects(scenes)[0][:, 0]).long()  # colour at the top left

    def read(model):
        with torch.no_grad():
            cls = model.encode_image(picture)[:, 0]
        head = ridge(cls[:600], F.one_hot(truth[:600], 8))
        guess = (torch.cat([cls[600:], torch.ones(300, 1)], 1).double() @ head).argmax(1)
        return (guess == truth[600:]).float().mean()

    assert read(pair) > 0.9 and read(load_backbone("embedded:vl-tiny", random_weights=True)) < 0.5


def test_neither_encoder_knows_the_other():
    """A picture lies no nearer to its own caption than to others: what binds them is left to adapters."""
    pair = load_backbone("embedded:vl-tiny")
    scenes = rng(7).permutation(synthetic.NUM_SCENES)[:400]
    text = pair.tokenizer(synthetic.captions(scenes, rng(8)))
    with torch.no_grad():
        image = pair.encode_image(torch.from_numpy(synthetic.render(scenes, rng(9))))[:, 0]
        words = pretrain.mean_pool(pair.encode_text(**text), text["attention_mask"])
    similarity = F.normalize(image - image.mean(0), dim=1) @ F.normalize(words - words.mean(0), dim=1).T
    rank = (similarity > similarity.diagonal()[:, None]).float().mean()
    assert abs(rank - 0.5) < 0.1  # chance


def test_the_card_and_the_log_say_how_the_weights_were_made():
    log = json.loads((WEIGHTS / "log.json").read_text())
    assert log["history"][-1]["colours"] > 0.95 and log["settings"] == {**log["settings"], "seed": 0}
    card = (WEIGHTS / "CARD.md").read_text()
    assert all(word in card for word in ("Apache-2.0", "generated", "seed", "unimodal", "Limits"))
