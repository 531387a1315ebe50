"""Adapters on a model: attach them, switch them, merge them, take them off (what makes them act is in bank.py)."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.bank import (
    BANK,
    Adapter,
    Bank,
    base_state,
    copy_base,
    effective,
    get_bank,
    is_base,
    split_key,
    tensor_key,
)
from adaptsuite.compiled import compile_host
from adaptsuite.depth import layer_distance, layer_factor
from adaptsuite.errors import UsageError, nearest
from adaptsuite.lean import make_lean
from adaptsuite.method import Method, resolve
from adaptsuite.probe import called_modules
from adaptsuite.sites import Site, component_info, find_sites


def attach(
    model: nn.Module,
    method: str | Method,
    name: str = "default",
    sample: Any = None,
    *,
    train_norms: bool = False,
    head: str | Sequence[str] = (),
    last_k: int | None = None,
    lean: bool = False,
    **settings: Any,
) -> "Handle":
    """Puts an adapter on `model`, makes it the active one and freezes everything else.

    sample: one input for the probe forward (a tensor, a tuple of arguments or a dict); known families need none.
    train_norms: also train the norms that the method names (the final one, the ones beside its sites).
    head: paths of modules trained as copies and saved with the adapter.
    last_k: only sites of the last k blocks and behind them; backward ends at the first of them.
    lean: forwards of the model save activations as adaptsuite.lean does, until its last adapter is taken off.
    The base is in eval mode under `model.train()` from now on: its dropout and batch statistics are off.
    Raises UsageError for settings that cannot be and LookupError for sites that the model does not have.
    """
    method = resolve(method, **settings) if isinstance(method, str) else replace(method, **settings)
    method = method.fitted(model)
    method.check()
    head = (head,) if isinstance(head, str) else tuple(head)
    if method.needs_head and not head:
        head = tuple(s.path for s in find_sites(model, "head"))
    sites = _sites(model, method, last_k)
    handle = place(model, method, sites, held_tensors(model, method, sites, train_norms, head), head, name, sample)
    if lean:
        make_lean(handle.bank)
    return handle


def place(
    model: nn.Module,
    method: Method,
    sites: Sequence[Site],
    held: Mapping[str, str],
    head: tuple[str, ...] = (),
    name: str = "default",
    sample: Any = None,
    state: Mapping[str, Tensor] | None = None,
) -> "Handle":
    """Puts an adapter with exactly these sites and held base tensors on `model`; what `attach` and loading end in.

    held: as `held_tensors` gives it.  state: values of all that `Handle.state` gives; head tensors take their shapes
    from it. A ValueError for any other difference, like every error here, leaves the model as it was.
    """
    bank = getattr(model, BANK, None)
    others = list(bank.adapters.values()) if bank is not None else []
    if not name.isidentifier() or (bank is not None and name in bank.adapters):
        raise UsageError(f"adapter name {name!r} is {'taken' if name.isidentifier() else 'not an identifier'}")
    if others and (method.in_place or any(a.method.in_place for a in others)):
        raise UsageError("full fine-tuning changes the base itself: it cannot share a model with another adapter")
    if bank is not None and bank.merged:
        raise UsageError(f"adapter {bank.merged!r} is merged; unmerge it first")
    new, handle = bank is None, Handle(model, name)
    if new:
        bank = Bank(model)
    try:
        bank.called = bank.called or called_modules(model, sample)
        bank.adapters[name] = _build(bank, method, sites, held, head, state or {})
        method.bind(model, bank.adapters[name])
        if state is not None:
            handle.load_state(state)
        bank.activate([name])
        if any(hasattr(b, "enter") or getattr(b, "needs_grid", False) for b in bank.adapters[name].branches.values()):
            _rehearse(model, method, sample)
    except BaseException:
        if name in bank.adapters:
            handle.detach()  # releases the bank with its last adapter
        elif new:
            bank.release()
        raise
    return handle


def get_handle(model: nn.Module, name: str = "default") -> "Handle":
    """The handle of an adapter on `model` or on a deep copy of it. Raises LookupError naming those there are."""
    bank = getattr(model, BANK, None)
    names = list(bank.adapters) if bank is not None else []
    if name not in names:
        raise LookupError(f"no adapter {name!r} on this model; {nearest(name, names)}")
    return Handle(model, name)


def _sites(model: nn.Module, method: Method, last_k: int | None) -> list[Site]:
    sites = find_sites(model, method.roles) if method.roles else []
    if last_k is not None and not sites:
        raise UsageError(f"method {method.name!r} has no sites in blocks: last_k={last_k} would change nothing")
    if last_k is None and method.blocks is None:
        return sites
    depth = {c.prefix: c.num_blocks for c in component_info(model)}
    if method.blocks is not None:
        for block in method.blocks:
            method.expect("blocks", 0 <= block < max(depth.values()), f"among 0 to {max(depth.values()) - 1}")
        sites = [s for s in sites if s.block is None or s.block in method.blocks]
    if last_k is None:
        return sites
    if not 1 <= last_k <= max(depth.values()):
        raise UsageError(f"last_k is {last_k}, this model has {max(depth.values())} blocks")
    distance = layer_distance(model)  # embeddings and norms before the blocks are left out too: backward ends behind
    return [s for s in sites if distance(".".join(filter(None, (s.path, s.weight)))) <= last_k]


def weight_site(model: nn.Module, path: str) -> Site:
    """The site of any one Linear or transformers' Conv1D, whether it has a role or not; LookupError for others."""
    try:
        module = model.get_submodule(path)
    except AttributeError as e:
        raise LookupError(f"{path!r} is not in the model; {nearest(path, dict(model.named_modules()))}") from e
    bias = None if getattr(module, "bias", None) is None else "bias"
    if isinstance(module, nn.Linear):
        return Site("weight", path, None, module.in_features, module.out_features, "weight", bias)
    if type(module).__name__ == "Conv1D":
        return Site("weight", path, None, *module.weight.shape, "weight", bias, layout="conv1d")
    raise LookupError(f"{path!r} is a {type(module).__name__}, expected a Linear or a Conv1D")


