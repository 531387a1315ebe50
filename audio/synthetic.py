"""Generated sounds: random speech of a source-filter voice, and events of many kinds, from seeded latents.

A latent says WHAT sounds (a sequence of phonemes; rates, envelopes, resonances, pitch movement). A render says HOW:
voice or source size, pitch, tempo, timing, equaliser, room, noise, level. Two renders of one latent are a positive pair
for contrastive learning, and the takes of one group in `make_dataset`.
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RATE_HZ = 16000
STEP = 128  # samples between control points (8 ms)
PEAKS = 4  # resonances of a source
VOICED, NOISE, PITCH, TILT, PEAK, WIDTH, GAIN = 0, 1, 2, 3, 4, 8, 12  # columns of a control track, 16 in all
COLUMNS = 16

# name: (voicing, noise, three resonances in Hz, their gains, relative width, seconds); vowels after Peterson and Barney
# 1952, table II. A stop is silence, then its burst.
PHONEMES = {
    "i": (1.0, 0.01, (270, 2290, 3010), (1, 0.5, 0.4), 0.1, 0.14),
    "ih": (1.0, 0.01, (390, 1990, 2550), (1, 0.5, 0.4), 0.1, 0.10),
    "eh": (1.0, 0.01, (530, 1840, 2480), (1, 0.6, 0.4), 0.1, 0.13),
    "ae": (1.0, 0.01, (660, 1720, 2410), (1, 0.6, 0.4), 0.1, 0.15),
    "ah": (1.0, 0.01, (730, 1090, 2440), (1, 0.8, 0.3), 0.1, 0.15),
    "ao": (1.0, 0.01, (570, 840, 2410), (1, 0.8, 0.2), 0.1, 0.15),
    "u": (1.0, 0.01, (300, 870, 2240), (1, 0.5, 0.1), 0.1, 0.14),
    "uh": (1.0, 0.01, (640, 1190, 2390), (1, 0.7, 0.3), 0.1, 0.11),
    "er": (1.0, 0.01, (490, 1350, 1690), (1, 0.7, 0.5), 0.1, 0.15),
    "m": (0.4, 0.0, (250, 1000, 2200), (1, 0.12, 0.06), 0.2, 0.08),
    "n": (0.4, 0.0, (250, 1700, 2600), (1, 0.15, 0.08), 0.2, 0.08),
    "l": (0.6, 0.0, (360, 1300, 2700), (1, 0.3, 0.2), 0.12, 0.07),
    "r": (0.6, 0.0, (330, 1060, 1380), (1, 0.5, 0.4), 0.12, 0.08),
    "w": (0.6, 0.0, (290, 610, 2150), (1, 0.5, 0.05), 0.12, 0.07),
    "j": (0.6, 0.0, (260, 2070, 3020), (1, 0.4, 0.3), 0.12, 0.06),
    "s": (0.0, 0.30, (4600, 5800, 7200), (0.5, 1, 1), 0.2, 0.13),
    "sh": (0.0, 0.30, (2500, 3400, 5000), (1, 1, 0.5), 0.25, 0.13),
    "f": (0.0, 0.10, (1500, 4000, 7000), (0.5, 0.6, 0.8), 0.8, 0.11),
    "th": (0.0, 0.06, (1400, 5000, 7300), (0.3, 0.6, 0.9), 0.7, 0.10),
    "h": (0.0, 0.15, (600, 1600, 2600), (1, 0.8, 0.6), 0.5, 0.07),
    "z": (0.3, 0.18, (300, 4800, 6500), (0.6, 0.8, 1), 0.2, 0.09),
    "v": (0.4, 0.06, (280, 1300, 4500), (1, 0.2, 0.3), 0.5, 0.07),
    "p": (0.0, 0.5, (700, 1300, 2400), (1, 0.6, 0.3), 0.6, 0.03),
    "t": (0.0, 0.5, (3000, 4200, 6000), (0.6, 1, 0.8), 0.3, 0.04),
    "k": (0.0, 0.5, (1500, 2200, 3800), (0.7, 1, 0.4), 0.25, 0.04),
    "b": (0.2, 0.2, (300, 900, 2200), (1, 0.4, 0.2), 0.4, 0.02),
    "d": (0.2, 0.2, (300, 1800, 3500), (1, 0.6, 0.6), 0.3, 0.02),
    "g": (0.2, 0.2, (300, 1600, 2400), (1, 0.8, 0.5), 0.3, 0.02),
}
NAMES = list(PHONEMES)
VOWELS, SONORANTS = NAMES[:9], NAMES[9:15]
STOPS = set(NAMES[-6:])
NUM_PHONEMES = len(NAMES)


@dataclass
class Latent:
    """What sounds. Speech has phonemes; anything else has `values`, in [-1, 1] each, named by EVENT_AXES."""

    phonemes: list[int] = field(default_factory=list)
    values: np.ndarray | None = None
    seed: int = 0  # of the details that both renders share

    @property
    def speech(self) -> bool:
        return self.values is None


EVENT_AXES = (
    "voiced noise impulse rate jitter attack decay sustain variety pitch glide arch vibrato_rate vibrato "
    "peak1 peak2 peak3 gain2 gain3 width1 width2 width3 tilt sweep am_rate am slow_rate slow density echo "
    "second_level second_peak second_tilt"
).split()
TARGETS = len(EVENT_AXES) + 3 * NUM_PHONEMES


def sample_latent(rng: np.random.Generator, speech: float = 0.45, syllables: int = 2) -> Latent:
    """speech: probability of a spoken word, of 1 to `syllables` syllables."""
    seed = int(rng.integers(2**31))
    if rng.random() < speech:
        return Latent(_word(rng, 1 + int(rng.integers(syllables))), seed=seed)
    u = dict(zip(EVENT_AXES, rng.uniform(-1, 1, len(EVENT_AXES)), strict=True))
    source = rng.dirichlet((0.35, 0.35, 0.25))  # most sounds have one clear kind of source
    u["voiced"], u["noise"], u["impulse"] = 2 * source - 1
    absent = {"vibrato": 0.5, "am": 0.55, "slow": 0.6, "glide": 0.3, "sweep": 0.5, "second_level": 0.5}
    for name, probability in absent.items():
        if rng.random() < probability:
            u[name] = 0.0 if name in ("glide", "sweep") else -1.0
    if rng.random() < 0.3:
        u["sustain"] = 1.0  # never stops
    return Latent(values=np.array([u[n] for n in EVENT_AXES]), seed=seed)


def mutate(latent: Latent, rng: np.random.Generator) -> Latent:
    """A near neighbour: one phoneme replaced by another of its kind, or three axes drawn again."""
    seed = int(rng.integers(2**31))
    if latent.speech:
        phonemes = list(latent.phonemes)
        at = int(rng.integers(len(phonemes)))
        vowel = NAMES[phonemes[at]] in VOWELS
        phonemes[at] = int(rng.integers(9) if vowel else 9 + rng.integers(NUM_PHONEMES - 9))
        return Latent(phonemes, seed=seed)
    values = latent.values.copy()
    values[rng.integers(3, len(values), 3)] = rng.uniform(-1, 1, 3)
    return Latent(values=values, seed=seed)


def _word(rng: np.random.Generator, syllables: int) -> list[int]:
    word = []
    for _ in range(syllables):
        if rng.random() < 0.85:
            word.append(9 + int(rng.integers(NUM_PHONEMES - 9)))
            if NAMES[word[-1]] not in SONORANTS and rng.random() < 0.2:
                word.append(NAMES.index(str(rng.choice(["r", "l", "w", "j"]))))
        word.append(int(rng.integers(9)))
        if rng.random() < 0.35:  # diphthong
            word.append(NAMES.index(str(rng.choice(["i", "u", "ih", "uh", "er"]))))
        if rng.random() < 0.5:
            word.append(9 + int(rng.integers(NUM_PHONEMES - 9)))
            if rng.random() < 0.2:
                word.append(NAMES.index(str(rng.choice(["s", "t", "z", "d"]))))
    return word


def targets(latent: Latent) -> np.ndarray:
    """(TARGETS,) the event's axes, then which phonemes sound in the first, middle and last third; NaN where neither."""
    out = np.full(TARGETS, np.nan, np.float32)
    axes = len(EVENT_AXES)
    if latent.speech:
        parts = np.zeros((3, NUM_PHONEMES), np.float32)
        for i, phoneme in enumerate(latent.phonemes):
            place = (i + 0.5) / len(latent.phonemes) * 3 - 0.5
            parts[:, phoneme] = np.maximum(parts[:, phoneme], np.clip(1.2 - np.abs(np.arange(3) - place), 0, 1))
        out[axes:] = parts.ravel()
    else:
        out[:axes] = latent.values
    return out


