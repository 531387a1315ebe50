"""Does it train? Liveness of an adapter on a host, and the contract that every method keeps (its promises).

Both are used by the tests and by `adapt <domain> doctor`: what is dead in a test is dead for a user.
"""

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.bank import base_state, get_bank, is_base, split_key, tensor_key, tensors_in
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.host import Handle, attach, get_handle
from adaptsuite.probe import call_arguments
from adaptsuite.sites import example_input, find_sites

ALIVE = 1e-6  # of the largest gradient; below it a tensor is called dead
AGREE = 1e-5  # largest difference of two float32 forwards that should be one function, relative to the output's scale
IDENTITY = 1e-6  # some kernels round otherwise when a weight needs no gradient; the contract compares bit by bit


@dataclass
class Verification:
    """What was found. `ok` is False when something declared to train is dead, or when outputs disagree."""

    rows: list[
        dict[str, Any]
    ]  # name, kind, values, gradient (relative to the largest), state: alive | dead | exempt: why
    changes_output: bool
    identity: float | None  # largest difference to the backbone at the start; None: not looked at
    train_eval: float | None  # None: dropout or batch statistics make them differ by design
    merged: float | None  # None: the method cannot be merged, see `merge_reason`
    merge_reason: str = ""
    shadow_sites: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_if_dead(self) -> None:
        if self.problems:
            raise AdapterError("; ".join(self.problems))

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **self.__dict__}


def verify(handle: Handle, batch: Any = None, *, fresh: bool = False, seed: int = 0) -> Verification:
    """Liveness of one adapter: every trained tensor gets a gradient, the output changes, train = eval = merged.

    batch: one input (tensor, tuple of arguments, or dict), or a function of the model that gives its output; known
    families need none.  fresh: the adapter has not been trained, so the identity it promises is looked at as well.
    The adapter is perturbed and put back exactly.
    """
    model, method = handle.model, handle.method
    if callable(batch):
        run = Runner(model, batch, seed)
    else:
        args, kwargs = example_input(model) if batch is None else call_arguments(batch)
        run = Runner(model, lambda m: m(*args, **kwargs), seed)
    with _kept(handle), run.mode(False):
        plain = run.values(handle.disabled())
        identity = difference(plain, run.values()) if fresh else None
        _perturb(handle, seed)
        before = run.values()
        rows, largest = _liveness(handle, run)
        train_eval = None if _stochastic(handle) else difference(before, run.values(run.mode(True)))
        merged, reason = None, "" if method.mergeable is True else str(method.mergeable)
        if method.mergeable is True:
            try:
                handle.merge()
                merged = difference(before, run.values())
                handle.unmerge()
            except UsageError as e:
                reason = str(e)
    found = Verification(
        rows,
        changes_output=difference(plain, before) > 0,
        identity=identity,
        train_eval=train_eval,
        merged=merged,
        merge_reason=reason,
        shadow_sites=[s.key for s in handle.shadow_sites],
    )
    _judge(found, handle, largest)
    return found


def _judge(found: Verification, handle: Handle, largest: float) -> None:
    name, dead = handle.method.name, [r["name"] for r in found.rows if r["state"] == "dead"]
    own = [r for r in found.rows if r["kind"] != "head"]
    if largest == 0 or (own and all(r["state"] == "dead" for r in own)):
        found.problems.append(
            f"method {name!r} gets no gradient at all: is the backbone run under no_grad, inference mode or detach?"
        )
    elif dead:
        more = f" and {len(dead) - 3} more" if len(dead) > 3 else ""
        found.problems.append(
            f"method {name!r} trains nothing in {', '.join(dead[:3])}{more}: choose other sites for it"
        )
    if not found.changes_output:
        found.problems.append(f"method {name!r} does not change the output: its sites are not on the path to it")
    if found.identity is not None and found.identity > IDENTITY and handle.method.identity_at_start:
        found.problems.append(f"method {name!r} promises identity at the start and differs by {found.identity:.1e}")
    for what, value in (("train and eval", found.train_eval), ("merged and unmerged", found.merged)):
        if value is not None and not value <= AGREE:
            found.problems.append(
                f"method {name!r}: {what} outputs differ by {value:.1e}, at most {AGREE:.0e} is expected"
            )


