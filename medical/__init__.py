"""Medical domain of adaptsuite: `load("adapter folder")` gives a classifier; all commands are under `adapt medical`."""

import importlib

# public name -> module; resolved on first use, so that `adapt --help` imports no torch
_PUBLIC = {"load": "classifier", "Classifier": "classifier"}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"adaptsuite.medical.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'adaptsuite.medical' has no attribute {name!r}")
