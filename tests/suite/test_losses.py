"""The losses against their equations in plain loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from adaptsuite.errors import DataError
from adaptsuite.losses import asymmetric, class_weights, logit_adjusted


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


COUNTS = [50, 3, 0, 7, 1]


def test_class_weights_are_inverse_frequencies_with_mean_one_over_the_training_rows():
    labels = [k for k, n in enumerate(COUNTS) for _ in range(n)]
    weights = class_weights(COUNTS)
    assert weights.dtype == torch.float32 and weights.shape == (5,)
    assert sum(float(weights[k]) for k in labels) / len(labels) == pytest.approx(1, rel=1e-6)
    for k, n in enumerate(COUNTS):
        assert float(weights[k]) * max(n, 1) == pytest.approx(61 / 4, rel=1e-6)  # the same for every class
    assert_close(class_weights(torch.tensor([4, 4])), torch.ones(2))


def adjusted_by_hand(logits, target, counts, tau):
    """arXiv:2007.07314, eq. 10, a sample at a time: log(1 + sum over y' != y of (pi_y' / pi_y)^tau e^(f_y' - f_y))."""
    prior, total = [max(n, 1) / sum(counts) for n in counts], 0.0
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        others = [(prior[k] / prior[y]) ** tau * math.exp(row[k] - row[y]) for k in range(len(counts)) if k != y]
        total += math.log(1 + sum(others))
    return total / len(target)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjustment_equals_the_equation(tau):
    torch.manual_seed(0)
    logits, target = 2 * torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 3, 4, 0, 3])
    found = F.cross_entropy(logit_adjusted(logits, COUNTS, tau), target)
    assert_close(float(found), adjusted_by_hand(logits, target, COUNTS, tau), rtol=1e-12, atol=0)


def test_gradient_of_the_adjusted_loss_is_that_of_the_equation():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 3, 4])
    assert torch.autograd.gradcheck(lambda x: F.cross_entropy(logit_adjusted(x, COUNTS), target), logits)


def test_a_class_without_training_rows_gives_finite_losses_also_with_smoothed_labels():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    adjusted, target = logit_adjusted(logits, torch.tensor(COUNTS)), torch.tensor([0, 2, 3])
    assert adjusted.dtype == torch.float32
    loss = F.cross_entropy(adjusted, target, weight=class_weights(torch.tensor(COUNTS)), label_smoothing=0.1)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and class_weights(COUNTS).isfinite().all()


def test_classes_without_any_row_cannot_be_weighed():
    for weigh in (class_weights, lambda counts: logit_adjusted(torch.zeros(1, 2), counts)):
        with pytest.raises(DataError, match="none of them has a training row"):
            weigh([0, 0])
