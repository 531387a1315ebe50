"""Weights of local files: read without running anything that they contain, and fitted to an architecture by name."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptsuite.errors import DataError, UsageError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys that trainers keep a state dict under
PREFIXES = ("module.", "_orig_mod.")  # of data parallel and compiled models


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a file, out of its wrapper and without the prefixes of parallel and compiled models.

    Raises UsageError where there is no such file, DataError where it is damaged or holds objects beside tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise DataError(f"{path}: holds Python objects beside tensors, which are never run; save its state dict") from e
    except Exception as e:  # safetensors and torch raise many kinds
        raise DataError(f"{path}: not readable as weights ({' '.join(str(e).split())[:150]})") from e
    for key in WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise DataError(f"{path}: no tensors in it")
    for prefix in PREFIXES:
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], where: str, part: str = "") -> list[str]:
    """Loads a state dict strictly. Returns the children of the model that it has nothing for.

    part: prefix of the names that suffice where the file has no others, such as "visual." for an image tower.
    Raises UsageError with the first differences.
    """
    own = model.state_dict()
    wanted = {k for k in own if k.startswith(part) or not all(name.startswith(part) for name in state)}
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    wrong = [
        *(f"{k} is missing" for k in sorted(wanted - shapes.keys())),
        *(f"{k} is unknown" for k in sorted(shapes.keys() - own.keys())),
        *(
            f"{k} is {list(shapes[k])}, not {list(v.shape)}"
            for k, v in own.items()
            if k in shapes and shapes[k] != tuple(v.shape)
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(f"{where} does not fit this {type(model).__name__}: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(dict(state), strict=False)
    return list(dict.fromkeys(k.partition(".")[0] for k in own if k not in shapes))


def swin_unetr_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of MONAI's SwinUNETR for those of the files that MONAI publishes.

    Whole networks are as they are. Encoders alone: of self-supervised pretraining (Tang et al. 2022, arXiv:2111.14791;
    MONAI's `model_swinvit.pt`) and of disruptive autoencoders (arXiv:2307.16896), both without their pretext heads.
    """
    if any(k.startswith("swinViT.") for k in state):
        return dict(state)
    if any(k.startswith("encoder.layers1.") for k in state):
        from monai.networks.nets.swin_unetr import filter_swinunetr

        state = {k.removeprefix("swinViT."): v for k, v in filter(None, map(filter_swinunetr, state, state.values()))}
    own = {k: v for k, v in state.items() if k.startswith(("patch_embed.", "layers"))}
    return {f"swinViT.{k.replace('mlp.fc', 'mlp.linear')}": v for k, v in own.items()}
