"""Reading audio: what goes right, and one clear line for each file that cannot be used."""

import numpy as np
import pytest
import soundfile
import torch

from adaptsuite.audio.data import Windows, inspect, read, survey, window_starts
from adaptsuite.errors import DataError

RATE = 16000


@pytest.fixture
def write(tmp_path):
    def make(samples, rate=RATE, name="a.wav", subtype="FLOAT"):
        path = tmp_path / name
        soundfile.write(path, samples, rate, subtype=subtype)
        return path

    return make


def tone(seconds, hz=440.0, rate=RATE):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def test_channels_are_averaged(write):
    left, right = tone(0.1), tone(0.1, 880)
    torch.testing.assert_close(
        read(write(np.stack([left, right], 1)), RATE), torch.from_numpy((left + right) / 2), rtol=0, atol=1e-6
    )


def test_other_rates_are_resampled_to_the_same_sound(write):
    wave = read(write(tone(0.5, rate=44100), 44100), RATE)
    assert len(wave) == pytest.approx(RATE / 2, abs=2)
    middle = slice(1000, 7000)
    torch.testing.assert_close(wave[middle], torch.from_numpy(tone(0.5))[: len(wave)][middle], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "subtype"), [("a.flac", "PCM_16"), ("a.ogg", "VORBIS"), ("A.WAV", "PCM_16"), ("a.mp3", None)]
)
def test_formats_are_read_without_torchcodec(write, name, subtype):
    assert read(write(tone(0.5), name=name, subtype=subtype), RATE).abs().max() > 0.3


def test_a_piece_of_a_file_is_that_piece(write):
    path, wave = write(tone(1.0)), torch.from_numpy(tone(1.0))
    assert torch.equal(read(path, RATE, 0.25, 0.5), wave[RATE // 4 : 3 * RATE // 4])


def broken(tmp_path, kind):
    path = tmp_path / f"{kind}.wav"
    soundfile.write(path, tone(0.5), RATE, subtype="PCM_16")
    data = path.read_bytes()
    if kind == "empty":
        data = b""
    elif kind == "text":
        data = b"this is not a sound"
    elif kind == "image":
        data = b"\x89PNG\r\n\x1a\n" + bytes(100)
    path.write_bytes(data)
    if kind == "nan":
        soundfile.write(path, np.array([0.1, np.nan, 0.2], dtype=np.float32), RATE, subtype="FLOAT")
    if kind == "inf":
        soundfile.write(path, np.array([0.1, np.inf, 0.2], dtype=np.float32), RATE, subtype="FLOAT")
    if kind == "no samples":
        soundfile.write(path, np.zeros(0, dtype=np.float32), RATE)
    if kind == "rate":
        soundfile.write(path, tone(0.01), 1)
    if kind == "channels":
        soundfile.write(path, np.zeros((4, 64), dtype=np.float32), RATE)
    if kind == "missing":
        path.unlink()
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "0 bytes"),
        ("text", "not readable as audio"),
        ("image", "not readable as audio"),
        ("nan", "NaN"),
        ("inf", "infinite"),
        ("no samples", "no samples"),
        ("rate", "sample rate 1 Hz"),
        ("channels", "64 channels"),
        ("missing", "no such file"),
    ],
)
def test_a_bad_file_is_named_with_its_reason(tmp_path, kind, reason):
    path = broken(tmp_path, kind)
    with pytest.raises(DataError, match=reason) as error:
        read(path, RATE)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_flac_is_not_read_as_if_it_were_whole(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).normal(size=RATE).astype(np.float32) * 0.1, RATE)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(DataError, match="truncated|damaged|not readable"):
        read(path, RATE)


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.mp3", "a.ogg"])
def test_no_format_is_read_as_if_half_of_it_were_all(tmp_path, name):
    path = tmp_path / name
    soundfile.write(path, np.random.default_rng(0).normal(size=RATE) * 0.1, RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(DataError, match="truncated|no samples"):
        read(path, RATE)


def test_a_wav_of_unknown_length_from_a_pipe_is_read_to_its_end(write):
    path = write(tone(0.5), subtype="PCM_16")
    data = bytearray(path.read_bytes())
    at = data.index(b"data")
    data[at + 4 : at + 8] = data[4:8] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert inspect(path).seconds == 0.5


def test_windows_cover_a_clip_and_end_with_it():
    assert window_starts(3.0, 5.0) == [0.0] and window_starts(5.0, 4.995) == [0.0]
    assert window_starts(10.0, 4.0) == [0.0, 4.0, 6.0]


def test_long_clips_give_several_items_whose_scores_are_averaged(write):
    short, long = write(tone(0.3), name="short.wav"), write(tone(2.5), name="long.wav")
    data = Windows([short, long], np.array([0, 1]), RATE, RATE)
    assert data.rows.tolist() == [0, 1, 1, 1]
    assert [int(data[i]["length"]) for i in range(4)] == [4800, RATE, RATE, RATE]
    assert data.item_targets.tolist() == [0, 1, 1, 1]
    assert not data[0]["wave"][4800:].any() and int(data[3]["label"]) == 1
    scores = data.mean_by_row(np.array([[1.0, 0], [3, 0], [0, 3], [0, 0]]))
    assert scores.tolist() == [[1, 0], [1, 1]]


def test_survey_reads_in_blocks_and_remarks(write):
    loud = np.clip(4 * tone(1.0), -1, 1)
    assert "clipped" in survey(write(loud))["remarks"][0]
    assert survey(write(np.zeros(RATE, dtype=np.float32)))["remarks"] == ["digital silence"]
    assert survey(write(tone(0.01)))["remarks"] == ["shorter than one frame, 10 ms"]
    assert survey(write(tone(1.0)))["remarks"] == []
    assert inspect(write(tone(1.0))).seconds == 1.0
