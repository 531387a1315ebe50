"""How a run is trained: the numbers that `fit` follows. Importing this needs no torch."""

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from adaptsuite.errors import UsageError, nearest


@dataclass(frozen=True)
class Plan:
    """Settings of one training run; the effective batch is batch_size x accumulate on any number of processes.

    A tensor's rate is lr (of the head: head_lr) x its own `lr_scale` x the factor of its layer x the schedule.
    """

    epochs: int = 20
    lr: float = 1e-3
    head_lr: float | None = None  # of the task head; None: lr
    layer_decay: float = 1.0  # a layer's share of the rate of the layer above it (adaptsuite.depth); 1: all alike
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9  # sgd
    weight_decay: float = 0.05  # not on 1-D tensors (norms, biases, gates), unless decay_all; sgd: through the gradient
    decay_all: bool = False  # weight decay on every trained tensor, as some papers' code has it
    betas: tuple[float, float] = (0.9, 0.999)  # adamw
    eps: float = 1e-8  # adamw
    batch_size: int = 32  # samples of one forward pass, all processes together
    accumulate: int = 1  # forward passes per optimiser step
    balanced: bool = False  # draw the samples of an epoch with replacement, so that classes come equally often
    warmup: float = 0.1  # share of all steps, linear from zero
    warmup_steps: int | None = None  # the same as a number; None: `warmup` decides
    schedule: Literal["cosine", "constant", "one_cycle"] = "cosine"  # one_cycle needs no warm-up (adaptsuite.schedule)
    min_lr: float = 0.0  # where the cosine ends for tensors at lr; all others end at the same share of their own rate
    cycle_start: float = 0.1  # one_cycle: the share of lr that it starts from and comes back to
    cycle_momentum: tuple[float, float] = (0.95, 0.85)  # one_cycle: at its ends and its middle; adamw: of beta1
    tail: float = 0.1  # one_cycle: the share of all steps after the cycle, in which the rate falls to almost nothing
    clip: float | None = 1.0  # largest norm of the gradient; None: no limit
    ema: float | None = None  # decay of an average of the weights that is validated and kept in their place; None: off
    patience: int | None = None  # epochs without a better monitor; None: never stop early
    monitor: str | None = None  # validation metric that picks the best epoch; None: the task's
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    max_skips: int = 5  # non-finite steps in a row that are skipped before the run stops
    workers: int = 0  # data processes
    checkpoint_steps: int | None = None  # also a checkpoint every so many steps; None: at epoch ends
    tensorboard: bool = False
    lean: bool = False  # norms and activations are computed again in backward instead of kept (adaptsuite.lean)
    compile: bool = False  # the adapted model as one graph of torch.compile
    memory_limit: float | None = None  # GB of a step, of the commands: lean, then smaller batches (memory_limit.py)
    # of the commands: features of the frozen part on disk. auto: of probes, where nothing is drawn at random; a number:
    # of every method with a frozen part below it, of so many augmented views a sample (adaptsuite.replay)
    cache: Literal["auto", "off"] | int = "auto"

    def __post_init__(self) -> None:
        for name in ("optimizer", "schedule", "device", "precision"):
            value, choices = getattr(self, name), get_args(get_type_hints(Plan)[name])
            if value not in choices:
                raise UsageError(f"{name}={value!r} is not known; {nearest(str(value), choices)}")
        for name in ("epochs", "batch_size", "accumulate", "patience", "checkpoint_steps"):
            self._expect(name, lambda v: isinstance(v, int) and v >= 1, "a whole number from 1")
        self._expect(
            "cache", lambda v: v in ("auto", "off") or isinstance(v, int) and v >= 1, "auto, off or a number of views"
        )
        for name in ("workers", "max_skips", "seed", "warmup_steps"):
            self._expect(name, lambda v: isinstance(v, int) and v >= 0, "a whole number from 0")
        for name in ("lr", "head_lr", "eps", "clip", "memory_limit"):
            self._expect(name, lambda v: 0 < v < float("inf"), "a number above 0")
        for name in ("weight_decay", "min_lr"):
            self._expect(name, lambda v: 0 <= v < float("inf"), "a number from 0")
        self._expect("momentum", lambda v: 0 <= v < 1, "a number in [0, 1)")
        self._expect("layer_decay", lambda v: 0 < v <= 1, "a number in (0, 1]")
        self._expect("ema", lambda v: 0 < v < 1, "a number in (0, 1)")
        self._expect("warmup", lambda v: 0 <= v < 1, "a share of the steps in [0, 1)")
        self._expect("tail", lambda v: 0 <= v < 1, "a share of the steps in [0, 1)")
        self._expect("cycle_start", lambda v: 0 < v <= 1, "a share of lr in (0, 1]")
        falls = "two numbers in [0, 1), the second not above the first"
        self._expect("cycle_momentum", lambda v: len(v) == 2 and 0 <= v[1] <= v[0] < 1, falls)
        self._expect("betas", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)")
        if self.min_lr > self.lr:
            raise UsageError(f"min_lr={self.min_lr:g} is above lr={self.lr:g}: the schedule falls from lr to min_lr")
        if self.min_lr and self.schedule != "cosine":
            raise UsageError(f"min_lr={self.min_lr:g} is where a cosine ends, the schedule is {self.schedule}")
        if self.warmup_steps and self.schedule == "one_cycle":
            raise UsageError(f"warmup_steps={self.warmup_steps}: one_cycle climbs by itself, leave the warm-up out")

    def _expect(self, name: str, valid, what: str) -> None:
        value = getattr(self, name)
        if value is None and Plan.__dataclass_fields__[name].default is None or name == "clip" and value is None:
            return
        try:
            fine = not isinstance(value, bool) and valid(value)
        except TypeError:
            fine = False
        if not fine:
            raise UsageError(f"{name}={value!r}: expected {what}")
