"""MONAI Bundles run by MONAI's own command where this package cannot be imported, and say what the adapter says."""

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from adaptsuite import identity
from adaptsuite.backbones import load_backbone
from adaptsuite.cli import main
from adaptsuite.errors import UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.host import attach
from adaptsuite.images import crop, fitted, read
from adaptsuite.medical import bundle, bundle_network, bundle_tasks
from adaptsuite.medical.seg_predict import labels_of
from adaptsuite.medical.seg_task import at_size
from adaptsuite.medical.seg_volume import segment_volume
from adaptsuite.medical.volume_export import export_volumes
from adaptsuite.medical.volumes import read_volume

TINY = ("--backbone", "timm:test_vit", "--random-weights", "--image-size", "96")
SMALLER = ("--backbone", "timm:test_vit?img_size=64", "--random-weights")  # it sees 160 pixels, positions are of 64
EMBEDDED = ("--backbone", "embedded:vision-tiny")
POOLED = (*TINY, "--set", "head.pool=cls+max", "--set", "front_end.fit=squash")
CONFIG = ("--config_file", "configs/inference.json")
BLOCKER = """import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "adaptsuite":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ultrasound-like pictures of two classes, a column of patients among them."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = ["path,label,group,split"]
    for i in range(24):
        generator = np.random.default_rng(i)
        pixels = generator.integers(0, 90, (70 + i, 80, 3))
        pixels[20:50, 20:60, i % 2] += 60
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        part = ("train", "train", "val", "test")[i // 2 % 4]
        label = ("normal", "lesion")[(i + (i % 7 == 5)) % 2]  # some are wrong: a temperature needs mistakes
        rows.append(f"{i}.png,{label},p{i // 2},{part}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """`trained(method, *options)` is a run, trained once."""
    runs = {}

    def run(method, *options):
        if (method, options) not in runs:
            out = tmp_path_factory.mktemp("run") / "run"
            arguments = ["medical", "train", "--data", str(data), "--method", method, "--epochs", "2"]
            assert main([*arguments, *options, "--out", str(out)]) == 0
            runs[method, options] = out
        return runs[method, options]

    return run


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """`elsewhere(folder, *arguments, code=0)` runs python there, where this package cannot be imported: its output."""
    blocker = tmp_path_factory.mktemp("blocker")
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    environment = {**os.environ, "PYTHONPATH": str(blocker), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(folder, *arguments, code=0):
        command = [sys.executable, *map(str, arguments)]
        found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert found.returncode == code, found.stdout + found.stderr
        return found.stdout + found.stderr

    assert "No module named 'adaptsuite'" in run(blocker, "-c", "import adaptsuite", code=1)
    return run


def labelled(elsewhere, folder, data, out):
    """{file name: {label: probability}} of MONAI's command."""
    elsewhere(folder, "-m", "monai.bundle", "run", *CONFIG, "--dataset_dir", data, "--output_dir", out)
    return table(out)


def run_here(folder, data, out):
    """MONAI's workflow in this process, which is quicker."""
    from monai.bundle import ConfigWorkflow

    with contextlib.chdir(folder):
        changes = {"dataset_dir": str(data), "output_dir": str(out), "device": torch.device("cpu")}
        files = {"config_file": bundle.CONFIG, "meta_file": bundle.METADATA, "logging_file": False}
        workflow = ConfigWorkflow(**files, workflow_type="infer", **changes)
        workflow.initialize()
        assert workflow.check_properties() == []
        workflow.run()


def table(out):
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {os.path.basename(row.pop("path")): {k: float(v) for k, v in row.items()} for row in rows}


def largest_gap(adapt, run, data, said):
    """Between the probabilities that the adapter's own command writes, to six digits, and those of a bundle."""
    own, _ = adapt("predict", run, data, "--json")
    names = [os.path.basename(row["path"]) for row in own["predictions"]]
    assert sorted(names) == sorted(said)
    return max(
        abs(value - said[name][label])
        for name, row in zip(names, own["predictions"], strict=True)
        for label, value in row["scores"].items()
    )


