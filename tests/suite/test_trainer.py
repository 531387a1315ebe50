import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from adaptsuite import attach
from adaptsuite.average import Average
from adaptsuite.batches import balanced_weights, chunks, steps_of_epoch
from adaptsuite.errors import DataError, Diverged, ResourceError, UsageError
from adaptsuite.testing import HOSTS
from adaptsuite.trainer import Plan, fit, pick_device, predict_all, rank


class Blobs:
    """Three clouds in eight dimensions; `noise` is drawn at every access."""

    def __init__(self, num: int, noise: float = 0.0):
        generator = torch.Generator().manual_seed(num)
        self.label = torch.arange(num) % 3
        self.x = 2 * F.one_hot(self.label, 8) + torch.randn(num, 8, generator=generator)
        self.noise = noise

    def __len__(self):
        return len(self.label)

    def __getitem__(self, index):
        return {"x": self.x[index] + self.noise * torch.randn(8), "label": self.label[index]}


class Classify:
    monitor = "accuracy"

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["label"])

    def predict(self, model, batch):
        return model(batch["x"]).softmax(1)

    def score(self, outputs, targets):
        return {"accuracy": (outputs.argmax(1) == targets).mean()}


class Scripted(Classify):
    """Validation scores as written down."""

    def __init__(self, *values):
        self.values = list(values)

    def score(self, outputs, targets):
        return {"accuracy": self.values.pop(0)}


class FailingAt(Classify):
    """Multiplies the loss of the given calls (from 1) by a factor."""

    def __init__(self, *calls, factor=math.nan):
        self.calls, self.factor, self.count = calls, factor, 0

    def loss(self, model, batch):
        self.count += 1
        return super().loss(model, batch) * (self.factor if self.count in self.calls else 1)


