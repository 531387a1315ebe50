"""Read-only prompt optimisation (Lee et al. 2023, arXiv:2308.14960, section 3) for models with two CLIP-like towers.

K pairs of prompts stand behind the tokens of both towers. They read every token; no token, and no prompt, reads them,
so what the backbone says of a picture or a text stays what it was. A task model compares what became of the prompts
(`adaptsuite.vl.two_tower`) in place of CLS and end of text.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.sites import CLS_TOKENS, Site
from adaptsuite.vl.hosts import Part, parts

MASKS = ("attn_mask", "attention_mask")  # arguments of blocks
PRE_NORMS = ("ln_pre", "pre_layrnorm")  # what CLIP's image tower does to its tokens ahead of the blocks


@register("vl.rpo")
@dataclass(frozen=True)
class Rpo(Method):
    """Prompts start as the end-of-text embedding and as CLS, each without a position, plus normal noise.

    With 24 pairs 30,720 values train on ViT-B/16. The authors' code writes text prompts into its cached embeddings in
    place; here they are joined to the tokens of each forward.
    """

    tokens: int = 24  # pairs of prompts
    noise: float = 0.1  # standard deviation of what is added to the embedding that a prompt starts as
    sites: tuple[str, ...] = ("block",)

    identity_at_start = False
    mergeable = "prompts are tokens, no weight of the backbone can hold them"

    def check(self) -> None:
        self.expect("tokens", self.tokens >= 1, "at least 1")
        self.expect("noise", 0 <= self.noise < float("inf"), "a number from 0")

    def shared(self, sites: list[Site]) -> nn.Module:
        towers = len({site.component for site in sites})
        if towers != 2:
            raise UsageError(f"{self.name}: one image tower and one text tower are needed, here are {towers} towers")
        return ReadOnlyPrompts(sites, self.tokens)

    def build(self, site: Site, shared: "ReadOnlyPrompts") -> nn.Module:
        if site.role != "block":
            raise UsageError(f"{self.name}: prompts enter whole blocks, {site.role!r} is none; leave sites at block")
        return ReadOnlyBranch(site, shared)

    def bind(self, model: nn.Module, adapter: nn.Module) -> None:
        """Prompts as what they stand for, by the host's own embeddings."""
        prompts, known = adapter.shared, {part.name: part for part in parts(model)}
        for name, table in prompts.tables.items():
            part = known[name.replace("/", ".")]
            module = model.get_submodule(part.root)
            like = _class_token(module, part) if part.kind == "vision" else _end_of_text(module, part)
            if part.kind == "vision":
                prompts.norms[name] = next((n for p in PRE_NORMS if (n := getattr(module, p, None)) is not None), None)
            with torch.no_grad():
                table.copy_(like + self.noise * torch.randn_like(table))


class ReadOnlyPrompts(nn.Module):
    """The prompts (K, D) of each tower."""

    def __init__(self, sites: list[Site], tokens: int):
        super().__init__()
        first: dict[str, Site] = {}
        for site in sites:
            first.setdefault(site.component, site)
        self.tokens, self.first = tokens, {site.key for site in first.values()}
        self.tables = nn.ParameterDict(
            {_name(site): nn.Parameter(torch.zeros(tokens, site.dim)) for site in first.values()}
        )
        self.__dict__["norms"] = {}  # tower -> the host's norm that its prompts pass; no child of this module

    def of(self, site: Site) -> Tensor:
        table, norm = self.tables[_name(site)], self.norms.get(_name(site))
        return table if norm is None else norm(table.to(norm.weight.dtype))


def _name(site: Site) -> str:
    return site.component.replace(".", "/")


class ReadOnlyBranch(nn.Module):
    """One block over T tokens and K prompts behind them."""

    def __init__(self, site: Site, shared: ReadOnlyPrompts):
        super().__init__()
        self.__dict__["shared"] = shared  # the adapter owns it, once
        self.site = site

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        name = next(iter(given.arguments))
        x, more = given.arguments[name], self.shared.tokens
        mask = next((k for k in MASKS if k in inspect.signature(module.forward).parameters), None)
        if mask is None or x.ndim != 3 or not self.site.batch_first:
            raise UsageError(
                f"{type(module).__name__} takes no mask over tokens (B, T, D): prompts would be read in it"
            )
        if self.site.key in self.shared.first:
            prompts = self.shared.of(self.site).to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([x, prompts], 1)
        own, rest = given.arguments.get(mask), given.arguments.get("kwargs", {})
        causal = own is None and bool(rest.get("is_causal", False))
        given.arguments[name] = x
        given.arguments[mask] = read_only(own, x.shape[1] - more, more, x, causal)
        return given.args, given.kwargs

    def exit(self, module: nn.Module) -> None:
        """Prompts stay behind the tokens, for the reader at the end of the tower."""

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        return y


def read_only(mask: Tensor | None, length: int, more: int, like: Tensor, causal: bool = False) -> Tensor:
    """A mask (..., T, T) over `length` tokens, for `more` prompts behind them: (..., T + more, T + more).

    No row sees a prompt, and a prompt sees what the last token sees. None: all tokens see all, or with `causal` none
    that comes later. Boolean masks say what is seen (transformers' do), others are summands of the logits.
    """
    if mask is None:
        mask = like.new_zeros(length, length)
        mask = mask + like.new_full((length, length), float("-inf")).triu(1) if causal else mask
    mask = mask.expand(*mask.shape[:-2], length, length)
    rows = torch.cat([mask, mask[..., -1:, :].expand(*mask.shape[:-2], more, length)], -2)
    hidden = False if mask.dtype == torch.bool else float("-inf")
    return torch.cat([rows, rows.new_full((*rows.shape[:-1], more), hidden)], -1)


def _class_token(tower: nn.Module, part: Part) -> Tensor:
    for holder in (tower, getattr(tower, "embeddings", None)):
        for name in CLS_TOKENS:
            if isinstance(token := getattr(holder, name, None), nn.Parameter):
                return token.detach().reshape(1, -1)
    raise UsageError(f"vl.rpo: {part.name} ({part.family}) has no class token that prompts could start as")


def _end_of_text(tower: nn.Module, part: Part) -> Tensor:
    table = next((m for n, m in tower.named_modules() if n.rpartition(".")[2] == "token_embedding"), None)
    if table is None:
        raise UsageError(f"vl.rpo: {part.name} ({part.family}) is no CLIP-like text tower: it has no token_embedding")
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "argmax"))
    if pool not in ("argmax", "eos"):
        raise UsageError(f"vl.rpo: {part.name} reads its {pool} token, where prompts would stand, not the end of text")
    return table.weight[end_of_text(tower, table.num_embeddings)].detach().reshape(1, -1)


def end_of_text(tower: nn.Module, size: int) -> int:
    """Number of the token that CLIP's text tower reads: what it names itself, else the highest of its vocabulary."""
    named = (getattr(tower, "text_eos_id", None), getattr(tower, "eos_id", None), getattr(tower, "eos_token_id", None))
    found = next((number for number in named if number is not None), None)
    return size - 1 if found in (None, 2) else found  # 2: old configs of transformers, which read the highest too