@dataclass
class Runner:
    """Forwards of one input, read out as one list of float tensors."""

    model: nn.Module
    forward: Callable[[nn.Module], Any]
    seed: int

    def outputs(self) -> list[Tensor]:
        return [t for t in tensors_in(self.forward(self.model)) if t.is_floating_point()]

    def values(self, within=None) -> list[Tensor]:
        with within or contextlib.nullcontext(), torch.no_grad():
            return [t.clone() for t in self.outputs()]

    @contextlib.contextmanager
    def mode(self, training: bool) -> Iterator[None]:
        was = get_bank(self.model).training
        self.model.train(training)
        try:
            yield
        finally:
            self.model.train(was)

    def read_out(self) -> Tensor:
        """A fixed random linear read-out: a loss without a symmetry that could hide a gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        total = 0.0
        for t in self.outputs():
            weights = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
            total = total + (t * weights).sum()
        return total


@contextlib.contextmanager
def _kept(handle: Handle) -> Iterator[None]:
    """Puts trained tensors, gradients, and zero base tensors that were disturbed, back as they were."""
    trained = handle.trained()
    held = handle.adapter.tensors
    base = [p for n, p in handle.model.named_parameters() if is_base(n) and tensor_key(n) not in held]
    kept = [(p, p.detach().clone(), p.grad) for p in trained.values()]
    # an untrained base's norm or layer scale of 0 or 1e-5 lets next to nothing through: not the adapter's fault
    zero = [(p, p.detach().clone()) for p in base if _closed(p) and not any(p is t for t in trained.values())]
    with torch.no_grad():
        for p, _ in zero:
            p.fill_(0.1)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zero:
                p.copy_(value)
            for p, value, grad in kept:
                p.copy_(value)
                p.grad = grad


def _closed(p: Tensor) -> bool:
    """Whether all values are one that is nearly zero."""
    return bool(p.numel()) and bool((p == p.flatten()[0]).all()) and bool(p.abs().max() <= 1e-3)


def _perturb(handle: Handle, seed: int) -> None:
    perturb(handle.trained().values(), seed)


def perturb(trained: Iterable[Tensor], seed: int) -> None:
    """Moves trained tensors off their start, where a zero `up` gives `down` no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained:
            noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            spread = float(p.float().std()) if p.numel() > 1 else 0.0
            p.add_(noise * (0.02 + 0.1 * spread))


def _liveness(handle: Handle, run: Runner) -> tuple[list[dict[str, Any]], float]:
    trained, exempt = handle.trained(), _exempt(handle)
    size = gradients(trained, run)
    largest = max(size.values(), default=0.0)
    small = [n for n in trained if 0 < size[n] <= ALIVE * largest and n not in exempt]
    moving = _alive_in_double(handle, run, small) if small else set()
    rows = []
    for name, p in trained.items():
        state = "alive" if size[name] > ALIVE * largest or name in moving else exempt.get(name, "dead")
        if not p.numel():
            state = "exempt: it holds nothing"
        if state == "dead" and name.startswith(("tensors.", "base.")) and not _base_uses(run, handle, name):
            state = "exempt: the model never uses it"
        relative = size[name] / largest if largest else 0.0
        rows.append(
            {"name": name, "kind": handle.kind(name), "values": p.numel(), "gradient": relative, "state": state}
        )
    return rows, largest


def gradients(trained: dict[str, nn.Parameter], run: Runner) -> dict[str, float]:
    """The largest value in the gradient of each tensor."""
    for p in trained.values():
        p.grad = None
    with torch.enable_grad():
        loss = run.read_out()
        if loss.requires_grad:
            loss.backward()
    return {n: 0.0 if p.grad is None or not p.numel() else float(p.grad.abs().max()) for n, p in trained.items()}


def _alive_in_double(handle: Handle, run: Runner, names: list[str]) -> set[str]:
    """Those whose gradient is small, as that of a factor among several small ones, and not rounding noise: it is there
    in float64 as well. Looked at on a copy, in the few cases where there is a doubt."""
    twin = copy.deepcopy(handle.model).double()
    try:
        with _arguments(twin, lambda v: v.double() if v.is_floating_point() else v):
            size = gradients(get_handle(twin, handle.name).trained(), Runner(twin, run.forward, run.seed))
    except (RuntimeError, TypeError):  # a model that mixes precisions by itself
        return set()
    return {n for n in names if size[n] > 1e-6 * ALIVE * max(size.values())}


