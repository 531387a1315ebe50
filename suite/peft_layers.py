"""How peft's layers live at the sites of a host: a shell of Linears for peft to wrap, and a branch for each of them."""

import copy
import json
import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.sites import Site

# of each thread: `seen`, the (x, y) of the forward that it is in; `bare`, whether biases are read as 0
_local = threading.local()


class Shell(nn.Module):
    """peft's tuner of one adapter; `tuner.model` has one wrapped Linear for each site, by the site's key."""

    def __init__(self):
        super().__init__()
        self.waiting = nn.Parameter(torch.zeros(1))  # an adapter has something to train; gone with `fill`

    def fill(self, model: nn.Module, sites: Sequence[Site], method) -> None:
        """Lets peft wrap copies of the sites' weights, then puts what reads the host's own in their place.

        Raises UsageError for what peft refuses, and for tuners that change the weights that they wrap.
        """
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        del self.waiting
        order = {name: number for number, (name, _) in enumerate(model.named_modules())}
        sites = sorted(sites, key=lambda s: (order[s.path], s.rows or (0, 0)))  # as peft walks through a model
        plain, names = nn.Module(), {site.key: _name(site) for site in sites}  # some tuners read what names say
        for site in sites:
            _place(plain, names[site.key], _plain(model.get_submodule(site.path), site))
        kept = {key: copy.deepcopy(plain.get_submodule(name)) for key, name in names.items()}
        targets = exactly(names.values()), exactly(_name(site) for site in sites if site.role == "mlp.out")
        with method.refusals():
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[method.kind](plain, method.config(*targets), "default")
        flat = nn.Module()
        for site in sites:
            layer = tuner.model.get_submodule(names[site.key])
            if _changed(layer.base_layer, kept[site.key]):
                raise UsageError(f"{method.name}: with these settings peft changes the backbone's own weights")
            module = model.get_submodule(site.path)
            layer.base_layer = nn.Identity() if site.weight is None else Given(module, site)
            flat.add_module(site.key, layer)
        frozen = [n for n, p in tuner.named_parameters() if not p.requires_grad]
        if frozen:
            raise UsageError(f"{method.name}: peft freezes {frozen[0]}, which the core would train")
        own = next(tuner.parameters()).dtype
        tuner.model, self.targets, self.sites = flat, targets, sites
        self.tuner = tuner.to(torch.promote_types(own, torch.float32))

    def layer(self, key: str) -> nn.Module:
        return self.tuner.model.get_submodule(key)

    def to_peft(self, method) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Config and tensors as peft writes them for the host itself.  Raises UsageError for its Conv1D, if need be."""
        from peft import get_peft_model_state_dict

        config, turned = method.config(*self.targets).to_dict(), [s for s in self.sites if s.layout == "conv1d"]
        if turned and ("fan_in_fan_out" not in config or len(turned) < len(self.sites)):
            raise UsageError(f"{turned[0].path} cannot be written for peft: {method.name} has no form for its Conv1D")
        if turned:
            config["fan_in_fan_out"] = True
        paths = {f"base_model.model.{site.key}.": f"base_model.model.{site.path}." for site in self.sites}
        tensors, outer = {}, nn.Module()  # named as in a PeftModel
        outer.base_model, outer.peft_config = self.tuner, self.tuner.peft_config
        for name, value in get_peft_model_state_dict(outer).items():
            own = next((start for start in paths if name.startswith(start)), "")
            tensors[paths.get(own, "") + name.removeprefix(own)] = value
        return json.loads(json.dumps(config, default=sorted)), tensors


def exactly(names: Iterable[str]) -> str:
    """What peft reads as these names and no others, also where one is the end of another (open_clip's towers)."""
    return "|".join(re.escape(name) for name in names) or "$^"


def _name(site: Site) -> str:
    """The path of the site's module; for one of several parts of a weight, a name beside it."""
    return site.path if site.rows is None else f"{site.path}_{site.role.rpartition('.')[2]}"


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    *above, last = name.split(".")
    for part in above:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]
    root.add_module(last, module)


def _changed(module: nn.Module, kept: nn.Module) -> bool:
    """Whether values differ; without values (a budget counts on such) nobody can tell."""
    pairs = zip(module.state_dict().values(), kept.state_dict().values(), strict=True)
    return any(type(a) is Tensor and not a.is_meta and not torch.equal(a, b) for a, b in pairs)


def _plain(module: nn.Module, site: Site) -> nn.Module:
    """A copy of a site as peft expects one: a Linear of its own, or the norm."""
    if site.weight is None:
        return copy.deepcopy(module)
    given = Given(module, site)
    plain = nn.Linear(site.dim, site.dim_out, bias=given.bias is not None, device="meta")
    plain.weight = nn.Parameter(given.weight.clone(), requires_grad=False)
    if given.bias is not None:
        plain.bias = nn.Parameter(given.bias.clone(), requires_grad=False)
    return plain


class Given(nn.Linear):
    """A site's weight (D_out, D) and bias as a Linear without parameters: both are read from the host at every call."""

    def __init__(self, module: nn.Module, site: Site):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.site = site.dim, site.dim_out, site
        self.__dict__["module"] = module  # the host's, not a submodule of the adapter

    @property
    def weight(self) -> Tensor:
        weight = self.module._parameters[self.site.weight].detach()
        weight = weight.T if self.site.layout == "conv1d" else weight.flatten(1)
        return weight if self.site.rows is None else weight[slice(*self.site.rows)]

    @property
    def bias(self) -> Tensor | None:
        if self.site.bias is None:
            return None
        bias = self.module._parameters[self.site.bias].detach()
        bias = torch.zeros_like(bias) if getattr(_local, "bare", False) else bias
        return bias if self.site.rows is None else bias[slice(*self.site.rows)]

    def forward(self, x: Tensor) -> Tensor:
        """Of the site's own input what the host made of it, and of any other input what the weight makes of it."""
        seen = getattr(_local, "seen", None)
        if seen is not None and seen[0] is x:
            return seen[1].clone()  # some tuners add to it in place
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class PeftBranch(nn.Module):
    """What peft's layer gives in place of the site's output."""

    def __init__(self, site: Site, shared: Shell, random: float | bool):
        super().__init__()
        self.__dict__["shared"] = shared  # the adapter owns it, once
        self.key, self.dropout = site.key, random

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        _local.seen = (x, y)
        try:
            return self.shared.layer(self.key)(x)
        finally:
            _local.seen = None


class PeftWeightBranch(PeftBranch):
    """The same where the layer is an affine map of its input: then it is a change of the site's weight and bias."""

    def delta(self) -> Tensor:
        """(D_out, D): what the layer makes of the unit vectors, without a bias and without the weight."""
        if self.dropout and self.training:
            raise UsageError("the change of the weight is not one matrix while a tuner of peft draws at random")
        layer, given = self.shared.layer(self.key), self.given
        if given.bias is None and bool(self.origin().abs().max() > 1e-7):
            raise UsageError(f"{given.site.path} has no bias that could hold what the tuner adds")
        _local.bare = True  # W + b - b is not W in floats
        try:
            weight = given.weight
            unit = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
            return (layer(unit) - self.origin()).T - weight
        finally:
            _local.bare = False

    def row_shift(self) -> Tensor:
        return self.origin() - self.given.bias

    @property
    def given(self) -> Given:
        return self.shared.layer(self.key).base_layer

    def origin(self) -> Tensor:
        """(D_out,): the layer's output for the zero vector."""
        weight = self.given.weight
        return self.shared.layer(self.key)(weight.new_zeros(1, weight.shape[1]))[0]
