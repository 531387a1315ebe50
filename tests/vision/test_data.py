"""Pictures on their way to the model: resizing, crops, views, augmentation and mixing."""

import numpy as np
import pytest
import torch
from PIL import Image

from adaptsuite.augment import Augment, augment, mix
from adaptsuite.batches import seed_all
from adaptsuite.front_end import FrontEnd
from adaptsuite.image_data import Images
from adaptsuite.images import crop, fitted, views
from adaptsuite.memory import Memory


def ramp(width, height):
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def test_squash_keeps_all_of_a_picture_and_crop_its_middle():
    squashed = fitted(ramp(200, 100), FrontEnd(size=(40, 40), fit="squash"))
    middle = fitted(ramp(200, 100), FrontEnd(size=(40, 40), fit="crop"))
    assert squashed.shape == middle.shape == (3, 40, 40) and squashed.dtype == torch.uint8
    assert squashed[0].min() < 5 and squashed[0].max() > 250
    assert middle[0].min() > 55 and middle[0].max() < 200 and middle[1].min() < 5 and middle[1].max() > 250


def test_a_picture_is_resized_to_the_ratio_and_cropped_to_the_size():
    front = FrontEnd(size=(32, 64), ratio=1.34)
    image = fitted(ramp(300, 200), front)
    assert image.shape == (3, 43, 86)
    (view,) = views(image[None], front.size, "none")
    assert view.shape == (1, 3, 32, 64) and torch.equal(view[0], image[:, 5:37, 11:75].float() / 255)


def test_views_are_the_middle_its_mirror_and_the_corners():
    image = torch.arange(3 * 6 * 8).reshape(1, 3, 6, 8).to(torch.uint8)
    assert len(list(views(image, (4, 4), "none"))) == 1
    plain, mirrored = views(image, (4, 4), "flip")
    assert torch.equal(mirrored, plain.flip(-1))
    five = [(v * 255).round().to(torch.uint8) for v in views(image, (4, 4), "five_crop")]
    corners = [image[..., :4, :4], image[..., :4, 4:], image[..., 2:, :4], image[..., 2:, 4:]]
    assert torch.equal(five[0], crop(image, (4, 4))) and all(map(torch.equal, five[1:], corners))
    assert len(list(views(image, (4, 4), "ten_crop"))) == 10


def test_random_crops_are_windows_of_the_picture_and_flips_are_mirrored_in_half_the_cases():
    image = torch.randint(0, 256, (1, 3, 12, 12), dtype=torch.uint8).expand(200, -1, -1, -1)
    seed_all(0)
    out = (augment(image, (8, 8), Augment()) * 255).round().to(torch.uint8)
    windows = {}
    for top in range(5):
        for left in range(5):
            window = image[0, :, top : top + 8, left : left + 8]
            windows |= {window.numpy().tobytes(): False, window.flip(-1).contiguous().numpy().tobytes(): True}
    flipped = [windows[picture.contiguous().numpy().tobytes()] for picture in out]  # a KeyError: no window of it
    assert 70 < sum(flipped) < 130 and len({p.contiguous().numpy().tobytes() for p in out}) > 30


def test_without_augmentation_training_sees_what_evaluation_sees():
    image = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    (expected,) = views(image, (8, 8), "none")
    assert torch.equal(augment(image, (8, 8), Augment(crop="middle", flip=False)), expected)


def test_every_augmentation_keeps_shape_and_range_and_depends_on_the_seed_alone():
    image = torch.randint(0, 256, (4, 3, 24, 30), dtype=torch.uint8)
    settings = Augment(crop="resized", flip_vertical=True, rand_augment=2, colour=0.4, erase=0.5)
    drawn = []
    for seed in (0, 0, 1):
        seed_all(seed)
        drawn.append(augment(image, (16, 20), settings))
    assert drawn[0].shape == (4, 3, 16, 20) and drawn[0].min() >= 0 and drawn[0].max() <= 1
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_mixup_is_a_convex_sum_of_pictures_and_targets():
    image = torch.eye(4)[:, None, :, None].expand(4, 3, 4, 2).clone()
    target = torch.eye(4)
    seed_all(3)
    mixed, shares = mix(image, target, Augment(mixup=1.0))
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    torch.testing.assert_close(mixed[:, 0, :, 0], shares)  # picture i is target i, so both are mixed alike


def test_cutmix_tells_the_share_of_pixels():
    image = torch.eye(4)[:, :, None, None].expand(4, 4, 9, 7).clone()
    seed_all(2)
    mixed, shares = mix(image, torch.eye(4), Augment(cutmix=1.0))
    torch.testing.assert_close(mixed.mean((2, 3)), shares)
    assert set(mixed.flatten().tolist()) <= {0.0, 1.0} and (shares > 0).sum() > 4


def test_mixing_is_off_by_default_and_for_a_single_picture():
    image, target = torch.rand(1, 3, 4, 4), torch.ones(1, 2)
    for settings in (Augment(), Augment(mixup=1.0)):
        mixed, shares = mix(image, target, settings)
        assert torch.equal(mixed, image) and torch.equal(shares, target)


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        ramp(40 + i, 30).save(path)
    return paths


def test_memory_for_resized_pictures_is_bounded_and_nothing_is_lost(files):
    front = FrontEnd(size=(16, 16))
    dataset = Images(files, np.zeros(6, dtype=np.int64), front, memory := Memory(4 * 3 * 16 * 16))
    dataset.load()
    assert len(memory) == 4 and memory.bytes == 4 * 3 * 16 * 16
    assert dataset.remarks()[0].startswith("2 of 6 pictures do not fit into memory")
    assert torch.equal(dataset[5]["image"], fitted(Image.open(files[5]), front))


def test_a_cache_is_shared_only_by_what_is_resized_alike(files):
    memory = Memory()
    one = Images(files, np.zeros(6, dtype=np.int64), FrontEnd(size=(16, 16)), memory)
    other = Images(files, np.zeros(6, dtype=np.int64), FrontEnd(size=(16, 16), fit="squash"), memory)
    assert not torch.equal(one[5]["image"], other[5]["image"]) and len(memory) == 2
    assert one[5]["image"] is one[5]["image"] and one[5]["label"] == 0


def test_pictures_without_targets_are_not_kept(files):
    dataset = Images(files, None, FrontEnd(size=(16, 16)), memory := Memory())
    assert "label" not in dataset[0] and not memory and dataset.item_targets is None