def _exempt(handle: Handle) -> dict[str, str]:
    """Names of trained tensors that may have no gradient, and why."""
    biases, branches = [], []  # of keys: tensors of the base, and branches that may shift (SSF)
    with contextlib.suppress(LookupError):
        for site in find_sites(handle.model, "attn.k"):
            branches.append(site.key)
            if site.bias and site.rows is None:
                biases.append(tensor_key(site.path, site.bias))
        for name, module in handle.model.named_modules():
            if name.rpartition(".")[2] in ("k_norm", "norm_k") and isinstance(module, nn.LayerNorm):
                branches.append(tensor_key(name))
                biases.append(tensor_key(name, "bias"))
            if hasattr(module, "calc_head") and len(module.attention):  # MONAI's MILModel: one score an instance
                biases.append(tensor_key(f"{name}.attention.{len(module.attention) - 1}".lstrip("."), "bias"))
    names = [f"{prefix}.{key}" for key in biases for prefix in ("tensors", "base")]
    names += [f"branches.{key}.shift" for key in branches]
    found = dict.fromkeys(names, "exempt: softmax does not see this bias")
    for key, branch in handle.adapter.branches.items():
        for name, reason in getattr(branch, "exempt", {}).items():
            found[f"branches.{key}.{name}"] = f"exempt: {reason}"
    return found


def _base_uses(run: Runner, handle: Handle, name: str) -> bool:
    """Whether the plain backbone's output depends on the base tensor that an adapter holds a copy of."""
    path, param = split_key(name.partition(".")[2])
    tensor = handle.model.get_submodule(path)._parameters[param]
    with handle.disabled(), torch.no_grad():
        before, value = run.values(), tensor.detach().clone()
        generator = torch.Generator().manual_seed(run.seed)
        tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor))
        after = run.values()
        tensor.copy_(value)
    return difference(before, after) > 0


def _stochastic(handle: Handle) -> bool:
    """Whether train mode differs from eval mode by design: dropout or batch statistics among what trains."""
    modules = (
        handle.model.modules()
        if handle.adapter.kept is not None
        else [
            *handle.adapter.modules(),
            *(m for path in handle.adapter.head for m in handle.model.get_submodule(path).modules()),
        ]
    )
    kinds = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
    found = any(isinstance(m, kinds) or _rate(m) or getattr(m, "stochastic", False) for m in modules)
    return found or handle.adapter.kept is not None


def _rate(module: nn.Module) -> float:
    rate = getattr(module, "dropout", 0.0)
    return rate if isinstance(rate, (int, float)) else 0.0


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference, relative to the first one's largest value where that is above 1."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    return max(
        (float((x - y).abs().max() / x.abs().max().clamp(min=1.0)) for x, y in zip(a, b, strict=True)), default=0.0
    )


# ---- the contract


def contract(build: Callable, method: str, **settings: Any) -> dict[str, str]:
    """Runs every promise of a method on fresh copies of one host; {promise: what was found}. Raises AssertionError.

    build: makes the same host each time (adaptsuite.testing.TinyHost: model, args, kwargs, forward), batch first.
    """
    facts: dict[str, str] = {}
    for check in _PROMISES:
        host = build()
        torch.manual_seed(0)
        handle = attach(host.model, method, sample=(host.args, host.kwargs), **settings)
        facts[check.__name__.strip("_")] = check(handle, host, lambda: build().model) or "ok"
    if handle.shadow_sites:
        facts["shadow_sites"] = f"{len(handle.shadow_sites)} of {len(handle.sites)}"
    return facts


def _output(handle: Handle, host) -> Tensor:
    with torch.no_grad():
        return host.forward(handle.model).clone()


def _starts_equal(handle: Handle, host, build) -> str | None:
    if not handle.method.identity_at_start:
        return "not promised"
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it rounds otherwise, and branches may need the plain one
    try:
        with torch.no_grad():
            # some kernels round otherwise when a weight needs a gradient
            plain = host.forward(build().requires_grad_(handle.method.in_place))
        adapted = _output(handle, host)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert torch.equal(adapted, plain), "the adapted host differs from the backbone at the start"


