"""Losses that no library of ours brings."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
