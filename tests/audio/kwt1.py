"""KWT-1, the Keyword Transformer (Berg et al. 2021, arXiv:2104.00769), as a backbone of one's own. Copy and change.

Three parts make any network a backbone of the audio commands and pipeline: the network, whose blocks name their parts
as timm does (adaptsuite.sites.LAYOUTS), an `Input` that says how it hears, and `register` in the process that runs:

    from adaptsuite.audio.backbones import register
    from adaptsuite.cli import main
    register("kwt-1", builder("weights_kwt1"))
    main(["audio", "train", "--backbone", "kwt-1", "--method", "lora", "--data", "clips.csv", "--out", "run"])
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from adaptsuite.audio.inputs import FrontEnd, Input

RATE_HZ, SAMPLES, FRAME, HOP, FRAMES = 16000, 16000, 480, 160, 98
BINS, MELS, COEFFICIENTS = 244, 80, 40  # of a spectrum of 512 points: 31.25 Hz each


class Block(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + mlp(x))."""

    norm_first = False  # what tells adaptsuite that the norms stand behind, as in torch's own encoder layers

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn = Attention(dim, heads)  # no bias of q, k and v
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, act_layer=partial(nn.GELU, approximate="tanh"))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class Kwt1(nn.Module):
    """MFCC (B, 98, 40) -> tokens (B, 99, D), the class token first. Without num_classes it has no head of its own."""

    def __init__(self, dim: int = 64, depth: int = 12, heads: int = 1, num_classes: int = 0):
        super().__init__()
        self.patch_proj = nn.Linear(COEFFICIENTS, dim)  # one token per frame
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))  # the name by which its place in front is known
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + FRAMES, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.head = nn.Linear(dim, num_classes) if num_classes else None
        for tokens in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(tokens, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        x = self.patch_proj(features)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, features: Tensor) -> Tensor:
        """(B, num_classes), as published; `adaptsuite` trains a head of its own instead."""
        return self.head(self(features)[:, 0])


class Kwt1Input(Input):
    """One second at 16 kHz -> MFCC: 480 samples each 160, Hann, magnitudes, 80 mel bands, log, 40 cosines.

    A longer clip is read as several inputs; a shorter one is padded with zeros as in its training, and frames that
    hold no whole real frame are left out of pooling and of mixtures' routing. constants: those of a checkpoint.
    """

    prefix = 1
    spectrogram = False  # (B, T, coefficients): no frequency axis for SpecAugment

    def __init__(self, backbone: Kwt1, constants: Mapping[str, Tensor] | None = None):
        width = backbone.pos_embed.shape[-1]
        super().__init__(backbone, FrontEnd(FRAMES, RATE_HZ, MELS, 20.0, 7600.0), width=width)
        self.grid = (1, FRAMES)
        for name, value in (constants or mfcc_constants()).items():
            self.register_buffer(name, value, persistent=False)

    @property
    def num_samples(self) -> int:
        return SAMPLES

    def features(self, wave: Tensor, length: Tensor | None = None) -> Tensor:
        """(B, 98, 40)."""
        x = wave.unfold(1, FRAME, HOP) * self.window
        x = ((x @ self.dft_a.T) ** 2 + (x @ self.dft_b.T) ** 2).sqrt()  # (B, 98, 244)
        return (x @ self.mel.T).clamp_min(1e-12).log() @ self.dct.T

    def columns(self, length: Tensor) -> Tensor:
        return (length - FRAME) // HOP + 1

    def tokens(self, backbone: Kwt1, features: Tensor, length: Tensor | None = None) -> Tensor:
        return backbone(features)


def mfcc_constants() -> dict[str, Tensor]:
    """The front end by its formulas: HTK mel bands from 20 to 7600 Hz, triangles in mel, and a DCT-II by sqrt(2/80)."""
    angle = 2 * np.pi / 512 * np.arange(BINS)[:, None] * np.arange(FRAME)
    mel = 1127 * np.log1p(np.arange(BINS)[:, None] * RATE_HZ / 512 / 700)
    edges = np.linspace(*1127 * np.log1p(np.array([20.0, 7600.0]) / 700), MELS + 2)
    rising = (mel - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel) / (edges[2:] - edges[1:-1])
    cosine = np.cos(np.pi / MELS * np.arange(COEFFICIENTS)[:, None] * (np.arange(MELS) + 0.5))
    found = {
        "window": 0.5 - 0.5 * np.cos(2 * np.pi / FRAME * np.arange(FRAME)),
        "dft_a": np.cos(angle),
        "dft_b": -np.sin(angle),
        "mel": np.minimum(rising, falling).clip(0).T,
        "dct": np.sqrt(2 / MELS) * cosine,
    }
    return {name: torch.from_numpy(value).float() for name, value in found.items()}


def load(folder: Path | str, head: bool = False) -> tuple[Kwt1, Kwt1Input]:
    """The published network in eval mode, and how it hears; with its own 12 labels for `logits` where head is True."""
    from safetensors.torch import load_file

    state = load_file(Path(folder) / "kwt1_v2_12.safetensors")
    constants = {k.removeprefix("frontend."): state.pop(k) for k in list(state) if k.startswith("frontend.")}
    assert (constants.pop("norm") == 1).all()  # a scale of the coefficients that the published network does not use
    model = Kwt1(num_classes=len(state["head.bias"]) if head else 0)
    model.load_state_dict(state if head else {k: v for k, v in state.items() if not k.startswith("head.")})
    return model.eval(), Kwt1Input(model, constants)


def builder(folder: Path | str | None = None, **shape: int) -> Callable[[bool, int, int | None], tuple]:
    """What `register` takes. shape (dim, depth, heads) is for random weights alone, which need no folder."""

    def build(random_weights: bool, seed: int, frames: int | None) -> tuple[Kwt1, Kwt1Input]:
        if not random_weights:  # frames: always 98
            return load(folder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Kwt1(**shape).eval()
        return model, Kwt1Input(model)

    return build