class Small(Classify):
    """A device with room for `room` samples."""

    def __init__(self, room):
        self.room, self.seen = room, []

    def loss(self, model, batch):
        self.claim(batch)
        return super().loss(model, batch)

    def predict(self, model, batch):
        self.claim(batch)
        return super().predict(model, batch)

    def claim(self, batch):
        self.seen.append(len(batch["x"]))
        if len(batch["x"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def net(noisy: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    extras = [nn.BatchNorm1d(16), nn.Dropout(0.2)] if noisy else []
    return nn.Sequential(nn.Linear(8, 16), *extras, nn.GELU(), nn.Linear(16, 3))


def plan(**settings) -> Plan:
    return Plan(**({"epochs": 2, "batch_size": 8, "lr": 0.01, "device": "cpu"} | settings))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def train(task=None, model=None, num=24, **settings):
    """(result, weights) of a run without folder."""
    model = net() if model is None else model
    result = fit(model, task or Classify(), Blobs(num), Blobs(12), plan(**settings))
    return result, weights(model)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_near(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # sums in another order, a few steps of lr .01


# ---- what training does


def test_separable_toy_is_learnt():
    result, _ = train(num=90, epochs=10, lr=0.03)
    assert result.best["accuracy"] > 0.8
    assert result.history[-1]["loss"] < 0.6 < result.history[0]["loss"]
    assert [row["epoch"] for row in result.history] == list(range(1, 11))
    assert (result.steps, result.stopped, result.skipped) == (120, "epochs", 0)


def test_reference_bug_08_best_epoch_is_a_copy_and_not_the_live_weights():
    model, seen = net(noisy=True), []
    fit(
        model,
        Scripted(0.2, 0.9, 0.9, 0.1),
        Blobs(24),
        Blobs(12),
        plan(epochs=4),
        on_epoch=lambda row: seen.append(weights(model)),
    )
    assert same(weights(model), seen[1])  # the earlier of two equals, with its running statistics
    assert not same(seen[1], seen[3])
    assert not model.training


def test_last_epoch_is_kept_and_said_without_validation():
    model, seen = net(), []
    result = fit(model, Classify(), Blobs(24), None, plan(patience=1), on_epoch=lambda row: seen.append(weights(model)))
    assert same(weights(model), seen[-1])
    assert (result.best_epoch, result.best, result.stopped) == (2, {}, "epochs")
    assert "no validation set: the last epoch is kept" in result.notes
    assert "patience has no effect without a validation set" in result.notes


def test_patience_stops_after_so_many_epochs_without_a_better_one():
    result, _ = train(Scripted(0.1, 0.5, 0.5, 0.4, 0.9), epochs=9, patience=2)
    assert (result.best_epoch, len(result.history), result.stopped) == (2, 4, "patience")


def test_among_equal_epochs_the_lower_log_loss_is_kept():
    """35 validation rows tie often: the first of equal epochs would be the least trained one."""
    assert rank({"accuracy": 0.5, "log_loss": 1.0}, "accuracy") < rank({"accuracy": 0.5, "log_loss": 0.8}, "accuracy")
    assert rank({"accuracy": 0.6, "log_loss": 9.0}, "accuracy") > rank({"accuracy": 0.5, "log_loss": 0.8}, "accuracy")
    assert rank({}, "accuracy") is None and rank({"accuracy": None}, "accuracy") is None
    assert rank({"log_loss": 0.5}, "log_loss") > rank({"log_loss": 0.8}, "log_loss")  # of which less is better


def test_undefined_scores_are_never_the_best():
    result, _ = train(Scripted(0.3, math.nan, 0.2), epochs=3)
    assert result.best_epoch == 1
    assert result.history[1]["val"] == {"accuracy": None}
    result, _ = train(Scripted(math.nan, math.nan))
    assert result.best_epoch == 2
    assert "accuracy was never a finite number: the last epoch is kept" in result.notes


def test_same_seed_gives_the_same_weights_and_another_seed_others():
    runs = [train(model=net(noisy=True), num=30, seed=seed)[1] for seed in (0, 0, 1)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_accumulated_step_equals_the_step_of_one_batch():
    assert_near(train(batch_size=8)[1], train(batch_size=4, accumulate=2)[1])
    assert_near(train(num=21, batch_size=8)[1], train(num=21, batch_size=2, accumulate=4)[1])  # unequal pieces


def test_gradient_is_no_longer_than_clip():
    assert max(norms_of(clip=None)) > 0.2
    assert max(norms_of(clip=0.1)) <= 0.1 + 1e-6


def norms_of(clip):
    handle = Spy(net())
    fit(handle.model, Classify(), Blobs(24), None, plan(clip=clip), handle=handle)
    return handle.norms


class Spy:
    """A handle that trains the last layer, and a method that looks at each step."""

    def __init__(self, model):
        self.model, self.method = model, self
        self.norms, self.groups, self.lrs = [], [], []
        model[0].requires_grad_(False)

    def trainable(self):
        last = self.model[-1]
        return [
            {"name": "adapter", "params": [last.weight], "names": ["weight"]},
            {"name": "head", "params": [last.bias], "names": ["bias"]},
        ]

    def state(self):
        return dict(self.model[-1].state_dict())

    def load_state(self, state):
        self.model[-1].load_state_dict(state)

    def regulariser(self):
        return None

    def on_step(self, step, optimizer, handle):
        assert handle is self
        self.groups = [(len(g["params"]), g["weight_decay"], g["base_lr"]) for g in optimizer.param_groups]
        self.last_lrs = [g["lr"] for g in optimizer.param_groups]
        self.lrs.append(self.last_lrs[0])
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        self.norms.append(torch.cat([g.flatten() for g in grads]).norm().item())


def test_handle_alone_says_what_is_trained():
    handle = Spy(net())
    before = weights(handle.model)
    fit(handle.model, Classify(), Blobs(24), Blobs(12), plan(head_lr=0.5, weight_decay=0.3), handle=handle)
    after = weights(handle.model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["2.weight"], after["2.weight"])
    assert handle.groups == [(1, 0.3, 0.01), (1, 0.0, 0.5)]  # vectors are not decayed, the head has its own rate


def test_decay_reaches_vectors_only_when_the_plan_says_so():
    handle = Spy(net())
    settings = plan(head_lr=0.5, weight_decay=0.3, decay_all=True)
    fit(handle.model, Classify(), Blobs(24), Blobs(12), settings, handle=handle)
    assert handle.groups == [(1, 0.3, 0.01), (1, 0.3, 0.5)]


def test_learning_rate_warms_up_and_falls_as_half_a_cosine():
    handle = Spy(net())
    fit(handle.model, Classify(), Blobs(40), None, plan(epochs=4, warmup=0.2, lr=1.0), handle=handle)
    expected = [(i + 1) / 5 for i in range(4)] + [(1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)]
    assert handle.lrs == pytest.approx(expected)
    handle = Spy(net())
    fit(handle.model, Classify(), Blobs(40), None, plan(warmup=0.2, lr=1.0, schedule="constant"), handle=handle)
    assert handle.lrs == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)


def test_cosine_ends_at_the_same_share_of_every_group_s_rate():
    handle = Spy(net())
    settings = plan(epochs=40, warmup=0, lr=1.0, head_lr=0.5, min_lr=0.1)
    fit(handle.model, Classify(), Blobs(40), None, settings, handle=handle)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 200)) / 2 for i in range(200)]
    assert handle.lrs == pytest.approx(expected) and handle.lrs[-1] == pytest.approx(0.1, abs=1e-3)
    assert handle.last_lrs == pytest.approx([expected[-1], expected[-1] / 2])


def test_a_number_of_warm_up_steps_goes_before_the_share():
    handle = Spy(net())
    fit(handle.model, Classify(), Blobs(40), None, plan(warmup_steps=3, lr=1.0, schedule="constant"), handle=handle)
    assert handle.lrs == pytest.approx([1 / 4, 2 / 4, 3 / 4] + [1.0] * 7)
    handle = Spy(net())
    fit(handle.model, Classify(), Blobs(40), None, plan(warmup_steps=0, lr=1.0, schedule="constant"), handle=handle)
    assert handle.lrs == [1.0] * 10


@pytest.mark.parametrize(
    "settings, found", [({"warmup_steps": 6}, "warmup_steps=6"), ({"warmup": 0.99}, "warmup=0.99 of them is 6")]
)
def test_a_warm_up_that_takes_all_steps_is_refused_with_the_numbers(settings, found):
    with pytest.raises(UsageError, match=f"the run has 6 steps and {found}: the full learning rate would never be"):
        train(**settings)


def test_sgd_equals_torch_s_own_loop_to_the_bit():
    ours, theirs, data = net(), net(), Blobs(24)
    settings = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "clip": None, "warmup": 0, "schedule": "constant"}
    fit(ours, Classify(), data, None, plan(optimizer="sgd", epochs=3, **settings))
    flat, matrices = ([p for p in theirs.parameters() if (p.ndim == 1) == one] for one in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.8)
    for epoch in range(3):
        for step in steps_of_epoch(24, 8, 1, 0, epoch):
            optimizer.zero_grad()
            F.cross_entropy(theirs(data.x[step]), data.label[step]).backward()
            optimizer.step()
    assert same(weights(ours), weights(theirs))


