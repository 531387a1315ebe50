"""Adapter folders: `adapter.safetensors` holds all that was trained, `adapter.json` what it is and where it belongs.

An adapter is bound to its base by a fingerprint of the base's tensors. Whatever does not fit, and whatever is damaged,
is an AdapterError in one line; a load that fails leaves the model as it was. Nothing else in the folder is read.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite import __version__
from adaptsuite.atomic import write_folder
from adaptsuite.bank import base_state, tensor_key
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.host import Handle, held_tensors, place, weight_site
from adaptsuite.identity import Source, base_fingerprint, describe_base, describe_tensors, fingerprint, json_hash
from adaptsuite.method import Method, method_class, resolve
from adaptsuite.reading import check_values, open_regular, read_json, read_tensors
from adaptsuite.sites import HEADS, Site, find_sites

__all__ = [
    "Record", "Source", "base_fingerprint", "fingerprint", "load_adapter", "read_adapter", "save_adapter",
    "save_record",
]  # fmt: skip

SCHEMA = 1
TENSORS, RECORD = "adapter.safetensors", "adapter.json"
OPTIONAL = ("labels", "preprocessing", "threshold", "temperature", "recipe_hash")
WRITTEN = (
    "schema", "method", "sites", "head", "held", "base", "tensors", "aliases", "buffers", "payload", "versions",
    "sha256",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A stored adapter: everything that can be known, and was checked, without its model."""

    folder: Path
    method: Method
    sites: list[Site]
    head: tuple[str, ...]  # paths of the modules that are stored as copies
    held: dict[str, str]  # key of a held base tensor -> adapter | norm | head | buffer
    base: dict[str, Any]  # name, fingerprint, resized, config, blocks, loaded
    tensors: dict[str, Tensor]  # as `Handle.state`, on the CPU
    versions: dict[str, str]
    labels: list[str] | None = None
    preprocessing: dict[str, Any] | None = None
    threshold: Any = None
    temperature: float | None = None
    recipe_hash: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # what else was given to `save_adapter`

    @property
    def settings(self) -> dict[str, Any]:
        return _settings(self.method)

    @property
    def kept(self) -> dict[str, Any]:
        """What validation rows decided, and all other facts that were given along (adaptsuite.domain.Domain.keep)."""
        return {"temperature": self.temperature, "threshold": self.threshold, **self.extra}


# ---- writing


def save_adapter(handle: Handle, folder: str | Path, **record: Any) -> Path:
    """Writes the adapter's folder atomically and returns its path.

    record: labels (in the order of the head's outputs), preprocessing, threshold, temperature, recipe_hash, and
    anything else that JSON can hold; it comes back from `read_adapter`.
    Raises UsageError for a record that JSON cannot hold, while an adapter is merged, and for a folder that holds
    something else; AdapterError for NaN, Inf or absurd values; ResourceError when the disk fails.
    """
    state = handle.state()
    params = {n for n, _ in handle.adapter.named_parameters(remove_duplicate=False)}
    params |= {f"base.{tensor_key(n)}" for n, _ in handle.model.named_parameters(remove_duplicate=False)}
    buffers = [n for n in state if n not in params]
    return _write(folder, _describe(handle, record), f"adapter {handle.name!r}", state, buffers)


def save_record(record: Record, folder: str | Path) -> Path:
    """Writes an adapter that was made without its model (adaptsuite.compose), checked as `save_adapter` does."""
    facts = {
        "schema": SCHEMA,
        "method": {"name": record.method.name, "settings": record.settings},
        "sites": [asdict(s) for s in record.sites],
        "head": list(record.head),
        "held": record.held,
        "base": record.base,
        "versions": _versions(),
        **{name: value for name in OPTIONAL if (value := getattr(record, name)) is not None},
        **record.extra,
    }
    buffers = [n for n in record.tensors if n.startswith("moved.")]
    return _write(folder, json.loads(json.dumps(facts, allow_nan=False)), "adapter", record.tensors, buffers)


