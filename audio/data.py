"""Audio files to tensors: mono float32 at the backbone's rate, cut into windows of one input length."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite.errors import DataError
from adaptsuite.memory import Memory

FORMATS = {  # by suffix, in libsndfile's words
    ".wav": ("WAV", "WAVEX", "RF64", "W64"),
    ".flac": ("FLAC",),
    ".ogg": ("OGG",),
    ".mp3": ("MP3",),
    ".aiff": ("AIFF",),
    ".aif": ("AIFF",),
}
SUFFIXES = tuple(FORMATS)
RATES_HZ = (1000, 768000)
CHUNK = re.compile(r"^ *(?:data|SSND) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
HEADER_SLOP = 64  # bytes: some programs count headers as sound
UNKNOWN_LENGTH = 0x7FFFF000  # what programs write that pipe a wav: from here on, all that follows is sound
FULL_SCALE, CLIPPED_SHARE = 0.9999, 1e-3  # a file is clipped when more than this share of it is at full scale
LOUDEST = 1e6  # of a float file, some of which count in 16 bits: what is beyond is no sound
MOST_KERNEL = 1 << 24  # values of a resampling filter, which are many for two rates without a common divisor
BLOCK = 1 << 20  # samples of all channels that are decoded at a time


@dataclass(frozen=True)
class Clip:
    """What a file's header says, looked at before anything is decoded."""

    path: Path
    rate_hz: int
    channels: int
    samples: int  # per channel
    format: str = "WAV"  # libsndfile's name of what the file holds, whatever its suffix

    @property
    def seconds(self) -> float:
        return self.samples / self.rate_hz


def inspect(path: Path) -> Clip:
    """Reads the header. Raises DataError that names the file and what is wrong with it."""
    import soundfile

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, RuntimeError) as e:
        raise DataError(f"{path}: not readable as audio ({_reason(e)}); wav, flac, ogg, mp3 or aiff is expected") from e
    if not RATES_HZ[0] <= info.samplerate <= RATES_HZ[1]:
        raise DataError(f"{path}: sample rate {info.samplerate} Hz is not between {RATES_HZ[0]} and {RATES_HZ[1]}")
    if not 1 <= info.channels <= 32:
        raise DataError(f"{path}: {info.channels} channels, 1 to 32 can be mixed to mono")
    if info.frames <= 0:
        raise DataError(f"{path}: the file holds no samples")
    said = CHUNK.search(info.extra_info)  # wav and aiff; libsndfile reads what is there and does not complain
    if said and int(said[2]) + HEADER_SLOP < int(said[1]) < UNKNOWN_LENGTH:
        raise DataError(f"{path}: truncated, {said[2]} of {said[1]} bytes of sound are there")
    return Clip(path, info.samplerate, info.channels, info.frames, info.format)


def read(path: Path, rate_hz: int, start_s: float = 0.0, seconds: float | None = None) -> Tensor:
    """(N,) float32 at `rate_hz`: channels averaged, resampled by windowed sinc; a piece of the file or all of it.

    Raises DataError for a file that is damaged, shorter than its header says, or holds NaN or infinite values.
    """
    clip = inspect(path)
    first = round(start_s * clip.rate_hz)
    count = clip.samples - first if seconds is None else min(math.ceil(seconds * clip.rate_hz), clip.samples - first)
    check_rates(clip.rate_hz, rate_hz, f"{path}: ")
    wave = next(_decode(clip, first, count, count)) if count > 0 else torch.zeros(0)
    return resample(wave, clip.rate_hz, rate_hz)


