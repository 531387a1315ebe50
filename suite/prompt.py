"""Prompts: learned tokens among a transformer's own (Jia et al. 2022, arXiv:2203.12119, section 3.2)."""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.sites import Site


@register("prompt")
@dataclass(frozen=True)
class Prompt(Method):
    """Learned tokens behind CLS (in front where there is none): own ones for every block, or one set from the first.

    Blocks give as many tokens as they got: prompts leave with the last block they were for. Masks are lengthened.
    """

    tokens: int = 25
    deep: bool = True  # new prompts in each block; False: those of the first block travel on
    replace_dist: bool = False  # AST's code: prompts stand in place of DIST, whose place then gets their mean
    dropout: float = 0.0  # of the prompts' values
    sites: tuple[str, ...] = ("block",)

    identity_at_start = False
    mergeable = "prompts are tokens, no weight of the backbone can hold them"

    def check(self) -> None:
        self.expect("tokens", self.tokens >= 1, "at least 1")
        self.expect("dropout", 0 <= self.dropout < 1, "in [0, 1)")

    def shared(self, sites: list[Site]) -> nn.Module:
        return Prompts(sites, self.tokens, self.deep)

    def build(self, site: Site, shared: "Prompts") -> nn.Module:
        if site.role != "block":
            raise UsageError(f"{self.name}: prompts enter whole blocks, {site.role!r} is none; leave sites at block")
        if self.replace_dist and site.prefix_tokens < 2:
            raise UsageError(f"{self.name}: replace_dist needs a DIST token behind CLS, this backbone has none")
        return PromptBranch(site, shared, self.replace_dist, self.dropout)


@register("vpt")
@dataclass(frozen=True)
class Vpt(Prompt):
    """Visual prompt tuning as its authors ran it: VPT-deep; deep=False, dropout=0 is VPT-shallow.

    The paper chooses among 1, 5, 10, 50, 100 and 200 tokens on validation data.
    """

    tokens: int = 50
    dropout: float = 0.1


class Prompts(nn.Module):
    """The learned tokens (tokens, D) of each block, or of each component's first, and where those leave again."""

    def __init__(self, sites: list[Site], tokens: int, deep: bool):
        super().__init__()
        ends: dict[str, list[Site]] = {}
        for site in sites:
            ends.setdefault(site.component, []).append(site)
        first = {run[0].key for run in ends.values()}
        self.last = {site.key for site in sites} if deep else {run[-1].key for run in ends.values()}
        self.tokens, self.tables = tokens, nn.ParameterDict()
        for site in sites:
            if deep or site.key in first:
                bound = math.sqrt(6 / (3 * 16 * 16 + site.dim))  # the paper's, for patches of 16 x 16 x 3
                self.tables[site.key] = nn.Parameter(torch.empty(tokens, site.dim).uniform_(-bound, bound))


class PromptBranch(nn.Module):
    """Prompts of one block: they enter with its input, and leave its output where they end."""

    def __init__(self, site: Site, shared: Prompts, replace_dist: bool, dropout: float = 0.0):
        super().__init__()
        self.__dict__["shared"] = shared  # the adapter owns it, once
        self.key, self.at, self.replaced = site.key, min(site.prefix_tokens, 1), int(replace_dist)
        self.batch_first, self.dropout = site.batch_first, dropout

    @property
    def more(self) -> int:
        """How many tokens longer the block's input gets."""
        return self.shared.tokens - self.replaced

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if hasattr(module, "window_size"):
            raise UsageError(f"{type(module).__name__} attends within windows of a grid: no token can be added")
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        name = next(iter(given.arguments))
        x = given.arguments[name] if self.batch_first else given.arguments[name].transpose(0, 1)
        if x.ndim != 3:
            raise UsageError(f"{type(module).__name__} gets {tuple(x.shape)}, tokens (B, T, D) are needed")
        own, table = x.shape[1], self.shared.tables.get(self.key)
        if table is None:
            own -= self.more
        else:
            prompts = table.to(x.dtype).expand(x.shape[0], -1, -1)  # len() would fix the batch of an export
            prompts = F.dropout(prompts, self.dropout, self.training) if self.dropout else prompts
            x = torch.cat([x[:, : self.at], prompts, x[:, self.at + self.replaced :]], 1)
        for key, value in given.arguments.items():
            given.arguments[key] = self._lengthened(key, value, own)
        given.arguments[name] = x if self.batch_first else x.transpose(0, 1)
        self._shift_rope(module, self.more)
        return given.args, given.kwargs

    def exit(self, module: nn.Module) -> None:
        self._shift_rope(module, -self.more)

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        if self.key not in self.shared.last:
            return y
        end = self.at + self.shared.tokens
        dist = [y[:, self.at : end].mean(1, keepdim=True)] * self.replaced
        return torch.cat([y[:, : self.at], *dist, y[:, end:]], 1)

    @staticmethod
    def _shift_rope(module: nn.Module, more: int) -> None:
        """timm's rotary attention leaves its first tokens unturned: prompts are among them."""
        for m in module.modules():
            if isinstance(m.__dict__.get("num_prefix_tokens"), int):
                m.num_prefix_tokens += more

    def _lengthened(self, name: str, value: Any, own: int) -> Any:
        """A mask over `own` tokens as one over the lengthened sequence; prompts are seen by all, and see what the first
        token sees. Whatever is no such mask comes back as it is."""
        if isinstance(value, dict):
            return {k: self._lengthened(k, v, own) for k, v in value.items()}
        if not isinstance(value, Tensor) or "mask" not in name or value.ndim < 2 or value.shape[-1] != own:
            return value
        # torch's own boolean masks say what to leave out, transformers' what to look at
        leaves_out = value.dtype == torch.bool and ("padding_mask" in name or name in ("src_mask", "attn_mask"))
        visible = 0 if value.is_floating_point() or leaves_out else 1
        at, more = self.at, self.more
        middle = F.pad(value[..., :at], (0, more), value=visible)
        value = torch.cat([middle, value[..., at:]], -1)
        if value.shape[-2] == own:
            row = value[..., :1, :].expand(*value.shape[:-2], more, -1)
            value = torch.cat([value[..., :at, :], row, value[..., at:, :]], -2)
        return value
