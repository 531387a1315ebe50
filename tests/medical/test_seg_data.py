"""Masks stay in step with their pictures: on disk, at the input's size, and under augmentation."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from adaptsuite.errors import DataError, UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.medical.seg_data import MaskAugment, Masked, Truth, augmented, place, read_labels, require_known

STILL = MaskAugment(flip=False)


def figure(height=40, width=56):
    """(H, W) zeros and ones without any symmetry: an F."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[4:36, 8:14] = 1
    mask[4:10, 8:40] = 1
    mask[18:24, 8:28] = 1
    return mask


def pair(count=6, height=40, width=56):
    """Pictures that show their own masks."""
    mask = torch.from_numpy(figure(height, width))[None].repeat(count, 1, 1)
    return (mask[:, None] * 255).repeat(1, 3, 1, 1), mask


def agreement(image, mask):
    """Share of pixels of which picture and mask say the same."""
    return ((image[:, 0] > 0.5) == (mask > 0)).float().mean((1, 2))


# ---- augmentation


@pytest.mark.parametrize(
    "changes",
    [
        {"flip": True, "flip_vertical": True},
        {"rotate": 45.0},
        {"zoom": 0.3},
        {"shift": 0.2},
        {"flip": True, "flip_vertical": True, "rotate": 30.0, "zoom": 0.2, "shift": 0.1},
    ],
)
def test_the_mask_moves_with_its_picture(changes):
    torch.manual_seed(0)
    image, mask = pair()
    moved, labels = augmented(image, mask, MaskAugment(**{"flip": False, **changes}))
    assert agreement(moved, labels).min() > 0.97  # the rest lies on borders, where the picture is between 0 and 1
    assert agreement(moved, mask).min() < 0.97 and labels.dtype == torch.uint8
    assert len({tuple(own.flatten().tolist()) for own in labels}) > 1  # draws of their own


def test_flips_are_exact():
    torch.manual_seed(0)
    image, mask = pair(16)
    moved, labels = augmented(image, mask, MaskAugment(flip=True))
    assert torch.equal(moved[:, 0] > 0.5, labels > 0)
    turned = (labels != mask).flatten(1).any(1)
    assert 0 < turned.sum() < 16 and torch.equal(labels[turned], mask[turned].flip(-1))


