"""A saved adapter as one object that labels waveforms, files, recordings and live sound."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptsuite import recipe as recipes
from adaptsuite.applied import readable
from adaptsuite.audio.data import blocks, check_rates, inspect, resample, window_starts
from adaptsuite.audio.events import Event, EventSettings, Found, in_order, table_paths
from adaptsuite.audio.pipeline import DOMAIN
from adaptsuite.audio.stream import Stream, check_samples, outputs
from adaptsuite.devices import pick_device
from adaptsuite.errors import DataError, UsageError, nearest
from adaptsuite.experiment import restore
from adaptsuite.metrics import to_probabilities
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all


def load(folder: str | Path, device: str = "auto", batch_size: int | None = None) -> "Classifier":
    """The classifier of an adapter's folder or of its run's. Raises AdapterError for one that does not fit its base."""
    return Classifier(folder, device, batch_size)


class Classifier:
    """`adaptsuite.audio.load(folder)`: labels of sounds of any length at any rate.

    A sound longer than the model's input is read as windows whose scores are averaged, as in training. waveform: (N,)
    or (channels, N), float in [-1, 1]; rate_hz: a whole number from 1000 to 768000. What cannot be used is a DataError.
    """

    def __init__(self, folder: str | Path, device: str = "auto", batch_size: int | None = None):
        folder = Path(folder)
        inner = folder / "adapter"
        self.handle, self.recipe, labels, _ = restore(DOMAIN, inner if (inner / "adapter.json").is_file() else folder)
        plan = recipes.build(Plan, self.recipe.plan, "plan")
        self.labels, self.task = tuple(labels), DOMAIN.task(self.recipe, labels)
        self.device, self.batch_size = pick_device(device), batch_size or plan.batch_size
        self.model = self.handle.model.to(self.device)

    @property
    def sample_rate_hz(self) -> int:
        """Of the model; other rates are resampled to it."""
        return self.model.front_end.sample_rate_hz

    def predict(self, waveform: np.ndarray | Tensor, rate_hz: int) -> dict[str, float]:
        """{label: probability}; they sum to 1 unless the task is multilabel."""
        return self._named(self._run(waveform, rate_hz))

    def predict_file(self, path: str | Path) -> dict[str, float]:
        """{label: probability} of a whole file, which is read window by window."""
        dataset = DOMAIN.dataset(self.model, [Path(path)], None)
        raw, _ = predict_all(self.model, self.task, dataset, self.batch_size, self.device)
        return self._named(dataset.mean_by_row(raw)[0])

    def embed(self, waveform: np.ndarray | Tensor, rate_hz: int) -> np.ndarray:
        """(D,) float32: what the head reads, averaged over windows."""
        return self._run(waveform, rate_hz, embedding=True)

    def stream(self, rate_hz: int, batch_size: int = 1, **settings) -> Stream:
        """Live use: push samples, receive events. settings: fields of EventSettings."""
        chosen = event_settings(settings)
        return Stream(self.model, self.labels, rate_hz, chosen, self.recipe.data.task, batch_size, self.device)

    def events(self, path: str | Path, **settings) -> Iterator[Event]:
        """The events of a recording of any length, which is read in blocks. settings: fields of EventSettings."""
        rate_hz = inspect(Path(path)).rate_hz
        check_rates(rate_hz, self.sample_rate_hz, f"{path}: ")
        stream = self.stream(rate_hz, self.batch_size, **settings)
        for block in blocks(Path(path)):
            yield from stream.push(block)
        yield from stream.close()

    def _run(self, waveform: np.ndarray | Tensor, rate_hz: int, **options) -> np.ndarray:
        """(K,) or (D,) outputs of the model, averaged over the windows."""
        wave, size = mono(waveform, rate_hz, self.sample_rate_hz), self.model.num_samples
        starts = window_starts(len(wave) / self.sample_rate_hz, size / self.sample_rate_hz)
        pieces = [wave[at : at + size] for at in (round(start * self.sample_rate_hz) for start in starts)]
        waves = torch.stack([F.pad(piece, (0, size - len(piece))) for piece in pieces])
        lengths = torch.tensor([len(piece) for piece in pieces])
        batches = zip(waves.split(self.batch_size), lengths.split(self.batch_size), strict=True)
        return np.concatenate([outputs(self.model, *batch, self.device, **options) for batch in batches]).mean(0)

    def _named(self, scores: np.ndarray) -> dict[str, float]:
        found = to_probabilities(scores[None], self.recipe.data.task)[0]
        return {label: float(p) for label, p in zip(self.labels, found, strict=True)}


def event_settings(given: dict[str, object]) -> EventSettings:
    names = list(EventSettings.__dataclass_fields__)
    for name in given:
        if name not in names:
            raise UsageError(f"{name} is no setting of events; {nearest(name, names)}")
    return EventSettings(**given)


def mono(waveform: np.ndarray | Tensor, rate_hz: int, new_rate_hz: int) -> Tensor:
    """(N,) float32 at the new rate, channels averaged. Raises DataError for what is no waveform."""
    wave = check_samples(waveform)
    if wave.ndim not in (1, 2) or not wave.numel() or (wave.ndim == 2 and len(wave) > min(32, wave.shape[1])):
        hint = ": transpose it" if wave.ndim == 2 and wave.numel() else ""
        raise DataError(f"waveform of shape {tuple(wave.shape)}, (samples,) or (channels, samples) is expected{hint}")
    check_rates(rate_hz, new_rate_hz)
    return resample(wave if wave.ndim == 1 else wave.mean(0), int(rate_hz), new_rate_hz)


def detect(
    folder: str | Path,
    files: Sequence[str],
    settings: dict[str, object],
    target: tuple[Path, str] | None = None,
    say: Callable[[Found], None] = lambda found: None,
    device: str | None = None,
    batch_size: int | None = None,
    skip_bad: bool = False,
) -> tuple[list[Found], dict[str, list]]:
    """The events of recordings in order of time, and {"skipped", "notes"}; nothing is written.

    target: (path, format) of `write_events`, checked before hours of work. say hears of each recording.
    Raises DataError as `adaptsuite.applied.readable`.
    """
    classifier = Classifier(folder, device or "auto", batch_size)
    classifier.stream(classifier.sample_rate_hz, **settings)  # raises UsageError where settings and model do not fit
    paths, skipped, remarks = readable(DOMAIN, files, skip_bad)
    if target is not None:
        table_paths(*target, paths)
    found = []
    for path in paths:
        high_hz = min(classifier.sample_rate_hz, inspect(path).rate_hz) / 2
        found.append(Found(path, in_order(classifier.events(path, **settings)), high_hz))
        say(found[-1])
    return found, {"skipped": skipped, "notes": [*remarks, *DOMAIN.notes(classifier.model, paths)]}
