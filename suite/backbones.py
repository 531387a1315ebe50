"""Backbones by name: SOURCE:NAME with the sources timm, hf, open_clip, monai, torchaudio, embedded and file.

`hf:` takes a hub id or a local folder in the hub's layout; `file:` a folder of either transformers' or timm's layout;
`embedded:` the small backbones that ship with a domain. Each loaded model carries `adaptsuite_source`, which binds
adapters to the values the source stores.
"""

import importlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptsuite.errors import ResourceError, UsageError, nearest
from adaptsuite.identity import Source, fingerprint

SOURCES = ("timm", "hf", "open_clip", "monai", "torchaudio", "embedded", "file")


def parse_backbone(name: str) -> tuple[str, str]:
    """("timm", "vit_base_patch16_224") of "timm:vit_base_patch16_224". Raises UsageError with the nearest source."""
    source, colon, rest = name.partition(":")
    if not colon or source not in SOURCES:
        raise UsageError(f"backbone {name!r}: expected SOURCE:NAME, no source {source!r}; {nearest(source, SOURCES)}")
    if not rest:
        raise UsageError(f"backbone {name!r}: the name after {source}: is missing")
    return source, rest


def load_backbone(name: str, *, random_weights: bool = False, seed: int = 0, **options: Any) -> nn.Module:
    """The model without its task head, in eval mode and float32, with `adaptsuite_source`.

    options go to the source's own constructor (image size, channels ...).  random_weights: the architecture alone,
    seeded.  Raises UsageError for an unknown name and ResourceError where a hub cannot be reached.
    """
    source, rest = parse_backbone(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _LOADERS[source](rest, random_weights, options)
    return bind(model, f"{name} (random weights, seed {seed})" if random_weights else name)


def bind(model: nn.Module, name: str, resized: dict[str, list[int]] | None = None) -> nn.Module:
    """Records where the weights come from, over the tensors as they are now, then makes them float32 for training."""
    model.adaptsuite_source = Source(name, fingerprint(model.state_dict()), resized or {})
    return model.float().eval()


def _timm(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not name.startswith("hf-hub:") and name.partition(".")[0] not in timm.list_models():
        raise UsageError(f"timm has no model {name!r}; {nearest(name.partition('.')[0], timm.list_models())}")
    with _hub(f"timm:{name}"):
        return timm.create_model(name, pretrained=not random_weights, num_classes=0, **options)


def _hf(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(name)
    if folder.is_absolute() or name.startswith(".") or folder.exists():
        if not (folder / "config.json").is_file():
            raise UsageError(f"hf:{name}: a folder in the hub's layout is expected, it has no config.json")
        _refuse_pickle(folder, random_weights)
    with _hub(f"hf:{name}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        if random_weights:
            return AutoModel.from_config(config, trust_remote_code=False)
        return AutoModel.from_pretrained(
            name, config=config, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )


def _open_clip(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    import open_clip

    model, _, tag = name.partition("/")
    if model not in open_clip.list_models():
        raise UsageError(f"open_clip has no model {model!r}; {nearest(model, open_clip.list_models())}")
    if not random_weights and not tag:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise UsageError(f"open_clip:{model} needs a checkpoint, as open_clip:{model}/TAG; there is: {', '.join(tags)}")
    with _hub(f"open_clip:{name}"):
        return open_clip.create_model(model, pretrained=None if random_weights else tag, **options)


def _monai(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    import monai.networks.nets as nets

    known = [n for n in dir(nets) if isinstance(getattr(nets, n), type) and issubclass(getattr(nets, n), nn.Module)]
    if name not in known:
        raise UsageError(f"monai has no network {name!r}; {nearest(name, known)}")
    if not random_weights:
        raise UsageError(f"monai:{name} is an architecture without weights: only --random-weights can be had")
    return getattr(nets, name)(**options)


def _torchaudio(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    import torchaudio

    known = [n for n in dir(torchaudio.pipelines) if hasattr(getattr(torchaudio.pipelines, n), "get_model")]
    if name not in known:
        raise UsageError(f"torchaudio has no pipeline {name!r}; {nearest(name, known)}")
    bundle = getattr(torchaudio.pipelines, name)
    if random_weights:
        params = {**bundle._params, **options}
        return torchaudio.models.wav2vec2_model(**params) if hasattr(bundle, "_params") else bundle.get_model()
    with _hub(f"torchaudio:{name}"):
        return bundle.get_model(**options)


def shipped(domain: str, name: str) -> tuple[bytes, dict[str, Any]]:
    """(safetensors, what its metadata says) of a backbone that ships with a domain. Raises UsageError for another."""
    folder = files(f"adaptsuite.{domain}") / "weights"
    if not (weights := folder / f"{name}.safetensors").is_file():
        names = [p.name.removesuffix(".safetensors") for p in folder.iterdir() if p.name.endswith(".safetensors")]
        raise UsageError(f"embedded:{name} is unknown; {nearest(name, names)}")
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + length])["__metadata__"]
    return data, {key: json.loads(value) for key, value in said.items() if value.startswith("{")}


def _embedded(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    from adaptsuite.method import DOMAINS

    domain = name.partition("-")[0]
    if domain not in DOMAINS:
        raise UsageError(f"embedded:{name}: no domain {domain!r} has an embedded backbone; {nearest(domain, DOMAINS)}")
    try:
        module = importlib.import_module(f"adaptsuite.{domain}.backbones")
    except ModuleNotFoundError as e:
        raise UsageError(f"embedded:{name}: domain {domain} has no embedded backbone") from e
    return module.embedded(name, random_weights)


def _file(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    folder = Path(name)
    if folder.is_file():
        folder = folder.parent
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"file:{name}: no config.json; a folder in transformers' or timm's layout is expected")
    if "architecture" not in json.loads(config.read_text(encoding="utf-8")):
        return _hf(str(folder), random_weights, options)
    _refuse_pickle(folder, random_weights)
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=not random_weights, num_classes=0, **options)


_LOADERS = {
    "timm": _timm,
    "hf": _hf,
    "open_clip": _open_clip,
    "monai": _monai,
    "torchaudio": _torchaudio,
    "embedded": _embedded,
    "file": _file,
}


def _refuse_pickle(folder: Path, random_weights: bool) -> None:
    if random_weights or any(folder.glob("*.safetensors")):
        return
    found = ", ".join(p.name for p in sorted(folder.iterdir())) or "nothing"
    raise UsageError(f"{folder}: weights must be safetensors, pickles are never opened; found {found}")


class _hub:
    """Turns what a hub client raises without a network, or for a name it does not know, into one line."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, (UsageError, ResourceError)) or not isinstance(error, (OSError, RuntimeError, ValueError)):
            return
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ResourceError(
            f"backbone {self.name} cannot be had: {reason[:200]}. Give a local folder (hf:PATH, file:PATH), an "
            "embedded backbone, or --random-weights"
        ) from error
