"""Losses that no library of ours brings, and what they need to know of rare classes."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptsuite.errors import DataError


def asymmetric(
    logits: Tensor, target: Tensor, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05
) -> Tensor:
    """Asymmetric loss for several labels (Ridnik et al. 2021, arXiv:2009.14119, eq. 5 to 7), the mean over (B, K).

    With p = sigmoid(logit) and q = max(p - clip, 0):  -y (1 - p)^gamma_pos log p - (1 - y) q^gamma_neg log(1 - q).
    A negative below `clip` costs nothing and has no gradient. logits, target (B, K); a target may lie between 0 and 1.
    The paper sums over the labels; the mean keeps learning rates those of binary cross-entropy. The authors' code can
    stop the gradient at the two focusing weights; here, as in the equation, it passes through them.
    """
    p = logits.sigmoid()
    q = (p - clip).clamp(min=0)
    log_not = torch.log1p(-q) if clip > 0 else F.logsigmoid(-logits)  # 1 - q is at least clip, so its log is finite
    positive = (1 - p) ** gamma_pos * F.logsigmoid(logits)
    return -(target * positive + (1 - target) * q**gamma_neg * log_not).mean()


def class_weights(counts: Sequence[float] | np.ndarray | Tensor) -> Tensor:
    """(K,) float32 weights of classes by inverse frequency, where counts are: (K,) training rows of each class.

    N / (C n_k) with C classes that have rows: the mean over the training rows is 1, so learning rates stay. A class
    without rows weighs as if it had one. Raises DataError where no class has any.
    """
    counts = _counts(counts, torch.float32)
    return counts.sum() / ((counts > 0).sum() * counts.clamp(min=1))


def logit_adjusted(logits: Tensor, counts: Sequence[float] | np.ndarray | Tensor, tau: float = 1.0) -> Tensor:
    """logits (B, K) + tau log prior, for a cross-entropy in training only (Menon et al., arXiv:2007.07314, eq. 10).

    The prior is the share of the training rows, counts (K,); predictions take the plain logits. A class without rows
    counts as one row, which keeps its logit finite. At least float32.
    """
    counts = _counts(counts, torch.promote_types(logits.dtype, torch.float32)).to(logits.device)
    return logits + tau * (counts.clamp(min=1) / counts.sum()).log()


def _counts(counts: Sequence[float] | np.ndarray | Tensor, dtype: torch.dtype) -> Tensor:
    counts = torch.as_tensor(counts, dtype=dtype)
    if not counts.sum() > 0:
        raise DataError("classes cannot be weighed: none of them has a training row")
    return counts
