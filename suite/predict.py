"""A model's outputs for a whole data set."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from adaptsuite.batches import Seeded, load
from adaptsuite.devices import autocast, free_memory, is_out_of_memory, pick_device, to_device
from adaptsuite.errors import DataError, ResourceError


def predict_all(
    model: nn.Module,
    task,
    dataset,
    batch_size: int = 32,
    device: str | torch.device = "auto",
    *,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    precision: str = "fp32",
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Outputs (N, K) float32 of `task.predict`, and targets (N, ...), None when the batches hold none.

    In the order of the data set (or of `indices`), in eval mode; the model's mode is put back. Random parts of the data
    draw the same numbers at every call. When memory runs out, half the batch is tried.
    """
    device = pick_device(device) if isinstance(device, str) else device
    indices = range(len(dataset)) if indices is None else indices
    if not len(indices):
        raise DataError("nothing to predict: the data set is empty")
    data, key, training = Seeded(dataset, seed, "predict"), getattr(task, "target", "label"), model.training
    batches, outputs, targets, done = None, [], [], 0
    model.to(device).eval()
    try:
        while done < len(indices):
            if batches is None:
                pieces = [indices[i : i + batch_size] for i in range(done, len(indices), batch_size)]
                batches = load(data, pieces, workers, pinned=device.type == "cuda")
            try:
                batch = to_device(next(batches), device)
                # no_grad, not inference_mode: what a model caches in here could not be used in training again
                with torch.no_grad(), autocast(device, precision):
                    outputs.append(task.predict(model, batch).float().cpu().numpy())
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                batch = batches = None
            if batches is None:  # out here the traceback holds no tensor any more
                batch_size = min(batch_size, len(indices) - done) // 2
                if batch_size == 0:
                    raise ResourceError(f"out of memory on {device} with one sample: take a smaller input or backbone")
                free_memory()
                continue
            if key in batch:
                targets.append(batch[key].cpu().numpy())
            done += len(outputs[-1])
    finally:
        model.train(training)
    return np.concatenate(outputs), np.concatenate(targets) if targets else None
