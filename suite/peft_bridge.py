"""Adapters to and from peft's folders, exactly: the same output, trained norms and heads included.

LoRA goes both ways, peft's other tuners (adaptsuite.peft_methods) are written.

What one side would compute otherwise is refused with the reason, and nothing is passed over. A peft folder does not
say which weights it was trained on, so `from_peft` can compare shapes only.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.atomic import write_folder
from adaptsuite.bank import BANK, is_base, tensor_key
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.host import Handle, place, weight_site
from adaptsuite.identity import find_sources
from adaptsuite.lora import Lora
from adaptsuite.peft_layers import exactly
from adaptsuite.probe import called_modules
from adaptsuite.reading import check_values, read_json, read_tensors
from adaptsuite.sites import Site, find_sites

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PATTERN_S = 10  # seconds
_MATCH = "import json, re, sys; p, ns = json.load(sys.stdin); print(json.dumps([n for n in ns if re.fullmatch(p, n)]))"
# what a LoRA config may say without changing the output of a loaded adapter
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
READ = {
    "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "r", "target_modules", "use_rslora",
}  # fmt: skip


def to_peft(handle: Handle, folder: str | Path) -> Path:
    """Writes lora or a `peft:` method so that `PeftModel.from_pretrained(base, folder)` gives the same output.

    Trained norms and heads become peft's modules_to_save. Returns the path. Raises UsageError with the reason for what
    peft has no form for: other methods, parts of fused weights, weights read without a call, convolutions, buffers, new
    head shapes.
    """
    from safetensors.torch import save_file

    folder, adapter, method = Path(folder), handle.adapter, handle.method
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} holds something that is no peft adapter: give another folder")
    hosted = method.name.startswith("peft:")
    if type(method) is not Lora and not hosted:  # nor a method that adds to lora
        raise UsageError(f"method {method.name!r} has no form in peft; only lora and peft's own tuners can be written")
    sites = {key: adapter.sites[key] for key in adapter.branches}
    saved = sorted({key.replace("/", ".").rpartition(".")[0] for key in adapter.tensors})
    for site in sites.values():
        if reason := _no_target(handle, site, saved):
            raise UsageError(f"{site.path} ({site.role}) cannot be written for peft: {reason}")
    for path in saved:
        if reason := _not_saved(handle, path):
            raise UsageError(f"{path} cannot be written for peft: {reason}")
    if adapter.moved._buffers:
        raise UsageError("the head's buffers (BatchNorm statistics) cannot be written for peft: it does not store them")
    tensors = {PREFIX + key.replace("/", "."): value for key, value in adapter.tensors.items()}
    config, own = adapter.shared.to_peft(method) if hosted else _lora_form(handle, sites)
    tensors |= own
    check_values(f"adapter {handle.name!r}", tensors)
    source = find_sources(handle.model).get("")  # names below a task model of ours are not the hub model's
    config |= {
        "task_type": None,
        "base_model_name_or_path": source.name[3:] if source and source.name.startswith("hf:") else None,
        "modules_to_save": saved or None,
        "inference_mode": True,
    }

    def write(temp: Path) -> None:
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        save_file(copies, temp / WEIGHTS, metadata={"format": "pt"})
        (temp / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return write_folder(folder, write)


def _lora_form(handle: Handle, sites: dict[str, Site]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a LoRA as peft names them."""
    method, tensors = handle.method, {}
    for key, site in sites.items():
        tensors[f"{PREFIX}{site.path}.lora_A.weight"] = handle.adapter.branches[key].down
        tensors[f"{PREFIX}{site.path}.lora_B.weight"] = handle.adapter.branches[key].up
    paths = [s.path for s in sites.values()]
    config = {
        "peft_type": "LORA",
        "r": method.rank,
        "lora_alpha": method.alpha,
        "use_rslora": method.rslora,
        "lora_dropout": method.dropout,
        "target_modules": paths if _by_suffix(paths, _names(handle.model)) == set(paths) else exactly(paths),
        "fan_in_fan_out": all(s.layout == "conv1d" for s in sites.values()),
        "bias": "none",
    }
    return config, tensors


