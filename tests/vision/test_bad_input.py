"""Every row of the bad-day matrix for pictures: one line and exit 3, or left out and listed with --skip-bad; and what a
newcomer gets wrong."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from adaptsuite.cli import main
from adaptsuite.errors import DataError
from adaptsuite.images import inspect, read, survey

BACKBONE = ("--backbone", "timm:test_vit", "--random-weights", "--method", "linear", "--image-size", "32")
TRAIN = (*BACKBONE, "--test", "fold=2", "--val", "none", "--epochs", "1")


def picture(number, size=(40, 32)):
    """Red or blue with noise."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 60, (size[1], size[0], 3))
    pixels[..., 2 * (number % 2)] += 150
    return Image.fromarray(pixels.astype(np.uint8))


def good(folder, rows=12, suffix="png"):
    """Two classes, three folds; returns the table."""
    lines = ["path,label,fold"]
    for i in range(rows):
        picture(i).save(folder / f"{i}.{suffix}")
        lines.append(f"{i}.{suffix},{'ab'[i % 2]},{i % 3}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def png(width, height):
    """A PNG of a few bytes that says it is so large."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def spoil(path, kind):
    """Puts a bad file of this kind at `path`."""
    if kind == "0 bytes":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-700])
    elif kind == "bomb":
        path.write_bytes(png(10_000, 10_000))
    elif kind == "large bomb":
        path.write_bytes(png(100_000, 100_000))
    elif kind == "1x1":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "lying extension":
        path.write_text("path,label\n")
    elif kind == "NaN":
        Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(path, format="TIFF")


REASONS = {
    "0 bytes": "0 bytes",
    "truncated": "damaged or cut short",
    "bomb": "10000 x 10000 pixels are more than 89,478,485",
    "large bomb": "100000 x 100000 pixels are more than",
    "1x1": "1 x 1 pixels, at least 8",
    "lying extension": "not readable as a picture",
    "NaN": "NaN or infinite pixels",
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    out = folder / "run"
    assert main(["vision", "train", "--data", str(good(folder)), *TRAIN, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(("kind", "reason"), REASONS.items())
def test_a_bad_file_stops_every_command_with_one_line_and_nothing_written(adapt, adapter, tmp_path, kind, reason):
    table, out = good(tmp_path), tmp_path / "run"
    spoil(tmp_path / "4.png", kind)  # a training row of fold 1
    spoil(tmp_path / "5.png", kind)  # a test row
    for command, where in (
        (("train", "--data", table, *TRAIN, "--out", out), "manifest.csv line 6"),
        (("evaluate", adapter, "--data", table, "--test", "fold=2"), "manifest.csv line 7"),
        (("check", "--data", table, "--test", "fold=2"), "manifest.csv line 6"),
        (("predict", adapter, tmp_path / "4.png"), "4.png"),
    ):
        text, err = adapt(*command, code=3)
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1 and where in lines[0] and ".png" in lines[0] and reason in lines[0], (command[0], err)
    assert not out.exists()


@pytest.mark.parametrize(("kind", "reason"), REASONS.items())
def test_skip_bad_leaves_the_rows_out_and_lists_them(adapt, adapter, tmp_path, kind, reason):
    table = good(tmp_path)
    spoil(tmp_path / "4.png", kind)
    spoil(tmp_path / "5.png", kind)
    for command, rows in (
        (("check", "--data", table, "--test", "fold=2"), 10),
        (("evaluate", adapter, "--data", table, "--test", "fold=2"), 3),
    ):
        found, _ = adapt(*command, "--skip-bad", "--json")
        assert found["rows"] == rows and {s["path"] for s in found["skipped"]} <= {"4.png", "5.png"}
        assert reason in found["skipped"][-1]["reason"] and found["skipped"][-1]["row"] == "manifest.csv line 7"


# ---- unusual, and used


def saved(tmp_path, name, image, **more):
    image.save(tmp_path / name, **more)
    return tmp_path / name


def test_a_turned_photograph_is_turned_back(tmp_path):
    upright = picture(0, (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    path = saved(tmp_path, "a.png", upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert (inspect(path).width, inspect(path).height) == (40, 20)
    assert np.array_equal(np.asarray(read(path)), np.asarray(upright))


@pytest.mark.parametrize(
    ("name", "make", "remark"),
    [
        ("a.jpg", lambda p: p.convert("CMYK"), "CMYK, converted without its profile"),
        ("a.png", lambda p: Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 200), "more than 8 bits"),
        ("a.png", lambda p: p.quantize(32), None),
        ("a.png", lambda p: p.convert("L"), None),
        ("a.png", lambda p: p.convert("RGBA"), "transparent, laid over white"),
    ],
)
def test_other_kinds_of_pixels_become_rgb_and_are_said(tmp_path, name, make, remark):
    plain = picture(0)
    path = saved(tmp_path, name, make(plain))
    image = read(path)
    assert image.mode == "RGB" and image.size == plain.size and np.asarray(image).std() > 5
    found = survey(path)["remarks"]
    assert found == [] if remark is None else remark in found[0]


def test_sixteen_bits_keep_their_order_and_use_the_whole_range(tmp_path):
    values = np.arange(400, dtype=np.uint16).reshape(20, 20) + 20000
    image = np.asarray(read(saved(tmp_path, "a.png", Image.fromarray(values))))[..., 0].ravel()
    assert image[0] == 0 and image[-1] == 255 and (np.diff(image.astype(int)) >= 0).all()


def test_a_transparent_pixel_is_white_whatever_colour_lies_under_it(tmp_path):
    pixels = np.zeros((10, 10, 4), np.uint8)
    pixels[:, :5] = (200, 0, 0, 255)
    image = np.asarray(read(saved(tmp_path, "a.png", Image.fromarray(pixels))))
    assert (image[:, 5:] == 255).all() and (image[:, :5] == (200, 0, 0)).all()


def test_of_an_animation_the_first_frame_is_read_and_it_is_said(tmp_path):
    frames = [picture(i) for i in range(3)]
    path = saved(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert survey(path)["remarks"] == ["3 frames, the first is read"]
    assert np.abs(np.asarray(read(path)).astype(int) - np.asarray(frames[0]).astype(int)).mean() < 12


def test_a_picture_with_the_suffix_of_another_format_is_read_and_said(tmp_path):
    picture(0).save(tmp_path / "a.png", format="JPEG")
    assert survey(tmp_path / "a.png")["remarks"] == ["a JPEG with the suffix of a PNG"]


def test_one_colour_is_said(tmp_path):
    path = saved(tmp_path, "a.png", Image.new("RGB", (20, 20), (9, 9, 9)))
    assert survey(path)["remarks"] == ["one colour all over"]


def test_remarks_are_said_once_with_names_and_land_in_the_report(adapt, tmp_path):
    table, out = good(tmp_path), tmp_path / "run"
    for i in (2, 6):
        picture(i).convert("RGBA").save(tmp_path / f"{i}.png")
    Image.new("RGB", (16, 90)).save(tmp_path / "9.png")
    found, _ = adapt("train", "--data", table, *TRAIN, "--out", out, "--json")
    said = found["warnings"]
    assert said[0] == "2 of 12 files: transparent, laid over white: 2.png, 6.png"
    assert said[1] == "1 of 12 files: one colour all over: 9.png"
    assert said[2].startswith("1 of 12 pictures are more than twice as long as wide")
    assert "transparent, laid over white: 2.png" in (out / "report.html").read_text()


def test_small_pictures_are_said_to_gain_nothing(adapt, tmp_path):
    table = good(tmp_path)
    wide = ("--image-size", "160")
    text, _ = adapt("train", "--data", table, *TRAIN, *wide, "--out", tmp_path / "run")
    assert "12 of 12 pictures are smaller than the 168 x 168 they are resized to (most 40 x 32)" in text


def test_a_link_that_leads_out_of_the_folder_is_refused(adapt, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    table = good(data)
    picture(0).save(tmp_path / "outside.png")
    (data / "4.png").unlink()
    os.symlink(tmp_path / "outside.png", data / "4.png")
    _, err = adapt("check", "--data", table, "--test", "fold=2", code=3)
    assert "manifest.csv line 6: '4.png' leads outside the manifest's folder" in err


def test_a_pickle_named_png_is_never_opened(tmp_path):
    sentinel = tmp_path / "ran"
    (tmp_path / "a.png").write_bytes(b"cos\nsystem\n(S'touch " + str(sentinel).encode() + b"'\ntR.")
    with pytest.raises(DataError, match="not readable as a picture"):
        read(tmp_path / "a.png")
    assert not sentinel.exists()


# ---- tables, sizes and recipes


def test_a_class_with_one_picture_is_named(adapt, tmp_path):
    table = good(tmp_path)
    table.write_text(table.read_text().replace("4.png,a", "4.png,c"))
    for verb in (("check",), ("train", *BACKBONE, "--out", tmp_path / "run")):
        _, err = adapt(*verb, "--data", table, "--test", "fold=2", code=3)
        assert "manifest.csv line 6: label 'c' has this one example" in err


def test_a_group_in_two_splits_is_named(adapt, tmp_path):
    table = good(tmp_path)
    lines = table.read_text().splitlines()
    rows = [
        f"{line},{'train' if i < 8 else 'test'},{'plant7' if i in (3, 9) else f'p{i}'}"
        for i, line in enumerate(lines[1:])
    ]
    table.write_text("\n".join([lines[0] + ",split,group", *rows]) + "\n")
    _, err = adapt("train", "--data", table, *BACKBONE, "--out", tmp_path / "run", code=3)
    assert "'plant7' in train and test" in err


@pytest.mark.parametrize(
    ("backbone", "size", "reason"),
    [
        ("timm:test_vit", "100", "image size 100 x 100: this VisionTransformer cuts patches of 16"),
        ("timm:test_vit", "8", "cuts patches of 16"),
        ("timm:test_vit", "-16", "cuts patches of 16"),
        ("timm:hiera_tiny_224", "96", "image size 96 x 96: this Hiera cannot take it"),
    ],
)
def test_an_image_size_that_the_backbone_cannot_take_is_one_line(adapt, tmp_path, backbone, size, reason):
    options = ("--backbone", backbone, "--random-weights", "--method", "linear", "--image-size", size)
    _, err = adapt("budget", *options, code=2)
    assert reason in err and len(err.strip().splitlines()) == 1


def test_an_unknown_recipe_key_is_one_line_with_the_nearest(adapt, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('domain = "vision"\n[augment]\nmixupp = 0.2\n')
    _, err = adapt("train", "--recipe", recipe, "--data", good(tmp_path), "--out", tmp_path / "run", code=2)
    assert "augment.mixupp is not a setting" in err and "mixup" in err
    _, err = adapt("train", *TRAIN, "--data", tmp_path, "--set", "front_end.sise=3", "--out", tmp_path / "run", code=2)
    assert "did you mean size?" in err


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("front_end.size=32,32,32",), "one number, or height,width is expected"),
        (("front_end.ratio=0.5",), "at least 1 is needed"),
        (("head.pool=clss",), "'clss' is not known; did you mean cls"),
        (("head.kind=ifa", "head.pool=cls"), "has a reading of its own"),
        (("head.balance=weights", "data.task=multilabel"), "is for one label a picture"),
        (("augment.crop=left",), "random or resized or middle"),
        (("front_end.tta=twelve",), "none or flip or five_crop or ten_crop"),
    ],
)
def test_settings_that_cannot_be_are_one_line(adapt, tmp_path, settings, reason):
    more = [part for setting in settings for part in ("--set", setting)]
    _, err = adapt("train", *TRAIN, "--data", good(tmp_path), *more, "--out", tmp_path / "run", code=2)
    assert reason in err and len(err.strip().splitlines()) == 1


def test_an_audio_file_among_pictures_is_left_out_of_a_folder_of_classes(adapt, tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(4):
            picture(2 * i + "ab".index(label)).save(tmp_path / label / f"{i}.jpg")
        (tmp_path / label / "note.wav").write_bytes(b"RIFF")
    found, _ = adapt("check", "--data", tmp_path, "--json")
    assert found["rows"] == 8 and any("2 files" in w and "left out" in w for w in found["warnings"])
