import math

import pytest
import torch
import torch.nn.functional as F

from adaptsuite.vl.contrast import contrastive
from adaptsuite.vl.tip_adapter import ALPHAS, BETAS, Cache, cached, chosen, tuned


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_cache_logits_are_the_papers_equation_by_loops():
    keys, features, names = unit(5, 4), unit(3, 4, seed=1), unit(2, 4, seed=2)
    labels = torch.tensor([0, 1, 1, 0, 1])
    found = cached(keys, labels, 2, alpha=0.7, beta=3.0).logits(features, 100 * features @ names.T)
    for b in range(3):
        for c in range(2):
            total = sum(math.exp(-3.0 * (1 - float(features[b] @ keys[n]))) for n in range(5) if int(labels[n]) == c)
            assert float(found[b, c]) == pytest.approx(0.7 * total + 100 * float(features[b] @ names[c]), rel=1e-12)


def test_validation_rows_choose_how_much_the_cache_says():
    keys, labels = torch.eye(4), torch.arange(4)
    wrong = 2.0 * torch.eye(4).roll(1, 1)  # names say the next class
    best = chosen(cached(keys, labels, 4), keys, wrong, labels)
    assert best.alpha in ALPHAS and best.beta in BETAS
    assert (best.logits(keys, wrong).argmax(1) == labels).all()
    assert not (Cache(keys, best.values, ALPHAS[0], 1.0).logits(keys, wrong).argmax(1) == labels).any()


def test_tuned_keys_fit_the_shots_better_and_leave_the_cache_alone():
    features, labels = unit(12, 6).float(), torch.arange(3).repeat(4)
    cache, zero_shot = cached(features, labels, 3), torch.zeros(12, 3)
    before = cache.keys.clone()
    better = tuned(cache, features, zero_shot, labels, epochs=60, lr=1e-2)
    losses = [float(F.cross_entropy(c.logits(features, zero_shot), labels)) for c in (cache, better)]
    assert losses[1] < losses[0] - 0.01
    assert torch.equal(cache.keys, before) and better.values is cache.values


def test_contrastive_loss_is_clips_with_one_caption_an_image():
    logits = torch.randn(4, 4, dtype=torch.float64)
    rows = [-math.log(math.exp(logits[i, i]) / sum(math.exp(logits[i, j]) for j in range(4))) for i in range(4)]
    columns = [-math.log(math.exp(logits[i, i]) / sum(math.exp(logits[j, i]) for j in range(4))) for i in range(4)]
    assert float(contrastive(logits, torch.arange(4))) == pytest.approx((sum(rows) + sum(columns)) / 8, rel=1e-12)


def test_further_captions_of_an_image_are_no_negatives():
    """Pairs 0 and 1 are of one image: neither is in the denominator of the other, and how they compare is free."""
    images, logits = torch.tensor([7, 7, 2]), torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    total, values = 0.0, logits.tolist()
    for i in range(3):
        others = [j for j in range(3) if images[j] != images[i]]
        for get in (lambda i, j: values[i][j], lambda i, j: values[j][i]):
            total -= math.log(math.exp(get(i, i)) / (math.exp(get(i, i)) + sum(math.exp(get(i, j)) for j in others)))
    loss = contrastive(logits, images)
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    loss.backward()
    assert logits.grad[0, 1] == 0 and logits.grad[1, 0] == 0 and logits.grad[0, 2] != 0
