"""Checkpoints of a training run: folders `checkpoint-STEP` of safetensors and JSON; the newest complete one counts."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaptsuite.atomic import is_complete, remove_folder, sweep, write_folder

KEPT = 2
TENSORS, RECORD = "state.safetensors", "state.json"


def save_checkpoint(out: Path, step: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> Path:
    """Writes out/checkpoint-STEP atomically, then removes all but the newest two complete ones."""
    from safetensors.torch import save_file

    def write(folder: Path) -> None:
        save_file(copied(tensors), folder / TENSORS)
        (folder / RECORD).write_text(json.dumps(record, indent=1))

    path = write_folder(out / f"checkpoint-{step}", write)
    for old in [p for p in _by_step(out) if is_complete(p)][:-KEPT]:
        remove_folder(old)
    return path


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None; what killed writers left is swept first."""
    if not out.is_dir():
        return None
    sweep(out)
    return next((p for p in reversed(_by_step(out)) if is_complete(p)), None)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and record, as they were given to `save_checkpoint`."""
    from safetensors.torch import load_file

    return load_file(path / TENSORS), json.loads((path / RECORD).read_text())


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The values of now, on the CPU; `.cpu()` alone would hand back the live tensors that training goes on changing."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State per parameter index as "INDEX/KEY" -> tensor, and the same for plain numbers."""
    tensors, scalars = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else scalars)[f"{index}/{key}"] = value
    return tensors, scalars


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Puts back what `flatten_optimizer` gave; the groups' settings stay those of `optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in (tensors | scalars).items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: t for name, t in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `prefix`, named without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _by_step(out: Path) -> list[Path]:
    numbered = [(p.name.removeprefix("checkpoint-"), p) for p in out.glob("checkpoint-*") if p.is_dir()]
    return [p for _, p in sorted((int(n), p) for n, p in numbered if n.isdigit())]
