"""Routing functions: an image acts inside the bottleneck of a text model's adapters (arXiv:2403.09377, section 3).

h = A x are the narrow features of a token, g = A V those of the image, through the same A: R(h, g) takes the place of
h, and no parameter is new. V is what the frozen image encoder gives at last, the same for every layer; it comes as the
`features` of the context, see `adaptsuite.vl.context`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.bottleneck import Bottleneck, BottleneckBranch
from adaptsuite.errors import UsageError
from adaptsuite.lora import Lora
from adaptsuite.method import Placement, register
from adaptsuite.sites import FUSED, Site, find_sites
from adaptsuite.vl.context import aligned, present

Routing = Literal["add", "mul", "mul_expand", "xvv", "xvv_relu", "routing_xt", "gate"]
Reading = Literal["pooled", "attended", "tokens"]


# ---- the functions: h (B, T, R) of the text, g of the image: (B, 1, R), or of each text token (B, T, R)


def add(h: Tensor, g: Tensor) -> Tensor:
    return h + g


def mul(h: Tensor, g: Tensor) -> Tensor:
    return h * g


def mul_expand(h: Tensor, g: Tensor) -> Tensor:
    """h M, where each of the R rows of M is g: (sum_i h_i) g."""
    return h.sum(-1, keepdim=True) * g


def gate(h: Tensor, g: Tensor) -> Tensor:
    """h + h o g; ours, not the paper's: without an image it is plain."""
    return h + h * g


def xvv(h: Tensor, g: Tensor, real: Tensor) -> Tensor:
    """h g^T g / N over the N image tokens g (B, N, R): linear attention without softmax.

    The paper does not divide; without it the size of the result is that of N. real (B, N, 1): 1 where a token is one.
    """
    return h @ (g.mT @ g) / real.sum(1, keepdim=True).clamp(min=1)


def xvv_relu(h: Tensor, g: Tensor, real: Tensor) -> Tensor:
    """relu(h) relu(g)^T g / N."""
    return h.relu() @ (g.relu().mT @ g) / real.sum(1, keepdim=True).clamp(min=1)


def routing_xt(h: Tensor, g: Tensor, mask: Tensor | None = None) -> Tensor:
    """h h^T G, where each of the T rows of G is g: (h_t . sum_s h_s) g, the sum over real tokens (mask: (B, T) bool).

    Every token sees all others, so it is for encoders only. The authors found it poor.
    """
    total = (h if mask is None else h * mask.unsqueeze(-1)).sum(1, keepdim=True)
    return (h * total).sum(-1, keepdim=True) * g


BY_VECTOR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": add, "mul": mul, "mul_expand": mul_expand, "gate": gate,
}  # fmt: skip
BY_TOKENS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"xvv": xvv, "xvv_relu": xvv_relu}


def attended(h: Tensor, g: Tensor, real: Tensor) -> Tensor:
    """For each text token the mean of the image tokens, weighted by softmax(h . g / sqrt(R)); (B, T, R). No parameter
    is new. Ours."""
    logits = h @ g.mT / h.shape[-1] ** 0.5  # (B, T, N)
    return logits.masked_fill(real.mT == 0, torch.finfo(h.dtype).min).softmax(-1) @ g


def route(
    routing: Routing, reading: Reading, h: Tensor, g: Tensor, real: Tensor, token_mask: Tensor | None = None
) -> Tensor:
    """R(h, g) of any text features h (B, ..., R) and image features g (B, N, R), of which `real` (B, N, 1) are there.

    Without a real token g counts as 0: plain for add and gate, nothing for the others.
    """
    shape, h = h.shape, h.unsqueeze(1) if h.ndim == 2 else h.flatten(1, -2)  # (B, T, R)
    g = g * real
    if routing in BY_TOKENS:
        z = BY_TOKENS[routing](h, g, real)
    else:
        g = attended(h, g, real) if reading == "attended" else g.sum(1, keepdim=True) / real.sum(1, True).clamp(min=1)
        z = routing_xt(h, g, token_mask) if routing == "routing_xt" else BY_VECTOR[routing](h, g)
    return z.reshape(shape)


# ---- the methods


