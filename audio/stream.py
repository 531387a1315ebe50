"""Sound of any length, as it comes: windows of the model's own input length, their scores, and events."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite.audio.data import check_rates
from adaptsuite.audio.events import Event, EventSettings, Tracker
from adaptsuite.devices import pick_device
from adaptsuite.errors import DataError, UsageError
from adaptsuite.metrics import to_probabilities


class Stream:
    """Push samples, receive events; memory holds one window and one batch of windows, however long it goes on.

    model: as AudioModel, `model(wave (B, N), length (B,)) -> (B, K)` with `num_samples` and `front_end.sample_rate_hz`.
    rate_hz: of the samples pushed; other rates than the model's are resampled. batch_size: windows that are evaluated
    together; 1 answers soonest. Every instant takes the scores of the window whose centre is nearest, so times are as
    exact as `hop_s`. What comes out does not depend on how the samples are cut, to the last bit.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Sequence[str],
        rate_hz: int,
        settings: EventSettings | None = None,
        task: str = "multiclass",
        batch_size: int = 1,
        device: str | torch.device = "auto",
    ):
        settings = settings or EventSettings()
        self.windows = WindowScores(model, rate_hz, settings.hop_s, batch_size, device)
        self.task, self._units = task, 2 * model.front_end.sample_rate_hz  # a centre may lie between two samples
        self._tracker = Tracker(labels, settings, self._units)
        self._pending: tuple[int, np.ndarray] | None = None  # the last window: how far it speaks, the next one tells

    def push(self, samples: np.ndarray | Tensor) -> list[Event]:
        """Events that no later sample can change. samples: (n,) float in [-1, 1]; DataError for anything else."""
        return [e for start, scores in self.windows.push(samples) for e in self._add(start, scores)]

    def close(self) -> list[Event]:
        """The rest of the events, the sound having ended."""
        events = [e for start, scores in self.windows.close() for e in self._add(start, scores)]
        if self._pending is not None:
            events += self._tracker.push(self.windows.seconds * self._units, self._pending[1])
        return events + self._tracker.close()

    def _add(self, start: int, scores: np.ndarray) -> list[Event]:
        before, self._pending = self._pending, (start, to_probabilities(scores[None], self.task)[0])
        if before is None:
            return []
        return self._tracker.push(before[0] + start + self.windows.num_samples, before[1])


