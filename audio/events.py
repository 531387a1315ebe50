"""From scores over time to events, and the tables that audio tools read."""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from adaptsuite.atomic import write_file
from adaptsuite.errors import UsageError, nearest
from adaptsuite.manifest import write_csv

FORMATS = {"csv": ".csv", "jsonl": ".jsonl", "raven": ".Table.1.selections.txt", "audacity": ".txt"}
FOLDER_FORMATS = ("raven", "audacity")  # these tables know no recording's name: one file for each


@dataclass(frozen=True)
class Event:
    """A label that was heard from start_s to end_s; score is the highest probability on the way."""

    start_s: float
    end_s: float
    label: str
    score: float


@dataclass(frozen=True)
class EventSettings:
    """What makes an event: probabilities, smoothed, at or above the threshold, gaps closed, then long enough."""

    hop_s: float | None = None  # from one window to the next; None: half a window
    threshold: float = 0.5  # of the label's probability
    min_duration_s: float = 0.0  # shorter events are dropped, after merging
    merge_s: float = 0.0  # events of one label with a gap of at most this become one
    smooth: int = 1  # windows of the running median, odd
    ignore: tuple[str, ...] = ()  # labels that never make events, such as a background class

    def __post_init__(self):
        for name, low, high in (("threshold", 0, 1), ("min_duration_s", 0, np.inf), ("merge_s", 0, np.inf)):
            if not low <= getattr(self, name) <= high:
                raise UsageError(f"{name} is {getattr(self, name)}, expected {low} to {high}")
        if self.hop_s is not None and not 0 < self.hop_s < np.inf:
            raise UsageError(f"hop is {self.hop_s} s, it must be above 0")
        if isinstance(self.ignore, str):
            raise UsageError(f"ignore is {self.ignore!r}, a tuple of labels is expected")
        if self.smooth < 1 or self.smooth % 2 == 0:
            raise UsageError(f"smooth is {self.smooth}, an odd number of windows is expected")


class Tracker:
    """Push the scores of one stretch of time after another, receive the events that can no longer change.

    Times are counted from 0 in units of 1 / units_hz seconds.
    """

    def __init__(self, labels: Sequence[str], settings: EventSettings, units_hz: int):
        for label in settings.ignore:
            if label not in labels:
                raise UsageError(f"ignore: label {label!r} is not known; {nearest(label, labels)}")
        self.labels, self.settings, self.units_hz = tuple(labels), settings, units_hz
        self._counts = np.array([label not in settings.ignore for label in labels])
        self._half = settings.smooth // 2
        self._recent: deque[tuple[int, np.ndarray]] = deque(maxlen=settings.smooth)
        self._waiting: deque[tuple[int, float]] = deque()  # stretches whose median is not known yet
        self._num, self._until = 0, 0.0
        self._open: dict[int, list[float]] = {}  # label -> start, end, highest score

    def push(self, end: float, scores: np.ndarray) -> list[Event]:
        """scores: (K,) probabilities from where the last stretch ended to `end`."""
        self._recent.append((self._num, scores))
        self._waiting.append((self._num, end))
        self._num += 1
        return self._settle() if len(self._waiting) > self._half else []

    def close(self) -> list[Event]:
        events = []
        while self._waiting:
            events += self._settle()
        return events + self._emit(list(self._open))

    def _settle(self) -> list[Event]:
        index, end = self._waiting.popleft()
        scores = np.median([s for i, s in self._recent if abs(i - index) <= self._half], axis=0)
        active = np.flatnonzero((scores >= self.settings.threshold) & self._counts)
        start, self._until = self._until, end
        for k in active:
            event = self._open.setdefault(int(k), [start, end, 0.0])
            event[1], event[2] = end, max(event[2], float(scores[k]))
        # the next stretch starts at `end`: what lies further back than the gap is not reached any more
        gap = self.settings.merge_s * self.units_hz
        return self._emit([k for k, (_, stop, _) in self._open.items() if stop < end and end - stop > gap])

    def _emit(self, keys: Sequence[int]) -> list[Event]:
        events = []
        for start, end, score, k in sorted((*self._open.pop(k), k) for k in keys):
            if end - start >= self.settings.min_duration_s * self.units_hz:
                events.append(Event(start / self.units_hz, end / self.units_hz, self.labels[k], score))
        return events


def table_paths(out: Path, form: str, recordings: Sequence[Path]) -> list[Path]:
    """Where the table of each recording goes: all in `out`, or for Raven and Audacity one each in the folder `out`.

    Recordings of several folders keep their folders below the common one, so that equal names do not meet. Raises
    UsageError where two would be one file.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form}: not known; {nearest(form, FORMATS)}")
    if form not in FOLDER_FORMATS:
        if out.is_dir():
            raise UsageError(f"{out} is a folder, expected a file: {form} is one table for all recordings")
        return [out] * len(recordings)
    if out.is_file():
        raise UsageError(f"{out} is a file, expected a folder: {form} is one table for each recording")
    folders = [path.resolve().parent for path in recordings]
    common = next(f for f in (folders[0], *folders[0].parents) if all(g.is_relative_to(f) for g in folders))
    found: dict[Path, Path] = {}
    for path, folder in zip(recordings, folders, strict=True):
        table = out / folder.relative_to(common) / (path.stem + FORMATS[form])
        if table in found:
            raise UsageError(f"{found[table]} and {path} would share the table {table}: run them apart, or take csv")
        found[table] = path
    return list(found)


@dataclass(frozen=True)
class Found:
    """The events of one recording; high_hz is the highest frequency that the model heard of it."""

    path: Path
    events: Sequence[Event]
    high_hz: float


def write_events(out: Path, form: str, found: Sequence[Found]) -> list[Path]:
    """Writes the events of recordings, sorted by time, each file whole or not at all; returns the files.

    form: csv or jsonl (path, start_s, end_s, label, score), raven (selection tables, boxes from 0 to high_hz), audacity
    (label tracks).
    """
    paths = table_paths(out, form, [f.path for f in found])
    if form not in FOLDER_FORMATS:
        rows = [{"path": str(f.path), **as_row(e)} for f in found for e in in_order(f.events)]
        if form == "csv":
            write_csv(out, rows, ("path", "start_s", "end_s", "label", "score"))
        else:
            write_file(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return [out]
    for path, f in zip(paths, found, strict=True):
        if form == "raven":
            write_csv(path, _raven(f), RAVEN, "\t")
        else:
            rows = (f"{e.start_s:.6f}\t{e.end_s:.6f}\t{_one_line(e.label)}\n" for e in in_order(f.events))
            write_file(path, "".join(rows))
    return paths


def in_order(events: Sequence[Event]) -> list[Event]:
    return sorted(events, key=lambda e: (e.start_s, e.end_s, e.label))


def as_row(event: Event) -> dict[str, object]:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(event).items()}


RAVEN = (
    *("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)"),
    *("Annotation", "Score"),
)


def _raven(found: Found) -> list[dict[str, object]]:
    """Rows of a selection table: the columns that Raven Pro requires first, in its order (manual, chapter 6)."""
    cells = [
        (f"{e.start_s:.6f}", f"{e.end_s:.6f}", 0, f"{found.high_hz:g}", _one_line(e.label), f"{e.score:.4f}")
        for e in in_order(found.events)
    ]
    return [dict(zip(RAVEN, (i, "Spectrogram 1", 1, *row), strict=True)) for i, row in enumerate(cells, 1)]


def _one_line(label: str) -> str:
    return " ".join(label.split())
