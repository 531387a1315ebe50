"""Runs on cached features against runs that are not: the same adapters, and a frozen part that is not run again."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adaptsuite import experiment
from adaptsuite.commands import read_recipe
from adaptsuite.errors import UsageError
from adaptsuite.replay import CachedRows, rows_digest

STILL = "augment.flip=false"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTSUITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def ran(monkeypatch):
    """Samples that went through the last block of the embedded networks."""
    from timm.models.vision_transformer import Block

    counted, whole = SimpleNamespace(samples=0), Block.forward

    def forward(self, x, *args, **kwargs):
        counted.samples += len(x)
        return whole(self, x, *args, **kwargs)

    monkeypatch.setattr(Block, "forward", forward)
    return counted


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from adaptsuite.vision.synthetic import make_dataset

    table = make_dataset(tmp_path_factory.mktemp("pictures"), cultivars=3, shots=8, tests=4, size=48)
    text = table.read_text().splitlines()
    parts = iter(range(1000))  # every fourth training row is for validation
    lines = [line.replace(",train,", ",val,") if "train" in line and next(parts) % 4 == 3 else line for line in text]
    table.write_text("\n".join(lines) + "\n")
    return table


def vision():
    """Without the report's pictures, which take longer than all the rest."""
    from adaptsuite.vision.pipeline import VisionDomain

    class Plain(VisionDomain):
        def extra(self, handle, dataset, outputs):
            return []

    return Plain()


def settled(domain, table, method, *settings):
    """Recipe and table of three epochs, of small pictures."""
    size = ("front_end.frames", 96) if domain.name == "audio" else ("front_end.size", 48)
    backbone = f"embedded:{'audio' if domain.name == 'audio' else 'vision'}-tiny"
    options = {"data": str(table), "backbone": backbone, "method": method, "epochs": 3, "size": size}
    return experiment.settle(domain, read_recipe(domain, {**options, "setting": settings}))


def run(domain, table, out, *settings, method="linear", said=None):
    """(tensors of the adapter, result) of a run."""
    recipe, manifest = settled(domain, table, method, *settings)
    result, _ = experiment.train(domain, recipe, manifest, out, [].append if said is None else said.append)
    adapter = result["adapter"] if isinstance(result["adapter"], str) else result["adapter"][0]
    return load_file(f"{adapter}/adapter.safetensors"), result