def from_peft(model: nn.Module, folder: str | Path, name: str = "default", sample: Any = None) -> Handle:
    """Puts a LoRA adapter from a peft folder on `model`; the output is the one that peft gives.

    sample: as in `attach`. Raises AdapterError for features of peft that have no form here (DoRA, trained biases, rank
    patterns, ...), for damaged files and for an adapter that does not fit the model, which is then left as it was.
    """
    folder = Path(folder)
    path, payload = folder / CONFIG, folder / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{path} is missing: expected a peft folder with {CONFIG} and {WEIGHTS}")
    if not payload.exists() and (folder / "adapter_model.bin").exists():
        raise AdapterError(f"{folder / 'adapter_model.bin'} is a pickle, which is never opened: save it as {WEIGHTS}")
    config = read_json(path)
    method = _method(path, config)
    tensors = read_tensors(payload)
    check_values(payload, tensors)
    saved = _modules_to_save(path, config, model)
    targets = _targets(path, config, model) - {n for n in _names(model) for s in saved if _is_within(n, s)}
    _drop_base_layers(payload, tensors, model, targets)
    bank = getattr(model, BANK, None)
    called = (bank and bank.called) or called_modules(model, sample)
    sites = _sites(path, model, targets, called)
    held, head = _held(path, model, saved, called)
    expected = {f"{PREFIX}{s.path}.lora_A.weight": (f"branches.{s.key}.down", (method.rank, s.dim)) for s in sites}
    expected |= {f"{PREFIX}{s.path}.lora_B.weight": (f"branches.{s.key}.up", (s.dim_out, method.rank)) for s in sites}
    params = {tensor_key(n): tuple(p.shape) for n, p in model.named_parameters() if is_base(n)}
    expected |= {PREFIX + k.replace("/", "."): (f"tensors.{k}", params[k]) for k in held}
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        found = f"lacks {missing[0]}, expected" if missing else f"has {unexpected[0]}, not expected"
        raise AdapterError(f"{payload} {found} by {CONFIG} on this model; is it another model's adapter?")
    for key, (_, shape) in expected.items():
        if tuple(tensors[key].shape) != shape:
            raise AdapterError(f"{payload}: {key} is {tuple(tensors[key].shape)}, this model and r ask for {shape}")
    state = {own: tensors[key] for key, (own, _) in expected.items()}
    method = Lora(**(vars(method) | {"sites": tuple(dict.fromkeys(s.role for s in sites))}))
    return place(model, method, sites, held, head, name, sample, state)


# ---- what peft has no form for


def _no_target(handle: Handle, site: Site, saved: list[str]) -> str | None:
    if site.weight not in ("weight", None):
        return f"{site.weight} is packed into a module without a Linear of its own, which peft adapts"
    if site.rows is not None:
        return "peft adapts whole modules, this is a part of a fused weight; train with sites=attn.qkv for the whole"
    if site.layout == "conv":
        return "peft factors a convolution otherwise"
    if site in handle.shadow_sites:
        return "the host reads this weight without calling its module, where peft's adapter is never reached"
    if any(_is_within(site.path, path) for path in saved):
        return "peft cannot both adapt a module and store a trained copy of it"
    if site.weight is None:
        return None
    try:
        weight_site(handle.model, site.path)
    except LookupError as e:
        return str(e)
    return None


def _not_saved(handle: Handle, path: str) -> str | None:
    module, held = handle.model.get_submodule(path), handle.adapter.tensors
    params = {tensor_key(path, n): p for n, p in module.named_parameters()}
    if params.keys() - held.keys():
        return "peft stores whole modules, and some of its parameters are not trained"
    for key, p in params.items():
        if held[key].shape != p.shape:
            return f"its shape is {tuple(held[key].shape)}, the base's is {tuple(p.shape)}, and peft cannot change it"
    others = [n for n in _names(handle.model) if n.endswith(path) and n != path]
    if other := next((n for n in others if [*handle.model.get_submodule(n).parameters()]), None):
        return f"peft compares the ends of names and would take {other} too"
    if not handle.bank.is_called(path):
        return "the host reads its weights without calling it, where peft's copy is never reached"
    return None


# ---- what a config says


def _method(path: Path, config: dict[str, Any]) -> Lora:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA can be read")
    neutral = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", None)}  # others change the base
    for key, value in config.items():
        refused = value not in neutral[key] if key in neutral else bool(value) and key not in READ | WITHOUT_EFFECT
        if refused:
            raise AdapterError(f"{path}: {key} is {value!r}, which has no form here; only plain LoRA can be read")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(rank) is not int or any(type(v) not in (int, float) for v in (alpha, dropout)):
        raise AdapterError(f"{path}: r, lora_alpha and lora_dropout are {rank!r}, {alpha!r}, {dropout!r}: not numbers")
    method = Lora(rank=rank, alpha=float(alpha), rslora=config.get("use_rslora") is True, dropout=float(dropout))
    try:
        method.check()
    except UsageError as e:
        raise AdapterError(f"{path}: {e}") from e
    return method


