"""Output layers: what they read of the tokens, and how they classify it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.audio.inputs import Input
from adaptsuite.errors import UsageError, nearest

POOLS = ("cls", "mean", "std", "max", "rows")


class LinearHead(nn.Linear):
    """Logits of pooled tokens; pool: parts of POOLS joined by +, as `pooled` gives them. rows: of the tokens' grid."""

    def __init__(self, width: int, num_classes: int, pool: str = "mean", rows: int = 1):
        parts = tuple(pool.split("+"))
        for part in parts:
            if part not in POOLS:
                raise UsageError(f"head.pool={pool!r}: {part!r} is not known; {nearest(part, POOLS)}")
        super().__init__(width * sum(2 * rows if part == "rows" else 1 for part in parts), num_classes)
        self.pool = parts
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def read(self, tokens: Tensor, mask: Tensor | None, heard: Input) -> Tensor:
        """(B, D times the parts) of tokens (B, T, D) and the mask (B, T) of real ones."""
        return pooled(tokens, mask, self.pool, heard)


class HfHead(nn.Module):
    """The head of transformers' ASTForAudioClassification: (CLS + DIST) / 2, LayerNorm, Linear; exports as one."""

    def __init__(self, width: int, num_classes: int, eps: float):
        super().__init__()
        self.layernorm = nn.LayerNorm(width, eps=eps)
        self.dense = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def read(self, tokens: Tensor, mask: Tensor | None, heard: Input) -> Tensor:
        return self.layernorm((tokens[:, 0] + tokens[:, 1]) / 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.dense(z)


class PrototypeHead(nn.Module):
    """Prototypical probing (Rauch et al. 2025, arXiv:2504.12880, section 3): each class has J parts to look for.

    z = patch - CLS on the grid, bilinear x 2; s_cj = max over positions of ReLU(cos(z, p_cj) / 1.01);
    logit_c = sum_j ReLU(w_cj) s_cj + b_c, over the prototypes of the class alone. Padding is never found: its z is 0.
    Prototypes start from a normal distribution: from the reference's U[0, 1) they lie at cosine .75 to each other.
    """

    lr_scale = {"prototypes": 40.0, "weight": 0.4, "bias": 0.4}  # of the head's 1e-3: the paper's .04 and 4e-4

    def __init__(self, width: int, num_classes: int, per_class: int = 20):
        super().__init__()
        if per_class < 1:
            raise UsageError(f"head.prototypes is {per_class}, a class needs at least 1")
        self.prototypes = nn.Parameter(torch.randn(num_classes * per_class, width))
        self.weight = nn.Parameter(torch.ones(num_classes, per_class))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def read(self, tokens: Tensor, mask: Tensor | None, heard: Input) -> Tensor:
        """(B, D, rows, columns) patches, less the CLS token where there is one, 0 where padded."""
        patches = tokens[:, heard.prefix :]
        if heard.prefix:
            patches = patches - tokens[:, :1]
        if mask is not None:
            patches = patches * mask[:, heard.prefix :, None]
        return patches.transpose(1, 2).unflatten(2, heard.grid)

    def forward(self, z: Tensor) -> Tensor:
        z = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False).flatten(2)
        found = F.normalize(self.prototypes, dim=-1) @ F.normalize(z, dim=1)  # (B, K J, positions)
        s = F.relu(found.amax(-1) / 1.01).unflatten(1, self.weight.shape)
        return (F.relu(self.weight) * s).sum(-1) + self.bias

    def regulariser(self) -> Tensor:
        """||P P^T - I|| / its number of entries, over unit prototypes: they should differ."""
        p = F.normalize(self.prototypes, dim=-1)
        return torch.linalg.matrix_norm(p @ p.T - torch.eye(len(p), device=p.device)) / len(p) ** 2


def pooled(tokens: Tensor, mask: Tensor | None, parts: tuple[str, ...], heard: Input) -> Tensor:
    """(B, D times the parts) of tokens (B, T, D), over those of the mask (B, T).

    cls: the first token; mean, std, max: over all tokens, CLS and DIST included; rows: mean and std over time of each
    row of the grid, which keeps low apart from high.
    """
    weight = torch.ones_like(tokens[..., :1]) if mask is None else mask[..., None].to(tokens.dtype)

    def rows() -> Tensor:
        on_grid = (t[:, heard.prefix :].unflatten(1, heard.grid) for t in (tokens, weight))
        return torch.cat(_moments(*on_grid, dim=2), -1).flatten(1)

    mean, std = _moments(tokens, weight, dim=1)
    forms = {
        "cls": lambda: tokens[:, 0],
        "mean": lambda: mean,
        "std": lambda: std,
        "max": lambda: tokens.masked_fill(weight == 0, float("-inf")).amax(1),
        "rows": rows,
    }
    return torch.cat([forms[part]() for part in parts], -1)


def _moments(x: Tensor, weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation along one dimension, of what has weight 1."""
    count = weight.sum(dim)
    mean = (x * weight).sum(dim) / count
    return mean, (((x - mean.unsqueeze(dim)) ** 2 * weight).sum(dim) / count + 1e-6).sqrt()
