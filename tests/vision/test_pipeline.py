"""The task: losses against their formulas, views averaged, what a recipe decides."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptsuite.augment import Augment
from adaptsuite.commands import read_recipe
from adaptsuite.experiment import adapt, complete
from adaptsuite.front_end import FrontEnd
from adaptsuite.image_task import HeadSettings, ImageModel, ImageTask
from adaptsuite.verify import verify
from adaptsuite.vision.pipeline import DOMAIN

STILL = Augment(crop="middle", flip=False)


class Colours(nn.Module):
    """Logits are the mean of each colour; what a ImageModel looks like to a task."""

    front_end = FrontEnd(size=(4, 4))

    def forward(self, image, embedding=False):
        return image.mean((2, 3)) * (10 if embedding else 1)


def batch(labels, size=(4, 4)):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (len(labels), 3, *size), dtype=torch.uint8, generator=generator)
    return {"image": image, "label": torch.tensor(labels)}


def logits(batch):
    return (batch["image"].double() / 255).mean((2, 3))


def test_the_loss_is_cross_entropy_with_smoothing():
    given = batch([0, 2, 1])
    task = ImageTask("abc", augment=Augment(crop="middle", flip=False, label_smoothing=0.2))
    expected = 0.0
    for row, label in zip(logits(given).tolist(), [0, 2, 1], strict=True):
        log_sum = float(np.log(np.sum(np.exp(row))))
        target = [0.2 / 3 + 0.8 * (k == label) for k in range(3)]
        expected += sum(t * (log_sum - v) for t, v in zip(target, row, strict=True)) / 3
    assert float(task.loss(Colours(), given)) == pytest.approx(expected, abs=1e-6)


def test_several_labels_take_binary_cross_entropy():
    given = batch([[1, 0, 1], [0, 0, 0]])
    expected = F.binary_cross_entropy_with_logits(logits(given), given["label"].double())
    found = ImageTask("abc", "multilabel", STILL).loss(Colours(), given)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_rare_classes_weigh_more_or_have_their_logits_adjusted():
    given, counts = batch([0, 1, 2, 2]), np.array([1, 1, 6])
    z, y = logits(given), torch.tensor([0, 1, 2, 2])
    weights = torch.tensor([8 / 3, 8 / 3, 8 / 18], dtype=torch.float64)
    each = F.cross_entropy(z, y, reduction="none") * weights[y]
    found = ImageTask("abc", augment=STILL, head=HeadSettings(balance="weights"), counts=counts).loss(Colours(), given)
    torch.testing.assert_close(found.double(), each.mean(), rtol=1e-5, atol=1e-6)
    prior = torch.tensor([1 / 8, 1 / 8, 6 / 8], dtype=torch.float64)
    task = ImageTask("abc", augment=STILL, head=HeadSettings(balance="logits", tau=1.5), counts=counts)
    expected = F.cross_entropy(z + 1.5 * prior.log(), y)
    torch.testing.assert_close(task.loss(Colours(), given).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(task.predict(Colours(), given).double(), z, rtol=1e-5, atol=1e-6)


def test_scores_of_views_are_averaged():
    given = batch([0, 1], size=(8, 8))
    task = ImageTask("abc", tta="five_crop")
    image = given["image"].float() / 255
    crops = [image[..., 2:6, 2:6]] + [image[..., a : a + 4, b : b + 4] for a in (0, 4) for b in (0, 4)]
    expected = torch.stack([c.mean((2, 3)) for c in crops]).mean(0)
    torch.testing.assert_close(task.predict(Colours(), given), expected)
    torch.testing.assert_close(task.embed(Colours(), given), 10 * expected)


def test_the_model_normalises_as_its_front_end_says():
    from timm.models.vision_transformer import VisionTransformer

    shape = dict(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)
    backbone = VisionTransformer(**shape).eval()
    front = FrontEnd(size=(16, 16), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    model, image = ImageModel(backbone, front, 3, HeadSettings(pool="cls")), torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (front.mean, front.std))
    with torch.no_grad():
        torch.testing.assert_close(model(image, embedding=True), backbone((image - mean) / std))
        torch.testing.assert_close(model(image), model.head(model(image, embedding=True)))
    assert not any(name in model.state_dict() for name in ("mean", "std"))


def settled(*settings, **options):
    given = {"backbone": "timm:test_vit", "random_weights": True, "method": "linear", "setting": settings, **options}
    return complete(DOMAIN, read_recipe(DOMAIN, {"size": ("front_end.size", None), **given}))


def test_what_the_backbone_decides_is_written_out():
    recipe = settled()
    model = DOMAIN.model(recipe, ["a", "b"])
    decided = DOMAIN.decided(recipe, model)
    assert decided.front_end["size"] == (160, 160) and decided.front_end["interpolation"] == "bicubic"
    assert decided.front_end["mean"] == (0.5, 0.5, 0.5) and decided.head["pool"] == "own"
    again = DOMAIN.model(decided, ["a", "b"])
    assert again.front_end == model.front_end


def test_bitfit_counts_the_bias_of_the_patches_where_there_is_one():
    counts = {}
    for backbone in ("timm:test_vit", "timm:test_vit_relpos"):
        handle = adapt(DOMAIN, settled(backbone=backbone, method="bitfit"), ["a", "b"])
        counts[backbone] = [n for n in handle.trained() if "patch_embed" in n]
    assert counts["timm:test_vit"] == ["tensors.backbone/patch_embed/proj/bias"]


@pytest.mark.parametrize("kind", ["linear", "ifa"])
@pytest.mark.parametrize("method", ["vision.ila", "lora", "full"])
def test_a_task_model_with_any_head_is_alive_under_any_method(kind, method):
    recipe = settled(f"head.kind={kind}", "front_end.size=96", method=method)
    handle = adapt(DOMAIN, recipe, ["a", "b", "c"])
    found = verify(handle, DOMAIN.sample(handle.model), fresh=True)
    assert found.ok, found.problems


def test_non_square_inputs_train():
    recipe = settled("front_end.size=96,128", method="vision.ila_plus_plus")
    handle = adapt(DOMAIN, recipe, ["a", "b"])
    (image,) = DOMAIN.sample(handle.model)
    assert image.shape == (2, 3, 96, 128)
    handle.model(image)
    assert handle.bank.final_grid("backbone") == (2, 4)


def test_a_layer_scale_that_was_never_trained_does_not_make_an_adapter_look_dead():
    """DINOv3 starts its layer scales at 1e-5: what prefix tokens say to patches is then below every bound."""
    recipe = settled("front_end.size=96", backbone="timm:vit_small_patch16_dinov3", method="vision.ila")
    handle = adapt(DOMAIN, recipe, ["a", "b"])
    before = {k: v.clone() for k, v in handle.model.state_dict().items()}
    assert verify(handle, DOMAIN.sample(handle.model), fresh=True).ok
    assert all(torch.equal(v, before[k]) for k, v in handle.model.state_dict().items())