def _targets(path: Path, config: dict[str, Any], model: nn.Module) -> set[str]:
    """The modules that peft would put a LoRA on (peft.tuners.tuners_utils.check_target_module_exists)."""
    names, wanted = _names(model), config.get("target_modules")
    found = _matching(path, "target_modules", wanted, names)
    if isinstance(wanted, list):
        layers = config.get("layers_to_transform")
        if layers is not None and layers != []:
            layers = layers if isinstance(layers, list) else [layers]
            patterns = config.get("layers_pattern") or ["[^.]*"]
            patterns = [patterns] if isinstance(patterns, str) else patterns
            found = {n for n in found if n in wanted or _layer(path, n, patterns) in layers}
    if config.get("exclude_modules"):
        found -= _matching(path, "exclude_modules", config["exclude_modules"], names)
    if not found:
        raise AdapterError(
            f"{path}: target_modules {wanted!r} name nothing in this model; is it another model's adapter?"
        )
    return found


def _layer(path: Path, name: str, patterns: list[str]) -> int | None:
    for pattern in patterns:
        if pattern == "[^.]*":
            match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        elif re.fullmatch(r"\w+", pattern):
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        else:
            raise AdapterError(f"{path}: layers_pattern {pattern!r} is not a plain name")
        if match:
            return int(match[1])
    return None


def _matching(path: Path, key: str, wanted: Any, names: list[str]) -> set[str]:
    if isinstance(wanted, list) and all(isinstance(w, str) for w in wanted):
        return _by_suffix(wanted, names)
    if not isinstance(wanted, str) or wanted == "all-linear":
        raise AdapterError(f"{path}: {key} is {wanted!r}, expected a list of module names or a pattern")
    # a pattern from a file may take for ever, and only a process of its own can be stopped
    command = [sys.executable, "-I", "-c", _MATCH]
    try:
        text = json.dumps([wanted, names])
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=PATTERN_S)
    except subprocess.TimeoutExpired as e:
        raise AdapterError(f"{path}: the pattern in {key} takes over {PATTERN_S} s; write a list of names") from e
    if done.returncode:
        raise AdapterError(f"{path}: the pattern in {key} is not one: {done.stderr.strip().splitlines()[-1]}")
    return set(json.loads(done.stdout))


def _modules_to_save(path: Path, config: dict[str, Any], model: nn.Module) -> list[str]:
    """Paths of the modules that peft stores as copies: their names end with one of the list."""
    wanted = config.get("modules_to_save") or []
    if not isinstance(wanted, list) or not all(isinstance(w, str) for w in wanted):
        raise AdapterError(f"{path}: modules_to_save is {wanted!r}, expected a list of module names")
    return [n for n in _names(model) if any(n.endswith(w) for w in wanted)]


def _by_suffix(wanted: Iterable[str], names: Iterable[str]) -> set[str]:
    return {n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)}


def _names(model: nn.Module) -> list[str]:
    return [n for n, _ in model.named_modules() if n and n.split(".")[0] != BANK]


def _is_within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


# ---- where it goes


def _drop_base_layers(payload: Path, tensors: dict[str, Tensor], model: nn.Module, targets: set[str]) -> None:
    """peft stores an adapted embedding or lm_head with its base weight, which must be this model's."""
    for target in targets:
        weight = tensors.pop(f"{PREFIX}{target}.base_layer.weight", None)
        own = model.get_submodule(target)._parameters.get("weight")
        if weight is not None and (own is None or not torch.equal(weight.to(own.dtype), own.detach().cpu())):
            raise AdapterError(f"{payload}: {target}.weight is not this model's; load the model it was trained on")


def _sites(path: Path, model: nn.Module, targets: set[str], called: set[str]) -> list[Site]:
    known: dict[str, Site] = {}
    for role in ("attn.qkv", "attn.q", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.out", "head"):
        try:
            known |= {s.path: s for s in find_sites(model, role) if s.rows is None and s.weight == "weight"}
        except LookupError:
            continue
    sites = []
    for target in (n for n in _names(model) if n in targets):
        try:
            site = weight_site(model, target)
        except LookupError as e:
            raise AdapterError(f"{path}: target_modules: {e}") from e
        if target not in called:
            raise AdapterError(f"{path}: {target} is never called by this model: peft trained nothing there")
        sites.append(known.get(target, site))
    return sites


def _held(path: Path, model: nn.Module, saved: list[str], called: set[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Held tensors of these modules, and the paths of those that are no norms."""
    try:
        norms = {s.path for s in find_sites(model, "norm")}
    except LookupError:
        norms = set()
    held: dict[str, str] = {}
    for name in saved:
        module = model.get_submodule(name)
        if [*module.buffers()]:
            raise AdapterError(f"{path}: modules_to_save: {name} has buffers, which peft does not store")
        if [*module.parameters()] and name not in called:
            raise AdapterError(f"{path}: modules_to_save: {name} is never called: peft trained nothing there")
        held |= {tensor_key(name, n): "norm" if name in norms else "head" for n, _ in module.named_parameters()}
    return held, tuple(n for n in saved if n not in norms and [*model.get_submodule(n).parameters()])