@dataclass
class Source:
    """One source of a scene, ready for `render`."""

    track: np.ndarray  # (C, 16) control points
    size: float  # factor on all resonances
    brightness: float  # of the pulse, in Hz
    impulses: tuple[np.ndarray, np.ndarray]  # sample positions, amplitudes
    phonemes: np.ndarray  # (C,) index, -1 where none
    end: int  # sample after which the recording holds nothing


def speak(latent: Latent, num_samples: int, rng: np.random.Generator) -> Source:
    """A word by one voice: targets per phoneme, joined by linear transitions."""
    pitch, size = np.log2(rng.uniform(80, 300)), 2 ** rng.uniform(-0.22, 0.28)
    tempo, effort = 2 ** rng.uniform(-0.6, 0.6), rng.uniform(0.5, 1)
    shift = rng.normal(0, 0.04, (NUM_PHONEMES, 3))  # this voice's own vowels
    slope, bend = rng.normal(-0.25, 0.25), rng.normal(0, 0.2)
    spoken = sum(PHONEMES[NAMES[p]][5] + 0.05 * (NAMES[p] in STOPS) for p in latent.phonemes) * tempo
    room = num_samples / RATE_HZ
    if spoken > 0.95 * room:
        tempo *= 0.95 * room / spoken
        spoken = 0.95 * room
    tight = rng.random() < 0.6  # cut at the word, as short recordings are
    clock = rng.uniform(0, 0.06) if tight else rng.uniform(0, room - spoken)
    times, knots, marks = [0.0, max(clock - 0.02, 1e-3)], [], []
    for p in latent.phonemes:
        voiced, noise, freq, gain, width, seconds = PHONEMES[NAMES[p]]
        row = np.zeros(COLUMNS)
        row[VOICED], row[NOISE] = voiced * rng.uniform(0.8, 1.2), noise * rng.uniform(0.6, 1.5)
        row[TILT] = -1.0 if voiced > 0.1 else 0.0
        row[PEAK : PEAK + 4] = np.log2([*freq, 3600]) + np.append(shift[p], 0) + np.append(rng.normal(0, 0.03, 3), 0)
        row[WIDTH : WIDTH + 4], row[GAIN : GAIN + 4] = width, [*gain, 0.15]
        if not knots:
            knots += [row * _SILENT, row * _SILENT]
        if NAMES[p] in STOPS:
            closure = rng.uniform(0.03, 0.07) * tempo
            times += [clock + 0.004, clock + closure]
            knots += [row * _SILENT, row * _SILENT]
            marks.append((clock, p))
            clock += closure
            seconds *= rng.uniform(0.6, 1.6)
        seconds *= tempo * rng.uniform(0.75, 1.3)
        edge = min(0.03, 0.3 * seconds)
        times += [clock + edge, clock + seconds - edge]
        knots += [row, row]
        marks.append((clock, p))
        clock += seconds
    times += [clock + 0.02, max(room, clock + 0.03)]
    knots += [knots[-1] * _SILENT] * 2
    at = np.arange(num_samples // STEP + 1) * STEP / RATE_HZ
    track = _lerp(at, np.array(times), np.array(knots))
    place = np.clip((at - times[1]) / max(clock - times[1], 0.05), 0, 1)
    track[:, PITCH] = pitch + slope * (place - 0.5) + bend * np.sin(np.pi * place) + 0.01 * rng.normal(size=len(at))
    track[:, TILT] *= effort
    phonemes = np.full(len(at), -1)
    for start, p in marks:
        phonemes[at >= start] = p
    phonemes[at >= clock] = -1
    end = int((clock + rng.uniform(0, 0.08)) * RATE_HZ) if tight else num_samples
    nothing = np.zeros(0, np.int64), np.zeros(0)
    return Source(track, size, rng.uniform(2500, 5000), nothing, phonemes, end)


_SILENT = np.ones(COLUMNS)
_SILENT[[VOICED, NOISE]] = 0


def sound(latent: Latent, num_samples: int, rng: np.random.Generator) -> list[Source]:
    """One or two sources of an event sound: onsets, envelopes, pitch and resonances that move with each event."""
    a = {n: float(v) for n, v in zip(EVENT_AXES, latent.values, strict=True)}
    u = {n: (v + 1) / 2 for n, v in a.items()}
    pitch_shift, size, tempo = rng.normal(0, 0.15), 2 ** rng.uniform(-0.2, 0.2), 2 ** rng.normal(0, 0.12)
    seconds = num_samples / RATE_HZ
    at = np.arange(num_samples // STEP + 1) * STEP / RATE_HZ
    rate = 0.4 * 60 ** u["rate"] * tempo  # events a second, .4 to 24
    period = 1 / rate
    count = max(int(seconds * rate) + 2, 2)
    irregular = u["jitter"] ** 2
    gaps = period * np.exp(rng.normal(0, 1, count) * irregular * 0.8 + rng.normal(0, 0.02))
    onsets = np.cumsum(gaps) - gaps[0] - rng.random() * period * 0.8 + 0.05 * (seconds > 0.5)
    onsets = onsets[onsets < seconds - 0.05] if (onsets < seconds - 0.05).any() else np.array([0.05])
    which = np.clip(np.searchsorted(onsets, at, side="right") - 1, 0, None)
    since = at - onsets[which]
    loud = np.exp(rng.normal(0, 1, len(onsets)) * 0.7 * u["variety"])
    attack, decay = 0.004 * 60 ** u["attack"], min(0.02 * 100 ** u["decay"], 6 * period)
    attack = min(attack, 0.5 * period)
    envelope = np.clip(since / attack, 0, 1) * np.exp(-np.clip(since - attack, 0, None) / decay) * loud[which]
    envelope = np.where(since < 0, 0.0, envelope)
    level = max(a["sustain"], 0.0)
    envelope = level * np.sqrt(np.mean(envelope**2) + 0.01) + (1 - level) * envelope
    if u["am"] > 0:
        am_hz = 2 * 20 ** u["am_rate"]
        envelope = envelope * (1 - u["am"] * (0.5 + 0.5 * np.cos(2 * np.pi * am_hz * at + rng.uniform(0, 6))))
    if u["slow"] > 0:
        waves = _smooth(len(at), 0.3 * 15 ** u["slow_rate"], seconds, rng)
        envelope = envelope * np.exp(1.2 * u["slow"] * waves)
    local = np.clip(since / max(attack + 1.5 * decay, 0.03), 0, 1)
    each = np.random.default_rng(latent.seed).normal(0, 1, 64)[which % 64] * u["variety"]
    track = np.zeros((len(at), COLUMNS))
    track[:, VOICED] = envelope * u["voiced"]
    track[:, NOISE] = envelope * u["noise"] * 0.4
    vibrato = 0.15 * u["vibrato"] ** 2 * np.sin(2 * np.pi * 2 * 8 ** u["vibrato_rate"] * at)
    moved = a["glide"] * (local - 0.5) + 0.6 * a["arch"] * np.sin(np.pi * local) + 0.3 * each + vibrato
    base = np.log2(60 * 40 ** u["pitch"])  # 60 to 2400 Hz
    track[:, PITCH] = np.clip(base + pitch_shift + moved, np.log2(40), np.log2(5000))
    track[:, TILT] = 1.2 * a["tilt"] - 0.3
    sweep = 1.2 * a["sweep"] * (local - 0.5) + 0.15 * each
    for i, name in enumerate(("peak1", "peak2", "peak3")):
        track[:, PEAK + i] = np.log2(120 * 55 ** u[name]) + sweep  # 120 to 6600 Hz
        track[:, WIDTH + i] = 0.05 * 25 ** u[f"width{i + 1}"]
    track[:, PEAK + 3], track[:, WIDTH + 3] = 11.0, 4.0  # the unresonated rest
    track[:, GAIN : GAIN + 4] = [1, u["gain2"], u["gain3"], 0.03 + 0.1 * u["echo"]]
    impulses = _clicks(u, seconds, onsets, rng)
    brightness = 600 * 10 ** u["echo"]
    end = num_samples if rng.random() < 0.8 else int(num_samples * rng.uniform(0.4, 1))
    none = np.full(len(at), -1)
    sources = [Source(track, size, brightness, impulses, none, end)]
    if u["second_level"] > 0:
        bed = np.zeros_like(track)
        bed[:, NOISE] = 0.1 * u["second_level"] * np.exp(0.4 * _smooth(len(at), 1.0, seconds, rng))
        bed[:, PITCH], bed[:, TILT] = 8, 1.5 * a["second_tilt"]
        bed[:, PEAK : PEAK + 4] = np.log2(120 * 50 ** u["second_peak"])
        bed[:, WIDTH : WIDTH + 4], bed[:, GAIN] = 0.6, 1
        nothing = np.zeros(0, np.int64), np.zeros(0)
        sources.append(Source(bed, size, 1000, nothing, none, end))
    return sources


def _clicks(u: dict[str, float], seconds: float, onsets: np.ndarray, rng: np.random.Generator):
    """One click per event where regular, a shower of them where dense: ticks, crackle, drops."""
    if u["impulse"] < 0.1:
        return np.zeros(0, np.int64), np.zeros(0)
    places = onsets[onsets >= 0]
    if u["density"] > 0.4:
        shower = rng.random(int(seconds * 5 * 60 ** (u["density"] * 1.6 - 0.6)) + 1) * seconds
        places = np.concatenate([places, shower]) if u["density"] < 0.7 else shower
    places = places[places < seconds - 0.01]
    size = 12 * u["impulse"] * np.exp(rng.normal(0, 1, len(places)) * (0.1 + u["variety"]))
    return (places * RATE_HZ).astype(np.int64), size * rng.choice([-1, 1], len(places))


def _lerp(at: np.ndarray, times: np.ndarray, knots: np.ndarray) -> np.ndarray:
    times = np.maximum.accumulate(times)
    i = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 2)
    share = np.clip((at - times[i]) / np.maximum(times[i + 1] - times[i], 1e-6), 0, 1)[:, None]
    return knots[i] * (1 - share) + knots[i + 1] * share


def _smooth(count: int, rate_hz: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    knots = rng.normal(0, 1, int(seconds * rate_hz) + 3)
    return np.interp(np.linspace(0, len(knots) - 1.001, count), np.arange(len(knots)), knots)


def render(scenes: list[list[Source]], num_samples: int, rng: np.random.Generator, dry: bool = False) -> Tensor:
    """(B, num_samples) in [-1, 1]: sources summed, then room, equaliser, noise, level, 16-bit steps.

    All scenes at once. dry: neither room, equaliser nor noise.
    """
    sources = [s for scene in scenes for s in scene]
    owner = torch.tensor([i for i, scene in enumerate(scenes) for _ in scene])
    seed = torch.Generator().manual_seed(int(rng.integers(2**31)))
    sounds = _excite_and_filter(sources, num_samples, seed)
    dry_sound = torch.zeros(len(scenes), num_samples).index_add_(0, owner, sounds)
    wave = dry_sound if dry else _record(dry_sound, rng, seed)
    ends = torch.tensor([scene[0].end for scene in scenes])
    wave = wave / wave.abs().amax(1, keepdim=True).clamp_min(1e-6)
    loudness = torch.from_numpy(10 ** -(rng.beta(1, 2.5, len(scenes)) * 40 / 20)).float()
    wave = wave * loudness[:, None] * (torch.arange(num_samples) < ends[:, None])
    return (wave * 32767).round() / 32768


def _excite_and_filter(sources: list[Source], num_samples: int, seed: torch.Generator) -> Tensor:
    track = torch.from_numpy(np.stack([s.track for s in sources])).float()  # (S, C, 16)
    size = torch.tensor([s.size for s in sources])[:, None, None]
    fine = torch.nn.functional.interpolate(track[..., :3].transpose(1, 2), scale_factor=STEP, mode="linear")
    fine = fine[..., STEP // 2 : STEP // 2 + num_samples]
    fine = torch.nn.functional.pad(fine, (0, num_samples - fine.shape[-1]), mode="replicate")
    voiced, noise, pitch_hz = fine[:, 0], fine[:, 1], torch.exp2(fine[:, 2])
    phase = torch.cumsum(pitch_hz.double() / RATE_HZ, 1).frac().float() * (2 * torch.pi)
    # exp(k (cos - 1)) is a pulse whose n-th harmonic falls as exp(-n^2 / 2k): bright, yet without aliases
    sharp = (torch.tensor([[s.brightness] for s in sources]) / pitch_hz).square() / 2 + 0.3
    pulse = torch.exp(sharp * (phase.cos() - 1)) * (1 + sharp).pow(0.25)
    wave = voiced * pulse + noise * torch.randn(noise.shape, generator=seed)
    for row, s in enumerate(sources):
        if len(s.impulses[0]):
            wave[row].index_add_(0, torch.from_numpy(s.impulses[0]), torch.from_numpy(s.impulses[1]).float())
    window = torch.hann_window(512)
    spectrum = torch.stft(wave, 512, 2 * STEP, window=window, return_complex=True, center=True)  # (S, 257, C/2)
    coarse = track[:, ::2][:, : spectrum.shape[-1]]
    coarse = torch.cat([coarse, coarse[:, -1:].expand(-1, spectrum.shape[-1] - coarse.shape[1], -1)], 1)
    freq = torch.linspace(0, 8000, 257)[None, None]
    peak_hz = torch.exp2(coarse[..., PEAK : PEAK + 4]) * size
    response = torch.exp2((freq.clamp_min(50) / 1000).log2() * coarse[..., TILT, None])
    shape = torch.zeros_like(response)
    for i in range(PEAKS):
        centre = peak_hz[..., i, None]
        width = coarse[..., WIDTH + i, None] * centre.clamp_min(400) + 30
        shape = shape + coarse[..., GAIN + i, None] / (1 + ((freq - centre) / width).square())
    spectrum = spectrum * (response * shape).transpose(1, 2)
    return torch.istft(spectrum, 512, 2 * STEP, window=window, length=num_samples)


def _record(wave: Tensor, rng: np.random.Generator, seed: torch.Generator) -> Tensor:
    """Room, microphone and background: one product in the frequency domain."""
    b, n = wave.shape
    size = 2 ** int(np.ceil(np.log2(n * 1.1)))
    if n * 1.1 <= 0.75 * size:
        size = 3 * size // 4
    spectrum = torch.fft.rfft(wave, size)
    wet = np.flatnonzero(rng.random(b) < 0.5)
    if len(wet):
        t = torch.arange(min(n, 8000)) / RATE_HZ
        decay = torch.from_numpy(0.03 * 12 ** rng.random(len(wet))).float()[:, None]
        tail = torch.randn(len(wet), len(t), generator=seed) * torch.exp(-6.9 * t / decay)
        tail = tail / tail.square().sum(1, keepdim=True).sqrt()
        share = torch.from_numpy(rng.uniform(0.1, 1, len(wet))).float()[:, None]
        spectrum[wet] = spectrum[wet] * (1 + share * torch.fft.rfft(tail, size))
    freq = torch.linspace(0, 8000, spectrum.shape[1])
    octave = (freq.clamp_min(40) / 40).log2()  # 0 to 7.6
    gains = torch.from_numpy(rng.normal(0, 5, (b, 9)) + rng.normal(0, 1.2, (b, 1)) * (np.arange(9) - 4)).float()
    left = octave.floor().long()
    db = gains[:, left] * (1 - (octave - left)) + gains[:, left + 1] * (octave - left)
    low = torch.from_numpy(np.where(rng.random(b) < 0.4, rng.choice([3400, 4000, 4000, 5500], b), 20000)).float()
    db = db - 90 * ((freq - low[:, None]) / 300).clamp(0, 1)  # telephone and 8 kHz recordings
    high = torch.from_numpy(np.where(rng.random(b) < 0.3, rng.uniform(60, 250, b), 1)).float()
    db = db - 12 * (high[:, None] / freq.clamp_min(20)).log2().clamp(0, 3)
    power = spectrum.abs().square().mean(1, keepdim=True)
    colour = (freq.clamp_min(60) / 1000) ** -torch.from_numpy(rng.uniform(-0.3, 1.0, (b, 1))).float()
    background = torch.complex(*(torch.randn(b, len(freq), generator=seed) for _ in range(2))) * colour
    background = background / background.abs().square().mean(1, keepdim=True).sqrt()
    snr_db = torch.from_numpy(8 + 55 * rng.beta(1.3, 1.3, (b, 1))).float()
    spectrum = spectrum + background * (power * 10 ** (-snr_db / 10)).sqrt()
    return torch.fft.irfft(spectrum * 10 ** (db / 20), size)[:, :n]


def scene(latent: Latent, num_samples: int, rng: np.random.Generator) -> list[Source]:
    """The sources of one render of a latent."""
    return [speak(latent, num_samples, rng)] if latent.speech else sound(latent, num_samples, rng)


def make_dataset(
    folder: Path | str,
    num_classes: int = 6,
    clips_per_class: int = 24,
    seconds: float = 2.0,
    seed: int = 0,
    folds: int = 4,
    spread: float = 0.35,
) -> Path:
    """WAV files of generated event sounds and their manifest.csv (path, label, group, fold), whose path is returned.

    A class is a latent, and each odd class a near variant of the one before. A group is one source of it, latents moved
    by `spread`, recorded three times; groups never cross folds. Equal arguments give equal files.
    """
    import soundfile

    folder, rng = Path(folder), np.random.default_rng(seed)
    rows, last, num_samples = [], None, round(seconds * RATE_HZ)
    for k in range(num_classes):
        label = f"sound{k}"
        (folder / label).mkdir(parents=True, exist_ok=True)
        if k % 2:
            last = mutate(mutate(last, rng), rng)
        else:
            last = sample_latent(rng, speech=0.0)
        for clip in range(clips_per_class):
            if clip % 3 == 0:
                moved = last.values.copy()
                moved[3:] += rng.normal(0, spread, len(moved) - 3)
                latent = Latent(values=np.clip(moved, -1, 1), seed=last.seed)
            group = clip // 3
            name = f"{label}/{label}-{group}-{clip % 3}.wav"
            wave = render([scene(latent, num_samples, rng)], num_samples, rng)[0]
            soundfile.write(folder / name, wave.numpy(), RATE_HZ, subtype="PCM_16")
            rows.append((name, label, f"{label}-{group}", group % folds + 1))
    with open(folder / "manifest.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("path", "label", "group", "fold"), *rows])
    return folder / "manifest.csv"
