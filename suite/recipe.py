"""Recipes: everything that defines a run, as a dataclass that is read from and written to TOML or JSON.

Keys are strict at every level: one that nobody reads would be a setting that silently does nothing. A section of
settings (`method_settings`, `front_end`, `augment`, `plan`, `head`, `evidence`) belongs to a dataclass of the method or
the domain; `sections` maps the section's name to it, and keys and types come from its fields. Importing this needs no
torch.
"""

import contextlib
import hashlib
import json
import math
import re
import tomllib
import types
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from adaptsuite.errors import UsageError, nearest
from adaptsuite.plan import Plan

Fields = Mapping[str, Any] | type  # name -> annotation, or the dataclass that has them


@dataclass(frozen=True)
class DataSettings:
    """Which table, and how it is parted; see `adaptsuite.manifest.split`."""

    manifest: str = ""  # CSV, or a folder
    # from vqa on, what is asked of pictures with texts: vqa where nothing is said
    task: Literal[
        "multiclass", "multilabel", "segmentation", "free", "vqa", "caption", "retrieval", "few_shot", "base_to_new"
    ] = "multiclass"
    classes: tuple[str, ...] = ()  # segmentation: of the values 1, 2, ... of masks; none: foreground
    test: str | None = None  # COLUMN=VALUE[,VALUE]
    val: Literal["none"] | str | None = None  # the same, or "none": go without
    cv: str | None = None  # COLUMN
    shots: int | None = None  # training rows a class; None: all
    skip_bad: bool = False  # decode every file first, and leave out rows whose file cannot be used


@dataclass(frozen=True)
class Recipe:
    """One run. Settings that a section does not name have the defaults of the section's dataclass."""

    domain: str
    backbone: str = ""
    random_weights: bool = False
    method: str = ""
    method_settings: dict = field(default_factory=dict)
    last_k: int | None = None  # sites of the last k blocks only; None: of all
    data: DataSettings = DataSettings()
    front_end: dict = field(default_factory=dict)
    augment: dict = field(default_factory=dict)
    plan: dict = field(default_factory=dict)
    rates: dict = field(default_factory=dict)  # method or "default" -> plan.lr where that is not set, as papers have it
    head: dict = field(default_factory=dict)
    evidence: dict = field(default_factory=dict)  # what a domain's report shall show
    components: dict = field(default_factory=dict)  # of a model of several: name -> adapt, full or freeze
    component_rates: dict = field(default_factory=dict)  # name -> factor of the learning rate
    lr_grid: tuple[float, ...] = ()  # values of plan.lr of which validation rows choose one (adaptsuite.rates)
    weight_decay_grid: tuple[float, ...] = ()  # the same of plan.weight_decay; with both, of every pair
    refit: bool = False  # then train on training and validation rows together, as long as the chosen fit did best
    seeds: tuple[int, ...] = (0,)
    notes: str = ""
    paper: str = ""
    cost: str = ""  # of a shipped one as it is: values that train, MACs of an item, what it needs


SECTIONS = (
    "method_settings", "data", "front_end", "augment", "plan", "head", "evidence", "components", "component_rates",
)  # fmt: skip


# reading ------------------------------------------------------------------------------------------------------------


def shipped_recipes(domain: str) -> list[str]:
    """Names of the recipes that come with a domain."""
    folder = files(f"adaptsuite.{domain}") / "recipes"
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_recipe(name: str | Path, domain: str, sections: Mapping[str, Fields] | None = None) -> Recipe:
    """Read a file (.toml or .json), or a recipe that comes with the domain by its name."""
    path = Path(name)
    if path.suffix not in (".toml", ".json") and len(path.parts) == 1:
        shipped = shipped_recipes(domain)
        if str(name) not in shipped:
            raise UsageError(
                f"no recipe {str(name)!r} in {domain}; {nearest(str(name), shipped)} (a file ends in .toml)"
            )
        path = files(f"adaptsuite.{domain}") / "recipes" / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.name.endswith(".json") else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"recipe {name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, not JSON, nested without end
        raise UsageError(f"recipe {name}: {error}") from None
    recipe = from_dict(values, sections, str(path.name))
    if recipe.domain != domain:
        raise UsageError(f"{path.name} is a recipe of {recipe.domain!r}, expected {domain!r}")
    return recipe


def from_dict(values: object, sections: Mapping[str, Fields] | None = None, where: str = "recipe") -> Recipe:
    """A recipe of plain values; UsageError for an unknown key or a value of another type, with the key's full name."""
    kinds = _fields(Recipe)
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}: a table of settings is expected, not {values!r}")
    _known(values, kinds, f"{where}: ")
    if "domain" not in values:
        raise UsageError(f"{where}: 'domain' is missing")
    read = {}
    for name, value in values.items():
        if name not in SECTIONS:
            read[name] = _fit(value, kinds[name], f"{where}: {name}")
        elif not isinstance(value, Mapping):
            raise UsageError(f"{where}: {name} is a table of settings, not {value!r}")
        else:
            read[name] = _section(name, value, sections, f"{where}: ")
    return Recipe(**{**read, "data": DataSettings(**read.get("data", {}))})


