"""nn.MultiheadAttention step by step, for branches on projections that it reads without calling a module.

Its own forward hands all weights to one function, so that no hook sees q, k or v. Branches that change a weight need
none of this (adaptsuite.bank.Shadow); those that depend on the sample do.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError

# (part: q, k, v or out; what its projection reads; what it gives) -> what it shall give, all (B, T, D)
Change = Callable[[str, Tensor, Tensor], Tensor]


def attend(
    module: nn.MultiheadAttention,
    change: Change,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `module` gives, with every projection's output passed through `change`; arguments as its own forward's.

    Raises UsageError for unbatched input and for keys beside the input's own (bias_kv, add_zero_attn).
    """
    if query.ndim != 3 or module.bias_k is not None or module.add_zero_attn:
        raise UsageError("branches inside nn.MultiheadAttention need batched input, and no bias_kv or add_zero_attn")
    same = query is key and key is value
    if module.batch_first:  # computed as torch does it, batch second: without a change the result is bit-equal
        query, key, value = (query.transpose(0, 1),) * 3 if same else (x.transpose(0, 1) for x in (query, key, value))
    projected = zip("qkv", (query, key, value), _project(module, query, key, value, same), strict=True)
    q, k, v = (_heads(module, _changed(change, *part)) for part in projected)
    mask = _joined(attn_mask, key_padding_mask, q)
    dropout = module.dropout if module.training else 0.0
    if need_weights:
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        weights = (logits if mask is None else logits + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        z = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        z, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout), None
    z = z.permute(2, 0, 1, 3).flatten(2)  # (T, B, D)
    y = _changed(change, "out", z, F.linear(z, module.out_proj.weight, module.out_proj.bias))
    return y.transpose(0, 1) if module.batch_first else y, weights


def _changed(change: Change, part: str, x: Tensor, y: Tensor) -> Tensor:
    return change(part, x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)


def _project(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, same: bool) -> Sequence[Tensor]:
    packed, bias = getattr(module, "in_proj_weight", None), module.in_proj_bias
    if packed is not None and same:
        return F.linear(query, packed, bias).unflatten(-1, (3, -1)).unbind(-2)
    weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if packed is None else packed.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]


def _heads(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """(T, B, D) as (B, H, T, D / H)."""
    return x.unflatten(-1, (module.num_heads, -1)).permute(1, 2, 0, 3)


def _joined(attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
    """Both masks, (T, S) or (B * H, T, S) and (B, S), as one summand of the logits (B, H, T, S)."""
    mask = None if attn_mask is None else _summand(attn_mask, like)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (len(like), -1))
    if padding is None:
        return mask
    padding = _summand(padding, like)[:, None, None]
    return padding if mask is None else mask + padding


def _summand(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask says what is left out."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
