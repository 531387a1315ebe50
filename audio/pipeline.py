"""From waveforms to labels: the task model (fbank, backbone, head), its loss and its scores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.audio.backbones import load
from adaptsuite.audio.data import SUFFIXES, Clip, Windows, inspect, rate_remarks, survey
from adaptsuite.audio.features import Fbank, add_noise, gain, roll, spec_augment
from adaptsuite.audio.heads import HfHead, LinearHead, PrototypeHead, pooled
from adaptsuite.audio.inputs import AstInput, FrontEnd, Input
from adaptsuite.audio.noise import COLOURS, noise_like, recordings
from adaptsuite.bank import BANK
from adaptsuite.domain import Domain
from adaptsuite.errors import UsageError
from adaptsuite.host import Handle
from adaptsuite.losses import asymmetric
from adaptsuite.memory import Memory
from adaptsuite.metrics import score
from adaptsuite.recipe import Recipe


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

    kind: Literal["linear", "hf", "prototypes"] = "linear"  # hf: as ASTForAudioClassification has it, for export
    pool: str | None = None  # linear: of cls, mean, std, max, rows (heads.pooled), by +; None: the backbone's own
    prototypes: int = 20  # a class
    start: Literal["probe", "random"] = "probe"  # from a logistic regression on frozen features (arXiv:2202.10054)
    loss: Literal["auto", "asymmetric"] = "auto"  # auto: cross-entropy, or binary cross-entropy for several labels


@dataclass(frozen=True)
class AugmentSettings:
    """Section `augment` of a recipe: what happens to training clips, to their real part only, never to padding."""

    freq_mask: int = 0  # widest SpecAugment mask in mel bins
    time_mask: int = 0  # widest SpecAugment mask in frames
    mixup: float = 0.0  # alpha of the Beta distribution; 0: off. Targets are mixed as the waves are, labels too
    gain_db: float = 0.0  # uniform in +- gain_db
    roll: bool = False  # circular shift of the waveform by any number of samples
    noise: str = ""  # a folder of recordings, white or pink, mixed into every clip; empty: off
    noise_snr_db: tuple[float, float] = (5.0, 20.0)  # lowest and highest signal-to-noise ratio, drawn for each clip
    label_smoothing: float = 0.0  # share of the target given to all classes alike; to 1/2 each for several labels

    def __post_init__(self) -> None:
        if self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise UsageError(f"augment.noise_snr_db={self.noise_snr_db}: expected the lower ratio first")


class AudioModel(nn.Module):
    """wave (B, N) -> logits (B, K): the family's front end, the backbone, what the head reads, the head.

    length: (B,) samples that are real; the rest is zero padding, left out of pooling and of mixtures' routing.
    """

    def __init__(self, backbone: nn.Module, heard: Input, num_classes: int, head: HeadSettings | None = None):
        super().__init__()
        head = head or HeadSettings()
        self.input, self.backbone = heard, backbone
        if head.kind == "linear":
            pool = head.pool or getattr(backbone, "adaptsuite_pool", "mean")
            self.head = LinearHead(heard.width, num_classes, pool, heard.grid[0])
        elif head.pool is not None:
            raise UsageError(f"head.pool={head.pool!r}: a head of kind {head.kind} has a reading of its own")
        elif head.kind == "prototypes":
            self.head = PrototypeHead(heard.width, num_classes, head.prototypes)
        else:
            if not isinstance(heard, AstInput):
                raise UsageError(f"head.kind=hf is AST's, this backbone is a {type(backbone).__name__}")
            heard.like_transformers()
            self.head = HfHead(heard.width, num_classes, backbone.config.layer_norm_eps)

    @property
    def front_end(self) -> FrontEnd:
        return self.input.front_end

    @property
    def num_samples(self) -> int:
        """Samples of one input."""
        return self.input.num_samples

    @property
    def linear_head(self) -> str | None:
        """Path of the linear layer that ends the head; None: it has none."""
        return {LinearHead: "head", HfHead: "head.dense"}.get(type(self.head))

    def features(self, wave: Tensor, length: Tensor | None = None) -> Tensor:
        """What the backbone reads; of spectrogram families (B, frames, F) normalised log-mel energies."""
        return self.input.features(wave, length)

    def tokens(self, features: Tensor, length: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Final-norm tokens (B, T, D) and the mask of real ones (None: all)."""
        mask = None if length is None else self.input.mask(length)
        bank = getattr(self, BANK, None)
        if bank is not None:
            bank.context = bank.context.anew(token_mask=mask)
        return self.input.tokens(self.backbone, features, length), mask

    def embed(self, wave: Tensor, length: Tensor | None = None) -> Tensor:
        """(B, features): what a linear head reads, else the mean of the tokens."""
        tokens, mask = self.tokens(self.features(wave, length), length)
        return (
            self.head.read(tokens, mask, self.input)
            if self.linear_head
            else pooled(tokens, mask, ("mean",), self.input)
        )

    def forward(
        self,
        wave: Tensor,
        length: Tensor | None = None,
        spec_masks: tuple[int, int] = (0, 0),
        embedding: bool = False,
    ) -> Tensor:
        """spec_masks: widest SpecAugment masks (mel bins, frames); training only. embedding: `embed` instead."""
        if embedding:
            return self.embed(wave, length)
        features = self.features(wave, length)
        if any(spec_masks):
            features = spec_augment(features, *spec_masks, None if length is None else self.input.frames(length))
        tokens, mask = self.tokens(features, length)
        return self.head(self.head.read(tokens, mask, self.input))


