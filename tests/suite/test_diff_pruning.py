"""Diff pruning: gates and penalty in float64 loops and by drawing, the cut, the file, the way back."""

import copy
import math

import pytest
import torch

from adaptsuite.artifact import load_adapter, read_adapter
from adaptsuite.bank import base_state
from adaptsuite.budget import budget
from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.plan import Plan
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS, Classify, Pictures
from adaptsuite.trainer import fit
from adaptsuite.verify import contract, perturb, verify

WEIGHTS = 2 * (3 * 32 * 32 + 32 * 32 + 2 * 4 * 32 * 32)  # of two blocks of 32 features


def train(out=None, epochs=5, on_epoch=None, **settings):
    torch.manual_seed(0)
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "diff_pruning", head="head", **settings)
    plan = Plan(epochs=epochs, lr=1e-2, batch_size=8, seed=3)
    return handle, fit(host.model, Classify(), Pictures(32), Pictures(16, 1), plan, out, handle, on_epoch=on_epoch)


def output(host, model=None):
    with torch.no_grad():
        return host.forward(model)


def branch_of(dim=4, dim_out=3, **settings):
    method = resolve("diff_pruning", **settings)
    branch = method.build(Site("attn.q", "q", 0, dim, dim_out, "weight")).double()
    perturb(branch.parameters(), 1)
    with torch.no_grad():  # gates of all kinds: shut, half open, open
        branch.alpha.copy_(torch.linspace(-4, 4, dim * dim_out))
    return branch