def held_tensors(
    root: nn.Module, method: Method, sites: Sequence[Site], train_norms: bool = False, head: Sequence[str] = ()
) -> dict[str, str]:
    """Key of each base tensor that an adapter holds a copy of -> adapter | norm | head | buffer."""
    held: dict[str, str] = {}
    for site in sites:
        for param in method.base(site, root.get_submodule(site.path)):
            held.setdefault(tensor_key(site.path, param), "norm" if site.role == "norm" else "adapter")
    norms = []
    if train_norms and "beside" in method.norms:
        norms += [s.norm for s in sites if s.norm]
    if train_norms and "final" in method.norms:
        norms += [c.final_norm for c in component_info(root) if c.final_norm]
    for path in norms:
        for param in root.get_submodule(path)._parameters:
            held.setdefault(tensor_key(path, param), "norm")
    for path in head:
        try:
            module = root.get_submodule(path)
        except AttributeError as e:
            raise LookupError(f"head {path!r} is not in the model; {nearest(path, dict(root.named_modules()))}") from e
        for sub, child in module.named_modules(prefix=path):
            for param in child._parameters:
                held.setdefault(tensor_key(sub, param), "head")
            for buffer in child._buffers:
                held.setdefault(tensor_key(sub, buffer), "buffer")
    return held


