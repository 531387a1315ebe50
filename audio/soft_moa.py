"""Mixtures of adapters for audio transformers: soft and dense (Cappellazzo et al. 2024, arXiv:2402.00828, section 2).

Soft-MoA follows Soft MoE (Puigcerver et al. 2023, arXiv:2308.00951, eq. 1-3) with adapters as experts. Both are
evaluated in a few large products: a loop over experts costs 6 to 38 times as much for the dense mixture.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.audio.conv_adapter import Conformers, token_mask
from adaptsuite.errors import UsageError
from adaptsuite.method import Method, Placement, register
from adaptsuite.sites import Site


@dataclass(frozen=True)
class _Mixture(Method):
    """Settings that both mixtures have."""

    experts: int = 7
    bottleneck: int = 6  # hidden features of one expert
    expert: Literal["bottleneck", "conformer"] = "bottleneck"
    kernel: int = 8  # of conformer experts
    placement: Placement = "parallel"
    sites: tuple[str, ...] = ("attn",)

    mergeable = "a mixture's output depends on all tokens at once, no weight of the backbone can hold it"
    norms = ("final", "beside")

    def check(self) -> None:
        for name in ("experts", "bottleneck", "kernel"):
            if getattr(self, name) < 1:
                raise UsageError(f"{self.name}: {name} is {getattr(self, name)}, it must be at least 1")
        if self.placement not in ("parallel", "sequential"):
            raise UsageError(f"{self.name}: placement is {self.placement!r}, it is parallel or sequential")

        if self.expert not in ("bottleneck", "conformer"):
            raise UsageError(f"{self.name}: expert is {self.expert!r}, it is bottleneck or conformer")

    def of(self, site: Site) -> "Experts | Conformers":
        """The experts of one site."""
        if site.dim != site.dim_out:
            raise UsageError(
                f"{self.name}: site {site.role!r} maps {site.dim} to {site.dim_out}, a mixture needs one width"
            )
        if self.expert == "conformer":
            return Conformers(self.experts, site.dim, self.bottleneck, site.dim, self.kernel)
        return Experts(site.dim, self.experts, self.bottleneck)


@register("audio.soft_moa")
@dataclass(frozen=True)
class SoftMoa(_Mixture):
    """Slots are convex sums of tokens, experts work on slots, tokens are convex sums of what the experts give."""

    slots: int = 1  # per expert
    normalise: bool = (
        False  # l2-normalised tokens and slots in the logits (Soft MoE section 2.3); the raw tokens travel
    )

    def check(self) -> None:
        super().check()
        if self.slots < 1:
            raise UsageError(f"{self.name}: slots is {self.slots}, it must be at least 1")

    def build(self, site: Site) -> nn.Module:
        return SoftMoaBranch(self.of(site), self.slots, self.normalise, self.placement)


@register("audio.dense_moa")
@dataclass(frozen=True)
class DenseMoa(_Mixture):
    """Every expert sees every token; a softmax gate weighs them. No auxiliary loss."""

    def build(self, site: Site) -> nn.Module:
        return DenseMoaBranch(self.of(site), self.placement)


class Experts(nn.Module):
    """N bottleneck adapters side by side: down (N, R, D), up (N, D, R). `up` starts at zero, so the mixture does."""

    def __init__(self, dim: int, experts: int, bottleneck: int):
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, bottleneck, dim))
        self.down_bias = nn.Parameter(torch.empty(experts, bottleneck))
        self.up = nn.Parameter(torch.zeros(experts, dim, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(experts, dim))
        bound = 1 / math.sqrt(dim)  # as nn.Linear starts, expert by expert
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.uniform_(self.down_bias, -bound, bound)

    def of_tokens(self, x: Tensor, gate: nn.Linear, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden features (B, T, N, R) of the same tokens (B, T, D) for all experts, and the gate's logits (B, T, N):
        both read the tokens in one product."""
        weight = torch.cat([self.down.flatten(0, 1), gate.weight])
        h = F.linear(x, weight, torch.cat([self.down_bias.flatten(), gate.bias]))
        return F.gelu(h[..., : -len(gate.bias)]).unflatten(-1, self.down.shape[:2]), h[..., -len(gate.bias) :]

    def of_slots(self, s: Tensor) -> Tensor:
        """Hidden features (N, B, S, R) of slots (N, B, S, D), each expert on its own."""
        h = F.gelu(torch.baddbmm(self.down_bias[:, None], s.flatten(1, 2), self.down.transpose(1, 2)))
        return h.unflatten(1, s.shape[1:3])


