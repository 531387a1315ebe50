"""Pretrains `embedded:audio-tiny`, a stock ASTModel, on generated sounds alone.

python -m adaptsuite.audio.pretrain --minutes 50 --seed 0 --out audio/weights

Two renders of one latent are pulled together (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748, eq. 4); linear heads
read the latents, the sources' control tracks per time column, descriptors of the log-mel picture, and masked patches.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite import pretraining
from adaptsuite.audio import synthetic
from adaptsuite.audio.backbones import initialise_tokens
from adaptsuite.audio.features import Fbank, normalise, resize_positions
from adaptsuite.pretraining import Ring, Training

CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "patch_size": 16,
    "frequency_stride": 16,
    "time_stride": 16,
    "num_mel_bins": 64,
    "max_length": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FRONT_END = {"sample_rate_hz": 16000, "num_mel_bins": 64, "low_hz": 50.0, "high_hz": 7800.0, "mean": -6.6, "std": 4.2}
GRID = (4, 32)  # patches of CONFIG: rows, columns
LENGTHS = {96: 0.42, 128: 0.18, 192: 0.12, 320: 0.1, 498: 0.18}  # frames of a view: share of the steps
TRACKS = 6 + synthetic.NUM_PHONEMES
PHONEME_SCALE = 5.0  # phonemes are rare: unscaled, their squared error would vanish beside the other targets


@dataclass(frozen=True)
class Settings:
    """What a run can change."""

    minutes: float = 50.0
    seed: int = 0
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    tokens: int = 2300  # of a step, both views together
    buffer: int = 250_000  # tokens kept per view length
    temperature: float = 0.15
    contrast: float = 1.0
    latent: float = 1.5
    dense: float = 1.5
    describe: float = 8.0
    masked: float = 1.0
    mask_share: float = 0.25
    ema: float = 0.995
    start: str = ""  # weights to go on from; the log beside them is kept as `earlier`
    bf16: bool = False  # pays only where the processor multiplies bfloat16 itself


def columns(frames: int) -> int:
    return (frames - 16) // 16 + 1


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """(B, T, F) of any length -> final-norm tokens (B, 2 + 4 columns, D), positions cut or stretched along time."""
    positions = resize_positions(model.embeddings.position_embeddings, GRID, (GRID[0], columns(x.shape[1])))
    return torch.func.functional_call(model, {"embeddings.position_embeddings": positions}, (x,)).last_hidden_state


def read_out(tokens: Tensor) -> Tensor:
    """(B, 3 D): CLS, mean and standard deviation over tokens."""
    return torch.cat([tokens[:, 0], tokens.mean(1), (tokens.var(1, unbiased=False) + 1e-6).sqrt()], 1)


def descriptors(x: Tensor) -> Tensor:
    """(B, 412) what an engineer would measure on a log-mel picture x (B, T, 64), normalised.

    Per band mean, deviation, maximum, percentiles and change; the picture at eight moments of the sounding part;
    modulation spectra of four bands; contrast along frequency, centroid and flatness.
    """
    b, t, f = x.shape
    bands = x.unflatten(2, (16, f // 16)).mean(3)  # (B, T, 16)
    parts = [x.mean(1), x.std(1), x.unflatten(2, (32, f // 32)).mean(3).amax(1)]
    ordered = bands.sort(1).values
    parts += [ordered[:, int(t * share)] for share in (0.1, 0.5, 0.9)]
    change = bands.diff(dim=1)
    parts += [change.abs().mean(1), change.amax(1)]
    loud = x.mean(2) > x.mean(2).amin(1, keepdim=True) + 0.1
    at = torch.arange(t, device=x.device)
    last = torch.where(loud, at, 0).amax(1, keepdim=True)
    first = torch.where(loud, at, t - 1).amin(1, keepdim=True)
    moments = first + (torch.arange(8, device=x.device) + 0.5) / 8 * (last - first).clamp_min(0)
    smooth = F.avg_pool1d(bands.transpose(1, 2), 5, 1, 2, count_include_pad=False).transpose(1, 2)
    parts.append(smooth.gather(1, moments.long()[..., None].expand(-1, -1, 16)).flatten(1))
    quarters = x.unflatten(2, (4, f // 4)).mean(3)
    window = torch.hann_window(t, device=x.device)[:, None]
    power = torch.fft.rfft((quarters - quarters.mean(1, keepdim=True)) * window, dim=1).abs().square() / t
    hz = torch.fft.rfftfreq(t, 0.01).to(x.device)
    edges = 0.5 * 2 ** torch.arange(9, device=x.device)[:, None] * 0.8
    inside = ((hz >= edges[:-1]) & (hz < edges[1:])).float()  # (8, bins)
    parts.append((torch.einsum("btc,kt->bkc", power, inside) + 1e-4).log().flatten(1) / 4)
    contrast = x.diff(n=2, dim=2).abs()
    parts.append(F.adaptive_avg_pool1d(contrast.mean(1), 8))
    linear = (x * 4).clamp(-12, 6).exp()
    share = linear / linear.sum(2, keepdim=True)
    centroid = (share * torch.linspace(0, 1, f, device=x.device)).sum(2)
    flatness = x.mean(2) - x.amax(2)
    parts += [torch.stack([centroid.mean(1), centroid.std(1), flatness.mean(1), flatness.std(1)], 1)]
    return torch.cat(parts, 1)


def tracks(source: synthetic.Source, frames: int) -> np.ndarray:
    """(columns, TRACKS): loudness of voice and noise, pitch, three resonances without the voice's size, phonemes; NaN
    where a value means nothing."""
    s, size = source, columns(frames)
    voiced, noise = s.track[:, synthetic.VOICED], s.track[:, synthetic.NOISE]
    rows = np.zeros((len(s.track), TRACKS), np.float32)
    rows[:, 0] = np.log10(np.abs(voiced) + 0.01) / 2 + 1
    rows[:, 1] = np.log10(np.abs(noise) + 0.01) / 2 + 1
    rows[:, 2] = np.where(voiced > 0.05, s.track[:, synthetic.PITCH] / 4 - 2, np.nan)
    peaks = s.track[:, synthetic.PEAK : synthetic.PEAK + 3] / 2 - 5
    rows[:, 3:6] = np.where((voiced + noise > 0.03)[:, None], peaks, np.nan)
    speaks = s.phonemes >= 0
    rows[speaks, 6 + s.phonemes[speaks]] = 1
    if not speaks.any():
        rows[:, 6:] = np.nan
    per = len(rows) // size
    with np.errstate(invalid="ignore"):
        rows = rows[: per * size].reshape(size, per, TRACKS)
        filled = np.isfinite(rows)
        count = filled.sum(1)
        return np.where(count > 0, np.where(filled, rows, 0).sum(1) / np.maximum(count, 1), np.nan)


def make_pairs(num_pairs: int, frames: int, rng: np.random.Generator, fbank: Fbank) -> dict[str, Tensor]:
    """log_mel (N, 2, T, F) of two renders per latent, latent (N, TARGETS), track (N, 2, columns, TRACKS); of each two
    neighbours the second is a near variant of the first."""
    num_samples = 400 + (frames - 1) * 160
    long = frames > 200
    latents = []
    for i in range(num_pairs):
        if i % 2 and rng.random() < 0.5:
            latents.append(synthetic.mutate(latents[-1], rng))
        else:
            latents.append(synthetic.sample_latent(rng, speech=0.2 if long else 0.6, syllables=6 if long else 2))
    scenes = [synthetic.scene(latent, num_samples, rng) for latent in latents for _ in range(2)]
    log_mel = fbank(synthetic.render(scenes, num_samples, rng)).unflatten(0, (num_pairs, 2))
    track = np.stack([tracks(s[0], frames) for s in scenes]).astype(np.float32)
    return {
        "log_mel": log_mel.half(),
        "latent": torch.from_numpy(np.stack([synthetic.targets(latent) for latent in latents])),
        "track": torch.from_numpy(track).unflatten(0, (num_pairs, 2)),
    }


class Heads(nn.Module):
    """What is thrown away after pretraining."""

    def __init__(self, dim: int, num_descriptors: int):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(3 * dim, 256), nn.GELU(), nn.Linear(256, 128))
        self.latent = nn.Linear(3 * dim, synthetic.TARGETS)
        self.describe = nn.Linear(3 * dim, num_descriptors)
        self.track = nn.Linear(GRID[0] * dim, TRACKS)
        self.patch = nn.Linear(dim, 256)
        self.register_buffer("centre", torch.zeros(num_descriptors))
        self.register_buffer("scale", torch.ones(num_descriptors))


def regression(guess: Tensor, target: Tensor, sounds: int) -> Tensor:
    """Squared error of what the first `sounds` columns say, plus that of the phonemes; NaN targets are left out."""
    total = torch.zeros(())
    for part, scale in ((slice(None, sounds), 1.0), (slice(sounds, None), PHONEME_SCALE)):
        known = target[..., part].isfinite()
        if known.any():
            total = total + (guess[..., part][known] - scale * target[..., part][known]).square().mean()
    return total


def patches(x: Tensor) -> Tensor:
    """(B, T, F) -> (B, 4 columns, 256) in the order of AST's tokens, frequency first."""
    b, t, f = x.shape
    x = x[:, : columns(t) * 16].reshape(b, columns(t), 16, f // 16, 16)
    return x.permute(0, 3, 1, 4, 2).flatten(1, 2).flatten(2)


def mask_patches(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Blocks of whole patches set to the mean, 0, and which they are (B, 4 columns)."""
    b, t, f = x.shape
    cells = torch.rand(b, f // 16, columns(t), device=x.device) < share
    grid = cells.transpose(1, 2).repeat_interleave(16, 1).repeat_interleave(16, 2)  # (B, T', F)
    grid = F.pad(grid, (0, 0, 0, t - grid.shape[1]))
    return x.masked_fill(grid, 0.0), cells.flatten(1)


def losses(model: nn.Module, heads: Heads, batch: dict[str, Tensor], s: Settings) -> dict[str, Tensor]:
    """Unweighted terms. The second view of each pair is the masked one."""
    x = batch["x"]  # (N, 2, T, F), normalised
    n, cols = len(x), columns(x.shape[2])
    second, hidden = mask_patches(x[:, 1], s.mask_share)
    views = torch.cat([x[:, 0], second])
    with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16):
        tokens = forward(model, views)
        out = read_out(tokens.float())
        z = F.normalize(heads.project(out).float(), dim=1)
        latent, described = heads.latent(out).float(), heads.describe(out).float()
        grid = tokens[:, 2:].unflatten(1, (GRID[0], cols)).permute(0, 2, 1, 3).flatten(2)  # (2N, columns, 4 D)
        track, patch = heads.track(grid).float(), heads.patch(tokens[n:, 2:]).float()
    logits = z @ z.T / s.temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e4)
    same = torch.arange(2 * n).roll(n)
    wanted = torch.cat([batch["latent"]] * 2)
    tracked = batch["track"].transpose(0, 1).flatten(0, 1)
    whole = (descriptors(x.transpose(0, 1).flatten(0, 1)) - heads.centre) / heads.scale
    true = patches(x[:, 1])[hidden]
    return {
        "contrast": F.cross_entropy(logits, same),
        "latent": regression(latent, wanted, len(synthetic.EVENT_AXES)),
        "dense": regression(track, tracked, TRACKS - synthetic.NUM_PHONEMES),
        "describe": F.smooth_l1_loss(described, whole.clamp(-5, 5)),
        "masked": F.smooth_l1_loss(patch[hidden], true) if len(true) else patch.sum() * 0,
    }


class Buffer(Ring):
    """The newest pairs of one view length."""

    def draw(self, num_pairs: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Neighbours stay together: they are each other's hardest negatives."""
        at = self.neighbours(num_pairs, rng)
        batch = {name: value[at] for name, value in self.rows.items()}
        gain = torch.from_numpy(rng.normal(0, 1, (num_pairs, 2, 1, 1))).float()
        log_mel, floor = batch.pop("log_mel").float(), Fbank.floor
        log_mel = torch.where(log_mel > floor + 0.05, (log_mel + gain).clamp_min(floor), floor)
        batch["x"] = normalise(log_mel, FRONT_END["mean"], FRONT_END["std"])
        return batch


def generate(queue, seed: int) -> None:
    """Puts (frames, pairs) into the queue for ever: the second process of a run."""
    torch.set_num_threads(1)
    rng, fbank = np.random.default_rng(seed), _fbank()
    for frames in _lengths(rng):
        queue.put((frames, {k: v.numpy() for k, v in make_pairs(_chunk(frames), frames, rng, fbank).items()}))


def _fbank() -> Fbank:
    return Fbank(FRONT_END["num_mel_bins"], FRONT_END["low_hz"], FRONT_END["high_hz"])


def _lengths(rng: np.random.Generator) -> Iterator[int]:
    """Every length once, then by their shares."""
    yield from LENGTHS
    while True:
        yield int(rng.choice(list(LENGTHS), p=list(LENGTHS.values())))


def _chunk(frames: int) -> int:
    return max(4096 // frames, 8) // 2 * 2


def new_model(seed: int) -> nn.Module:
    """A stock ASTModel whose CLS, DIST and positions start from a normal: transformers leaves them zero, so equal."""
    from transformers import ASTConfig, ASTModel

    torch.manual_seed(seed)
    model = ASTModel(ASTConfig(**CONFIG))
    initialise_tokens(model)
    return model


def pretrain(s: Settings, out: Path) -> dict:
    """Trains for s.minutes and leaves audio-tiny.safetensors and log.json in `out`, both written anew each minute."""
    import torch.multiprocessing as mp

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    queue = context.Queue(maxsize=8)
    worker = context.Process(target=generate, args=(queue, s.seed + 1), daemon=True)
    worker.start()
    model = new_model(s.seed).train()
    if s.start:
        from safetensors.torch import load_file

        model.load_state_dict({name: value.float() for name, value in load_file(s.start).items()})
    rng = np.random.default_rng(s.seed)
    buffers = {frames: Buffer(s.buffer // (8 * columns(frames)) // 2 * 2) for frames in LENGTHS}
    while any(b.filled < 2 * _pairs(frames, s) for frames, b in buffers.items()):
        _receive(queue, buffers)
    described = torch.cat([descriptors(b.draw(_pairs(f, s), rng)["x"].flatten(0, 1)) for f, b in buffers.items()])
    heads = Heads(CONFIG["hidden_size"], described.shape[1])
    heads.centre.copy_(described.mean(0))
    heads.scale.copy_(described.std(0).clamp_min(1e-3))
    training = Training(model, [*model.parameters(), *heads.parameters()], s, clock=time.monotonic)
    views = made = 0
    lengths = _lengths(rng)
    while (share := training.share) < 1:
        if not queue.empty():
            made += _receive(queue, buffers)
        frames = next(lengths)
        batch = buffers[frames].draw(_pairs(frames, s), rng)
        training.update(losses(model, heads, batch, s), asdict(s), share)
        views += 2 * len(batch["x"])
        if training.due:
            training.log({"views": views, "pairs_made": made})
            save(training.average, training.history, s, out)
    worker.terminate()
    worker.join()
    return save(training.average, training.history, s, out)


def _pairs(frames: int, s: Settings) -> int:
    return max(s.tokens // (2 * (2 + 4 * columns(frames))) // 2 * 2, 8)


def _receive(queue, buffers: dict[int, Buffer]) -> int:
    frames, pairs = queue.get()
    buffers[frames].add({k: torch.from_numpy(v) for k, v in pairs.items()})
    return len(pairs["latent"])


def save(model: nn.Module, history: list[dict], s: Settings, out: Path) -> dict:
    """Half-precision weights under ASTModel's own names, with what is needed to build and feed the model."""
    record = {"config": CONFIG, "front_end": FRONT_END}
    return pretraining.save(out, "audio-tiny", model, record, s, history, ["transformers"], lengths=LENGTHS)


def main(argv: list[str] | None = None) -> None:
    pretraining.main(pretrain, Settings, __doc__, argv)


if __name__ == "__main__":
    main()