def test_intensities_change_in_the_picture_only():
    torch.manual_seed(0)
    image, mask = pair()
    image = (image // 2) + 40
    moved, labels = augmented(image, mask, MaskAugment(flip=False, colour=0.4, gamma=0.5))
    assert torch.equal(labels, mask) and (moved - image / 255).abs().max() > 0.05
    assert moved.min() >= 0 and moved.max() <= 1
    assert len({round(float(own[0, 0, 0]), 6) for own in moved}) == len(moved)


def test_a_circle_stays_one_in_a_picture_that_is_no_square():
    y, x = np.mgrid[:40, :80]
    circle = torch.from_numpy((((y - 19.5) ** 2 + (x - 39.5) ** 2) < 12**2).astype(np.uint8))[None]
    torch.manual_seed(1)
    _, turned = augmented((circle[:, None] * 255).repeat(1, 3, 1, 1), circle, MaskAugment(flip=False, rotate=90.0))
    assert (turned != circle).float().mean() < 0.01


def test_what_lies_beyond_the_picture_is_background():
    torch.manual_seed(0)
    image, mask = torch.full((4, 3, 20, 20), 255, dtype=torch.uint8), torch.ones(4, 20, 20, dtype=torch.uint8)
    moved, labels = augmented(image, mask, MaskAugment(flip=False, shift=0.5))
    assert (labels == 0).any() and agreement(moved, labels).min() > 0.9


def test_without_settings_nothing_changes():
    image, mask = pair()
    moved, labels = augmented(image, mask, STILL)
    assert torch.equal(moved, image / 255) and torch.equal(labels, mask)


@pytest.mark.parametrize("name", ["rand_augment", "erase", "mixup", "cutmix", "label_smoothing"])
def test_what_masks_cannot_follow_is_refused(name):
    with pytest.raises(UsageError, match=f"augment.{name} is not for masks"):
        require_known(MaskAugment(**{name: 1}), segments=True)


def test_what_labels_do_not_use_is_refused():
    with pytest.raises(UsageError, match=r"augment.rotate is not for labels"):
        require_known(MaskAugment(rotate=10.0), segments=False)
    with pytest.raises(UsageError, match=r"augment.zoom=2: 0 to 0.9"):
        MaskAugment(zoom=2.0)


# ---- files


def written(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_values_of_masks_become_labels(tmp_path):
    mask = figure()
    for name, values in (("one.png", mask), ("byte.png", mask * 255), ("bits.png", mask.astype(bool))):
        assert np.array_equal(read_labels(written(tmp_path / name, values), 1), mask)
    colours = written(tmp_path / "rgb.png", np.stack([mask * 255] * 3, -1))
    assert np.array_equal(read_labels(colours, 1), mask)
    several = mask.copy()
    several[20:, :] *= 2
    assert np.array_equal(read_labels(written(tmp_path / "two.png", several), 2), several)
    palette = Image.fromarray(several, mode="P")
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_labels(tmp_path / "palette.png", 2), several)
    assert read_labels(written(tmp_path / "none.png", mask * 0), 1).sum() == 0


def test_masks_that_cannot_be_used_are_refused_by_name(tmp_path):
    mask = figure()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    colours = np.zeros((8, 8, 3), dtype=np.uint8)
    colours[2, 2, 0] = 255
    cases = [
        (written(tmp_path / "grey.png", grey), 1, None, "64 different values"),
        (written(tmp_path / "blurred.jpg", mask * 255), 1, None, "JPEG blurs masks"),
        (written(tmp_path / "full.png", np.tile(np.uint8([1, 2]), (8, 4))), 1, None, "has 0 and one other"),
        (written(tmp_path / "three.png", grey // 16), 2, None, "holds the value 3, the 2 classes are 1 to 2"),
        (written(tmp_path / "rgb.png", colours), 1, None, "in colours"),
        (written(tmp_path / "size.png", mask), 1, (40, 57), "56 x 40 pixels, its picture 57 x 40"),
    ]
    (tmp_path / "cut.png").write_bytes((tmp_path / "size.png").read_bytes()[:60])
    (tmp_path / "empty.png").write_bytes(b"")
    cases += [(tmp_path / "cut.png", 1, None, "damaged"), (tmp_path / "empty.png", 1, None, "0 bytes")]
    cases += [(tmp_path / "gone.png", 1, None, "no such file")]
    for path, classes, size, said in cases:
        with pytest.raises(DataError, match=said) as error:
            read_labels(path, classes, size)
        assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("size", [(40, 56), (56, 40), (33, 90), (48, 48), (9, 100), (100, 9), (64, 33)])
def test_a_padded_picture_lies_where_pillow_puts_it(size):
    front = FrontEnd(size=(48, 64), fit="pad")
    white = ImageOps.pad(Image.fromarray(np.full(size, 255, dtype=np.uint8)), (64, 48))
    rows, columns = np.nonzero(np.asarray(white))
    top, left, height, width = place(size, front)
    assert (top, left) == (rows.min(), columns.min())
    assert (height, width) == (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1)


def dataset(tmp_path, fit, size=(48, 64), classes=1):
    mask = figure()
    written(tmp_path / "a.png", np.stack([mask * 255] * 3, -1))
    written(tmp_path / "b.png", np.full((30, 20, 3), 9, dtype=np.uint8))
    truths = [Truth("line 2", written(tmp_path / "m.png", mask)), Truth("line 3", None)]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    return Masked(paths, truths, FrontEnd(size=size, fit=fit, interpolation="nearest"), classes)


@pytest.mark.parametrize("fit", ["squash", "pad"])
def test_picture_and_mask_are_brought_to_the_input_in_step(tmp_path, fit):
    data = dataset(tmp_path, fit)
    item = data[0]
    shown = (item["image"][0] > 127).to(torch.uint8)
    assert item["mask"].shape == (48, 64) and (shown != item["mask"]).float().mean() < 0.01
    assert not torch.equal(item["mask"], item["mask"].flip(-1))
    assert item["present"].tolist() == [1] and torch.equal(data[0]["mask"], item["mask"])  # from memory


def test_an_empty_cell_is_a_mask_without_anything(tmp_path):
    data = dataset(tmp_path, "squash")
    item = data[1]
    assert item["mask"].sum() == 0 and item["present"].tolist() == [0]
    assert data.full_mask(1).shape == (30, 20) and data.size(1) == (30, 20)
    assert data.item_targets.tolist() == [[1], [0]]


def test_full_size_masks_are_those_of_the_file(tmp_path):
    assert np.array_equal(dataset(tmp_path, "pad").full_mask(0), figure())


def test_several_frames_are_refused(tmp_path):
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.zeros((12, 12, 5), dtype=np.float32), np.eye(4)), tmp_path / "v.nii")
    with pytest.raises(DataError, match="5 frames or slices: masks are of one picture"):
        Masked([tmp_path / "v.nii"], None, FrontEnd(), 1)
