"""How backbones see: their own preprocessing, sizes they can take, and what heads read of their features."""

import pytest
import timm
import torch

from adaptsuite.errors import UsageError
from adaptsuite.features import pool_parts, pooled, see, width
from adaptsuite.front_end import FrontEnd, load, own_front_end
from adaptsuite.identity import describe_base
from adaptsuite.image_heads import LayersHead, LinearHead


def random(name, **options):
    return load(name, random_weights=True, **options)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit", "test_resnet", "vit_small_patch16_dinov3"])
def test_preprocessing_is_the_backbones_own(name):
    model = timm.create_model(name, num_classes=0)
    front, config = own_front_end(model), timm.data.resolve_model_data_config(model)
    assert front.size == config["input_size"][1:] and front.mean == config["mean"] and front.std == config["std"]
    assert front.interpolation == config["interpolation"] and front.ratio == pytest.approx(1 / config["crop_pct"])


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_vit3", "timm:swin_tiny_patch4_window7_224"])
def test_another_size_leaves_the_weights_and_their_fingerprint(name):
    size = (224, 160) if "swin" in name else (96, 160)
    plain, _ = random(name)
    resized, front = random(name, size=size)
    assert front.size == size and plain.adaptsuite_source.fingerprint == resized.adaptsuite_source.fingerprint
    changed = resized.adaptsuite_source.resized
    for key, value in plain.state_dict().items():
        if key not in changed:
            assert torch.equal(value, resized.state_dict()[key]), key
    assert ("pos_embed" in changed) == hasattr(plain, "pos_embed")
    assert describe_base(plain, ())["fingerprint"] == describe_base(resized, ())["fingerprint"]
    with torch.no_grad():
        assert see(resized, torch.zeros(1, 3, *size)).patches.shape[2] == width(resized)


def test_features_are_those_that_timm_gives():
    for name, prefix in (("timm:test_vit", 1), ("timm:test_resnet", 0), ("timm:swin_tiny_patch4_window7_224", 0)):
        model, front = random(name)
        image = torch.randn(2, 3, *front.size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            seen, own = see(model, image, own=True), model(image)
        assert seen.prefix.shape[1] == prefix
        torch.testing.assert_close(seen.own, own)
        if not prefix:
            torch.testing.assert_close(pooled(seen, ("mean",)), own, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(pooled(seen, ("cls",)), own)


def test_pools_are_their_formulas():
    model, front = random("timm:test_vit")
    image = torch.randn(2, 3, *front.size)
    with torch.no_grad():
        seen, tokens = see(model, image), model.forward_features(image)
    expected = torch.cat(
        [tokens[:, 0], tokens.mean(1), tokens.var(1, unbiased=False).add(1e-6).sqrt(), tokens.amax(1)], 1
    )
    torch.testing.assert_close(pooled(seen, ("cls", "mean", "std", "max")), expected)
    assert pool_parts("both", model) == ("cls", "mean") and pool_parts("pool", model) == ("mean",)


def test_an_averaged_backbone_is_read_behind_its_norm():
    model = timm.create_model("test_vit", num_classes=0, global_pool="avg").eval()
    image = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        tokens = model.fc_norm(model.forward_features(image))
        torch.testing.assert_close(see(model, image).patches, tokens[:, 1:])


def test_cls_is_refused_where_there_is_none():
    model, _ = random("timm:vit_base_patch16_siglip_224")
    with pytest.raises(UsageError, match="has no CLS token; take mean or own"):
        LinearHead(model, 3, "cls+mean")
    with pytest.raises(UsageError, match="none"):
        LayersHead(model, 3)


def test_the_layers_head_is_its_formula():
    model, front = random("timm:test_vit")
    head = LayersHead(model, 3)
    image = torch.randn(2, 3, *front.size)
    rows = []
    hooks = [b.register_forward_hook(lambda m, a, y: rows.append(y[:, 0])) for b in model.blocks]
    with torch.no_grad():
        found = head(head.read(model, image))
        rows = rows[: len(model.blocks)]
        mixed = sum(w * r for w, r in zip(head.mix.weight[0], rows, strict=True))
        expected = head.dense(head.norm(torch.relu(mixed)))
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected)


def test_settings_of_a_front_end_are_checked():
    assert FrontEnd(size=(224, 448), ratio=1.34).resized == (300, 600)
    with pytest.raises(UsageError, match="std"):
        FrontEnd(std=(0.5, 0.0, 0.5))