def _section(name: str, settings: Mapping, sections: Mapping[str, Fields] | None, where: str) -> dict:
    kinds = _section_fields(name, sections)
    if kinds is None:
        return {key: _frozen(value) for key, value in settings.items()}
    _known(settings, kinds, f"{where}{name}.")
    return {key: _fit(value, kinds[key], f"{where}{name}.{key}") for key, value in settings.items()}


def _section_fields(name: str, sections: Mapping[str, Fields] | None) -> dict[str, Any] | None:
    """Annotations of a section's keys; None where the section's dataclass is not known."""
    owner = {"plan": Plan, **(sections or {}), "data": DataSettings}.get(name)
    return None if owner is None else _fields(owner)


def _fields(owner: Fields) -> dict[str, Any]:
    if is_dataclass(owner):
        kinds = get_type_hints(owner)
        return {f.name: kinds[f.name] for f in fields(owner) if f.init}
    return dict(owner)


def _known(given: Collection[str], kinds: Collection[str], where: str) -> None:
    for name in given:
        if name not in kinds:
            raise UsageError(f"{where}{name} is not a setting; {nearest(name, kinds)}")


def build(owner: type, settings: Mapping[str, Any], where: str = "settings"):
    """The dataclass `owner` with these settings, keys and types checked; what it refuses itself is a UsageError too."""
    kinds = _fields(owner)
    _known(settings, kinds, f"{where}.")
    for f in fields(owner):
        if f.init and f.name not in settings and f.default is MISSING and f.default_factory is MISSING:
            raise UsageError(f"{where}.{f.name} is missing")
    read = {name: _fit(value, kinds[name], f"{where}.{name}") for name, value in settings.items()}
    try:
        return owner(**read)
    except ValueError as error:
        raise error if hasattr(error, "exit_code") else UsageError(f"{where}: {error}") from None


def resolved(recipe: Recipe, sections: Mapping[str, type]) -> Recipe:
    """The recipe with every setting of its sections written out, defaults included: what a run folder keeps."""
    whole = {}
    for name, owner in {"plan": Plan, **sections}.items():
        settings = build(owner, getattr(recipe, name), name)
        whole[name] = {f.name: getattr(settings, f.name) for f in fields(owner) if f.init}
    return replace(recipe, cost="", **whole)  # a run states its own


# settings from the command line -------------------------------------------------------------------------------------


def with_settings(
    recipe: Recipe,
    settings: Sequence[str],
    method_fields: Fields | None = None,
    sections: Mapping[str, Fields] | None = None,
) -> Recipe:
    """The recipe changed by `key=value` texts, in their order.

    A bare key is a setting of the method, `section.key` one of a section; `backbone`, `seeds` and the other fields of
    the recipe itself go by their name. A value is read as the field's annotation says: `false` is False for a bool,
    `a,b` two items for a tuple, `none` is None where that is allowed.
    """
    sections = {**(sections or {}), **({"method_settings": method_fields} if method_fields is not None else {})}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set {setting!r} is not of the form key=value")
        recipe = _with_setting(recipe, key, value.strip(), sections)
    return recipe


def _with_setting(recipe: Recipe, key: str, value: str, sections: Mapping[str, Fields]) -> Recipe:
    section, dot, name = key.rpartition(".")
    method = _section_fields("method_settings", sections)
    own = {name: kind for name, kind in _fields(Recipe).items() if name not in (*SECTIONS, "domain", "method")}
    if not dot and key in own and key not in (method or ()):
        return replace(recipe, **{key: _fit(value, own[key], f"--set {key}", text=True)})
    if not dot and key in ("domain", "method"):
        raise UsageError(f"--set {key}: choose it by the command (adapt DOMAIN ...) or by --method")
    if not dot and "kind" in (_section_fields(key, sections) or ()):
        section, dot, name = key, ".", "kind"  # `head=hf` chooses the kind of head
    section = section if dot else "method_settings"
    if section not in SECTIONS:
        meant = f"did you mean --set {name}=...?" if name in (method or ()) else nearest(section, SECTIONS)
        raise UsageError(f"--set {key}: there is no section {section!r}; {meant}")
    kinds = _section_fields(section, sections)
    if kinds is not None and name not in kinds:
        raise UsageError(f"--set {key}: {_suggest(name, kinds, section, sections)}")
    fitted = _fit(value, kinds[name] if kinds is not None else Any, f"--set {key}", text=True)
    if section == "data":
        return replace(recipe, data=replace(recipe.data, **{name: fitted}))
    return replace(recipe, **{section: {**getattr(recipe, section), name: fitted}})


def _suggest(name: str, kinds: Collection[str], section: str, sections: Mapping[str, Fields]) -> str:
    """Where a key that a section lacks may have been meant: the same key of another section, else a similar one."""
    elsewhere = [other for other in SECTIONS if name in (_section_fields(other, sections) or ())]
    if elsewhere:
        found = " or ".join(name if other == "method_settings" else f"{other}.{name}" for other in elsewhere)
        return f"not a setting of {section}; did you mean {found}?"
    return f"not a setting of {section}; {nearest(name, kinds)}"


