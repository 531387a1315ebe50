"""Audio transformers by name, for clips of any length: AST, wav2vec 2.0 and its kin, Whisper, CLAP."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adaptsuite.audio.inputs import FAMILIES, AstInput, ClapInput, FrontEnd, Input, WaveInput
from adaptsuite.backbones import bind, load_backbone, parse_backbone, shipped
from adaptsuite.errors import UsageError, nearest

ALIASES = {
    "ast-base": {},
    "ast-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
}
HUB = {"ast-base": "hf:MIT/ast-finetuned-audioset-10-10-0.4593"}
EMBEDDED_POOL = "rows"  # frozen it reads ESC-10 at .900 and digits of unseen speakers at .681; mean+std .875 and .614

# SOURCE:NAME or a name of one's own -> function(random_weights, seed, frames) that gives (module, its Input)
OWN: dict[str, Callable[[bool, int, int | None], tuple[nn.Module, Input]]] = {}


def register(name: str, build: Callable[[bool, int, int | None], tuple[nn.Module, Input]]) -> None:
    """Makes a network of one's own a backbone of the audio commands and pipeline, in this process.

    build(random_weights, seed, frames) -> (module, Input): the module in eval mode, its Input saying how it hears; the
    weights as they are then are what adapters get bound to.
    """
    OWN[name] = build


def load(
    name: str,
    *,
    frames: int | None = None,
    random_weights: bool = False,
    seed: int = 0,
    mean: float | None = None,
    std: float | None = None,
    reference_compat: bool = False,
) -> tuple[nn.Module, Input]:
    """A backbone for inputs of `frames` frames (None: as it was trained), and how it hears.

    AST's position embeddings are resized as its authors do. With reference_compat they are zeroed instead, which is
    what the PETL-AST code does without saying so: the model then cannot tell the order of what it hears.
    """
    changes = {k: v for k, v in (("mean", mean), ("std", std), ("frames", frames)) if v is not None}
    if name in OWN:
        if mean is not None or std is not None or reference_compat:
            raise UsageError(
                f"front_end's mean, std and reference_compat are for AST models, {name} is one of your own"
            )
        model, heard = OWN[name](random_weights, seed, frames)
        return bind(model, f"{name} (random weights, seed {seed})" if random_weights else name), heard
    architecture = ALIASES.get(name)
    if architecture is not None and random_weights:
        model, front, own = _stock(name, architecture, seed), FrontEnd(), {}
    elif architecture is not None and name not in HUB:
        raise UsageError(f"backbone {name!r} has no published weights: add --random-weights, or take ast-base")
    else:
        full = HUB.get(name, name)
        if ":" not in full:
            raise UsageError(f"backbone {name!r} is unknown; {nearest(name, [*ALIASES, *OWN, 'embedded:audio-tiny'])}")
        model = _audio_part(load_backbone(full, random_weights=random_weights, seed=seed))
        front, own = _front_end(full, model)
    kind = type(model).__name__
    if kind not in FAMILIES:
        raise UsageError(f"backbone {name!r} is a {kind}; the audio commands take {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    for option, given in (("mean", mean is not None), ("std", std is not None), ("reference_compat", reference_compat)):
        if given and not family.statistics:
            raise UsageError(f"front_end.{option} is for AST models; a {kind} has a normalisation of its own")
    front = replace(front, **changes)
    if not front.std > 0:
        raise UsageError(f"front_end.std is {front.std}, it must be above 0")
    return model, family(model, front, **({**own, "zero_positions": True} if reference_compat else own))


def _audio_part(model: nn.Module) -> nn.Module:
    """The encoder of a Whisper, the audio tower of a CLAP: what is left of them is not for sounds to labels."""
    kind, source = type(model).__name__, getattr(model, "adaptsuite_source", None)
    parts = {"WhisperModel": "encoder", "ClapModel": "audio_model"}
    return bind(getattr(model, parts[kind]), source.name) if kind in parts else model


def embedded(name: str, random_weights: bool = False) -> nn.Module:
    """A backbone that ships with the package, as a stock ASTModel in the precision that its file stores."""
    from safetensors.torch import load as read
    from transformers import ASTConfig, ASTModel

    data, record = shipped("audio", name)
    model = ASTModel(ASTConfig(**record["config"]))
    if random_weights:
        initialise_tokens(model)
    else:
        state = read(data)
        model.to(next(iter(state.values())).dtype).load_state_dict(state)
    model.adaptsuite_front_end = record["front_end"]
    model.adaptsuite_pool = EMBEDDED_POOL
    return model


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


def _front_end(name: str, model: nn.Module) -> tuple[FrontEnd, dict[str, Any]]:
    """What the source says of its input, and settings of its family alone: shipped with the weights, or in the feature
    extractor's file, or as its authors had it."""
    own = getattr(model, "adaptsuite_front_end", None)
    if own is not None:
        return FrontEnd(**{"frames": model.config.max_length, **own}), {}
    front, given = FrontEnd(), _extractor(name)
    if type(model).__name__ == "ASTModel":
        front = replace(front, frames=model.config.max_length, num_mel_bins=model.config.num_mel_bins)
    elif type(model).__name__ == "ClapAudioModel":
        front = replace(front, frames=1000, sample_rate_hz=48000, low_hz=0.0, high_hz=14000.0)
    names = {"sampling_rate": "sample_rate_hz", "frequency_min": "low_hz", "frequency_max": "high_hz"}
    names |= {"mean": "mean", "std": "std"} if FAMILIES.get(type(model).__name__) is AstInput else {}
    front = replace(
        front, **{ours: type(getattr(front, ours))(given[theirs]) for theirs, ours in names.items() if theirs in given}
    )
    options = {
        WaveInput: {"do_normalize": "unit_variance"},
        ClapInput: {"fft_window_size": "fft", "hop_length": "hop"},
    }.get(FAMILIES.get(type(model).__name__), {})
    return front, {ours: given[theirs] for theirs, ours in options.items() if theirs in given}


def _extractor(name: str) -> dict[str, Any]:
    """The settings of a transformers feature extractor, local or on the hub; empty where there is none."""
    source, rest = parse_backbone(name)
    if source not in ("hf", "file"):
        return {}
    from transformers import FeatureExtractionMixin

    try:
        return FeatureExtractionMixin.get_feature_extractor_dict(rest)[0]
    except OSError:  # a folder of weights and config.json alone
        return {}
