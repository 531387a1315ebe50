"""Tip-Adapter (Zhang et al. 2022, arXiv:2207.09519): a cache of the shots beside the class names, without training.

Features are unit vectors of a frozen image tower; all of it works on them, so a picture is seen once.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BETAS, ALPHAS = (1.0, 3.0, 5.5, 8.0), (0.3, 1.0, 2.0, 4.0)  # that validation rows choose among; 5.5 and 1 without any


@dataclass(frozen=True)
class Cache:
    """Keys (N, E), the shots' features; values (N, C), their labels one-hot; residual ratio and sharpness."""

    keys: Tensor
    values: Tensor
    alpha: float = 1.0
    beta: float = 5.5

    def logits(self, features: Tensor, zero_shot: Tensor) -> Tensor:
        """(B, C) alpha exp(-beta (1 - f K^T)) V + zero_shot (B, C), the scaled cosines with the names (eq. 4 and 5)."""
        affinity = torch.exp(-self.beta * (1 - features @ self.keys.T))  # (B, N)
        return self.alpha * affinity @ self.values + zero_shot


def cached(features: Tensor, labels: Tensor, num_classes: int, **settings: float) -> Cache:
    """The cache of shots (N, E) with labels (N,)."""
    return Cache(F.normalize(features, dim=-1), F.one_hot(labels, num_classes).to(features.dtype), **settings)


def chosen(cache: Cache, features: Tensor, zero_shot: Tensor, labels: Tensor) -> Cache:
    """The cache with the alpha and beta that are right most often on these rows; the first of equals."""
    found = [(Cache(cache.keys, cache.values, a, b)) for b in BETAS for a in ALPHAS]
    right = [float((c.logits(features, zero_shot).argmax(1) == labels).float().mean()) for c in found]
    return found[right.index(max(right))]


def tuned(
    cache: Cache, features: Tensor, zero_shot: Tensor, labels: Tensor, epochs: int = 20, lr: float = 1e-3, seed: int = 0
) -> Cache:
    """Tip-Adapter-F: keys trained from the cache by cross-entropy (section 3.3), AdamW, cosine, batches of 256."""
    keys = cache.keys.clone().requires_grad_(True)
    trained = Cache(keys, cache.values, cache.alpha, cache.beta)
    order, batch = torch.Generator().manual_seed(seed), 256
    optimizer = torch.optim.AdamW([keys], lr=lr, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // batch))
    with torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=order).split(batch):
                optimizer.zero_grad()
                F.cross_entropy(trained.logits(features[rows], zero_shot[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return Cache(keys.detach(), cache.values, cache.alpha, cache.beta)