# ---- equations


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("stretch", [(-1.5, 1.5), (-0.1, 1.1)])
def test_a_change_is_the_hard_concrete_gate_times_w(structured, stretch):
    branch, (low, high) = branch_of(structured=structured, stretch=stretch), stretch
    if structured:
        branch.group.data.fill_(0.3)
    for training in (True, False):
        branch.train(training)
        torch.manual_seed(5)
        change = branch.delta()
        torch.manual_seed(5)
        drawn = torch.rand(12, dtype=torch.float64).tolist()
        common = float(torch.rand(1, dtype=torch.float64))

        def gate(alpha, u):
            s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + alpha)))
            return min(1.0, max(0.0, s * (high - low) + low))  # noqa: B023

        for i in range(3):
            for j in range(4):
                alpha, w = branch.alpha[4 * i + j].item(), branch.change[i, j].item()
                z = gate(alpha, drawn[4 * i + j] if training else 0.5)
                z *= gate(0.3, common if training else 0.5) if structured else 1
                assert change[i, j].item() == pytest.approx(z * w, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("structured", [False, True])
def test_the_penalty_counts_open_gates_as_loops_and_as_chance_does(structured):
    """The authors' code adds the two kinds of gates, which is no number of weights."""
    branch = branch_of(structured=structured, stretch=(-0.5, 1.5))
    shift, group = math.log(0.5 / 1.5), 1.0
    if structured:
        branch.group.data.fill_(0.2)
        group = 1 / (1 + math.exp(-(0.2 - shift)))
    expected = sum(group / (1 + math.exp(-(float(alpha) - shift))) for alpha in branch.alpha)
    assert float(branch.expected()) == pytest.approx(expected, rel=1e-12)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.tensor([float(branch.train().delta().count_nonzero()) for _ in range(4000)])
    assert abs(float(drawn.mean()) - expected) < 5 * float(drawn.std()) / math.sqrt(len(drawn))


def test_the_regulariser_is_the_penalty_of_all_sites():
    handle = attach(HOSTS["timm_vit"]().model, "diff_pruning", penalty=1e-3)
    handle.model.double()
    assert float(handle.regulariser().detach()) == pytest.approx(1e-3 * WEIGHTS / (1 + math.exp(-5)), rel=1e-12)
    handle.method.cut(handle.adapter, torch.rand(WEIGHTS))
    assert handle.regulariser() is None


def test_a_gate_has_a_gradient_between_its_ends_only():
    branch = branch_of()
    branch.alpha.data = torch.linspace(-1, 2, 12, dtype=torch.float64)
    inside = (branch.alpha > 0) & (branch.alpha < math.log(5))  # sigmoid within 1/2 and 5/6
    (gradient,) = torch.autograd.grad(branch.eval().delta().sum(), branch.alpha)
    assert torch.equal(gradient != 0, inside) and 0 < int(inside.sum()) < 12
    own = branch.alpha.detach()[inside].requires_grad_()
    assert torch.autograd.gradcheck(lambda alpha: branch.gate.value(alpha, draw=False), (own,))


# ---- the cut


@pytest.mark.parametrize("structured", [False, True])
def test_the_largest_gated_changes_of_all_sites_stay(structured):
    handle = attach(HOSTS["timm_vit"]().model, "diff_pruning", keep=0.01, total_steps=4, structured=structured)
    perturb(handle.trained().values(), 1)
    branches = list(handle.adapter.branches.values())
    with torch.no_grad():
        for branch in branches:
            branch.alpha.copy_(torch.randn(len(branch.alpha)))
    before = [branch.eval().delta().detach().clone() for branch in branches]
    for step in range(2):
        assert not handle.method.settled(handle)
        handle.method.on_step(step, None, handle)
    assert handle.method.settled(handle) and handle.trainable()[0]["lr_scale"] == 5.0
    count = round(0.01 * WEIGHTS)
    threshold = sorted((abs(v) for change in before for v in change.flatten().tolist()), reverse=True)[count - 1]
    for branch, change in zip(branches, before, strict=True):
        assert torch.equal(branch.delta(), torch.where(change.abs() >= threshold, change, 0))
    assert handle.parameters_count()["trained"] == count
    assert sum(handle.method.record(handle)["weights"]["kept"].values()) == count


def test_gates_learn_at_their_own_rate_and_do_not_decay():
    handle = attach(HOSTS["timm_vit"]().model, "diff_pruning", structured=True)
    rates = {n.rpartition(".")[2]: (g["lr_scale"], p.ndim) for g in handle.trainable()
             for n, p in zip(g["names"], g["params"], strict=True)}  # fmt: skip
    assert rates == {"change": (1.0, 2), "alpha": (100.0, 1), "group": (100.0, 1)}
    assert handle.parameters_count()["trained"] == 2 * WEIGHTS + 8


def test_a_large_penalty_shuts_gates():
    torch.manual_seed(0)
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "diff_pruning", penalty=1e-2, gated=0.9, gate_rate=100.0)
    start, seen = float(handle.regulariser().detach()), []
    data, plan = Pictures(32), Plan(epochs=6, lr=1e-2, batch_size=8)
    see = lambda row: seen.append(handle.regulariser())  # noqa: E731
    fit(host.model, Classify(), data, None, plan, handle=handle, on_epoch=see)
    assert float(seen[3].detach()) < 0.1 * start and seen[-1] is None


def test_training_cuts_once_then_tunes_the_same_weights_only():
    masks = []

    def see(row):
        masks.append({key: b.delta().detach() != 0 for key, b in handle.adapter.branches.items()})

    torch.manual_seed(0)
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "diff_pruning", head="head", keep=0.02, gated=0.4)
    plan = Plan(epochs=5, lr=1e-2, batch_size=8, seed=3)
    found = fit(host.model, Classify(), Pictures(32), Pictures(16, 1), plan, handle=handle, on_epoch=see)
    kept = [sum(int(m.sum()) for m in epoch.values()) for epoch in masks]
    assert kept[0] > 0.5 * WEIGHTS and kept[1:] == [round(0.02 * WEIGHTS)] * 4
    assert all(torch.equal(masks[1][key], epoch[key]) for epoch in masks[2:] for key in epoch)
    assert found.best_epoch >= 2 and handle.method.settled(handle) and verify(handle).ok
    assert found.history[-1]["loss"] < found.history[1]["loss"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("epoch", [1, 3])  # before and after the cut
def test_a_run_that_was_stopped_ends_as_the_unbroken_one(tmp_path, epoch):
    settings = {"structured": True, "keep": 0.02, "gated": 0.4}
    unbroken, _ = train(tmp_path / "unbroken", **settings)

    def stop(row):
        if row["epoch"] == epoch:
            raise Stop

    with pytest.raises(Stop):
        train(tmp_path / "stopped", on_epoch=stop, **settings)
    again, _ = train(tmp_path / "stopped", **settings)
    state, expected = again.state(), unbroken.state()
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)


