"""Pretrains `embedded:vision-tiny`, a stock timm VisionTransformer, on generated images alone.

python -m adaptsuite.vision.pretrain --minutes 30 --seed 0 --out vision/weights

Two renders of one latent are pulled together (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748, eq. 4); linear heads
read the latents and descriptors of the whole image from the read-out, and descriptors of its own cell from each token.
"""

import math
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite import pretraining
from adaptsuite.pretraining import Ring, Training
from adaptsuite.vision import synthetic
from adaptsuite.vision.backbones import vision_transformer

CONFIG = {
    "img_size": 96,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "stem": [[32, 3, 2, 1], [64, 3, 3, 1], [128, 3, 2, 1], [128, 1, 1, 0]],
}
PRETRAINED_CFG = {
    "architecture": "vision-tiny",
    "input_size": [3, 96, 96],
    "fixed_input_size": False,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "num_classes": 0,
    "pool_size": None,
    "first_conv": "patch_embed.backbone.0",
    "classifier": "head",
    "license": "apache-2.0",
}
DRAWN = 112  # px of a generated image; a view is a part of it
CELL = 8  # px of a descriptor's cell
COLOURS, LEVELS = 42, 32  # soft bins of the colour histogram; steps of a channel in its table
CHANNELS = COLOURS + 4 * (3 + 5) + 2 * 10  # descriptors of a cell
DESCRIPTORS = 3 * CHANNELS + 9 * COLOURS + 4 * (CHANNELS - COLOURS)


@dataclass(frozen=True)
class Settings:
    """What a run can change."""

    minutes: float = 30.0  # of the training process's own processor time
    seed: int = 0
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    pairs: int = 32  # of a step
    buffer: int = 8000  # pairs kept
    temperature: float = 0.15
    contrast: float = 0.5
    latent: float = 1.0
    local: float = 20.0
    describe: float = 10.0
    zoom: float = 0.55  # least share of a side that a view shows
    ema: float = 0.995
    start: str = ""  # weights to go on from; the log beside them is kept as `earlier`
    bf16: bool = False  # pays only where the processor multiplies bfloat16 itself


def read_out(tokens: Tensor) -> Tensor:
    """(B, 3 D) of (B, T, D): CLS, mean and standard deviation over all tokens."""
    return torch.cat([tokens[:, 0], tokens.mean(1), (tokens.var(1, unbiased=False) + 1e-6).sqrt()], 1)