def record(run):
    return json.loads((run / "adapter" / "adapter.json").read_text())


def config(folder):
    return json.loads((folder / bundle.CONFIG).read_text())


# ---- merged


def test_a_merged_bundle_runs_without_this_package_and_says_the_same(trained, adapt, elsewhere, data, tmp_path):
    run = trained("lora", *EMBEDDED)
    found, _ = adapt("export", run, "--format", "monai-bundle", "--out", tmp_path / "bundle", "--json")
    assert record(run)["temperature"] != 1  # or it would not matter whether it is in the bundle
    said = labelled(elsewhere, tmp_path / "bundle", data, tmp_path / "out")
    gap = largest_gap(adapt, run, data, said)
    assert gap < 2e-6 and found["max_difference"] < 1e-5
    assert config(tmp_path / "bundle")["layers"][0]["_target_"] == "timm.models.vision_transformer.VisionTransformer"
    for file in (tmp_path / "bundle").rglob("*"):
        assert not file.is_file() or b"import adaptsuite" not in file.read_bytes()


@pytest.mark.parametrize(
    ("method", "options", "network"),
    [
        ("lora", TINY, "class"),
        pytest.param("bitfit", POOLED, "tokens", marks=pytest.mark.slow),
        ("lora", (*TINY, "--set", "head.kind=ifa"), "graph"),
        pytest.param("audio.soft_moa", EMBEDDED, "graph", marks=pytest.mark.slow),
        pytest.param("vision.ila", EMBEDDED, "graph", marks=pytest.mark.slow),
        pytest.param("prompt", TINY, "graph", marks=pytest.mark.slow),
        pytest.param("film", SMALLER, "class", marks=pytest.mark.slow),
        pytest.param("bottleneck", (*TINY, "--set", "front_end.fit=pad"), "graph", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_network_says_what_the_adapter_says(trained, adapt, data, tmp_path, method, options, network):
    from monai.bundle import verify_net_in_out

    run, folder = trained(method, *options), tmp_path / "bundle"
    adapt("export", run, "--format", "monai-bundle", "--out", folder)
    facts = json.loads((folder / bundle.METADATA).read_text())
    assert facts["adaptsuite"]["network"] == network
    run_here(folder, data, tmp_path / "out")
    assert largest_gap(adapt, run, data, table(tmp_path / "out")) < 2e-6
    files = {"config_file": str(folder / bundle.CONFIG), "meta_file": str(folder / bundle.METADATA)}
    verify_net_in_out("network_def", **files, device="cpu", bundle_root=str(folder))
    state = torch.load(folder / bundle.MODEL, weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())


def test_probabilities_of_several_labels_a_picture_are_sigmoids(adapt, data, tmp_path):
    rows = ["path,label"] + [f"{i}.png,{('a', 'b', 'a;b', '')[i % 4]}" for i in range(24)]
    (data / "several.csv").write_text("\n".join(rows) + "\n")
    options = ("--data", data / "several.csv", "--set", "data.task=multilabel", "--method", "linear", "--epochs", "1")
    adapt("train", *options, *TINY, "--out", tmp_path / "run")
    adapt("export", tmp_path / "run", "--format", "monai-bundle", "--out", tmp_path / "bundle")
    run_here(tmp_path / "bundle", data, tmp_path / "out")
    said = table(tmp_path / "out")
    assert largest_gap(adapt, tmp_path / "run", data, said) < 2e-6
    assert any(abs(sum(row.values()) - 1) > 0.01 for row in said.values())


def test_the_readme_says_what_is_read_and_holds_the_model_card(trained, adapt, tmp_path):
    run = trained("lora", *TINY)
    adapt("export", run, "--format", "monai-bundle", "--out", tmp_path / "bundle")
    text = (tmp_path / "bundle/docs/README.md").read_text()
    assert bundle.RUN in text and "96 x 96 pixels" in text
    assert f"calibrated at temperature {record(run)['temperature']:.3f}" in text
    point = record(run)["threshold"]["lesion"]
    assert f"positive at or above {point['value']:.4f} (sensitivity>=0.95" in text
    assert (run / "model_card.md").read_text().strip() in text
    assert "Apache-2.0" in (tmp_path / "bundle/LICENSE").read_text()


# ---- preprocessing


def pictures(folder):
    """Files of every mode that adaptsuite.images.read treats in its own way."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (90, 131, 4)).astype(np.uint8)
    rgb, turned = Image.fromarray(pixels[..., :3]), Image.Exif()
    turned[0x0112] = 6
    made = {
        "rgb.png": rgb,
        "rgba.png": Image.fromarray(pixels),
        "grey.png": rgb.convert("L"),
        "grey_alpha.png": Image.fromarray(pixels).convert("LA"),
        "palette.png": rgb.convert("P"),
        "two.png": rgb.convert("1"),
        "deep.png": Image.fromarray(generator.integers(100, 9000, (90, 131)).astype(np.uint16)),
        "float.tiff": Image.fromarray(generator.normal(size=(90, 131)).astype(np.float32)),
        "cmyk.jpg": rgb.convert("CMYK"),
    }
    for name, image in made.items():
        image.save(folder / name)
    rgb.save(folder / "turned.jpg", exif=turned)
    rgb.convert("P").save(folder / "transparent.gif", transparency=3)
    return sorted(folder.iterdir())


@pytest.mark.parametrize(
    "front",
    [
        FrontEnd((48, 33), ratio=1.15),  # odd in even: the middle is rounded
        FrontEnd((48, 48), (0.45, 0.4, 0.5), (0.2, 0.3, 0.25), "lanczos", fit="squash"),
        FrontEnd((64, 40), fit="pad", interpolation="bilinear"),
    ],
)
def test_pictures_are_prepared_bit_by_bit_as_for_adapters(front, tmp_path):
    from monai.bundle import ConfigParser

    own = bundle_tasks.classification(front, multilabel=False, normalises=False)
    prepare = ConfigParser(bundle.inference({}, own)).get_parsed_content("preprocessing")
    for path in pictures(tmp_path):
        found = prepare({"image": str(path)})["image"]
        scaled = crop(fitted(read(path), front), front.size).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (front.mean, front.std))
        assert torch.equal(torch.as_tensor(found), (scaled - mean) / std), path.name
        assert found.meta["filename_or_obj"] == str(path)


# ---- weights apart


@pytest.fixture(scope="module")
def apart(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("apart") / "bundle"
    run = trained("lora", *EMBEDDED)
    assert main(["medical", "export", str(run), "--format", "monai-bundle-adapter", "--out", str(out)]) == 0
    return run, out


def test_weights_apart_run_without_this_package_too(apart, adapt, elsewhere, data, tmp_path):
    run, folder = apart
    assert largest_gap(adapt, run, data, labelled(elsewhere, folder, data, tmp_path / "out")) < 2e-6
    assert (folder / bundle.ADAPTER).stat().st_size < 0.05 * (folder / bundle.BASE).stat().st_size
    assert "adaptsuite" not in (folder / "scripts/__init__.py").read_text()


def test_another_base_is_refused_in_one_line(apart, elsewhere, data, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(apart[1], folder)
    base = torch.load(folder / bundle.BASE, weights_only=True)
    torch.save(dict(reversed(base.items())), folder / bundle.BASE)  # another file of the same tensors is the same base
    network = bundle.parser(folder).get_parsed_content("stock")
    paths = [str(folder / name) for name in (bundle.BASE, bundle.ADAPTER)]
    bundle_network.adapted(network, *paths, "0.")
    base["blocks.0.attn.qkv.weight"][0, 0] += 1e-3
    torch.save(base, folder / bundle.BASE)
    with pytest.raises(SystemExit, match="not the base that adapter.safetensors was trained on"):
        bundle_network.adapted(network, *paths, "0.")
    said = elsewhere(folder, "-m", "monai.bundle", "run", *CONFIG, "--dataset_dir", data, code=1)
    assert said.strip().splitlines()[-1].startswith("./models/base.pt: not the base that adapter.safetensors")
    assert "Traceback" not in said and not (folder / "eval/predictions.csv").exists()


def test_the_hash_of_a_bundle_is_that_of_adapters():
    generator = torch.Generator().manual_seed(0)
    state = {
        "b.weight": torch.randn(3, 4, generator=generator),
        "a": torch.tensor(7),
        "half": torch.randn(2, generator=generator).half(),
        "empty": torch.zeros(0, 3),
    }
    assert bundle_network.fingerprint(state) == identity.fingerprint(state)


def test_a_change_is_kept_in_factors_of_its_rank():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    before = {"low": draw(40, 30), "conv": draw(12, 3, 5, 5), "all": draw(8, 8), "bias": draw(5), "same": draw(6, 6)}
    up, down = draw(40, 3), 0.01 * draw(3, 30)
    after = dict(before)
    after["low"] = before["low"] + up @ down
    after["conv"] = before["conv"] + torch.einsum("o,iyx->oiyx", draw(12), draw(3, 5, 5))
    after |= {"all": draw(8, 8), "bias": before["bias"] + 1, "new": draw(2, 2)}
    change = bundle_network.changes(before, after)
    shapes = {name: tuple(v.shape) for name, v in change.items()}
    assert shapes == {
        "low.up": (40, 3), "low.down": (3, 30), "conv.up": (12, 1), "conv.down": (1, 75), "all": (8, 8), "bias": (5,),
        "new": (2, 2),
    }  # fmt: skip
    back = bundle_network.applied(before, change)
    assert back.keys() == after.keys()
    for name, value in after.items():
        torch.testing.assert_close(back[name], value, rtol=1e-6, atol=1e-6)
    loops = [
        [sum(float(u) * float(d) for u, d in zip(up[i], down[:, j], strict=True)) for j in range(30)] for i in range(40)
    ]
    product = change["low.up"].double() @ change["low.down"].double()
    torch.testing.assert_close(product, torch.tensor(loops, dtype=torch.float64), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("method", "options", "format", "reason"),
    [
        ("audio.soft_moa", EMBEDDED, "monai-bundle-adapter", "a mixture's output depends on all tokens at once"),
        ("lora", (*TINY, "--set", "head.kind=ifa"), "monai-bundle-adapter", "--format monai-bundle takes it"),
        ("lora", TINY, "monai", "did you mean monai-bundle"),
    ],
)
def test_what_a_bundle_cannot_hold_is_refused_in_one_line(trained, adapt, tmp_path, method, options, format, reason):
    _, err = adapt("export", trained(method, *options), "--format", format, "--out", tmp_path / "x", code=2)
    assert reason in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "x").exists()


def test_the_formats_of_pictures_are_there_too(trained, adapt, tmp_path):
    found, _ = adapt("export", trained("lora", *TINY), "--format", "timm", "--out", tmp_path / "timm", "--json")
    assert found["max_difference"] < 1e-5


# ---- metadata


def test_metadata_is_checked_without_a_network(trained, adapt, tmp_path):
    adapt("export", trained("lora", *TINY), "--format", "monai-bundle", "--out", tmp_path / "bundle")
    found = json.loads((tmp_path / "bundle" / bundle.METADATA).read_text())
    assert bundle.metadata_problems(found) == []
    assert bundle.metadata_problems({**found, "version": 1}) == ["version is a int, a str is expected"]
    assert bundle.metadata_problems({k: v for k, v in found.items() if k != "task"}) == ["task is missing"]
    layout = found["network_data_format"]
    assert bundle.metadata_problems({**found, "network_data_format": {"inputs": layout["inputs"]}}) == [
        "network_data_format.outputs is missing or empty"
    ]
    layout["outputs"]["pred"]["num_channels"] = 3
    del layout["inputs"]["image"]["dtype"]
    assert bundle.metadata_problems(found) == [
        "network_data_format.inputs.image.dtype is missing",
        "network_data_format.outputs.pred.channel_def names 2 of 3 channels",
    ]


@pytest.mark.parametrize("label", ["$__import__('os').getcwd()", "@device", "%configs", "grade @#1"])
def test_a_label_that_monai_would_run_is_refused(label):
    parts = {name: bundle.tensor("image", "x", {"0": "a"}, [1]) for name in ("inputs", "processed")}
    with pytest.raises(ValueError, match="would be read as an expression by MONAI"):
        bundle.metadata("t", "d", outputs=bundle.tensor("tuples", "x", {"0": label}, []), packages=(), **parts)


def test_other_marks_in_labels_come_through(tmp_path):
    labels = ["5 % or more", "grade #2", "a@b", 'the "other", one']
    pred = bundle.tensor("tuples", "classes", bundle.channels(labels), [])
    image = bundle.tensor("image", "x", {"0": "a"}, [1])
    own = bundle_tasks.classification(FrontEnd(), multilabel=False, normalises=False)
    files = {
        bundle.METADATA: bundle.metadata("t", "d", image, pred, pred, ()),
        bundle.CONFIG: bundle.inference({}, own),
    }
    (tmp_path / "configs").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    header = bundle.parser(tmp_path).get_parsed_content("header")
    assert next(csv.reader([header])) == ["path", *labels]


# ---- masks


@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("size", [(70, 81), (80, 71), (33, 100), (48, 40), (101, 20)])
def test_maps_come_back_to_a_picture_as_for_adapters(fit, size):
    from monai.bundle import ConfigParser

    front = FrontEnd((48, 40), fit=fit)
    parser = ConfigParser(bundle.inference({}, bundle_tasks.pictures_with_masks(front)))
    maps = torch.rand(2, *front.size, generator=torch.Generator().manual_seed(0))
    found = parser.get_parsed_content("at_size")(maps, size)
    assert torch.equal(found, at_size(maps, size, front))
    assert np.array_equal(parser.get_parsed_content("labelled")(found)[0], labels_of(found.numpy()))


@pytest.mark.parametrize(
    "options",
    [("--set", "front_end.fit=pad"), pytest.param(("--set", "head.kind=unet"), marks=pytest.mark.slow)],
)
def test_masks_of_pictures_lie_on_their_pixels(adapt, data, tmp_path, options):
    from adaptsuite.medical.seg_predict import Segmenter

    rows = ["path,mask,group"]
    for i in range(24):
        size = Image.open(data / f"{i}.png").size
        mask = np.ones(size[::-1], dtype=np.uint8)  # one class is nearly everywhere, so that it is learned at once
        mask[20:50, 20:60] = 2 * (i % 2)
        Image.fromarray(mask).save(tmp_path / f"{i}_mask.png")
        shutil.copy(data / f"{i}.png", tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{i}_mask.png,p{i}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    task = ("--set", "data.task=segmentation", "--set", "data.classes=around,lesion", "--method", "lora", *options)
    adapt(
        "train",
        "--data",
        tmp_path,
        *TINY,
        *task,
        "--epochs",
        "4",
        "--set",
        "plan.head_lr=0.03",
        "--out",
        tmp_path / "run",
    )
    adapt("export", tmp_path / "run", "--format", "monai-bundle", "--out", tmp_path / "bundle")
    run_here(tmp_path / "bundle", data, tmp_path / "out")
    segmenter, there = Segmenter(tmp_path / "run", device="cpu"), 0
    for path in sorted(data.glob("*.png")):
        own = segmenter.predict(path).mask
        found = np.asarray(Image.open(tmp_path / "out" / f"{path.stem}_mask.png"))
        assert found.shape == own.shape and (found != own).mean() < 1e-3
        there += own.any()
    assert there
    assert "_mask.png` at the size of each picture" in (tmp_path / "bundle/docs/README.md").read_text()


UNETR = (
    "monai:UNETR?in_channels=1&out_channels=2&img_size=32,32,32&feature_size=8&hidden_size=48&mlp_dim=96&num_heads=4"
)
SEEN = {"size": (32, 32, 32), "window_hu": (60.0, 150.0), "spacing_mm": (3.0, 2.5, 3.5)}


def volume_adapter(method="lora", name=UNETR, **options):
    net = load_backbone(name, random_weights=True, **options)
    handle = attach(net, method, head="out", sample=(torch.rand(1, 1, 32, 32, 32),))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in handle.adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return handle


@pytest.fixture
def nifti(tmp_path):
    """A folder with a volume whose axes grow to the left, the back and the head, of 1.5 x 2 x 3 mm."""
    import nibabel

    folder = tmp_path / "volumes"
    folder.mkdir()
    d, h, w = np.meshgrid(*(np.linspace(0, 3, n) for n in (40, 46, 30)), indexing="ij")
    values = 80 * np.sin(2 * d) * np.cos(h) + 40 * w + np.random.default_rng(0).normal(size=d.shape)
    affine = np.diag([-1.5, -2.0, 3.0, 1.0])
    affine[:3, 3] = 10, 20, -5
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), folder / "case.nii.gz")
    return folder


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_volumes_get_masks_on_their_grid_without_this_package(elsewhere, nifti, tmp_path, apart):
    import nibabel

    handle = volume_adapter()
    before = identity.fingerprint(handle.model.state_dict())
    found = export_volumes(handle, tmp_path / "bundle", ("liver", "tumour"), **SEEN, apart=apart)
    assert found["max_difference"] < 1e-4 and identity.fingerprint(handle.model.state_dict()) == before
    elsewhere(
        tmp_path / "bundle",
        "-m",
        "monai.bundle",
        "run",
        *CONFIG,
        "--dataset_dir",
        nifti,
        "--output_dir",
        tmp_path / "out",
    )
    source, mask = (nibabel.load(path) for path in (nifti / "case.nii.gz", tmp_path / "out/case_mask.nii.gz"))
    assert mask.shape == source.shape and np.array_equal(mask.affine, source.affine)
    volume = read_volume(nifti / "case.nii.gz")
    seen = volume.oriented("SPL").windowed(SEEN["window_hu"])
    probabilities = segment_volume(handle.model, seen, SEEN["size"], SEEN["spacing_mm"])
    labels = torch.from_numpy(labels_of(probabilities.values.numpy())).float()
    own = probabilities.with_values(labels).on_grid(volume).values.numpy()
    theirs = read_volume(tmp_path / "out/case_mask.nii.gz").values.numpy()
    assert len(np.unique(own)) > 1
    assert (own != theirs).mean() < 1e-3


def test_what_no_bundle_of_volumes_can_hold_is_refused(tmp_path):
    options = {"classes": ("liver", "tumour"), "size": (32, 32, 32)}
    with pytest.raises(UsageError, match="'bottleneck' cannot be: .*; train lora"):
        export_volumes(volume_adapter("bottleneck"), tmp_path / "x", **options)
    with pytest.raises(UsageError, match="3 classes need as many maps"):
        export_volumes(volume_adapter(), tmp_path / "x", ("a", "b", "c"), (32, 32, 32))
    handle = volume_adapter(name=UNETR.replace("&feature_size=8", ""), feature_size=8)
    with pytest.raises(UsageError, match="does not build this UNETR: give its options in the name"):
        export_volumes(handle, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()
