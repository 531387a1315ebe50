"""Background noise from a folder, and what AudioTask's loss does with its settings."""

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

from adaptsuite.audio import noise
from adaptsuite.audio.noise import noise_like, recordings
from adaptsuite.audio.pipeline import DOMAIN, AudioTask, AugmentSettings
from adaptsuite.errors import DataError, UsageError
from adaptsuite.losses import asymmetric
from adaptsuite.recipe import Recipe

RATE = 16000


@pytest.fixture
def folder(tmp_path):
    """Two recordings whose samples tell where they are from."""
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "up.wav", np.arange(1, 301, dtype=np.float32) / 1000, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "deep" / "down.WAV", -np.arange(1, 51, dtype=np.float32) / 1000, RATE, subtype="FLOAT")
    (tmp_path / "notes.txt").write_text("not a sound")
    return tmp_path


def test_each_clip_gets_a_random_piece_of_a_random_file_and_short_ones_repeat(folder):
    torch.manual_seed(0)
    pieces = noise_like(torch.zeros(40, 120), str(folder)) * 1000
    up, down = pieces[pieces[:, 0] > 0], -pieces[pieces[:, 0] < 0]
    assert len(up) > 8 and len(down) > 8
    for piece, size in [(p, 300) for p in up] + [(p, 50) for p in down]:
        assert torch.equal(piece.round().diff() % size, torch.ones(119))
    assert len(set(up[:, 0].round().tolist())) > 5


def test_the_same_seed_draws_the_same_noise(folder):
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(noise_like(torch.zeros(4, 120), str(folder)))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_recordings_are_kept_within_a_bound(folder, monkeypatch):
    soundfile.write(folder / "long.wav", np.ones(5 * RATE, dtype=np.float32) * 0.1, RATE)
    monkeypatch.setattr(noise, "NOISE_BYTES", 3 * 2 * RATE * 4)  # two seconds of each of three files
    recordings.cache_clear()
    assert sorted(len(wave) for wave in recordings(str(folder))) == [50, 300, 2 * RATE]
    monkeypatch.setattr(noise, "NOISE_BYTES", 1000)
    recordings.cache_clear()
    with pytest.raises(DataError, match="3 files .* one second of each does not fit"):
        recordings(str(folder))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("absent", "is no folder"), ("empty", "no .wav"), ("text", "bad.wav: not readable"), ("silent", "silence")],
)
def test_noise_that_cannot_be_used_is_named(tmp_path, kind, message):
    recordings.cache_clear()
    if kind == "text":
        (tmp_path / "bad.wav").write_text("not a sound")
    if kind == "silent":
        soundfile.write(tmp_path / "bad.wav", np.zeros(100), RATE)
    with pytest.raises(DataError, match=f"augment.noise: .*{message}"):
        recordings(str(tmp_path / "x" if kind == "absent" else tmp_path))


class Echo(nn.Module):
    """Keeps what reaches the model; logits are set."""

    def __init__(self, logits=None):
        super().__init__()
        self.logits, self.head = logits, None

    def forward(self, wave, length, spec_masks):
        self.wave, self.length = wave, length
        return torch.zeros(len(wave), 3) if self.logits is None else self.logits


def batch(labels, lengths=(100, 60, 100, 60)):
    torch.manual_seed(0)
    length = torch.tensor(lengths)
    wave = torch.randn(4, 100) * (torch.arange(100) < length[:, None])
    return {"wave": wave, "length": length, "label": torch.as_tensor(labels)}


def test_every_augmentation_of_the_wave_leaves_padding_silent(folder):
    for settings in ({"gain_db": 6.0}, {"roll": True}, {"noise": "white"}, {"noise": "pink"}, {"noise": str(folder)}):
        given, model = batch([0, 1, 2, 0]), Echo()
        AudioTask("abc", augment=AugmentSettings(**settings)).loss(model, given)
        assert not model.wave[1, 60:].any() and not torch.equal(model.wave, given["wave"]), settings


def test_mixup_gives_every_label_its_share_of_several_too(monkeypatch):
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.75)
    given, logits = batch([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]), torch.randn(4, 3)
    torch.manual_seed(3)
    other = torch.randperm(4)
    torch.manual_seed(3)
    model = Echo(logits)
    loss = AudioTask("abc", "multilabel", AugmentSettings(mixup=1.0)).loss(model, given)
    hot = given["label"].float()
    expected = F.binary_cross_entropy_with_logits(logits, 0.75 * hot + 0.25 * hot[other])
    torch.testing.assert_close(loss, expected)
    assert torch.equal(model.length, torch.maximum(given["length"], given["length"][other]))


def test_the_loss_is_chosen_by_the_task_and_by_name():
    logits, hot = torch.randn(4, 3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    given = batch(hot)
    binary = AudioTask("abc", "multilabel").loss(Echo(logits), given)
    torch.testing.assert_close(binary, F.binary_cross_entropy_with_logits(logits, hot))
    smooth = AudioTask("abc", "multilabel", AugmentSettings(label_smoothing=0.2)).loss(Echo(logits), given)
    torch.testing.assert_close(smooth, F.binary_cross_entropy_with_logits(logits, hot * 0.8 + 0.1))
    focused = AudioTask("abc", "multilabel", loss="asymmetric").loss(Echo(logits), given)
    torch.testing.assert_close(focused, asymmetric(logits, hot))
    single = AudioTask("abc").loss(Echo(logits), batch([0, 1, 2, 0]))
    torch.testing.assert_close(single, F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])))
    with pytest.raises(UsageError, match="head.loss=asymmetric .* data.task=multilabel"):
        AudioTask("abc", loss="asymmetric")


def test_a_run_reads_the_folder_as_it_is_now_and_stops_at_a_bad_file(folder):
    table = Recipe("audio", augment={"noise": str(folder)}, front_end={"frames": 50})
    DOMAIN.settle(table, [folder / "up.wav"])
    (folder / "bad.wav").write_bytes(b"")
    with pytest.raises(DataError, match="bad.wav: the file is empty"):
        DOMAIN.settle(table, [folder / "up.wav"])


def test_ratios_in_the_wrong_order_are_refused():
    with pytest.raises(UsageError, match="lower ratio first"):
        AugmentSettings(noise_snr_db=(20.0, 5.0))
