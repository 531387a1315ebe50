"""Which backbone this is: a fingerprint of its tensors, or the source that its loader bound to it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.bank import BANK, base_state
from adaptsuite.errors import UsageError
from adaptsuite.sites import component_info


@dataclass(frozen=True)
class Source:
    """Where a backbone's weights come from; its loader leaves it on the module as `adaptsuite_source`."""

    name: str
    fingerprint: str  # over the tensors as the source stores them
    resized: dict[str, list[int]] = field(default_factory=dict)  # tensor -> shape after its resize
    config: dict[str, Any] = field(default_factory=dict)  # what its loader needs to build it again


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, shape, dtype and bytes of all tensors, sorted by name; copies one tensor at a time at most."""
    digest = hashlib.sha256()
    for name in sorted(n for n, t in tensors.items() if isinstance(t, Tensor)):
        t = tensors[name].detach()
        digest.update(f"{name}\0{list(t.shape)}\0{dtype_name(t)}\0".encode())
        digest.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def base_fingerprint(model: nn.Module, head: Sequence[str] = ()) -> str:
    """The identity of the backbone in `model`: its loader's, else computed without adapters and without `head`."""
    return describe_base(model, head)["fingerprint"]


def describe_base(model: nn.Module, head: Sequence[str]) -> dict[str, Any]:
    """What is recorded of the base. Raises UsageError while an adapter is merged into it."""
    bank = getattr(model, BANK, None)
    if bank is not None and bank.merged:
        raise UsageError(f"adapter {bank.merged!r} is merged into the base; unmerge it first")
    kept = [a.kept for a in bank.adapters.values() if a.kept is not None] if bank is not None else []
    state = {k: v for k, v in (kept[0] if kept else base_state(model)).items() if isinstance(v, Tensor)}
    state = {k: v for k, v in state.items() if not any(k.startswith(f"{path}.") for path in head)}
    blocks = {c.prefix: c.num_blocks for c in component_info(model)}
    sources = find_sources(model)
    if not sources:
        kind = f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"
        return {"name": kind, "fingerprint": fingerprint(state), "resized": {}, "config": {}, "blocks": blocks}
    own = {
        k: v
        for k, v in state.items()
        for path, source in sources.items()
        if k.startswith(path) and k.removeprefix(path) not in source.resized  # interpolation differs between versions
    }
    digests = "".join(f"{path}:{s.fingerprint}\n" for path, s in sources.items())
    single = next(iter(sources.values()))
    return {
        "name": " + ".join(s.name for s in sources.values()),
        "fingerprint": single.fingerprint if len(sources) == 1 else hashlib.sha256(digests.encode()).hexdigest(),
        "resized": {f"{path}{k}": list(v) for path, s in sources.items() for k, v in s.resized.items()},
        "config": single.config if len(sources) == 1 else {path: s.config for path, s in sources.items()},
        "blocks": blocks,
        # shows a backbone that was changed after it was loaded; comparable where dtypes and shapes are the same
        "loaded": {"layout": json_hash(describe_tensors(own)), "values": fingerprint(own)},
    }


def find_sources(model: nn.Module) -> dict[str, Source]:
    """Prefix of its tensors -> source, for every bound backbone in the model."""
    found: dict[str, Source] = {}
    for path, module in model.named_modules():
        source = module.__dict__.get("adaptsuite_source")
        if source is not None and not any(path.startswith(outer) for outer in found):
            found[f"{path}." if path else ""] = source
    return found


def describe_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Name -> {"shape", "dtype"}."""
    return {name: {"shape": list(t.shape), "dtype": dtype_name(t)} for name, t in tensors.items()}


def json_hash(facts: Any) -> str:
    """sha256 that does not depend on the order of keys or on white space."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
