"""A network of one's own as a backbone: KWT-1, whose norms stand behind (tests/audio/kwt1.py is the example)."""

import numpy as np
import pytest
import torch
from kwt1 import Block, Kwt1, builder, load, mfcc_constants

from adaptsuite import applied, experiment
from adaptsuite.audio import backbones
from adaptsuite.audio.pipeline import DOMAIN, AudioModel
from adaptsuite.audio.synthetic import make_dataset
from adaptsuite.errors import UsageError
from adaptsuite.method import methods
from adaptsuite.recipe import DataSettings, Recipe
from adaptsuite.sites import component_info, find_sites, roles
from adaptsuite.testing import TinyHost
from adaptsuite.verify import contract


def host() -> TinyHost:
    """The task model on two blocks of random weights, moved so that attention is not uniform; one clip is short."""
    backbone, heard = builder(dim=32, depth=2, heads=2)(True, 0, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AudioModel(backbone, heard, 3).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1 if p.ndim > 1 else 0.02)
    return TinyHost("kwt-1", model, DOMAIN.sample(model))


@pytest.fixture
def registered():
    """Makes a name known for one test."""
    names = []

    def register(name, build):
        backbones.register(name, build)
        names.append(name)

    yield register
    for name in names:
        del backbones.OWN[name]


# ---- against the published network


@pytest.fixture
def reference(data_dir):
    folder = data_dir("weights_kwt1")
    return folder, {k: torch.from_numpy(v) for k, v in np.load(folder / "reference_io.npz").items()}


def test_features_and_logits_equal_the_published_ones(reference):
    folder, io = reference
    model, heard = load(folder, head=True)
    with torch.no_grad():
        features = heard.features(io["waveform"])
        torch.testing.assert_close(features, io["features"], rtol=1e-5, atol=1e-5 * float(io["features"].abs().max()))
        torch.testing.assert_close(model.logits(features), io["logits"], rtol=0, atol=1e-5)


def test_the_front_end_by_its_formulas_is_that_of_the_checkpoint(reference):
    _, heard = load(reference[0])
    for name, value in mfcc_constants().items():
        torch.testing.assert_close(value, getattr(heard, name), rtol=0, atol=1e-6)


def test_as_a_backbone_it_has_no_head_and_binds_to_its_weights(reference, registered):
    registered("kwt-1", builder(reference[0]))
    model, heard = backbones.load("kwt-1", frames=200)  # as a recipe's settings for longer clips ask
    assert heard.front_end.frames == 98 and heard.num_samples == 16000 and heard.width == 64
    assert sum(p.numel() for p in model.parameters()) == 607308 - 12 * 65
    assert model.adaptsuite_source.name == "kwt-1"
    other, _ = backbones.load("kwt-1", random_weights=True)
    assert other.adaptsuite_source.fingerprint != model.adaptsuite_source.fingerprint


# ---- without data


@pytest.mark.parametrize("method", methods(["audio"]))
def test_method_keeps_its_promises_on_a_post_norm_host(method):
    if method == "convpass":
        with pytest.raises(UsageError, match="with no grid"):
            contract(host, method)
        return
    assert all(contract(host, method).values())


def test_its_parts_are_found():
    model = host().model
    (info,) = component_info(model)
    assert (info.prefix, info.num_blocks, info.num_prefix_tokens) == ("backbone", 2, 1)
    assert info.final_norm is None and info.head == "head"
    assert {r: n for r, n in roles(model).items() if r.startswith("attn")} == dict.fromkeys(
        ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "attn"), 2
    )
    q = find_sites(model, "attn.q")[0]
    assert (q.path, q.rows, q.bias) == ("backbone.blocks.0.attn.qkv", (0, 32), None)


def test_a_block_that_says_norm_first_false_has_its_norms_behind_its_parts(monkeypatch):
    model = host().model
    assert [s.norm for s in find_sites(model, "attn")] == [None, "backbone.blocks.0.norm2"]
    assert [s.norm for s in find_sites(model, "mlp")] == [f"backbone.blocks.{i}.norm1" for i in (0, 1)]
    monkeypatch.setattr(Block, "norm_first", True)
    assert {site.norm for site in find_sites(model, "mlp")} == {f"backbone.blocks.{i}.norm2" for i in (0, 1)}


def test_tokens_of_padding_are_told_apart():
    model = host().model
    length = torch.tensor([16000, 8000, 480, 100])
    mask = model.input.mask(length)
    assert mask.sum(1).tolist() == [1 + 98, 1 + 48, 1 + 1, 1 + 1]
    wave = torch.randn(1, 16000)
    tokens, _ = model.tokens(model.features(wave))
    assert tokens.shape == (1, 99, model.input.width)


def test_a_run_from_clips_to_a_report_and_back(tmp_path, registered):
    """Clips of 1.3 s are read as two windows; the adapter finds its backbone again by the registered name."""
    registered("kwt-tiny", builder(dim=16, depth=2))
    table = make_dataset(tmp_path / "clips", num_classes=2, clips_per_class=8, seconds=1.3)
    recipe = Recipe(
        "audio", "kwt-tiny", random_weights=True, method="bottleneck", data=DataSettings(str(table), test="fold=1"),
        plan={"epochs": 1, "device": "cpu"},
    )  # fmt: skip
    recipe, manifest = experiment.settle(DOMAIN, recipe)
    result = experiment.run(DOMAIN, recipe, manifest, tmp_path / "run")
    assert 0 <= result["metrics"]["test"]["accuracy"]["value"] <= 1
    handle, _, labels, _ = experiment.restore(DOMAIN, result["adapter"])
    assert labels == ["sound0", "sound1"] and isinstance(handle.model.backbone, Kwt1)
    clip = next((tmp_path / "clips" / "sound0").glob("*.wav"))
    assert len(DOMAIN.dataset(handle.model, [clip], None)) == 2
    (said,) = applied.label_files(DOMAIN, result["adapter"], [str(clip)])["predictions"]
    assert said["label"] in labels


def test_settings_of_ast_are_refused(registered):
    registered("kwt-tiny", builder(dim=16, depth=1))
    with pytest.raises(UsageError, match="for AST models, kwt-tiny is one of your own"):
        backbones.load("kwt-tiny", random_weights=True, mean=-4.0)
