"""Where a run computes: device, precision, memory, and the processes that share the work (through accelerate)."""

import contextlib
import gc
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaptsuite.errors import ResourceError, UsageError, nearest

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda" or "mps"; ResourceError for an accelerator that is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    kind = name.partition(":")[0]
    if kind not in present:
        raise UsageError(f"device={name!r} is not known; {nearest(name, ['auto', *present])}")
    if not present[kind]:
        raise ResourceError(f"device {name!r} was asked for and torch finds none here: take 'cpu' or 'auto'")
    return torch.device(name)


class Processes:
    """The processes of a run, each with its share of every step; one process is the case world = 1.

    Gradients are summed here rather than by DistributedDataParallel: adapters are a few megabytes, any method of the
    model may be called, and tensors without a gradient cost nothing.
    """

    def __init__(self, device: torch.device):
        self.accelerator = _accelerator(device)
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.main: bool = self.accelerator.is_main_process

    def same_state(self, handle) -> None:
        """The main process's trained tensors and running statistics (these differ by shard) on all processes."""
        if self.world > 1:
            from accelerate.utils import broadcast

            handle.load_state(broadcast({name: t.detach().clone() for name, t in handle.state().items()}))

    def check_same(self, model: nn.Module, position: int) -> None:
        """Raises where processes hold other frozen weights or stand elsewhere: nothing later would show it."""
        if self.world == 1:
            return
        own = sum((t.detach().double().sum() for t in [*model.parameters(), *model.buffers()]), self._number(0))
        sums, places = self.accelerator.gather(torch.stack([own, self._number(position)]).reshape(1, 2)).unbind(1)
        if not torch.equal(places, places[:1].expand_as(places)):
            raise ResourceError("the processes see different checkpoints: the output folder must be on a shared disk")
        if not torch.allclose(sums, sums[:1], rtol=1e-9, atol=0):
            raise UsageError("the processes hold different frozen weights: seed before the model is built")

    def sum_gradients(self, params: Sequence[Tensor], loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """Sums gradients and loss over the processes in one message; a tensor without gradient anywhere keeps none.

        Returns the loss and whether any process was told to stop.
        """
        if self.world == 1:
            return loss, stop
        has = [p.grad is not None for p in params]
        grads = [p.grad if there else torch.zeros_like(p) for p, there in zip(params, has, strict=True)]
        flags = torch.tensor([stop, *has], device=self.device, dtype=torch.float32)
        flat = torch.cat([loss.float().reshape(1), flags, *(g.float().flatten() for g in grads)])
        loss, flags, rest = self.accelerator.reduce(flat, "sum").split([1, len(flags), len(flat) - len(flags) - 1])
        stop, *has = flags.tolist()
        for param, there, grad in zip(params, has, rest.split([p.numel() for p in params]), strict=True):
            param.grad = grad.view_as(param).to(param.dtype) if there else None
        return loss.squeeze(0), bool(stop)

    def anyone(self, told: bool) -> bool:
        return told if self.world == 1 else bool(self.accelerator.reduce(self._number(told), "sum").item())

    def share(self, num: int) -> list[int]:
        """This process's rows of a data set; some come twice so that all shares are equally long."""
        length = -(-num // self.world)
        return [i % num for i in range(self.rank, length * self.world, self.world)]

    def gathered(self, share: np.ndarray, num: int) -> np.ndarray:
        """All rows in the order of the data set, each once, from what every process made of its share."""
        if self.world == 1:
            return share
        rows = self.accelerator.gather(torch.from_numpy(share).to(self.device)).cpu()
        return rows.unflatten(0, (self.world, len(share))).transpose(0, 1).flatten(0, 1)[:num].numpy()

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def _number(self, value: float) -> Tensor:
        return torch.tensor(float(value), device=self.device, dtype=torch.double if self.world > 1 else None)


def _accelerator(device: torch.device):
    """accelerate's view of the processes on `device`; ResourceError when there are fewer than were launched."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    shared = PartialState._shared_state
    if shared and shared["num_processes"] == 1 and shared["device"].type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process was on another device
    accelerator = Accelerator(cpu=device.type == "cpu")
    wanted = _launched_processes()
    if accelerator.num_processes < wanted:
        raise ResourceError(
            f"{wanted} processes were asked for and {accelerator.num_processes} would train: "
            f"start with torchrun --nproc-per-node {wanted}"
        )
    if accelerator.device.type != device.type:
        raise ResourceError(f"device {device.type!r} was asked for and the launcher gives {accelerator.device.type!r}")
    return accelerator


def _launched_processes() -> int:
    """How many processes the launcher was told to start."""
    wanted = int(os.environ.get("WORLD_SIZE") or 1)
    if wanted == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # `accelerate launch --cpu --num_processes 2` starts one process; only its command line tells
        import psutil

        with contextlib.suppress(psutil.Error, AttributeError):
            line = " ".join(psutil.Process().parent().cmdline())
            wanted = max([wanted, *map(int, re.findall(r"--num[_-]processes[ =](\d+)", line))])
    return wanted


def check_precision(device: torch.device, precision: str) -> None:
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ResourceError("precision 'bf16' was asked for and this GPU has none: take 'fp16' or 'fp32'")


def autocast(device: torch.device, precision: str):
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def to_device(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device, non_blocking=True)


def is_out_of_memory(error: BaseException) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
