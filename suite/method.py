"""What a method is: a frozen dataclass of settings, registered by name, that builds one branch for one site."""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from adaptsuite.errors import UsageError, nearest
from adaptsuite.sites import Site

Placement = Literal["parallel", "sequential"]
DOMAINS = ("audio", "vision", "medical", "vl")

_registry: dict[str, type["Method"]] = {}
_imported: set[str] = set()


class Method:
    """Settings of one method and the promises it makes; subclasses are frozen dataclasses with a field `sites`.

    A branch is a module with `forward(x, y, context) -> new y` (x: the site's input, y: its output), or `delta()`, the
    change of the site's weight (dim_out, dim), or both. `row_gain()` multiplies the rows of weight and bias before
    that, `row_shift()` is added to the bias, both (dim_out,). Only a branch with one of these can live on a weight that
    the host reads without calling its module, and only such a branch can be merged. A branch that changes what the
    module gets has `enter(module, args, kwargs) -> (args, kwargs)` too, and `exit(module)`, called however the forward
    ends.
    `needs_grid = True` puts the (h, w) of image tokens into the branch's context as `grid`, and a `shrink`
    (adaptsuite.grid.Shrink) says that its block gives fewer tokens. Methods with such branches are tried once on a meta
    copy of the host by `attach`.
    """

    name: ClassVar[str]
    sites: tuple[str, ...] = ()
    blocks: tuple[int, ...] | None = None  # of each component, from 0; None: all. A field where a method offers it
    identity_at_start: bool = True  # the adapted host equals the backbone before training
    mergeable: bool | str = True  # True, or the reason why not
    # settings in which adapters may differ that share a batch and a stack, narrower ones being filled up with zeros
    varying: ClassVar[tuple[str, ...]] = ()
    norms: tuple[str, ...] = ("final",)  # norms trained too where a domain asks for it: final, beside
    needs_features: bool = False  # forwards need the features of another modality in their context
    needs_head: bool = False  # without a `head=` the host's own head is trained
    in_place: bool = False  # trains the base tensors themselves; cannot be combined
    reshapes: bool = False  # `begin` or `on_step` changes how many tensors train, or their shapes

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the sites it looks at: `sites`, and whatever else its settings ask for."""
        return self.sites

    def build(self, site: Site) -> nn.Module | None:
        """The branch of one site, or None where the method only trains base tensors."""
        return None

    def base(self, site: Site, module: nn.Module) -> tuple[str, ...]:
        """Names of the parameters of the site's module that are trained as copies held in the bank."""
        return ()

    def shared(self, sites: list[Site]) -> nn.Module | None:
        """Factors that several sites share; when there are any, `build(site, shared)` receives them."""
        return None

    def prepare(self, model: nn.Module, task, train, val, plan, say: Callable[[str], None] = print) -> "Method":
        """The method with what it leaves to the data decided (which blocks, say); itself where nothing is left.

        Called before `attach`, with what `adaptsuite.trainer.fit` takes; the model is as before when it returns.
        say: hears what is measured and chosen.
        """
        return self

    def without_data(self) -> "Method":
        """The method as `prepare` might leave it, for what looks at no data: as large, with any choice."""
        return self

    def fitted(self, model: nn.Module) -> "Method":
        """The method with what it leaves to the host decided, such as the width of its context; called by `attach`."""
        return self

    def bind(self, model: nn.Module, adapter: nn.Module) -> None:  # noqa: B027 (most methods need none)
        """Called once the adapter's branches are made, before saved values are put in: starts that the host tells.

        adapter: adaptsuite.bank.Adapter.  What a branch reads of the host itself is bound here too.
        """

    def regulariser(self, handle) -> Tensor | None:
        """A term that the trainer adds to the loss, or None."""
        return None

    def begin(self, optimizer, handle, loss: Callable[[int], Tensor]) -> None:
        """Called by `fit` before its first step where the method `reshapes`: what batches decide about the adapter.

        loss: that of batch 0, 1, ... of the training, the same on all processes. The tensors that train may become
        others; those that stay, and what the optimiser remembers of them, are the method's to put back.
        """

    def on_step(self, step: int, optimizer, handle) -> None:
        """Called after each optimiser step, gradients still there: rank allocation, growth, resampling.

        step: of the training, from 0; `handle.adapter.total_steps` of them come. What must survive an interruption is
        part of the handle's state. A branch whose tensors change has `take_shapes(state)`, as have shared factors: it
        makes room for its own part of a saved state.
        """

    def settled(self, handle) -> bool:
        """Whether the adapter is what its settings ask for: no earlier epoch of a training is kept."""
        return True

    def record(self, handle) -> dict[str, Any]:
        """What an adapter's record says beside settings and tensors, as JSON can hold it."""
        return {}

    def plain(self, record):
        """A stored adapter of this method (adaptsuite.artifact.Record) as one whose tensors can be added."""
        return record

    def sections(self, handle) -> list[dict[str, Any]]:
        """Sections of the report on one adapter (adaptsuite.report.Run.extra)."""
        return []

    def check(self) -> None:
        """Raises UsageError for settings that cannot be; called by `resolve` and by `attach`."""

    def expect(self, setting: str, fine: bool, what: str) -> None:
        """Raises UsageError that says what a setting must be, unless it is fine."""
        if not fine:
            raise UsageError(f"{self.name}: {setting} is {getattr(self, setting)!r}, it must be {what}")

    def expect_one_of(self, setting: str, choices: Sequence) -> None:
        self.expect(setting, getattr(self, setting) in choices, f"{', '.join(choices[:-1])} or {choices[-1]}")


