"""Tokens lie where their patches were, also behind modules that join them, whatever stands in front."""

import numpy as np
import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adaptsuite import attach
from adaptsuite.errors import UsageError
from adaptsuite.grid import Shrink
from adaptsuite.testing import HOSTS
from adaptsuite.vision.grid import Place, feature_map, joining, watched


def vit(depth=3, size=(32, 48), **more):
    torch.manual_seed(0)
    shape = dict(patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=0)
    return VisionTransformer(img_size=size, **shape, **more).eval()


def eva(**more):
    torch.manual_seed(0)
    shape = dict(img_size=(32, 48), patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0)
    return Eva(**shape, use_rot_pos_emb=True, **more).eval()


def test_a_kernel_of_three_leaves_one_border_of_patches_uncovered():
    whole = Place.over((224, 160), (14, 10))
    assert whole.extent == (0, 160, 224, 0)
    inner = whole.joined(Shrink(3))
    assert inner.grid == (12, 8) and inner.extent == (16, 144, 208, 16)
    assert inner.joined(Shrink(3)).extent == (32, 128, 192, 32)


def test_a_stride_lets_a_token_stand_for_more():
    coarse = Place.over((224, 224), (14, 14)).joined(Shrink(3, stride=2, padding=1))
    assert coarse.grid == (7, 7) and coarse.first == (8, 8) and coarse.step == (32, 32)
    assert coarse.extent == (-8, 216, 216, -8)  # the middles stand at even patches


def test_values_are_spread_linearly_between_the_tokens_middles_and_not_beyond_their_cells():
    place = Place.over((24, 40), (6, 10)).joined(Shrink(3))
    y, x = np.mgrid[0:4, 0:8]
    found = place.spread(3.0 * y + x, (24, 40))
    assert np.isnan(found[:4]).all() and np.isnan(found[:, :4]).all() and np.isnan(found[20:]).all()
    assert np.isfinite(found[4:20, 4:36]).all()
    rows, columns = np.arange(6, 18) + 0.5, np.arange(6, 34) + 0.5  # between the outermost middles
    expected = 3 * (rows[:, None] - 6) / 4 + (columns - 6) / 4
    np.testing.assert_allclose(found[6:18, 6:34], expected, atol=1e-12)
    assert found[4, 4] == found[5, 5] == 0  # of the outer half of a cell: its own value


@pytest.mark.parametrize(
    ("build", "settings", "more"),
    [
        (vit, {}, {}),
        (vit, {"stride": 2, "padding": 1}, {"reg_tokens": 4}),
        (vit, {"kernel": 5, "locations": (1,)}, {"class_token": False, "global_pool": "avg"}),
        (eva, {}, {}),
    ],
)
def test_the_grid_of_every_block_is_known(build, settings, more):
    model, image, entered = build(**more), torch.rand(2, 3, 32, 48), []
    attach(model, "vision.ila", **settings)
    hooks = [b.register_forward_pre_hook(lambda m, args: entered.append(args[0].shape[1])) for b in model.blocks]
    with watched(model, image.shape[2:]) as tokens, torch.no_grad():
        out = model.forward_features(image)
    for hook in hooks:
        hook.remove()
    assert tokens.prefix == model.num_prefix_tokens
    assert [tokens.prefix + np.prod(tokens.place(b).grid) for b in range(3)] == entered
    assert tokens.prefix + np.prod(tokens.place().grid) == out.shape[1]


def test_without_its_adapter_a_backbone_joins_nothing():
    model = vit()
    handle = attach(model, "vision.ila")
    with handle.disabled(), watched(model, (32, 48)) as tokens:
        model(torch.rand(1, 3, 32, 48))
        assert tokens.place().grid == (8, 12) and not tokens.joins
    with watched(model, (32, 48)) as tokens:
        model(torch.rand(1, 3, 32, 48))
        assert tokens.place().grid == (4, 8) and sorted(tokens.joins) == [0, 1]


# ---- joining


def shares(kernel, h, w, stride, padding, prefix):
    """Token by token: the share of each old token in each new one."""
    k = len(kernel)
    rows, columns = ((n + 2 * padding - k) // stride + 1 for n in (h, w))
    matrix = np.zeros((prefix + rows * columns, prefix + h * w))
    matrix[range(prefix), range(prefix)] = 1
    for r in range(rows):
        for c in range(columns):
            for i in range(k):
                for j in range(k):
                    y, x = r * stride - padding + i, c * stride - padding + j
                    if 0 <= y < h and 0 <= x < w:
                        matrix[prefix + r * columns + c, prefix + y * w + x] = abs(kernel[i, j])
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(("k", "stride", "padding", "prefix"), [(3, 1, 0, 1), (3, 2, 1, 5), (5, 1, 2, 0)])
def test_a_joining_is_the_residual_kernel_token_by_token(k, stride, padding, prefix):
    branch = nn.Module()
    branch.shrink, branch.residual = Shrink(k, stride, padding), nn.Module()
    branch.residual.weight = nn.Parameter(torch.randn(7, 1, k, k))
    found = joining(branch, (6, 7), prefix)
    kernel = branch.residual.weight.detach().abs().mean((0, 1)).double().numpy()
    np.testing.assert_allclose(found.numpy(), shares(kernel, 6, 7, stride, padding, prefix), atol=1e-6)
    branch.residual.weight = None  # average pooling
    even = shares(np.ones((k, k)), 6, 7, stride, padding, prefix)
    np.testing.assert_allclose(joining(branch, (6, 7), prefix).numpy(), even, atol=1e-6)


# ---- features


@pytest.mark.parametrize("more", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}])
def test_final_features_stand_on_the_final_grid(more):
    model, image = vit(**more), torch.rand(2, 3, 32, 48)
    attach(model, "vision.ila")
    with torch.no_grad():
        found, place = feature_map(model, image)
        tokens = getattr(model, "fc_norm", nn.Identity())(model.forward_features(image))[:, model.num_prefix_tokens :]
    assert found.shape == (2, 16, 4, 8) and place.extent == (8, 40, 24, 8)
    assert torch.equal(found[:, :, 2, 5], tokens[:, 2 * 8 + 5])
    with pytest.raises(RuntimeError):  # timm's own takes the grid as it was embedded
        model.forward_intermediates(image)


def test_maps_of_networks_without_tokens_come_as_channels_first():
    with torch.no_grad():
        host = HOSTS["timm_swin"]()
        found, place = feature_map(host.model, host.args[0])
        last = host.model.forward_features(host.args[0])
        assert torch.equal(found, last.permute(0, 3, 1, 2)) and place.grid == last.shape[1:3]
        network = timm.create_model("test_resnet", num_classes=0).eval()
        found, place = feature_map(network, torch.rand(1, 3, 64, 96))
        assert found.shape[2:] == place.grid and place.extent == (0, 96, 64, 0)


def test_features_without_a_grid_are_refused():
    hiera = timm.create_model("hiera_tiny_224", num_classes=0).eval()
    with torch.no_grad(), pytest.raises(UsageError, match=r"Hiera gives \(1, 49, 768\)"):
        feature_map(hiera, torch.rand(1, 3, 224, 224))
