"""Backbones by name: SOURCE:NAME[?OPTION=VALUE&...][@FILE], of timm, hf, open_clip, monai, torchaudio, embedded, file.

`hf:` takes a hub id or a local folder in the hub's layout; `file:` a folder of either transformers' or timm's layout;
`embedded:` the small backbones that ship with a domain; `open_clip:` MODEL/TAG, or the path of a JSON file with its
`embed_dim`, `vision_cfg` and `text_cfg`. Options go to the source's constructor (`?img_size=96,96,96&in_channels=1`);
@FILE gives timm, open_clip and monai models the weights of a local file (adaptsuite.weights). Each loaded model carries
`adaptsuite_source`, which binds adapters to the values the source stores.
"""

import importlib
import json
import re
import tomllib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptsuite.errors import ResourceError, UsageError, nearest
from adaptsuite.identity import Source, fingerprint
from adaptsuite.weights import SUFFIXES, fit_weights, read_weights, swin_unetr_layout

SOURCES = ("timm", "hf", "open_clip", "monai", "torchaudio", "embedded", "file")


def parse_backbone(name: str) -> tuple[str, str]:
    """("timm", "vit_base_patch16_224") of "timm:vit_base_patch16_224". Raises UsageError with the nearest source."""
    source, colon, rest = name.partition(":")
    if not colon:
        raise UsageError(
            f"backbone {name!r}: expected SOURCE:NAME, such as timm:vit_base_patch16_224; sources: {', '.join(SOURCES)}"
        )
    if source not in SOURCES:
        raise UsageError(f"backbone {name!r}: expected SOURCE:NAME, no source {source!r}; {nearest(source, SOURCES)}")
    if not rest:
        raise UsageError(f"backbone {name!r}: the name after {source}: is missing")
    return source, rest


def parse_options(rest: str) -> tuple[str, dict[str, Any], str | None]:
    """("ViT", {"img_size": (96, 96, 96)}, "vit.pt") of "ViT?img_size=96,96,96@vit.pt"; values as TOML has them."""
    ends = "|".join(re.escape(suffix) for suffix in SUFFIXES)
    found = re.fullmatch(rf"(?P<name>.*?)(\?(?P<options>.*?))?(@(?P<weights>.*(?:{ends})))?", rest)
    options = {}
    for setting in filter(None, (found["options"] or "").split("&")):
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise UsageError(f"backbone option {setting!r} is not of the form key=value")
        options[key] = _value(value)
    return found["name"], options, found["weights"]


def _value(text: str) -> Any:
    for form in (text, f"[{text}]", json.dumps(text)) if "," in text else (text, json.dumps(text)):
        try:
            value = tomllib.loads(f"value = {form}")["value"]
        except tomllib.TOMLDecodeError:
            continue
        return tuple(value) if isinstance(value, list) else value


def load_backbone(
    name: str,
    *,
    random_weights: bool = False,
    seed: int = 0,
    part: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options: Any,
) -> nn.Module:
    """The model without its task head, in eval mode and float32, with `adaptsuite_source`.

    options go to the source's own constructor (image size, channels ...), after those of the name.  random_weights: the
    architecture alone, seeded.  part: what of the model is wanted, such as one of two towers.  Children that a file has
    no weights for are named in `adaptsuite_untrained`.
    Raises UsageError for an unknown name or option and ResourceError where a hub cannot be reached.
    """
    source, rest = parse_backbone(name)
    rest, named, weights = (rest, {}, None) if source == "file" else parse_options(rest)
    if weights and source not in ("timm", "open_clip", "monai"):
        raise UsageError(f"backbone {name!r}: weights of a file (@FILE) are for timm, open_clip and monai")
    if weights and random_weights:
        raise UsageError(f"backbone {name!r} names a file of weights and shall have random ones: choose one")
    state = read_weights(weights) if weights else None
    options = {**named, **options}
    if state is not None:
        options["state"] = state
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = part(_LOADERS[source](rest, random_weights, options))
        except TypeError as e:
            if not options:
                raise
            raise UsageError(f"backbone {name!r}: {' '.join(str(e).split())}") from e
    return bind(model, f"{name} (random weights, seed {seed})" if random_weights else name)