def test_training_until_an_epoch_stands_where_the_longer_run_stood():
    """Not where a run planned that short would end: the schedule is that of all epochs."""
    longer, seen, ours, short = net(), [], net(), net()
    settings = plan(epochs=5, lr=0.1)
    fit(longer, Classify(), Blobs(24), None, settings, on_epoch=lambda row: seen.append(weights(longer)))
    result = fit(ours, Classify(), Blobs(24), None, settings, until=2)
    fit(short, Classify(), Blobs(24), None, plan(epochs=2, lr=0.1))
    assert same(weights(ours), seen[1]) and not same(weights(short), seen[1])
    assert (result.best_epoch, len(result.history)) == (2, 2)


# ---- the average of the weights


class Kept(Spy):
    """A handle that keeps a copy of everything behind each step, as float64."""

    def __init__(self, model):
        super().__init__(model)
        model.requires_grad_(True)
        self.states = [self.now()]

    def now(self):
        return {name: t.double() for name, t in self.model.state_dict().items()}

    def trainable(self):
        named = dict(self.model.named_parameters())
        return [{"name": "adapter", "params": list(named.values()), "names": list(named)}]

    def state(self):
        return dict(self.model.state_dict())

    def load_state(self, state):
        self.model.load_state_dict(state)

    def on_step(self, step, optimizer, handle):
        self.states.append(self.now())


def averaged(states, decay):
    """The average in float64, a step at a time."""
    average = states[0]
    for t, state in enumerate(states[1:]):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * state[name] for name in average}
    return average


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_average_equals_a_float64_loop_over_weights_and_statistics(decay, precision):
    handle = Kept(net(noisy=True))
    fit(handle.model, Classify(), Blobs(24), None, plan(epochs=4, ema=decay, precision=precision), handle=handle)
    assert len(handle.states) == 13
    expected, found = averaged(handle.states, decay), weights(handle.model)
    counted = found.pop("1.num_batches_tracked")
    assert counted == 12  # copied
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["0.weight"].double(), handle.states[-1]["0.weight"])


