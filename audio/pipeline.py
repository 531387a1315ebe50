"""From waveforms to labels: the task model (fbank, backbone, head), its loss and its scores."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.audio.backbones import FrontEnd, grid, load
from adaptsuite.audio.data import SUFFIXES, Windows, inspect, survey
from adaptsuite.audio.features import FRAME, HOP, Fbank, gain, normalise, pad_frames, roll, spec_augment
from adaptsuite.bank import BANK, Context
from adaptsuite.errors import UsageError, nearest
from adaptsuite.host import Handle
from adaptsuite.metrics import score
from adaptsuite.recipe import Recipe

POOLS = ("cls", "mean", "std", "max")


@dataclass(frozen=True)
class FrontEndSettings:
    """Section `front_end` of a recipe; None means the backbone's own."""

    frames: int | None = None  # of 10 ms; None: the longest clip, at most 1024
    mean: float | None = None
    std: float | None = None
    reference_compat: bool = False  # zeroed position embeddings, as the PETL-AST code runs


@dataclass(frozen=True)
class HeadSettings:
    """Section `head` of a recipe."""

    pool: str | None = None  # of cls, mean, std, max over all tokens, joined by +; None: the backbone's own, else mean
    start: Literal["probe", "random"] = "probe"  # from a logistic regression on frozen features (arXiv:2202.10054)


@dataclass(frozen=True)
class AugmentSettings:
    """Section `augment` of a recipe: what happens to training clips."""

    freq_mask: int = 0  # widest SpecAugment mask in mel bins
    time_mask: int = 0  # widest SpecAugment mask in frames
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off
    gain_db: float = 0.0  # uniform in +- gain_db
    roll: bool = False  # circular shift of the waveform by any number of samples
    label_smoothing: float = 0.0


