"""Vision-language domain of adaptsuite: adapters through which an image acts in a text model (`vl.routed_lora`)."""

import importlib

# public name -> module; resolved on first use, so that `adapt --help` imports no torch
_PUBLIC = {
    "load": "classifier",
    "Answerer": "classifier",
    "load_pair": "named",
    "Captioner": "classifier",
    "PairedModel": "paired",
    "CaptionModel": "captioner",
    "VisualMapper": "paired",
    "load_towers": "two_tower",
    "RetrievalModel": "retrieval",
    "FewShotModel": "class_names",
    "Conditioned": "context",
    "with_context": "context",
    "adapt": "hosts",
    "parts": "hosts",
    "table": "hosts",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"adaptsuite.vl.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'adaptsuite.vl' has no attribute {name!r}")
