"""Backbones by name: options, local weights of every layout, towers of pairs, and what a head reads of them."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from adaptsuite.backbones import load_backbone, parse_options
from adaptsuite.errors import DataError, UsageError
from adaptsuite.features import see, width
from adaptsuite.front_end import NotForPictures, load
from adaptsuite.host import attach
from adaptsuite.image_task import HeadSettings, ImageModel
from adaptsuite.verify import verify
from adaptsuite.weights import fit_weights, read_weights

CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 7, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1},
}
SWIN = "monai:SwinUNETR?in_channels=1&out_channels=2&feature_size=12&spatial_dims=2&depths=1,1,1,1&num_heads=1,1,1,1"
VIT = "monai:ViT?in_channels=3&img_size=16,16&patch_size=8,8&spatial_dims=2&hidden_size=32&mlp_dim=64&num_layers=2"
VIT += "&num_heads=2&classification=true"


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "clip.json"
    path.write_text(json.dumps(CLIP))
    return path


def image(side=28, seed=0):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


# ---- names


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("vit_base_patch16_224.dino", ("vit_base_patch16_224.dino", {}, None)),
        ("hf-hub:a/b@main", ("hf-hub:a/b@main", {}, None)),
        ("ViT-B-16/openai", ("ViT-B-16/openai", {}, None)),
        ("/a/c.json@/b/w.pt", ("/a/c.json", {}, "/b/w.pt")),
        (
            "ViT?img_size=96,96,96&act=gelu&qkv_bias=true&rate=0.5@w.safetensors",
            ("ViT", {"img_size": (96, 96, 96), "act": "gelu", "qkv_bias": True, "rate": 0.5}, "w.safetensors"),
        ),
        ("X?depths=(2)&names=a,b", ("X", {"depths": "(2)", "names": "a,b"}, None)),
    ],
)
def test_a_name_holds_options_and_a_file(rest, expected):
    assert parse_options(rest) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("monai:ViT?img_size", {}, "'img_size' is not of the form key=value"),
        ("monai:ViT?nonsense=1", {"random_weights": True}, "nonsense"),
        ("monai:ViT", {"random_weights": True}, "in_channels.*options are given as monai:ViT"),
        ("monai:ViT?in_channels=1", {}, "add @FILE of weights, or --random-weights"),
        ("timm:vit_tiny_patch16_224?no_such=1", {"random_weights": True}, "no_such"),
        ("timm:vit_tiny_patch16_224@/nowhere/w.pt", {}, "/nowhere/w.pt: no such file"),
        ("timm:vit_tiny_patch16_224@w.pt", {"random_weights": True}, "choose one"),
        ("hf:x@w.pt", {}, "are for timm, open_clip and monai"),
        ("embedded:vision-tiny?depth=1", {}, "has no options: depth"),
        ("open_clip:/nowhere/c.json", {"random_weights": True}, "/nowhere/c.json: not readable"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(name, options, message):
    with pytest.raises(UsageError, match=message) as e:
        load_backbone(name, **options)
    assert "\n" not in str(e.value)


# ---- local weights


def test_a_file_is_read_out_of_wrapper_and_prefixes(tmp_path):
    state = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "w.pt")
    torch.save({"model": {f"module._orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.pth", "w.safetensors"):
        assert same(read_weights(tmp_path / name), state)


class Sentinel:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_nothing_in_a_file_is_run(tmp_path, write):
    write({"state_dict": {"a": torch.ones(1)}, "more": Sentinel(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(DataError, match=r"w\.pt: "):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\xff" * 64])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_damaged_file_is_said_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_weights(tmp_path / name)


def test_weights_that_do_not_fit_are_named():
    layer = torch.nn.Linear(2, 3)
    with pytest.raises(
        UsageError, match=r"w.pt does not fit this Linear: bias is missing; other is unknown; weight is"
    ):
        fit_weights(layer, {"weight": torch.ones(1), "other": torch.ones(1)}, "w.pt")


def test_timm_reads_a_local_file_and_keeps_no_copy(tmp_path):
    own = load_backbone("timm:vit_tiny_patch16_224?depth=1", random_weights=True, seed=1)
    torch.save({"state_dict": own.state_dict()}, tmp_path / "w.pt")
    read = load_backbone(f"timm:vit_tiny_patch16_224?depth=1@{tmp_path / 'w.pt'}")
    assert same(read.state_dict(), own.state_dict()) and "state_dict" not in read.pretrained_cfg
    with pytest.raises(UsageError, match="does not fit"):
        load_backbone(f"timm:vit_tiny_patch16_224?depth=2@{tmp_path / 'w.pt'}")


def test_swin_unetr_reads_every_published_layout(tmp_path):
    own = load_backbone(SWIN, random_weights=True, seed=1)
    state = own.state_dict()
    encoder = {k.removeprefix("swinViT."): v for k, v in state.items() if k.startswith("swinViT.")}
    old = {f"module.{k.replace('mlp.linear', 'mlp.fc')}": v for k, v in encoder.items()}
    extra = {"module.norm.weight": torch.ones(2), "module.rotation_head.weight": torch.ones(2)}
    deep = {f"encoder.{k.replace('layers1.0.', 'layers1.0.0.')}": v for k, v in encoder.items()}
    deep = {k.replace("encoder.layers", "encoder.layers"): v for k, v in deep.items()}
    for stage in "234":
        deep = {k.replace(f"encoder.layers{stage}.0.", f"encoder.layers{stage}.0.0."): v for k, v in deep.items()}
    files = {
        "whole.pt": {"state_dict": state},
        "old.pt": {"state_dict": old | extra},
        "deep.pth": {"model": deep | {"encoder.mask_token": torch.ones(1), "decoder.x": torch.ones(1)}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        read = load_backbone(f"{SWIN}@{tmp_path / name}", seed=2)
        found = {k for k, v in read.state_dict().items() if torch.equal(v, state[k])}
        assert {k for k in state if k.startswith("swinViT.")} <= found
        decoder = [c for c, _ in own.named_children() if c not in ("swinViT", "normalize")]
        assert read.adaptsuite_untrained == ([] if name == "whole.pt" else [c for c in decoder if _has_state(own, c)])
    del old["module.patch_embed.proj.bias"]
    torch.save({"state_dict": old}, tmp_path / "less.pt")
    with pytest.raises(UsageError, match="swinViT.patch_embed.proj.bias is missing"):
        load_backbone(f"{SWIN}@{tmp_path / 'less.pt'}")


def _has_state(model, child) -> bool:
    return bool(model.get_submodule(child).state_dict())


def test_old_cross_attention_of_monai_is_left_out(tmp_path):
    own = load_backbone(VIT, random_weights=True)
    torch.save({**own.state_dict(), "blocks.0.cross_attn.to_q.weight": torch.ones(1)}, tmp_path / "w.pt")
    assert same(load_backbone(f"{VIT}@{tmp_path / 'w.pt'}").state_dict(), own.state_dict())


# ---- open_clip


def test_an_image_tower_is_read_from_every_form_of_checkpoint(config, tmp_path):
    own = load_backbone(f"open_clip:{config}", random_weights=True, seed=1)
    state, visual = own.state_dict(), own.visual.state_dict()
    save_file(state, tmp_path / "whole.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "module.pt")
    torch.save({f"visual.{k}": v for k, v in visual.items()}, tmp_path / "visual.pt")
    torch.save(visual, tmp_path / "bare.pth")
    for name in ("whole.safetensors", "module.pt", "visual.pt", "bare.pth"):
        tower, front = load(f"open_clip:{config}@{tmp_path / name}")
        assert type(tower).__name__ == "VisionTransformer" and same(tower.state_dict(), visual)
        assert front.size == (28, 28) and front.fit == "crop" and front.mean[0] == pytest.approx(0.48145466)
        assert tower.adaptsuite_source.name == f"open_clip:{config}@{tmp_path / name}"
    whole = load_backbone(f"open_clip:{config}@{tmp_path / 'visual.pt'}")
    assert "transformer" in whole.adaptsuite_untrained and "visual" not in whole.adaptsuite_untrained


def test_preprocessing_of_a_hub_configuration_is_kept(tmp_path):
    changed = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "longest"}
    (tmp_path / "hub.json").write_text(json.dumps({"model_cfg": CLIP, "preprocess_cfg": changed}))
    _, front = load(f"open_clip:{tmp_path / 'hub.json'}", random_weights=True)
    assert (front.mean, front.interpolation, front.fit) == ((0.1, 0.2, 0.3), "bilinear", "pad")


def test_tokens_and_embedding_are_those_of_open_clip(config):
    tower, _ = load(f"open_clip:{config}", random_weights=True)
    with torch.no_grad():
        seen = see(tower, image(), own=True)
        tower.output_tokens = True
        embedding, patches = tower(image())
        cls = tower.ln_post(tower.transformer(tower._embeds(image())))[:, :1]
    for found, expected in ((seen.own, embedding), (seen.patches, patches), (seen.prefix, cls)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (width(tower), width(tower, "own")) == (32, 12)
    for pool, features in (("own", 12), ("cls+mean", 64), ("own+cls", 44)):
        model = ImageModel(tower, load(f"open_clip:{config}", random_weights=True)[1], 3, HeadSettings(pool=pool))
        assert model.head.in_features == features and model(image()).shape == (2, 3)


def test_positions_of_an_image_tower_are_resampled_for_another_size(config):
    own, _ = load(f"open_clip:{config}", random_weights=True)
    tower, front = load(f"open_clip:{config}", random_weights=True, size=(42, 56))
    assert front.size == (42, 56) and tower.positional_embedding.shape == (3 * 4 + 1, 32)
    assert torch.equal(tower.positional_embedding[0], own.positional_embedding[0])
    assert tower.adaptsuite_source.resized == {"positional_embedding": [13, 32]}
    assert tower.adaptsuite_source.fingerprint == own.adaptsuite_source.fingerprint
    with torch.no_grad():
        assert see(tower, torch.randn(1, 3, 42, 56)).patches.shape == (1, 12, 32)
    with pytest.raises(UsageError, match="patches of 14"):
        load(f"open_clip:{config}", random_weights=True, size=30)


@pytest.mark.parametrize(
    "method", ["lora", "bottleneck", "prompt", "vpt", "prefix", "ssf", "film", "bitfit", "convpass"]
)
def test_methods_live_on_an_image_tower_under_a_head(config, method):
    tower, front = load(f"open_clip:{config}", random_weights=True)
    model = ImageModel(tower, front, 3).eval()
    handle = attach(model, method, sample=image(), head="head")
    assert verify(handle, image(), fresh=True).problems == []


def test_a_tower_that_is_no_transformer_is_refused():
    with pytest.raises(NotForPictures, match="ModifiedResNet is no transformer"):
        load("open_clip:RN50", random_weights=True)


# ---- monai


def test_a_vit_of_monai_gives_tokens_behind_its_norm_and_no_tanh():
    vit, front = load(VIT, random_weights=True)
    assert isinstance(vit.classification_head, torch.nn.Linear) and front.size == (16, 16)
    assert isinstance(
        load_backbone(f"{VIT}&post_activation=Tanh", random_weights=True).classification_head[1], torch.nn.Tanh
    )
    with torch.no_grad():
        seen = see(vit, image(16), own=True)
        logits, hidden = vit(image(16))
        assert torch.equal(vit.classification_head(seen.own), logits) and seen.prefix.shape == (2, 1, 32)
        assert torch.equal(torch.cat([seen.prefix, seen.patches], 1), vit.norm(hidden[-1]))
    model = ImageModel(vit, front, 3).eval()
    assert verify(attach(model, "lora", sample=image(16), head="head"), image(16), fresh=True).problems == []


@pytest.mark.parametrize("name", [SWIN, VIT.replace("in_channels=3", "in_channels=1")])
def test_networks_that_read_no_pictures_are_refused_by_name(name):
    with pytest.raises(NotForPictures, match="reads no pictures into tokens"):
        load(name, random_weights=True)
