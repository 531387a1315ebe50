"""What training will cost, counted before it: parameters, MACs, activation and optimiser bytes, size of the adapter.

One training step runs on a copy of the model whose float tensors have shapes and no values. They are fake tensors of
the model's own device rather than tensors on `meta`, where attention takes another kernel, which saves other tensors
for the backward pass. Integers and masks keep their values: models decide by them.
"""

import contextlib
import copy
import json
import math
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_flop_count

from adaptsuite.bank import BANK, is_base, tensors_in
from adaptsuite.errors import UsageError
from adaptsuite.host import Handle, attach
from adaptsuite.lean import lean as lean_saving
from adaptsuite.method import Method
from adaptsuite.probe import call_arguments
from adaptsuite.sites import component_info, example_input


@dataclass(frozen=True)
class Budget:
    """Figures of one training step on one sample (a batch).

    activation_bytes is what autograd keeps for the backward pass: parameters and buffers are not in it, a storage with
    many views is in it once. peak_bytes is the most that a step allocates at once: activations, temporary tensors and
    gradients, without what a kernel allocates inside itself.
    """

    method: str | None  # None: the model as it is
    params: dict[str, int]  # trained, trained_without_head, total
    batch: int
    macs: int  # of the forward pass, attention and adapters included
    macs_per_item: int
    training_flops: int  # forward and backward; a MAC is two
    activation_bytes: int
    peak_bytes: int
    optimizer_bytes: int  # AdamW: two moments and a step count per tensor
    adapter_bytes: int  # of adapter.safetensors
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def budget(
    model: nn.Module,
    method: str | Method | None = None,
    sample: Any = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    lean: bool = False,
    **attach_arguments: Any,
) -> Budget:
    """The cost of training `model` with `method`, or as it is (adapted or not) when method is None.

    sample: one batch, as for `attach`; known families need none, theirs is one small item.
    loss: function of the model's output, where it keeps activations that count (a segmentation's); without one,
    gradients start at the output.  lean: activations are saved as adaptsuite.lean does, as in a host that was made so.
    attach_arguments: as for `attach`.
    The model is not changed and needs no values: it may be on the meta device. One that decides by the values of
    floats, or whose operators only work on values, takes a real step on a copy; `notes` says so.
    """
    if method is None and attach_arguments:
        raise UsageError(f"budget: {', '.join(attach_arguments)} without a method")
    args, kwargs = example_input(model) if sample is None else call_arguments(sample)
    notes: tuple[str, ...] = ()
    with _random_state_kept(), torch.enable_grad():
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            host = _without_values(model, mode)
            inputs = tree_map(lambda v: _fake(v, mode) if isinstance(v, Tensor) else v, (args, kwargs))
            if method is not None:
                attach(host, method, sample=inputs, **attach_arguments)
                host = _without_values(host, mode)  # the adapter has real tensors so far
            step = _step(host, *inputs, loss, lean)
        except Exception as e:  # no form without values; what is wrong with the model itself is raised again below
            if isinstance(e, UsageError) or type(e) is LookupError or any(p.is_meta for p in model.parameters()):
                raise
            reason = (str(e).splitlines() or [""])[0]
            notes = (f"counted in a real step on a copy of the model, without values it fails: {reason}",)
            host = copy.deepcopy(model)
            if method is not None:
                attach(host, method, sample=(args, kwargs), **attach_arguments)
            step = _step(host, args, kwargs, loss, lean)
        handles = [Handle(host, name) for name in host.adapter_bank.active] if hasattr(host, BANK) else []
        trained = {id(p): p for p in host.parameters() if p.requires_grad}.values()
        items = _batch(args, kwargs)
        return Budget(
            method=" + ".join(h.method.name for h in handles) or None,
            params=_parameters(host, handles),
            batch=items,
            macs=step.macs,
            macs_per_item=step.macs // items,
            training_flops=step.flops,
            activation_bytes=step.saved_peak,
            peak_bytes=step.peak,
            optimizer_bytes=sum(2 * p.numel() * p.element_size() + 4 for p in trained),
            adapter_bytes=sum(file_bytes(h.state()) for h in handles),
            notes=notes,
        )


def describe(budget: Budget) -> list[str]:
    """Lines for a terminal: parameters first, then what a step computes and keeps, then the file."""
    trained, bare, total = (budget.params[k] for k in ("trained", "trained_without_head", "total"))
    head = f", {bare:,} without the head" if bare != trained else ""
    megabytes = [_short(n / 1e6) for n in (budget.activation_bytes, budget.peak_bytes, budget.optimizer_bytes)]
    share = f"{trained:,} trained ({100 * trained / max(total, 1):.2f} %)"
    lines = [
        ("backbone", f"{_short((total - trained) / 1e6)} M frozen"),
        ("adapter", f"{budget.method or 'none'}  {share}{head}"),
        ("forward", f"{budget.macs_per_item / 1e9:,.3f} GMAC for one item"),
        ("step", f"{_short(budget.training_flops / 1e9)} GFLOP for a batch of {budget.batch}"),
        ("memory", f"{megabytes[0]} MB activations, {megabytes[1]} MB at the peak, {megabytes[2]} MB optimiser"),
        ("file", f"{_short(budget.adapter_bytes / 1e6)} MB adapter"),
        *(("note", note) for note in budget.notes),
    ]
    return [f"{label:<10}{text}" for label, text in lines]