def normalise(x: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) as the model takes it."""
    mean, std = (torch.tensor(PRETRAINED_CFG[key])[:, None, None] for key in ("mean", "std"))
    return (x.float() / 255 - mean) / std


# descriptors --------------------------------------------------------------------------------------------------------


def cells(x: Tensor) -> Tensor:
    """(B, CHANNELS, H / 8, W / 8) of a uint8 image: what an engineer would measure in each cell of 8 px.

    A soft histogram of hue, brightness and saturation; at four scales the energy of differences of Gaussians in three
    opponent colours, and the strength of edges with its second and fourth harmonic over their direction; at two scales
    uniform local binary patterns (Ojala et al. 2002, riu2).
    """
    level = (x // (256 // LEVELS)).long()
    out = [_histogram(level[:, 0] * LEVELS**2 + level[:, 1] * LEVELS + level[:, 2], colour_table(), CELL)]
    r, g, b = (x.float() / 255).unbind(1)
    picture = torch.stack([(r + g + b) / 3, (r - g) / 2, (r + g) / 4 - b / 2], 1)
    for scale in range(4):
        cell = CELL >> scale
        smooth = _smooth(_smooth(picture))
        out.append(2 * F.avg_pool2d((picture - smooth).abs(), cell).sqrt())
        grey = smooth[:, 0] if scale == 0 else picture[:, 0]
        right = F.pad(grey[:, :, 2:] - grey[:, :, :-2], (1, 1))
        down = F.pad(grey[:, 2:] - grey[:, :-2], (0, 0, 1, 1))
        strength = (right**2 + down**2 + 1e-6).sqrt()
        cos2, sin2 = (right**2 - down**2) / strength, 2 * right * down / strength
        cos4, sin4 = (cos2**2 - sin2**2) / strength, 2 * cos2 * sin2 / strength
        out.append(4 * F.avg_pool2d(torch.stack([strength, cos2, sin2, cos4, sin4], 1), cell))
        if scale < 2:
            out.append(_histogram(_binary_patterns(picture[:, 0]), pattern_table(), cell))
        picture = F.avg_pool2d(smooth, 2)
    return torch.cat(out, 1)


def descriptors(c: Tensor) -> Tensor:
    """(B, DESCRIPTORS) of the whole image, of its cells: mean, deviation, mean of the highest tenth; colours in a grid
    of 3 x 3 and the rest in 2 x 2. Shares of colours enter as square roots."""
    root, rest = c[:, :COLOURS].clamp_min(0), c[:, COLOURS:]
    flat = c.flatten(2)
    highest = flat.topk(max(flat.shape[2] // 10, 1), 2).values.mean(2)
    parts = [root.mean((2, 3)).sqrt(), rest.mean((2, 3)), flat.std(2), highest]
    parts += [F.adaptive_avg_pool2d(root, 3).sqrt().flatten(1), F.adaptive_avg_pool2d(rest, 2).flatten(1)]
    return torch.cat(parts, 1)


@cache
def colour_table() -> Tensor:
    """(LEVELS^3, COLOURS) shares in 12 hues, each strong and bright, strong and dark, or weak, and in 6 greys."""
    step = (torch.arange(LEVELS) + 0.5) / LEVELS
    r, g, b = torch.meshgrid(step, step, step, indexing="ij")
    value = torch.maximum(torch.maximum(r, g), b).flatten()
    chroma = value - torch.minimum(torch.minimum(r, g), b).flatten()
    hue = torch.atan2((g - b) * math.sqrt(3) / 2, (2 * r - g - b) / 2).flatten() * 6 / math.pi  # in twelfths
    saturation = chroma / (value + 0.05)
    coloured, strong = (2 * saturation - 0.15).clamp(0, 1)[:, None], (2 * saturation - 0.8).clamp(0, 1)[:, None]
    bright = (1.5 * value - 0.25).clamp(0, 1)[:, None]
    off = torch.remainder(hue[:, None] - torch.arange(12) + 6, 12) - 6
    hues = (1 - off.abs()).clamp_min(0) * coloured
    greys = (1 - (5 * value[:, None] - torch.arange(6)).abs()).clamp_min(0) * (1 - coloured)
    return torch.cat([hues * strong * bright, hues * strong * (1 - bright), hues * (1 - strong), greys], 1)


@cache
def pattern_table() -> Tensor:
    """(256, 10): how many of eight neighbours are brighter, where they are one run; the last where they are not."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    turns = (bits != bits.roll(1, 1)).sum(1)
    return F.one_hot(torch.where(turns <= 2, bits.sum(1), 9), 10).float()


def _binary_patterns(grey: Tensor) -> Tensor:
    h, w = grey.shape[1:]
    around = F.pad(grey[:, None], (1, 1, 1, 1), "reflect")[:, 0]
    code, least = torch.zeros(grey.shape, dtype=torch.long), grey + 0.012
    for bit, (y, x) in enumerate(((1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0), (0, 1), (0, 2))):
        code += (around[:, y : y + h, x : x + w] > least).long() << bit
    return code


