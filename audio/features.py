"""Kaldi's log-mel filter bank inside the model graph, and what is done to its output."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SAMPLE_RATE_HZ = 16000
FRAME, HOP, FFT = 400, 160, 512  # 25 ms, 10 ms
PREEMPHASIS = 0.97
WINDOWS = {  # symmetric, as Kaldi's
    "hanning": lambda: torch.hann_window(FRAME, periodic=False),
    "hamming": lambda: torch.hamming_window(FRAME, periodic=False),
    "povey": lambda: torch.hann_window(FRAME, periodic=False).pow(0.85),
    "rectangular": lambda: torch.ones(FRAME),
}


class Fbank(nn.Module):
    """wave (B, N) at 16 kHz in [-1, 1] -> (B, T, F) log-mel energies, T = (N - 400) // 160 + 1.

    Equals torchaudio.compliance.kaldi.fbank (no dither, snip edges, power) for the whole batch at once, and exports.
    Fewer than 400 samples are zero-padded to one frame.  high_hz 0 means half the sample rate.  window: hanning, as AST
    was trained, or hamming, povey (Kaldi's own default), rectangular.
    """

    def __init__(self, num_mel_bins: int = 128, low_hz: float = 20.0, high_hz: float = 0.0, window: str = "hanning"):
        super().__init__()
        if window not in WINDOWS:
            raise ValueError(f"window {window!r} is not one of {', '.join(WINDOWS)}")
        from torchaudio.compliance.kaldi import get_mel_banks

        banks, _ = get_mel_banks(num_mel_bins, FFT, SAMPLE_RATE_HZ, low_hz, high_hz, 100.0, -500.0, 1.0)
        self.register_buffer("banks", F.pad(banks, (0, 1)).T.contiguous(), persistent=False)  # (257, F)
        self.register_buffer("window", WINDOWS[window](), persistent=False)
        self.register_buffer("epsilon", torch.tensor(torch.finfo(torch.float32).eps), persistent=False)

    @staticmethod
    def num_frames(num_samples: int) -> int:
        return (max(num_samples, FRAME) - FRAME) // HOP + 1

    floor = math.log(torch.finfo(torch.float32).eps)
    """What digital silence gives, and so what padding must hold: zeros would look louder than silence."""

    def forward(self, wave: Tensor) -> Tensor:
        wave = F.pad(wave.float(), (0, max(FRAME - wave.shape[1], 0)))
        frames = wave.unfold(1, FRAME, HOP)  # (B, T, 400)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], -1)
        frames = (frames - PREEMPHASIS * before) * self.window
        power = torch.fft.rfft(frames, FFT).abs() ** 2
        return torch.maximum(power @ self.banks, self.epsilon).log()


def normalise(x: Tensor, mean: float, std: float) -> Tensor:
    """(x - mean) / (2 std): AST's convention, the factor 2 included."""
    return (x - mean) / (2 * std)


def pad_frames(x: Tensor, frames: int, floor: Tensor | float) -> tuple[Tensor, Tensor]:
    """x (B, T, F) before normalisation, cut or padded along time to `frames` with what digital silence has
    (`Fbank.floor`); and (B, frames) bool, which frames are real."""
    real = torch.arange(frames, device=x.device) < x.shape[1]
    x = F.pad(x[:, :frames], (0, 0, 0, max(frames - x.shape[1], 0)), value=float(floor))
    return x, real.expand(x.shape[0], -1)


def gain(wave: Tensor, db: float) -> Tensor:
    """Every clip of wave (B, N) louder or softer by its own amount, uniform in +- db."""
    return wave * 10 ** ((torch.rand(len(wave), 1, device=wave.device) * 2 - 1) * db / 20)


def roll(wave: Tensor, length: Tensor | None = None) -> Tensor:
    """Every clip of wave (B, N) shifted around by its own number of samples.

    length (B,): the samples that are real. They alone go around: padding inside a clip would be taken for sound.
    """
    at = torch.arange(wave.shape[1], device=wave.device)
    size = torch.full_like(wave[:, :1], wave.shape[1], dtype=torch.long) if length is None else length[:, None]
    shift = (torch.rand(len(wave), 1, device=wave.device) * size).long()
    return wave.gather(1, torch.where(at < size, (at + shift) % size, at))


def add_noise(wave: Tensor, noise: Tensor, snr_db: Tensor, length: Tensor | None = None) -> Tensor:
    """wave + noise, both (B, N), the noise scaled to snr_db (B,) below each clip's mean power.

    length (B,): the samples that are real; powers are theirs, and padding stays silent, as it is in evaluation. A clip
    of digital silence has no signal to be so far above the noise, and stays as it is.
    """
    if length is not None:
        noise = noise * (torch.arange(wave.shape[1], device=wave.device) < length[:, None])
    power, noise_power = ((x**2).sum(1, keepdim=True) for x in (wave, noise))
    scale = (power / noise_power.clamp(min=1e-12) / 10 ** (snr_db[:, None] / 10)).sqrt()
    return wave + scale * noise


def coloured_noise(wave: Tensor, exponent: float) -> Tensor:
    """Gaussian noise of wave's shape (B, N), power falling as 1 / frequency^exponent: 0 is white, 1 is pink."""
    spectrum = torch.fft.rfft(torch.randn_like(wave))
    frequency = torch.arange(spectrum.shape[1], device=wave.device).clamp(min=1)
    return torch.fft.irfft(spectrum * frequency ** (-exponent / 2), wave.shape[1])


def spec_augment(x: Tensor, freq_mask: int, time_mask: int, frames: Tensor | None = None) -> Tensor:
    """One band of up to `freq_mask` bins and one of up to `time_mask` frames per clip set to the mean, which is 0 here
    (Park et al. 2019, arXiv:1904.08779). x (B, T, F), normalised. frames (B,): the real ones; padding is not masked.
    """
    real = torch.full_like(x[:, :1, 0], x.shape[1]) if frames is None else frames[:, None].clamp(max=x.shape[1])
    padding = torch.arange(x.shape[1], device=x.device) >= real  # (B, T)
    for dim, widest, size in ((1, time_mask, real), (2, freq_mask, torch.full_like(real, x.shape[2]))):
        if widest:
            width = (torch.rand(len(x), 1, device=x.device) * (size.clamp(max=widest) + 1)).floor()
            start = torch.rand(len(x), 1, device=x.device) * (size - width)
            at = torch.arange(x.shape[dim], device=x.device)
            masked = (at >= start) & (at < start + width)  # (B, T) or (B, F)
            masked = masked[:, :, None] if dim == 1 else masked[:, None]
            x = x.masked_fill(masked & ~padding[:, :, None], 0.0)
    return x


def resize_positions(position: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """(1, 2 + f t, D) position embeddings for another grid, by the rule of AST's authors.

    CLS and DIST keep theirs. Each axis is cut around its centre where the new grid is smaller, and stretched by
    bilinear interpolation where it is larger.
    """
    (f, t), (new_f, new_t) = grid, new_grid
    if position.shape[1] != 2 + f * t:
        raise ValueError(f"{position.shape[1]} positions are not 2 + {f} x {t}")
    special, patches = position[:, :2], position[:, 2:]
    x = patches.transpose(1, 2).reshape(1, -1, f, t)
    if new_t <= t:
        start = (t - new_t) // 2
        x = x[..., start : start + new_t]
    else:
        x = F.interpolate(x, size=(f, new_t), mode="bilinear", align_corners=False)
    if new_f <= f:
        start = (f - new_f) // 2
        x = x[:, :, start : start + new_f]
    else:
        x = F.interpolate(x, size=(new_f, new_t), mode="bilinear", align_corners=False)
    return torch.cat([special, x.flatten(2).transpose(1, 2)], 1)