def _write(
    folder: str | Path, facts: dict[str, Any], name: str, state: Mapping[str, Tensor], buffers: list[str]
) -> Path:
    """facts: all of adapter.json that needs no payload.  name: what errors call the adapter."""
    from safetensors.torch import save_file

    folder = Path(folder).resolve() if Path(folder).is_symlink() else Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise UsageError(f"{folder} holds something that is no adapter: give another folder")
    tensors, aliases = _unaliased(state)
    facts = facts | {"tensors": describe_tensors(tensors), "aliases": aliases, "buffers": buffers}
    check_values(name, tensors, buffers)
    if problem := _label_problem(facts, facts["held"], state):
        raise UsageError(f"{folder}: {problem}")

    def write(temp: Path) -> None:
        save_file(tensors, temp / TENSORS, metadata={"format": "pt"})
        with (temp / TENSORS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts["payload"] = {"bytes": (temp / TENSORS).stat().st_size, "sha256": digest}
        facts["sha256"] = json_hash(facts)
        (temp / RECORD).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    return write_folder(folder, write)


def _describe(handle: Handle, record: dict[str, Any]) -> dict[str, Any]:
    """The part of adapter.json that needs no payload, as JSON gives it back."""
    adapter, method = handle.adapter, handle.method
    taken = sorted(set(record) & set(WRITTEN))
    if taken:
        raise UsageError(f"record {taken[0]!r} is written by save_adapter itself: use another name")
    facts = {
        "schema": SCHEMA,
        "method": {"name": method.name, "settings": _settings(method)},
        "sites": [asdict(s) for s in handle.sites],
        "head": list(adapter.head),
        "held": adapter.kinds | dict.fromkeys(adapter.moved._buffers, "buffer"),
        "base": describe_base(handle.model, adapter.head),
        "versions": _versions(),
    }
    record = method.record(handle) | record
    for name, value in (facts | record).items():
        try:
            facts[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as e:
            raise UsageError(f"adapter record {name!r} cannot be written as JSON: {e}") from e
    if resolve(method.name, **_tuples(facts["method"]["settings"])) != method:
        raise UsageError(f"method {method.name!r}: its settings are not the same after JSON; use numbers and strings")
    return facts


def _unaliased(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies on the CPU, each tied or shared tensor once, and for its other names the name it is stored under."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple, str] = {}
    for name, t in state.items():
        place = (t.data_ptr(), t.device, t.dtype, t.shape, t.stride())
        if t.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        tensors[name] = t.detach().to("cpu", copy=True).contiguous()
    return tensors, aliases


def _versions() -> dict[str, str]:
    """Of what was in use; a package that nobody imported had no part in this adapter."""
    found = {"adaptsuite": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for module, package in (
        ("safetensors", "safetensors"), ("timm", "timm"), ("transformers", "transformers"),
        ("open_clip", "open-clip-torch"), ("monai", "monai"), ("torchaudio", "torchaudio"), ("peft", "peft"),
    ):  # fmt: skip
        if module in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[module] = importlib.metadata.version(package)
    return found


# ---- reading


def require_adapter(folder: str | Path) -> Path:
    """The folder, which holds an adapter's record; AdapterError says what it is instead, and where there are some."""
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise AdapterError(f"{folder} {found}, expected an adapter's folder with {RECORD} and {TENSORS}")
    if not (folder / RECORD).exists():
        below = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{RECORD}"))
        near = f", such as {below[0]}" if below else ""
        raise AdapterError(f"{folder} holds no {RECORD}: give an adapter's folder, or its run's{near}")
    return folder


def read_adapter(folder: str | Path) -> Record:
    """Reads an adapter's folder and checks all that needs no model; AdapterError says what is wrong, and where."""
    folder = require_adapter(folder)
    path, payload = folder / RECORD, folder / TENSORS
    facts = read_json(path)
    schema = facts.get("schema")
    if type(schema) is not int or schema < 1:
        raise AdapterError(f"{path}: schema is {schema!r}, expected {SCHEMA}: this is not the record of an adapter")
    if schema > SCHEMA:
        raise AdapterError(f"{path}: schema {schema} is newer than {SCHEMA}, the newest known here: update adaptsuite")
    method = _method(path, facts)
    sites = _stored_sites(path, facts)
    held = _typed(path, facts, "held", dict)
    base = _typed(path, facts, "base", dict)
    for name in ("name", "fingerprint"):
        _typed(path, base, name, str)
    head = _typed(path, facts, "head", list)
    versions = _typed(path, facts, "versions", dict)
    tensors = _payload(path, payload, facts)
    if problem := _label_problem(facts, held, tensors):
        raise AdapterError(f"{path}: {problem}; save the adapter again with the labels of its head")
    if facts.get("temperature") is not None and not _positive(facts["temperature"]):
        raise AdapterError(f"{path}: temperature is {facts['temperature']!r}, expected a number above 0; save it again")
    if facts.get("sha256") != json_hash({k: v for k, v in facts.items() if k != "sha256"}):
        raise AdapterError(f"{path} was changed after it was saved (its sha256 differs): copy or save it again")
    optional = {k: facts[k] for k in OPTIONAL if k in facts}
    extra = {k: v for k, v in facts.items() if k not in WRITTEN and k not in OPTIONAL}
    return Record(folder, method, sites, tuple(head), held, base, tensors, versions, **optional, extra=extra)


def _payload(path: Path, payload: Path, facts: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors, after size, hash, table and values have been found as recorded."""
    recorded = _typed(path, facts, "payload", dict)
    size, sha256 = _typed(path, recorded, "bytes", int), _typed(path, recorded, "sha256", str)
    table, aliases = _typed(path, facts, "tensors", dict), _typed(path, facts, "aliases", dict)
    with open_regular(payload) as file:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            what = "empty" if not found else "truncated" if found < size else "not the file that was saved"
            raise AdapterError(f"{payload} is {what}: {found:,} bytes, {RECORD} says {size:,}; copy it again")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise AdapterError(
            f"{payload} is damaged or was replaced: its sha256 is {digest[:12]}..., {RECORD} says {sha256[:12]}...; "
            "copy it again"
        )
    tensors = read_tensors(payload)
    missing, unexpected = sorted(table.keys() - tensors.keys()), sorted(tensors.keys() - table.keys())
    if missing or unexpected:
        found = f"lacks {_few(missing)} of" if missing else f"has {_few(unexpected)}, which is not in"
        raise AdapterError(f"{payload} {found} {RECORD}'s list of tensors; save it again")
    for name, row in describe_tensors(tensors).items():
        if row != table[name]:
            raise AdapterError(f"{payload}: {name} is {row}, {RECORD} says {table[name]}; save it again")
    lost = [name for name, target in aliases.items() if not isinstance(target, str) or target not in tensors]
    if lost:
        raise AdapterError(f"{payload} lacks {_few(lost)}, which {RECORD} lists; save it again")
    check_values(payload, tensors, _typed(path, facts, "buffers", list))
    return tensors | {name: tensors[target] for name, target in aliases.items()}


def _method(path: Path, facts: dict[str, Any]) -> Method:
    method = _typed(path, facts, "method", dict)
    name, settings = _typed(path, method, "name", str), _typed(path, method, "settings", dict)
    try:
        method_class(name)
    except UsageError as e:
        raise AdapterError(f"{path}: {e}; a method of your own needs its file imported first") from e
    try:
        return resolve(name, **_tuples(settings))
    except (UsageError, TypeError) as e:
        raise AdapterError(f"{path}: settings of method {name!r}: {e}; edited, or saved by another version") from e


def _stored_sites(path: Path, facts: dict[str, Any]) -> list[Site]:
    try:
        return [Site(**_tuples(s)) for s in _typed(path, facts, "sites", list)]
    except TypeError as e:
        raise AdapterError(f"{path}: 'sites' cannot be read ({e}): damaged; copy it again") from e


def _typed(path: Path, facts: dict[str, Any], name: str, kind: type):
    value = facts.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "is missing" if name not in facts else f"is a {type(value).__name__}"
        raise AdapterError(f"{path}: {name!r} {found}, expected a {kind.__name__}: damaged; copy or save it again")
    return value


# ---- loading


def load_adapter(
    model: nn.Module,
    folder: str | Path | Record,
    name: str = "default",
    sample: Any = None,
    strict_base: bool = True,
) -> Handle:
    """Puts a stored adapter on `model` and makes it the active one; in eval mode it acts bit for bit as when saved.

    folder: or what `read_adapter` gave.  sample: as in `attach`.  strict_base=False: do not compare the base's
    weights, for a base that is meant to differ; its widths and depth are compared in any case.
    The head may have another set of classes than the model's own, which keeps its shape.
    """
    record = folder if isinstance(folder, Record) else read_adapter(folder)
    base = describe_base(model, record.head)
    _same_depth(record, base)
    sites = _relocate(model, record)
    _same_shapes(model, record)
    if strict_base:
        _same_base(record, base)
    try:
        return place(model, record.method, sites, record.held, record.head, name, sample, record.tensors)
    except UsageError:
        raise
    except ValueError as e:
        raise AdapterError(f"{record.folder / TENSORS}: {e}; it was saved by another version of this method") from e


def _same_depth(record: Record, base: dict[str, Any]) -> None:
    ours, theirs = base["blocks"], record.base.get("blocks", {})
    for prefix in sorted(ours.keys() & theirs.keys()):
        if ours[prefix] != theirs[prefix]:
            raise AdapterError(
                f"{record.folder}: adapter was made for {theirs[prefix]} blocks, this backbone has {ours[prefix]}; "
                f"load it on {record.base['name']}"
            )


def _relocate(model: nn.Module, record: Record) -> list[Site]:
    """The sites of the model that the stored ones name."""
    load_it = f"load it on {record.base['name']}"
    sites: dict[str, Site] = {}
    try:
        for role in dict.fromkeys(s.role for s in record.sites if s.role != "weight"):
            sites |= {s.key: s for s in find_sites(model, role)}
        sites |= {s.key: weight_site(model, s.path) for s in record.sites if s.role == "weight"}
    except LookupError as e:
        raise AdapterError(f"{record.folder}: {e}; {load_it}") from e
    for stored in record.sites:
        what, site = f"{record.folder}: adapter was made", sites.get(stored.key)
        if site is None:
            raise AdapterError(f"{what} for {stored.path} ({stored.role}), which is not in this backbone; {load_it}")
        for letter, found, expected in (("D", site.dim, stored.dim), ("D_out", site.dim_out, stored.dim_out)):
            if found != expected:
                sizes = f"{letter}={expected} at {stored.path}, this backbone has {letter}={found}"
                raise AdapterError(f"{what} for {sizes}; {load_it}")
        if (site.weight, site.rows, site.layout) != (stored.weight, stored.rows, stored.layout):
            raise AdapterError(f"{what} where {stored.path} keeps its weight in another layout; {load_it}")
    return [sites[s.key] for s in record.sites]


def _same_shapes(model: nn.Module, record: Record) -> None:
    """Held tensors and, for `full`, all tensors of the base have their counterparts in the model."""
    where, load_it = record.folder, f"load it on {record.base['name']}"
    base = {tensor_key(k): v for k, v in base_state(model).items()}
    stored = {k: ("moved." if kind == "buffer" else "tensors.") + k for k, kind in record.held.items()}
    stored |= {n.removeprefix("base."): n for n in record.tensors if n.startswith("base.")}
    for key, name in stored.items():
        tensor, own, what = record.tensors.get(name), base.get(key), key.replace("/", ".")
        if tensor is None:
            raise AdapterError(f"{where / TENSORS} lacks {name}, which {RECORD} lists as held; save it again")
        if own is None:
            raise AdapterError(f"{where}: adapter holds {what}, which this backbone does not have; {load_it}")
        classes = record.held.get(key) in ("head", "buffer")  # their number may differ, nothing else
        if tensor.shape[1:] != own.shape[1:] if classes else tensor.shape != own.shape:
            shapes = f"{tuple(tensor.shape)} in the adapter, {tuple(own.shape)} in this backbone"
            raise AdapterError(f"{where}: {what} is {shapes}; {load_it}")
    heads = held_tensors(model, record.method, (), head=record.head)
    extra = sorted(k.replace("/", ".") for k in heads.keys() & base.keys() - record.held.keys())
    if extra:
        raise AdapterError(f"{where}: adapter does not hold {_few(extra)} of this backbone's head; {load_it}")


def _same_base(record: Record, base: dict[str, Any]) -> None:
    made, where = record.base, record.folder
    if base["fingerprint"] != made["fingerprint"]:
        raise AdapterError(
            f"{where}: adapter was trained on {made['name']} (weights {made['fingerprint'][:12]}), this backbone is "
            f"{base['name']} (weights {base['fingerprint'][:12]}); load the weights it was trained on, or pass "
            "strict_base=False if they are meant to differ"
        )
    then, now = made.get("loaded"), base.get("loaded")
    if then and now and then["layout"] == now["layout"] and then["values"] != now["values"]:
        raise AdapterError(
            f"{where}: the weights of {base['name']} were changed after they were loaded; load them anew, or pass "
            "strict_base=False if they are meant to differ"
        )
    if base["resized"] != made.get("resized", {}):
        warnings.warn(
            f"{where}: adapter was trained with resized tensors {made.get('resized', {})}, this backbone has "
            f"{base['resized']}: its outputs will differ",
            stacklevel=3,
        )


# ---- small things


def _settings(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(method)}


def _tuples(value):
    """What JSON made a list of was a tuple in a frozen dataclass."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _label_problem(facts: Mapping[str, Any], held: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str | None:
    """Why an adapter's labels cannot be those of the stored head, or None."""
    labels = facts.get("labels")
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return "labels must be a list of strings, in the order of the head's outputs"
    if len(set(labels)) < len(labels):
        return f"labels hold {next(x for x in labels if labels.count(x) > 1)!r} twice"
    inner = tuple(f"{path.replace('.', '/')}/" for path in facts.get("head", ()) if _between_towers(facts, path))
    names = [k for k, kind in held.items() if kind == "head" and not k.startswith(inner)]
    heads = [tensors[f"tensors.{k}"] for k in names if f"tensors.{k}" in tensors]
    # no labels: what is said has no classes, as words have none
    if labels and heads and len(labels) not in {t.shape[0] for t in heads if t.ndim}:
        return f"{len(labels)} labels for a head with {heads[-1].shape[0]} outputs"
    return None


def _between_towers(facts: Mapping[str, Any], path: str) -> bool:
    """Whether a module that trains whole is a part of a model of several, such as a projector: it says no labels."""
    sites = facts["method"]["settings"].get("sites") or ()
    name = path.rpartition(".")[2]
    return any(":" in site for site in sites) and (name not in HEADS or name == "lm_head")