class Routed:
    """What both methods have in common: the settings `routing`, `reading` and `context_dim`, and their checks.

    reading: pooled takes the mean of the image tokens, attended one mean for each text token, tokens all of them (xvv).
    context_dim: width of V where it is not the width that the sites read: then one `v_proj` (width, context_dim) for
    each such width, shared by its sites, is trained and counted; None: V goes through A as it is.
    """

    needs_features = True
    varying = ()  # attended reads the rank

    def check(self) -> None:
        super().check()
        self.expect_one_of("routing", get_args(Routing))
        self.expect_one_of("reading", get_args(Reading))
        if (self.routing in BY_TOKENS) != (self.reading == "tokens"):
            right = "tokens" if self.routing in BY_TOKENS else "pooled or attended"
            raise UsageError(f"{self.name}: routing {self.routing!r} takes reading={right}, not {self.reading!r}")
        if self.routing == "routing_xt" and self.reading != "pooled":
            raise UsageError(f"{self.name}: routing 'routing_xt' takes reading=pooled, not {self.reading!r}")
        self.expect("context_dim", self.context_dim is None or self.context_dim >= 1, "at least 1, or none")

    def fitted(self, model: nn.Module) -> "Routed":
        """With the width of V, where the model tells it (`context_dim`) and a site reads another."""
        given = getattr(model, "context_dim", None)
        if given is None or self.context_dim is not None:
            return self
        other = any(self.width(site) != given for site in find_sites(model, self.sites))
        return replace(self, context_dim=given) if other else self

    def shared(self, sites: list[Site]) -> nn.Module | None:
        widths = sorted({self.width(site) for site in sites} - {self.context_dim})
        return None if self.context_dim is None or not widths else Projections(self.context_dim, widths)

    def width(self, site: Site) -> int:
        """Of what the branch's first projection reads."""
        raise NotImplementedError

    def source(self, site: Site, shared: "Projections | None") -> "Source":
        if self.routing == "routing_xt" and site.causal:
            raise UsageError(
                f"{self.name}: routing 'routing_xt' shows every token all later ones, and {site.path} is causal; take "
                "another function"
            )
        return Source(self.width(site), shared)


class Projections(nn.Module):
    """V (..., context_dim) -> (..., D), linear and without bias, for each width D."""

    def __init__(self, context_dim: int, widths: list[int]):
        super().__init__()
        self.v_proj = nn.ParameterDict()
        for width in widths:
            start = torch.randn(width, context_dim) / context_dim**0.5  # keeps the size of V's features
            self.v_proj[str(width)] = nn.Parameter(start)


