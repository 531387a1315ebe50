"""The serving object: pictures in every form, the same answers as the command, and what is no picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from adaptsuite import vision
from adaptsuite.cli import main
from adaptsuite.errors import AdapterError, DataError

TRAIN = ("--backbone", "timm:test_vit", "--random-weights", "--method", "lora", "--image-size", "32", "--epochs", "2")


def picture(number, size=(40, 36)):
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 60, (size[1], size[0], 3))
    pixels[..., 2 * (number % 2)] += 150
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(16):
        (folder / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / "data" / "ab"[i % 2] / f"{i}.png")
    arguments = ["vision", "train", "--data", str(folder / "data"), *TRAIN, "--out", str(folder / "run")]
    assert main(arguments) == 0
    return folder


def test_pictures_of_every_form_get_the_same_answer(trained):
    model, path = vision.load(trained / "run"), trained / "data" / "a" / "2.png"
    image = Image.open(path)
    array = np.asarray(image)
    expected = model.predict(path)
    assert set(expected) == {"a", "b"} and sum(expected.values()) == pytest.approx(1)
    forms = [str(path), image, array, torch.from_numpy(array.copy()), torch.from_numpy(array.copy()).permute(2, 0, 1)]
    forms.append(array.astype(np.float32) / 255)
    for form in forms:
        assert model.predict(form) == pytest.approx(expected, abs=1e-6), type(form)
    assert model.predict(forms) == [pytest.approx(expected, abs=1e-6)] * len(forms)
    assert model.predict(np.stack([array, array]))[1] == pytest.approx(expected, abs=1e-6)
    assert model.embed(path).shape == (64,) and model.embed([path, path]).shape == (2, 64)


def test_the_object_says_what_the_command_says(trained, adapt):
    found, _ = adapt("predict", trained / "run", trained / "data", "--json")
    model = vision.load(trained / "run", batch_size=3)
    said = model.predict([row["path"] for row in found["predictions"]])
    for row, scores in zip(found["predictions"], said, strict=True):
        assert scores == pytest.approx(row["scores"], abs=1e-5)
    assert sum(row["label"] == row["path"].split("/")[-2] for row in found["predictions"]) >= 15


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (np.zeros((4, 5, 7)), "shape"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (np.full((8, 8, 3), 2.0), "outside"),
        (np.full((8, 8, 3), np.nan), "NaN"),
        ([], "no picture"),
        ("nothing.png", "no such file"),
    ],
)
def test_what_is_no_picture_is_refused(trained, what, reason):
    with pytest.raises(DataError, match=reason):
        vision.load(trained / "run").predict(what)


def test_an_adapter_keeps_its_preprocessing_and_refuses_another_backbone(trained, adapt, tmp_path):
    import json
    import shutil

    record = json.loads((trained / "run" / "adapter" / "adapter.json").read_text())
    assert record["preprocessing"]["front_end"]["size"] == [32, 32]
    assert record["recipe"]["front_end"]["mean"] == [0.5, 0.5, 0.5]
    shutil.copytree(trained / "run" / "adapter", tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter.json").read_text()
    (tmp_path / "adapter" / "adapter.json").write_text(text.replace("timm:test_vit", "timm:test_vit2"))
    with pytest.raises(AdapterError):
        vision.load(tmp_path / "adapter")


def test_embed_writes_a_row_a_picture(trained, adapt, tmp_path):
    found, _ = adapt("embed", trained / "run", trained / "data", "--out", tmp_path / "f.npz", "--json")
    stored = np.load(tmp_path / "f.npz")
    assert found["rows"] == 16 and stored["features"].shape == (16, 64)
    own = vision.load(trained / "run").embed([str(p) for p in stored["paths"]])
    np.testing.assert_allclose(own, stored["features"], rtol=1e-4, atol=1e-5)
