"""A trained adapter on recordings: `audio.load`, `adapt audio predict --events`, `adapt audio embed`, and bad files."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.functional import resample

from adaptsuite import audio
from adaptsuite.audio.data import RATES_HZ, read
from adaptsuite.cli import main
from adaptsuite.errors import AdapterError, DataError, UsageError

RATE = 16000
HZ = {"low": 200, "high": 3000}


def tone(label, seconds, rate=RATE, level=0.3):
    return (level * np.sin(2 * np.pi * HZ[label] * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def noise(seconds, seed=0):
    return (0.01 * np.random.default_rng(seed).normal(size=round(seconds * RATE))).astype(np.float32)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The embedded backbone with a head for two tones and a background, windows of half a second."""
    folder = tmp_path_factory.mktemp("clips")
    rows = ["path,label,fold"]
    for i in range(6):
        for label in (*HZ, "background"):
            clip = noise(0.5, i) + (tone(label, 0.5, level=0.1 + 0.05 * i) if label in HZ else 0)
            soundfile.write(folder / f"{label}{i}.wav", clip, RATE)
            rows.append(f"{label}{i}.wav,{label},{i}")
    (folder / "manifest.csv").write_text("\n".join(rows))
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--data", folder, "--backbone", "embedded:audio-tiny", "--method", "linear", "--test", "fold=5"]
    assert main(["audio", "train", *map(str, options), "--val", "none", "--epochs", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def classifier(adapter):
    return audio.load(adapter, device="cpu")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Ten seconds with a low tone from 2 to 4 and a high one from 6 to 7."""
    wave = noise(10, 99)
    wave[2 * RATE : 4 * RATE] += tone("low", 2)
    wave[6 * RATE : 7 * RATE] += tone("high", 1)
    path = tmp_path_factory.mktemp("recordings") / "day.flac"
    soundfile.write(path, wave, RATE)
    return path


# ---- the loaded classifier


def test_a_loaded_adapter_labels_waveforms(classifier, adapter):
    assert set(classifier.labels) == {"low", "high", "background"} and classifier.sample_rate_hz == RATE
    for label in HZ:
        found = classifier.predict(tone(label, 0.5) + noise(0.5), RATE)
        assert max(found, key=found.get) == label and sum(found.values()) == pytest.approx(1)
    inner = audio.load(adapter / "adapter", device="cpu").predict(tone("low", 0.5), RATE)
    assert inner == classifier.predict(tone("low", 0.5), RATE)


def test_a_waveform_and_its_file_have_the_same_scores(classifier, recording, adapt, adapter):
    of_file = classifier.predict_file(recording)
    assert classifier.predict(read(recording, RATE), RATE) == pytest.approx(of_file, abs=1e-5)
    (row,) = adapt("predict", adapter, recording, "--json")[0]["predictions"]
    assert row["scores"] == pytest.approx(of_file, abs=1e-5)


@pytest.mark.parametrize("rate_hz", [22050, 44100, 96000])
def test_other_rates_and_channels_are_heard_alike(classifier, rate_hz):
    wave = tone("high", 1.2, rate_hz)
    stereo = np.stack([2 * wave, 0 * wave])
    alike = classifier.predict(tone("high", 1.2), RATE)
    assert classifier.predict(wave, rate_hz) == pytest.approx(alike, abs=0.02)
    assert classifier.predict(torch.from_numpy(stereo), rate_hz) == pytest.approx(
        classifier.predict(wave, rate_hz), abs=1e-5
    )


def test_embeddings_are_what_the_head_reads(classifier):
    wave = tone("low", 0.5)
    features, head = classifier.embed(wave, RATE), classifier.model.head
    logits = head(torch.from_numpy(features)).detach().softmax(-1).tolist()
    assert logits == pytest.approx(list(classifier.predict(wave, RATE).values()), abs=1e-5)


@pytest.mark.parametrize(
    ("wave", "rate_hz", "word"),
    [
        (np.zeros((16000, 2), np.float32), RATE, "transpose"),
        (np.zeros((1, 2, 100), np.float32), RATE, "shape"),
        (np.zeros(0, np.float32), RATE, "shape"),
        (np.full(100, np.nan), RATE, "NaN"),
        (np.zeros(100, np.int16), RATE, "int16"),
        (np.zeros(100, np.float32), 10, "sample rate 10 Hz"),
        (np.zeros(100, np.float32), 10**9, "sample rate"),
    ],
)
def test_a_waveform_that_is_none_is_refused_with_the_reason(classifier, wave, rate_hz, word):
    with pytest.raises(DataError, match=word):
        classifier.predict(wave, rate_hz)


def test_load_refuses_what_is_no_adapter(tmp_path):
    with pytest.raises(AdapterError, match="adapter.json"):
        audio.load(tmp_path)


def test_an_unknown_setting_of_events_is_named_with_the_nearest(classifier, recording):
    with pytest.raises(UsageError, match="did you mean threshold"):
        next(classifier.events(recording, treshold=0.5))


# ---- events


def near(events, expected):
    found = [(e["label"], e["start_s"], e["end_s"]) for e in events]
    assert [label for label, *_ in found] == [label for label, *_ in expected], found
    for (_, *times), (_, *true) in zip(found, expected, strict=True):
        assert times == pytest.approx(true, abs=0.3), found


TRUE = [("low", 2.0, 4.0), ("high", 6.0, 7.0)]
OPTIONS = ("--events", "--hop", "0.1", "--ignore", "background", "--min-duration", "0.3", "--merge", "0.3")


def test_events_are_found_where_they_are(adapt, adapter, recording, classifier):
    found, _ = adapt("predict", adapter, recording, *OPTIONS, "--json")
    near(found["events"], TRUE)
    settings = {"hop_s": 0.1, "ignore": ("background",), "min_duration_s": 0.3, "merge_s": 0.3}
    live = classifier.stream(RATE, **settings)
    wave = read(recording, RATE)
    pushed = [e for at in range(0, len(wave), 700) for e in live.push(wave[at : at + 700])] + live.close()
    listed = list(classifier.events(recording, **settings))
    assert [(e.label, e.start_s, e.end_s) for e in pushed] == [(e.label, e.start_s, e.end_s) for e in listed]
    assert [e.start_s for e in listed] == pytest.approx([e["start_s"] for e in found["events"]], abs=1e-6)


@pytest.mark.parametrize("form", ["csv", "jsonl", "raven", "audacity"])
def test_every_format_holds_the_events(adapt, adapter, recording, tmp_path, form):
    _, err = adapt("predict", adapter, recording, *OPTIONS, "--format", form, "--out", tmp_path / "out")
    assert err == ""
    path = tmp_path / "out"
    text = path.read_text() if path.is_file() else next(path.iterdir()).read_text()
    if form == "jsonl":
        rows = [json.loads(line) for line in text.splitlines()]
    elif form == "audacity":
        rows = [dict(zip(("start_s", "end_s", "label"), line.split("\t"), strict=True)) for line in text.splitlines()]
    else:
        rows = list(csv.DictReader(io.StringIO(text), delimiter="\t" if form == "raven" else ","))
        names = {"Begin Time (s)": "start_s", "End Time (s)": "end_s", "Annotation": "label"}
        rows = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    near([{**row, "start_s": float(row["start_s"]), "end_s": float(row["end_s"])} for row in rows], TRUE)


def test_two_recordings_of_one_name_keep_their_events_apart(adapt, adapter, recording, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        shutil.copy(recording, tmp_path / "in" / folder)
    options = (*OPTIONS, "--format", "raven", "--out", tmp_path / "out")
    found, _ = adapt("predict", adapter, tmp_path / "in", *options, "--json")
    assert len(found["out"]) == 2 and len(set(found["out"])) == 2 and len(found["events"]) == 4
    assert adapt("predict", adapter, *[recording] * 2, *OPTIONS, "--json")[0]["events"] == [
        {**event, "path": str(recording)} for event in found["events"][:2]
    ]


def test_a_short_file_has_events_too(adapt, adapter, tmp_path):
    soundfile.write(tmp_path / "short.wav", tone("low", 0.2) + noise(0.2), RATE)
    found, _ = adapt("predict", adapter, tmp_path / "short.wav", "--events", "--threshold", "0", "--json")
    assert {(e["start_s"], e["end_s"]) for e in found["events"]} == {(0.0, 0.2)} and len(found["events"]) == 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--hop", "1"), "need --events"),
        (("--format", "csv", "--out", "x.csv"), "need --events"),
        (("--events", "--format", "csv"), "needs --out"),
        (("--events", "--format", "rven", "--out", "x"), "did you mean raven"),
        (("--events", "--hop", "9"), "at most one window"),
        (("--events", "--threshold", "2"), "threshold"),
        (("--events", "--ignore", "bakground"), "did you mean background"),
    ],
)
def test_options_that_cannot_be_are_one_line(adapt, adapter, recording, tmp_path, monkeypatch, options, word):
    monkeypatch.chdir(tmp_path)
    _, err = adapt("predict", adapter, recording, *options, code=2)
    assert word in err and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


# ---- rates and bad files


def test_other_rates_are_said_once_and_narrow_sound_is_warned_of_once(adapt, adapter, recording, tmp_path):
    wave = read(recording, RATE)
    for name, rate_hz in (("a", 8000), ("b", 8000), ("c", 44100), ("d", RATE)):
        soundfile.write(tmp_path / f"{name}.wav", resample(wave, RATE, rate_hz).numpy(), rate_hz, subtype="FLOAT")
    for verb in (("predict",), ("predict", "--events"), ("embed", "--out", tmp_path / "f.npz")):
        _, err = adapt(verb[0], adapter, tmp_path, *verb[1:])
        said, warned = err.strip().splitlines()
        assert "resampled: 2 files of 8000 Hz, 1 of 44100 Hz to 16000 Hz" in said
        assert "2 of 4 files" in warned and "above 4000 Hz" in warned
    assert adapt("predict", adapter, recording)[1] == ""


def test_silence_is_labelled_and_remarked_on(adapt, adapter, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE, np.float32), RATE)
    for verb in (("predict",), ("predict", "--events"), ("embed", "--out", tmp_path / "f.npz")):
        assert "silence.wav: digital silence" in adapt(verb[0], adapter, tmp_path / "silence.wav", *verb[1:])[1]


def bad_file(folder, kind):
    path = folder / f"{kind.replace(' ', '-')}.wav"
    whole = tone("low", 1.0)
    if kind in ("truncated wav", "truncated flac"):
        path = path.with_suffix("." + kind.split()[1])
        soundfile.write(path, whole, RATE)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no sound":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "no samples":
        soundfile.write(path, whole[:0], RATE)
    elif kind == "channels":
        soundfile.write(path, np.zeros((400, 64), np.float32), RATE)
    elif kind == "rate":
        soundfile.write(path, whole, 1)
    elif kind == "huge rate":
        header = bytearray(open_bytes(path, whole))
        header[24:28] = (10**9).to_bytes(4, "little")
        path.write_bytes(header)
    else:
        whole[RATE // 2] = float(kind)
        soundfile.write(path, whole, RATE, subtype="FLOAT")
    return path


def open_bytes(path, wave):
    soundfile.write(path, wave, RATE, subtype="PCM_16")
    return path.read_bytes()


BAD = {
    "empty": "0 bytes",
    "truncated wav": "truncated",
    "truncated flac": "damaged|truncated|not readable",
    "nan": "NaN",
    "inf": "infinite",
    "no sound": "not readable as audio",
    "no samples": "no samples",
    "channels": "64 channels",
    "rate": "sample rate 1 Hz",
    "huge rate": "sample rate 1000000000 Hz|not readable",
}


@pytest.mark.parametrize(("kind", "verb"), [*((kind, "events") for kind in BAD), ("nan", "labels"), ("nan", "embed")])
def test_a_bad_file_ends_the_command_before_anything_is_written_or_is_listed(adapt, adapter, tmp_path, kind, verb):
    path, out = bad_file(tmp_path, kind), tmp_path / "out" / "table.csv"
    soundfile.write(tmp_path / "good.wav", tone("low", 0.5), RATE)
    options = ("embed" if verb == "embed" else "predict", adapter, tmp_path / "good.wav", path, "--out", out)
    options += ("--events",) if verb == "events" else ()
    _, err = adapt(*options, code=3)
    assert len(err.strip().splitlines()) == 1 and path.name in err and "--skip-bad" in err
    assert any(reason in err for reason in BAD[kind].split("|")) and not out.parent.exists()
    found, err = adapt(*options, "--skip-bad", "--json")
    assert [row["path"] for row in found["skipped"]] == [str(path)] and out.is_file() and f"skipped {path}" in err


def test_when_all_files_are_bad_skipping_them_is_no_success(adapt, adapter, tmp_path):
    _, err = adapt("predict", adapter, bad_file(tmp_path, "empty"), "--skip-bad", "--events", code=3)
    assert "no file could be read" in err and "0 bytes" in err


def test_a_recorder_that_never_wrote_the_size_is_read_to_the_end(tmp_path):
    """A streamed wav says 4 GiB of sound: that is no truncation."""
    data = bytearray(open_bytes(tmp_path / "a.wav", tone("low", 0.5)))
    at = data.find(b"data") + 4
    data[at : at + 4] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read(tmp_path / "a.wav", RATE)) == RATE // 2


def test_a_rate_whose_filter_would_fill_the_memory_is_refused_by_name(classifier, tmp_path):
    path = tmp_path / "odd.wav"
    soundfile.write(path, tone("low", 0.1), 44101)
    assert RATES_HZ[0] < 44101 < RATES_HZ[1]
    for attempt in (classifier.predict_file, lambda p: next(classifier.events(p))):
        with pytest.raises(DataError, match=r"odd\.wav: sample rate 44101 Hz"):
            attempt(path)


# ---- features


@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_features_of_files_and_windows_are_written(adapt, adapter, recording, classifier, tmp_path, suffix):
    def table(*options):
        path = tmp_path / f"{len(options)}.{suffix}"
        adapt("embed", adapter, recording, *options, "--out", path)
        if suffix == "npz":
            return np.load(path)
        rows = list(csv.DictReader(path.open()))
        names = [name for name in rows[0] if name[0] == "f"]
        starts = {"starts": np.array([float(r["start"]) for r in rows])} if "start" in rows[0] else {}
        features = np.array([[float(row[name]) for name in names] for row in rows])
        return {"paths": [row["path"] for row in rows], **starts, "features": features}

    whole, windows = table(), table("--windows")
    assert list(whole["paths"]) == [str(recording)] and "starts" not in whole
    np.testing.assert_allclose(whole["features"][0], classifier.embed(read(recording, RATE), RATE), atol=1e-5)
    size = classifier.model.num_samples / RATE
    assert len(windows["features"]) == np.ceil(10 / size) and windows["starts"][1] == pytest.approx(size)
    np.testing.assert_allclose(windows["features"].mean(0), whole["features"][0], atol=1e-5)


def test_a_plain_backbone_gives_features_without_an_adapter(adapt, recording, tmp_path):
    options = ("--backbone", "embedded:audio-tiny", "--frames", "100", "--out", tmp_path / "f.npz", "--json")
    found, _ = adapt("embed", recording, *options)
    features = np.load(tmp_path / "f.npz")["features"]
    assert features.shape == (found["rows"], found["features"]) and found["rows"] == 1
    assert features.dtype == np.float32 and features.std() > 0


@pytest.mark.parametrize(("options", "word"), [((), "--out is missing"), (("--out", "f.parquet"), "f.parquet")])
def test_embed_says_which_table_it_can_write(adapt, adapter, recording, options, word):
    assert word in adapt("embed", adapter, recording, *options, code=2)[1]
    assert "FILE..." in adapt("embed", adapter, "--out", "f.npz", code=2)[1]
    assert "need --backbone" in adapt("embed", adapter, recording, "--frames", 50, "--out", "f.npz", code=2)[1]
