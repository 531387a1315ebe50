"""Prefixes: learned keys and values that every token attends to (Li and Liang 2021, arXiv:2101.00190, section 4)."""

import math
import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adaptsuite.errors import UsageError
from adaptsuite.method import Method, register
from adaptsuite.sites import Site


@register("prefix")
@dataclass(frozen=True)
class Prefix(Method):
    """Learned keys and values, behind the projections, in the attention of every block; no reparametrisation."""

    tokens: int = 12  # keys, and as many values
    sites: tuple[str, ...] = ("block",)

    identity_at_start = False
    mergeable = "a prefix takes part in every softmax, no weight of the backbone can hold it"

    def check(self) -> None:
        if self.tokens < 1:
            raise UsageError(f"prefix: tokens is {self.tokens}, it must be at least 1")

    def build(self, site: Site) -> nn.Module:
        if site.role != "block":
            raise UsageError(f"prefix: the attention of whole blocks is prefixed, {site.role!r} is none")
        return PrefixBranch(site.dim, self.tokens)


class PrefixBranch(nn.Module):
    """softmax(Q [P_k; K]^T) [P_v; V] in the one attention of a block; P_k, P_v (tokens, D), split by heads as K is."""

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        bound = math.sqrt(6 / (3 * 16 * 16 + dim))  # as prompts start
        self.key = nn.Parameter(torch.empty(tokens, dim).uniform_(-bound, bound))
        self.value = nn.Parameter(torch.empty(tokens, dim).uniform_(-bound, bound))

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mode = Prefixed(self.key, self.value)
        mode.__enter__()
        _running().append(mode)
        return args, kwargs

    def exit(self, module: nn.Module) -> None:
        mode = _running().pop()
        mode.__exit__(None, None, None)
        if mode.calls != 1:
            how = "by hand" if mode.calls == 0 else f"{mode.calls} times"
            raise UsageError(
                f"{type(module).__name__} computes attention {how}, a prefix needs one call of torch's own (of "
                "transformers: attn_implementation='sdpa')"
            )

    def forward(self, x: Tensor, y: Tensor, context) -> Tensor:
        return y


_local = threading.local()


def _running() -> list["Prefixed"]:
    """Modes of the blocks that this thread is in, innermost last."""
    if not hasattr(_local, "modes"):
        _local.modes = []
    return _local.modes


class Prefixed(TorchFunctionMode):
    """Lengthens the keys, values and masks of torch's attention while a block runs."""

    def __init__(self, key: Tensor, value: Tensor):
        super().__init__()
        self.key, self.value, self.calls = key, value, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self.attention(*args, **(kwargs or {}))
        if function is F.multi_head_attention_forward:
            return self.multi_head(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> Tensor:
        """query, key, value (B, H, T, D / H); the prefix is seen by every token, also under a causal mask."""
        self.calls += 1
        batch, heads, length, width = key.shape
        if heads * width != self.key.shape[1]:
            raise UsageError(f"keys have {heads} heads of {width}, a prefix of {self.key.shape[1]} does not fit")
        more = len(self.key)
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(query.shape[-2], length, dtype=torch.bool, device=key.device).tril()
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], length)
            seen = attn_mask.new_ones(()) if attn_mask.dtype == torch.bool else attn_mask.new_zeros(())
            attn_mask = torch.cat([seen.expand(*attn_mask.shape[:-1], more), attn_mask], -1)
        key, value = (
            torch.cat([p.to(x.dtype).view(more, heads, width).transpose(0, 1).expand(batch, -1, -1, -1), x], 2)
            for p, x in ((self.key, key), (self.value, value))
        )
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, False, **options)

    def multi_head(
        self, query, key, value, embed_dim, num_heads, in_weight, in_bias, bias_k, bias_v, add_zero_attn, dropout_p,
        out_weight, out_bias, training=True, key_padding_mask=None, need_weights=True, attn_mask=None,
        use_separate_proj_weight=False, q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, **rest,
    ):  # fmt: skip
        """nn.MultiheadAttention on (T, B, D), by way of `attention`; it gives no attention weights back."""
        if bias_k is not None or add_zero_attn:
            raise UsageError("an attention with bias_kv or add_zero_attn has keys of its own beside a prefix")
        if use_separate_proj_weight:
            biases = (None,) * 3 if in_bias is None else in_bias.chunk(3)
            weights = (q_proj_weight, k_proj_weight, v_proj_weight)
            parts = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        else:
            parts = F._in_projection_packed(query, key, value, in_weight, in_bias)
        q, k, v = (p.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for p in parts)  # (B, H, T, D / H)
        mask = None
        if attn_mask is not None:  # (T, S) or (B * H, T, S)
            mask = _additive(attn_mask, q)
            mask = mask.unflatten(0, (len(k), -1)) if mask.ndim == 3 else mask
        if key_padding_mask is not None:  # (B, S)
            padding = _additive(key_padding_mask, q)[:, None, None]
            mask = padding if mask is None else mask + padding
        out = self.attention(q, k, v, mask, dropout_p if training else 0.0)
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias), None


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """nn.MultiheadAttention's masks as summands of the logits: its boolean ones say what is left out."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
