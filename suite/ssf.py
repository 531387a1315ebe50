"""Scaled and shifted features (Lian et al. 2022, arXiv:2210.08823)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.sites import Site

Start = Literal["identity", "normal"]


@register("ssf")
@dataclass(frozen=True)
class Ssf(Method):
    """gamma * y + beta behind every linear layer, every norm and the patch embedding (eq. 3), merged as eq. 4 says.

    Where a place has no bias of its own (EVA's fused qkv, RMS norms) there is no beta: no tensor of the backbone could
    hold it. What stands between blocks, such as Swin's patch merging, is left alone.
    """

    start: Start = "identity"  # ones and zeros; normal: N(1, .02) and N(0, .02), as in the authors' code
    sites: tuple[str, ...] = ("attn.qkv", "attn.out", "mlp.in", "mlp.out", "norm", "patch_embed?")

    norms = ()

    def check(self) -> None:
        self.expect_one_of("start", get_args(Start))

    @property
    def identity_at_start(self) -> bool:
        return self.start == "identity"

    def build(self, site: Site) -> nn.Module:
        if site.weight is None and site.role != "norm":
            raise UsageError(f"ssf scales what weights and norms give, {site.role!r} is neither; name norm, mlp.in ...")
        return SsfBranch(site.dim_out, site.bias is not None, self.start)


class SsfBranch(nn.Module):
    """gain * y + shift of features y (B, ..., D_out); no shift where nothing could hold it."""

    def __init__(self, dim_out: int, with_shift: bool, start: Start):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim_out))
        self.shift = nn.Parameter(torch.zeros(dim_out)) if with_shift else None
        if start == "normal":
            nn.init.normal_(self.gain, 1.0, 0.02)
            if with_shift:
                nn.init.normal_(self.shift, 0.0, 0.02)

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        y = y * self.gain
        return y if self.shift is None else y + self.shift

    def row_gain(self) -> Tensor:
        return self.gain

    def row_shift(self) -> Tensor:
        return self.shift