def test_the_average_is_validated_and_kept_while_the_live_weights_train_as_without_it():
    class Looking(Classify):
        def __init__(self):
            self.seen = []

        def predict(self, model, batch):
            if not self.seen or not same(self.seen[-1], weights(model)):
                self.seen.append(weights(model))
            return super().predict(model, batch)

        def score(self, outputs, targets):
            return {"accuracy": (0.1, 0.9, 0.2)[len(self.seen) - 1]}

    plain, handle, live = net(noisy=True), Kept(net(noisy=True)), []
    lives: list = []
    fit(plain, Classify(), Blobs(24), None, plan(epochs=3), on_epoch=lambda row: live.append(weights(plain)))
    task = Looking()
    on_epoch = lambda row: lives.append(weights(handle.model))  # noqa: E731
    result = fit(handle.model, task, Blobs(24), Blobs(12), plan(epochs=3, ema=0.8), handle=handle, on_epoch=on_epoch)
    assert result.best_epoch == 2 and same(weights(handle.model), task.seen[1])
    for name, value in averaged(handle.states[:7], 0.8).items():
        if "tracked" not in name:
            torch.testing.assert_close(task.seen[1][name].double(), value, rtol=1e-5, atol=1e-6)
    assert all(same(a, b) for a, b in zip(live, lives, strict=True))


def test_a_skipped_step_does_not_move_the_average():
    handle = Kept(net())
    fit(handle.model, FailingAt(2, 5), Blobs(24), None, plan(ema=0.9), handle=handle)
    assert len(handle.states) == 5  # of six steps
    for name, value in averaged(handle.states, 0.9).items():
        torch.testing.assert_close(weights(handle.model)[name].double(), value, rtol=1e-5, atol=1e-6)


def test_a_run_that_diverges_before_a_best_epoch_keeps_the_average():
    handle = Kept(net())
    with pytest.raises(Diverged, match="the last finite weights are kept"):
        fit(handle.model, FailingAt(2, 3), Blobs(24), Blobs(12), plan(ema=0.9, max_skips=1), handle=handle)
    for name, value in averaged(handle.states, 0.9).items():
        torch.testing.assert_close(weights(handle.model)[name].double(), value, rtol=1e-5, atol=1e-6)


def test_full_fine_tuning_of_a_half_precision_host_is_averaged_in_float32_and_in_place():
    tiny = HOSTS["timm_vit"]()
    handle = attach(tiny.model.bfloat16(), "full")
    average = Average(handle, 0.999)
    name = "base.blocks/0/mlp/fc1/weight"
    start = handle.state()[name].double()
    for _ in range(40):
        with torch.no_grad():
            handle.trained()[name].add_(0.01)
        average.update()
    live = handle.state()[name].clone()
    assert average.state()[name].dtype == torch.float32 and average.steps == 40
    with average.in_place():
        inside = tiny.model.blocks[0].mlp.fc1.weight
        assert torch.equal(inside, average.state()[name].bfloat16()) and not torch.equal(inside, live)
        assert ((inside.double() - start).mean() > 0.05).all()  # 1 - d is far below bfloat16's resolution
    assert torch.equal(handle.state()[name], live)


def test_what_is_not_finite_at_the_start_is_copied_and_constants_stay():
    model = net()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    model.register_buffer("third", torch.tensor(1 / 3))
    fit(model, Classify(), Blobs(24), None, plan(epochs=4, ema=0.99))
    assert model.mask.tolist() == [0.0, -math.inf] and torch.equal(model.third, torch.tensor(1 / 3))


def test_regulariser_is_part_of_the_loss():
    plain, bound = Spy(net()), Spy(net())
    bound.regulariser = lambda: 100 * bound.model[-1].weight.square().sum()
    for handle in (plain, bound):
        fit(handle.model, Classify(), Blobs(24), None, plan(epochs=5, weight_decay=0), handle=handle)
    assert bound.model[-1].weight.norm() < 0.8 * plain.model[-1].weight.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights(precision):
    result, state = train(precision=precision, epochs=3)
    assert all(t.dtype == torch.float32 and t.isfinite().all() for t in state.values())
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_history_reaches_stderr_log_and_callback(tmp_path, capsys):
    rows = []
    result = fit(net(), Classify(), Blobs(24), Blobs(12), plan(epochs=10), out=tmp_path, on_epoch=rows.append)
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("epoch")]
    assert len(lines) == 10
    assert re.fullmatch(r"epoch  3/10  loss \d\.\d{3}  accuracy \d\.\d{3}  \d+\.\d s", lines[2])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in logged] == ["start", *["epoch"] * 10, "end"]
    assert [{k: v for k, v in line.items() if k != "event"} for line in logged[1:-1]] == result.history == rows


# ---- samples


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 4), st.integers(0, 5))
def test_each_epoch_is_a_permutation_cut_into_full_steps(num, batch, world, epoch):
    steps = steps_of_epoch(num, batch, world, 3, epoch)
    assert sorted(np.concatenate(steps)) == list(range(num))
    assert all(len(step) == batch for step in steps[:-1])
    assert len(steps[-1]) < batch + 2 * world
    if len(steps) > 1 and batch >= 2 * world:
        assert len(steps[-1]) >= 2 * world