def bind(model: nn.Module, name: str, resized: dict[str, list[int]] | None = None) -> nn.Module:
    """Records where the weights come from, over the tensors as they are now, then makes them float32 for training."""
    model.adaptsuite_source = Source(name, fingerprint(model.state_dict()), resized or {})
    return model.float().eval()


def _timm(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    import timm

    if not name.startswith("hf-hub:") and name.partition(".")[0] not in timm.list_models():
        raise UsageError(f"timm has no model {name!r}; {nearest(name.partition('.')[0], timm.list_models())}")
    state = options.pop("state", None)
    with _hub(f"timm:{name}"):
        model = timm.create_model(name, pretrained=not random_weights and state is None, num_classes=0, **options)
    if state is not None:
        _fit_timm(model, state, f"timm:{name}")
    return model


def _fit_timm(model: nn.Module, state: dict, where: str) -> None:
    """Loads any layout that timm knows, resized to the model; strictly, where timm itself passes over tensors."""
    layouts = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    with _hub(where):
        state = layouts(state, model) if layouts is not None else state
    classifiers = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{c}." for c in ((classifiers,) if isinstance(classifiers, str) else classifiers))
    own = model.state_dict()
    fit_weights(model, {k: v for k, v in state.items() if k in own or not k.startswith(heads)}, where)


def _hf(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    """options may have `auto`, the class that makes the model: AutoModel has no task head, others do."""
    import transformers
    from transformers import AutoConfig
    from transformers.utils import logging

    auto = options.pop("auto", "AutoModel")
    if not auto.startswith("AutoModel") or not hasattr(transformers, auto):
        raise UsageError(f"hf:{name}: auto={auto} is none of transformers' AutoModel classes")
    auto = getattr(transformers, auto)
    logging.disable_progress_bar()
    folder = Path(name)
    if folder.is_absolute() or name.startswith(".") or folder.exists():
        if not (folder / "config.json").is_file():
            raise UsageError(f"hf:{name}: a folder in the hub's layout is expected, it has no config.json")
        _refuse_pickle(folder, random_weights)
    with _hub(f"hf:{name}"):
        config, unknown = AutoConfig.from_pretrained(
            name, trust_remote_code=False, return_unused_kwargs=True, **options
        )
        if unknown:
            raise UsageError(f"hf:{name}: {type(config).__name__} has no option {', '.join(unknown)}")
        if random_weights:
            return auto.from_config(config, trust_remote_code=False)
        return auto.from_pretrained(name, config=config, trust_remote_code=False, use_safetensors=True, dtype="auto")


def _open_clip(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    import open_clip

    state = options.pop("state", None)
    if name.endswith(".json"):
        if state is None and not random_weights:
            raise UsageError(f"open_clip:{name} is an architecture: add @FILE of weights, or --random-weights")
        model = _open_clip_of(Path(name), options)
    else:
        model, _, tag = name.partition("/")
        if model not in open_clip.list_models():
            raise UsageError(f"open_clip has no model {model!r}; {nearest(model, open_clip.list_models())}")
        if not random_weights and not tag and state is None:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(model))
            raise UsageError(f"open_clip:{model} needs a checkpoint, as open_clip:{model}/TAG; there is: {tags}")
        fresh = random_weights or state is not None
        with _hub(f"open_clip:{name}"):
            model = open_clip.create_model(model, pretrained=None if fresh else tag, **options)
    if state is not None:
        model.adaptsuite_untrained = _fit_open_clip(model, state, f"open_clip:{name}")
    return model


def _open_clip_of(path: Path, options: dict[str, Any]) -> nn.Module:
    """The architecture of a JSON file in open_clip's layout; or in its hub's, which has the preprocessing beside it."""
    from dataclasses import asdict

    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP, set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"open_clip:{path}: not readable as JSON ({e})") from e
    config = {**(read.get("model_cfg", read) if isinstance(read, dict) else {}), **options}
    if missing := [k for k in ("embed_dim", "vision_cfg", "text_cfg") if k not in config]:
        raise UsageError(f"open_clip:{path}: {', '.join(missing)} is missing")
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP if custom else CLIP
    with _hub(f"open_clip:{path}"):
        model = kind(**config)
    size = {"size": getattr(model.visual, "image_size", PreprocessCfg.size)}
    set_model_preprocess_cfg(model, {**asdict(PreprocessCfg()), **read.get("preprocess_cfg", {}), **size})
    return model


def _fit_open_clip(model: nn.Module, state: dict, where: str) -> list[str]:
    """Loads any layout that open_clip knows, whole or the image tower alone; positions are resized."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    if "conv1.weight" in state:
        state = {f"visual.{k}": v for k, v in state.items()}
    elif not all(k.startswith("visual.") for k in state):
        state = convert_state_dict(model, state)
        if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        for k in ("logit_scale", "logit_bias"):  # scalars here, one value there
            if k in state and getattr(model, k, None) is not None:
                state[k] = state[k].reshape(getattr(model, k).shape)
        resize_text_pos_embed(state, model)
    resize_pos_embed(state, model)
    return fit_weights(model, state, where, part="visual.")


def _monai(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    import monai.networks.nets as nets

    known = [n for n in dir(nets) if isinstance(getattr(nets, n), type) and issubclass(getattr(nets, n), nn.Module)]
    if name not in known:
        raise UsageError(f"monai has no network {name!r}; {nearest(name, known)}")
    state = options.pop("state", None)
    if not random_weights and state is None:
        raise UsageError(f"monai:{name} is an architecture: add @FILE of weights, or --random-weights")
    if name == "ViT":  # its default ends the head in a Tanh, which no loss on logits expects
        options = {"post_activation": None, **options}
    if name == "MILModel":  # its default downloads
        options = {"pretrained": False, **options}
    try:
        model = getattr(nets, name)(**options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UsageError(f"monai:{name}: {reason}; options are given as monai:{name}?KEY=VALUE&...") from e
    if state is not None:
        swin = name == "SwinUNETR"
        state = swin_unetr_layout(state) if swin else state
        own = model.state_dict()  # files of older versions have a cross-attention in every block
        state = {k: v for k, v in state.items() if k in own or ".cross_attn." not in k}
        model.adaptsuite_untrained = fit_weights(model, state, f"monai:{name}", part="swinViT." if swin else "")
    return model


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
    return data, record_of(data)


def record_of(data: bytes) -> dict[str, Any]:
    """What the metadata of a safetensors file says in JSON."""
    length = int.from_bytes(data[:8], "little")
    said = json.loads(data[8 : 8 + length])["__metadata__"]
    return {key: json.loads(value) for key, value in said.items() if value.startswith("{")}


def _embedded(name: str, random_weights: bool, options: dict[str, Any]) -> nn.Module:
    from adaptsuite.method import DOMAINS

    domain = name.partition("-")[0]
    if domain not in DOMAINS:
        raise UsageError(f"embedded:{name}: no domain {domain!r} has an embedded backbone; {nearest(domain, DOMAINS)}")
    try:
        module = importlib.import_module(f"adaptsuite.{domain}.backbones")
    except ModuleNotFoundError as e:
        raise UsageError(f"embedded:{name}: domain {domain} has no embedded backbone") from e
    if options:
        raise UsageError(f"embedded:{name} has no options: {', '.join(options)}")
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
        raise ResourceError(
            f"backbone {self.name} cannot be had: {reason}. Give a local folder (hf:PATH, file:PATH), an "
            "embedded backbone, or --random-weights"
        ) from error
