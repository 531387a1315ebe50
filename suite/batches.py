"""Which samples make which step, and the random numbers that go with them: all functions of (seed, epoch, step).

No random state is ever stored: a resumed run draws what the unbroken one would have drawn, with any number of workers.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, default_collate

from adaptsuite.errors import AdapterError, DataError, ResourceError, UsageError


def seed_all(*key: Any) -> None:
    """Seeds python, numpy and torch (all devices in use) by a hash of `key`; 15 us on a CPU."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)  # torch.manual_seed would also walk through every kind of device
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


class Seeded:
    """A map-style dataset whose draws depend on (seed, epoch, index) only, not on the worker or the batch."""

    def __init__(self, dataset, seed: int, epoch: int | str):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seed_all(self.seed, self.epoch, "sample", int(index))
        return self.dataset[int(index)]


def steps_of_epoch(
    num_samples: int, batch: int, world: int, seed: int, epoch: int, weights: np.ndarray | None = None
) -> list[np.ndarray]:
    """A permutation of the samples, cut into steps of `batch`; with weights (N,) a draw with replacement instead.

    A rest too small to give each process two samples (one alone cannot pass a BatchNorm) joins the step before.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(num_samples)
    if weights is not None:
        order = rng.permutation(_drawn(order, weights, rng.random()))
    cuts = list(range(batch, num_samples, batch))
    rest = num_samples % batch
    if cuts and rest and rest < 2 * world:
        cuts.pop()
    return np.split(order, cuts)


def _drawn(order: np.ndarray, weights: np.ndarray, offset: float) -> np.ndarray:
    """As many draws as samples, sample i in proportion to weights[i].

    Systematic sampling: equally spaced places on the summed weights. A sample that is expected x times comes floor(x)
    or ceil(x) times, where independent draws would scatter more.
    """
    ends = np.cumsum(weights[order])
    places = (np.arange(len(order)) + offset) * (ends[-1] / len(order))
    return order[np.searchsorted(ends[:-1], places, side="right")]


def balanced_weights(targets: np.ndarray) -> np.ndarray:
    """(N,) of class numbers (N,) or zeros and ones (N, K): the sum over a sample's labels of 1 / (samples with it).

    With one label each, every class is drawn equally often. With several it is the rule of AST's authors
    (github.com/YuanGongND/ast, egs/audioset/gen_weight_file.py): rare labels come more often, common ones ride along.
    Samples without a label, background, are drawn as one class more. Raises DataError where no sample has a label.
    """
    targets = np.asarray(targets)
    hot = targets > 0 if targets.ndim == 2 else targets[:, None] == np.unique(targets)
    if not hot.any():
        raise DataError("balanced=true: no training sample has a label")
    hot = np.concatenate([hot, ~hot.any(1, keepdims=True)], 1)
    return hot @ (1 / np.maximum(hot.sum(0), 1))


def chunks(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    """Pieces of `size`; a last one of a single sample joins the piece before, unless all are single."""
    cuts = list(range(size, len(indices), size))
    if cuts and size > 1 and len(indices) % size == 1:
        cuts.pop()
    return [indices[a:b] for a, b in zip([0, *cuts], [*cuts, len(indices)], strict=True) if b > a]


def load(dataset, pieces: Sequence[Sequence[int]], workers: int = 0, pinned: bool = False) -> Iterator[Any]:
    """One collated batch per piece of indices, by `dataset.collate` where it has one."""
    source = dataset.dataset if isinstance(dataset, Seeded) else dataset
    loader = DataLoader(
        dataset,
        batch_sampler=[list(map(int, piece)) for piece in pieces],
        num_workers=min(workers, len(pieces)),
        collate_fn=getattr(source, "collate", default_collate),
        pin_memory=pinned,
    )
    try:
        yield from loader
    except (UsageError, DataError, AdapterError, ResourceError) as error:
        if not str(error).startswith("Caught"):
            raise
        # from a data process the message is a traceback whose last line is "class: message"
        raise type(error)(str(error).strip().rpartition("\n")[2].partition(": ")[2]) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Caught" in str(error):
            raise
        raise ResourceError(f"a data process died ({str(error).splitlines()[0]}): try workers=0") from error


def data_mark(dataset) -> str:
    """Number of samples and `dataset.digest`, or else a hash of the first sample: tells one data set from another."""
    if dataset is None:
        return "none"
    digest = getattr(dataset, "digest", None)
    if digest is None:
        leaves = tree_leaves(Seeded(dataset, 0, "mark")[0])
        arrays = [np.asarray(leaf.float() if isinstance(leaf, Tensor) else leaf) for leaf in leaves]
        digest = short_hash(b"".join(a.tobytes() for a in arrays if a.dtype != object))
    return f"{len(dataset)} samples ({digest})"


def short_hash(content: bytes) -> str:
    """Twelve hex digits of the sha256."""
    return hashlib.sha256(content).hexdigest()[:12]
