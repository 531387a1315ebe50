"""Convpass: an adapter that convolves over the image (Jie and Deng 2022, arXiv:2207.07039)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.bottleneck import Bottleneck, BottleneckBranch, InsertBranch, initialise
from adaptsuite.grid import from_map, to_map
from adaptsuite.method import register
from adaptsuite.sites import Site


@register("convpass")
@dataclass(frozen=True)
class Convpass(Bottleneck):
    """Down, activation, a full k x k convolution over the grid of patches, activation, up; beside attention and MLP.

    The authors' code has quick_gelu and drops hidden features (.1); arXiv:2409.11051 compares with GELU, as here. The
    convolution starts as the identity, with another `start` like both projections.
    Attention within windows (Swin) sees parts of the image, some wrapped around its border, so that neighbours in a
    window are none in the image: such hosts are refused at `attn`; sites=mlp fits them.
    """

    bottleneck: int = 8
    sites: tuple[str, ...] = ("attn", "mlp")
    kernel: int = 3

    mergeable = "a convolution over tokens mixes them, no weight of the backbone can hold it"

    def check(self) -> None:
        super().check()
        self.expect("kernel", self.kernel >= 1 and self.kernel % 2 == 1, "an odd number, so that it has a middle")

    def build(self, site: Site) -> nn.Module:
        branch = super().build(site)
        branch.prefix = site.prefix_tokens
        return branch

    def branch(self, dim: int, dim_out: int) -> InsertBranch:
        return ConvpassBranch(dim, dim_out, self)


class ConvpassBranch(BottleneckBranch):
    """scale * up(g(conv(g(down(.))))) of (B, P + h w, D) or (B, h, w, D); beyond the grid there are zeros.

    Each of the P prefix tokens is an image of its own, of one pixel: it meets the middle of the kernel alone.
    """

    needs_grid = True
    prefix = 0

    def __init__(self, dim: int, dim_out: int, method: Convpass):
        width, kernel = method.bottleneck, method.kernel
        super().__init__(dim, width, dim_out, method.activation, method.scale, method.start, method.dropout)
        self.conv = nn.Conv2d(width, width, kernel, padding=kernel // 2)
        if method.start == "zero":
            start_as_identity(self.conv)
        else:
            initialise(self.conv, method.start)

    def between(self, h: Tensor, context) -> Tensor:
        front, image = to_map(h, self.prefix, context.grid if context is not None else None)
        middle = self.conv.kernel_size[0] // 2
        front = F.linear(front, self.conv.weight[:, :, middle, middle], self.conv.bias)
        return self.activate(from_map(front, self.conv(image), h))


def start_as_identity(conv: nn.Conv1d | nn.Conv2d) -> None:
    """Each feature to itself, through the middle of the kernel."""
    with torch.no_grad():
        conv.weight.zero_()
        middle = tuple((k - 1) // 2 for k in conv.kernel_size)
        conv.weight[(slice(None), slice(None), *middle)] = torch.eye(len(conv.weight))
        conv.bias.zero_()
