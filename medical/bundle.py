"""The MONAI Bundle: what its files say, and whether MONAI will read them as they are meant.

https://docs.monai.io/en/stable/mb_specification.html. `python -m monai.bundle run --config_file configs/inference.json`
in the bundle's folder labels what lies below `dataset_dir`. Nothing in a bundle needs this package.
"""

import importlib.metadata
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptsuite.atomic import write_folder
from adaptsuite.errors import UsageError
from adaptsuite.export import agree
from adaptsuite.identity import fingerprint
from adaptsuite.medical import bundle_network
from adaptsuite.medical.stock import Network

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
CONFIG, METADATA, README, LICENCE = "configs/inference.json", "configs/metadata.json", "docs/README.md", "LICENSE"
MODEL, BASE, ADAPTER, SCRIPT = "models/model.pt", "models/base.pt", "models/adapter.safetensors", "scripts/network.py"
REQUIRED = {  # of MONAI's schema of 2024-07-25
    "schema": str,
    "version": str,
    "monai_version": str,
    "pytorch_version": str,
    "numpy_version": str,
    "required_packages_version": dict,
    "task": str,
    "description": str,
    "authors": str,
    "copyright": str,
    "network_data_format": dict,
}
TENSOR = {"type": str, "format": str, "num_channels": int, "spatial_shape": list, "dtype": str, "value_range": list}
RUN = "python -m monai.bundle run --config_file configs/inference.json"
HOW = f"""## Run

    {RUN} --dataset_dir FOLDER --output_dir FOLDER

in this folder; `configs/metadata.json` names the packages that it needs, adaptsuite is none of them."""
# how MONAI marks expressions, references and macros: text that starts so would be run, and relative ones are rewritten
MARKED = re.compile(r"[$@%]|.*[@%](#|::)", re.S)
TERMS = """SPDX-License-Identifier: Apache-2.0

configs/ and scripts/ were written by adaptsuite and are under the Apache License 2.0,
https://www.apache.org/licenses/LICENSE-2.0.

models/ derives from {backbone} and from the data that it was adapted to: their terms hold for it. State them here
before you pass this bundle on.
"""


# ---- metadata


def metadata(
    task: str,
    description: str,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    processed: Mapping[str, Any],
    packages: Sequence[str],
    **facts: Any,
) -> dict[str, Any]:
    """metadata.json; inputs, outputs, processed: specifications of `image`, of `pred` and of what is made of it.

    packages: what is needed beside MONAI.  Raises UsageError for what MONAI would misread.
    """
    version = importlib.metadata.version
    needed = sorted({*packages, "pytorch-ignite", "fire"})
    found = {
        "schema": SCHEMA,
        "version": "1.0.0",
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {name: version(name) for name in needed},
        "task": task,
        "description": description,
        "authors": "not stated",
        "copyright": "not stated",
        **facts,
        "network_data_format": {
            "inputs": {"image": dict(inputs)},
            "outputs": {"pred": dict(outputs)},
            "post_processed_outputs": {"pred": dict(processed)},
        },
    }
    if problems := metadata_problems(found):
        raise UsageError(f"metadata.json: {problems[0]}")
    return found


def tensor(kind: str, format: str, channels: Mapping[str, str], shape: Sequence[int], **more: Any) -> dict[str, Any]:
    """The specification of a tensor; channels: index -> name."""
    own = {"type": kind, "format": format, "num_channels": len(channels), "spatial_shape": list(shape)}
    own |= {"dtype": "float32", "value_range": [], "is_patch_data": False}
    return {**own, "channel_def": dict(channels), **more}


def channels(names: Sequence[str]) -> dict[str, str]:
    return {str(i): name for i, name in enumerate(names)}


def metadata_problems(found: Mapping[str, Any]) -> list[str]:
    """What MONAI's schema, or its ConfigParser, would object to. `monai.bundle verify_metadata` needs a network."""
    said = _mistyped("", found, REQUIRED)
    layout = found.get("network_data_format")
    for side in ("inputs", "outputs"):
        tensors = layout.get(side) if isinstance(layout, Mapping) else None
        if not isinstance(tensors, Mapping) or not tensors:
            said.append(f"network_data_format.{side} is missing or empty")
            continue
        for name, tensor in tensors.items():
            where = f"network_data_format.{side}.{name}"
            if not isinstance(tensor, Mapping):
                said.append(f"{where} is a {type(tensor).__name__}, a mapping is expected")
                continue
            said += _mistyped(f"{where}.", tensor, TENSOR)
            if any(not isinstance(v, int | float) for v in tensor.get("value_range", ())):
                said.append(f"{where}.value_range holds what is no number")
            named = tensor.get("channel_def")
            if named is not None and len(named) != tensor.get("num_channels"):
                said.append(f"{where}.channel_def names {len(named)} of {tensor.get('num_channels')} channels")
    return said + [f"{text!r} would be read as an expression by MONAI: rename it" for text in marked(found)]