def _build(
    bank: "Bank",
    method: Method,
    sites: Sequence[Site],
    held: Mapping[str, str],
    head: tuple[str, ...],
    state: Mapping[str, Tensor],
) -> "Adapter":
    """The adapter of one method: its branches, then the base tensors that it trains as copies."""
    root = bank.root
    adapter = Adapter(method, list(sites), head)
    shared = method.shared(list(sites))
    if shared is not None:
        first = next(root.parameters())
        adapter.shared = shared.to(first.device, torch.promote_types(first.dtype, torch.float32))
    for site in sites:
        module = root.get_submodule(site.path)
        branch = method.build(site) if shared is None else method.build(site, shared)
        if branch is not None:
            _check_reach(bank, method, site, branch)
            like = next((p for p in module.parameters() if p.is_floating_point()), next(root.parameters()))
            # adapters stay in float32 on a half-precision base: their updates are too small for it
            adapter.branches[site.key] = branch.to(like.device, torch.promote_types(like.dtype, torch.float32))
    used = (s for s in sites if s.key in adapter.branches or method.base(s, root.get_submodule(s.path)))
    adapter.sites = {s.key: s for s in used}
    for key, kind in held.items():
        if kind == "buffer":
            adapter.hold_buffer(root, *split_key(key))
        else:
            adapter.hold(root, *split_key(key), kind)
        if kind in ("head", "buffer"):  # may have been trained for another set of classes
            _take_shape(adapter, key, state)
    if method.in_place:
        adapter.keep(root)
    if not adapter.num_trained():
        raise UsageError(f"method {method.name!r} finds nothing to train at {', '.join(method.roles) or 'its sites'}")
    return adapter


def _take_shape(adapter: "Adapter", key: str, state: Mapping[str, Tensor]) -> None:
    tensor, moved = state.get(f"tensors.{key}"), state.get(f"moved.{key}")
    if tensor is not None and key in adapter.tensors and tensor.shape != adapter.tensors[key].shape:
        adapter.tensors[key] = nn.Parameter(adapter.tensors[key].new_empty(tensor.shape))
    if moved is not None and key in adapter.moved._buffers and moved.shape != adapter.moved._buffers[key].shape:
        adapter.moved._buffers[key] = adapter.moved._buffers[key].new_empty(moved.shape)


def _rehearse(model: nn.Module, method: Method, sample: Any) -> None:
    """One forward on a meta copy: what a host cannot take is refused here and not in the first step of a training."""
    try:
        called_modules(model, sample)
    except UsageError as e:
        raise UsageError(f"method {method.name!r}: {e}") from e
    except Exception as e:
        kind, reason = type(model).__name__, " ".join(str(e).split())[:200]
        raise UsageError(f"method {method.name!r} does not fit this {kind}: {type(e).__name__}: {reason}") from e


