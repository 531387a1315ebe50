"""Every row of the bad-day matrix for audio files: one line and exit 3, or left out and listed with --skip-bad."""

import csv
import struct

import numpy as np
import pytest
import soundfile

from adaptsuite.audio import data as audio_data
from adaptsuite.cli import main
from adaptsuite.memory import Memory

RATE = 16000
BACKBONE = ("--backbone", "embedded:audio-tiny", "--method", "linear", "--frames", "50")
TRAIN = (*BACKBONE, "--test", "fold=2", "--val", "none", "--epochs", "1", "--set", "plan.head_lr=0.001")


def tone(seconds=0.4, hz=440.0, rate=RATE):
    rng = np.random.default_rng(int(hz))
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hz * t) + 0.01 * rng.normal(size=len(t))).astype(np.float32)


def good(folder, rows=12):
    """Two classes, three folds; returns the table."""
    lines = ["path,label,fold"]
    for i in range(rows):
        soundfile.write(folder / f"{i}.wav", tone(hz=300 if i % 2 else 2000), RATE)
        lines.append(f"{i}.wav,{'ab'[i % 2]},{i % 3}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def spoil(path, kind):
    """Puts a bad file of this kind at `path`, a .wav."""
    header = {"rate 1": (1, 1), "rate 1e9": (1, 10**9), "0 channels": (0, RATE), "64 channels": (64, RATE)}
    if kind == "0 bytes":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-4000])
    elif kind in ("NaN", "Inf", "huge"):
        wave = tone()
        wave[3000] = {"NaN": np.nan, "Inf": np.inf, "huge": 1e30}[kind]
        soundfile.write(path, wave, RATE, subtype="FLOAT")
    elif kind == "empty":
        soundfile.write(path, np.zeros(0), RATE)
    elif kind == "wrong extension":
        path.write_text("path,label\n")
    else:
        channels, rate = header[kind]
        fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2 & 0xFFFFFFFF, channels * 2, 16)
        sound = bytes(6400)
        body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(sound)) + sound
        path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


