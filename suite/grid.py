"""The grid that image tokens stand on: how a branch sees it, and what happens to it where tokens are joined.

A host embeds patches row by row behind its prefix tokens. A branch with `needs_grid` gets their (h, w) in its context;
a branch with `shrink` gives fewer tokens than it got: the core tells the new grid to every branch behind it, and cuts
the rotary tables that later blocks are given. Nothing is remembered between two forwards: shrinks are fixed, the grid
that they start from belongs to the forward's context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError

TABLES = ("rope", "position_embeddings", "rotary_pos_emb")  # arguments of blocks that hold a row for each patch


@dataclass(frozen=True)
class Shrink:
    """The geometry of a convolution over the grid; odd kernels, so that each new token has a middle."""

    kernel: int = 3
    stride: int = 1
    padding: int = 0

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"kernel is {self.kernel}: an odd number is needed, so that each token has a middle")
        if self.stride < 1 or not 0 <= self.padding <= self.kernel // 2:
            raise UsageError(
                f"stride {self.stride}, padding {self.padding}: a stride from 1 and a padding from 0 to half the "
                f"kernel ({self.kernel // 2}) are needed"
            )

    def of(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The grid behind it. Raises UsageError where nothing is left."""
        new = tuple((n + 2 * self.padding - self.kernel) // self.stride + 1 for n in grid)
        if min(new) < 1:
            raise UsageError(
                f"a grid of {' x '.join(map(str, grid))} tokens is too small for a kernel of {self.kernel} with padding"
                f" {self.padding}: take a larger image, or fewer places where tokens are joined"
            )
        return new

    def middles(self, size: int) -> range:
        """Along one side of `size` tokens: the old place at the middle of each new token."""
        start, (count,) = (self.kernel - 1) // 2 - self.padding, self.of((size,))
        return range(start, start + count * self.stride, self.stride)


def to_map(tokens: Tensor, prefix: int, grid: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """(prefix tokens (B, P, D), the others as a map (B, D, h, w)) of tokens (B, P + h w, D).

    Hosts that keep the grid themselves give (B, h, w, D), which has no prefix. Raises UsageError for other shapes.
    """
    if tokens.ndim == 4:
        return tokens.new_zeros(len(tokens), 0, tokens.shape[-1]), tokens.permute(0, 3, 1, 2)
    if grid is None or len(grid) != 2 or tokens.ndim != 3:
        told = "no grid" if grid is None else f"a grid of {' x '.join(map(str, grid))}"
        raise UsageError(
            f"tokens of shape {tuple(tokens.shape)} with {told}: a host with a grid of two sides is needed"
        )
    h, w = grid
    if tokens.shape[1] != prefix + h * w:
        raise UsageError(
            f"{tokens.shape[1]} tokens are not {prefix} in front of a grid of {h} x {w}: the host attends within "
            "windows (then take sites=mlp) or drops patches, or another adapter has added or left out some"
        )
    return tokens[:, :prefix], tokens[:, prefix:].transpose(1, 2).unflatten(2, (h, w))


def from_map(front: Tensor, grid_map: Tensor, like: Tensor) -> Tensor:
    """The way back: (B, P + h w, D), or (B, h, w, D) where the host keeps the grid as `like` does."""
    if like.ndim == 4:
        return grid_map.permute(0, 2, 3, 1)
    return torch.cat([front, grid_map.flatten(2).transpose(1, 2)], 1)


# what a block has that was made for one grid: windows, or a bias for each pair of tokens
TIED = ("relative_position_bias_table", "rel_pos_bias", "rel_pos", "rel_pos_h", "cpb_mlp", "window_size")


def refuse_shrink(path: str, block: nn.Module) -> None:
    """Raises UsageError for a block that needs all tokens of the grid it was made for."""
    for part in block.modules():
        tied = next((name for name in TIED if _there(getattr(part, name, None))), None)
        if tied:
            raise UsageError(
                f"{path} ({type(block).__name__}) is tied to its grid by {tied}: no tokens may be joined here; modules "
                "that keep the grid (vision.ila_plus with locations= empty) and adapters inside blocks fit"
            )


def _there(value: Any) -> bool:
    """Not None, and no window of size 0, which is how some hosts call global attention."""
    return value is not None and (isinstance(value, Tensor | nn.Module) or bool(value))


def cut(value: Any, grid: tuple[int, ...], shrinks: Sequence[Shrink]) -> Any:
    """A rotary table (..., h w, D) as the tokens behind the shrinks need it: the rows of their middles.

    Tuples of tables are cut one by one; what is no such table comes back as it is.
    """
    if isinstance(value, tuple):
        return tuple(cut(v, grid, shrinks) for v in value)
    h, w = grid
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-2] != h * w:
        return value
    rows, columns = range(h), range(w)
    for shrink in shrinks:
        rows = [rows[i] for i in shrink.middles(len(rows))]
        columns = [columns[i] for i in shrink.middles(len(columns))]
    kept = [row * w + column for row in rows for column in columns]
    return value[..., kept, :]
