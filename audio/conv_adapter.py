"""Adapters that convolve over the token sequence: conformer and convpass (Cappellazzo et al. 2023, arXiv:2312.03694).

Tokens keep the backbone's order (AST: CLS, DIST, then patches row by row). Padding counts as zero in a convolution.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.bottleneck import BottleneckBranch, Insert, InsertBranch
from adaptsuite.convpass import start_as_identity
from adaptsuite.errors import UsageError
from adaptsuite.method import register


@dataclass(frozen=True)
class _Convolution(Insert):
    bottleneck: int = 8
    kernel: int = 3

    mergeable = "a convolution over tokens mixes them, no weight of the backbone can hold it"

    def check(self) -> None:
        super().check()
        if self.kernel < 1:
            raise UsageError(f"{self.name}: kernel is {self.kernel}, it must be at least 1")


@register("audio.conformer")
@dataclass(frozen=True)
class Conformer(_Convolution):
    """Conformer adapter: norm, GLU, depthwise convolution over time, batch norm, SiLU (arXiv:2312.03694, 3.2)."""

    kernel: int = 8  # 31 for speech, 8 for sound events, in the paper

    def branch(self, dim: int, dim_out: int) -> InsertBranch:
        return ConformerBranch(dim, self.bottleneck, dim_out, self.kernel)


@register("audio.convpass")
@dataclass(frozen=True)
class Convpass(_Convolution):
    """Convpass adapter: down, convolution over three tokens, up (Jie and Deng 2022, arXiv:2207.07039)."""

    def branch(self, dim: int, dim_out: int) -> InsertBranch:
        return ConvpassBranch(dim, self.bottleneck, dim_out, self.kernel)


class Conformers(nn.Module):
    """N conformer adapters side by side up to their hidden features; `up` (N, D_out, R) starts at zero.

    h = SiLU(BN(depthwise(GLU(W LN(x) + b)))); each of the N has its own norm, weights and kernels. In the reference the
    norm's output is never used, and its parameters count as trained all the same.
    """

    def __init__(self, num: int, dim: int, bottleneck: int, dim_out: int, kernel: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num, dim))
        self.shift = nn.Parameter(torch.zeros(num, dim))
        self.down = nn.Parameter(torch.empty(num, 2 * bottleneck, dim))
        self.down_bias = nn.Parameter(torch.empty(num, 2 * bottleneck))
        bound = 1 / math.sqrt(dim)  # as nn.Linear starts
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.uniform_(self.down_bias, -bound, bound)
        self.depthwise = nn.Conv1d(num * bottleneck, num * bottleneck, kernel, groups=num * bottleneck)
        self.norm = nn.BatchNorm1d(num * bottleneck)
        self.up = nn.Parameter(torch.zeros(num, dim_out, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(num, dim_out))

    def of_tokens(
        self, x: Tensor, gate: nn.Linear | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden features (B, T, N, R) of the same tokens (B, T, D) for all N, and a mixture's gate logits."""
        weight = self.down * self.gain[:, None]  # the norm's affine, folded into what follows: one wide product
        bias = self.down_bias + torch.einsum("nrd,nd->nr", self.down, self.shift)
        h = F.linear(F.layer_norm(x, x.shape[-1:]), weight.flatten(0, 1), bias.flatten())
        h = F.glu(h.unflatten(-1, bias.shape), -1)  # (B, T, N, R)
        if mask is not None:
            h = h * mask[..., None, None]
        h = self._convolve(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return h, None if gate is None else gate(x)

    def of_slots(self, s: Tensor) -> Tensor:
        """Hidden features (N, B, S, R) of slots (N, B, S, D), each of the N on its own; one slot alone meets only the
        middle of the kernel."""
        x = F.layer_norm(s.flatten(1, 2), s.shape[-1:]) * self.gain[:, None] + self.shift[:, None]
        h = F.glu(torch.baddbmm(self.down_bias[:, None], x, self.down.transpose(1, 2)), -1)
        h = h.unflatten(1, s.shape[1:3])  # (N, B, S, R)
        return self._convolve(h.permute(1, 0, 3, 2)).permute(1, 0, 3, 2)

    def _convolve(self, h: Tensor) -> Tensor:
        """(B, N, R, T), over T with as many outputs as inputs."""
        flat = F.silu(self.norm(self.depthwise(_same(h.flatten(1, 2), self.depthwise.kernel_size[0]))))
        return flat.unflatten(1, h.shape[1:3])


class ConformerBranch(InsertBranch):
    """One conformer adapter."""

    def __init__(self, dim: int, bottleneck: int, dim_out: int, kernel: int):
        super().__init__()
        self.conformer = Conformers(1, dim, bottleneck, dim_out, kernel)

    def adapt(self, tokens: Tensor, context) -> Tensor:
        c, sequence = self.conformer, tokens.flatten(1, -2)
        h = c.of_tokens(sequence, mask=token_mask(context, sequence))[0][..., 0, :]
        return F.linear(h, c.up[0], c.up_bias[0]).unflatten(1, tokens.shape[1:-1])


class ConvpassBranch(BottleneckBranch):
    """up(q(conv(q(down(x))))), q(x) = x sigmoid(1.702 x). The convolution starts as the identity; in the reference its
    output is never used."""

    def __init__(self, dim: int, bottleneck: int, dim_out: int, kernel: int):
        super().__init__(dim, bottleneck, dim_out, "quick_gelu")
        self.conv = nn.Conv1d(bottleneck, bottleneck, kernel)
        start_as_identity(self.conv)

    def between(self, h: Tensor, context) -> Tensor:
        sequence = h.flatten(1, -2)
        mask = token_mask(context, sequence)
        if mask is not None:
            sequence = sequence * mask[..., None]
        sequence = self.conv(_same(sequence.transpose(1, 2), self.conv.kernel_size[0])).transpose(1, 2)
        return self.activate(sequence).unflatten(1, h.shape[1:-1])


def _same(x: Tensor, kernel: int) -> Tensor:
    """(B, C, T) padded with zeros so that a convolution keeps T; an even kernel looks one further ahead than back."""
    return F.pad(x, ((kernel - 1) // 2, kernel // 2))


def token_mask(context, tokens: Tensor) -> Tensor | None:
    """The mask of real tokens where it is one of these tokens (windowed hosts shuffle theirs)."""
    mask = context.token_mask if context is not None else None
    return mask if mask is not None and mask.shape == tokens.shape[:2] else None
