"""Methods that train what is there: the head alone, biases (arXiv:2106.10199), norms (FiLM), everything."""

from dataclasses import dataclass

from torch import nn

from adaptsuite.method import Method, register
from adaptsuite.sites import Site


def _present(module: nn.Module, *names: str) -> tuple[str, ...]:
    return tuple(n for n in names if module._parameters.get(n) is not None)


@register("linear")
@dataclass(frozen=True)
class Linear(Method):
    """Linear probe: the head, and the final norm where the domain trains norms."""

    sites: tuple[str, ...] = ()
    needs_head = True


@register("bitfit")
@dataclass(frozen=True)
class BitFit(Method):
    """The biases of linear layers and norms (Ben Zaken et al. 2021, section 3). Norm weights stay frozen."""

    sites: tuple[str, ...] = ("attn.qkv", "attn.out", "mlp.in", "mlp.out", "norm")
    norms = ()

    def base(self, site: Site, module: nn.Module) -> tuple[str, ...]:
        return _present(module, site.bias or "bias")


@register("film")
@dataclass(frozen=True)
class Film(Method):
    """Scale and shift of the features after each norm, as copies of its weight and bias.

    FiLM on a pretrained network is a retrained affine of its norms (Shysheya et al. 2022, arXiv:2206.08671, section 3).
    """

    sites: tuple[str, ...] = ("norm",)
    norms = ()

    def base(self, site: Site, module: nn.Module) -> tuple[str, ...]:
        return _present(module, "weight", "bias")


@register("full")
@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning of the backbone, in place, with a kept copy for an exact way back."""

    sites: tuple[str, ...] = ()
    norms = ()
    in_place = True
