"""Output layers: what they read of the features, and how they classify it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.features import num_prefix, pool_parts, pooled, see, width


class LinearHead(nn.Linear):
    """Logits of pooled features; pool: parts joined by +, as `adaptsuite.features.pooled` gives them."""

    def __init__(self, backbone: nn.Module, num_classes: int, pool: str):
        parts = pool_parts(pool, backbone)
        super().__init__(sum(width(backbone, part) for part in parts), num_classes)
        self.pool = parts
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def read(self, backbone: nn.Module, image: Tensor) -> Tensor:
        """(B, features) of normalised images (B, 3, H, W)."""
        return pooled(see(backbone, image, own="own" in self.pool), self.pool)


class LayersHead(nn.Module):
    """Linear(norm(relu(sum_l w_l CLS_l))): the CLS tokens behind all blocks, before the final norm; w_l start as 1/L.

    Intermediate feature aggregation, as the code of arXiv:2409.11051 has it (`ifacls`), without its bias, which can
    close every relu at the start.
    """

    def __init__(self, backbone: nn.Module, num_classes: int):
        super().__init__()
        if not all(hasattr(backbone, name) for name in ("forward_intermediates", "blocks")) or not num_prefix(backbone):
            raise UsageError(
                f"head.kind=ifa reads the CLS tokens of a timm transformer's blocks, {type(backbone).__name__} has none"
            )
        self.mix = nn.Linear(len(backbone.blocks), 1, bias=False)
        self.norm = nn.LayerNorm(width(backbone))
        self.dense = nn.Linear(width(backbone), num_classes)
        nn.init.constant_(self.mix.weight, 1 / len(backbone.blocks))
        nn.init.trunc_normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def read(self, backbone: nn.Module, image: Tensor) -> Tensor:
        layers = backbone.forward_intermediates(
            image, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        cls = torch.stack([prefix[:, 0] for _, prefix in layers], -1)  # (B, D, L)
        return self.norm(F.relu(self.mix(cls)[..., 0]))

    def forward(self, features: Tensor) -> Tensor:
        return self.dense(features)
