"""Adapters on medical networks: every method trains on every one, and the published presets are alive."""

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.medical.presets import ATTENTION, EVERYWHERE, FETALCLIP, LINEAR, PRESETS, SITES, preset
from adaptsuite.sites import example_input, find_sites
from adaptsuite.testing import TinyHost
from adaptsuite.verify import contract, verify


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tiny(model, x):
    """A host with every parameter off its start, as those of adaptsuite.testing."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02 if p.ndim < 2 else 0.05)
    return TinyHost(type(model).__name__, model.eval(), (x,), {}, lambda out: out[0] if isinstance(out, tuple) else out)


def fetalclip(**changes):
    """Its configuration made small."""
    from open_clip.model import CLIP

    vision = {**FETALCLIP["vision_cfg"], "image_size": 28, "layers": 2, "width": 64, "head_width": 16, **changes}
    text = {"context_length": 7, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    return tiny(CLIP(24, vision, text).visual, seeded(2, 3, 28, 28))


def unetr():
    from monai.networks.nets import UNETR

    return tiny(UNETR(1, 2, (32, 32), 2, 32, 64, 2, spatial_dims=2), seeded(2, 1, 32, 32))  # one patch: q, k are dead


def mil(**changes):
    from monai.networks.nets import MILModel

    net = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = MILModel(3, "att_trans", False, net, 16, trans_blocks=2, **changes)
    return tiny(model, seeded(2, 5, 3, 16, 16))


def swin():
    from monai.networks.nets import SwinUNETR

    shape = {"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (2, 2, 2, 2), "spatial_dims": 2}
    return tiny(SwinUNETR(1, 2, **shape), seeded(2, 1, 64, 64))


NETS = {"fetalclip": fetalclip, "unetr": unetr, "mil": mil, "swin": swin}


def built(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETS[name]()


METHODS = [
    ("lora", {"sites": EVERYWHERE}),
    ("lora", {"sites": ATTENTION, "rslora": True}),
    ("bottleneck", {}),
    ("bitfit", {}),
    ("film", {}),
    ("full", {}),
]


def cases():
    for name in NETS:
        for number, (method, settings) in enumerate(METHODS):
            quick = number == 0 and name != "swin" or name == "mil" and method != "full"
            label = f"{name}-{method}-{number}"
            yield pytest.param(name, method, settings, id=label, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "method", "settings"), list(cases()))
def test_methods_keep_their_promises_on_medical_networks(name, method, settings):
    contract(lambda: built(name), method, **settings)


def test_everywhere_reaches_convolutions_of_one_pixel_and_patch_merging():
    host = built("swin")
    handle = attach(host.model, "lora", sample=host.args, sites=EVERYWHERE)
    layouts = {s.role: s.layout for s in handle.sites}
    assert layouts["patch_embed"] == "conv"
    decoder = [s for s in handle.sites if s.path == "decoder1.conv_block.conv3.conv"]
    assert [(s.role, s.layout) for s in decoder] == [("pointwise", "conv")]
    assert [s for s in handle.sites if s.path.endswith("downsample.reduction")]


def test_a_convolution_of_one_pixel_is_changed_as_its_formula_says():
    host = built("swin")
    handle = attach(host.model, "lora", sample=host.args, sites=("pointwise",), rank=2, alpha=3.0)
    (site,) = (s for s in handle.sites if s.path == "decoder1.conv_block.conv3.conv")
    branch, conv = handle.adapter.branches[site.key], host.model.get_submodule(site.path)
    nn.init.normal_(branch.up)
    seen = {}
    conv.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        host.forward()
    weight = conv._parameters["weight"][:, :, 0, 0].double()
    up, down = branch.up.double(), branch.down.double()
    expected = torch.zeros_like(seen["y"], dtype=torch.float64)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            change = sum(up[o, r] * down[r, i] for r in range(2)) * 3.0 / 2
            expected[:, o] += (weight[o, i] + change) * seen["x"][:, i].double()
    torch.testing.assert_close(seen["y"].double(), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("lora", {"sites": LINEAR}), ("lora", {"sites": ATTENTION}), ("bottleneck", {}), ("bitfit", {}), ("film", {})],
)
def test_the_fast_path_never_passes_an_adapter_by(method, settings, batch_first, mask):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first), 2).eval()
    x = seeded(4, 4, 16)
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[0, 2:] = mask
    keep = ~padding if batch_first else ~padding.T
    handle = attach(encoder, method, sample=x, **settings)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn_like(p), alpha=0.1)
    given = {"src_key_padding_mask": padding} if mask else {}
    slow = encoder.train()(x, **given)[keep]
    with torch.no_grad():
        fast = encoder.eval()(x, **given)[keep]
        with torch.inference_mode():
            inferred = encoder(x, **given)[keep]
        with handle.disabled():
            plain = encoder(x, **given)[keep]
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inferred, slow, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fast, plain, atol=1e-3)


def test_dropout_of_a_mil_model_is_off_while_its_adapter_trains():
    host = mil(trans_dropout=0.5)
    handle = attach(host.model, "lora", sample=host.args)
    host.model.train()
    assert torch.equal(host.forward(), host.forward()) and handle.bank.training


def test_a_mil_model_has_an_example_and_its_head_is_found():
    host = mil()
    (bag,), _ = example_input(host.model)
    assert bag.ndim == 5 and bag.shape[1] > 1, "attention over one instance has no gradient in its queries"
    assert [s.path for s in find_sites(host.model, "head")] == ["myfc"]


@pytest.mark.parametrize("name", PRESETS)
def test_published_presets_are_alive_here(name):
    found, host = preset(name), fetalclip() if name.startswith("fetal") else None
    if host is None:
        from timm.models.vision_transformer import VisionTransformer

        host = tiny(VisionTransformer(28, 14, embed_dim=32, depth=2, num_heads=2, num_classes=0), seeded(2, 3, 28, 28))
    settings = {**found.settings, **({"dropout": 0.0} if found.method == "lora" else {})}
    handle = attach(host.model, found.method, sample=host.args, **settings)
    seen = verify(handle, host.args, fresh=True)
    assert seen.problems == [] and {r["state"] for r in seen.rows} == {"alive"}


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match="fetalclip-iqa-cls"):
        preset("fetalclip-iqa-clas")


def test_sites_of_presets_are_roles():
    from adaptsuite.sites import ROLES

    assert {site.rstrip("?") for sites in SITES.values() for site in sites} <= set(ROLES)


# ---- doctor


def doctor(*arguments):
    from adaptsuite.cli import app

    result = CliRunner().invoke(app, ["medical", "doctor", "--json", *arguments])
    return result.exit_code, json.loads(result.stdout) if result.stdout.startswith("{") else result


def test_doctor_counts_what_trains_in_every_component(tmp_path):
    config = {**FETALCLIP, "vision_cfg": {**FETALCLIP["vision_cfg"], "image_size": 28, "layers": 2, "width": 64}}
    config["text_cfg"] = {"context_length": 7, "vocab_size": 99, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "fetalclip.json").write_text(json.dumps(config))
    settings = ["--set", "rank=8", "--set", "alpha=16", "--set", "sites=mlp.in,mlp.out,attn.out"]
    backbone = ["--backbone", f"open_clip:{tmp_path / 'fetalclip.json'}", "--random-weights"]
    code, found = doctor(*backbone, "--method", "lora", *settings)
    assert code == 0 and found["ok"]
    formula = 2 * 8 * ((64 + 64) + 2 * (64 + 256))
    alive = sum(r["values"] for r in found["rows"] if r["state"] == "alive" and r["kind"] == "adapter")
    assert found["params"]["trained_without_head"] == alive == formula
    assert {r: v["values"] for r, v in found["sites"].items()} == {
        "mlp.in": 2 * 8 * 320, "mlp.out": 2 * 8 * 320, "attn.out": 2 * 8 * 128
    }  # fmt: skip
    table = {r["component"]: (r["trained"], r["head"]) for r in found["components"]}
    assert table == {"backbone": (formula, 0), "head": (768 * 3 + 3, 768 * 3 + 3)}


@pytest.mark.parametrize(
    ("backbone", "components"),
    [
        (
            "monai:SwinUNETR?in_channels=1&out_channels=2&feature_size=12&depths=1,1,1,1&num_heads=1,1,1,1",
            {"swinViT", "encoder1", "decoder1", "out"},
        ),
        (
            "monai:UNETR?in_channels=1&out_channels=2&img_size=32,32,32&feature_size=4&hidden_size=48&mlp_dim=64&num_heads=4",
            {"vit", "encoder1", "decoder2", "out"},
        ),
    ],
)
def test_doctor_looks_at_networks_of_volumes_by_themselves(backbone, components):
    code, found = doctor("--backbone", backbone, "--random-weights", "--method", "lora", "--set", "sites=attn.qkv")
    assert code == 0 and found["ok"]
    assert components <= {r["component"] for r in found["components"]}
    assert {r["component"] for r in found["components"] if r["trained"]} == components & {"swinViT", "vit"}


def test_doctor_refuses_names_of_modules_with_their_roles():
    backbone = "monai:ViT?in_channels=3&img_size=16,16&patch_size=8,8&spatial_dims=2&hidden_size=48&num_layers=1"
    code, found = doctor("--backbone", backbone, "--random-weights", "--method", "lora", "--set", "sites=out_proj")
    assert code != 0 and "modules named 'out_proj' are attn.out here" in str(found.exception)