@given(st.integers(0, 60), st.integers(1, 20))
def test_pieces_hold_every_sample_and_none_is_alone(num, size):
    pieces = chunks(range(num), size)
    assert [i for piece in pieces for i in piece] == list(range(num))
    assert all(1 <= len(piece) <= size + 1 for piece in pieces)
    if size > 1 and num > 1:
        assert all(len(piece) > 1 for piece in pieces)


def test_epochs_are_in_different_orders():
    orders = [steps_of_epoch(20, 20, 1, 0, epoch)[0].tolist() for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]


labels = st.lists(st.integers(0, 4), min_size=2, max_size=60)


@given(labels, st.integers(0, 3), st.integers(0, 3))
def test_balanced_epochs_draw_each_sample_as_often_as_its_weight_says(classes, seed, epoch):
    weights = balanced_weights(np.array(classes))
    drawn = np.concatenate(steps_of_epoch(len(classes), 8, 1, seed, epoch, weights))
    again = np.concatenate(steps_of_epoch(len(classes), 8, 1, seed, epoch, weights))
    assert len(drawn) == len(classes) and drawn.tolist() == again.tolist()
    expected = len(classes) * weights / weights.sum()
    assert (abs(np.bincount(drawn, minlength=len(classes)) - expected) < 1 + 1e-9).all()
    for k in set(classes):  # every class has the same share of what is expected
        assert expected[np.array(classes) == k].sum() == pytest.approx(len(classes) / len(set(classes)))


def test_classes_of_balanced_epochs_come_equally_often_in_the_long_run():
    classes = np.array([0] * 90 + [1] * 8 + [2] * 2)
    weights = balanced_weights(classes)
    epochs = [np.concatenate(steps_of_epoch(100, 16, 1, 0, epoch, weights)) for epoch in range(60)]
    shares = np.bincount(classes[np.concatenate(epochs)]) / 6000
    assert abs(shares - 1 / 3).max() < 0.01  # at random it would be 0.90, 0.08, 0.02
    assert len({tuple(epoch) for epoch in epochs}) == 60


def test_multilabel_weights_are_those_of_the_ast_code():
    targets = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 0, 1], [0, 0, 0]], np.float32)
    by_hand = []
    for row in targets:
        by_hand.append(sum(1 / targets[:, k].sum() for k in range(3) if row[k]))
    by_hand[4] = 1 / 1  # background, one class more
    assert balanced_weights(targets).tolist() == pytest.approx(by_hand)
    drawn = np.concatenate(steps_of_epoch(5, 8, 1, 0, 0, balanced_weights(targets)))
    assert 4 in drawn and 1 in drawn


