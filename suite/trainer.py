"""One training loop: `fit(model, task, train, val, plan)`.

Every random draw is a function of (seed, epoch, step), the best epoch is kept as a copy, and a run killed anywhere goes
on from its newest complete checkpoint to the same weights, bit for bit (on a CPU).
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite import schedule
from adaptsuite.average import Average
from adaptsuite.batches import (
    Seeded,
    balanced_weights,
    chunks,
    data_mark,
    load,
    seed_all,
    short_hash,
    steps_of_epoch,
)
from adaptsuite.checkpoint import (
    copied,
    flatten_optimizer,
    load_checkpoint,
    newest_checkpoint,
    restore_optimizer,
    save_checkpoint,
    with_prefix,
    without_prefix,
)
from adaptsuite.compiled import compile_host, reason, uncompile
from adaptsuite.depth import layer_factor
from adaptsuite.devices import (
    Processes,
    autocast,
    check_precision,
    free_memory,
    is_out_of_memory,
    pick_device,
    to_device,
)
from adaptsuite.errors import DataError, Diverged, ResourceError, UsageError, nearest
from adaptsuite.interrupt import Signals
from adaptsuite.lean import lean
from adaptsuite.metrics import LOWER
from adaptsuite.plan import Plan
from adaptsuite.predict import predict_all
from adaptsuite.progress import Progress

__all__ = ["FitResult", "Plan", "Task", "fit", "pick_device", "predict_all", "rank"]

# settings that may change between a run and its continuation
FREE = ("device", "workers", "max_skips", "checkpoint_steps", "tensorboard", "lean", "memory_limit")
# attributes of a run that its checkpoints hold, beside tensors
POSITION = ("epoch", "step", "micro", "skips", "skipped", "epoch_skipped", "epoch_loss", "epoch_samples")
POSITION += ("history", "best_epoch", "seconds", "epoch_seconds")


class Task(Protocol):
    """What is learnt. An attribute `target` names the batch's key of the targets; without it, "label"."""

    monitor: str  # the metric of `score` that picks the best epoch; higher is better

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean over the samples of the batch; train mode; augmentations happen here."""

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """Scores (B, K); eval mode, no gradient."""

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Metrics of outputs (N, K) and targets (N, ...)."""


@dataclass
class FitResult:
    """What training did; the model itself holds the weights of `best_epoch` (plan.ema: their average), in eval mode."""

    best_epoch: int  # from 1
    best: dict[str, float | None]  # validation metrics of that epoch; empty without validation
    history: list[dict[str, Any]]  # per epoch: epoch, step, loss, lr (unscaled), skipped, seconds, val {metric: value}
    seconds: float  # all starts of a resumed run together
    steps: int
    stopped: str  # "epochs" or "patience"
    skipped: int = 0  # steps with a non-finite loss or gradient
    notes: list[str] = field(default_factory=list)  # warnings, for the report


def fit(
    model: nn.Module,
    task: Task,
    train,
    val,
    plan: Plan,
    out: str | Path | None = None,
    handle=None,
    on_epoch: Callable[[dict[str, Any]], Any] | None = None,
    until: int | None = None,
) -> FitResult:
    """Trains what `handle` (None: every parameter that requires a gradient) gives, and leaves the best epoch in place.

    train, val: map-style datasets of dicts of tensors, collated by `dataset.collate` or torch's default; val None: the
    last epoch is kept. plan.balanced needs `train.item_targets`, (N,) class numbers or (N, K) zeros and ones.
    out: folder of checkpoints and log.jsonl; a run found there goes on where it was, and one made with other settings
    or data is refused.  on_epoch(history row): after each epoch's checkpoint.  until: the last epoch that is trained;
    the schedule stays that of plan.epochs, so this is where a longer run stood then.
    SIGINT and SIGTERM write a checkpoint before they take effect.  Sets the global random states.
    Raises UsageError, DataError, ResourceError, and Diverged after plan.max_skips non-finite steps in a row.
    """
    handle = _Everything(model) if handle is None else handle
    with Signals() as signals, _compiled(model, plan):
        run = _Run(model, task, train, val, plan, None if out is None else Path(out), handle, signals, until)
        with run.progress:
            run.resume()
            run.begin()
            run.train_epochs(on_epoch)
            if not run.interrupted:
                return run.finish()
            run.progress.line("interrupted" if out is None else f"interrupted: the same command goes on from {out}")
    signals.take_effect()


