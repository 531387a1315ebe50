"""The bank: everything that adapters own on a host, and the hooks that make the active ones act.

A `Port` changes what a called module returns. A `Shadow` puts effective parameters into a module's `__dict__` (which
wins over its parameters) while the nearest called module around it runs, for weights that are read without a call and
for base tensors that an adapter trains as copies. The base keeps its class, its keys and its parameters.
"""

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.errors import nearest
from adaptsuite.grid import TABLES, Shrink, cut, refuse_shrink
from adaptsuite.method import Method
from adaptsuite.packed import attend
from adaptsuite.sites import Site, component_info, find_sites, patch_maps

BANK = "adapter_bank"


@dataclass(frozen=True, eq=False)
class Context:
    """What branches may need beside the tokens of one forward; replaced, never changed in place."""

    token_mask: Tensor | None = None  # (B, T) bool, True where a token is real
    features: Tensor | None = None  # another modality's, (B, D) or (B, N, D)
    grids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # component, or block with its own: as embedded
    grid: tuple[int, ...] | None = None  # that a branch with `needs_grid` stands on
    index: Tensor | None = None  # (B,) place of each row's adapter among the active ones (adaptsuite.per_sample)
    wiring: int = -1  # number of the Wiring that the index was given for
    recomputed: bool = False  # the forward runs again during backward (checkpointing): statistics were taken already

    def anew(self, **fields: Any) -> "Context":
        """Another one, for rows of the same adapters."""
        return Context(index=self.index, wiring=self.wiring, **fields)


EMPTY = Context()

# The contexts of this thread (or task) by number of the bank: threads that share a host do not see each other's.
_contexts: ContextVar[Mapping[int, Context]] = ContextVar("contexts", default={})  # noqa: B039 (never changed in place)
_numbers = itertools.count()
_local = threading.local()  # what one thread keeps between two hooks
_lock = threading.Lock()


class Adapter(nn.Module):
    """One adapter: branches by site key, trained copies of base tensors by path with "/" for dots."""

    def __init__(self, method: Method, sites: list[Site], head: tuple[str, ...]):
        super().__init__()
        self.method, self.head = method, head
        self.sites = {s.key: s for s in sites}
        self.branches = nn.ModuleDict()
        self.tensors = nn.ParameterDict()
        self.moved = nn.Module()  # buffers of modules that train, such as BatchNorm statistics
        self.kinds: dict[str, str] = {}  # key of a held tensor -> adapter | norm | head
        self.rates: dict[str, float] = {}  # path in the host -> factor of the learning rate of what trains below it
        self.kept: dict[str, Tensor] | None = None  # the base's own values, where it is trained in place
        self.total_steps: int | None = None  # of the training that runs, or ran last

    def hold(self, root: nn.Module, path: str, param: str, kind: str) -> None:
        """Trains a copy of a base parameter; absent parameters (bias=False) are passed over."""
        value, key = root.get_submodule(path)._parameters[param], tensor_key(path, param)
        if value is not None and key not in self.tensors:
            self.tensors[key] = nn.Parameter(value.detach().clone())
            self.kinds[key] = kind

    def hold_buffer(self, root: nn.Module, path: str, name: str) -> None:
        value = root.get_submodule(path)._buffers[name]
        if value is not None and name not in root.get_submodule(path)._non_persistent_buffers_set:
            self.moved.register_buffer(tensor_key(path, name), value.detach().clone())

    def keep(self, root: nn.Module) -> None:
        """Remembers every base tensor before they are trained in place."""
        self.kept = {k: v.detach().clone() for k, v in base_state(root).items()}
        base = [n for n, _ in root.named_parameters() if is_base(n)]
        self.in_place_names = [n for n in base if tensor_key(n) not in self.tensors]

    def rate_at(self, place: str) -> float:
        """The factor of the nearest path at or above a place; 1 where none is set."""
        return next((self.rates[path] for path in (*_upwards(place), "") if path in self.rates), 1.0)

    def num_trained(self) -> int:
        return sum(p.numel() for p in self.parameters()) + len(self.kept or ())

    def weight_branches(self) -> dict[tuple[str, str], list[tuple[Site, nn.Module]]]:
        """(path, parameter name) -> the branches that change it."""
        found: dict[tuple[str, str], list] = {}
        for key, branch in self.branches.items():
            for param in weight_params(self.sites[key], branch):
                found.setdefault((self.sites[key].path, param), []).append((self.sites[key], branch))
        return found


