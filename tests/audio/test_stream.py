"""Streams: windows and events do not depend on how the sound arrives, times are exact, memory stays the same."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchaudio.functional import resample

from adaptsuite.audio.events import EventSettings
from adaptsuite.audio.stream import Resampler, Stream, WindowScores
from adaptsuite.errors import DataError, UsageError

RATE, WINDOW = 1000, 400


class Ear(nn.Module):
    """Hears how loud a window is: labels loud and quiet, 400 samples at 1 kHz."""

    front_end, num_samples = SimpleNamespace(sample_rate_hz=RATE), WINDOW

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, wave, length):
        assert not self.training and wave.shape == (len(length), WINDOW)
        self.seen += [(w[:n].clone(), w[n:].abs().sum().item()) for w, n in zip(wave, length.tolist(), strict=True)]
        level = wave.abs().sum(1) / length
        return torch.stack([40 * (level - 0.1), -40 * (level - 0.1)], 1)


LABELS = ("loud", "quiet")


def noise(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=n).astype(np.float32)) * 0.1


def cut(wave, seed):
    """Pieces of 0 to 900 samples."""
    rng, at = np.random.default_rng(seed), 0
    while at < len(wave):
        size = int(rng.integers(0, 900))
        yield wave[at : at + size]
        at += size


def windows(wave, rate_hz=RATE, hop_s=0.15, batch_size=3, seed=None):
    scores = WindowScores(Ear(), rate_hz, hop_s, batch_size, "cpu")
    pieces = [wave] if seed is None else cut(wave, seed)
    found = [item for piece in pieces for item in scores.push(piece)] + list(scores.close())
    return [start for start, _ in found], np.array([row for _, row in found]), scores


@pytest.mark.parametrize("rate_hz", [1000, 2205, 4000, 44100])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_the_same_bits_however_the_sound_is_cut(rate_hz, batch_size):
    wave = noise(6 * rate_hz + 77)
    starts, scores, _ = windows(wave, rate_hz, batch_size=batch_size)
    for seed in range(3):
        again, others, _ = windows(wave, rate_hz, batch_size=batch_size, seed=seed)
        assert again == starts and np.array_equal(others, scores)


@pytest.mark.parametrize("rate_hz", [1000, 1600, 2205, 44100])
@pytest.mark.parametrize("seconds", [0.02, 0.4, 0.401, 0.55, 3.0, 5.13])
def test_windows_hold_what_the_whole_sound_resampled_holds_there(rate_hz, seconds):
    wave = noise(round(seconds * rate_hz))
    whole = resample(wave, rate_hz, RATE)
    starts, _, found = windows(wave, rate_hz, seed=1)
    last = max(len(whole) - WINDOW, 0)
    assert starts == sorted({*range(0, last + 1, 150), last})
    for start, (seen, beyond) in zip(starts, found.model.seen, strict=True):
        torch.testing.assert_close(seen, whole[start : start + WINDOW], rtol=0, atol=1e-6)
        assert beyond == 0


@pytest.mark.parametrize(("rate_hz", "new_hz"), [(8000, 16000), (44100, 16000), (11025, 16000), (96000, 16000)])
def test_a_resampled_stream_is_torchaudio_s_resampling_of_the_whole(rate_hz, new_hz):
    wave, resampler = noise(rate_hz + 123), Resampler(rate_hz, new_hz)
    pieces = [block for piece in cut(wave, 0) for block in resampler.push(piece)] + list(resampler.close())
    torch.testing.assert_close(torch.cat(pieces), resample(wave, rate_hz, new_hz), rtol=0, atol=1e-6)


def test_the_batch_size_does_not_change_what_is_heard():
    wave = noise(5000)
    starts, scores, _ = windows(wave, batch_size=1)
    for batch_size in (2, 7, 100):
        again, others, _ = windows(wave, batch_size=batch_size)
        assert again == starts
        np.testing.assert_allclose(others, scores, atol=1e-6)


def burst(seconds, start, end, rate_hz=RATE):
    wave = torch.zeros(round(seconds * rate_hz))
    wave[round(start * rate_hz) : round(end * rate_hz)] = 0.2
    return wave


def stream(rate_hz=RATE, **settings):
    return Stream(Ear(), LABELS, rate_hz, EventSettings(hop_s=0.01, ignore=("quiet",), **settings), device="cpu")


@pytest.mark.parametrize("rate_hz", [1000, 4000, 2205])
def test_an_event_lies_where_the_sound_was(rate_hz):
    """Half a window over the sound is the threshold, so both ends are exact to half a hop."""
    found = stream(rate_hz)
    (event,) = found.push(burst(10, 3.0, 5.0, rate_hz)) + found.close()
    assert event.label == "loud" and event.score > 0.9
    assert event.start_s == pytest.approx(3.0, abs=0.0051) and event.end_s == pytest.approx(5.0, abs=0.0051)


@pytest.mark.parametrize(
    ("task", "score"), [("multiclass", 1 / (1 + np.exp(-8))), ("multilabel", 1 / (1 + np.exp(-4)))]
)
def test_scores_of_several_labels_are_sigmoids_and_of_one_a_softmax(task, score):
    found = Stream(Ear(), LABELS, RATE, EventSettings(), task, device="cpu")
    (event,) = found.push(torch.full((1000,), 0.2)) + found.close()
    assert event.score == pytest.approx(score, abs=1e-5)


def test_events_are_the_same_however_the_sound_is_cut():
    wave = torch.cat([burst(1.3, 0.2, 0.9), burst(2.0, 0.5, 0.8), burst(1.5, 1.0, 1.5)]) + noise(4800) / 10
    whole = stream(smooth=3, merge_s=0.1)
    expected = whole.push(wave) + whole.close()
    for seed in range(3):
        pieces = stream(smooth=3, merge_s=0.1)
        assert [e for p in cut(wave, seed) for e in pieces.push(p.numpy())] + pieces.close() == expected
    assert len(expected) == 3


def test_a_live_event_comes_before_the_sound_ends():
    live = stream()
    assert live.push(burst(4.9, 3.0, 5.0)) == []
    (event,) = live.push(torch.zeros(600))
    assert event.end_s < 5.5 and live.close() == []


def test_an_event_that_lasts_to_the_end_ends_with_the_sound():
    wave = burst(2.0, 1.0, 2.0, 2205)[:-1]
    found = stream(2205)
    (event,) = found.push(wave) + found.close()
    assert event.end_s == len(wave) / 2205


@pytest.mark.parametrize("samples", [1, 37, 399, 400])
def test_a_sound_shorter_than_a_window_is_one_padded_window(samples):
    found = stream()
    (event,) = found.push(torch.full((samples,), 0.2)) + found.close()
    assert (event.start_s, event.end_s) == (0.0, samples / RATE)
    assert [len(seen) for seen, _ in found.windows.model.seen] == [samples]


def test_silence_and_nothing_at_all_give_no_event():
    silent, empty = stream(), stream()
    assert silent.push(torch.zeros(5000)) + silent.close() == []
    assert empty.push(torch.zeros(0)) + empty.close() == [] and empty.windows.model.seen == []


def values_kept(thing, seen=()):
    """Numbers in all tensors and arrays that an object holds, but not in its model."""
    if isinstance(thing, Tensor | np.ndarray):
        return thing.untyped_storage().size() // 4 if isinstance(thing, Tensor) else thing.size
    if isinstance(thing, nn.Module) or id(thing) in seen:
        return 0
    seen = (*seen, id(thing))
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    inner = inner or (list(thing) if type(thing).__name__ == "deque" else getattr(thing, "__dict__", {}).values())
    return sum(values_kept(value, seen) for value in inner)


@pytest.mark.parametrize("rate_hz", [1000, 44100])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_stream_keeps_one_window_and_one_batch_however_long_it_runs(rate_hz, batch_size):
    found = Stream(Ear(), LABELS, rate_hz, EventSettings(hop_s=0.2, smooth=5), batch_size=batch_size, device="cpu")
    found.windows.model.forward = lambda wave, length: torch.zeros(len(wave), 2)
    most = WINDOW + batch_size * 200 + rate_hz + 100  # samples waiting to be resampled are under a second
    for seconds in (20, 1, 7):
        found.push(torch.zeros(seconds * rate_hz))
        assert 0 < values_kept(found) <= most


def test_a_stream_leaves_the_model_in_the_mode_that_it_had():
    found = stream()
    found.windows.model.train()
    found.push(torch.zeros(1000))
    assert found.windows.model.training


@pytest.mark.parametrize(
    ("samples", "word"),
    [
        (np.zeros(10, np.int16), "int16"),
        (torch.tensor([0.0, float("nan")]), "NaN"),
        (np.array([np.inf]), "infinite"),
        (np.zeros((2, 10), np.float32), r"\(2, 10\)"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_with_the_reason(samples, word):
    with pytest.raises(DataError, match=word):
        stream().push(samples)


@pytest.mark.parametrize("samples", [np.zeros(500)[::-1], np.zeros(500, ">f4"), [0.0] * 500, torch.zeros(500).double()])
def test_any_layout_of_floats_is_taken(samples):
    assert stream().push(samples) == []


@pytest.mark.parametrize("rate_hz", [0, 999, 1e9, 44100.5, float("nan"), 767999])
def test_an_absurd_rate_is_refused(rate_hz):
    if rate_hz == 767999:  # coprime to 16 kHz: its filter would have 12e9 values
        Ear.front_end = SimpleNamespace(sample_rate_hz=16000)
    try:
        with pytest.raises(DataError, match="sample rate"):
            stream(rate_hz)
    finally:
        Ear.front_end = SimpleNamespace(sample_rate_hz=RATE)


@pytest.mark.parametrize("hop_s", [0.0001, 0.5])
def test_a_hop_of_no_sample_or_beyond_a_window_is_refused(hop_s):
    with pytest.raises(UsageError, match="hop"):
        WindowScores(Ear(), RATE, hop_s)


def test_a_closed_stream_takes_no_more():
    found = stream()
    found.close()
    with pytest.raises(UsageError, match="closed"):
        found.push(torch.zeros(10))
