"""Pretraining's parts, and the weights that it left in the package."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from adaptsuite.audio import pretrain, synthetic
from adaptsuite.audio.pretrain import CONFIG, FRONT_END, Buffer, Heads, Settings, losses, make_pairs, new_model

EAGER = Settings(bf16=False)


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(8, 64, np.random.default_rng(0), pretrain._fbank())


@pytest.fixture(scope="module")
def batch(pairs):
    buffer = Buffer(8)
    buffer.add(pairs)
    return buffer.draw(8, np.random.default_rng(0))


@pytest.mark.parametrize("frames", [16, 98, 498, 512, 900])
def test_takes_clips_of_any_length(frames):
    tokens = pretrain.forward(new_model(0).eval(), torch.randn(2, frames, 64))
    assert tokens.shape == (2, 2 + 4 * ((frames - 16) // 16 + 1), 128)


def test_at_its_own_length_it_is_the_stock_model():
    model, x = new_model(0).eval(), torch.randn(1, 512, 64)
    assert_close(pretrain.forward(model, x), model(x).last_hidden_state)


def test_a_new_model_tells_its_two_special_tokens_and_places_apart():
    e = new_model(0).embeddings
    assert not torch.equal(e.cls_token, e.distillation_token)
    assert 0.015 < e.position_embeddings.std() < 0.025


def test_two_renders_of_each_latent_with_what_is_to_be_read_from_them(pairs):
    assert pairs["log_mel"].shape == (8, 2, 64, 64)
    assert pairs["latent"].shape == (8, synthetic.TARGETS)
    assert pairs["track"].shape == (8, 2, 4, pretrain.TRACKS)
    assert bool(pairs["log_mel"].isfinite().all())
    assert not torch.equal(pairs["log_mel"][:, 0], pairs["log_mel"][:, 1])


def test_tracks_say_which_phoneme_sounds_in_which_column():
    names = synthetic.NAMES
    word = synthetic.Latent([names.index("s"), names.index("ah")])
    rng = np.random.default_rng(0)
    track = pretrain.tracks(synthetic.speak(word, 400 + 127 * 160, rng), 128)
    s, ah = (track[:, 6 + names.index(n)] for n in ("s", "ah"))
    assert s.max() > 0.3 and ah.max() > 0.3
    assert (s * np.arange(8)).sum() / s.sum() < (ah * np.arange(8)).sum() / ah.sum()


def test_patches_come_in_the_order_of_the_models_tokens():
    embed, x = new_model(0).embeddings.patch_embeddings, torch.randn(2, 70, 64)
    weight = embed.projection.weight.flatten(1)
    assert_close(pretrain.patches(x) @ weight.T + embed.projection.bias, embed(x), atol=1e-4, rtol=1e-4)


def test_masked_patches_are_those_that_it_names_and_nothing_else_changes():
    torch.manual_seed(0)
    x = torch.rand(4, 70, 64) + 1
    y, hidden = pretrain.mask_patches(x, 0.5)
    assert 0.2 < hidden.float().mean() < 0.8
    assert torch.equal(pretrain.patches(y).eq(0).all(2), hidden)
    assert torch.equal(pretrain.patches(y)[~hidden], pretrain.patches(x)[~hidden])


@pytest.mark.parametrize("frames", [16, 98, 498])
def test_descriptors_are_finite_for_noise_and_for_silence(frames):
    for x in (torch.randn(2, frames, 64), torch.full((2, frames, 64), -1.1)):
        assert pretrain.descriptors(x).shape == (2, 412) and bool(pretrain.descriptors(x).isfinite().all())


def test_unknown_targets_do_not_count():
    guess = torch.zeros(2, 4, requires_grad=True)
    target = torch.tensor([[1.0, 1.0, torch.nan, torch.nan], [torch.nan, torch.nan, torch.nan, 0.2]])
    loss = pretrain.regression(guess, target, 2)
    assert_close(loss.item(), 1 + (pretrain.PHONEME_SCALE * 0.2) ** 2)
    loss.backward()
    assert bool((guess.grad[target.isnan()] == 0).all())


def test_a_buffer_keeps_the_newest_pairs_and_neighbours_together():
    buffer = Buffer(6)
    row = torch.arange(8.0)
    buffer.add({"log_mel": torch.zeros(4, 2, 16, 64), "latent": row[:4]})
    buffer.add({"log_mel": torch.zeros(4, 2, 16, 64), "latent": row[4:]})
    drawn = buffer.draw(6, np.random.default_rng(0))["latent"]
    assert sorted(drawn.tolist()) == [2, 3, 4, 5, 6, 7]
    assert bool((drawn[1::2] - drawn[::2] == 1).all())


def test_every_loss_reaches_the_model_and_falls_when_trained(batch):
    torch.manual_seed(0)
    model = new_model(0).train()
    heads = Heads(128, 412)
    for value in losses(model, heads, batch, EAGER).values():
        model.zero_grad()
        value.backward(retain_graph=True)
        assert model.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3)
    before = after = None
    for _ in range(15):
        total = sum(losses(model, heads, batch, EAGER).values())
        before, after = before or total.item(), total.item()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    assert after < 0.8 * before


def test_saved_weights_come_back_into_a_stock_model(tmp_path):
    from safetensors.torch import load_file
    from transformers import ASTConfig, ASTModel

    model = new_model(3)
    pretrain.save(model, [], Settings(), tmp_path)
    back = ASTModel(ASTConfig(**CONFIG))
    back.load_state_dict(load_file(tmp_path / "audio-tiny.safetensors"))
    for name, value in back.state_dict().items():
        assert_close(value, model.state_dict()[name], atol=1e-3, rtol=1e-3)  # half precision
    assert json.loads((tmp_path / "log.json").read_text())["settings"]["minutes"] == Settings().minutes


WEIGHTS = files("adaptsuite.audio") / "weights"


def test_the_shipped_weights_are_small_finite_and_carry_their_config():
    from safetensors import safe_open
    from transformers import ASTConfig, ASTModel

    path = WEIGHTS / "audio-tiny.safetensors"
    assert len(path.read_bytes()) <= 4e6
    with safe_open(str(path), "pt") as f:
        metadata, state = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    assert json.loads(metadata["front_end"]) == FRONT_END
    assert {v.dtype for v in state.values()} == {torch.float16}
    assert all(bool(v.isfinite().all()) for v in state.values())
    ASTModel(ASTConfig(**json.loads(metadata["config"]))).load_state_dict(state)


def test_the_shipped_weights_find_the_other_render_of_a_latent_more_often_than_random_ones():
    from safetensors.torch import load

    pairs = make_pairs(32, 128, np.random.default_rng(1), pretrain._fbank())["log_mel"].float()
    x = pretrain.normalise(pairs[::2], FRONT_END["mean"], FRONT_END["std"])  # without the near variants: 16 latents

    def hits(model):
        with torch.no_grad():
            out = pretrain.read_out(pretrain.forward(model.eval(), x.flatten(0, 1)))
        out = (out - out.mean(0)).unflatten(0, (16, 2))
        near = torch.nn.functional.cosine_similarity(out[:, None, 0], out[None, :, 1], dim=2)
        return int((near.argmax(1) == torch.arange(16)).sum())

    shipped = new_model(0)
    shipped.load_state_dict(load((WEIGHTS / "audio-tiny.safetensors").read_bytes()))
    assert hits(shipped) >= 8  # chance is 1
    assert hits(new_model(0)) <= 5


def test_the_card_and_the_log_say_how_the_weights_were_made():
    log = json.loads((WEIGHTS / "log.json").read_text())
    assert log["history"][-1]["contrast"] < log["history"][0]["contrast"]
    card = (WEIGHTS / "CARD.md").read_text()
    assert all(word in card for word in ("Apache-2.0", "generated", "ESC-10", "seed"))