class SoftMoaBranch(nn.Module):
    """out = C Y, Y_n = A_n(D^T X); X (B, T, D), Phi (D, N, S): N experts with S slots each.

    D = softmax over the tokens, C = softmax over all N S slots of one token, of the same logits L = X Phi. Padding
    (context.token_mask False) gets no weight in any slot; what it receives itself is never read.
    """

    def __init__(
        self, experts: Experts | Conformers, slots: int = 1, normalise: bool = False, placement: Placement = "parallel"
    ):
        super().__init__()
        self.experts = experts
        num, _, dim = experts.down.shape
        self.phi = nn.Parameter(torch.empty(dim, num, slots))
        nn.init.normal_(self.phi, std=math.sqrt(2 / (slots * (num + dim))))  # the reference's xavier normal
        self.logit_scale = nn.Parameter(torch.ones(())) if normalise else None
        self.placement = placement

    def router(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """logits (B, T, N*S), dispatch (sums to 1 over T) and combine (sums to 1 over N*S) weights, in float32."""
        phi = self.phi.flatten(1)
        if self.logit_scale is not None:
            phi = F.normalize(phi, dim=0) * self.logit_scale
            logits = F.normalize(x, dim=-1) @ phi
        else:
            logits = x @ phi
        logits = _wide(logits)  # a softmax over thousands of tokens loses its small weights in bfloat16
        masked = logits if mask is None else logits.masked_fill(~mask[..., None], float("-inf"))
        return logits, masked.softmax(1), logits.softmax(-1)

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        shape, source = y.shape, x if self.placement == "parallel" else y
        tokens = source.flatten(1, -2)  # (B, T, D), also from grids of tokens
        _, dispatch, combine = self.router(tokens, token_mask(context, tokens))
        e, slots = self.experts, self.phi.shape[2]
        s = dispatch.to(tokens.dtype).transpose(1, 2) @ tokens  # (B, N*S, D)
        h = e.of_slots(s.unflatten(1, (-1, slots)).transpose(0, 1)).flatten(1, 2)  # (N, B*S, R)
        out = torch.baddbmm(e.up_bias[:, None], h, e.up.transpose(1, 2))
        out = out.unflatten(1, (-1, slots)).transpose(0, 1).flatten(1, 2)  # (B, N*S, D)
        combine = combine.to(out.dtype)
        if y.dtype == out.dtype:  # one pass over (B, T, D) less; autocast would cut a float32 y to half precision here
            return torch.baddbmm(y.flatten(1, -2), combine, out).reshape(shape)
        return y + (combine @ out).reshape(shape)

    @torch.no_grad()
    def diagnostics(self, x: Tensor, mask: Tensor | None = None) -> dict[str, float | list[float]]:
        """How the router works on tokens x (B, T, D); one that does nothing has entropy 1 and a slot norm far below 1.

        logit_std; dispatch_entropy / ln(number of real tokens); slot_norm: mean slot norm over mean token norm;
        load: share of the combine weight that goes to each expert.
        """
        logits, dispatch, combine = self.router(x, mask)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        entropy = -(dispatch * dispatch.clamp_min(1e-30).log()).sum(1) / real.sum(1, keepdim=True).log().clamp_min(1e-6)
        slots = dispatch.to(x.dtype).transpose(1, 2) @ x
        return {
            "logit_std": float(logits[real].std()),
            "dispatch_entropy": float(entropy.mean()),
            "slot_norm": float(slots.norm(dim=-1).mean() / x[real].norm(dim=-1).mean()),
            "load": combine[real].mean(0).unflatten(0, (-1, self.phi.shape[2])).sum(1).tolist(),
        }


class DenseMoaBranch(nn.Module):
    """out = sum_n softmax(W_g x + b_g)_n A_n(x) for every token, as one pair of wide products.

    The gate scales the hidden features, so that (B, T, D, N) is never built:
    sum_n g_n (U_n h_n + b_n) = [U_1 .. U_N b_1 .. b_N] [g_1 h_1; ..; g_N h_N; g_1; ..; g_N].
    """

    def __init__(self, experts: Experts | Conformers, placement: Placement = "parallel"):
        super().__init__()
        self.experts = experts
        num, _, dim = experts.down.shape
        self.gate = nn.Linear(dim, num)
        self.placement = placement
        if num == 1:
            reason = "a gate over one expert is always 1"
            self.exempt = {"gate.weight": reason, "gate.bias": reason}

    def router(self, x: Tensor) -> Tensor:
        """(..., N) gate weights, summing to 1, in float32."""
        return _wide(self.gate(x)).softmax(-1)

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        source, e = x if self.placement == "parallel" else y, self.experts
        tokens = source.flatten(1, -2)  # (B, T, D), also from grids of tokens
        h, logits = e.of_tokens(tokens, self.gate, token_mask(context, tokens))
        gate = _wide(logits).softmax(-1).to(y.dtype)  # (B, T, N)
        h = h * gate[..., None]
        out = torch.cat([h.flatten(-2), gate], -1) @ torch.cat([e.up.transpose(1, 2).flatten(0, 1), e.up_bias])
        return y + out.unflatten(1, y.shape[1:-1])

    @torch.no_grad()
    def diagnostics(self, x: Tensor, mask: Tensor | None = None) -> dict[str, float | list[float]]:
        """gate_entropy / ln N (1: the gate does not choose) and load, each expert's share, on tokens x (B, T, D)."""
        gate = self.router(x)
        gate = gate.flatten(0, -2) if mask is None else gate[mask]
        entropy = -(gate * gate.clamp_min(1e-30).log()).sum(-1).mean() / max(math.log(gate.shape[-1]), 1e-6)
        return {"gate_entropy": float(entropy), "load": gate.mean(0).tolist()}


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
