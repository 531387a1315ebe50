"""The asymmetric loss against its equation in plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from adaptsuite.losses import asymmetric


def by_hand(logits, target, gamma_neg, gamma_pos, clip):
    """arXiv:2009.14119, eq. 5 to 7, one label of one sample at a time."""
    total = 0.0
    for x, y in zip(logits.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        shifted = max(p - clip, 0.0)
        total -= y * (1 - p) ** gamma_pos * math.log(p) + (1 - y) * shifted**gamma_neg * math.log(1 - shifted)
    return total / logits.numel()


@pytest.mark.parametrize("settings", [(4.0, 1.0, 0.05), (2.0, 0.0, 0.0), (3.0, 2.0, 0.2)])
def test_equals_the_equation(settings):
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 5, dtype=torch.float64)
    target = (torch.rand(6, 5, dtype=torch.float64) < 0.4).double()
    target[0] = torch.rand(5, dtype=torch.float64)  # mixed clips have labels in between
    assert_close(float(asymmetric(logits, target, *settings)), by_hand(logits, target, *settings), rtol=1e-12, atol=0)


def test_without_focusing_and_shift_it_is_binary_cross_entropy():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 3), (torch.rand(4, 3) < 0.5).float()
    assert_close(asymmetric(logits, target, 0.0, 0.0, 0.0), F.binary_cross_entropy_with_logits(logits, target))


def test_an_easy_negative_has_no_gradient_and_a_hard_one_has():
    logits = torch.tensor([[-4.0, 1.0]], requires_grad=True)  # p = 0.018 and 0.73
    asymmetric(logits, torch.zeros(1, 2)).backward()
    assert logits.grad[0, 0] == 0 and logits.grad[0, 1] > 0


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_extreme_logits_give_finite_losses_and_gradients(clip):
    logits = torch.tensor([[200.0, -200.0, 200.0, -200.0]], requires_grad=True)
    loss = asymmetric(logits, torch.tensor([[1.0, 1.0, 0.0, 0.0]]), clip=clip)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_gradient_is_that_of_the_equation():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1.0, 0, 1], [0, 0, 1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: asymmetric(x, target), logits)