class AudioModel(nn.Module):
    """wave (B, N) -> logits (B, K): fbank, (x - mean) / (2 std), ASTModel, pooling over real tokens, Linear.

    length: (B,) samples that are real; the rest is zero padding, which the fbank turns into its silence floor. Padded
    tokens stay in the backbone, whose attention knows no mask, and are left out of pooling and of mixtures' routing.
    """

    def __init__(self, backbone: nn.Module, front_end: FrontEnd, num_classes: int, pool: str = "mean"):
        super().__init__()
        self.front_end, self.pool = front_end, tuple(pool.split("+"))
        for part in self.pool:
            if part not in POOLS:
                raise UsageError(f"head.pool={pool!r}: {part!r} is not known; {nearest(part, POOLS)}")
        self.fbank = Fbank(num_mel_bins=front_end.num_mel_bins, low_hz=front_end.low_hz, high_hz=front_end.high_hz)
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.hidden_size * len(self.pool), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def num_samples(self) -> int:
        """Samples of one input."""
        return FRAME + (self.front_end.frames - 1) * HOP

    def features(self, wave: Tensor) -> Tensor:
        """(B, frames, F) normalised log-mel energies."""
        x, _ = pad_frames(self.fbank(wave), self.front_end.frames, self.fbank.floor)
        return normalise(x, self.front_end.mean, self.front_end.std)

    def token_mask(self, length: Tensor) -> Tensor:
        """(B, tokens) bool: CLS, DIST, then patches (frequency-major) of which at least half the frames are real."""
        config = self.backbone.config
        rows, columns = grid(config, self.front_end.frames)
        frames = (length - FRAME) // HOP + 1
        middle = torch.arange(columns, device=length.device) * config.time_stride + config.patch_size // 2
        real = (middle < frames[:, None]) | (torch.arange(columns, device=length.device) == 0)
        always = torch.ones(len(length), 2, dtype=torch.bool, device=length.device)
        return torch.cat([always, real.repeat(1, rows)], 1)

    def tokens(self, features: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Final-norm tokens (B, T, D) and the mask of real ones (None: all)."""
        mask = None if length is None else self.token_mask(length)
        bank = getattr(self, BANK, None)
        if bank is not None:
            bank.context = Context(token_mask=mask)
        return self.backbone(features).last_hidden_state, mask

    def embed(self, features: Tensor, length: Tensor | None = None) -> Tensor:
        """(B, D times the parts of the pool): what the head reads."""
        tokens, mask = self.tokens(features, length)
        weight = torch.ones_like(tokens[..., :1]) if mask is None else mask[..., None].to(tokens.dtype)
        mean = (tokens * weight).sum(1) / weight.sum(1)
        parts = {
            "cls": lambda: tokens[:, 0],
            "mean": lambda: mean,
            "std": lambda: (((tokens - mean[:, None]) ** 2 * weight).sum(1) / weight.sum(1) + 1e-6).sqrt(),
            "max": lambda: tokens.masked_fill(weight == 0, float("-inf")).amax(1),
        }
        return torch.cat([parts[part]() for part in self.pool], -1)

    def forward(
        self,
        wave: Tensor,
        length: Tensor | None = None,
        spec_masks: tuple[int, int] = (0, 0),
        embedding: bool = False,
    ) -> Tensor:
        """spec_masks: widest SpecAugment masks (mel bins, frames); training only. embedding: what the head reads."""
        features = self.features(wave)
        if any(spec_masks):
            features = spec_augment(features, *spec_masks)
        z = self.embed(features, length)
        return z if embedding else self.head(z)


class AudioTask:
    """Classification of clips: cross-entropy for one label, binary cross-entropy for several."""

    target = "label"

    def __init__(self, classes: Sequence[str], task: str = "multiclass", augment: AugmentSettings | None = None):
        if task not in ("multiclass", "multilabel"):
            raise UsageError(f"audio: task {task!r} is not known; it is multiclass or multilabel")
        self.classes, self.task, self.augment = tuple(classes), task, augment or AugmentSettings()
        self.monitor = "accuracy" if task == "multiclass" else "map"

    def loss(self, model: AudioModel, batch: dict[str, Any]) -> Tensor:
        a, wave, length = self.augment, batch["wave"], batch["length"]
        target = batch["label"]
        target = F.one_hot(target, len(self.classes)).float() if self.task == "multiclass" else target.float()
        if a.gain_db:
            wave = gain(wave, a.gain_db)
        if a.roll:
            wave = roll(wave)
        if a.mixup:
            share = float(np.random.beta(a.mixup, a.mixup))
            other = torch.randperm(len(wave), device=wave.device)
            wave, target = share * wave + (1 - share) * wave[other], share * target + (1 - share) * target[other]
            length = torch.maximum(length, length[other])
        logits = model(wave, length, (a.freq_mask, a.time_mask))
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, target)
        return F.cross_entropy(logits, target, label_smoothing=a.label_smoothing)

    def predict(self, model: AudioModel, batch: dict[str, Any]) -> Tensor:
        return model(batch["wave"], batch["length"])

    def embed(self, model: AudioModel, batch: dict[str, Any]) -> Tensor:
        return model(batch["wave"], batch["length"], embedding=True)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        return score(outputs, targets, self.task, probabilities=False)


class AudioDomain:
    """What the commands need of audio (adaptsuite.experiment.Domain)."""

    name = "audio"
    suffixes = SUFFIXES
    train_norms = True
    sections = {"front_end": FrontEndSettings, "head": HeadSettings, "augment": AugmentSettings}
    backbones = ("embedded:audio-tiny", "ast-base", "ast-tiny", "hf:HUB_ID_OR_FOLDER of an ASTModel")
    longest_frames = 1024  # what AST was pretrained on; longer clips are read as several windows

    def __init__(self):
        self.cache: dict[Any, Tensor] = {}

    def defaults(self, method: str) -> dict[str, dict[str, Any]]:
        """audio.md section 2: widths and sites; rates that trained well on small sets."""
        settings = {"bottleneck": {"bottleneck": 12}}.get(method, {})
        lr = {"full": 3e-4, "linear": 1e-3}.get(method, 5e-3)
        return {"method_settings": settings, "plan": {"lr": lr, "head_lr": 1e-3, "batch_size": 16, "epochs": 10}}

    def settle(self, recipe: Recipe, paths: Sequence[Path]) -> Recipe:
        """Fixes the input's length: as given, else the longest clip's, at most `longest_frames`."""
        if recipe.front_end.get("frames") is not None or not paths:
            return recipe
        longest = max(inspect(path).seconds for path in paths)
        frames = min(max(Fbank.num_frames(round(longest * 16000)), 16), self.longest_frames)
        return replace(recipe, front_end={**recipe.front_end, "frames": frames})

    def model(self, recipe: Recipe, classes: Sequence[str]) -> AudioModel:
        backbone, front_end = load(
            recipe.backbone, random_weights=recipe.random_weights, seed=recipe.seeds[0], **recipe.front_end
        )
        pool = recipe.head.get("pool") or getattr(backbone, "adaptsuite_pool", "mean")
        return AudioModel(backbone, front_end, len(classes), pool).eval()

    def dataset(self, model: AudioModel, paths: Sequence[Path], targets: np.ndarray | None) -> Windows:
        return Windows(paths, targets, model.front_end.sample_rate_hz, model.num_samples, self.cache)

    def task(self, recipe: Recipe, classes: Sequence[str]) -> AudioTask:
        return AudioTask(classes, recipe.data.task, AugmentSettings(**recipe.augment))

    def sample(self, model: AudioModel, batch: int = 2) -> tuple[Tensor, Tensor]:
        """Seeded noises; the last one is half padding, so that masks are used."""
        generator = torch.Generator().manual_seed(0)
        wave = torch.randn(batch, model.num_samples, generator=generator) * 0.1
        length = torch.full((batch,), model.num_samples)
        length[-1] = max(model.num_samples // 2, 400)
        wave[-1, length[-1] :] = 0
        return wave, length

    def look(self, path: Path) -> dict[str, Any]:
        """What `check` says of one file, decoded whole; raises DataError where it cannot be used."""
        return survey(path)

    def notes(self, model: AudioModel, paths: Sequence[Path]) -> list[str]:
        """What is said once of all files of a command: that they are resampled, that they lack high frequencies."""
        rate, rates = model.front_end.sample_rate_hz, Counter(inspect(path).rate_hz for path in paths)
        others = [f"{n} at {hz} Hz" for hz, n in sorted(rates.items()) if hz != rate]
        low = {hz: n for hz, n in rates.items() if hz < rate}
        notes = [f"{', '.join(others)} of {len(paths)} files: resampled to {rate} Hz"] if others else []
        if low:
            notes.append(
                f"{sum(low.values())} of {len(paths)} files hold nothing above {max(low) / 2:g} Hz, the backbone was "
                f"trained on sounds up to {rate / 2:g} Hz: expect less of it there"
            )
        return notes

    def describe(self, model: AudioModel) -> dict[str, Any]:
        return {"front_end": asdict(model.front_end), "input": f"{model.num_samples / 16000:.2f} s at 16 kHz"}

    def extra(self, handle: Handle, dataset: Windows) -> list[dict[str, Any]]:
        """The routers of mixtures on up to 16 clips: whether they route at all, and whom they load."""
        rows = router_diagnostics(handle, dataset)
        if not rows:
            return []

        def cell(v):
            return v if isinstance(v, str) else " ".join(f"{x:.3f}" for x in np.atleast_1d(v))

        text = "Measured on up to 16 clips. A dispatch entropy near 1 means that slots are plain means of all tokens."
        table = [{name: cell(v) for name, v in row.items()} for row in rows]
        return [{"title": "Routers", "text": text, "table": table}]


def router_diagnostics(handle: Handle, dataset: Windows) -> list[dict[str, Any]]:
    """Per site of a mixture: what its branch's `diagnostics` says of the tokens of up to 16 clips."""
    branches = {k: b for k, b in handle.adapter.branches.items() if hasattr(b, "diagnostics")}
    found: dict[str, dict[str, Any]] = {}

    def look(key):
        def hook(branch, args):
            x, y, context = args
            found[key] = branch.diagnostics(x if branch.placement == "parallel" else y, context.token_mask)

        return hook

    hooks = [b.register_forward_pre_hook(look(k)) for k, b in branches.items()]
    try:
        items = [dataset[i] for i in range(min(16, len(dataset)))]
        batch = {k: torch.stack([torch.as_tensor(i[k]) for i in items]) for k in ("wave", "length")}
        device = next(handle.model.parameters()).device
        with torch.no_grad():
            handle.model(batch["wave"].to(device), batch["length"].to(device))
    finally:
        for h in hooks:
            h.remove()
    return [{"site": key.replace("/", "."), **found[key]} for key in found]


DOMAIN = AudioDomain()
