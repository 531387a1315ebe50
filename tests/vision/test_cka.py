"""CKA equals its definition in loops, and its matrices say what they should."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from adaptsuite import attach
from adaptsuite.errors import UsageError
from adaptsuite.vision.cka import alike, attention_cka, batched, cka, collapse, gram, hsic
from adaptsuite.vision.look import attention_maps


def vit(depth=4, **more):
    torch.manual_seed(0)
    shape = dict(patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=0)
    model = VisionTransformer(img_size=(16, 24), **shape, **more).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(30)  # attention that differs from picture to picture
    return model


def unbiased(k, m):
    """Eq. 3 of arXiv:2010.15327, summand by summand."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    trace = sum(k[i, j] * m[j, i] for i in range(n) for j in range(n))
    sums = sum(k[i, j] for i in range(n) for j in range(n)) * sum(m[i, j] for i in range(n) for j in range(n))
    cross = sum(k[i, j] * m[j, q] for i in range(n) for j in range(n) for q in range(n))
    return (trace + sums / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def loops(batches):
    """Eq. 2, of batches of features: numerators and denominators are averaged apart."""
    num = len(batches[0])
    grams = [[x.reshape(len(x), -1) @ x.reshape(len(x), -1).T for x in batch] for batch in batches]
    mean = np.array([[np.mean([unbiased(g[i], g[j]) for g in grams]) for j in range(num)] for i in range(num)])
    return [[mean[i, j] / np.sqrt(mean[i, i] * mean[j, j]) for j in range(num)] for i in range(num)]


def test_hsic_equals_its_equation():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 5)), rng.normal(size=(6, 3))
    found = hsic(torch.from_numpy(x @ x.T), torch.from_numpy(y @ y.T))
    assert float(found) == pytest.approx(unbiased(x @ x.T, y @ y.T), rel=1e-12)


def test_cka_of_batches_equals_loops_also_of_different_sizes():
    rng = np.random.default_rng(0)
    batches = [[rng.normal(2, 1, (n, 4, 3)) for _ in range(3)] for n in (5, 8, 4)]
    for batch in batches:
        batch[1] += 0.8 * batch[0]
    found = cka([torch.stack([gram(torch.from_numpy(x)) for x in batch]) for batch in batches])
    np.testing.assert_allclose(found, loops(batches), rtol=1e-9)
    np.testing.assert_allclose(np.diag(found), 1, rtol=1e-12)
    assert found[0, 1] > found[0, 2]


def test_a_representation_is_like_itself_turned_and_scaled():
    x = torch.randn(12, 7, dtype=torch.float64)
    turned = 3 * x @ torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0] + 5
    np.testing.assert_allclose(cka([torch.stack([gram(x), gram(turned)])]), 1, rtol=1e-9)


def test_three_samples_are_refused_and_batches_never_get_so_small():
    with pytest.raises(UsageError, match="3 pictures: at least 4"):
        hsic(torch.eye(3), torch.eye(3))
    for num in range(4, 60):
        for size in (4, 7, 16):
            parts = batched(num, size)
            assert min(map(len, parts)) >= 4 and [i for part in parts for i in part] == list(range(num))


def test_attention_cka_equals_loops_over_the_attention_of_all_blocks():
    model, images = vit(), torch.rand(9, 3, 16, 24, dtype=torch.float64)
    attach(model, "vision.ila", locations=(1,))
    model.double()
    parts = [images[:5], images[5:]]
    batches = []
    for part in parts:
        with attention_maps(model) as maps, torch.no_grad():
            model(part)
        batches.append([a.numpy() for a in maps])
    assert [a.shape[-1] for a in batches[0]] == [25, 25, 9, 9]
    np.testing.assert_allclose(attention_cka(model, parts), loops(batches), rtol=1e-8)


def test_blocks_that_attend_alike_are_dark_and_a_block_that_never_varies_is_left_blank():
    model = vit()
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight.zero_()  # even attention, whatever is seen
        model.blocks[2].attn.qkv.bias.zero_()
    found = attention_cka(model, [torch.rand(8, 3, 16, 24)])
    assert np.isnan(found[2]).all() and np.isnan(found[:, 2]).all() and np.isfinite(found[:2, :2]).all()
    assert collapse(np.array([[1, 0.5, np.nan], [0.7, 1, np.nan], [np.nan] * 3])) == pytest.approx(0.6)
    assert np.isnan(collapse(np.full((2, 2), np.nan)))


def test_before_and_after_are_measured_with_the_same_pictures():
    model, images = vit(), torch.rand(10, 3, 16, 24)
    plain = attention_cka(model, [images])
    handle = attach(model, "vision.ila", locations=(1,))
    found = alike(model, handle, range(10), lambda row: images[row : row + 1])
    assert list(found.matrices) == ["backbone alone", "adapted"] and found.joins == [1] and found.images == 10
    np.testing.assert_array_equal(found.matrices["backbone alone"], plain)
    assert not np.allclose(found.matrices["adapted"], plain)


def test_a_trained_head_alone_is_one_matrix_and_what_costs_too_much_is_left_out(monkeypatch):
    from adaptsuite.vision import cka as module

    model, images = vit(), torch.rand(40, 3, 16, 24)
    model.reset_classifier(3)
    handle = attach(model, "linear", head="head")
    image = lambda row: images[row : row + 1]  # noqa: E731
    found = alike(model, handle, range(40), image)
    assert list(found.matrices) == ["backbone"] and found.images == 32 and found.batch == 16 and found.joins == []
    assert alike(model, handle, range(40), image, work=1.0).images == 8
    with pytest.raises(UsageError, match="3 pictures, at least 4"):
        alike(model, handle, range(3), image)
    monkeypatch.setattr(module, "KEPT_BYTES", 4 * 2 * 25 * 25 * 3)
    with pytest.raises(UsageError, match="attention of 25 tokens has"):
        alike(model, handle, range(40), image)
