"""Generated sounds: what a latent fixes, what a render may change, and the data set made of them."""

import csv

import numpy as np
import pytest
import torch

from adaptsuite.audio import synthetic
from adaptsuite.audio.features import Fbank
from adaptsuite.audio.synthetic import EVENT_AXES, NAMES, Latent, make_dataset, mutate, render, sample_latent, scene


def picture(latent, seed, num_samples=16000, dry=True):
    rng = np.random.default_rng(seed)
    wave = render([scene(latent, num_samples, rng)], num_samples, rng, dry)
    return Fbank(64, 50.0, 7800.0)(wave)[0]


def test_renders_are_finite_bounded_and_of_the_length_asked_for():
    rng = np.random.default_rng(0)
    latents = [sample_latent(rng) for _ in range(24)]
    wave = render([scene(x, 12345, rng) for x in latents], 12345, rng)
    assert wave.shape == (24, 12345) and bool(wave.isfinite().all())
    assert wave.abs().max() <= 1 and bool((wave.abs().amax(1) > 0.005).all())


def test_equal_seeds_give_equal_sounds_and_others_do_not():
    latent = sample_latent(np.random.default_rng(1))
    assert torch.equal(picture(latent, 2), picture(latent, 2))
    assert not torch.equal(picture(latent, 2), picture(latent, 3))


def test_two_renders_of_one_latent_are_nearer_than_renders_of_two():
    rng = np.random.default_rng(0)
    latents = [sample_latent(rng, speech=0.0) for _ in range(24)]
    first, second = (torch.stack([picture(x, seed).mean(0) for x in latents]) for seed in (0, 1))
    distance = torch.cdist(first - first.mean(1, keepdim=True), second - second.mean(1, keepdim=True))
    assert (distance.argmin(1) == torch.arange(24)).float().mean() > 0.5


@pytest.mark.parametrize(("phoneme", "low_hz", "high_hz"), [("s", 3500, 8000), ("u", 200, 1000), ("m", 100, 600)])
def test_a_phoneme_sounds_where_its_resonances_are(phoneme, low_hz, high_hz):
    rng = np.random.default_rng(0)
    source = synthetic.speak(Latent([NAMES.index(phoneme)]), 16000, rng)
    power = torch.fft.rfft(render([[source]], 16000, rng, dry=True)[0]).abs().square()
    hz = torch.linspace(0, 8000, len(power))
    assert power[(hz >= low_hz) & (hz <= high_hz)].sum() > 0.7 * power.sum()


def test_the_order_of_phonemes_is_heard():
    a, s = NAMES.index("ah"), NAMES.index("s")
    for word, rises in (([a, s], True), ([s, a], False)):
        x = picture(Latent(word), 0)
        sounding = x[x.mean(1) > x.mean(1).max() - 6]
        half = len(sounding) // 2
        treble = sounding[:, 50:].mean(1) - sounding[:, 5:25].mean(1)
        assert (treble[half:].mean() > treble[:half].mean()) == rises


def test_a_mutant_differs_in_little():
    rng = np.random.default_rng(0)
    word = sample_latent(rng, speech=1.0, syllables=3)
    other = mutate(word, rng)
    assert len(word.phonemes) == len(other.phonemes)
    assert sum(a != b for a, b in zip(word.phonemes, other.phonemes, strict=True)) <= 1
    event = sample_latent(rng, speech=0.0)
    assert 1 <= (event.values != mutate(event, rng).values).sum() <= 3


def test_targets_name_either_a_word_or_an_event():
    rng = np.random.default_rng(0)
    word, event = (synthetic.targets(sample_latent(rng, speech)) for speech in (1.0, 0.0))
    axes = len(EVENT_AXES)
    assert word.shape == event.shape == (synthetic.TARGETS,)
    assert np.isnan(word[:axes]).all() and np.isfinite(word[axes:]).all()
    assert np.isfinite(event[:axes]).all() and np.isnan(event[axes:]).all()


def read_rows(manifest):
    with open(manifest, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_a_data_set_has_the_clips_asked_for_and_groups_within_folds(tmp_path):
    import soundfile

    rows = read_rows(make_dataset(tmp_path, num_classes=3, clips_per_class=12, seconds=0.5))
    assert list(rows[0]) == ["path", "label", "group", "fold"]
    assert [sum(r["label"] == k for r in rows) for k in ("sound0", "sound1", "sound2")] == [12, 12, 12]
    folds = {}
    for row in rows:
        assert folds.setdefault(row["group"], row["fold"]) == row["fold"]
        assert soundfile.info(tmp_path / row["path"]).frames == 8000
    assert set(folds.values()) == {"1", "2", "3", "4"}
    assert len(folds) == 12  # three clips a group


def test_a_data_set_is_the_same_for_the_same_seed(tmp_path):
    kinds = {"num_classes": 2, "clips_per_class": 3, "seconds": 0.3}
    first, again, other = (make_dataset(tmp_path / n, seed=s, **kinds) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    for row in read_rows(first):
        sound = (first.parent / row["path"]).read_bytes()
        assert sound == (again.parent / row["path"]).read_bytes()
        assert sound != (other.parent / row["path"]).read_bytes()
