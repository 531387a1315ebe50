"""Pretraining's parts, the weights that it left in the package, and the network as it is loaded from there."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from adaptsuite.backbones import load_backbone, record_of
from adaptsuite.errors import UsageError
from adaptsuite.pretraining import keep_average
from adaptsuite.vision import pretrain, synthetic
from adaptsuite.vision.backbones import EMBEDDED_POOL, embedded, vision_transformer
from adaptsuite.vision.pretrain import CHANNELS, CONFIG, DESCRIPTORS, Buffer, Heads, Settings, losses, new_model

EXACT = Settings(bf16=False)


@pytest.fixture(scope="module")
def pairs():
    return pretrain.make_pairs(8, synthetic.Painter(pretrain.DRAWN, np.random.default_rng(0)))


@pytest.fixture(scope="module")
def batch(pairs):
    buffer = Buffer(8)
    buffer.add(pairs)
    return buffer.draw(8, 0.6, np.random.default_rng(0))


def test_two_renders_of_each_latent_with_what_is_to_be_read_from_them(pairs):
    assert pairs["image"].shape == (8, 2, 3, pretrain.DRAWN, pretrain.DRAWN)
    assert pairs["image"].dtype == torch.uint8
    assert pairs["latent"].shape == (8, synthetic.TARGETS)
    assert not torch.equal(pairs["image"][:, 0], pairs["image"][:, 1])


def test_views_come_first_renders_first_with_the_latents_of_both(batch):
    x, latent = batch
    assert x.shape == (16, 3, CONFIG["img_size"], CONFIG["img_size"]) and len(latent) == 8


def test_a_whole_view_is_the_image_but_for_its_light_and_side():
    x = synthetic.sample_images(4, 96)
    y = pretrain.crop(x, 96, 1.0, np.random.default_rng(0)).float().flatten(1)
    for own, shown in zip(x.float(), y, strict=True):
        either = [np.corrcoef(side.flatten(), shown)[0, 1] for side in (own, own.flip(2))]
        assert max(either) > 0.9


def test_every_colour_is_shared_out_whole():
    assert_close(pretrain.colour_table().sum(1), torch.ones(pretrain.LEVELS**3))


@pytest.mark.parametrize("colour", [(250, 20, 20), (20, 250, 20), (20, 20, 250), (128, 128, 128), (0, 0, 0)])
def test_a_plain_picture_has_its_colour_and_neither_edges_nor_detail(colour):
    x = torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)
    c = pretrain.cells(x)
    assert c.shape == (1, CHANNELS, 4, 4)
    histogram = c[0, : pretrain.COLOURS, 0, 0]
    grey = len(set(colour)) == 1
    assert histogram.max() > 0.5 and (int(histogram.argmax()) >= 36) == grey
    edges = [pretrain.COLOURS + 3 + k for k in range(5)]  # of the finest scale
    assert c[0, edges].abs().max() < 0.01
    assert c[0, pretrain.COLOURS : pretrain.COLOURS + 3].abs().max() < 0.01


def test_edges_are_told_apart_by_their_direction():
    across = (torch.arange(32) // 4 % 2 * 255).to(torch.uint8).expand(1, 3, 32, 32)
    first = pretrain.COLOURS + 3
    for x, sign in ((across, 1), (across.transpose(2, 3), -1)):
        strength, second = pretrain.cells(x)[0, first : first + 2].mean((1, 2))
        assert strength > 0.5 and sign * second > 0.9 * strength


def test_binary_patterns_are_those_of_a_loop():
    grey = torch.rand(1, 6, 7)
    code = pretrain._binary_patterns(grey)[0]
    steps = [(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)]
    for y in range(1, 5):
        for x in range(1, 6):
            bits = [int(grey[0, y + dy, x + dx] > grey[0, y, x] + 0.012) for dy, dx in steps]
            assert code[y, x] == sum(bit << k for k, bit in enumerate(bits))
            runs = sum(a != b for a, b in zip(bits, bits[1:] + bits[:1], strict=True))
            expected = sum(bits) if runs <= 2 else 9
            assert pretrain.pattern_table()[code[y, x]].argmax() == expected


@pytest.mark.parametrize("fill", [0, 255, None])
def test_descriptors_are_finite_for_noise_and_for_nothing(fill):
    x = torch.randint(0, 256, (2, 3, 96, 96)) if fill is None else torch.full((2, 3, 96, 96), fill)
    whole, cell = pretrain.describe(x.to(torch.uint8), (6, 6))
    assert whole.shape == (2, DESCRIPTORS) and cell.shape == (2, 36, CHANNELS)
    assert bool(whole.isfinite().all()) and bool(cell.isfinite().all())


def test_each_token_is_to_describe_its_own_cell():
    x = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    grid = new_model(0).patch_embed.grid_size
    y, x0 = 2, 1  # row, column of the only lit cell
    h, w = 96 // grid[0], 96 // grid[1]
    x[:, :, y * h : (y + 1) * h, x0 * w : (x0 + 1) * w] = 255
    white = pretrain.describe(x, grid)[1][0, :, pretrain.COLOURS - 1]
    assert int(white.argmax()) == y * grid[1] + x0


def test_unknown_latents_do_not_count(batch):
    x, latent = batch
    model, heads = new_model(0), Heads(CONFIG["embed_dim"])
    term = losses(model, heads, x, latent, EXACT)["latent"]
    term.backward()
    kinds = latent.isfinite().any(0)
    assert bool(term.isfinite()) and bool((heads.latent.weight.grad[~kinds] == 0).all())


def test_every_loss_reaches_the_model_and_falls_when_trained(batch):
    x, latent = batch
    torch.manual_seed(0)
    model, heads = new_model(0).train(), Heads(CONFIG["embed_dim"])
    heads.measure(x, model.patch_embed.grid_size)
    for value in losses(model, heads, x, latent, EXACT).values():
        model.zero_grad()
        value.backward(retain_graph=True)
        assert model.patch_embed.backbone[0].weight.grad.abs().sum() > 0
    optimiser = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=1e-3)
    before = after = None
    for _ in range(12):
        total = sum(losses(model, heads, x, latent, EXACT).values())
        before, after = before or total.item(), total.item()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    assert after < 0.8 * before


def test_a_buffer_keeps_the_newest_pairs_and_neighbours_together():
    buffer = Buffer(6)
    row = torch.arange(8.0)
    for part in (row[:4], row[4:]):
        buffer.add({"image": torch.zeros(4, 2, 3, 16, 16, dtype=torch.uint8), "latent": part})
    drawn = buffer.draw(6, 1.0, np.random.default_rng(0))[1]
    assert sorted(drawn.tolist()) == [2, 3, 4, 5, 6, 7]
    assert bool((drawn[1::2] - drawn[::2] == 1).all())


def test_the_average_follows_weights_and_batch_norm_statistics():
    average, model = (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(2))
    model[1].running_mean.fill_(1)
    model[1].num_batches_tracked.fill_(7)
    wanted = average[0].weight.detach().lerp(model[0].weight.detach(), 0.25)
    keep_average(average, model, 0.75)
    assert_close(average[0].weight.detach(), wanted)
    assert average[1].running_mean == 0.25 and average[1].num_batches_tracked == 7


def test_two_seconds_of_pretraining_leave_weights_that_load(tmp_path):
    pretrain.main(["--minutes", str(2 / 60), "--pairs", "8", "--seed", "3", "--out", str(tmp_path)])
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["settings"]["seed"] == 3 and log["history"][0]["views"] == 16
    data = (tmp_path / "vision-tiny.safetensors").read_bytes()
    from safetensors.torch import load

    model = vision_transformer(record_of(data)["config"])
    model.load_state_dict(load(data))
    assert not list(tmp_path.glob("*.part"))


WEIGHTS = files("adaptsuite.vision") / "weights"


def test_the_shipped_weights_are_small_finite_and_carry_licence_and_config():
    from safetensors import safe_open

    path = WEIGHTS / "vision-tiny.safetensors"
    assert len(path.read_bytes()) <= 6e6
    with safe_open(str(path), "pt") as f:
        metadata, state = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    assert metadata["licence"] == "Apache-2.0"
    assert json.loads(metadata["config"]) == CONFIG
    assert json.loads(metadata["pretrained_cfg"]) == pretrain.PRETRAINED_CFG
    assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float16}
    assert all(bool(v.isfinite().all()) for v in state.values())
    assert CONFIG["stem"][-1][0] == state["cls_token"].shape[2] == CONFIG["embed_dim"]


def test_the_embedded_model_is_a_stock_class_that_says_how_it_sees():
    import timm

    model = load_backbone("embedded:vision-tiny")
    assert type(model) is timm.models.vision_transformer.VisionTransformer
    assert model.adaptsuite_pool == EMBEDDED_POOL and not model.training
    assert next(model.parameters()).dtype == torch.float32
    seen = timm.data.resolve_model_data_config(model)
    assert seen["input_size"] == (3, 96, 96) and seen["crop_pct"] == 1.0
    assert seen["mean"] == tuple(pretrain.PRETRAINED_CFG["mean"])
    x = torch.rand(1, 3, 96, 96)
    normal = (x - torch.tensor(seen["mean"])[:, None, None]) / torch.tensor(seen["std"])[:, None, None]
    assert_close(pretrain.normalise((x * 255).round().to(torch.uint8)), normal, atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [(96, 96), (144, 144), (60, 120), (228, 228)])
def test_the_embedded_model_takes_any_size_of_whole_patches(size):
    model = load_backbone("embedded:vision-tiny")
    rows, columns = model.patch_embed.dynamic_feat_size(size)
    with torch.no_grad():
        tokens = model.forward_features(torch.randn(1, 3, *size))
    assert tokens.shape == (1, 1 + rows * columns, CONFIG["embed_dim"]) and bool(tokens.isfinite().all())


def test_an_unknown_embedded_model_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="vision-tiny"):
        embedded("vision-tinny")


def test_random_weights_are_others_for_another_seed_and_never_the_shipped_ones():
    shipped, first, again, other = (
        load_backbone("embedded:vision-tiny", random_weights=r, seed=s)
        for r, s in ((False, 0), (True, 0), (True, 0), (True, 1))
    )
    at = "blocks.2.mlp.fc1.weight"
    weight = [m.state_dict()[at] for m in (shipped, first, again, other)]
    assert torch.equal(weight[1], weight[2])
    assert not torch.equal(weight[1], weight[3]) and not torch.equal(weight[1], weight[0])
    assert first.adaptsuite_pool == EMBEDDED_POOL and first.pretrained_cfg == shipped.pretrained_cfg


def test_random_weights_have_batch_norms_that_know_generated_images():
    model = load_backbone("embedded:vision-tiny", random_weights=True)
    assert not model.training
    norms, seen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)], []
    for m in norms:
        assert m.momentum == 0.1
        m.register_forward_hook(lambda _, __, out: seen.append((out.mean((0, 2, 3)), out.std((0, 2, 3)))))
    with torch.no_grad():
        model.forward_features(pretrain.normalise(synthetic.sample_images(24, 96, seed=5)))
    assert len(seen) == len(norms) > 0
    for mean, std in seen:
        assert mean.abs().mean() < 0.5 and 0.5 < std.mean() < 2


def test_the_shipped_weights_find_the_other_render_of_a_latent_more_often_than_random_ones():
    rng = np.random.default_rng(1)
    painter = synthetic.Painter(96, rng)
    views = np.stack([painter.views(synthetic.sample_latent(rng, "thing")) for _ in range(24)])
    x = pretrain.normalise(torch.from_numpy(views).flatten(0, 1).permute(0, 3, 1, 2))

    def hits(model):
        with torch.no_grad():
            out = pretrain.read_out(model.forward_features(x))
        out = ((out - out.mean(0)) / out.std(0)).unflatten(0, (24, 2))
        near = torch.nn.functional.cosine_similarity(out[:, None, 0], out[None, :, 1], dim=2)
        return int((near.argmax(1) == torch.arange(24)).sum())

    shipped, random = (hits(load_backbone("embedded:vision-tiny", random_weights=r)) for r in (False, True))
    assert shipped >= 12 and shipped > random + 4  # chance is 1


def test_the_card_and_the_log_say_how_the_weights_were_made():
    log = json.loads((WEIGHTS / "log.json").read_text())
    assert log["history"][-1]["contrast"] < log["history"][0]["contrast"]
    card = (WEIGHTS / "CARD.md").read_text()
    assert all(word in card for word in ("Apache-2.0", "generated", "Grocery", "BUSI", "COVID-CT", "seed"))