def blocks(path: Path) -> Iterator[Tensor]:
    """A file of any length as pieces (n,) float32 at its own rate, channels averaged. Raises DataError as `read`."""
    clip = inspect(path)
    yield from _decode(clip, 0, clip.samples, BLOCK // clip.channels)


def _decode(clip: Clip, first: int, count: int, block: int) -> Iterator[Tensor]:
    import soundfile

    try:
        with soundfile.SoundFile(str(clip.path)) as file:
            file.seek(first)
            for at in range(0, count, block):
                wanted = min(block, count - at)
                data = file.read(wanted, dtype="float32", always_2d=True)
                if len(data) < wanted:
                    raise DataError(f"{clip.path}: truncated, {at + len(data)} of {count} samples are there")
                if not np.isfinite(data).all():
                    raise DataError(f"{clip.path}: holds NaN or infinite samples")
                if (peak := float(np.abs(data).max())) > LOUDEST:
                    raise DataError(f"{clip.path}: holds samples up to {peak:.1e}, [-1, 1] is full scale")
                yield torch.from_numpy(data).mean(1)
    except (soundfile.LibsndfileError, RuntimeError) as e:
        raise DataError(f"{clip.path}: damaged ({_reason(e)})") from e


def resample(wave: Tensor, rate_hz: int, new_rate_hz: int) -> Tensor:
    """wave (..., N) by windowed sinc: (..., ceil(N new / old)). Raises DataError as `check_rates`."""
    if rate_hz == new_rate_hz:
        return wave
    from torchaudio.functional import resample

    check_rates(rate_hz, new_rate_hz)
    return resample(wave, rate_hz, new_rate_hz)


def check_rates(rate_hz: int, new_rate_hz: int, where: str = "") -> None:
    """Raises DataError for a rate that no recorder has, and for two whose filter would fill gigabytes."""
    low, high = RATES_HZ
    if not low <= rate_hz <= high or int(rate_hz) != rate_hz:
        raise DataError(f"{where}sample rate {rate_hz} Hz is not a whole number from {low} to {high}")
    divisor = math.gcd(int(rate_hz), new_rate_hz)
    if (rate_hz // divisor) * (new_rate_hz // divisor) > MOST_KERNEL:
        raise DataError(
            f"{where}sample rate {rate_hz} Hz has too small a common divisor with {new_rate_hz} Hz: "
            "give it the recorder's nominal rate, or convert it first"
        )


def survey(path: Path) -> dict[str, Any]:
    """Header facts of a file and what may be wrong with its sound: {"seconds", "rate_hz", "channels", "remarks"}.

    Reads it in blocks, so that a recording of any length fits into memory. Raises DataError where `read` would.
    """
    clip = inspect(path)
    peak, clipped = 0.0, 0
    for piece in blocks(path):
        piece = piece.abs()
        peak = max(peak, float(piece.max()))
        clipped += int((piece >= FULL_SCALE).sum())
    remarks = []
    if peak == 0:
        remarks.append("digital silence")
    elif peak < 1e-3:
        remarks.append(f"very quiet, peak {peak:.1e}")
    if clipped > CLIPPED_SHARE * clip.samples:
        remarks.append(f"clipped, {clipped / clip.samples:.1%} of the samples at full scale")
    if clip.seconds < 0.025:
        remarks.append(f"shorter than one frame, {clip.seconds * 1000:.0f} ms")
    return {"seconds": clip.seconds, "rate_hz": clip.rate_hz, "channels": clip.channels, "remarks": remarks}


def _reason(error: Exception) -> str:
    return str(error).rpartition(": ")[2].strip().rstrip(".") or type(error).__name__


def _counts(found: Counter, unit: str) -> str:
    """`120 files of 44100 Hz, 3 of 8000 Hz`, most frequent first."""
    (first, n), *others = found.most_common()
    return ", ".join([f"{n} file{'s' * (n > 1)} of {first} {unit}", *(f"{n} of {value} {unit}" for value, n in others)])


def rate_remarks(clips: Sequence[Clip], rate_hz: int) -> list[str]:
    """What is said once of the files of a command: resampled, mixed to mono, without the band the model listens to."""
    found = []
    if others := Counter(c.rate_hz for c in clips if c.rate_hz != rate_hz):
        found.append(f"resampled: {_counts(others, 'Hz')} to {rate_hz} Hz")
    if channels := Counter(c.channels for c in clips if c.channels > 1):
        found.append(f"mixed to mono: {_counts(channels, 'channels')}")
    if low := {hz: n for hz, n in others.items() if hz < rate_hz}:
        found.append(
            f"{sum(low.values())} of {len(clips)} files hold nothing above {max(low) / 2:g} Hz, the model listens "
            f"up to {rate_hz / 2:g} Hz: expect less of it there"
        )
    return found


def window_starts(seconds: float, window_s: float) -> list[float]:
    """Starts in seconds of windows that cover a clip; the last one ends where the clip ends, so it may overlap."""
    if seconds <= window_s * 1.02:  # a few samples more than a window are not worth a second one
        return [0.0]
    count = math.ceil(seconds / window_s)
    return [min(i * window_s, seconds - window_s) for i in range(count)]


class Windows:
    """Map-style dataset: every window of every row, {"wave": (N,), "length", "label", "item"}.

    A clip shorter than the window is padded with zeros and its length told, so that padding can be masked; a longer one
    gives several windows, and `mean_by_row` joins what the model says of them.
    """

    input = "wave"  # what a cache of features stands in for

    def __init__(
        self,
        paths: Sequence[Path],
        targets: np.ndarray | None,
        rate_hz: int,
        num_samples: int,
        memory: Memory | None = None,
    ):
        self.paths, self.rate_hz, self.num_samples = list(paths), rate_hz, num_samples
        self.clips = [inspect(path) for path in self.paths]
        self.targets = None if targets is None else torch.as_tensor(targets)
        self.items = [
            (row, start)
            for row, clip in enumerate(self.clips)
            for start in window_starts(clip.seconds, num_samples / rate_hz)
        ]
        self.rows = np.array([row for row, _ in self.items])
        self.starts = np.array([start for _, start in self.items])  # seconds
        self._memory = Memory() if memory is None else memory  # shared by the parts and folds of one run

    @property
    def item_targets(self) -> np.ndarray | None:
        """(windows,) or (windows, K) targets, without reading a file."""
        return None if self.targets is None else self.targets.numpy()[self.rows]

    def load(self) -> None:
        """Reads into memory as much as fits: what is damaged there is found now. Raises DataError."""
        for index in range(len(self)):
            if not self._memory.keep(self._key(index), self._wave(index)):
                return

    def remarks(self) -> list[str]:
        """What was changed in these files or makes them doubtful; of their sound, as far as it is in memory."""
        found = rate_remarks(self.clips, self.rate_hz)
        silent, clipped, ends = [], [], np.searchsorted(self.rows, np.arange(len(self.clips) + 1))
        for clip, first, last in zip(self.clips, ends, ends[1:], strict=False):
            waves = [self._memory.get(self._key(i)) for i in range(first, last)]
            if any(wave is None for wave in waves):
                continue
            sound = torch.cat(waves)
            if not sound.any():
                silent.append(clip.path.name)
            elif (sound.abs() >= FULL_SCALE).float().mean() > CLIPPED_SHARE:
                clipped.append(clip.path.name)
        if away := sum(self._key(i) not in self._memory for i in range(len(self))):
            found.append(
                f"{away} of {len(self)} clips do not fit into memory and are read each time: "
                "a damaged one stops the run at its turn, unless `check` or --skip-bad found it before"
            )
        lying = [c.path.name for c in self.clips if c.format not in FORMATS.get(c.path.suffix.lower(), (c.format,))]
        for names, what in (
            (silent, "digital silence"),
            (clipped, "clipped"),
            (lying, "of another format than their suffix says, and read as what they are"),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                found.append(f"{len(names)} of {len(self.clips)} files are {what}: {', '.join(names[:5])}{more}")
        return found

    def __len__(self) -> int:
        return len(self.items)

    def _key(self, index: int) -> tuple[Path, float, int, int]:
        row, start = self.items[index]
        return self.paths[row], start, self.num_samples, self.rate_hz

    def _wave(self, index: int) -> Tensor:
        wave = self._memory.get(self._key(index))
        if wave is None:
            row, start = self.items[index]
            wave = read(self.paths[row], self.rate_hz, start, self.num_samples / self.rate_hz)[: self.num_samples]
            if self.targets is not None:  # what has none is read once: keeping it would only fill the memory
                self._memory.keep(self._key(index), wave)
        return wave

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, wave = self.rows[index], self._wave(index)
        padded = torch.nn.functional.pad(wave, (0, self.num_samples - len(wave)))
        item = {"wave": padded, "length": len(wave), "item": index}
        return item if self.targets is None else {**item, "label": self.targets[row]}

    def mean_by_row(self, outputs: np.ndarray) -> np.ndarray:
        """(windows, K) scores -> (rows, K), averaged over the windows of a row."""
        total = np.zeros((len(self.paths), outputs.shape[1]), dtype=outputs.dtype)
        np.add.at(total, self.rows, outputs)
        return total / np.bincount(self.rows, minlength=len(self.paths))[:, None]
