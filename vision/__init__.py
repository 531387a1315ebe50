"""Vision domain of adaptsuite: `load("adapter folder")` gives a classifier; all commands are under `adapt vision`."""

import importlib

# public name -> module; resolved on first use, so that `adapt --help` imports no torch
_PUBLIC = {"load": "classifier", "Classifier": "classifier"}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"adaptsuite.vision.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'adaptsuite.vision' has no attribute {name!r}")
