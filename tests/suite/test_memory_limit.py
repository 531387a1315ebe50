"""Is a training brought under its limit by lean activations first, by smaller batches then, and is it said?"""

import pytest
import torch

from adaptsuite import attach
from adaptsuite.checkpoint import copied
from adaptsuite.errors import ResourceError, UsageError
from adaptsuite.memory_limit import _Need, within
from adaptsuite.plan import Plan

EVERY = ("attn.qkv", "attn.out", "mlp.in", "mlp.out")


def sample(batch):
    return torch.zeros(batch, 3, 64, 64)


@pytest.fixture(scope="module")
def handle():
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(64, 8, embed_dim=64, depth=4, num_heads=2, num_classes=10)
    return attach(model, "lora", sites=EVERY)


def limited(handle, gigabytes, **settings):
    said = []
    plan = Plan(batch_size=8, device="cpu", memory_limit=gigabytes, **settings)
    return plan, within(plan, handle, sample, said.append), said


def need(handle, batch, lean):
    return _Need(Plan(), handle, sample)(batch, lean)


def test_need_is_weights_step_and_optimizer(handle):
    from adaptsuite import budget

    found = budget(handle.model, None, sample(8))
    weights = sum(p.numel() * 4 for p in handle.model.parameters())
    assert need(handle, 8, False) * 1e9 == weights + found.peak_bytes + found.optimizer_bytes


def test_enough_memory_changes_nothing(handle):
    plan, found, said = limited(handle, 1.0)
    assert found == plan and "of the 1 GB allowed" in said[0]
    assert within(Plan(), handle, sample, said.append) == Plan() and len(said) == 1


def test_lean_comes_first_and_its_time_is_said(handle):
    before = copied(handle.state())
    limit = (need(handle, 8, False) + need(handle, 8, True)) / 2
    plan, found, said = limited(handle, limit)
    assert (found.lean, found.batch_size, found.accumulate) == (True, 8, 1)
    assert "lean, " in said[0] and "times the time of a step" in said[0]
    assert all(torch.equal(t, before[k]) for k, t in handle.state().items())
    assert all(p.grad is None for p in handle.trained().values())


def test_smaller_batches_come_next_with_the_same_effective_batch(handle):
    limit = (need(handle, 4, True) + need(handle, 2, True)) / 2
    _, found, said = limited(handle, limit, accumulate=3)
    assert (found.lean, found.batch_size, found.accumulate) == (True, 2, 12)
    assert "batch_size=2 with accumulate=12" in said[0]


def test_one_sample_that_does_not_fit_is_refused(handle):
    with pytest.raises(ResourceError, match="one sample needs .* take a smaller input"):
        limited(handle, need(handle, 1, True) * 0.9)
    with pytest.raises(UsageError, match="memory_limit"):
        Plan(memory_limit=-1.0)


def test_a_lean_step_slower_than_a_tenth_is_named_so(handle, monkeypatch):
    from adaptsuite import memory_limit

    monkeypatch.setattr(memory_limit, "SLOW", 0.0)
    limit = (need(handle, 8, False) + need(handle, 8, True)) / 2
    assert "slower than 10 %" in limited(handle, limit)[2][0]