def _trains_what_it_says(handle: Handle, host, build) -> str:
    found = verify(handle, host.forward, fresh=True)
    assert found.ok, found.problems
    exempt = [r for r in found.rows if r["state"] != "alive"]
    return f"{len(found.rows)} tensors" + (f", {len(exempt)} exempt" if exempt else "")


def _leaves_the_base(handle: Handle, host, build) -> None:
    """Two steps move what trains and nothing else; after detach the base is there bit by bit."""
    model, fresh = handle.model, build()
    before = {k: v.clone() for k, v in base_state(model).items()}
    start = {k: v.clone() for k, v in handle.state().items()}
    flags = {n: p.requires_grad for n, p in fresh.named_parameters()}
    optimizer = torch.optim.SGD([p for g in handle.trainable() for p in g["params"]], lr=1e-3)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        out = host.forward(model)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        optimizer.step()
    model.eval()
    assert any(not torch.equal(v, start[k]) for k, v in handle.state().items()), "two steps changed nothing"
    if handle.adapter.kept is None:
        for k, v in base_state(model).items():
            assert torch.equal(v, before[k]), f"{k} of the frozen base moved"
    handle.detach()
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), f"{k} differs after detach"
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags, "detach left other requires_grad flags"
    with torch.no_grad():
        assert torch.equal(host.forward(model), host.forward(fresh)), "the output differs after detach"


def _saves(handle: Handle, host, build) -> None:
    from adaptsuite.artifact import load_adapter, save_adapter

    _perturb(handle, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(handle, Path(folder) / "adapter")
        other = load_adapter(build(), Path(folder) / "adapter", sample=(host.args, host.kwargs))
    assert torch.equal(_output(other, host), _output(handle, host)), "the reloaded adapter gives another output"


def _merges(handle: Handle, host, build) -> str | None:
    _perturb(handle, seed=1)
    before = _output(handle, host)
    if handle.method.mergeable is not True:
        try:
            handle.merge()
        except UsageError as e:
            assert str(handle.method.mergeable) in str(e), "merge refuses without the method's reason"
            return "refused with its reason"
        raise AssertionError("merge did not refuse")
    try:
        handle.merge()
    except UsageError as e:
        assert "tied" in str(e), e
        return "refused: tied weight"
    gap = difference([before], [_output(handle, host)])
    assert gap <= AGREE, f"merged output differs by {gap:.1e}"
    handle.unmerge()
    assert torch.equal(_output(handle, host), before), "unmerge is not exact"
    return f"{gap:.0e}"


def _ignores_batch_order(handle: Handle, host, build) -> None:
    _perturb(handle, seed=1)
    plain = _output(handle, host)
    with _arguments(handle.model, lambda v: v.flip(0)):
        flipped = _output(handle, host)
    gap = difference([plain], [flipped.flip(0)])
    assert gap <= AGREE, f"the order of the batch matters: {gap:.1e}"


def _halves(handle: Handle, host, build) -> None:
    _perturb(handle, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = host.forward(handle.model)
    assert out.isfinite().all(), "not finite under bfloat16 autocast"


def _copies(handle: Handle, host, build) -> None:
    """A deep copy and a pickled copy act alike and on their own tensors."""
    _perturb(handle, seed=1)
    before = _output(handle, host)
    twins = [copy.deepcopy(handle.model)]
    if _can_pickle(build()):
        twins.append(_pickled(handle.model))
    for twin in twins:
        other = get_handle(twin)
        assert torch.equal(_output(other, host), before), "a copy gives another output"
        _perturb(other, seed=2)
        assert not torch.equal(_output(other, host), before), "a copy's adapter does not act on the copy"
        assert torch.equal(_output(handle, host), before), "a copy's adapter acts on the original"


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _can_pickle(model: nn.Module) -> bool:
    """torch refuses parametrised modules (weight norm), with an adapter and without."""
    return not any(nn.utils.parametrize.is_parametrized(m) for m in model.modules())


@contextlib.contextmanager
def _arguments(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Changes every tensor argument of the root."""

    def before(module, args, kwargs):
        turn = lambda v: change(v) if isinstance(v, Tensor) else v  # noqa: E731
        return tuple(turn(a) for a in args), {k: turn(v) for k, v in kwargs.items()}

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


_PROMISES = (
    _starts_equal,
    _trains_what_it_says,
    _leaves_the_base,
    _saves,
    _merges,
    _ignores_batch_order,
    _halves,
    _copies,
)