class Source:
    """Where a branch has V from."""

    def __init__(self, width: int, shared: Projections | None):
        self.width = width
        own = shared is not None and str(width) in shared.v_proj
        self.shared = shared if own else None  # the adapter owns it, once

    def read(self, context, x: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
        """V (B, N, D) as wide and as many rows as x (B, ..., D), and which of its tokens are real (B, N, 1)."""
        features = aligned(None if context is None else context.features, x)
        real = present(features)
        if reading == "pooled":  # A is linear: the mean goes through it once
            features = features.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
            real = real.amax(1, keepdim=True)
        if self.shared is not None:
            return F.linear(features, self.shared.v_proj[str(self.width)]), real
        if features.shape[-1] != self.width:
            found = features.shape[-1]
            raise UsageError(
                f"the image has {found} features and the site reads {self.width}: set context_dim={found}, which "
                "trains a v_proj between them"
            )
        return features, real


@register("vl.routed_lora")
@dataclass(frozen=True)
class RoutedLora(Routed, Lora):
    """y + scale * up(R(down x, down V)): LoRA of query and value in all layers, as the paper has it on RoBERTa.

    A projection of q, k and v in one keeps a pair for each of the named ones, so that routing never mixes them.
    """

    rank: int = 128
    alpha: float = 128.0
    routing: Routing = "mul_expand"
    reading: Reading = "pooled"
    context_dim: int | None = None

    @property
    def mergeable(self) -> bool | str:
        if self.routing == "add" and self.reading == "pooled":
            return True
        return (
            f"routing {self.routing!r} makes another weight for every image, no weight of the backbone can hold it; "
            "pooled 'add' alone merges, and its bias stays"
        )

    def width(self, site: Site) -> int:
        return site.dim

    def build(self, site: Site, shared: Projections | None = None) -> nn.Module:
        if site.weight is None:
            raise UsageError(f"{self.name} needs weights, site {site.role!r} is a module; name attn.q, mlp.in ...")
        if site.role == "attn.qkv" and (site.weight == "in_proj_weight" or site.path.rpartition(".")[2] in FUSED):
            raise UsageError(
                f"{self.name}: {site.path} projects q, k and v in one, whose routing would mix them; name attn.q, "
                "attn.k or attn.v as sites"
            )
        kind = RoutedLoraBranch if self.mergeable is not True else RoutedAddBranch
        return kind(site, self, self.source(site, shared))


class RoutedLoraBranch(nn.Module):
    """y + scale * up(R(h, g)), h = down(dropout(x)), g = down(dropout(V)); down (R, D), up (D_out, R), no bias."""

    inside_attention = True

    def __init__(self, site: Site, method: RoutedLora, source: Source):
        super().__init__()
        self.down = nn.Parameter(torch.empty(method.rank, site.dim))
        self.up = nn.Parameter(torch.zeros(site.dim_out, method.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.scale, self.dropout = method.scale, method.dropout
        self.routing, self.reading, self.source = method.routing, method.reading, source

    def narrow(self, x: Tensor) -> Tensor:
        return F.linear(F.dropout(x, self.dropout, self.training) if self.dropout else x, self.down)

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        v, real = self.source.read(context, x, self.reading)
        mask = None if context is None else context.token_mask
        z = route(self.routing, self.reading, self.narrow(x), self.narrow(v), real, mask)
        return y + F.linear(z, self.up) * self.scale


class RoutedAddBranch(RoutedLoraBranch):
    """`add` with one vector for each sample: W + scale * up @ down, and a bias scale * up(down V) of the sample."""

    def delta(self) -> Tensor:
        if self.dropout and self.training:
            raise UsageError("the change of the weight is not one matrix while dropout acts on the site's input")
        return (self.up @ self.down) * self.scale

    def rest(self, x: Tensor, y: Tensor, context) -> Tensor:
        """What a merge leaves to be added to y."""
        v, real = self.source.read(context, x, self.reading)
        bias = F.linear(self.narrow(v) * real, self.up) * self.scale  # (B, 1, D_out)
        return y + bias.view(-1, *[1] * (y.ndim - 2), bias.shape[-1])


@register("vl.routed_bottleneck")
@dataclass(frozen=True)
class RoutedBottleneck(Routed, Bottleneck):
    """up(activation(R(down x, down V))) behind attention and feed-forward, with a skip.

    The start is the backbone; the authors' adapter for RoBERTa has neither skip nor a zero `up`, ours has both.
    """

    placement: Placement = "sequential"
    sites: tuple[str, ...] = ("attn", "mlp")
    routing: Routing = "mul_expand"
    reading: Reading = "pooled"
    context_dim: int | None = None

    def width(self, site: Site) -> int:
        return site.dim if self.placement == "parallel" else site.dim_out

    def build(self, site: Site, shared: Projections | None = None) -> nn.Module:
        branch = super().build(site)
        branch.routing, branch.reading, branch.source = self.routing, self.reading, self.source(site, shared)
        return branch

    def branch(self, dim: int, dim_out: int) -> "RoutedBottleneckBranch":
        return RoutedBottleneckBranch(
            dim, self.bottleneck, dim_out, self.activation, self.scale, self.start, self.dropout
        )


class RoutedBottleneckBranch(BottleneckBranch):
    """scale * up(dropout(activation(R(down(.), down(V))))), of tokens (B, ..., D); both go through down's bias."""

    routing: Routing
    reading: Reading
    source: Source

    def narrow(self, tokens: Tensor, context) -> Tensor:
        v, real = self.source.read(context, tokens, self.reading)
        mask = None if context is None else context.token_mask
        return route(self.routing, self.reading, self.down(tokens), self.down(v), real, mask)