def register(name: str):
    """Class decorator that makes a method reachable by `name`; a second class under the same name is an error."""

    def add(cls: type[Method]) -> type[Method]:
        if not (is_dataclass(cls) and cls.__dataclass_params__.frozen and issubclass(cls, Method)):
            raise TypeError(f"method {name!r}: {cls.__name__} must be a frozen dataclass derived from Method")
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"method {name!r} is registered by {known.__module__} already")
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def method_class(name: str) -> type[Method]:
    """The class registered under `name`, whose address tells the folder: `lora` (suite), `audio.soft_moa` (audio).

    `peft:NAME` is a tuner of peft (adaptsuite.peft_methods), `sparse:NAME` a method under a mask
    (adaptsuite.sparse_adapter).  Raises UsageError with the nearest names.
    """
    if name.startswith("peft:"):
        return importlib.import_module("adaptsuite.peft_methods").tuner(name)
    if name.startswith("sparse:"):
        return importlib.import_module("adaptsuite.sparse_adapter").masked(name)
    if name not in _registry:
        domain = name.partition(".")[0] if "." in name else ""
        if domain and domain not in DOMAINS:
            raise UsageError(f"method {name!r}: no domain {domain!r}; {nearest(domain, DOMAINS)}")
        _import_methods(f"adaptsuite.{domain}" if domain else "adaptsuite")
    if name not in _registry:
        raise UsageError(f"method {name!r} is unknown; {nearest(name, methods())}")
    return _registry[name]


def resolve(name: str, **settings: Any) -> Method:
    """The method with these settings. Raises UsageError for an unknown name, an unknown setting or a bad value."""
    cls = method_class(name)
    known = {f.name for f in fields(cls)}
    for key in settings:
        if key not in known:
            raise UsageError(f"method {name!r} has no setting {key!r}; {nearest(key, known)}")
    if isinstance(settings.get("sites"), str):
        settings["sites"] = (settings["sites"],)
    method = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
    method.check()
    return method


def methods(domains: Iterable[str] = DOMAINS) -> list[str]:
    """Names of all registered methods of suite/ and of the given domains."""
    for package in ("adaptsuite", *(f"adaptsuite.{d}" for d in domains)):
        _import_methods(package)
    return sorted(name for name in _registry if "." not in name or name.partition(".")[0] in domains)


def _import_methods(package: str) -> None:
    """Imports the files of a folder that register a method, once; other files may be slow or need extras."""
    if package in _imported:
        return
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        spec = importlib.util.find_spec(info.name) if not info.ispkg else None
        if spec and spec.origin and "\n@register(" in Path(spec.origin).read_text(encoding="utf-8"):
            importlib.import_module(info.name)
    _imported.add(package)
