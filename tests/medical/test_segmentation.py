"""Masks from any backbone: where they are read, the heads on them, and the losses against plain loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adaptsuite.artifact import load_adapter
from adaptsuite.errors import UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.host import attach
from adaptsuite.medical.segmentation import (
    MaskHead,
    SegmentationModel,
    Taps,
    dice_ce_loss,
    dice_loss,
    planes,
)
from adaptsuite.verify import verify

SIZE = (32, 48)  # no square: a transposed grid shows


def timm_vit(**changes):
    from timm.models.vision_transformer import VisionTransformer

    settings = {"patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 0, "reg_tokens": 2}
    return VisionTransformer(img_size=SIZE, **{**settings, **changes}).eval()


def clip_tower():
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(SIZE, 8, width=16, layers=4, heads=2, mlp_ratio=2.0, output_dim=8).eval()


def monai_vit():
    from monai.networks.nets import ViT

    return ViT(3, SIZE, 8, hidden_size=16, mlp_dim=32, num_layers=4, num_heads=2, spatial_dims=2).eval()


def swin():
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, embed_dim=8,
                             depths=(1, 1, 2, 1), num_heads=(1, 1, 1, 1), num_classes=0).eval()  # fmt: skip


def convnet():
    import timm

    return timm.create_model("resnet10t", num_classes=0).eval()


HOSTS = {"timm": timm_vit, "open_clip": clip_tower, "monai": monai_vit, "swin": swin}


def model(backbone, kind="unet", num_classes=2, **settings):
    torch.manual_seed(0)
    return SegmentationModel(
        backbone, FrontEnd(size=SIZE), num_classes, MaskHead(kind=kind, width=8, **settings)
    ).eval()


def still(backbone):
    """Blocks that hand on what they get, and no positions."""
    with torch.no_grad():
        for name, p in backbone.named_parameters():
            if any(part in name for part in ("attn", "mlp", "cls_token", "class_embedding", "position", "pos_embed")):
                p.zero_()
    return backbone


def pictures(count=2):
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


# ---- what is read, and where


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("kind", ["linear", "unet"])
def test_every_adapter_tensor_below_a_mask_gets_a_gradient(host, kind):
    """FetalCLIP-IQA and DINOv2ForRadiology run the encoder of their segmentation under no_grad: adapters are dead."""
    own = model(HOSTS[host](), kind)
    handle = attach(own, "lora", sample=(pictures(),), head="head")
    found = verify(handle, (pictures(),), fresh=True)
    assert found.ok, found.problems
    assert all(row["state"] == "alive" for row in found.rows)
    assert own(pictures()).shape == (2, 2, *SIZE)


@pytest.mark.parametrize("build", [timm_vit, clip_tower, monai_vit])
def test_a_map_has_each_patch_at_its_place_in_the_picture(build):
    """Blocks that add nothing hand on the embedding; on a grid of 4 x 6 a transposed map would differ."""
    backbone = still(build())
    caught = []
    conv = next(m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d))
    conv.register_forward_hook(lambda m, args, out: caught.append(out))
    taps = Taps(backbone)
    with torch.no_grad():
        maps = taps(backbone, pictures())
    assert taps.after == [1, 2, 3, 4] and len(maps) == 4
    for own in maps:
        assert own.shape == (2, 16, 4, 6)
        expected = caught[0] if build is not clip_tower else _normed(backbone.ln_pre, caught[0])
        torch.testing.assert_close(own, expected)


def _normed(norm, x):
    return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_maps_lie_behind_the_blocks_that_are_named():
    backbone, seen = timm_vit(), {}
    for i, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: seen.__setitem__(i, out))
    maps = Taps(backbone, (1, 4))(backbone, pictures())
    for own, block in zip(maps, (0, 3), strict=True):
        torch.testing.assert_close(own, seen[block][:, 3:].transpose(1, 2).unflatten(2, (4, 6)), rtol=0, atol=0)
    assert Taps(timm_vit(depth=24)).after == [6, 12, 18, 24] and Taps(timm_vit(depth=2)).after == [1, 2]


@pytest.mark.parametrize("after", [(0, 2), (2, 2), (3, 1), (1, 5)])
def test_blocks_that_are_not_there_are_refused(after):
    with pytest.raises(UsageError, match="rising numbers of 1 to 4 blocks"):
        Taps(timm_vit(), after)


def test_hooks_are_gone_after_a_forward_also_after_a_failed_one():
    own = model(timm_vit())
    own(pictures())
    with pytest.raises(Exception):  # noqa: B017 - whatever the backbone says of a wrong number of channels
        own(torch.rand(1, 5, *SIZE))
    assert not any(m._forward_hooks for m in own.modules())


def test_stages_of_a_convnet_are_read_where_there_are_no_blocks():
    own = model(convnet(), num_classes=1)
    assert own(torch.rand(2, 3, 64, 96)).shape == (2, 1, 64, 96)
    assert own.taps.dims == [64, 64, 256, 512] or len(own.taps.dims) == 4


def test_a_network_without_maps_is_refused():
    with pytest.raises(UsageError, match="neither transformer blocks nor"):
        Taps(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("method", ["prompt", "bottleneck", "bitfit", "prefix"])
def test_other_methods_live_below_masks_too(method):
    handle = attach(model(timm_vit()), method, sample=(pictures(),), head="head")
    found = verify(handle, (pictures(),), fresh=True)
    assert found.ok, found.problems


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_do_not_move_the_patches(deep):
    """They stand behind CLS, and without `deep` in what every block but the last gives: patches are the last tokens."""
    own = model(still(timm_vit()), "linear")
    attach(own, "prompt", sample=(pictures(),), head="head", tokens=3, deep=deep)
    with torch.no_grad():
        image = (pictures() - 0.5) / 0.5
        maps = Taps(own.backbone, (2, 4))(own.backbone, image)
        expected = own.backbone.patch_embed.proj(image)
    for found in maps:
        torch.testing.assert_close(found, expected)


def test_joined_tokens_are_put_back_on_their_smaller_grid():
    own = model(timm_vit(reg_tokens=0))
    handle = attach(own, "vision.ila", sample=(pictures(),), head="head", locations=(2,), dropout=0.0)
    grids = []
    own.head.register_forward_pre_hook(lambda m, args: grids.append([tuple(x.shape[2:]) for x in args[0]]))
    assert own(pictures()).shape == (2, 2, *SIZE)
    assert grids[0][0] == (4, 6) and grids[0][-1] != (4, 6)
    assert verify(handle, (pictures(),), fresh=True).ok


# ---- heads


def test_the_linear_head_is_a_convolution_of_normed_tokens_and_bilinear():
    own = model(timm_vit(), "linear")
    x = pictures()
    image = (x - 0.5) / 0.5
    with torch.no_grad():
        y = own.backbone._pos_embed(own.backbone.patch_embed(image))
        for block in own.backbone.blocks:
            y = block(y)
        y = own.head.norm(y[:, 3:])
        logits = y @ own.head.dense.weight[:, :, 0, 0].T + own.head.dense.bias
        maps = logits.transpose(1, 2).reshape(2, 2, 4, 6)
        expected = F.interpolate(maps, SIZE, mode="bilinear", align_corners=False)
    torch.testing.assert_close(own(x), expected, rtol=1e-5, atol=1e-5)


def test_the_unet_sees_the_picture_at_full_resolution():
    """Two pictures that the patches cannot tell apart: only the skip of the image can."""
    own = model(timm_vit())
    with torch.no_grad():
        own.backbone.patch_embed.proj.weight.zero_()
    x = pictures(1)
    other = x.clone()
    other[..., 5, 7] += 0.5
    with torch.no_grad():
        difference = (own(x) - own(other)).abs().sum(1)[0]
    assert difference[3:8, 5:10].max() > 10 * difference[20:, 30:].max()


def test_a_head_trains_in_half_precision():
    own = model(timm_vit())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own(pictures()).isfinite().all()


@pytest.mark.parametrize("kind", ["linear", "unet"])
def test_a_saved_adapter_gives_the_same_masks(kind, tmp_path):
    own, x = model(timm_vit(), kind), pictures()
    handle = attach(own, "lora", sample=(x,), head="head")
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    handle.save(tmp_path / "adapter", labels=["a", "b"])
    torch.manual_seed(1)
    backbone = timm_vit()
    backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in own.state_dict().items()
                              if k.startswith("backbone.") and "adapter_bank" not in k})  # fmt: skip
    again = SegmentationModel(backbone, FrontEnd(size=SIZE), 2, MaskHead(kind=kind, width=8)).eval()
    load_adapter(again, tmp_path / "adapter", sample=(x,))
    assert torch.equal(again(x), own(x))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"width": 12}, "multiple of 8"),
        ({"smooth": 0.0}, "above 0"),
        ({"kind": "ifa"}, "gives no masks"),
        ({"after": (1, 2)}, "a linear head reads one map"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        SegmentationModel(timm_vit(), FrontEnd(size=SIZE), 1, MaskHead(**settings))


# ---- losses


def loops(logits, truth, smooth):
    """Mean over images and classes of 1 - (2 I + s) / (P + T + s), in float64."""
    losses = []
    for image, own in zip(logits.double().numpy(), truth.double().numpy(), strict=True):
        for z, t in zip(image, own, strict=True):
            both = sizes = 0.0
            for value, there in zip(z.flatten(), t.flatten(), strict=True):
                p = 1 / (1 + np.exp(-value))
                both, sizes = both + p * there, sizes + p + there
            losses.append(1 - (2 * both + smooth) / (sizes + smooth))
    return float(np.mean(losses))


@pytest.mark.parametrize("shape", [(3, 2, 4, 5), (2, 1, 3, 4, 2)])
def test_dice_is_of_each_image_and_class(shape):
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(shape, generator=generator), (torch.rand(shape, generator=generator) > 0.7).float()
    truth[0] = 0
    for smooth in (1.0, 1e-3):
        assert float(dice_loss(logits, truth, smooth)) == pytest.approx(loops(logits, truth, smooth), abs=1e-6)
    batch = float(1 - (2 * (logits.sigmoid() * truth).sum() + 1) / (logits.sigmoid().sum() + truth.sum() + 1))
    assert abs(float(dice_loss(logits, truth)) - batch) > 0.01  # not of the batch as one image


def test_dice_with_cross_entropy_is_their_sum():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(2, 2, 3, 4, generator=generator), torch.ones(2, 2, 3, 4)
    entropy = -np.log(1 / (1 + np.exp(-logits.double().numpy()))).mean()
    assert float(dice_ce_loss(logits, truth)) == pytest.approx(loops(logits, truth, 1.0) + entropy, abs=1e-6)


def test_dice_agrees_with_monai():
    from monai.losses import DiceLoss

    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(3, 2, 8, 8, generator=generator), torch.zeros(3, 2, 8, 8)
    truth[:2, :, 2:5, 1:7] = 1
    torch.testing.assert_close(
        dice_loss(logits, truth, 0.5), DiceLoss(sigmoid=True, smooth_nr=0.5, smooth_dr=0.5)(logits, truth)
    )


def test_an_empty_mask_pushes_predictions_down():
    """With the smoothing of 1e-5 that the reference has, an empty mask has next to no gradient."""

    def slope(smooth):
        logits = torch.zeros(1, 1, 16, 16, requires_grad=True)
        dice_loss(logits, torch.zeros(1, 1, 16, 16), smooth).backward()
        return float(logits.grad.sum())

    assert slope(1.0) > 1e-3 and slope(1e-5) < 1e-6


def test_planes_are_the_values_of_the_mask():
    mask = torch.tensor([[[0, 1], [2, 3]]], dtype=torch.uint8)
    assert planes(mask, 2).tolist() == [[[[0, 1], [0, 0]], [[0, 0], [1, 0]]]]