def describe_depths(budgets: Mapping[int, Budget]) -> list[str]:
    """A table for a terminal: what training the last k blocks costs, for each k."""
    lines = [
        f"{'last_k':>6}  {'GFLOP a step':>12}  {'of all':>6}  {'MB activations':>14}  {'of all':>6}  {'trained':>11}"
    ]
    whole = budgets[max(budgets)]
    for k, own in budgets.items():
        flops, saved = own.training_flops / whole.training_flops, own.activation_bytes / max(whole.activation_bytes, 1)
        lines.append(
            f"{k:>6}  {_short(own.training_flops / 1e9):>12}  {flops:>6.2f}  {_short(own.activation_bytes / 1e6):>14}"
            f"  {saved:>6.2f}  {own.params['trained']:>11,}"
        )
    return lines


def file_bytes(state: Mapping[str, Tensor]) -> int:
    """Size of adapter.safetensors with these tensors: a header padded to 8 bytes, then every tensor once."""
    stored: dict[tuple, tuple[str, Tensor]] = {}
    for name, t in state.items():
        stored.setdefault((t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()), (name, t))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, t in sorted(stored.values(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": f"F{8 * t.element_size()}", "shape": list(t.shape), "data_offsets": [start, end]}
    size = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + math.ceil(size / 8) * 8 + end


# ---- the step


def _attention(query, key, value, *rest, **more) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad, query, key, value, *rest, **more) -> int:
    # two products' gradients; recomputing the scores saves memory and is not counted
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


def _convolution_backward(grad, x, weight, bias, stride, padding, dilation, transposed, *rest, **more) -> int:
    # each gradient takes the forward's products; torch's own count of the weight's forgets groups
    forward = conv_flop_count(x.shape, weight.shape, grad.shape, transposed)
    return forward * sum(rest[-1][:2])


_FUSED = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
_FLOPS = {**flop_registry, torch.ops.aten.convolution_backward: _convolution_backward}
for _kind in _FUSED:
    _FLOPS[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}")] = _attention
    _FLOPS[getattr(torch.ops.aten, f"_scaled_dot_product_{_kind}_backward")] = _attention_backward


_INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks with values, as the places where they are True: how many these are has no answer without values."""
    found: list[Tensor | None] = []
    for index in indices:
        known = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        found += index.nonzero().unbind(1) if known else [index]
    return found


class Meter(TorchDispatchMode):
    """Counts, while it is entered: FLOPs, bytes that live, and bytes that autograd has saved and that live."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.flops = self.macs = self.live = self.peak = self.saved = self.saved_peak = 0
        self.own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, list] = {}  # key of a storage -> [reference, bytes, whether it is saved]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._overloadpacket in _INDEXED:
            args = (args[0], _places(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if func is torch.ops.aten.rand.default and out.numel() == 1:
            out = torch.ones_like(out)  # LayerDrop draws one number a layer: this one leaves no layer out
        if count := _FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._track(t)
        return out

    def pack(self, tensor: Tensor) -> Tensor:
        entry = self._track(tensor)
        if entry and not entry[2]:
            entry[2] = True
            self.saved += entry[1]
            self.saved_peak = max(self.saved_peak, self.saved)
        return tensor

    def _track(self, tensor: Tensor) -> list | None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.own:
            return None
        if key not in self.storages:
            self.storages[key] = [weakref.ref(storage, lambda _: self._free(key)), storage.nbytes(), False]
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
        return self.storages[key]

    def _free(self, key: int) -> None:
        _, size, saved = self.storages.pop(key)
        self.live -= size
        self.saved -= size if saved else 0


def _step(host: nn.Module, args: tuple, kwargs: dict[str, Any], loss: Callable | None, lean: bool) -> Meter:
    host.train()
    meter = Meter(host)
    if lean or (hasattr(host, BANK) and host.adapter_bank.lean):
        saving = lean_saving(keep=meter.pack)
    else:
        saving = torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda tensor: tensor)
    with meter, saving:
        output = host(*args, **kwargs)
        meter.macs = meter.flops // 2
        own_loss = loss(output) if loss else getattr(output, "loss", None)  # transformers: when labels are given
        ends = [t for t in tensors_in(output if own_loss is None else own_loss) if t.requires_grad]
        del output, own_loss
        torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
    return meter


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


# ---- tensors without values


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A tensor without values in the place of a float one; integers keep theirs where they have any."""
    if not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta):
        return tensor
    device = "cpu" if tensor.is_meta else tensor.device
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _without_values(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy without the values of float tensors. Packed integer weights are shared with the model: nothing writes."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        fake = _fake(p, mode)
        memo[id(p)] = p if fake is p else nn.Parameter(fake, requires_grad=p.requires_grad)
    bank = getattr(model, BANK, None)
    kept = [t for a in bank.adapters.values() for t in (a.kept or {}).values()] if bank is not None else []
    for t in (*model.buffers(), *kept):
        fake = _fake(t, mode)
        if fake is not t:
            memo[id(t)] = fake
    return copy.deepcopy(model, memo)


# ---- counts


def _parameters(host: nn.Module, handles: list[Handle]) -> dict[str, int]:
    base = sum(p.numel() for n, p in host.named_parameters() if is_base(n))
    if handles:
        counts = [h.parameters_count() for h in handles]
        total = base + sum(c["total"] - base for c in counts)
        return {**{k: sum(c[k] for c in counts) for k in ("trained", "trained_without_head")}, "total": total}
    heads = tuple(c.head + "." for c in component_info(host) if c.head)
    trained = {n: p.numel() for n, p in host.named_parameters() if p.requires_grad}
    without_head = sum(count for n, count in trained.items() if not n.startswith(heads))
    return {"trained": sum(trained.values()), "trained_without_head": without_head, "total": base}


def _batch(args: tuple, kwargs: dict[str, Any]) -> int:
    """Items in the sample: the first dimension of its first tensor."""
    return next((t.shape[0] for t in tensors_in((args, kwargs)) if t.ndim), 1)


def _short(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