# types --------------------------------------------------------------------------------------------------------------

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_LISTS = (tuple, list, Sequence)


def _fit(value: Any, kind: Any, where: str, text: bool = False) -> Any:
    """`value` as the annotation `kind` wants it, read from text if `text`; a UsageError names `where`."""
    try:
        return _convert(value, kind, text)
    except (ValueError, OverflowError):
        raise UsageError(f"{where}={value if text else repr(value)}: expected {_describe(kind)}") from None


def _convert(value: Any, kind: Any, text: bool) -> Any:
    base, args = get_origin(kind) or kind, get_args(kind)
    if base in (Union, types.UnionType):
        return _convert_union(value, args, text)
    if base in _LISTS:
        return _convert_list(value, base, args, text)
    if base is Any or base is object:
        return _guess(value) if text else _frozen(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if base is Literal:
        for choice in args:
            if str(choice) == value if text else (choice == value and type(choice) is type(value)):
                return choice
    elif base is types.NoneType and (value is None or value == "none"):
        return None
    elif base is bool and (value.lower() in _TRUE + _FALSE if text else isinstance(value, bool)):
        return value.lower() in _TRUE if text else value
    elif base is int and (text or (number and isinstance(value, int))):
        return int(value)
    elif base is float and (text or number) and math.isfinite(float(value)):
        return float(value)
    elif base is str and isinstance(value, str):
        return value
    elif base in (dict, Mapping) and isinstance(table := _guess(value) if text else value, Mapping):
        return _frozen(table)
    raise ValueError(f"{value!r} is not {_describe(kind)}")


def _convert_list(value: Any, base: Any, args: tuple, text: bool) -> tuple:
    if text:
        value = [item.strip() for item in value.split(",")] if value else []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{value!r} is not a list")
    fixed = base is tuple and args and args[-1] is not ...
    kinds = args if fixed else [args[0] if args else Any] * len(value)
    return tuple(_convert(item, kind, text) for item, kind in zip(value, kinds, strict=True))


def _convert_union(value: Any, kinds: Sequence[Any], text: bool) -> Any:
    """The first member that takes the value, from narrow to wide; of a text with a comma a list is tried first."""
    order = [Literal, types.NoneType, int, float, bool, str]  # so "none" is None, unless it is a choice itself

    def width(kind):
        base = get_origin(kind) or kind
        if base in _LISTS:
            return -1 if "," in str(value) or not text else len(order)
        return order.index(base) if base in order else len(order)

    for kind in sorted(kinds, key=width):
        with contextlib.suppress(ValueError, OverflowError):
            return _convert(value, kind, text)
    raise ValueError(f"{value!r} is none of {kinds}")


def _guess(text: str) -> Any:
    """What TOML makes of the text, else the text itself: for sections whose dataclass is not known."""
    with contextlib.suppress(tomllib.TOMLDecodeError):
        read = tomllib.loads(f"value = {text}")
        if len(read) == 1:
            return _frozen(read["value"])
    return text


def _frozen(value: Any) -> Any:
    """Lists as tuples at every depth, so that a recipe equals itself after writing and reading."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    return {key: _frozen(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _describe(kind: Any) -> str:
    base, args = get_origin(kind) or kind, get_args(kind)
    if base in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if base is Literal:
        return " or ".join(map(str, args))
    if base in _LISTS:
        items = [_describe(arg) for arg in args if arg is not ...]
        return (
            f"{len(items)} items ({', '.join(items)})"
            if len(items) > 1
            else f"a list of {items[0]}"
            if items
            else "a list"
        )
    plain = {
        int: "a whole number",
        float: "a finite number",
        bool: "true or false",
        str: "a text",
        types.NoneType: "none",
    }
    return plain.get(base, "a table" if base in (dict, Mapping) else str(kind))


# writing ------------------------------------------------------------------------------------------------------------


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe)


def to_json(recipe: Recipe) -> str:
    return json.dumps(to_dict(recipe), indent=2, ensure_ascii=False) + "\n"


def to_toml(recipe: Recipe) -> str:
    """TOML that `from_dict` reads back as the same recipe; None is `none`, since TOML has no word for it."""
    values = to_dict(recipe)
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if name not in SECTIONS]
    for section in SECTIONS:
        # `data` has its None by leaving out: `val = "none"` has a meaning of its own
        settings = {k: v for k, v in values[section].items() if v is not None or section != "data"}
        if settings:
            lines += ["", f"[{section}]", *(f"{_toml_key(name)} = {_toml(value)}" for name, value in settings.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    raise UsageError(f"{value!r} is a {type(value).__name__}, which a recipe cannot hold")


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def digest(recipe: Recipe) -> str:
    """sha256 over what the run computes: without notes, paper, cost, and the table's place (that has its own digest).

    Settings written out and settings left to their defaults differ here: take the digest of the `resolved` recipe.
    """
    values = to_dict(recipe)
    values = {name: value for name, value in values.items() if name not in ("notes", "paper", "cost")}
    values["data"] = {name: value for name, value in values["data"].items() if name != "manifest"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