# ---- files, the way back, contract


def test_the_file_is_int32_places_and_values_and_the_budget_says_so(tmp_path):
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "diff_pruning", gated=0.0)
    perturb(handle.trained().values(), 1)
    folder, count = handle.save(tmp_path / "a"), round(0.005 * WEIGHTS)
    tensors = read_adapter(folder).tensors
    assert {n.rpartition(".")[2]: t.dtype for n, t in tensors.items()} == {
        "change": torch.float32,
        "change_at": torch.int32,
    }
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == 8 * count
    stored = (folder / "adapter.safetensors").stat().st_size
    said = budget(HOSTS["timm_vit"]().model, resolve("diff_pruning").without_data())
    assert abs(said.adapter_bytes - stored) <= 16 and said.params["trained"] == count
    assert stored < 0.1 * 4 * WEIGHTS
    other = load_adapter(HOSTS["timm_vit"]().model, folder)
    assert torch.equal(output(host, other.model), output(host))


def test_the_base_comes_back_bit_by_bit_after_training_and_merging():
    host = HOSTS["timm_vit"]()
    before, plain = copy.deepcopy(host.model.state_dict()), output(host)
    handle = attach(host.model, "diff_pruning", keep=0.02, gated=0.4)
    fit(host.model, Classify(), Pictures(32), None, Plan(epochs=2, lr=1e-2, batch_size=8), handle=handle)
    adapted = output(host)
    assert not torch.equal(adapted, plain)
    assert all(torch.equal(v, before[k]) for k, v in base_state(host.model).items())
    handle.merge()
    changed = sum(int((v != before[k]).sum()) for k, v in base_state(host.model).items())
    assert 0 < changed <= round(0.02 * WEIGHTS) and torch.equal(output(host), adapted)
    handle.unmerge()
    handle.detach()
    after = host.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert torch.equal(output(host), plain)


def test_rows_of_a_batch_may_have_changes_of_their_own():
    host = HOSTS["timm_vit"]()
    handle, alone = attach(host.model, "diff_pruning", gated=0.0), []
    other = attach(host.model, "diff_pruning", name="other", gated=0.0)
    for number, own in enumerate((handle, other)):
        perturb(own.trained().values(), number)
        own.activate()
        alone.append(output(host))
    handle.activate("default", "other", per_sample=torch.tensor([1, 0]))
    torch.testing.assert_close(output(host), torch.stack([alone[1][0], alone[0][1]]), rtol=1e-5, atol=1e-5)


QUICK = ("timm_eva", "hf_ast", "timm_swin")
VARIANTS = [{}, {"structured": True}, {"gated": 0.0, "keep": 0.02}]


@pytest.mark.parametrize("settings", VARIANTS, ids=("gated", "structured", "kept"))
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in HOSTS])
def test_diff_pruning_keeps_its_promises(family, settings):
    contract(HOSTS[family], "diff_pruning", **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"keep": 1e-6}, "keep=1e-06 of 24,576 weights leaves none; raise it"),
        ({"keep": 0.0}, "keep is 0.0, it must be above 0"),
        ({"stretch": (0.1, 1.1)}, "stretch is .* two numbers, below 0 and above 1"),
        ({"gated": 1.0}, "gated is 1.0, it must be a share of the steps"),
        ({"sites": ("mlp",)}, "needs weights, site 'mlp' is a module"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UsageError, match=said) as caught:
        attach(HOSTS["timm_vit"]().model, "diff_pruning", **settings)
    assert caught.value.exit_code == 2
    handle = attach(HOSTS["timm_vit"]().model, "diff_pruning")
    with pytest.raises(UsageError, match="train with fit, or set total_steps"):
        handle.method.on_step(0, None, handle)