def assert_same(a, b, close=1e-4):
    """Relative to each tensor's largest value: features agree to 1e-6, and an optimiser's first steps widen that."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=close * float(a[name].abs().max()) + 1e-7)


def told(said):
    return [line for line in said if line.startswith("cache")]


def test_a_probe_learns_the_same_from_the_cache_and_the_backbone_runs_once(tmp_path, pictures, folder, ran):
    said = []
    kept, result = run(vision(), pictures, tmp_path / "a", STILL, said=said)
    assert len(told(said)) == 1 and "36 samples" in told(said)[0] and "computed in" in told(said)[0]
    assert str(folder) in told(said)[0] and "at most 20 GiB" in told(said)[0]
    few, ran.samples = ran.samples, 0
    said.clear()
    run(vision(), pictures, tmp_path / "more", STILL, "plan.epochs=6", said=said)
    assert "found" in told(said)[0] and len(list(folder.iterdir())) == 1
    assert few - ran.samples == 6 * 36  # blocks x samples: the entry; epochs cost none
    online, expected = run(vision(), pictures, tmp_path / "b", STILL, "plan.cache=off", said=said)
    assert len(told(said)) == 1 and ran.samples > 2 * few
    assert_same(kept, online)
    for part in ("val", "test"):
        for name, found in expected["metrics"][part].items():
            assert result["metrics"][part][name]["value"] == pytest.approx(found["value"], abs=1e-5)


def test_folds_and_seeds_share_one_entry(tmp_path, pictures, folder, ran):
    said = []
    lines = pictures.read_text().splitlines()
    table = pictures.with_name("folds.csv")
    table.write_text("\n".join([f"{lines[0]},fold", *(f"{line},{i % 2}" for i, line in enumerate(lines[1:]))]) + "\n")
    settings = (STILL, "data.cv=fold", "data.val=none", "seeds=0,1", "plan.epochs=1", "plan.warmup=0")
    run(vision(), table, tmp_path / "a", *settings, said=said)
    assert ["computed" in line for line in told(said)] == [True, False, False, False]
    assert len(list(folder.iterdir())) == 1


def test_what_decides_the_features_decides_the_entry(tmp_path, pictures, folder):
    def entries(*settings):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run(vision(), pictures, out, STILL, "plan.epochs=1", "plan.warmup=0", *settings)
        return len(list(folder.iterdir()))

    assert entries() == 1
    assert entries("head.start=random") == 1  # the same features
    assert entries("head.pool=cls") == 2
    assert entries("front_end.size=36") == 3
    path = next(pictures.parent.glob("*/*.png"))
    other = next(p for p in pictures.parent.glob("*/*.png") if p.parent != path.parent)
    mine, stat = path.read_bytes(), path.stat()
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try:
        assert entries() == 4  # the file's content, not its name
    finally:
        path.write_bytes(mine)


def test_an_entry_whose_values_are_wrong_is_computed_again(tmp_path, pictures, folder):
    kept, _ = run(vision(), pictures, tmp_path / "a", STILL)
    (entry,) = folder.glob("*/entered.npy")
    wrong = np.load(entry) + 1
    np.save(entry, wrong)
    said = []
    again, _ = run(vision(), pictures, tmp_path / "b", STILL, said=said)
    assert "computed" in told(said)[0] and not np.array_equal(np.load(entry), wrong)
    assert_same(kept, again, 0)


def test_augmented_training_runs_on_as_many_views_as_are_asked_for(tmp_path, pictures, folder, ran):
    said = []
    run(vision(), pictures, tmp_path / "a", said=said)  # flips, by default
    assert "off: augment.flip draws at random" in told(said)[0] and not folder.exists()
    said.clear()
    run(vision(), pictures, tmp_path / "b", "plan.cache=3", said=said)
    assert "36 samples, 3 views of training rows" in told(said)[0]
    views = sorted((np.load(path) for path in folder.glob("*/entered.npy")), key=len)
    assert [len(view) for view in views] == [18, 18, 18, 36]
    flipped = [float((a != b).any(1).mean()) for a, b in zip(views, views[1:3], strict=False)]
    assert all(0.1 < share < 0.9 for share in flipped)  # half of the pictures
    with pytest.raises(UsageError, match=r"plan.cache=2: augment.mixup mixes samples"):
        run(vision(), pictures, tmp_path / "c", "plan.cache=2", "augment.mixup=0.5")


def test_every_draw_takes_one_of_the_views():
    data = SimpleNamespace(item_targets=np.zeros(1, int), input="image")
    entries = [{"entered": np.full((1, 2), view, np.float32)} for view in range(3)]
    rows = CachedRows(data, entries, np.array([0]), "label", torch.zeros(1))
    torch.manual_seed(0)
    drawn = [int(rows[0]["entered"][0]) for _ in range(300)]
    assert all(70 < drawn.count(view) < 130 for view in range(3))


def test_adapters_of_late_blocks_learn_the_same_from_the_cache(tmp_path, pictures, ran):
    settings, said = (STILL, "blocks=5"), []
    kept, _ = run(vision(), pictures, tmp_path / "a", *settings, "plan.cache=1", method="kadaptation", said=said)
    few, ran.samples = ran.samples, 0
    assert "computed" in told(said)[0]
    said.clear()
    online, _ = run(vision(), pictures, tmp_path / "b", *settings, method="kadaptation", said=said)
    assert not told(said) and few < 0.7 * ran.samples  # auto is for probes
    assert_same(kept, online, 1e-3)
    with pytest.raises(UsageError, match="plan.cache=1: no block lies before"):
        run(vision(), pictures, tmp_path / "c", STILL, "plan.cache=1", method="kadaptation")


def test_a_cache_without_room_is_no_reason_to_stop(tmp_path, pictures, folder, monkeypatch):
    monkeypatch.setenv("ADAPTSUITE_CACHE_GIB", "1e-6")
    said = []
    run(vision(), pictures, tmp_path / "a", STILL, said=said)
    assert "off: " in told(said)[0] and "ADAPTSUITE_CACHE_GIB" in told(said)[0]


@pytest.mark.parametrize("method", ["linear", "audio.prototypes"])
def test_sounds_of_several_windows_and_lengths_are_heard_the_same_from_the_cache(tmp_path, method):
    """The linear probe trains the final norm: its tokens are kept, and the lengths that mask them."""
    import soundfile

    from adaptsuite.audio.pipeline import DOMAIN
    from adaptsuite.audio.synthetic import make_dataset

    table = make_dataset(tmp_path / "data", num_classes=2, clips_per_class=6, seconds=1.0, folds=2)
    for i, path in enumerate(sorted((tmp_path / "data").rglob("*.wav"))):
        wave, rate = soundfile.read(path)
        soundfile.write(path, wave[: len(wave) // 2] if i % 3 == 0 else np.concatenate([wave] * (1 + i % 2)), rate)
    settings, said = ("data.test=fold=1", "data.val=none", "plan.epochs=2", "plan.lr=1e-3"), []
    kept, result = run(DOMAIN, table, tmp_path / "a", *settings, method=method, said=said)
    assert "computed" in told(said)[0]
    online, expected = run(DOMAIN, table, tmp_path / "b", *settings, "plan.cache=off", method=method)
    assert_same(kept, online, 1e-3)
    for name, found in expected["metrics"]["test"].items():
        assert result["metrics"]["test"][name]["value"] == pytest.approx(found["value"], abs=1e-4)


def test_nearest_neighbours_of_a_table_read_its_features_once(tmp_path, folder, ran):
    from adaptsuite.medical import probes
    from adaptsuite.medical.pipeline import MedicalDomain
    from adaptsuite.medical.synthetic import make_dataset

    table = make_dataset(tmp_path / "data", patients=4, count=2, size=48)
    recipe, manifest = settled(MedicalDomain(), table, "linear")
    said = []
    first = probes.features(MedicalDomain(), recipe, manifest, say=said.append)
    assert "computed" in said[0]
    once, ran.samples = ran.samples, 0
    again = probes.features(MedicalDomain(), recipe, manifest, say=said.append)
    assert "found" in said[1] and once - ran.samples == 6 * len(manifest)  # blocks x rows
    assert (first.cls == again.cls).all() and (first.mean == again.mean).all()
    off = replace(recipe, plan={**recipe.plan, "cache": "off"})
    assert (probes.features(MedicalDomain(), off, manifest).mean == first.mean).all()


def test_a_folder_of_files_is_known_by_what_all_of_them_hold(tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    for name in "ab":
        (series / name).write_text(name)
    before = rows_digest([series])
    assert rows_digest([series]) == before
    (series / "b").write_text("x")
    os.utime(series / "b", (1, 1))
    assert rows_digest([series]) != before