class Rare(Blobs):
    """Class 2 once, the others often; counts who is read."""

    def __init__(self, num):
        super().__init__(num)
        self.label = torch.tensor([0, 1] * (num // 2))
        self.label[-1] = 2
        self.item_targets, self.read = self.label.numpy(), []

    def __getitem__(self, index):
        self.read.append(int(self.label[index]))
        return super().__getitem__(index)


def test_a_balanced_run_shows_the_rare_class_as_often_as_the_others():
    rare = Rare(30)
    fit(net(), Classify(), rare, None, plan(balanced=True, epochs=10))
    counts = np.bincount(rare.read[1:])  # the first look tells data sets apart
    assert counts.sum() == 300 and abs(counts - 100).max() < 12
    with pytest.raises(UsageError, match="balanced=true needs a data set with `item_targets`"):
        fit(net(), Classify(), Blobs(12), None, plan(balanced=True))
    rare.item_targets = np.zeros((30, 3))
    with pytest.raises(DataError, match="no training sample has a label"):
        fit(net(), Classify(), rare, None, plan(balanced=True))


def test_a_balanced_run_goes_on_where_it_was(tmp_path):
    whole, first, second = net(), net(), net()
    fit(whole, Classify(), Rare(30), None, plan(balanced=True, epochs=4, checkpoint_steps=3))

    class Stop(Exception):
        pass

    def stop(row):
        raise Stop

    settings = plan(balanced=True, epochs=4, checkpoint_steps=3)
    with pytest.raises(Stop):
        fit(first, Classify(), Rare(30), None, settings, out=tmp_path, on_epoch=stop)
    fit(second, Classify(), Rare(30), None, settings, out=tmp_path)
    assert same(weights(whole), weights(second))


def test_last_sample_alone_passes_a_batch_norm_and_is_said():
    result, _ = train(model=net(noisy=True), num=25, batch_size=8)
    assert result.notes == ["25 samples in steps of 8 leave 1 over: joined to the last full step"]
    assert result.steps == 6


def test_batch_larger_than_the_set_is_said():
    result, _ = train(num=5, batch_size=8)
    assert result.notes == ["the batch of 8 is larger than the training set: a step takes all 5 samples"]
    assert result.steps == 2


def test_one_training_sample_is_enough():
    assert train(num=1)[0].steps == 2


# ---- numbers that are none


def test_non_finite_loss_skips_the_step_and_is_counted():
    result, state = train(FailingAt(2, 5))
    assert result.skipped == 2
    assert [row["skipped"] for row in result.history] == [1, 1]
    assert "non-finite loss at epoch 1, step 2: step skipped" in result.notes
    assert all(t.isfinite().all() for t in state.values())
    assert all(math.isfinite(row["loss"]) for row in result.history)


def test_non_finite_gradient_skips_the_step():
    class Steep(Classify):
        def loss(self, model, batch):
            return super().loss(model, batch) + torch.sqrt((model[0].bias * 0).abs().sum())  # slope of a root at 0

    with pytest.raises(Diverged, match="non-finite gradient"):
        train(Steep())


def test_run_stops_after_max_skips_in_a_row_and_keeps_the_best_epoch():
    class Task(FailingAt, Scripted):
        values = [0.1, 0.8, 0.3]

    model, seen, settings = net(), [], plan(epochs=9, max_skips=2)
    with pytest.raises(Diverged, match=r"3 steps in a row had a non-finite loss \(the last: epoch 4, step 3\)") as stop:
        task = Task(*range(10, 99))
        fit(model, task, Blobs(24), Blobs(12), settings, on_epoch=lambda row: seen.append(weights(model)))
    assert stop.value.exit_code == 1
    assert "the weights of epoch 2 are kept" in str(stop.value)
    assert same(weights(model), seen[1]) and not same(seen[1], seen[2])
    assert not model.training


def test_skips_with_a_good_step_between_do_not_stop_the_run():
    assert train(FailingAt(1, 2, 4, 5), max_skips=2)[0].skipped == 4


def test_huge_learning_rate_ends_in_diverged_or_finite_weights():
    model = net()
    with pytest.raises(Diverged):
        fit(model, Classify(), Blobs(24), Blobs(12), plan(lr=1e30, epochs=9, clip=None, warmup=0))
    assert all(t.isfinite().all() for t in model.state_dict().values())


# ---- memory


def test_out_of_memory_halves_the_pieces_and_keeps_the_effective_batch():
    task = Small(room=3)
    result, state = train(task, batch_size=8)
    assert_near(state, train(batch_size=8)[1])
    assert result.steps == 6
    assert result.notes == [
        "out of memory with 8 samples at once: 4 from here on, same effective batch",
        "out of memory with 4 samples at once: 2 from here on, same effective batch",
    ]
    assert task.seen[:4] == [8, 4, 2, 2] and max(task.seen[3:]) <= 3  # validation asks for no more either


def test_resumed_run_remembers_how_much_fits_in_memory(tmp_path):
    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(net(), Small(room=3), Blobs(24), Blobs(12), plan(), out=tmp_path, on_epoch=stop)
    task = Small(room=3)
    fit(net(), task, Blobs(24), Blobs(12), plan(), out=tmp_path)
    assert max(task.seen) == 2


def test_out_of_memory_with_one_sample_is_a_resource_error():
    with pytest.raises(ResourceError, match="out of memory on cpu with one sample"):
        train(Small(room=0))
    with pytest.raises(ResourceError, match="out of memory on cpu with one sample"):
        predict_all(net(), Small(room=0), Blobs(5), 4, "cpu")


# ---- predictions


def test_predictions_come_in_the_order_of_the_data_and_leave_the_mode():
    model = net(noisy=True).train()
    with torch.no_grad():
        expected = model.eval()(Blobs(25).x).softmax(1).numpy()
    outputs, targets = predict_all(model.train(), Small(room=3), Blobs(25), 8, "cpu")
    np.testing.assert_allclose(outputs, expected, atol=1e-6)
    assert targets.tolist() == Blobs(25).label.tolist()
    assert model.training and model[1].num_batches_tracked == 0


def test_random_parts_of_data_are_the_same_at_every_prediction():
    first, second = (predict_all(net(), Classify(), Blobs(9, noise=1.0), size, "cpu")[0] for size in (2, 9))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_data_without_targets_can_be_predicted():
    class Bare(Blobs):
        def __getitem__(self, index):
            return {"x": self.x[index]}

    outputs, targets = predict_all(net(), Classify(), Bare(5), 2, "cpu")
    assert outputs.shape == (5, 3) and targets is None
    with pytest.raises(UsageError, match="validation batches hold no 'label'"):
        fit(net(), Classify(), Blobs(8), Bare(5), plan())
    with pytest.raises(DataError, match="nothing to predict"):
        predict_all(net(), Classify(), Blobs(0), 2, "cpu")


# ---- what is refused


def test_nothing_to_train_is_refused():
    with pytest.raises(UsageError, match="no tensor to train"):
        train(model=net().requires_grad_(False))


def test_loss_that_reaches_no_trained_tensor_is_refused():
    class Constant(Classify):
        def loss(self, model, batch):
            return batch["x"].mean()

    with pytest.raises(UsageError, match="does not depend on any trained tensor"):
        train(Constant())

    class Cut(Classify):  # a gradient, but to no tensor of the model
        def loss(self, model, batch):
            return super().loss(model, {**batch, "x": batch["x"]}).detach() + torch.zeros((), requires_grad=True)

    with pytest.raises(UsageError, match="no trained tensor received a gradient"):
        train(Cut())


def test_trained_tensor_without_gradient_is_named():
    model = net()
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    result, _ = train(model=model)
    assert result.notes == ["2 of 6 trained tensors get no gradient: unused.weight, unused.bias"]


def test_empty_sets_are_refused():
    with pytest.raises(DataError, match="training set is empty"):
        fit(net(), Classify(), Blobs(0), None, plan())
    with pytest.raises(DataError, match="validation set is empty"):
        fit(net(), Classify(), Blobs(8), Blobs(0), plan())


def test_unknown_monitor_is_refused_with_what_there_is():
    with pytest.raises(UsageError, match="monitor 'acuracy' is not among .* did you mean accuracy"):
        train(monitor="acuracy")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_absent_gpu_is_a_resource_error():
    with pytest.raises(ResourceError, match="device 'cuda' was asked for and torch finds none"):
        train(device="cuda")
    assert pick_device("auto").type in ("cpu", "mps")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epochs": 0}, "epochs=0: expected a whole number from 1"),
        ({"epochs": True}, "epochs=True: expected"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected a whole number from 1"),
        ({"lr": -1}, "lr=-1: expected a number above 0"),
        ({"lr": math.nan}, "lr=nan: expected"),
        ({"lr": "fast"}, "lr='fast': expected"),
        ({"lr": None}, "lr=None: expected"),
        ({"warmup": 1.0}, "warmup=1.0: expected a share"),
        ({"warmup_steps": -1}, "warmup_steps=-1: expected a whole number from 0"),
        ({"warmup_steps": 0.5}, "warmup_steps=0.5: expected a whole number"),
        ({"optimizer": "adam"}, "optimizer='adam' is not known; did you mean adamw"),
        ({"momentum": 1.0}, r"momentum=1.0: expected a number in \[0, 1\)"),
        ({"min_lr": -1e-5}, "min_lr=-1e-05: expected a number from 0"),
        ({"min_lr": 0.1, "lr": 0.01}, "min_lr=0.1 is above lr=0.01"),
        ({"min_lr": 1e-5, "schedule": "constant"}, "min_lr=1e-05 is where a cosine ends, the schedule is constant"),
        ({"ema": 1.0}, r"ema=1.0: expected a number in \(0, 1\)"),
        ({"ema": True}, "ema=True: expected"),
        ({"layer_decay": 0.0}, r"layer_decay=0.0: expected a number in \(0, 1\]"),
        ({"layer_decay": 1.1}, "layer_decay=1.1: expected"),
        ({"betas": (0.9,)}, "betas=.* expected two numbers"),
        ({"schedule": "cosinus"}, "schedule='cosinus' is not known; did you mean cosine"),
        ({"device": "gpu"}, "device='gpu' is not known"),
    ],
)
def test_plan_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Plan(**settings)


def test_plan_accepts_what_may_be_left_out():
    Plan(head_lr=None, clip=None, patience=None, monitor=None, checkpoint_steps=None, ema=None, warmup_steps=None)
    Plan(lr=0.1, min_lr=0.1, momentum=0.0, layer_decay=1.0, warmup_steps=0)


def test_run_with_other_settings_or_data_is_refused(tmp_path):
    fit(net(), Classify(), Blobs(24), Blobs(12), plan(), out=tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UsageError, match="checkpoint-6 was made with lr=0.01, this run has 0.02: go on with the same"):
        fit(net(), Classify(), Blobs(24), Blobs(12), plan(lr=0.02), out=tmp_path)
    with pytest.raises(UsageError, match="was made with training data=24 samples .* this run has 25 samples"):
        fit(net(), Classify(), Blobs(25), Blobs(12), plan(), out=tmp_path)
    with pytest.raises(UsageError, match="validation data"):
        fit(net(), Classify(), Blobs(24), None, plan(), out=tmp_path)
    with pytest.raises(UsageError, match="was made with last epoch=2, this run has 1"):
        fit(net(), Classify(), Blobs(24), Blobs(12), plan(), out=tmp_path, until=1)
    with pytest.raises(UsageError, match="trained tensors"):
        fit(net(noisy=True), Classify(), Blobs(24), Blobs(12), plan(), out=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_finished_run_is_not_trained_again(tmp_path):
    model, again, rows = net(), net(), []
    first = fit(model, Classify(), Blobs(24), Blobs(12), plan(), out=tmp_path)
    second = fit(again, Classify(), Blobs(24), Blobs(12), plan(max_skips=9), out=tmp_path, on_epoch=rows.append)
    assert same(weights(model), weights(again)) and rows == []
    assert (second.history, second.best_epoch) == (first.history, first.best_epoch)


def test_missing_tensorboard_says_its_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'adaptsuite[logs]'")):
        fit(net(), Classify(), Blobs(24), None, plan(tensorboard=True), out=tmp_path)
    with pytest.raises(UsageError, match="tensorboard needs an output folder"):
        train(tensorboard=True)


class Broken(Blobs):
    """One file that cannot be read, or one that ends the process that reads it."""

    def __init__(self, num, error):
        super().__init__(num)
        self.error = error

    def __getitem__(self, index):
        if index == 7:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_error_of_a_sample_arrives_as_one_line(workers):
    with pytest.raises(DataError) as stop:
        fit(net(), Classify(), Broken(16, DataError("clip 7.wav: no samples")), None, plan(workers=workers))
    assert str(stop.value) == "clip 7.wav: no samples"


def test_dead_data_process_is_a_resource_error():
    class Deadly(Blobs):
        def __getitem__(self, index):
            if index == 7:
                os._exit(9)
            return super().__getitem__(index)

    with pytest.raises(ResourceError, match="a data process died .* try workers=0"):
        fit(net(), Classify(), Deadly(16), None, plan(workers=1))


# ---- several processes


def test_fewer_processes_than_launched_are_an_error(monkeypatch):
    train()  # accelerate has settled on one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ResourceError, match="2 processes were asked for and 1 would train: start with torchrun"):
        train()


@pytest.mark.slow
def test_accelerate_launch_that_starts_one_of_two_processes_is_an_error(tmp_path):
    done = launch("accelerate.commands.launch", "--cpu", "--num_processes", "2", out=tmp_path)
    assert done.returncode != 0
    assert "ResourceError: 2 processes were asked for and 1 would train" in done.stderr


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    done = launch("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29631", out=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    one, history, average = script(None, 0)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first["weights"], second["weights"])
    assert_near(first["weights"], one)
    assert same(first["average"], second["average"]) and not same(first["average"], first["weights"])
    assert_near(first["average"], average)
    assert first["outputs"].shape == (13, 3)  # an odd number of rows: none doubled, none lost
    for ours, theirs in zip(first["history"], history, strict=True):
        assert ours["val"] == theirs["val"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def launch(module, *options, out):
    start = out / "start.py"  # conftest makes adaptsuite importable in a bare clone
    start.write_text(
        f"import runpy, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        f"import conftest; runpy.run_path({__file__!r}, run_name='__main__')\n"
    )
    line = [sys.executable, "-m", module, *options, str(start), str(out)]
    return subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


def script(out, rank):
    """What each process runs: a short last step, an odd validation set, outputs seen by `score`."""

    class Looking(Classify):
        def score(self, outputs, targets):
            self.outputs = outputs
            assert targets.tolist() == Blobs(13).label.tolist()
            return super().score(outputs, targets)

    model, second, task = net(), net(), Looking()
    if rank:
        nn.init.zeros_(model[0].weight)  # another start on this process: the first one's counts
        nn.init.zeros_(second[0].weight)
    result = fit(model, task, Blobs(28), Blobs(13), plan(epochs=3), out=out and out / "run")
    fit(second, task, Blobs(28), Blobs(13), plan(epochs=3, ema=0.9), out=out and out / "average")
    if out:
        state = {"weights": weights(model), "outputs": torch.from_numpy(task.outputs), "history": result.history}
        torch.save({**state, "average": weights(second)}, out / f"{rank}.pt")
    return weights(model), result.history, weights(second)


if __name__ == "__main__":
    script(Path(sys.argv[1]), int(os.environ.get("RANK", 0)))
