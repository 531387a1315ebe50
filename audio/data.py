"""Audio files to tensors: mono float32 at the backbone's rate, cut into windows of one input length."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite.errors import DataError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
RATES_HZ = (1000, 768000)
CACHE_BYTES = 2 << 30  # decoded clips kept in memory; beyond it files are read again
MOST_KERNEL = 1 << 24  # values of a resampling filter, which are many for two rates without a common divisor
BLOCK = 1 << 20  # samples of all channels that are decoded at a time


@dataclass(frozen=True)
class Clip:
    """What a file's header says, looked at before anything is decoded."""

    path: Path
    rate_hz: int
    channels: int
    samples: int  # per channel

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
    # libsndfile says nothing when a wav or aiff ends early, but notes it; a size near 4 GiB means "not known yet"
    for size, found in re.findall(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", info.extra_info):
        if int(found) + 1 < int(size) < 0xFFFF0000:
            raise DataError(f"{path}: truncated, {found} of {size} bytes of sound are there")
    return Clip(path, info.samplerate, info.channels, info.frames)


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
        clipped += int((piece >= 0.9999).sum())
    remarks = []
    if peak == 0:
        remarks.append("digital silence")
    elif peak < 1e-3:
        remarks.append(f"very quiet, peak {peak:.1e}")
    if clipped > 1e-3 * clip.samples:
        remarks.append(f"clipped, {clipped / clip.samples:.1%} of the samples at full scale")
    if clip.seconds < 0.025:
        remarks.append(f"shorter than one frame, {clip.seconds * 1000:.0f} ms")
    return {"seconds": clip.seconds, "rate_hz": clip.rate_hz, "channels": clip.channels, "remarks": remarks}


def _reason(error: Exception) -> str:
    return str(error).rpartition(": ")[2].strip().rstrip(".") or type(error).__name__


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

    def __init__(
        self,
        paths: Sequence[Path],
        targets: np.ndarray | None,
        rate_hz: int,
        num_samples: int,
        cache: dict[Any, Tensor] | None = None,
    ):
        self.paths, self.rate_hz, self.num_samples = list(paths), rate_hz, num_samples
        self.targets = None if targets is None else torch.as_tensor(targets)
        self.items = [
            (row, start)
            for row, path in enumerate(self.paths)
            for start in window_starts(inspect(path).seconds, num_samples / rate_hz)
        ]
        self.rows = np.array([row for row, _ in self.items])
        self.starts = np.array([start for _, start in self.items])  # seconds
        self._cache = {} if cache is None else cache  # shared by the parts and folds of one run
        # what has no target is read once: keeping it would only fill the memory
        self._keep = targets is not None and len(self.items) * num_samples * 4 <= CACHE_BYTES

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, start = self.items[index]
        key = (self.paths[row], start, self.num_samples)
        wave = self._cache.get(key)
        if wave is None:
            wave = read(self.paths[row], self.rate_hz, start, self.num_samples / self.rate_hz)[: self.num_samples]
            if self._keep:
                self._cache[key] = wave
        padded = torch.nn.functional.pad(wave, (0, self.num_samples - len(wave)))
        item = {"wave": padded, "length": len(wave), "item": index}
        return item if self.targets is None else {**item, "label": self.targets[row]}

    def mean_by_row(self, outputs: np.ndarray) -> np.ndarray:
        """(windows, K) scores -> (rows, K), averaged over the windows of a row."""
        total = np.zeros((len(self.paths), outputs.shape[1]), dtype=outputs.dtype)
        np.add.at(total, self.rows, outputs)
        return total / np.bincount(self.rows, minlength=len(self.paths))[:, None]