def weight_params(site: Site, branch: nn.Module) -> list[str]:
    """Names of the site's parameters that a branch changes by `delta`, `row_gain` or `row_shift`."""
    found = [site.weight or "weight"] if hasattr(branch, "delta") or hasattr(branch, "row_gain") else []
    shifts = hasattr(branch, "row_gain") or hasattr(branch, "row_shift")
    return [*found, site.bias] if shifts and site.bias else found


class Bank(nn.Module):
    """All adapters of one host, and the hooks that make the active ones act."""

    def __init__(self, root: nn.Module):
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: list[str] = []
        self.by_row = None  # adaptsuite.per_sample.Wiring, where each row of a batch has its own of the active ones
        self.merged: str | None = None
        self.number = next(_numbers)
        # The context that a forward sets while it is compiled, and what it was before: the graph leaves none behind.
        self.traced: Context | None = None
        self.outer: Context | None = None
        self.recalled: dict[int, Context] = {}  # backward that runs now (its graph task) -> its forward's context
        self.called: set[str] = set()
        # component -> ((block, number of the adapter), what its branch does to the grid)
        self.shrinks: dict[str, list[tuple[tuple[int, int], Shrink]]] = {}
        self.hooks: list = []
        self.__dict__["root"] = root  # not a submodule of its own submodule
        self.lean = None  # adaptsuite.lean.Around, once forwards save less
        self.flags = {n: p.requires_grad for n, p in root.named_parameters()}
        self.nested = [m for m in root.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
        for m in self.nested:  # the nested-tensor path reads weights past every hook
            m.use_nested_tensor = False
        self.training = root.training
        self.root_is_task = all(c.prefix for c in component_info(root))  # a task model around backbones
        root.add_module(BANK, self)
        root.__dict__["train"] = self.train_host
        self.fixed_hooks = [
            root.register_load_state_dict_post_hook(self.forget_missing),
            root.register_forward_hook(self.keep_context),
            root.register_forward_pre_hook(self.start_tracing),
            root.register_forward_hook(self.end_tracing),
            *(m.register_forward_hook(self.open_gradient) for m in _embeddings(root)),
        ]

    def __getstate__(self) -> dict[str, Any]:
        carried = None if self.context is EMPTY else self.context
        return {**self.__dict__, "traced": None, "recalled": {}, "carried": carried}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy starts with the original's context, and both go their own ways."""
        carried = state.pop("carried")
        super().__setstate__({**state, "number": next(_numbers)})
        if carried is not None:
            self.context = carried

    # ---- the context of the forward, or of the backward, that this thread is in

    @property
    def context(self) -> Context:
        if self.traced is not None:
            return self.traced
        if self.recalled and not torch.compiler.is_compiling() and (task := self._task()) is not None:
            return self.recalled[task]
        return _contexts.get().get(self.number, EMPTY)

    @context.setter
    def context(self, context: Context) -> None:
        if torch.compiler.is_compiling():  # dynamo reads ContextVars and cannot write them
            self.traced = context
        elif self.recalled and (task := self._task()) is not None:
            self.recalled[task] = context
        else:
            others = {number: c for number, c in _contexts.get().items() if number != self.number}
            _contexts.set(others if context is EMPTY else {**others, self.number: context})

    def _task(self) -> int | None:
        """Key in `recalled` of the backward that this thread is in; of a backward within one, that of the last."""
        task = torch._C._current_graph_task_id()
        return None if task < 0 else task if task in self.recalled else next(reversed(self.recalled))

    @contextlib.contextmanager
    def using(self, **context: Any) -> Iterator[None]:
        """Context for what runs inside the `with`: `token_mask`, `features`."""
        with self.within(self.context.anew(**context)):
            yield

    @contextlib.contextmanager
    def within(self, context: Context) -> Iterator[None]:
        before, traced = self.context, self.traced
        self.context = context
        try:
            yield
        finally:
            if torch.compiler.is_compiling():
                self.traced = traced
            else:
                self.context = before

    # ---- what acts

    def activate(self, names: Sequence[str], by_row=None) -> None:
        """Makes exactly these adapters act, in this order; the others are frozen (DDP needs that).

        by_row: their adaptsuite.per_sample.Wiring, where each acts on its own rows.
        """
        for n in names:
            if n not in self.adapters:
                raise LookupError(f"no adapter {n!r} on this model; {nearest(n, self.adapters)}")
        self.active, self.by_row = list(names), by_row
        in_place = [a for n, a in self.adapters.items() if a.kept is not None and n in names]
        trained = {n for a in in_place for n in a.in_place_names}
        for n, p in self.root.named_parameters():
            if is_base(n):
                p.requires_grad_(n in trained)
        for n, adapter in self.adapters.items():
            adapter.requires_grad_(n in names)
        self.wire()
        self.root.train(self.training)

    def wire(self) -> None:
        """Places the hooks anew for the active adapters."""
        if "torch._dynamo" in sys.modules:  # a graph compiled before would go on without these hooks, silently
            torch._dynamo.reset()
        for h in reversed(self.hooks):
            h.remove()
        self.hooks = []
        names = [n for n in self.active if n != self.merged]
        ports, shadows = self._together(names) if self.by_row is None else (self.by_row.ports, {})
        self._watch_grids(names)
        for path, shadow in shadows.items():
            module = self.root.get_submodule(path)
            self.hooks.append(module.register_forward_pre_hook(shadow.before))
            self.hooks.append(module.register_forward_hook(shadow.after, always_call=True))
        for (path, packed), port in ports.items():
            if packed:
                port.stand_in(self.root.get_submodule(path))
                self.hooks.append(port)
                continue
            if port.around():
                module = self.root.get_submodule(path)
                self.hooks.append(module.register_forward_pre_hook(port.enter, with_kwargs=True))
                self.hooks.append(module.register_forward_hook(port.exit, always_call=True))
            for carrier in port.carriers():
                module = self.root.get_submodule(carrier)
                self.hooks.append(module.register_forward_pre_hook(port.catch, with_kwargs=True))
            module = self.root.get_submodule(path)
            self.hooks.append(module.register_forward_hook(port.after, with_kwargs=True))
        if self.by_row is not None:
            self.hooks.append(self.root.register_forward_pre_hook(self.by_row.check_batch, with_kwargs=True))
            self.hooks += [s.place(self.root.get_submodule(path)) for path, s in self.by_row.shadows.items()]

    def _together(self, names: Sequence[str]) -> tuple[dict[tuple[str, bool], "Port"], dict[str, "Shadow"]]:
        """Ports and shadows by path where all active adapters act on all rows."""
        ports: dict[tuple[str, bool], Port] = {}
        shadows: dict[str, Shadow] = {}
        if self.merged in self.active:
            for site, branch in self.rests(self.merged):
                self._port_of(ports, site, branch).add(self.merged, site, branch)
        for name in names:
            adapter = self.adapters[name]
            shadowed = set()
            for key, branch in adapter.branches.items():
                site = adapter.sites[key]
                if self.acts_by_call(site, branch):
                    self._port_of(ports, site, branch).add(name, site, branch)
                else:
                    shadowed |= {(site.path, param) for param in weight_params(site, branch)}
            held = [split_key(k) for k in (*adapter.tensors, *adapter.moved._buffers)]
            for path, param in (*sorted(shadowed), *held):
                owner = self.owner(path)
                changes = self.changes(path, param, names, shadow=True)
                shadows.setdefault(owner, Shadow()).add(self.root.get_submodule(path), path, param, changes)
        return ports, shadows

    def _port_of(self, ports: dict[tuple[str, bool], "Port"], site: Site, branch: nn.Module) -> "Port":
        packed = self.packed(site, branch)
        key = (site.path if packed is None else packed, packed is not None)
        return ports.setdefault(key, Port(self) if packed is None else PackedPort(self))

    def rests(self, name: str) -> list[tuple[Site, nn.Module]]:
        """The branches that leave something for every sample to add when the weights have taken the rest."""
        adapter = self.adapters[name]
        return [(adapter.sites[k], b) for k, b in adapter.branches.items() if hasattr(b, "rest")]

    # ---- the grid of image tokens (adaptsuite.grid)

    def _watch_grids(self, names: Sequence[str]) -> None:
        """Hooks that put the grid of each forward into its context, and cut what later blocks are given by it."""
        branches = [(n, a.sites[k], b) for n in names for a in [self.adapters[n]] for k, b in a.branches.items()]
        self.shrinks = {}
        for name, site, branch in branches:
            if getattr(branch, "shrink", None) is not None:
                place = (site.block, names.index(name))
                self.shrinks.setdefault(site.component, []).append((place, branch.shrink))
        if not self.shrinks and not any(getattr(b, "needs_grid", False) for *_, b in branches):
            return
        for component, path in patch_maps(self.root).items():
            hook = partial(self._see_map, component)
            self.hooks.append(self.root.get_submodule(path).register_forward_hook(hook))
        for site in find_sites(self.root, "block"):
            module, shrinks = self.root.get_submodule(site.path), self._shrinks_before(site)
            self.hooks.append(module.register_forward_pre_hook(partial(self._see_block, site.path)))
            if shrinks or any(block == site.block for (block, _), _ in self.shrinks.get(site.component, ())):
                refuse_shrink(site.path, module)
            if shrinks:
                hook = partial(self._cut_tables, site.component, shrinks)
                self.hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _shrinks_before(self, site: Site, name: str | None = None) -> list[Shrink]:
        """What was done to the grid before a site; name: of the adapter that acts there, behind the others."""
        end = (site.block, self.active.index(name) if name in self.active and site.role == "block" else -1)
        found = [item for item in self.shrinks.get(site.component, ()) if item[0] < end]
        return [shrink for _, shrink in sorted(found, key=lambda item: item[0])]

    def _see_map(self, component: str, module: nn.Module, args, output) -> None:
        if isinstance(output, Tensor) and output.ndim > 3:
            self._see(component, tuple(output.shape[2:]))

    def _see_block(self, path: str, module: nn.Module, args) -> None:
        """Hosts whose blocks keep (B, *grid, D)."""
        if args and isinstance(args[0], Tensor) and args[0].ndim > 3:
            self._see(path, tuple(args[0].shape[1:-1]))

    def _see(self, key: str, grid: tuple[int, ...]) -> None:
        if self.context.grids.get(key) != grid:
            self.context = replace(self.context, grids={**self.context.grids, key: grid})

    def _cut_tables(self, component: str, shrinks: list[Shrink], module: nn.Module, args, kwargs):
        grid = self.context.grids.get(component)
        return args, {k: cut(v, grid, shrinks) if k in TABLES and grid else v for k, v in kwargs.items()}

    def context_at(self, name: str, site: Site, branch: nn.Module) -> Context:
        """The context of one branch of an adapter, with the grid that it stands on where it needs one."""
        if not getattr(branch, "needs_grid", False):
            return self.context
        return replace(self.context, grid=self.grid_at(site, name))

    def grid_at(self, site: Site, name: str | None = None) -> tuple[int, ...] | None:
        """The grid that a site stands on, in the forward that runs or ran last; None where the host tells none."""
        grids = self.context.grids
        for path in _upwards(site.path):  # a block that keeps its grid tells it itself
            if path in grids and path != site.component:
                return grids[path]
        return _after(grids.get(site.component), self._shrinks_before(site, name))

    def final_grid(self, component: str) -> tuple[int, ...] | None:
        """The grid behind a component's last block, in the forward that ran last."""
        shrinks = sorted(self.shrinks.get(component, ()), key=lambda item: item[0])
        return _after(self.context.grids.get(component), [shrink for _, shrink in shrinks])

    def is_called(self, path: str) -> bool:
        return path in self.called

    def acts_by_call(self, site: Site, branch: nn.Module) -> bool:
        """Whether a port serves this branch; otherwise a shadow of the weight does."""
        if self.packed(site, branch) is not None:
            return True
        plain = (
            site.weight in (None, "weight") and site.layout != "conv"
        )  # what the module returns is the weight's work
        return plain and has_forward(branch) and self.is_called(site.path)

    def packed(self, site: Site, branch: nn.Module) -> str | None:
        """Path of the nn.MultiheadAttention that a branch with `inside_attention` has to stand in; None: of none."""
        path = site.path.rpartition(".")[0] if site.role.endswith(".out") else site.path
        inside = getattr(branch, "inside_attention", False) and site.weight is not None
        found = inside and isinstance(self.root.get_submodule(path), nn.MultiheadAttention) and self.is_called(path)
        return path if found and site.role.rpartition(".")[2] in ("q", "k", "v", "out") else None

    def owner(self, path: str) -> str:
        """The nearest module at or above `path` that is called: it is recomputed together with its weights."""
        while path and not self.is_called(path):
            path = path.rpartition(".")[0]
        return path

    def changes(self, path: str, param: str, names: Sequence[str], shadow: bool = False) -> list["Change"]:
        """What these adapters do to one base tensor, in order: each one's copy first, then its deltas.

        With shadow=True deltas that a port adds to the module's output are left out.
        """
        found: list[Change] = []
        for adapter in (self.adapters[n] for n in names):
            key = tensor_key(path, param)
            if key in adapter.tensors or key in adapter.moved._buffers:
                found.append((adapter, key))
            for site, branch in adapter.weight_branches().get((path, param), ()):
                if not (shadow and self.acts_by_call(site, branch)):
                    found.append((site, branch))
        return found

    # ---- what the host does meanwhile

    def train_host(self, mode: bool = True) -> nn.Module:
        """`train` of the root: adapters and heads follow; the frozen base keeps its dropout and statistics off."""
        live = {id(m) for m in self.modules()}
        if self.root_is_task:  # it is not frozen itself
            live.add(id(self.root))
        everything = False
        for name in self.active:
            adapter = self.adapters[name]
            everything |= adapter.kept is not None
            live |= {id(self.root.get_submodule(split_key(k)[0])) for k in adapter.moved._buffers}
            live |= {id(m) for path in adapter.head for m in self.root.get_submodule(path).modules()}
        for m in self.root.modules():
            m.training = mode and (everything or id(m) in live or _checkpoints(m))
        return self.root

    def open_gradient(self, module: nn.Module, args, output):
        """Reentrant checkpointing drops all gradients below an input that needs none: make the embedding need one."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        flags = ("grad_checkpointing", "gradient_checkpointing")
        if any(getattr(m, flag, False) for m in self.root.modules() for flag in flags):
            for t in tensors_in(output):
                if t.is_floating_point() and not t.requires_grad:
                    t.requires_grad_(True)

    def keep_context(self, module: nn.Module, args, output) -> None:
        self.pin(output)

    def pin(self, output) -> None:
        """Backward may recompute blocks after another forward has set another context: restore this forward's."""
        context = self.context
        if context is EMPTY or torch.compiler.is_compiling():
            return
        again = replace(context, recomputed=True)

        def restore(grad):
            task = torch._C._current_graph_task_id()
            if task not in self.recalled:
                torch.autograd.Variable._execution_engine.queue_callback(partial(self.recalled.pop, task, None))
            self.recalled[task] = again

        for t in tensors_in(output):
            if t.requires_grad:
                t.register_hook(restore)

    def start_tracing(self, module: nn.Module, args) -> None:
        self.outer = self.traced

    def end_tracing(self, module: nn.Module, args, output) -> None:
        self.traced, self.outer = self.outer, None

    def forget_missing(self, module: nn.Module, incompatible) -> None:
        """A checkpoint of the plain backbone loads strictly on an adapted host; adapters load by `load_adapter`."""
        missing = incompatible.missing_keys
        if any(is_base(k) for k in missing) or missing == []:
            return
        missing[:] = [k for k in missing if is_base(k)]

    def release(self) -> None:
        """Takes everything off the root; the base is as it was, bit by bit."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        for h in (*self.hooks, *self.fixed_hooks):
            h.remove()
        for m in self.nested:
            m.use_nested_tensor = True
        self.context = EMPTY
        training = self.training
        del self.root._modules[BANK], self.root.__dict__["train"]
        for n, p in self.root.named_parameters():
            p.requires_grad_(self.flags.get(n, p.requires_grad))
        self.root.train(training)


class Port:
    """Everything that active adapters do to what one module returns."""

    def __init__(self, bank: Bank):
        self.bank = bank
        self.table: dict[str, list[tuple[Site, nn.Module]]] = {}
        self.caught: Tensor | None = None  # while it is compiled; else `_local` keeps it, for each thread its own

    def add(self, name: str, site: Site, branch: nn.Module) -> None:
        self.table.setdefault(name, []).append((site, branch))

    def around(self) -> list[nn.Module]:
        """Branches that act on what the module gets, before it runs: `enter`, and `exit` whatever happened."""
        return [b for rows in self.table.values() for _, b in rows if hasattr(b, "enter")]

    def enter(self, module: nn.Module, args, kwargs):
        for branch in self.around():
            args, kwargs = branch.enter(module, args, kwargs)
        return args, kwargs

    def exit(self, module: nn.Module, args, output) -> None:
        for branch in reversed(self.around()):
            branch.exit(module)

    def carriers(self) -> list[str]:
        return list(dict.fromkeys(s.carrier[0] for rows in self.table.values() for s, _ in rows if s.carrier))

    def catch(self, module: nn.Module, args, kwargs) -> None:
        """Keeps the site's input on hosts whose residual sits inside the module around it (BERT)."""
        site = next(s for rows in self.table.values() for s, _ in rows if s.carrier)
        index = site.carrier[1]
        x = args[index] if len(args) > index else list(kwargs.values())[index - len(args)]
        if torch.compiler.is_compiling():
            self.caught = x
        else:
            _local.__dict__[id(self)] = x

    def after(self, module: nn.Module, args, kwargs, output):
        y = first = _first(output)
        caught = self.caught if torch.compiler.is_compiling() else _local.__dict__.pop(id(self), None)
        for name, rows in self.table.items():
            parts = []
            for site, branch in rows:
                x = caught if site.carrier else _first(args if args else tuple(kwargs.values()))
                part = y if site.rows is None else y[..., site.rows[0] : site.rows[1]]
                parts.append((site.rows, self.run(name, site, branch, x, part, site.batch_first)))
            y = _join(y, parts)
        self.caught = None
        return _with_first(output, y) if y is not first else None

    def run(self, name: str, site: Site, branch: nn.Module, x: Tensor, y: Tensor, batch_first: bool = True) -> Tensor:
        """What a branch makes of y; of a merged adapter's, what its weights do not say."""
        call = branch.rest if name == self.bank.merged else branch
        return _run(branch, call, x, y, self.bank.context_at(name, site, branch), batch_first)


class PackedPort(Port):
    """Stands in for the forward of an nn.MultiheadAttention, whose projections no hook can see."""

    def stand_in(self, module: nn.MultiheadAttention) -> None:
        self.module = module
        module.__dict__["forward"] = self.forward
        self.mark = module.register_forward_pre_hook(_nothing)  # torch's fused encoder layer passes by what has none

    def remove(self) -> None:
        del self.module.__dict__["forward"]
        self.mark.remove()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
        return attend(self.module, self.change, query, key, value, *args, **kwargs)

    def change(self, part: str, x: Tensor, y: Tensor) -> Tensor:
        for name, rows in self.table.items():
            for site, branch in rows:
                if site.role.rpartition(".")[2] == part:
                    y = self.run(name, site, branch, x, y)
        return y


def _nothing(module: nn.Module, args) -> None:
    """Stays at a module only to be seen."""


# (adapter, key of a tensor it holds) or (site, branch that changes its weight or bias)
Change = tuple[Adapter, str] | tuple[Site, nn.Module]


class Shadow:
    """Effective parameters, in their modules' `__dict__` only while the module around them runs."""

    def __init__(self):
        self.entries: dict[tuple[str, str], tuple[nn.Module, list[Change]]] = {}
        self.running = 0  # forwards of several threads

    def add(self, module: nn.Module, path: str, param: str, changes: list[Change]) -> None:
        self.entries[path, param] = (module, changes)

    def before(self, module: nn.Module, args) -> None:
        self._count(1)
        for (_, param), (target, changes) in self.entries.items():
            target.__dict__[param] = effective(target, param, changes)

    def after(self, module: nn.Module, args, output) -> None:
        if self._count(-1) <= 0:  # the last thread puts out the light
            for (_, param), (target, _) in self.entries.items():
                target.__dict__.pop(param, None)

    def _count(self, step: int) -> int:
        if torch.compiler.is_compiling():
            return 0
        with _lock:
            self.running = max(0, self.running + step)
        return self.running


def effective(module: nn.Module, param: str, changes: list[Change]) -> Tensor:
    """The value of a base tensor under these changes, in the base's dtype."""
    value = module._parameters[param] if param in module._parameters else module._buffers[param]
    for holder, change in changes:
        if isinstance(holder, Site):
            value = changed(value, holder, change, param)
        elif change in holder.tensors:
            value = holder.tensors[change].to(value.dtype)
        else:
            value = holder.moved._buffers[change]
    return value


# ---- tensors of the base


def get_bank(model: nn.Module) -> Bank:
    bank = getattr(model, BANK, None)
    if bank is None:
        raise LookupError("this model has no adapters")
    return bank


def is_base(name: str) -> bool:
    return not name.startswith(BANK + ".")


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """state_dict of the backbone alone, as it was before `attach`: for saving it beside its adapters."""
    return {k: v for k, v in model.state_dict().items() if is_base(k)}


def copy_base(model: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for k, v in base_state(model).items():
            v.copy_(state[k])


def _after(grid: tuple[int, ...] | None, shrinks: Sequence[Shrink]) -> tuple[int, ...] | None:
    for shrink in shrinks if grid else ():
        grid = shrink.of(grid)
    return grid


def _upwards(path: str) -> Iterator[str]:
    """A path and those of its ancestors, without the root's."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def tensor_key(path: str, param: str = "") -> str:
    return ".".join(p for p in (path, param) if p).replace(".", "/")


def split_key(key: str) -> tuple[str, str]:
    path, _, param = key.replace("/", ".").rpartition(".")
    return path, param


def changed(value: Tensor, site: Site, branch: nn.Module, param: str) -> Tensor:
    """A site's weight or bias as a branch makes it, in its own layout and dtype: row_gain * value + delta or row_shift.

    delta is (dim_out, dim), the others are (dim_out,), all of them for the site's rows only.
    """
    kind, bias = value.dtype, param == site.bias
    across = value.ndim - 1 if bias or site.layout == "conv1d" else 0  # the dimension of the output features

    def placed(change: Tensor) -> Tensor:
        start, stop = site.rows or (0, value.shape[across])
        after = change.ndim - 1 - across  # F.pad counts from the last dimension
        return nn.functional.pad(change, [0, 0] * after + [start, value.shape[across] - stop])

    if hasattr(branch, "row_gain"):
        gain = placed(branch.row_gain() - 1) + 1
        value = value * gain.view(*(-1 if i == across else 1 for i in range(value.ndim)))
    change = getattr(branch, "row_shift" if bias else "delta", None)
    if change is not None:
        change = change()
        if not bias:
            change = change.T if site.layout == "conv1d" else change.reshape(-1, *value.shape[1:])
        value = value.to(torch.promote_types(value.dtype, change.dtype)) + placed(change)
    return value.to(kind)


# ---- what modules get and give


def has_forward(branch: nn.Module) -> bool:
    return "forward" in type(branch).__dict__ or type(branch).forward is not nn.Module.forward


def _run(branch: nn.Module, call: Callable, x: Tensor, y: Tensor, context: Context, batch_first: bool) -> Tensor:
    """call(x, y) of a branch, with tokens as (B, T, D), in the branch's own precision unless autocast chooses one."""
    dtype = y.dtype
    if not batch_first and y.ndim == 3:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    own = next((p.dtype for p in branch.parameters()), dtype)
    if own != dtype and not torch.is_autocast_enabled(y.device.type):
        x, y = x.to(own), y.to(own)
    out = call(x, y, context).to(dtype)
    return out.transpose(0, 1) if not batch_first and out.ndim == 3 else out


def _join(y: Tensor, parts: list[tuple[tuple[int, int] | None, Tensor]]) -> Tensor:
    """Puts the changed parts of a fused output into their places, by one concatenation."""
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    pieces, at = [], 0
    for rows, part in sorted(parts, key=lambda p: p[0]):
        pieces += [y[..., at : rows[0]], part] if rows[0] > at else [part]
        at = rows[1]
    return torch.cat([*pieces, y[..., at:]] if at < y.shape[-1] else pieces, dim=-1)


def _first(output) -> Tensor:
    """The tokens among what a module got or gave: itself, the first of a tuple, the first value of a mapping."""
    if isinstance(output, Tensor):
        return output
    return _first(next(iter(output.values())) if hasattr(output, "values") else output[0])


def _with_first(output, y: Tensor):
    if isinstance(output, Tensor):
        return y
    if hasattr(output, "values"):
        output[next(iter(output))] = y
        return output
    return type(output)((_with_first(output[0], y), *output[1:]))


def tensors_in(output) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors_in(item)
    elif hasattr(output, "values"):
        yield from tensors_in(tuple(output.values()))


def _embeddings(root: nn.Module) -> list[nn.Module]:
    """Modules whose output enters the first block: patch embeddings, token embeddings."""
    try:
        found = [root.get_submodule(s.path) for s in find_sites(root, "patch_embed")]
    except LookupError:
        found = []
    with contextlib.suppress(LookupError):
        blocks = tuple(f"{site.path}." for site in find_sites(root, "block"))
        tables = (n for n, m in root.named_modules() if isinstance(m, nn.Embedding) and is_base(n))
        found += [root.get_submodule(n) for n in tables if not n.startswith(blocks)]  # in them: T5's distances
    get = getattr(root, "get_input_embeddings", None)
    with contextlib.suppress(Exception):  # some transformers classes have the method and no embeddings
        found += [get()] if get and isinstance(get(), nn.Module) else []
    return list(dict.fromkeys(found))


def _checkpoints(module: nn.Module) -> bool:
    """transformers checkpoints a layer only while the layer itself is in training mode."""
    return getattr(module, "gradient_checkpointing", False) is True and any(
        c.__name__ == "GradientCheckpointingLayer" for c in type(module).__mro__
    )