REASONS = {
    "0 bytes": "0 bytes",
    "truncated": "truncated",
    "NaN": "NaN",
    "Inf": "infinite",
    "huge": "samples up to 1.0e+30",
    "empty": "no samples",
    "wrong extension": "not readable as audio",
    "rate 1": "sample rate 1 Hz",
    "rate 1e9": "sample rate 1000000000 Hz",
    "0 channels": "not readable as audio",
    "64 channels": "64 channels",
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    out = folder / "run"
    assert main(["audio", "train", "--data", str(good(folder)), *TRAIN, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(("kind", "reason"), REASONS.items())
def test_a_bad_file_stops_every_command_with_one_line_and_nothing_written(adapt, adapter, tmp_path, kind, reason):
    table, out = good(tmp_path), tmp_path / "run"
    spoil(tmp_path / "4.wav", kind)  # a training row of fold 1
    spoil(tmp_path / "5.wav", kind)  # a test row
    for command, where in (
        (("train", "--data", table, *TRAIN, "--out", out), "manifest.csv line 6"),
        (("stats", "--data", table, "--test", "fold=2", "--val", "none"), "manifest.csv line 6"),
        (("evaluate", adapter, "--data", table, "--test", "fold=2"), "manifest.csv line 7"),
        (("check", "--data", table, "--test", "fold=2"), "manifest.csv line 6"),
    ):
        _, err = adapt(*command, code=3)
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) == 1 and where in lines[0] and ".wav" in lines[0] and reason in lines[0], (command[0], err)
    assert not out.exists()


@pytest.mark.parametrize(("kind", "reason"), REASONS.items())
def test_skip_bad_leaves_the_rows_out_and_lists_them(adapt, adapter, tmp_path, kind, reason):
    table = good(tmp_path)
    spoil(tmp_path / "4.wav", kind)
    spoil(tmp_path / "5.wav", kind)
    for command, rows in (
        (("check", "--data", table, "--test", "fold=2"), 10),
        (("stats", "--data", table, "--test", "fold=2", "--val", "none"), 7),
        (("evaluate", adapter, "--data", table, "--test", "fold=2"), 3),
    ):
        found, _ = adapt(*command, "--skip-bad", "--json")
        assert found["rows"] == rows and {s["path"] for s in found["skipped"]} <= {"4.wav", "5.wav"}
        assert reason in found["skipped"][-1]["reason"] and found["skipped"][-1]["row"] == "manifest.csv line 7"


def test_a_training_that_skips_says_so_in_result_report_and_recipe(adapt, tmp_path):
    table, out = good(tmp_path), tmp_path / "run"
    spoil(tmp_path / "4.wav", "NaN")
    spoil(tmp_path / "5.wav", "0 bytes")
    text, _ = adapt("train", "--data", table, *TRAIN, "--out", tmp_path / "text", "--skip-bad")
    assert "skipped   manifest.csv line 7: 5.wav was left out: the file is empty (0 bytes)" in text.splitlines()
    found, _ = adapt("train", "--data", table, *TRAIN, "--out", out, "--skip-bad", "--json")
    assert [s["path"] for s in found["skipped"]] == ["4.wav", "5.wav"]
    assert found["warnings"][0] == "2 of 12 rows were left out: their files cannot be used"
    page = (out / "report.html").read_text()
    assert "4.wav was left out: holds NaN" in page and "2 of 12 rows were left out" in page
    assert "skip_bad = true" in (out / "recipe.toml").read_text()
    with open(out / "predictions.csv", newline="") as f:
        assert [row["path"] for row in csv.DictReader(f)] == ["2.wav", "8.wav", "11.wav"]


def test_nothing_is_left_when_every_file_is_bad(adapt, tmp_path):
    table = good(tmp_path)
    for i in range(12):
        spoil(tmp_path / f"{i}.wav", "0 bytes")
    _, err = adapt("train", "--data", table, *TRAIN, "--out", tmp_path / "run", "--skip-bad", code=3)
    assert "none of its 12 files can be used; 0.wav: the file is empty" in err


def test_a_class_whose_files_are_all_bad_is_no_class(adapt, tmp_path):
    table = good(tmp_path)
    lines = table.read_text().splitlines()
    for i in (3, 9):
        lines[i + 1] = lines[i + 1].replace(",b,", ",c,")
        spoil(tmp_path / f"{i}.wav", "truncated")
    table.write_text("\n".join(lines) + "\n")
    found, _ = adapt("check", "--data", table, "--test", "fold=2", "--skip-bad", "--json")
    assert found["ok"] and set(found["classes"]) == {"a", "b"}


def test_silence_and_clipping_are_used_and_said(adapt, adapter, tmp_path):
    table = good(tmp_path)
    soundfile.write(tmp_path / "2.wav", np.zeros(6400), RATE)
    soundfile.write(tmp_path / "8.wav", np.clip(5 * tone(), -1, 1), RATE, subtype="FLOAT")
    expected = ["1 of 4 files are digital silence: 2.wav", "1 of 4 files are clipped: 8.wav"]
    found, _ = adapt("evaluate", adapter, "--data", table, "--test", "fold=2", "--json")
    assert found["warnings"] == expected
    found, _ = adapt("train", "--data", table, *TRAIN, "--out", tmp_path / "run", "--json")
    assert found["warnings"] == [text.replace("of 4", "of 12") for text in expected]
    assert "digital silence: 2.wav" in (tmp_path / "run" / "report.html").read_text()


def test_a_sound_with_the_suffix_of_another_format_is_read_and_said(adapt, adapter, tmp_path):
    table = good(tmp_path)
    soundfile.write(tmp_path / "x.flac", tone(), RATE)
    (tmp_path / "x.flac").rename(tmp_path / "2.wav")
    found, _ = adapt("evaluate", adapter, "--data", table, "--test", "fold=2", "--json")
    assert found["warnings"] == [
        "1 of 4 files are of another format than their suffix says, and read as what they are: 2.wav"
    ]


def test_other_rates_and_channels_are_said_once_with_their_counts(adapt, tmp_path):
    table = good(tmp_path)
    for i in (0, 1, 2):
        soundfile.write(tmp_path / f"{i}.wav", tone(rate=44100), 44100)
    soundfile.write(tmp_path / "3.wav", tone(rate=8000), 8000)
    soundfile.write(tmp_path / "4.wav", np.stack([tone()] * 2, 1), RATE)
    text, err = adapt("train", "--data", table, *TRAIN, "--out", tmp_path / "run")
    said = [line.removeprefix("warning   ") for line in text.splitlines() if line.startswith("warning")]
    assert said == [
        "resampled: 3 files of 44100 Hz, 1 of 8000 Hz to 16000 Hz",
        "mixed to mono: 1 file of 2 channels",
        "1 of 12 files hold nothing above 4000 Hz, the model listens up to 8000 Hz: expect less of it there",
    ]
    assert all(line in (tmp_path / "run" / "report.html").read_text() for line in said[:2])


def test_a_day_of_sound_is_looked_at_by_its_header(tmp_path):
    """A header alone: 24 h at 16 kHz are 2.8 GB that are never written."""
    path = tmp_path / "day.wav"
    samples = 24 * 3600 * RATE
    fmt = struct.pack("<HHIIHH", 1, 1, RATE, RATE * 2, 2, 16)
    head = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", 2 * samples)
    with open(path, "wb") as f:
        f.write(b"RIFF" + struct.pack("<I", 2 * samples + len(head)) + head)
        f.truncate(8 + len(head) + 2 * samples)  # sparse
    assert audio_data.inspect(path).seconds == 24 * 3600
    dataset = audio_data.Windows([path], None, RATE, 10 * RATE)
    assert len(dataset) == 8640 and dataset[8639]["length"] == 10 * RATE


def test_memory_for_decoded_clips_is_bounded_and_nothing_is_lost(tmp_path):
    good(tmp_path)
    paths = [tmp_path / f"{i}.wav" for i in range(12)]
    memory = Memory(5 * 6400 * 4)
    dataset = audio_data.Windows(paths, None, RATE, RATE, memory)
    dataset.load()
    assert len(memory) == 5 and memory.bytes == 5 * 6400 * 4
    assert dataset.remarks()[0].startswith("7 of 12 clips do not fit into memory")
    for i in (0, 11):
        expected = audio_data.read(paths[i], RATE)
        assert (dataset[i]["wave"][:6400] == expected).all()
    assert len(memory) == 5
