"""Row 2: LoRA on every linear layer of ViT-B/16 with lean activations: bytes and time against peft, and gradients.

    python tests/benchmarks/lean_memory.py [--turns 9] [--batch 1] [--threads 1]

Bytes are what autograd holds between forward and backward, each storage once, parameters left out. Gradients are of the
real path: nothing is held while backward runs, so freed memory is given out again.
"""

import torch
from lora_step import PEFT_NAMES, arguments, pair, relative, row, show, stepper, trained
from torch import Tensor, nn

from adaptsuite.costs import turns
from adaptsuite.host import get_handle
from adaptsuite.lean import lean, make_lean

EVERY = tuple(PEFT_NAMES)


def plain_bytes(model: nn.Module, image: Tensor) -> int:
    storages = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.append(t.untyped_storage()) or t, lambda t: t):
        out = model(image)
    return _without_weights(model, storages, out)


def lean_bytes(model: nn.Module, image: Tensor) -> int:
    storages = []
    with lean(keep=lambda t: storages.append(t.untyped_storage())):
        out = model(image)
    return _without_weights(model, storages, out)


def _without_weights(model: nn.Module, storages: list, out: Tensor) -> int:
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())


def gradients(model: nn.Module, image: Tensor) -> list[Tensor]:
    for p in trained(model):
        p.grad = None
    model(image).square().mean().backward()
    return [p.grad.clone() for p in trained(model)]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest over tensors, relative to the largest value of each."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


def rows(count: int = 9, batch: int = 1) -> list[dict]:
    import peft

    peer, image = f"peft {peft.__version__}", torch.randn(batch, 3, 224, 224)
    ours, theirs = pair(EVERY)
    expected = gradients(ours, image)
    make_lean(get_handle(ours).bank)
    share = lean_bytes(ours, image) / plain_bytes(theirs, image)
    gap = difference(gradients(ours, image), expected)
    steps = {"ours": stepper(ours, image), "peft": stepper(theirs, image)}
    value, spread = relative(turns(steps, count), "ours", "peft")
    return [
        row("2 lean activation bytes", share, 0.68, peer),
        row("2 lean gradient difference", gap, 1e-6, "the same host, not lean"),
        row("2 lean step", value, 1.10, peer, spread),
    ]


if __name__ == "__main__":
    options = arguments(__doc__)
    show(rows(options.turns, options.batch))
