"""Scores over time become events by the rules that the settings state, and tables that other tools read."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptsuite.audio.events import RAVEN, Event, EventSettings, Found, Tracker, table_paths, write_events
from adaptsuite.errors import UsageError

LABELS = ("bird", "frog", "noise")


def track(scores, settings, units_hz=2):
    """Events of stretches of half a second each, and after which stretch each event came."""
    tracker, events, when = Tracker(LABELS, settings, units_hz), [], []
    for i, row in enumerate(scores):
        new = tracker.push(i + 1, np.asarray(row))
        events, when = events + new, when + [i] * len(new)
    new = tracker.close()
    return events + new, when + [len(scores)] * len(new)


def by_brute_force(scores, s, units_hz=2):
    """The same rules on the whole recording at once, label by label."""
    n, half = len(scores), s.smooth // 2
    smooth = np.array([np.median(scores[max(i - half, 0) : i + half + 1], axis=0) for i in range(n)])
    found = []
    for k, label in enumerate(LABELS):
        runs = [[i, i + 1] for i in range(n) if smooth[i, k] >= s.threshold and label not in s.ignore]
        i = 0
        while i + 1 < len(runs):
            if runs[i + 1][0] - runs[i][1] <= s.merge_s * units_hz:
                runs[i][1] = runs.pop(i + 1)[1]
            else:
                i += 1
        for a, b in runs:
            if b - a >= s.min_duration_s * units_hz:
                active = [v for v in smooth[a:b, k] if v >= s.threshold]
                found.append(Event(a / units_hz, b / units_hz, label, float(max(active))))
    return found


key = repr
numbers = st.integers(0, 4).map(lambda n: n / 4)
settings = st.builds(
    EventSettings,
    threshold=st.sampled_from([0.25, 0.5, 0.75]),
    min_duration_s=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    merge_s=st.sampled_from([0.0, 0.5, 1.0]),
    smooth=st.sampled_from([1, 3, 5]),
    ignore=st.sampled_from([(), ("noise",)]),
)


@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=30), settings)
def test_events_are_those_of_the_rules_applied_to_the_whole_recording(scores, chosen):
    scores = np.array(scores)
    assert sorted(track(scores, chosen)[0], key=key) == sorted(by_brute_force(scores, chosen), key=key)


def test_an_event_comes_as_soon_as_the_gap_after_it_is_too_long_to_be_closed():
    scores = np.zeros((8, 3))
    scores[1, 0] = 0.9
    assert track(scores, EventSettings())[1] == [2]
    assert track(scores, EventSettings(merge_s=1.0))[1] == [4]
    assert track(scores, EventSettings(smooth=3))[0] == []
    assert track(scores[:2], EventSettings())[1] == [2]  # at the end of the sound


def test_a_gap_of_just_merge_s_is_closed_and_a_longer_one_is_not():
    scores = np.zeros((8, 3))
    scores[[0, 3], 0] = 0.9, 0.6
    assert track(scores, EventSettings(merge_s=1.0))[0] == [Event(0.0, 2.0, "bird", 0.9)]
    assert len(track(scores, EventSettings(merge_s=0.9))[0]) == 2


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"min_duration_s": -1}, "min_duration_s"),
        ({"smooth": 2}, "odd"),
        ({"hop_s": 0.0}, "hop"),
        ({"hop_s": float("nan")}, "hop"),
        ({"ignore": "noise"}, "tuple"),
    ],
)
def test_settings_that_cannot_be_are_named(wrong, word):
    with pytest.raises(UsageError, match=word):
        EventSettings(**wrong)


def test_an_unknown_label_to_ignore_is_named_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean noise"):
        Tracker(LABELS, EventSettings(ignore=("nose",)), 2)


@pytest.fixture
def found(tmp_path):
    late, early = Event(2.5, 3.123456, "=cmd()", 0.87654321), Event(0.0, 1.0, "a\tb\nc", 0.5)
    return [Found(tmp_path / "x" / "r.wav", [late, early], 8000.0), Found(tmp_path / "y" / "r.wav", [], 4000.0)]


def test_csv_is_one_table_in_order_of_time_that_no_spreadsheet_runs(found, tmp_path):
    assert write_events(tmp_path / "e.csv", "csv", found) == [tmp_path / "e.csv"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "e.csv").read_text())))
    assert [(float(r["start_s"]), float(r["end_s"])) for r in rows] == [(0.0, 1.0), (2.5, 3.123456)]
    assert [r["label"] for r in rows] == ["a\tb\nc", "'=cmd()"] and rows[0]["path"].endswith("r.wav")


def test_a_table_without_events_still_has_its_header(found, tmp_path):
    write_events(tmp_path / "e.csv", "csv", found[1:])
    assert (tmp_path / "e.csv").read_text() == "path,start_s,end_s,label,score\n"


def test_json_lines_are_objects_with_the_label_as_it_is(found, tmp_path):
    write_events(tmp_path / "e.jsonl", "jsonl", found)
    rows = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "path": str(found[0].path),
        "start_s": 2.5,
        "end_s": 3.123456,
        "label": "=cmd()",
        "score": 0.876543,
    }


def test_raven_gets_one_selection_table_for_each_recording(found, tmp_path):
    first, second = write_events(tmp_path / "out", "raven", found)
    assert first == tmp_path / "out" / "x" / "r.Table.1.selections.txt"
    rows = list(csv.reader(io.StringIO(first.read_text()), delimiter="\t"))
    assert tuple(rows[0]) == RAVEN and rows[1] == [
        *("1", "Spectrogram 1", "1", "0.000000", "1.000000", "0", "8000", "a b c", "0.5000")
    ]
    assert rows[2][0] == "2" and second.read_text() == "\t".join(RAVEN) + "\n"


def test_audacity_gets_start_end_and_label_with_six_decimals(found, tmp_path):
    first, second = write_events(tmp_path / "out", "audacity", found)
    assert first.read_text() == "0.000000\t1.000000\ta b c\n2.500000\t3.123456\t=cmd()\n" and second.read_text() == ""


def test_two_recordings_never_share_a_table(tmp_path):
    twins = [tmp_path / "a" / "r.wav", tmp_path / "a" / "r.flac"]
    with pytest.raises(UsageError, match=r"r\.wav and .*r\.flac would share"):
        table_paths(tmp_path / "out", "raven", twins)
    assert table_paths(tmp_path / "out", "csv", twins) == [tmp_path / "out"] * 2
    apart = [tmp_path / "a" / "r.wav", tmp_path / "a" / "deep" / "r.wav"]
    tables = table_paths(tmp_path / "out", "audacity", apart)
    assert tables == [tmp_path / "out" / "r.txt", tmp_path / "out" / "deep" / "r.txt"]


def test_a_target_of_the_wrong_kind_and_an_unknown_format_are_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UsageError, match="expected a folder"):
        table_paths(tmp_path / "file", "raven", [tmp_path / "a.wav"])
    with pytest.raises(UsageError, match="expected a file"):
        table_paths(tmp_path, "csv", [tmp_path / "a.wav"])
    with pytest.raises(UsageError, match="did you mean raven"):
        table_paths(tmp_path / "out", "rven", [tmp_path / "a.wav"])