class AudioTask:
    """Classification of clips: cross-entropy for one label, binary cross-entropy or the asymmetric loss for several."""

    target = "label"

    def __init__(
        self,
        classes: Sequence[str],
        task: str = "multiclass",
        augment: AugmentSettings | None = None,
        loss: str = "auto",
    ):
        if task not in ("multiclass", "multilabel"):
            raise UsageError(f"audio: task {task!r} is not known; it is multiclass or multilabel")
        if loss == "asymmetric" and task != "multilabel":
            raise UsageError("head.loss=asymmetric is for several labels a clip: add --set data.task=multilabel")
        self.of_labels = asymmetric if loss == "asymmetric" else F.binary_cross_entropy_with_logits
        self.classes, self.task, self.augment = tuple(classes), task, augment or AugmentSettings()
        self.monitor = "accuracy" if task == "multiclass" else "map"

    def loss(self, model: AudioModel, batch: dict[str, Any]) -> Tensor:
        a, wave, length = self.augment, batch["wave"], batch["length"]
        target = batch["label"]
        target = F.one_hot(target, len(self.classes)).float() if self.task == "multiclass" else target.float()
        if a.gain_db:
            wave = gain(wave, a.gain_db)
        if a.roll:
            wave = roll(wave, length)
        if a.mixup:  # of several labels too: AST's code gives each its share and takes no union
            share = float(np.random.beta(a.mixup, a.mixup))
            other = torch.randperm(len(wave), device=wave.device)
            wave, target = share * wave + (1 - share) * wave[other], share * target + (1 - share) * target[other]
            length = torch.maximum(length, length[other])
        if a.noise:
            low, high = a.noise_snr_db
            snr_db = low + (high - low) * torch.rand(len(wave), device=wave.device)
            wave = add_noise(wave, noise_like(wave, a.noise), snr_db, length)
        logits = model(wave, length, (a.freq_mask, a.time_mask))
        if self.task == "multilabel":
            loss = self.of_labels(logits, target * (1 - a.label_smoothing) + a.label_smoothing / 2)
        else:
            loss = F.cross_entropy(logits, target, label_smoothing=a.label_smoothing)
        return loss + model.head.regulariser() if isinstance(model.head, PrototypeHead) else loss

    def drawn(self, model: AudioModel) -> list[str]:
        """Fields of `augment` that draw at random in training."""
        names = ("freq_mask", "time_mask", "mixup", "gain_db", "roll", "noise")
        return [name for name in names if getattr(self.augment, name)]

    def predict(self, model: AudioModel, batch: dict[str, Any]) -> Tensor:
        return model(batch["wave"], batch["length"])

    def embed(self, model: AudioModel, batch: dict[str, Any]) -> Tensor:
        return model(batch["wave"], batch["length"], embedding=True)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        return score(outputs, targets, self.task, probabilities=False)