def _check_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    unexpected, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    if unexpected or missing:
        raise ValueError(f"adapter state: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, value in own.items():
        if value.shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, expected {tuple(value.shape)}"
            raise ValueError(f"adapter state: {name} is {shapes}")
        if name.endswith(".checksum") and not torch.equal(value, state[name].to(value)):
            raise ValueError(f"adapter state: {name}: its random choices cannot be drawn again from the seed")


def _check_reach(bank: "Bank", method: Method, site: Site, branch: nn.Module) -> None:
    if bank.acts_by_call(site, branch):
        return
    if site.weight is None:
        raise UsageError(f"method {method.name!r}: site {site.path!r} ({site.role}) is never called in a forward")
    if not hasattr(branch, "delta") and not hasattr(branch, "row_gain"):
        raise UsageError(
            f"method {method.name!r} acts on what a module returns, but this host reads {site.path}.{site.weight} "
            "without calling the module; choose attn, mlp or block as sites, or a method on weights such as lora"
        )
    if getattr(branch, "dropout", 0):
        where = f"{site.path}.{site.weight}"
        raise UsageError(
            f"dropout acts on a site's input, and this host reads {where} without calling the module; set 0"
        )


class Handle:
    """One adapter on one host. Cheap: all state is in the model, so a deep copy's handle is `get_handle(copy)`."""

    def __init__(self, model: nn.Module, name: str):
        self.model, self.name = model, name

    def __repr__(self) -> str:
        c = self.parameters_count()
        counts = f"{c['trained']:,} of {c['total']:,} trained"
        return f"Handle({self.name!r}: {self.method.name} at {len(self.sites)} sites, {counts})"

    @property
    def bank(self) -> Bank:
        return get_bank(self.model)

    @property
    def adapter(self) -> Adapter:
        return self.bank.adapters[self.name]

    @property
    def method(self) -> Method:
        return self.adapter.method

    @property
    def sites(self) -> list[Site]:
        return list(self.adapter.sites.values())

    @property
    def shadow_sites(self) -> list[Site]:
        """Sites whose weight the host reads without calling its module."""
        branches = self.adapter.branches.items()
        pairs = [(self.adapter.sites[key], branch) for key, branch in branches]
        return [site for site, branch in pairs if not self.bank.acts_by_call(site, branch)]

    # ---- switching

    def activate(self, *names: str, per_sample: Tensor | Sequence[str | None] | None = None) -> None:
        """Makes exactly these adapters of the model act, in this order; without a name, this one.

        per_sample: (B,) for each row of the forwards to come in this thread the number of its one adapter among the
        names, by default all adapters of the model; -1 is the plain backbone. Or a list of names, with None for that.
        Logits of heads with different numbers of classes come as wide as the widest, -inf behind a row's own. Adapters
        stay stacked until others are named: a new index costs nothing. A compiled model hears of weights that were
        changed in place by the next `activate`. Raises UsageError with the reason for methods that cannot be mixed, and
        (in the forward) for a batch of another size.
        """
        bank = self.bank
        if bank.merged:
            raise UsageError(f"adapter {bank.merged!r} is merged; unmerge it first")
        if per_sample is not None:
            from adaptsuite.per_sample import activate  # few need what it imports

            return activate(bank, names or list(bank.adapters), per_sample)
        bank.activate(names or (self.name,))
        if bank.context.index is not None:
            bank.context = replace(bank.context, index=None)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The plain backbone, inside the `with`."""
        if self.bank.merged:
            raise UsageError(f"adapter {self.bank.merged!r} is merged; unmerge it first")
        active, by_row, restore = self.bank.active, self.bank.by_row, self._swap_in_place()
        self.bank.activate(())
        try:
            yield
        finally:
            restore()
            self.bank.activate(active, by_row)

    def _swap_in_place(self):
        """Puts the kept base values back for a while, where the adapter trained in place."""
        if self.adapter.kept is None:
            return lambda: None
        current = {k: v.detach().clone() for k, v in base_state(self.model).items()}
        copy_base(self.model, self.adapter.kept)
        return lambda: copy_base(self.model, current)

    @contextlib.contextmanager
    def using(self, **context: Any) -> Iterator[None]:
        """Gives branches their context (`token_mask=`, `features=`) for the forwards inside the `with`, in this thread.

        Backward finds the context of its own forward, also when it runs later.
        """
        with self.bank.using(**context):
            yield

    def compile(self) -> None:
        """Calls of the model run one graph of torch.compile from now on (adaptsuite.compiled), lean where it is."""
        compile_host(self.model, lean=self.bank.lean is not None)

    # ---- what trains

    def trained(self) -> dict[str, nn.Parameter]:
        """Name -> parameter, for all that this adapter trains."""
        found = dict(self.adapter.named_parameters())
        if self.adapter.kept is not None:
            params = dict(self.model.named_parameters())
            found |= {f"base.{tensor_key(n)}": params[n] for n in self.adapter.in_place_names}
        return found

    def kind(self, name: str) -> str:
        """adapter | norm | head, for a name of `trained()`."""
        return self.adapter.kinds.get(name.removeprefix("tensors."), "adapter")

    def trainable(self, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Optimiser groups {"name": adapter | norm | head, "lr_scale", "params": [], "names": []}; no empty ones.

        lr_scale: 1, or what a tensor's module (of the base or of a branch) says in its `lr_scale` {parameter: factor},
        times the tensor's layer_factor (adaptsuite.depth) and the factor of its place in `adapter.rates`, which are 1
        for what belongs to no one place of the model.
        """
        factor = layer_factor(self.model, layer_decay)
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for name, p in self.trained().items():
            kind, place = self.kind(name), self.place_of(name)
            scale = 1.0 if place is None else factor(place) * self.adapter.rate_at(place)
            if not name.startswith("base."):
                held = name.startswith("tensors.")
                path, param = split_key(name.removeprefix("tensors.")) if held else name.rsplit(".", 1)
                owner = (self.model if held else self.adapter).get_submodule(path)
                scale *= getattr(owner, "lr_scale", {}).get(param, 1.0)
            new = {"name": kind, "lr_scale": scale, "params": [], "names": []}
            group = groups.setdefault((kind, scale), new)
            group["params"].append(p)
            group["names"].append(name)
        return list(groups.values())

    def place_of(self, name: str) -> str | None:
        """Path in the model that a name of `trained()` acts at; None for factors that several sites share."""
        first, *rest = name.split(".")
        if first in ("tensors", "base"):
            return rest[0].replace("/", ".")
        return next((self.adapter.sites[part].path for part in rest if part in self.adapter.sites), None)

    def parameters_count(self) -> dict[str, int]:
        """trained, trained_without_head, total; a trained copy and its frozen original count once."""
        trained = self.trained()
        without_head = sum(p.numel() for n, p in trained.items() if self.kind(n) != "head")
        base = {tensor_key(n): p.numel() for n, p in self.model.named_parameters() if is_base(n)}
        base |= {k: p.numel() for k, p in self.adapter.tensors.items()}
        branches = sum(p.numel() for n, p in self.adapter.named_parameters() if not n.startswith("tensors."))
        return {
            "trained": sum(p.numel() for p in trained.values()),
            "trained_without_head": without_head,
            "total": sum(base.values()) + branches,
        }

    def report(self) -> list[dict[str, Any]]:
        """Per component of the model, and per child outside components: values trained (of which norm, head), frozen,
        and the bytes of the trained ones."""
        prefixes = sorted((c.prefix for c in component_info(self.model)), key=len, reverse=True)
        rows: dict[str, dict[str, Any]] = {}

        def row(path: str | None) -> dict[str, Any]:
            name = "shared" if path is None else path.partition(".")[0]
            if path is not None:
                name = next((p for p in prefixes if not p or path == p or path.startswith(f"{p}.")), name)
            return rows.setdefault(name, {"trained": 0, "norm": 0, "head": 0, "frozen": 0, "bytes": 0})

        trained = self.trained()
        for name, p in self.model.named_parameters():
            if is_base(name):
                held = tensor_key(name) in self.adapter.tensors or f"base.{tensor_key(name)}" in trained
                row(name)["frozen"] += 0 if held else p.numel()
        for name, p in trained.items():
            shared = (part.partition(":")[0].replace("/", ".") for part in name.split(".") if "/" in part)
            found, kind = row(self.place_of(name) or next(shared, None)), self.kind(name)
            found["trained"] += p.numel()
            found["bytes"] += p.numel() * p.element_size()
            if kind in found:
                found[kind] += p.numel()
        return [{"component": name or "model", **found} for name, found in sorted(rows.items())]

    def regulariser(self) -> Tensor | None:
        return self.method.regulariser(self)

    # ---- state

    def state(self) -> dict[str, Tensor]:
        """All that must be stored: trained tensors and the buffers that move with them (detached, not copied)."""
        state = {k: v.detach() for k, v in self.adapter.state_dict().items()}
        if self.adapter.kept is not None:
            held = {*self.adapter.tensors, *self.adapter.moved._buffers}
            base = {tensor_key(k): v.detach() for k, v in base_state(self.model).items()}
            state |= {f"base.{k}": v for k, v in base.items() if k not in held}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Strict: the same names and shapes as `state()`, or a ValueError that names the first differences.

        Branches that change their shapes take those of the state. After an error the adapter is as before.
        """
        before = self.state()
        self._take_shapes(state)
        try:
            _check_state(self.state(), state)
        except ValueError:
            self._take_shapes(before)
            state = before
            raise
        finally:
            with torch.no_grad():
                for name, value in self.state().items():
                    value.copy_(state[name])

    def _take_shapes(self, state: Mapping[str, Tensor]) -> None:
        parts = {f"branches.{key}.": branch for key, branch in self.adapter.branches.items()}
        parts["shared."] = getattr(self.adapter, "shared", None)
        for start, part in parts.items():
            if hasattr(part, "take_shapes"):
                part.take_shapes({n.removeprefix(start): t for n, t in state.items() if n.startswith(start)})

    def save(self, folder, **record: Any):
        """Writes the adapter folder (see adaptsuite.artifact.save_adapter) and returns its path."""
        from adaptsuite.artifact import save_adapter

        return save_adapter(self, folder, **record)

    # ---- leaving

    def merge(self) -> None:
        """Writes the adapter into the weights; the originals are kept for `unmerge`. No branch runs meanwhile.

        Raises UsageError with the reason where the method cannot be merged, or where a changed weight is tied.
        """
        bank, adapter = self.bank, self.adapter
        if adapter.method.mergeable is not True:
            raise UsageError(f"method {adapter.method.name!r} cannot be merged: {adapter.method.mergeable}")
        if bank.merged or bank.active != [self.name]:
            raise UsageError(f"only the one active adapter can be merged; active: {bank.active}, merged: {bank.merged}")
        targets = [*adapter.weight_branches(), *(split_key(k) for k in (*adapter.tensors, *adapter.moved._buffers))]
        holders: dict[int, list[str]] = {}
        for n, p in self.model.named_parameters(remove_duplicate=False):
            holders.setdefault(id(p), []).append(n)
        new = {}
        with torch.no_grad():
            for path, param in targets:
                tied = holders.get(id(self.model.get_submodule(path)._parameters.get(param)), [])
                if len(tied) > 1:
                    raise UsageError(f"{' and '.join(tied)} are one tied weight: merging into one unties them silently")
                changes = bank.changes(path, param, [self.name])
                new[path, param] = effective(self.model.get_submodule(path), param, changes).detach().clone()
        adapter.unmerged = {}
        for (path, param), value in new.items():
            module = self.model.get_submodule(path)
            store = module._parameters if param in module._parameters else module._buffers
            adapter.unmerged[path, param] = store[param]
            store[param] = nn.Parameter(value, requires_grad=False) if store is module._parameters else value
        bank.merged = self.name
        bank.wire()

    def unmerge(self) -> None:
        """Puts the kept original tensors back: bit-exact, however often it is done."""
        bank = self.bank
        if bank.merged != self.name:
            raise UsageError(f"adapter {self.name!r} is not merged")
        for (path, param), value in self.adapter.unmerged.items():
            module = self.model.get_submodule(path)
            (module._parameters if param in module._parameters else module._buffers)[param] = value
        del self.adapter.unmerged
        bank.merged = None
        bank.wire()

    def bake(self) -> nn.Module:
        """Merges for good and takes the bank off: a plain model with new weights.

        Raises UsageError where a merge leaves something to every sample, which needs the bank.
        """
        if self.bank.rests(self.name):
            name = self.method.name
            raise UsageError(f"method {name!r} keeps a bias of each sample when it is merged: use merge(), not bake()")
        if self.bank.merged != self.name:
            self.merge()
        del self.adapter.unmerged
        self.bank.release()
        return self.model

    def detach(self) -> nn.Module:
        """Takes the adapter off; after the last one the model is the backbone again, bit by bit."""
        bank = self.bank
        if bank.merged == self.name:
            self.unmerge()
        if self.adapter.kept is not None:
            copy_base(self.model, self.adapter.kept)
        del bank.adapters[self.name]
        left, by_row = [n for n in bank.active if n != self.name], bank.by_row
        if by_row is not None and left != bank.active:
            by_row = type(by_row)(bank, left)  # another one: the rows are to be named anew
        bank.activate(left, by_row)
        if not len(bank.adapters):
            bank.release()
        return self.model
