"""`adapt audio export`: a trained adapter as a model that other tools load, compared with it before it is there.

hf: a folder for transformers.  torch, onnx: one file, wave in, logits out, the filter bank inside.  peft: LoRA alone.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptsuite
from adaptsuite.atomic import check_target, write_folder
from adaptsuite.audio.heads import HfHead
from adaptsuite.audio.inputs import AstInput
from adaptsuite.audio.pipeline import DOMAIN, AudioModel
from adaptsuite.errors import UsageError, nearest
from adaptsuite.experiment import restore
from adaptsuite.export import agree, needs_onnx, write_onnx, write_peft, write_torch
from adaptsuite.host import Handle
from adaptsuite.recipe import Recipe

SUFFIX = {"torch": ".pt2", "onnx": ".onnx"}  # the other formats are folders


@dataclass(frozen=True)
class Job:
    """A restored adapter on its way into another format."""

    handle: Handle
    recipe: Recipe
    labels: list[str]
    record: Any
    out: Path

    @property
    def model(self) -> AudioModel:
        return self.handle.model


def export(folder: str | Path, format: str, out: str | Path) -> dict[str, Any]:
    """{"export": path, "format", "max_difference", "bytes", "labels", "notes"}; `out` is a file for torch and onnx.

    Raises UsageError with the reason for what a format cannot hold, Inexact where the written model says something
    else than the adapter; nothing is then written.
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format!r} is not known; {nearest(format, FORMATS)}")
    out, suffix = Path(out), SUFFIX.get(format)
    if suffix and (out.suffix != suffix or out.is_dir()):
        raise UsageError(f"--out {out}: --format {format} writes a file, name it NAME{suffix}")
    if not suffix:
        check_target(out)
    if format == "onnx":
        needs_onnx()
    handle, recipe, labels, record = restore(DOMAIN, folder)
    gap, notes = FORMATS[format](Job(handle, recipe, labels, record, out))
    files = [out] if suffix else [p for p in out.rglob("*") if p.is_file()]
    return {
        "export": str(out),
        "format": format,
        "max_difference": gap,
        "bytes": sum(p.stat().st_size for p in files),
        "labels": labels,
        "notes": notes,
    }


def describe(found: dict[str, Any]) -> list[str]:
    """The result of `export`, one fact per line."""
    return [
        f"export   {found['export']}  ({found['format']}, {found['bytes'] / 1e6:.2f} MB)",
        f"labels   {len(found['labels'])}: {', '.join(found['labels'])}",
        f"differs  by at most {found['max_difference']:.1e} from the adapter",
        *(f"note     {note}" for note in found["notes"]),
    ]


# ---- wave in, logits out


class Classifier(nn.Module):
    """wave (B, N) in [-1, 1], zeros behind the clip, and length (B,) of it in samples -> logits (B, K)."""

    def __init__(self, model: AudioModel):
        super().__init__()
        self.model = model

    def forward(self, wave: Tensor, length: Tensor) -> Tensor:
        return self.model(wave, length)


def _graph(write: Callable[..., float]):
    """torch and onnx: merged where the method can be, else with the adapter's branches in the graph."""

    def run(job: Job) -> tuple[float, list[str]]:
        graph = Classifier(job.model).eval()
        inputs = dict(zip(("wave", "length"), DOMAIN.sample(job.model, 3), strict=True))
        with torch.no_grad():
            expected = graph(**inputs)
        if job.handle.method.mergeable is True:
            job.handle.bake()
        gap = write(job.out, graph, inputs, expected, metadata(job))
        front = job.model.front_end
        shape = f"wave (B, {job.model.num_samples}) float32 at {front.sample_rate_hz} Hz, length (B,) int64 in samples"
        activation = metadata(job)["activation"]
        return gap, [f"inputs {shape}; output logits (B, {len(job.labels)}), whose {activation} are probabilities"]

    return run


def metadata(job: Job) -> dict[str, Any]:
    """What a user of the file must know beside its tensors; a threshold is of probabilities, None: the best wins."""
    multilabel = job.recipe.data.task == "multilabel"
    threshold = job.record.threshold
    return {
        "adaptsuite": adaptsuite.__version__,
        "method": job.recipe.method,
        "base": job.record.base["fingerprint"],
        "recipe_hash": job.record.recipe_hash,
        "task": job.recipe.data.task,
        "labels": job.labels,
        "sample_rate_hz": job.model.front_end.sample_rate_hz,
        "num_samples": job.model.num_samples,
        "output": "logits",
        "activation": "sigmoid" if multilabel else "softmax",
        "threshold": 0.5 if threshold is None and multilabel else threshold,
        "temperature": job.record.temperature,
    }


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


FORMATS: dict[str, Callable[[Job], tuple[float, list[str]]]] = {
    "hf": _hf,
    "torch": _graph(write_torch),
    "onnx": _graph(write_onnx),
    "peft": _peft,
}
