"""`adapt audio export`: a trained adapter as a model that other tools load, compared with it before it is there.

hf: a folder for transformers.  torch, onnx: one file, wave in, logits out, the filter bank inside.  peft: LoRA alone.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite import export as exports
from adaptsuite.atomic import write_folder
from adaptsuite.audio.heads import HfHead
from adaptsuite.audio.inputs import AstInput
from adaptsuite.audio.pipeline import DOMAIN, AudioModel
from adaptsuite.errors import UsageError
from adaptsuite.export import Job, Writer, agree, write_onnx, write_peft, write_torch


def export(folder: str | Path, format: str, out: str | Path) -> dict[str, Any]:
    """Writes an audio adapter as one of FORMATS, as `adaptsuite.export.export` says."""
    return exports.export(DOMAIN, FORMATS, folder, format, out)


# ---- wave in, logits out


class Classifier(nn.Module):
    """wave (B, N) in [-1, 1], zeros behind the clip, and length (B,) of it in samples -> logits (B, K)."""

    def __init__(self, model: AudioModel):
        super().__init__()
        self.model = model

    def forward(self, wave: Tensor, length: Tensor) -> Tensor:
        return self.model(wave, length)


def _graph(write: Callable[..., float]) -> Writer:
    def run(job: Job) -> tuple[float, list[str]]:
        front, samples = job.model.front_end, job.model.num_samples
        inputs = dict(zip(("wave", "length"), DOMAIN.sample(job.model, 3), strict=True))
        facts = exports.metadata(job, sample_rate_hz=front.sample_rate_hz, num_samples=samples)
        gap = exports.write_graph(job, write, Classifier(job.model), inputs, facts)
        shape = f"wave (B, {samples}) float32 at {front.sample_rate_hz} Hz, length (B,) int64 in samples"
        return gap, [
            f"inputs {shape}; output logits (B, {len(job.labels)}), whose {facts['activation']} are probabilities"
        ]

    return run


# ---- transformers


def _hf(job: Job) -> tuple[float, list[str]]:
    """A folder for AutoModelForAudioClassification and pipeline("audio-classification"): merged weights, label map,
    feature extractor."""
    from transformers import ASTFeatureExtractor, ASTForAudioClassification, logging

    logging.disable_progress_bar()
    model = job.model
    _only_ast(job)
    waves = _three_lengths(model.num_samples)
    with torch.no_grad():
        expected = torch.cat([_first_window(model, wave) for wave in waves])
    job.handle.bake()
    config = copy.deepcopy(model.backbone.config)
    config.id2label = dict(enumerate(job.labels))
    config.label2id = {label: i for i, label in enumerate(job.labels)}
    multilabel = job.recipe.data.task == "multilabel"
    config.problem_type = f"{'multi' if multilabel else 'single'}_label_classification"
    stock = ASTForAudioClassification(config)
    parts = {"audio_spectrogram_transformer": model.backbone, "classifier": model.head}
    stock.load_state_dict({f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()})
    front = model.front_end
    extractor = ASTFeatureExtractor(
        sampling_rate=front.sample_rate_hz,
        num_mel_bins=front.num_mel_bins,
        max_length=front.frames,
        mean=front.mean,
        std=front.std,
    )
    gaps = []

    def write(temp: Path) -> None:
        stock.save_pretrained(temp)
        extractor.save_pretrained(temp)
        gaps.append(agree(str(job.out), _as_transformers_says(temp, waves), expected))

    write_folder(job.out, write)
    seconds = model.num_samples / front.sample_rate_hz
    return gaps[0], [f"transformers' pipeline cuts clips at {seconds:.2f} s; adapt audio predict averages windows"]


def _only_ast(job: Job) -> None:
    """Raises UsageError for what ASTForAudioClassification and its extractor cannot hold."""
    model, method, other = job.model, job.handle.method, "--format torch and onnx take it"
    if not isinstance(model.input, AstInput):
        raise UsageError(f"--format hf writes ASTs, this backbone is a {type(model.backbone).__name__}; {other}")
    if not isinstance(model.head, HfHead):
        raise UsageError(
            f"--format hf needs the head of ASTForAudioClassification, this one is {job.recipe.head['kind']}: train "
            f"with --set head=hf; {other} as it is"
        )
    if method.mergeable is not True:
        raise UsageError(f"--format hf needs merged weights, {method.name!r} has none: {method.mergeable}; {other}")


def _three_lengths(num_samples: int) -> list[Tensor]:
    """Noises shorter than, equal to and longer than the input."""
    generator = torch.Generator().manual_seed(0)
    lengths = (max(num_samples // 2, 400), num_samples, num_samples * 3 // 2)
    return [torch.randn(n, generator=generator) * 0.1 for n in lengths]


def _first_window(model: AudioModel, wave: Tensor) -> Tensor:
    kept = wave[: model.num_samples]
    return model(F.pad(kept, (0, model.num_samples - len(kept)))[None], torch.tensor([len(kept)]))


def _as_transformers_says(folder: Path, waves: list[Tensor]) -> Tensor:
    """(waves, K) logits through the extractor and the model of a folder."""
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = AutoModelForAudioClassification.from_pretrained(folder)
    rate = extractor.sampling_rate
    read = [extractor(w.numpy(), sampling_rate=rate, return_tensors="pt") for w in waves]
    with torch.no_grad():
        return torch.cat([model(**x).logits for x in read])


# ---- peft


def _peft(job: Job) -> tuple[float, list[str]]:
    model = job.model
    wave, length = DOMAIN.sample(model)
    features = model.features(wave, length)
    gap = write_peft(job.handle, "backbone", job.out, lambda part: model.input.tokens(part, features, length))
    notes = [f"for {job.recipe.backbone}; the head is not in it"]
    if model.backbone.adaptsuite_source.resized:
        call = f"load({job.recipe.backbone!r}, frames={model.front_end.frames})[0]"
        notes.append(f"its positions were resized for this length: adaptsuite.audio.backbones.{call} does so")
    return gap, notes


FORMATS: dict[str, Writer] = {
    "hf": _hf,
    "torch": _graph(write_torch),
    "onnx": _graph(write_onnx),
    "peft": _peft,
}
