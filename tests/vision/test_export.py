"""Exports: timm's folder, torch.export, ONNX and peft say what the adapter says; what they cannot hold is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from adaptsuite import vision
from adaptsuite.cli import main
from adaptsuite.export import METADATA

TINY = ("--backbone", "timm:test_vit", "--random-weights", "--image-size", "96")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 60, (70, 80, 3))
        pixels[..., 2 * (i % 2)] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "ab"[i % 2] / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """`trained(method, *options)` is a run, trained once."""
    runs = {}

    def run(method, *options):
        if (method, options) not in runs:
            out = tmp_path_factory.mktemp("run") / "run"
            arguments = ["vision", "train", "--data", str(data), *TINY, "--method", method, "--epochs", "1"]
            assert main([*arguments, *options, "--out", str(out)]) == 0
            runs[method, options] = out
        return runs[method, options]

    return run


def images():
    return torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def said(run):
    """The adapter's own logits."""
    model = vision.load(run).model
    with torch.no_grad():
        return model(images())


@pytest.mark.parametrize("method", ["lora", "linear", "full"])
def test_timm_loads_the_folder_and_says_the_same(trained, adapt, tmp_path, method):
    import timm

    run = trained(method, "--set", "head.pool=cls")
    found, _ = adapt("export", run, "--format", "timm", "--out", tmp_path / "timm", "--json")
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(model((images() - mean) / std), said(run), rtol=1e-4, atol=1e-5)
    assert config["input_size"] == (3, 96, 96) and found["max_difference"] < 1e-4
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["label_names"] == ["a", "b"]
    state = timm.create_model("test_vit", num_classes=2, img_size=96).state_dict()
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("method", ["vision.ila", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_torch_export_holds_the_adapter_and_its_facts(trained, adapt, tmp_path, method):
    run = trained(method)
    adapt("export", run, "--format", "torch", "--out", tmp_path / "m.pt2")
    extra = {METADATA: ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    for count in (3, 1):
        torch.testing.assert_close(program(images()[:count]), said(run)[:count], rtol=1e-4, atol=1e-5)
    facts = json.loads(extra[METADATA])
    assert facts["labels"] == ["a", "b"] and facts["size"] == [96, 96] and facts["activation"] == "softmax"


@pytest.mark.slow
def test_an_onnx_file_holds_the_adapter(trained, adapt, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run = trained("vision.ila")
    adapt("export", run, "--format", "onnx", "--out", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"image": images().numpy()})
    np.testing.assert_allclose(found, said(run).numpy(), rtol=1e-4, atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["labels"]) == ["a", "b"]


def test_peft_takes_lora_on_whole_layers(trained, adapt, tmp_path):
    run = trained("lora", "--set", "sites=attn.qkv,mlp.in")
    found, _ = adapt("export", run, "--format", "peft", "--out", tmp_path / "peft", "--json")
    assert found["max_difference"] < 1e-5 and (tmp_path / "peft" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("method", "options", "format", "reason"),
    [
        ("vision.ila", ("--set", "head.pool=cls"), "timm", "needs merged weights"),
        ("lora", ("--set", "head.pool=both"), "timm", "this head cls+mean: train with head.pool=own"),
        ("lora", ("--set", "head.kind=ifa"), "timm", "this head ifa"),
        ("lora", (), "peft", "part of a fused weight"),
        ("vision.ila", ("--set", "head.pool=cls"), "peft", "only lora"),
        ("lora", (), "tensorrt", "'tensorrt' is not known"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_in_one_line(trained, adapt, tmp_path, method, options, format, reason):
    _, err = adapt("export", trained(method, *options), "--format", format, "--out", tmp_path / "x", code=2)
    assert reason in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "x").exists()