class AudioDomain(Domain):
    """What the commands need of audio."""

    name = "audio"
    suffixes = SUFFIXES
    train_norms = True
    sections = {"front_end": FrontEndSettings, "head": HeadSettings, "augment": AugmentSettings}
    backbones = (
        "embedded:audio-tiny",
        "ast-base",
        "ast-tiny",
        "hf:HUB_ID_OR_FOLDER of an AST, wav2vec 2.0, HuBERT, WavLM, Whisper or CLAP",
    )
    longest_frames = 1024  # what AST was pretrained on; longer clips are read as several windows

    def __init__(self):
        self.memory = Memory()

    def defaults(self, method: str) -> dict[str, dict[str, Any]]:
        """audio.md section 2: widths and sites; rates that trained well on small sets."""
        settings = {"bottleneck": {"bottleneck": 12}}.get(method, {})
        lr = {"full": 3e-4, "linear": 1e-3, "prompt": 1e-2, "prefix": 1e-2}.get(method, 5e-3)
        plan = {"lr": lr, "head_lr": 1e-3, "batch_size": 16, "epochs": 10}
        if method == "audio.prototypes":  # the paper's, beside the rates that its head scales
            plan |= {"betas": (0.9, 0.95), "weight_decay": 3e-4, "warmup": 0.067, "clip": 2.0}
            plan["epochs"] = 40  # it starts from chance: ESC-10 .79 after 4 epochs, .85 after 15, .88 after 40
            return {"method_settings": settings, "plan": plan, "head": {"kind": "prototypes"}}
        return {"method_settings": settings, "plan": plan}

    def settle(self, recipe: Recipe, paths: Sequence[Path]) -> Recipe:
        """Fixes the input's length: as given, else the longest clip's, at most `longest_frames`. Reads the noises."""
        noise = recipe.augment.get("noise")
        if paths and noise and noise not in COLOURS:
            recordings.cache_clear()  # the folder as it is now
            recordings(noise)  # a file that cannot be used is told now, not at its turn
        if recipe.front_end.get("frames") is not None or not paths:
            return recipe
        longest = max(inspect(path).seconds for path in paths)
        frames = min(max(Fbank.num_frames(round(longest * 16000)), 16), self.longest_frames)
        return replace(recipe, front_end={**recipe.front_end, "frames": frames})

    def model(self, recipe: Recipe, classes: Sequence[str]) -> AudioModel:
        backbone, heard = load(
            recipe.backbone, random_weights=recipe.random_weights, seed=recipe.seeds[0], **recipe.front_end
        )
        if recipe.method == "audio.prototypes" and recipe.head.get("kind") != "prototypes":
            raise UsageError("audio.prototypes is a head: leave head.kind at prototypes, or take the method linear")
        masks = recipe.augment.get("freq_mask", 0) or recipe.augment.get("time_mask", 0)
        if masks and not heard.spectrogram:
            raise UsageError(f"SpecAugment masks log-mel input, {recipe.backbone} reads something else: set both to 0")
        return AudioModel(backbone, heard, len(classes), HeadSettings(**recipe.head)).eval()

    def decided(self, recipe: Recipe, model: AudioModel) -> Recipe:
        """With the pool that the backbone chose, so that an adapter does not depend on what it would choose later."""
        if not isinstance(model.head, LinearHead):
            return recipe
        return replace(recipe, head={**recipe.head, "pool": "+".join(model.head.pool)})

    def dataset(self, model: AudioModel, paths: Sequence[Path], targets: np.ndarray | None) -> Windows:
        return Windows(paths, targets, model.front_end.sample_rate_hz, model.num_samples, self.memory)

    def task(self, recipe: Recipe, classes: Sequence[str], counts: np.ndarray | None = None) -> AudioTask:
        augment, loss = AugmentSettings(**recipe.augment), recipe.head.get("loss", "auto")
        return AudioTask(classes, recipe.data.task, augment, loss)

    def sample(self, model: AudioModel, batch: int = 2) -> tuple[Tensor, Tensor]:
        """Seeded noises; the last one is half padding, so that masks are used."""
        generator = torch.Generator().manual_seed(0)
        wave = torch.randn(batch, model.num_samples, generator=generator) * 0.1
        length = torch.full((batch,), model.num_samples)
        length[-1] = max(model.num_samples // 2, 400)
        wave[-1, length[-1] :] = 0
        return wave, length

    def header(self, path: Path) -> Clip:
        return inspect(path)

    def prepare(self, model: AudioModel, paths: Sequence[Path]) -> list[str]:
        """Decodes what fits into memory, so that training and scoring do not stop at a damaged file halfway."""
        if self.memory.crowded:
            self.memory = Memory()
        dataset = self.dataset(model, paths, None)
        dataset.load()
        return [*dataset.remarks(), *model.input.remarks]

    def look(self, path: Path) -> dict[str, Any]:
        """What `check` says of one file, decoded whole; raises DataError where it cannot be used."""
        return survey(path)

    def notes(self, model: AudioModel, paths: Sequence[Path]) -> list[str]:
        """What is said once of all files of a command."""
        return rate_remarks([inspect(path) for path in paths], model.front_end.sample_rate_hz)

    def describe(self, model: AudioModel) -> dict[str, Any]:
        front, hz = model.front_end, model.front_end.sample_rate_hz
        return {"front_end": asdict(front), "input": f"{model.num_samples / hz:.2f} s at {hz} Hz"}

    def extra(self, handle: Handle, dataset: Windows, outputs: np.ndarray | None) -> list[dict[str, Any]]:
        """The routers of mixtures, with pictures."""
        from adaptsuite.audio.pictures import routers

        return routers(handle, dataset)


DOMAIN = AudioDomain()
