"""Audio domain of adaptsuite: `load("adapter folder")` gives a classifier; all commands are under `adapt audio`."""

import importlib

# public name -> module; resolved on first use, so that `adapt --help` imports no torch
_PUBLIC = {"load": "classifier", "Classifier": "classifier", "Stream": "stream", "Event": "events"}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"adaptsuite.audio.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'adaptsuite.audio' has no attribute {name!r}")
