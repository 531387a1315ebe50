"""Background noise for training clips: pieces of recordings from a folder, or white or pink noise."""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from adaptsuite.audio.data import SUFFIXES, read
from adaptsuite.audio.features import SAMPLE_RATE_HZ, coloured_noise
from adaptsuite.errors import DataError

COLOURS = {"white": 0.0, "pink": 1.0}
NOISE_BYTES = 1 << 29  # of decoded recordings; each file may fill its equal share, what is longer is not heard


@lru_cache(maxsize=1)
def recordings(folder: str) -> tuple[Tensor, ...]:
    """(n,) mono at 16 kHz of every audio file below a folder, sorted by path, at least one.

    Raises DataError that names the folder or the file which cannot be used.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"augment.noise: {folder} is no folder; name one, or {' or '.join(COLOURS)}")
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise DataError(f"augment.noise: no {', '.join(SUFFIXES)} file below {folder}")
    seconds = NOISE_BYTES / 4 / SAMPLE_RATE_HZ / len(paths)
    if seconds < 1:
        raise DataError(f"augment.noise: {len(paths)} files below {folder}, one second of each does not fit in memory")
    waves = []
    for path in paths:
        try:
            waves.append(read(path, SAMPLE_RATE_HZ, seconds=seconds))
        except DataError as e:
            raise DataError(f"augment.noise: {e}") from None
        if not waves[-1].any():
            raise DataError(f"augment.noise: {path} is digital silence")
    return tuple(waves)


def noise_like(wave: Tensor, source: str) -> Tensor:
    """Noise of the shape of wave (B, N): a random piece of a random file for each clip, a short file repeated."""
    if source in COLOURS:
        return coloured_noise(wave, COLOURS[source])
    bank, pieces = recordings(source), []
    for which, at in zip(torch.randint(len(bank), (len(wave),)).tolist(), torch.rand(len(wave)).tolist(), strict=True):
        sound = bank[which]
        start = int(at * len(sound))
        pieces.append(sound[torch.arange(start, start + wave.shape[1]) % len(sound)])
    return torch.stack(pieces).to(wave)
