"""What the scripts share that pretrain the embedded backbones: arguments, kept pairs, steps, weights and their log."""

import argparse
import copy
import importlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def main(run: Callable[[Any, Path], Any], settings: type, doc: str, argv: Sequence[str] | None = None) -> None:
    """Calls run(settings, out) with an option for each field of the settings, and --out."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for name, value in asdict(settings()).items():
        kind = (lambda text: text.lower() in ("1", "true", "yes")) if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value)
    arguments = vars(parser.parse_args(argv))
    out = arguments.pop("out")
    run(settings(**arguments), out)


class Ring:
    """The newest rows of named tensors."""

    def __init__(self, capacity: int):
        self.capacity, self.rows, self.next = capacity, {}, 0
        self.filled = 0

    def add(self, rows: Mapping[str, Tensor]) -> None:
        for name, value in rows.items():
            if name not in self.rows:
                self.rows[name] = torch.zeros(self.capacity, *value.shape[1:], dtype=value.dtype)
        at = (torch.arange(len(value)) + self.next) % self.capacity
        for name, value in rows.items():
            self.rows[name][at] = value
        self.next = int(at[-1] + 1) % self.capacity
        self.filled = min(self.filled + len(at), self.capacity)

    def neighbours(self, count: int, rng: np.random.Generator) -> Tensor:
        """(count,) drawn rows, two that were added one after the other always together."""
        first = torch.from_numpy(rng.choice(self.filled // 2, count // 2, replace=False)) * 2
        return torch.stack([first, first + 1], 1).flatten()


class Training:
    """AdamW by the clock: linear warm-up, a linear fall at the end, an average of the weights, a log row a minute.

    s: settings with minutes, lr, weight_decay and ema.  decayed: which parameters weight decay pulls at.  fall: the
    last share of the time, over which the rate goes to zero.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Iterable[nn.Parameter],
        s: Any,
        decayed: Callable[[Tensor], bool] = lambda p: p.ndim > 1 and p.shape[0] > 1,
        warmup: int = 100,
        fall: float = 0.4,
        clip: float = 3.0,
        clock: Callable[[], float] = time.process_time,
    ):
        self.model, self.parameters, self.s, self.clock = model, list(parameters), s, clock
        self.warmup, self.fall, self.clip = warmup, fall, clip
        groups = [
            {"params": [p for p in self.parameters if decayed(p)], "weight_decay": s.weight_decay},
            {"params": [p for p in self.parameters if not decayed(p)], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.98))
        self.average = copy.deepcopy(model).eval()
        self.history: list[dict[str, Any]] = []
        self.step, self._sums = 0, {}
        self._start = self._saved = clock()

    @property
    def share(self) -> float:
        """Of the time that is gone."""
        return (self.clock() - self._start) / (60 * self.s.minutes)

    def update(self, terms: Mapping[str, Tensor], weights: Mapping[str, float], share: float) -> None:
        """One step down the weighted sum of losses; share: of the time, as it was when they were computed."""
        loss = sum(weights[name] * value for name, value in terms.items())
        rate = self.s.lr * min((self.step + 1) / self.warmup, 1) * min((1 - share) / self.fall, 1)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimiser.step()
        self.step += 1
        keep_average(self.average, self.model, min(self.s.ema, (1 + self.step) / (10 + self.step)))
        for name, value in terms.items():
            self._sums.setdefault(name, []).append(value.item())

    @property
    def due(self) -> bool:
        """Whether a row of the log is."""
        return self.clock() - self._saved > 60 or self.step == 1

    def log(self, facts: Mapping[str, Any], more: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Prints and keeps a row: minute, step, the facts, the means of the losses since the last row, and `more`."""
        self._saved = self.clock()
        row = {"minute": round((self._saved - self._start) / 60, 2), "step": self.step, **facts}
        row |= {name: round(float(np.mean(values)), 4) for name, values in self._sums.items()}
        self.history.append(row | dict(more()))
        print(json.dumps(self.history[-1]), flush=True)
        self._sums = {}


@torch.no_grad()
def keep_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Moves the averaged weights, and the statistics of BatchNorms, towards the model's."""
    new = model.state_dict()
    for name, value in average.state_dict().items():
        value.lerp_(new[name], 1 - keep) if value.is_floating_point() else value.copy_(new[name])


def save(
    out: Path,
    name: str,
    model: nn.Module,
    record: Mapping[str, Any],
    s: Any,
    history: Sequence[Mapping[str, Any]],
    libraries: Sequence[str],
    log: str = "log.json",
    **facts: Any,
) -> dict:
    """NAME.safetensors in half precision, the record and the licence in its metadata, and its log; returns the log.

    Of settings with a `start`, the log beside those weights is kept as `earlier`.
    """
    from safetensors.torch import save_file

    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in record.items()} | {"licence": "Apache-2.0"}
    part = out / f"{name}.safetensors.part"
    save_file(state, part, metadata)
    part.chmod(0o644)
    part.replace(out / f"{name}.safetensors")
    versions = {library: importlib.import_module(library).__version__ for library in ("torch", *libraries)}
    settings, start = asdict(s), getattr(s, "start", "")
    if start:
        settings["start"] = Path(start).name
    said = {"settings": settings, **facts, "versions": versions | {"python": platform.python_version()}}
    said["history"] = list(history)
    if start and (earlier := Path(start).parent / log).is_file():
        said["earlier"] = json.loads(earlier.read_text(encoding="utf-8"))
    (out / log).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    return said