@contextlib.contextmanager
def _compiled(model: nn.Module, plan: Plan) -> Iterator[None]:
    """The model as one compiled graph while it trains, where the plan says so."""
    if not plan.compile:
        yield
        return
    compile_host(model, plan.lean)
    try:
        yield
    except RuntimeError as error:
        if said := reason(error):
            raise said from error
        raise
    finally:
        uncompile(model)


class _Run:
    """One training run: position (epoch, step of the epoch), optimiser, best copy, history."""

    def __init__(self, model, task, train, val, plan: Plan, out: Path | None, handle, signals: Signals, until):
        if len(train) == 0:
            raise DataError("the training set is empty")
        if val is not None and len(val) == 0:
            raise DataError("the validation set is empty: give it rows, or val=None to keep the last epoch")
        self.model, self.task, self.train, self.val = model, task, train, val
        self.plan, self.out, self.handle, self.signals, self.until = plan, out, handle, signals, until
        self.monitor = plan.monitor or task.monitor
        self.method = getattr(handle, "method", None)
        self.regulariser = getattr(handle, "regulariser", lambda: None)
        self.processes = Processes(pick_device(plan.device))
        self.device = self.processes.device
        check_precision(self.device, plan.precision)
        model.to(self.device)
        self.optimizer = make_optimizer(handle, plan)
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=plan.precision == "fp16")
        self.average = None if plan.ema is None else Average(handle, plan.ema)
        self.micro = -(-plan.batch_size // self.processes.world)  # samples in memory at once; halved when it runs out
        self.epoch = self.step = self.skips = self.skipped = 0
        self.epoch_loss, self.epoch_samples, self.epoch_skipped = 0.0, 0, 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}
        self.best_epoch = 0
        self.seconds = self.epoch_seconds = 0.0  # of earlier starts
        self.started = self.epoch_started = time.perf_counter()
        self.interrupted = False
        self.weights = _weights(train) if plan.balanced else None
        self.steps = self._steps(0)
        self.total = plan.epochs * len(self.steps)
        self.warm = schedule.warmup_steps(plan, self.total)
        self.reshapes = getattr(self.method, "reshapes", False)
        if self.reshapes:
            handle.adapter.total_steps = self.total
            if plan.ema is not None:
                raise UsageError(f"ema averages tensors of one shape, {self.method.name} changes them: leave it out")
        self.factor = 1.0  # of the schedule, at the last step
        self.progress = Progress(out, plan, main=self.processes.main)

    # ---- the loop

    def begin(self) -> None:
        """What the method decides by batches, where a training starts anew."""
        if self.reshapes and self._position() == 0:
            self.model.train()
            self.method.begin(self.optimizer, self.handle, self._loss_at)
            self._take_up()

    def _loss_at(self, step: int) -> Tensor:
        """Of a batch of the first epoch, over and over; of the same samples on all processes."""
        piece = chunks(self.steps[step % len(self.steps)], self.micro)[0]
        batch = to_device(next(load(Seeded(self.train, self.plan.seed, 0), [piece])), self.device)
        seed_all(self.plan.seed, "begin", step)
        with autocast(self.device, self.plan.precision):
            return self.task.loss(self.model, batch)

    def train_epochs(self, on_epoch: Callable[[dict[str, Any]], Any] | None) -> None:
        while self.epoch < self._last() and not self._out_of_patience() and not self.interrupted:
            self.steps = self._steps(self.epoch)
            self._train_epoch()
            if self.interrupted:
                return
            row = self._end_epoch()
            self._save()
            if on_epoch is not None:
                on_epoch(row)
            self.interrupted = self.processes.anyone(self.signals.caught is not None)

    def _train_epoch(self) -> None:
        """Steps from `self.step` to the end of the epoch, or to an interruption."""
        self.model.train()
        self.epoch_started = time.perf_counter()
        batches = None
        with self.progress.steps(self.epoch, self._last(), len(self.steps), self.step) as advance:
            while self.step < len(self.steps):
                batches = batches or self._batches()
                try:
                    loss = self._gradients(batches)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    batches = None
                if batches is None:  # out here the traceback holds no tensor any more
                    self._halve()
                    continue
                stop = self._update(loss)
                self.step += 1
                advance()
                due = self.plan.checkpoint_steps and self._position() % self.plan.checkpoint_steps == 0
                if (stop or due) and self.step < len(self.steps):  # the end of the epoch writes one anyway
                    self._same_state()
                    self._save()
                    self.interrupted = stop
                    if stop:
                        return

    def _gradients(self, batches: Iterator[Any]) -> Tensor:
        """Accumulates the gradient of the step's mean loss over its micro-batches; returns the loss, on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        num = len(self.steps[self.step])
        for index, piece in enumerate(self._pieces(self.step)):
            batch = to_device(next(batches), self.device)
            seed_all(self.plan.seed, self.epoch, self.step, index, self.processes.rank)
            with autocast(self.device, self.plan.precision), self._saving():
                loss, extra = self.task.loss(self.model, batch), self.regulariser()
            loss = (loss if extra is None else loss + extra) * (len(piece) / num)
            if not loss.requires_grad:
                raise UsageError("the loss does not depend on any trained tensor: nothing would be learnt")
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _saving(self):
        """How activations are saved; a compiled graph has made its choice when it was compiled."""
        return lean() if self.plan.lean and not self.plan.compile else contextlib.nullcontext()

    def _update(self, loss: Tensor) -> bool:
        """One optimiser step, unless loss or gradient are not finite; returns whether a stop was asked for."""
        loss, stop = self.processes.sum_gradients(self.params, loss, self.signals.caught is not None)
        if self._position() == 0:
            self._check_reached()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if self.plan.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.plan.clip, norm)
        value, norm = torch.stack([loss.float(), norm.float()]).tolist()  # the step's one wait for the device
        self.factor = schedule.set_step(self.optimizer, self._position(), self.total, self.warm, self.plan)
        if math.isfinite(value) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            if self.method is not None:
                self.method.on_step(self._position(), self.optimizer, self.handle)
                self._take_up()
            if self.average is not None:
                self.average.update()
            self.skips = 0
            self.epoch_loss += value * len(self.steps[self.step])
            self.epoch_samples += len(self.steps[self.step])
        elif not (math.isfinite(value) and self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            self._skip("gradient" if math.isfinite(value) else "loss")  # fp16 finds its scale by overflowing
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return stop

    def _take_up(self) -> None:
        """Trains the tensors of now, in the handle's order; the optimiser keeps what it remembers of those it had."""
        if self.reshapes and {*map(id, self.params)} != {*map(id, self.handle.trained().values())}:
            state, self.optimizer = self.optimizer.state, make_optimizer(self.handle, self.plan)
            self.params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.optimizer.state.update({p: state[p] for p in self.params if p in state})

    def _settled(self) -> bool:
        return not self.reshapes or self.method.settled(self.handle)

    def _check_reached(self) -> None:
        """At the first step: every trained tensor should have received a gradient."""
        groups = self.handle.trainable()
        without = [n for g in groups for n, p in zip(g["names"], g["params"], strict=True) if p.grad is None]
        if len(without) == len(self.params):
            raise UsageError("no trained tensor received a gradient: nothing would be learnt")
        if without:
            first = ", ".join(without[:3])
            self.progress.warn(f"{len(without)} of {len(self.params)} trained tensors get no gradient: {first}")

    def _skip(self, what: str) -> None:
        self.skips, self.skipped, self.epoch_skipped = self.skips + 1, self.skipped + 1, self.epoch_skipped + 1
        where = f"epoch {self.epoch + 1}, step {self.step + 1}"
        self.progress.warn(f"non-finite {what} at {where}: step skipped")
        if self.skips <= self.plan.max_skips:
            return
        kept = f"the weights of epoch {self.best_epoch} are kept" if self.best else "the last finite weights are kept"
        self._put_in_place()
        raise Diverged(
            f"{self.skips} steps in a row had a non-finite {what} (the last: {where}); {kept}: "
            f"try lr below {self.plan.lr:g}, a longer warmup or precision fp32"
        )

    def _end_epoch(self) -> dict[str, Any]:
        """Validates, copies the weights when they are the best so far, and adds the row to the history."""
        self._same_state()
        scores: dict[str, float | None] = {}
        if self.val is None:
            self.best_epoch = self.epoch + 1
        else:
            with self.average.in_place() if self.average is not None else contextlib.nullcontext():
                scores = self._evaluate()
                value, best = rank(scores, self.monitor), rank(self._best_scores(), self.monitor)
                if value is not None and (best is None or value > best) and self._settled():
                    self.best, self.best_epoch = copied(self.handle.state()), self.epoch + 1
        row = {
            "epoch": self.epoch + 1,
            "step": self._position(),
            "loss": self.epoch_loss / self.epoch_samples if self.epoch_samples else None,
            "lr": self.optimizer.param_groups[0]["unscaled"] * self.factor,
            "skipped": self.epoch_skipped,
            "seconds": round(self._epoch_elapsed(), 3),
            "val": scores,
        }
        self.history.append(row)
        self.progress.epoch(row, self._last(), self.monitor)
        self.epoch, self.step = self.epoch + 1, 0
        self.epoch_loss, self.epoch_samples, self.epoch_skipped, self.epoch_seconds = 0.0, 0, 0, 0.0
        self.epoch_started = time.perf_counter()
        return row

    def _evaluate(self) -> dict[str, float | None]:
        """Validation scores; None where a score is not finite."""
        num, plan = len(self.val), self.plan
        share = predict_all(
            self.model,
            self.task,
            self.val,
            self.micro,
            self.device,
            indices=self.processes.share(num),
            workers=plan.workers,
            precision=plan.precision,
            seed=plan.seed,
        )
        if share[1] is None:
            raise UsageError(f"validation batches hold no {getattr(self.task, 'target', 'label')!r}")
        outputs, targets = (self.processes.gathered(array, num) for array in share)
        bad = int((~np.isfinite(outputs)).reshape(num, -1).any(1).sum())
        if bad:
            self.progress.warn(f"epoch {self.epoch + 1}: {bad} of {num} validation outputs are not finite")
            return {self.monitor: None}
        scores = {name: float(value) for name, value in self.task.score(outputs, targets).items()}
        if self.monitor not in scores:
            known = nearest(self.monitor, scores)
            raise UsageError(f"monitor {self.monitor!r} is not among the validation scores; {known}")
        return {name: value if math.isfinite(value) else None for name, value in scores.items()}

    def finish(self) -> FitResult:
        """Puts the best epoch's weights in place."""
        self._put_in_place()
        if not self.best and self.val is not None:
            self.best_epoch = self.epoch
            self.progress.warn(f"{self.monitor} was never a finite number: the last epoch is kept")
        result = FitResult(
            best_epoch=self.best_epoch,
            best=self._best_scores(),
            history=self.history,
            seconds=self._elapsed(),
            steps=self._position(),
            stopped="patience" if self._out_of_patience() else "epochs",
            skipped=self.skipped,
            notes=list(dict.fromkeys(self.progress.notes)),
        )
        self.progress.event("end", step=result.steps, best_epoch=self.best_epoch, stopped=result.stopped)
        return result

    def _put_in_place(self) -> None:
        """Leaves the best epoch's weights in the model; where there is no best, the last ones or their average."""
        if self.best or self.average is not None:
            self.handle.load_state(self.best or self.average.state())
        self.model.eval()

    def _same_state(self) -> None:
        self.processes.same_state(self.handle)
        if self.average is not None:
            self.processes.same_state(self.average)

    def _last(self) -> int:
        """How many epochs are trained, unless patience ends before."""
        return self.plan.epochs if self.until is None else self.until

    def _best_scores(self) -> dict[str, float | None]:
        return self.history[self.best_epoch - 1]["val"] if self.best_epoch else {}

    def _out_of_patience(self) -> bool:
        waited = len(self.history) - self.best_epoch
        patience = self.plan.patience
        return self.val is not None and patience is not None and waited >= patience and self._settled()

    # ---- which samples

    def _position(self) -> int:
        """Optimiser steps behind us, of all epochs."""
        return self.epoch * len(self.steps) + self.step

    def _steps(self, epoch: int) -> list[np.ndarray]:
        batch = self.plan.batch_size * self.plan.accumulate
        return steps_of_epoch(len(self.train), batch, self.processes.world, self.plan.seed, epoch, self.weights)

    def _pieces(self, step: int) -> list[Sequence[int]]:
        """This process's micro-batches of a step."""
        return chunks(self.steps[step][self.processes.rank :: self.processes.world], self.micro)

    def _batches(self) -> Iterator[Any]:
        pieces = [piece for step in range(self.step, len(self.steps)) for piece in self._pieces(step)]
        data = Seeded(self.train, self.plan.seed, self.epoch)
        return load(data, pieces, self.plan.workers, pinned=self.device.type == "cuda")

    def _halve(self) -> None:
        """Fewer samples in memory at once, with the same effective batch."""
        now = max(map(len, self._pieces(self.step)))
        if now == 1:
            raise ResourceError(f"out of memory on {self.device} with one sample: take a smaller input or backbone")
        self.micro = now // 2
        self.optimizer.zero_grad(set_to_none=True)
        free_memory()
        self.progress.warn(f"out of memory with {now} samples at once: {self.micro} from here on, same effective batch")

    def _warn_of_data(self) -> None:
        """Says what is unusual about data and plan before the first step."""
        num, batch = len(self.train), self.plan.batch_size * self.plan.accumulate
        if batch > num:
            self.progress.warn(f"the batch of {batch} is larger than the training set: a step takes all {num} samples")
        elif (extra := max(map(len, self.steps)) - batch) > 0:
            self.progress.warn(f"{num} samples in steps of {batch} leave {extra} over: joined to the last full step")
        if self.val is None and self.until is None:
            self.progress.warn("no validation set: the last epoch is kept")
            if self.plan.patience is not None:
                self.progress.warn("patience has no effect without a validation set")

    # ---- checkpoints

    def resume(self) -> None:
        """Takes up the newest complete checkpoint of the output folder, where there is one."""
        path = newest_checkpoint(self.out) if self.out is not None else None
        self.settings, notes = self._settings(), []
        if path is not None:
            tensors, record = load_checkpoint(path)
            for key, now in self.settings.items():
                then = record["settings"].get(key)
                if then != now:
                    raise UsageError(
                        f"{path} was made with {key}={then}, this run has {now}: "
                        "go on with the same settings and data, or give another output folder"
                    )
            self.handle.load_state(without_prefix("model.", tensors))
            self._take_up()
            self.best = without_prefix("best.", tensors)
            restore_optimizer(self.optimizer, without_prefix("optimizer.", tensors), record["optimizer"])
            self.scaler.load_state_dict(record["scaler"])
            if self.average is not None:
                self.average.load_state(without_prefix("average.", tensors))
                self.average.steps = record["averaged"]
            for name in POSITION:
                setattr(self, name, record[name])
            notes = record["notes"]
            self.progress.line(f"resumed from {path}")
        self._same_state()
        self.processes.check_same(self.model, self._position())
        self.progress.start(self._position(), notes, settings=self.settings, device=str(self.device))
        self._warn_of_data()

    def _save(self) -> None:
        if self.out is None:
            return
        self.seconds, self.started = self._elapsed(), time.perf_counter()
        self.epoch_seconds, self.epoch_started = self._epoch_elapsed(), time.perf_counter()
        if self.processes.main:
            moments, scalars = flatten_optimizer(self.optimizer)
            tensors = with_prefix("model.", self.handle.state()) | with_prefix("best.", self.best)
            tensors |= with_prefix("optimizer.", moments)
            record = {name: getattr(self, name) for name in POSITION} | {
                "settings": self.settings,
                "optimizer": scalars,
                "scaler": self.scaler.state_dict(),
                "notes": self.progress.notes,
            }
            if self.average is not None:
                tensors |= with_prefix("average.", self.average.state())
                record["averaged"] = self.average.steps
            save_checkpoint(self.out, self._position(), tensors, record)
        self.processes.wait()

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        plan = {name: value for name, value in asdict(self.plan).items() if name not in FREE}
        shapes = sorted((name, list(t.shape)) for name, t in self.handle.state().items())
        settings = plan | {
            "monitor": self.monitor,
            "processes": self.processes.world,
            "training data": data_mark(self.train),
            "validation data": data_mark(self.val),
            "trained tensors": f"{len(shapes)} ({short_hash(repr(shapes).encode())})",
            "last epoch": self._last(),
        }
        return json.loads(json.dumps(settings))  # as a checkpoint gives it back

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    def _epoch_elapsed(self) -> float:
        return self.epoch_seconds + time.perf_counter() - self.epoch_started