def _histogram(code: Tensor, table: Tensor, cell: int) -> Tensor:
    """Rows of the table at (B, H, W) codes, averaged over cells: (B, C, H / cell, W / cell)."""
    b, h, w = code.shape
    code = code.view(b, h // cell, cell, w // cell, cell).transpose(2, 3).reshape(-1, cell * cell)
    return F.embedding_bag(code, table, mode="mean").view(b, h // cell, w // cell, -1).permute(0, 3, 1, 2)


def _smooth(x: Tensor) -> Tensor:
    row = torch.tensor([0.25, 0.5, 0.25])
    kernel = (row[:, None] * row).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate"), kernel, groups=x.shape[1])


# training -----------------------------------------------------------------------------------------------------------


def make_pairs(num_pairs: int, painter: synthetic.Painter) -> dict[str, Tensor]:
    """image (N, 2, 3, DRAWN, DRAWN) uint8, two renders per latent, and latent (N, TARGETS); of each two neighbours the
    second is in half of the cases a near variant of the first."""
    rng, latents = painter.rng, []
    for i in range(num_pairs):
        near = i % 2 and rng.random() < 0.5
        latents.append(synthetic.mutate(latents[-1], rng) if near else synthetic.sample_latent(rng))
    images = torch.from_numpy(np.stack([painter.views(latent) for latent in latents]))
    values = torch.from_numpy(np.stack([synthetic.targets(latent) for latent in latents]))
    return {"image": images.permute(0, 1, 4, 2, 3).contiguous(), "latent": values}


def crop(x: Tensor, size: int, zoom: float, rng: np.random.Generator) -> Tensor:
    """Views of uint8 images: a part of at least `zoom` of a side, at times mirrored, a little brighter or warmer."""
    n = len(x)
    share = rng.uniform(zoom, 1, n)[:, None] * 2 ** (rng.normal(0, 0.06, (n, 1)) * [1, -1])  # of width and height
    share = np.minimum(share, 1)
    place = torch.zeros(n, 2, 3)
    place[:, :, 2] = torch.from_numpy(rng.uniform(-1, 1, (n, 2)) * (1 - share))
    mirror = np.where(rng.random(n) < 0.5, 1, -1)
    place[:, 0, 0], place[:, 1, 1] = torch.from_numpy(share[:, 0] * mirror), torch.from_numpy(share[:, 1])
    grid = F.affine_grid(place, [n, 3, size, size], align_corners=False)
    gain = 2 ** rng.normal(0, 0.15, (n, 1, 1, 1)) * (1 + rng.normal(0, 0.03, (n, 3, 1, 1)))
    x = F.grid_sample(x.float(), grid, padding_mode="reflection", align_corners=False)
    return (x * torch.from_numpy(gain).float()).clamp(0, 255).round().to(torch.uint8)


class Heads(nn.Module):
    """What is thrown away after pretraining, and the scales of the descriptors."""

    def __init__(self, dim: int):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(3 * dim, 256), nn.GELU(), nn.Linear(256, 128))
        self.latent = nn.Linear(3 * dim, synthetic.TARGETS)
        self.describe = nn.Linear(3 * dim, DESCRIPTORS)
        self.local = nn.Linear(dim, CHANNELS)
        for name, size in (("whole", DESCRIPTORS), ("cell", CHANNELS)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    @torch.no_grad()
    def measure(self, x: Tensor, grid: tuple[int, int]) -> None:
        whole, cell = describe(x, grid)
        for name, value in (("whole", whole), ("cell", cell.flatten(0, 1))):
            getattr(self, f"{name}_mean").copy_(value.mean(0))
            getattr(self, f"{name}_std").copy_(value.std(0).clamp_min(1e-3))


def describe(x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Descriptors of uint8 images (B, DESCRIPTORS) and of the cell of each token (B, T, CHANNELS)."""
    c = cells(x)
    fine = F.interpolate(c, scale_factor=2)  # cells of 4 px, which the tokens' cells are whole numbers of
    return descriptors(c), F.interpolate(fine, size=grid, mode="area").flatten(2).transpose(1, 2)


def losses(model: nn.Module, heads: Heads, x: Tensor, latent: Tensor, s: Settings) -> dict[str, Tensor]:
    """Unweighted terms of uint8 views (2 N, 3, H, W), the first and the second ones of N latents (N, TARGETS)."""
    n, grid = len(latent), model.patch_embed.grid_size
    with torch.no_grad():
        whole, cell = describe(x[:n], grid)  # of one view each: a fifth of a step's time saved
        whole = ((whole - heads.whole_mean) / heads.whole_std).clamp(-5, 5)
        cell = ((cell - heads.cell_mean) / heads.cell_std).clamp(-5, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16):
        tokens = model.forward_features(normalise(x))
    tokens = tokens.float()
    out = read_out(tokens)
    z = F.normalize(heads.project(out), dim=1)
    logits = (z @ z.T / s.temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e4)
    wanted = torch.cat([latent, latent])
    known = wanted.isfinite()  # axes of the other kinds are NaN
    return {
        "contrast": F.cross_entropy(logits, torch.arange(2 * n).roll(n)),
        "latent": (heads.latent(out)[known] - wanted[known]).square().mean(),
        "describe": F.smooth_l1_loss(heads.describe(out[:n]), whole),
        "local": F.smooth_l1_loss(heads.local(tokens[:n, 1:]), cell),
    }


class Buffer(Ring):
    """The newest pairs."""

    def draw(self, num_pairs: int, zoom: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Views (2 N, 3, H, W) and latents (N, TARGETS). Neighbours stay together: each other's hardest negatives."""
        at = self.neighbours(num_pairs, rng)
        images = self.rows["image"][at].transpose(0, 1).flatten(0, 1)
        return crop(images, CONFIG["img_size"], zoom, rng), self.rows["latent"][at]


def generate(queue, seed: int) -> None:
    """Puts pairs into the queue for ever: the second process of a run."""
    torch.set_num_threads(1)
    painter = synthetic.Painter(DRAWN, np.random.default_rng(seed))
    while True:
        queue.put({name: value.numpy() for name, value in make_pairs(8, painter).items()})


def new_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return vision_transformer(CONFIG)


def pretrain(s: Settings, out: Path) -> dict:
    """Trains for s.minutes and leaves vision-tiny.safetensors and log.json in `out`, both written anew each minute."""
    import torch.multiprocessing as mp

    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    context = mp.get_context("spawn")
    queue = context.Queue(maxsize=16)
    worker = context.Process(target=generate, args=(queue, s.seed + 1), daemon=True)
    worker.start()
    try:
        return _train(s, out, queue)
    finally:
        worker.terminate()
        worker.join()


def _train(s: Settings, out: Path, queue) -> dict:
    model = new_model(s.seed).train()
    if s.start:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(s.start))
    heads, rng, buffer = Heads(CONFIG["embed_dim"]), np.random.default_rng(s.seed), Buffer(s.buffer)
    while buffer.filled < 2 * s.pairs:
        _receive(queue, buffer)
    heads.measure(buffer.draw(buffer.filled, s.zoom, rng)[0], model.patch_embed.grid_size)
    training = Training(model, [*model.parameters(), *heads.parameters()], s)
    if s.bf16:
        for block in model.blocks:
            block.attn.fused_attn = False  # the fused kernel is slower here
    views = made = 0
    while (share := training.share) < 1:
        while not queue.empty():
            made += _receive(queue, buffer)
        x, latent = buffer.draw(s.pairs, s.zoom, rng)
        training.update(losses(model, heads, x, latent, s), asdict(s), share)
        views += len(x)
        if training.due:
            training.log({"views": views, "pairs_made": made})
            save(training.average, training.history, s, out)
    return save(training.average, training.history, s, out)


def _receive(queue, buffer: Buffer) -> int:
    pairs = queue.get()
    buffer.add({k: torch.from_numpy(v) for k, v in pairs.items()})
    return len(pairs["latent"])


def save(model: nn.Module, history: list[dict], s: Settings, out: Path) -> dict:
    """Half-precision weights under timm's own names, with what is needed to build and feed the model."""
    record = {"config": CONFIG, "pretrained_cfg": PRETRAINED_CFG}
    return pretraining.save(out, "vision-tiny", model, record, s, history, ["timm"], shares=synthetic.SHARES)


def main(argv: list[str] | None = None) -> None:
    pretraining.main(pretrain, Settings, __doc__, argv)


if __name__ == "__main__":
    main()
