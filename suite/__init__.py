"""adaptsuite: fit pretrained foundation models to one domain with adapters of a few megabytes."""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

# public name -> module; resolved on first use, so that importing the package stays quick
_PUBLIC = {
    "attach": "host",
    "Handle": "host",
    "get_handle": "host",
    "load_adapter": "artifact",
    "compose": "compose",
    "find_sites": "sites",
    "register": "method",
    "resolve": "method",
    "verify": "verify",
    "budget": "budget",
    "lean": "lean",
    "compile_host": "compiled",
    "fit": "trainer",
    "Plan": "trainer",
    "range_test": "range_test",
    "load_backbone": "backbones",
    "to_peft": "peft_bridge",
    "from_peft": "peft_bridge",
    "Server": "serve",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"adaptsuite.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'adaptsuite' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps a public function reachable when its file has the same name: an import of the file sets it here."""

    def __setattr__(self, name, value):
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in _PUBLIC else value)


sys.modules[__name__].__class__ = _Package