class _Everything:
    """A plain model seen as a handle: every parameter that requires a gradient, and every stored buffer."""

    def __init__(self, model: nn.Module):
        self.model = model

    def trainable(self, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        factor, groups = layer_factor(self.model, layer_decay), {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                new = {"name": "model", "lr_scale": factor(name), "params": [], "names": []}
                group = groups.setdefault(new["lr_scale"], new)
                group["params"].append(p)
                group["names"].append(name)
        return list(groups.values())

    def state(self) -> dict[str, Tensor]:
        named = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        everything = self.model.state_dict(keep_vars=True)
        return named | {name: t for name, t in everything.items() if not isinstance(t, nn.Parameter)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, own in self.state().items():
                own.copy_(state[name])


def _weights(dataset) -> np.ndarray:
    """How often each sample of a balanced epoch is drawn, by the targets that the data set tells without reading."""
    targets = getattr(dataset, "item_targets", None)
    if targets is None:
        raise UsageError(
            "balanced=true needs a data set with `item_targets`: (N,) class numbers or (N, K) zeros and ones"
        )
    return balanced_weights(targets)


def rank(scores: dict[str, float | None], monitor: str) -> tuple[float, float] | None:
    """What epochs and rates are compared by, higher is better; None: no finite monitor.

    The monitor, then log loss: a small validation part has many equals.
    """
    if scores.get(monitor) is None:
        return None
    value = -scores[monitor] if monitor in LOWER else scores[monitor]
    return value, -(scores.get("log_loss") or 0.0)


def make_optimizer(handle, plan: Plan) -> torch.optim.Optimizer:
    """The plan's optimiser of what a handle trains; each group knows its full rate as `base_lr`."""
    groups = _groups(handle, plan)
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=plan.momentum)
    return torch.optim.AdamW(groups, betas=plan.betas, eps=plan.eps)


def _groups(handle, plan: Plan) -> list[dict[str, Any]]:
    """The optimiser's groups: 1-D tensors without decay unless plan.decay_all, those named "head" at head_lr."""
    groups = []
    for given in handle.trainable(plan.layer_decay) if plan.layer_decay != 1 else handle.trainable():
        unscaled = plan.head_lr if given["name"] == "head" and plan.head_lr is not None else plan.lr
        lr = unscaled * given.get("lr_scale", 1.0)
        for flat, decay in ((False, plan.weight_decay), (True, plan.weight_decay if plan.decay_all else 0.0)):
            params = [p for p in given["params"] if (p.ndim <= 1) == flat]
            if params:
                rates = {"lr": lr, "base_lr": lr, "unscaled": unscaled}
                groups.append({"params": params, "weight_decay": decay, **rates})
    if not groups:
        raise UsageError("there is no tensor to train: every parameter is frozen")
    return groups