def marked(tree: Any) -> Iterator[str]:
    """Texts that MONAI's ConfigParser would run or rewrite, keys among them."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from marked(key)
            yield from marked(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from marked(value)
    elif isinstance(tree, str) and MARKED.match(tree):
        yield tree


def _mistyped(where: str, found: Mapping[str, Any], wanted: Mapping[str, type]) -> list[str]:
    said = []
    for key, kind in wanted.items():
        value = found.get(key)
        if key not in found:
            said.append(f"{where}{key} is missing")
        elif not isinstance(value, kind) or isinstance(value, bool):
            said.append(f"{where}{key} is a {type(value).__name__}, a {kind.__name__} is expected")
    return said


# ---- inference.json


def inference(network: Mapping[str, Any], own: Mapping[str, Any], checkpoint: bool = True) -> dict[str, Any]:
    """inference.json of `network_def` and what it refers to; own: what differs between tasks, by its id.

    checkpoint: models/model.pt is loaded into the network when the evaluator starts.
    """
    load = {"_target_": "CheckpointLoader", "load_path": f"$@bundle_root + '/{MODEL}'", "map_location": "@device"}
    handlers = [{**load, "load_dict": {"model": "@network"}}] if checkpoint else []
    modules = ("PIL import Image", "PIL import ImageOps", "torch.export.passes import move_to_device_pass")
    return {
        "imports": ["$import json", "$import pathlib", *(f"$from {module}" for module in modules)],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "files": "$sorted(str(p) for p in pathlib.Path(@dataset_dir).rglob('*') if p.name.lower().endswith(@suffixes))",
        **network,
        "network": "$@network_def.to(@device)",
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': file} for file in @files]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        **own,
        "handlers": handlers + list(own.get("handlers", ())),
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "initialize": [
            "$@network_def",  # before anything is written: another base is refused by it
            "$pathlib.Path(@output_dir).mkdir(parents=True, exist_ok=True)",
            *own.get("initialize", ()),
        ],
        "run": ["$@evaluator.run()"],
    }


# ---- files


@dataclass(frozen=True, eq=False)
class Bundle:
    """What becomes a folder."""

    network: Network
    base: Mapping[str, Tensor]  # the backbone's own tensors, before the adapter
    own: Mapping[str, Any]  # of inference.json
    metadata: Mapping[str, Any]
    readme: str
    backbone: str  # its name
    image: Tensor  # an input of the network
    expected: Tensor  # what the adapter says of it


def write(out: str | Path, bundle: Bundle, apart: bool = False) -> float:
    """Writes the folder, and returns the largest difference from what was expected of what MONAI reads in it.

    apart: the weights of the base and what the adapter changes in them are two files, which scripts/network.py joins.
    Raises Inexact where the difference is too large, and leaves nothing then.
    """
    network, config, gaps = bundle.network, dict(bundle.network.config), []
    if apart:
        config = {"base": f"$@bundle_root + '/{BASE}'", "adapter": f"$@bundle_root + '/{ADAPTER}'", **config}
        config["stock"] = config.pop("network_def")
        names = {name: f"@{name}" for name in ("base", "adapter")}
        own = {"_target_": "scripts.network.adapted", "network": "@stock", **names, "prefix": network.prefix}
        config["network_def"] = own
    texts = {
        CONFIG: _json(inference(config, bundle.own, checkpoint=not apart)),
        METADATA: _json(bundle.metadata),
        README: bundle.readme,
        LICENCE: TERMS.format(backbone=bundle.backbone),
        **({"scripts/__init__.py": "", SCRIPT: inspect.getsource(bundle_network)} if apart else {}),
    }

    def fill(folder: Path) -> None:
        for name in (*texts, *network.files, MODEL):
            (folder / name).parent.mkdir(exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name, content in network.files.items():
            (folder / name).write_bytes(content)
        if apart:
            _write_apart(folder, bundle)
        else:
            torch.save(_plain(network.state), folder / MODEL)
        gaps.append(agree(str(out), _said(folder, bundle.image), bundle.expected))

    write_folder(out, fill)
    return gaps[0]


def _write_apart(folder: Path, bundle: Bundle) -> None:
    from safetensors.torch import save_file

    before = {f"{bundle.network.prefix}{k}": v for k, v in bundle.base.items()}
    change = bundle_network.changes(before, bundle.network.state)
    torch.save(_plain(bundle.base), folder / BASE)
    save_file(_plain(change), folder / ADAPTER, {"format": "pt", "base": fingerprint(bundle.base)})


def _said(folder: Path, image: Tensor) -> Tensor:
    """What the written files say, read by MONAI."""
    found = parser(folder, device="cpu")
    if (folder / ADAPTER).exists():  # without a module called `scripts` in this process
        base, adapter, network = (found.get_parsed_content(name) for name in ("base", "adapter", "stock"))
        network = bundle_network.adapted(network, base, adapter, found["network_def"]["prefix"])
    else:
        network = found.get_parsed_content("network_def")
        network.load_state_dict(torch.load(folder / MODEL, weights_only=True))
    with torch.no_grad():
        return network.eval()(image)


def parser(folder: Path, **changes: Any) -> Any:
    """MONAI's ConfigParser over a bundle's files, as `monai.bundle run` makes it; changes: other values of ids."""
    from monai.bundle import ConfigParser

    found = ConfigParser()
    found.read_config(folder / CONFIG)
    found.read_meta(folder / METADATA)
    found.update({"bundle_root": str(folder), **changes})
    return found


def needs_monai() -> None:
    """Raises UsageError where MONAI's bundle commands cannot run."""
    try:
        import fire  # noqa: F401
        import ignite  # noqa: F401
    except ImportError as e:
        raise UsageError(f"--format monai-bundle needs an extra ({e.name}): pip install 'adaptsuite[bundle]'") from None


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that `torch.load(weights_only=True)` takes, each with a memory of its own."""
    return {k: v.detach().cpu().clone().contiguous() for k, v in state.items()}


def _json(tree: Any) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