class WindowScores:
    """Push samples, receive (start in the model's samples, scores (K,)) of one window every `hop_s` seconds.

    hop_s None: half a window. The last window ends where the sound ends; a sound shorter than a window gives one
    window, padded with zeros, whose length the model is told.
    """

    def __init__(
        self,
        model: nn.Module,
        rate_hz: int,
        hop_s: float | None = None,
        batch_size: int = 1,
        device: str | torch.device = "auto",
    ):
        rate, self.num_samples = model.front_end.sample_rate_hz, model.num_samples
        self.hop = self.num_samples // 2 if hop_s is None else round(hop_s * rate)
        if not 1 <= self.hop <= self.num_samples:
            window_s = self.num_samples / rate
            raise UsageError(f"hop is {hop_s} s, it must be above 0 and at most one window, {window_s:g} s")
        if batch_size < 1:
            raise UsageError(f"batch size is {batch_size}, 1 or more is expected")
        check_rates(rate_hz, rate)
        self.model, self.rate_hz, self.batch_size = model, int(rate_hz), batch_size
        self.device = pick_device(device) if isinstance(device, str) else device
        model.to(self.device)
        self._resampler = Resampler(self.rate_hz, rate)
        self._buffer = torch.empty(self.num_samples + batch_size * self.hop)
        self._first, self._filled = 0, 0  # position in the sound of the buffer's first sample; samples in the buffer
        self._next, self._heard = 0, 0  # start of the next window, end of the last one
        self._pushed, self._closed = 0, False

    @property
    def seconds(self) -> float:
        """Of sound pushed so far."""
        return self._pushed / self.rate_hz

    def push(self, samples: np.ndarray | Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Evaluated while it is iterated."""
        samples = check_samples(samples)
        if samples.ndim != 1:
            raise DataError(f"samples of shape {tuple(samples.shape)}, one channel (n,) is expected: mix it first")
        if self._closed:
            raise UsageError("this stream is closed: make a new one for another recording")
        self._pushed += len(samples)
        for piece in samples.split(self.rate_hz):  # a second at a time
            for block in self._resampler.push(piece):
                yield from self._take(block)

    def close(self) -> Iterator[tuple[int, np.ndarray]]:
        if self._closed:
            return
        self._closed = True
        for block in self._resampler.close():
            yield from self._take(block)
        total = self._first + self._filled
        yield from self._evaluate(list(range(self._next, total - self.num_samples + 1, self.hop)))
        if self._heard < total:
            yield from self._evaluate([max(total - self.num_samples, 0)])

    def _take(self, block: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        while len(block):
            room = self._next + (self.batch_size - 1) * self.hop + self.num_samples - self._first - self._filled
            piece, block = block[:room], block[room:]
            self._buffer[self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            if len(piece) == room:
                starts = [self._next + i * self.hop for i in range(self.batch_size)]
                yield from self._evaluate(starts)
                # from the last window on: if the sound ends now, the one that ends with it needs those samples
                self._next, drop = starts[-1] + self.hop, starts[-1] - self._first
                self._first, self._filled = starts[-1], self._filled - drop
                self._buffer[: self._filled] = self._buffer[drop : drop + self._filled].clone()

    def _evaluate(self, starts: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        if not starts:
            return
        waves = torch.zeros(len(starts), self.num_samples)
        for wave, start in zip(waves, starts, strict=True):
            at = start - self._first
            piece = self._buffer[at : min(at + self.num_samples, self._filled)]
            wave[: len(piece)] = piece
        self._heard = starts[-1] + self.num_samples
        lengths = torch.full((len(starts),), min(self.num_samples, self._filled))
        yield from zip(starts, outputs(self.model, waves, lengths, self.device), strict=True)


def outputs(model: nn.Module, waves: Tensor, lengths: Tensor, device: torch.device, **options) -> np.ndarray:
    """(B, K) float32 of waves (B, N) in eval mode; the model's mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(waves.to(device), lengths.to(device), **options).float().cpu().numpy()
    finally:
        model.train(training)


class Resampler:
    """Windowed-sinc resampling of a stream: what torchaudio makes of the whole sound, in pieces of one fixed size.

    Each piece is resampled with enough of its neighbours on both sides, and pieces do not depend on how the sound was
    pushed, so neither does a single bit of the result.
    """

    def __init__(self, rate_hz: int, new_rate_hz: int):
        divisor = math.gcd(rate_hz, new_rate_hz)
        self.old, self.new = rate_hz // divisor, new_rate_hz // divisor  # so many samples become so many
        self.identity = rate_hz == new_rate_hz
        if self.identity:
            return
        from torchaudio.transforms import Resample

        # float32: the filter that functional.resample has for files
        self._resample = Resample(rate_hz, new_rate_hz, dtype=torch.float32)
        width = math.ceil(6 * self.old / (0.99 * min(self.old, self.new)))  # torchaudio's filter, by its defaults
        self._context = math.ceil(width / self.old) * self.old
        self._block = max(round(0.1 * rate_hz / self.old), 1) * self.old  # a tenth of a second
        self._buffer = torch.zeros(self._context)  # the silence before the sound
        self._pushed, self._made = 0, 0

    def push(self, samples: Tensor) -> Iterator[Tensor]:
        if self.identity:
            yield samples
            return
        self._pushed += len(samples)
        yield from self._blocks(samples)

    def close(self) -> Iterator[Tensor]:
        if self.identity:
            return
        total = -(-self._pushed * self.new // self.old)
        while (missing := total - self._made) > 0:
            for block in self._blocks(torch.zeros(self._block)):  # the silence behind it
                yield block[:missing]
                missing -= len(block[:missing])

    def _blocks(self, samples: Tensor) -> Iterator[Tensor]:
        self._buffer = torch.cat([self._buffer, samples])
        while len(self._buffer) >= self._block + 2 * self._context:
            piece = self._resample(self._buffer[: self._block + 2 * self._context])
            start, count = self._context // self.old * self.new, self._block // self.old * self.new
            self._buffer = self._buffer[self._block :].clone()
            self._made += count
            yield piece[start : start + count]


def check_samples(samples: np.ndarray | Tensor | Sequence[float]) -> Tensor:
    """Float32 samples on the CPU. DataError for integers (their full scale is unknown), NaN and infinite values."""
    samples = samples.detach().cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if samples.dtype.kind != "f" and samples.size:
        raise DataError(f"samples are {samples.dtype}, floats in [-1, 1] are expected: divide by the full scale first")
    samples = torch.from_numpy(np.array(samples, dtype=np.float32))  # a copy: torch takes no view that is read-only
    if not samples.isfinite().all():
        raise DataError("samples hold NaN or infinite values")
    return samples
