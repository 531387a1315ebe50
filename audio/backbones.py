"""Audio Spectrogram Transformers by name, for clips of any length (Gong et al. 2021, arXiv:2104.01778)."""

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from adaptsuite.audio.features import resize_positions
from adaptsuite.backbones import bind, load_backbone, parse_backbone
from adaptsuite.errors import UsageError, nearest

ALIASES = {
    "ast-base": {},
    "ast-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
}
HUB = {"ast-base": "hf:MIT/ast-finetuned-audioset-10-10-0.4593"}
EMBEDDED_POOL = "mean+std"  # what its pretraining reads; the mean alone is some points weaker
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974


@dataclass(frozen=True)
class FrontEnd:
    """How a waveform becomes the backbone's input; part of every adapter file."""

    frames: int = 1024  # of 10 ms
    sample_rate_hz: int = 16000
    num_mel_bins: int = 128
    low_hz: float = 20.0
    high_hz: float = 0.0  # 0: half the sample rate
    mean: float = AUDIOSET_MEAN  # of log-mel values; the input is (x - mean) / (2 std), as AST was trained
    std: float = AUDIOSET_STD


def load(
    name: str,
    *,
    frames: int | None = None,
    random_weights: bool = False,
    seed: int = 0,
    mean: float | None = None,
    std: float | None = None,
    reference_compat: bool = False,
) -> tuple[nn.Module, FrontEnd]:
    """An ASTModel for inputs of `frames` frames (None: as it was trained), and its front end.

    Position embeddings are resized as AST's authors do. With reference_compat they are zeroed instead, which is what
    the PETL-AST code does without saying so: the model then cannot tell the order of what it hears.
    """
    architecture = ALIASES.get(name)
    if architecture is not None and random_weights:
        model, front = _stock(name, architecture, seed), FrontEnd()
    elif architecture is not None and name not in HUB:
        raise UsageError(f"backbone {name!r} has no published weights: add --random-weights, or take ast-base")
    else:
        full = HUB.get(name, name)
        if ":" not in full:
            raise UsageError(f"backbone {name!r} is unknown; {nearest(name, [*ALIASES, 'embedded:audio-tiny'])}")
        model = load_backbone(full, random_weights=random_weights, seed=seed)
        front = _front_end(full, model)
    if type(model).__name__ != "ASTModel":
        raise UsageError(f"backbone {name!r} is a {type(model).__name__}; the audio commands take AST models")
    front = replace(front, **{k: v for k, v in (("mean", mean), ("std", std)) if v is not None})
    if not front.std > 0:
        raise UsageError(f"front_end.std is {front.std}, it must be above 0")
    if frames is not None:
        front = replace(front, frames=frames)
    set_frames(model, front.frames, zero=reference_compat)
    return model, front


def set_frames(model: nn.Module, frames: int, zero: bool = False) -> None:
    """Makes an ASTModel accept (B, frames, F) inputs; its positions are cut or stretched along time, or zeroed."""
    config = model.config
    if frames < config.patch_size:
        raise UsageError(f"frames is {frames}, one patch takes {config.patch_size}")
    old, new = grid(config, config.max_length), grid(config, frames)
    positions = model.embeddings.position_embeddings
    value = torch.zeros_like(positions) if zero else positions.detach()
    if new != old:
        value = resize_positions(value, old, new)
        model.adaptsuite_source.resized["embeddings.position_embeddings"] = list(value.shape)
    model.embeddings.position_embeddings = nn.Parameter(value.clone(), requires_grad=positions.requires_grad)
    config.max_length = frames


def grid(config, frames: int) -> tuple[int, int]:
    """(rows along frequency, columns along time) of the patches of an ASTConfig's input of `frames` frames."""
    rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return rows, (frames - config.patch_size) // config.time_stride + 1


def embedded(name: str, random_weights: bool = False) -> nn.Module:
    """A backbone that ships with the package, as a stock ASTModel in the precision that its file stores."""
    from safetensors.torch import load as read
    from transformers import ASTConfig, ASTModel

    weights = files("adaptsuite.audio") / "weights" / f"{name}.safetensors"
    if not weights.is_file():
        shipped = [p.name.removesuffix(".safetensors") for p in (files("adaptsuite.audio") / "weights").iterdir()]
        raise UsageError(f"embedded:{name} is unknown; {nearest(name, [n for n in shipped if n.startswith('audio-')])}")
    data = weights.read_bytes()
    record = embedded_record(data)
    model = ASTModel(ASTConfig(**record["config"]))
    if random_weights:
        initialise_tokens(model)
    else:
        state = read(data)
        model.to(next(iter(state.values())).dtype).load_state_dict(state)
    model.adaptsuite_front_end = record["front_end"]
    model.adaptsuite_pool = EMBEDDED_POOL
    return model


def embedded_record(data: bytes) -> dict[str, dict]:
    """{"config": ASTConfig arguments, "front_end": FrontEnd fields} of a shipped safetensors file."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return {key: json.loads(metadata[key]) for key in ("config", "front_end")}


def _stock(name: str, architecture: dict, seed: int) -> nn.Module:
    from transformers import ASTConfig, ASTModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ASTModel(ASTConfig(**architecture))
        initialise_tokens(model)
    return bind(model, f"{name} (random weights, seed {seed})")


def initialise_tokens(model: nn.Module) -> None:
    """transformers starts CLS, DIST and positions at zero: the two tokens would stay one, and order would be unseen."""
    for p in (model.embeddings.cls_token, model.embeddings.distillation_token, model.embeddings.position_embeddings):
        nn.init.trunc_normal_(p, std=0.02)


def _front_end(name: str, model: nn.Module) -> FrontEnd:
    """What the source says of its input: shipped with the weights, or the feature extractor's file, or AST's own."""
    own = getattr(model, "adaptsuite_front_end", None)
    if own is not None:
        return FrontEnd(**{"frames": model.config.max_length, **own})
    front = FrontEnd(frames=model.config.max_length, num_mel_bins=model.config.num_mel_bins)
    source, rest = parse_backbone(name)
    settings = Path(rest) / "preprocessor_config.json"
    if source in ("hf", "file") and settings.is_file():
        given = json.loads(settings.read_text(encoding="utf-8"))
        names = {"mean": "mean", "std": "std", "sampling_rate": "sample_rate_hz"}
        front = replace(front, **{ours: given[theirs] for theirs, ours in names.items() if theirs in given})
    return front
