"""`adapt audio stats`: the numbers are those of the training rows' real frames, and can be put into a recipe."""

import numpy as np
import pytest
import soundfile
import torch

from adaptsuite.audio import stats
from adaptsuite.audio.features import Fbank
from adaptsuite.audio.pipeline import DOMAIN
from adaptsuite.audio.stats import dataset_statistics, mean_and_std, moments
from adaptsuite.errors import DataError
from adaptsuite.recipe import DataSettings, Recipe

RATE = 16000


@pytest.fixture
def table(tmp_path):
    """Twelve noises of several lengths, each louder than the one before, in three folds."""
    rng, lines = np.random.default_rng(0), ["path,label,fold"]
    for i in range(12):
        wave = 0.01 * (i + 1) * rng.normal(size=RATE // 2 + 777 * i)
        soundfile.write(tmp_path / f"{i}.wav", wave, RATE, subtype="FLOAT")
        lines.append(f"{i}.wav,{'ab'[i % 2]},{i % 3}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "manifest.csv"


def recipe(table, **data):
    return Recipe("audio", data=DataSettings(manifest=str(table), **{"val": "none", **data}))


def log_mel(table, numbers):
    """(frames, F) of whole files, one after another."""
    waves = [soundfile.read(table.parent / f"{i}.wav", dtype="float32")[0] for i in numbers]
    return torch.cat([Fbank(128)(torch.from_numpy(wave)[None])[0] for wave in waves]).double()


def test_statistics_are_those_of_all_frames_of_the_training_rows(table):
    lines, found = dataset_statistics(DOMAIN, recipe(table, test="fold=2"))
    frames = log_mel(table, [i for i in range(12) if i % 3 != 2])
    assert found["rows"] == 8 and found["frames"] == len(frames) and found["rates_hz"] == {"16000": 8}
    assert found["mean"] == pytest.approx(float(frames.mean()), abs=1e-6)
    assert found["std"] == pytest.approx(float(frames.std(correction=0)), abs=1e-6)
    assert lines[-1].endswith(f"--set front_end.mean={found['mean']:.4f} --set front_end.std={found['std']:.4f}")


def test_each_fold_has_its_own_statistics_and_all_rows_together_theirs(table):
    _, found = dataset_statistics(DOMAIN, recipe(table, cv="fold"))
    for k, fold in enumerate(found["folds"]):
        assert fold["mean"] == pytest.approx(float(log_mel(table, [i for i in range(12) if i % 3 != k]).mean()))
    assert found["mean"] == pytest.approx(float(log_mel(table, range(12)).mean()))


@pytest.mark.parametrize("extra", [0, 1, 159, 239, 240, 241, 399])
def test_blocks_add_up_to_the_whole_file(tmp_path, monkeypatch, extra):
    wave = torch.randn(7 * 160 * 3 + extra, generator=torch.Generator().manual_seed(0)) * 0.1
    soundfile.write(tmp_path / "a.wav", wave.numpy(), RATE, subtype="FLOAT")
    x = Fbank(32)(wave[None])[0].double()
    monkeypatch.setattr(stats, "BLOCK", 7)
    found = mean_and_std(moments(tmp_path / "a.wav", Fbank(32), RATE))
    assert found["frames"] == len(x)
    assert (found["mean"], found["std"]) == pytest.approx((float(x.mean()), float(x.std(correction=0))), abs=1e-6)


def test_a_file_below_one_frame_counts_as_the_one_frame_that_the_model_makes_of_it(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(100, 0.1), RATE)
    assert moments(tmp_path / "a.wav", Fbank(32), RATE)[0] == 1


def test_normalised_with_its_own_statistics_a_data_set_has_mean_0_and_std_a_half(table):
    _, found = dataset_statistics(DOMAIN, recipe(table, test="fold=2"))
    x = (log_mel(table, [i for i in range(12) if i % 3 != 2]) - found["mean"]) / (2 * found["std"])
    assert abs(float(x.mean())) < 1e-6 and float(x.std(correction=0)) == pytest.approx(0.5, abs=1e-6)


def test_silence_alone_has_no_scale(table):
    for path in table.parent.glob("*.wav"):
        soundfile.write(path, np.zeros(4000), RATE)
    with pytest.raises(DataError, match="all 8 training files are digital silence"):
        dataset_statistics(DOMAIN, recipe(table, test="fold=2"))
