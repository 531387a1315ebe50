"""Baselines that see the text alone or the image alone: what a question gives away, and what a picture does.

They are trained as the adapter is, from the same start. Without them an accuracy says nothing of whether words were
bound to the image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.artifact import load_adapter, read_adapter
from adaptsuite.errors import AdapterError
from adaptsuite.host import Handle
from adaptsuite.plan import Plan
from adaptsuite.trainer import fit

BLIND = ("text_only", "image_only")


def blank_of(features: Tensor) -> Tensor:
    """(1, N, D) mean of V (B, N, D): what every picture becomes for the baseline that sees text alone."""
    return features.float().mean(0, keepdim=True)


@dataclass(frozen=True)
class Twin:
    """A baseline, and the V that it has seen in place of every picture."""

    handle: Handle
    blank: Tensor  # (1, N, D)


def train_twins(
    start: Callable[[], Handle],
    model: nn.Module,
    task: Any,
    parts: Mapping[str, Any],
    plan: Plan,
    out: Path,
    labels: Sequence[str],
    say: Callable[[str], None] = lambda line: None,
    kinds: Sequence[str] = BLIND,
) -> dict[str, Twin]:
    """The baselines. start: a fresh adapter on a model of its own; parts: data of `train` and `val` (or None)."""
    blank, twins = parts["train"].blank(model), {}
    for kind in kinds:
        say(f"baseline  {kind}")
        handle = start()
        train, val = (None if part is None else part.blind(kind, blank) for part in (parts["train"], parts["val"]))
        fit(handle.model, task, train, val, plan, out / f"{kind}-fit", handle)
        twins[kind] = Twin(handle, blank)
        handle.save(out / kind, labels=list(labels), blank=blank.tolist())
    return twins


def load_twins(
    folder: Path,
    start: Callable[[Sequence[str]], nn.Module],
    sample: Callable[[nn.Module], Any],
    kinds: Sequence[str] = BLIND,
) -> dict[str, Twin]:
    """The baselines that `train_twins` left in a folder. start: the task model of these labels, without an adapter.

    Raises AdapterError where they are not there: a result is not to be shown without them.
    """
    twins = {}
    for kind in kinds:
        if not (folder / kind / "adapter.json").is_file():
            raise AdapterError(
                f"{folder / kind} is missing: an accuracy is shown beside its blind baselines only; evaluate the run's "
                "folder as `train` wrote it"
            )
        record = read_adapter(folder / kind)
        model = start(record.labels)
        handle = load_adapter(model, record, sample=sample(model))
        twins[kind] = Twin(handle, torch.tensor(record.extra["blank"], dtype=torch.float32))
    return twins
