"""AdaLoRA: its formula and scores in plain float64 loops, one scheduled run beside peft's class, budgets, resuming."""

import copy

import pytest
import torch

from adaptsuite.artifact import load_adapter, read_adapter
from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.plan import Plan
from adaptsuite.rank_allocator import best
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS, Classify, Pictures
from adaptsuite.trainer import fit
from adaptsuite.verify import contract, perturb, verify


def branch_of(dim=5, dim_out=4, rank=3):
    method = resolve("adalora", rank=1, start_rank=rank, alpha=6.0)
    branch = method.build(Site("attn.q", "q", 0, dim, dim_out, "weight")).double()
    perturb(branch.parameters(), 1)
    return branch


def test_adalora_equals_its_triples():
    branch = branch_of().requires_grad_(False)
    up, values, down = (t.tolist() for t in branch.factors())
    change = [[6 / 3 * sum(up[o][k] * values[k] * down[k][d] for k in range(3)) for d in range(5)] for o in range(4)]
    change = torch.tensor(change, dtype=torch.float64)
    torch.testing.assert_close(branch.delta(), change, rtol=1e-12, atol=1e-12)
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(branch(x, y, None), y + x @ change.T, rtol=1e-12, atol=1e-12)


def test_adalora_gradient_is_right():
    branch = branch_of()
    x, y = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, *_: branch(x, y, None), (x, *branch.factors()))


def test_importance_is_smoothed_sensitivity_times_smoothed_uncertainty():
    branch, betas, steps = branch_of(), (0.85, 0.6), 4
    mean = {name: torch.zeros_like(getattr(branch, name)).tolist() for name in ("up", "down", "sigma")}
    spread, drawn = copy.deepcopy(mean), torch.Generator().manual_seed(0)
    for _ in range(steps):
        for name in mean:
            p = getattr(branch, name)
            p.grad = torch.randn(p.shape, generator=drawn, dtype=torch.float64)
            weights, gradients = p.detach().reshape(-1).tolist(), p.grad.reshape(-1).tolist()
            flat = [torch.tensor(t[name], dtype=torch.float64).reshape(-1).tolist() for t in (mean, spread)]
            for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
                flat[0][i] = betas[0] * flat[0][i] + (1 - betas[0]) * abs(w * g)
                flat[1][i] = betas[1] * flat[1][i] + (1 - betas[1]) * abs(abs(w * g) - flat[0][i])
            mean[name], spread[name] = (torch.tensor(f, dtype=torch.float64).view(p.shape).tolist() for f in flat)
        branch.look(betas)
    expected = [
        mean["sigma"][k] * spread["sigma"][k]
        + sum(mean["down"][k][d] * spread["down"][k][d] for d in range(5)) / 5
        + sum(mean["up"][o][k] * spread["up"][o][k] for o in range(4)) / 4
        for k in range(3)
    ]
    torch.testing.assert_close(branch.importance(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_regulariser_is_the_mean_gap_to_orthonormal_vectors():
    handle = attach(HOSTS["timm_vit"]().model.double(), "adalora", rank=2, start_rank=3, orthogonality=0.5)
    gaps = []
    for branch in handle.adapter.branches.values():
        for rows in (branch.up.T.tolist(), branch.down.tolist()):
            dots = [[sum(a * b for a, b in zip(r, s, strict=True)) - (r is s) for s in rows] for r in rows]
            gaps.append(sum(d * d for row in dots for d in row) ** 0.5)
    assert len(gaps) == 8 and float(handle.regulariser()) == pytest.approx(0.5 * sum(gaps) / len(gaps), rel=1e-12)
    assert attach(HOSTS["timm_vit"]().model, "adalora", orthogonality=0).regulariser() is None


def steps(handle, count, lr=1e-2, first=0, optimizer=None, after=lambda step: None):
    """A loop of one's own: fixed inputs, a fixed read-out, AdamW, `on_step`."""
    model = handle.model
    generator = torch.Generator().manual_seed(first)
    optimizer = optimizer or torch.optim.AdamW(handle.trained().values(), lr=lr)
    for step in range(first, first + count):
        optimizer.zero_grad()
        out = model(torch.randn(2, 3, 32, 32, generator=generator))
        out = getattr(out, "logits", out)
        (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().mean().backward()
        optimizer.step()
        handle.method.on_step(step, optimizer, handle)
        after(step)
    return optimizer


def train(method, out=None, **settings):
    torch.manual_seed(0)
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, method, head="head", **settings)
    plan = Plan(epochs=5, lr=1e-2, batch_size=8, seed=3)
    return handle, fit(host.model, Classify(), Pictures(32), Pictures(16, 1), plan, out, handle)


METHODS = {
    "adalora": {"rank": 2, "start_rank": 4, "interval": 2, "final": 0.4},
    "increlora": {"rank": 3, "top": 2, "final": 0.4},
}


SCHEDULE = {"total_steps": 20, "warmup": 0.1, "final": 0.3, "interval": 2}


def test_a_scheduled_run_equals_peft_s_class():
    """The same weights, inputs and optimiser: values, scores, which triples are masked, and the pattern of the end."""
    peft = pytest.importorskip("peft")
    host, other = HOSTS["hf_vit"](), HOSTS["hf_vit"]()
    handle = attach(host.model, "adalora", rank=2, start_rank=4, alpha=4.0, orthogonality=0, **SCHEDULE)
    targets = sorted({s.path.rpartition(".")[2] for s in handle.sites})
    schedule = {"tinit": 2, "tfinal": 6, "deltaT": 2, "total_step": 20}
    config = peft.AdaLoraConfig(target_r=2, init_r=4, lora_alpha=4, target_modules=targets, **schedule)
    model = peft.get_peft_model(other.model, config).eval()
    layers = {k: other.model.get_submodule(s.path) for k, s in handle.adapter.sites.items()}
    for key, branch in handle.adapter.branches.items():
        layers[key].lora_A["default"].data.copy_(branch.down)
        layers[key].lora_B["default"].data.copy_(branch.up)
    theirs = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator, allocator = torch.Generator().manual_seed(0), model.base_model.rankallocator
    masked = 0

    def peft_s(step):
        nonlocal masked
        theirs.zero_grad()
        out = other.model(torch.randn(2, 3, 32, 32, generator=generator)).logits
        (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().mean().backward()
        theirs.step()
        model.base_model.update_and_allocate(step)
        for key, branch in handle.adapter.branches.items():
            values = layers[key].lora_E["default"].detach()[:, 0]
            if step < 14:
                torch.testing.assert_close(branch.sigma.detach(), values, rtol=2e-3, atol=1e-5)
                assert torch.equal(branch.sigma == 0, values == 0)
                masked += int((values == 0).sum())
                name = next(n for n in allocator.exp_avg_ipt if handle.adapter.sites[key].path + ".lora_A" in n)
                score = branch.scores["down"].score()
                torch.testing.assert_close(score, allocator._element_score(name), rtol=1e-2, atol=1e-12)
            if step == 14:
                pattern = config.rank_pattern[f"{name_of(config.rank_pattern, handle.adapter.sites[key].path)}"]
                assert branch.rank == sum(pattern)
                torch.testing.assert_close(branch.sigma.detach(), values[torch.tensor(pattern)], rtol=2e-3, atol=1e-5)

    steps(handle, 15, after=peft_s)
    assert masked > 0 and handle.method.settled(handle)


def name_of(pattern, path):
    return next(name for name in pattern if f"{path}." in name)


def test_the_budget_falls_as_a_cubic():
    handle = attach(HOSTS["timm_vit"]().model, "adalora", rank=2, start_rank=10, **SCHEDULE)
    budget = [handle.method.budget(step, handle) for step in range(20)]
    expected = [8 + int(32 * (1 - (t - 2) / 12) ** 3) for t in range(3, 14)]
    assert budget == [40, 40, 40, *expected, *[8] * 6]


def test_the_end_has_the_values_of_lora_and_one_more_for_each_triple():
    handle = attach(HOSTS["timm_vit"]().model, "adalora", rank=2, start_rank=4, **SCHEDULE)
    assert handle.parameters_count()["trained"] == 4 * 4 * (32 + 32 + 1)
    steps(handle, 15)
    assert handle.parameters_count()["trained"] == 4 * 2 * (32 + 32 + 1)
    assert not any("scores" in name for name in handle.state())


def test_the_last_allocation_keeps_what_the_optimiser_remembers_and_does_not_move_the_output():
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "adalora", rank=2, start_rank=4, **SCHEDULE)
    optimizer = steps(handle, 14)
    branches, taken = list(handle.adapter.branches.values()), {}
    for branch in branches:
        taken[branch] = (branch.down.detach().clone(), optimizer.state[branch.down]["exp_avg"].clone())
        scores = torch.cat([b.importance() for b in branches])
    kept = torch.zeros(16, dtype=torch.bool)
    kept[best(scores, 8)] = True
    with torch.no_grad():
        for branch, own in zip(branches, kept.split(4), strict=True):
            branch.sigma.mul_(own)
        expected = host.forward().clone()
    handle.method.on_step(14, optimizer, handle)
    for branch, own in zip(branches, kept.split(4), strict=True):
        down, moment = taken[branch]
        assert torch.equal(branch.down, down[own]) and torch.equal(optimizer.state[branch.down]["exp_avg"], moment[own])
    with torch.no_grad():
        torch.testing.assert_close(host.forward(), expected, rtol=1e-5, atol=1e-6)
    steps(handle, 2, first=15, optimizer=optimizer)


def test_trap_ties_neither_empty_the_budget_nor_overrun_it():
    """In peft everything at or below the threshold goes: with equal scores (zeros, at the start) that is all."""
    assert best(torch.zeros(6), 4).tolist() == [0, 1, 2, 3]
    handle = attach(HOSTS["timm_vit"]().model, "adalora", rank=2, start_rank=4, **SCHEDULE)
    optimizer = torch.optim.AdamW(handle.trained().values())
    handle.method.on_step(14, optimizer, handle)  # nothing was seen before
    assert sum(branch.rank for branch in handle.adapter.branches.values()) == 8


def test_trap_a_skipped_last_allocation_is_made_up_for():
    handle = attach(HOSTS["timm_vit"]().model, "adalora", rank=2, start_rank=4, **SCHEDULE)
    optimizer = steps(handle, 14)
    handle.method.on_step(17, optimizer, handle)  # the steps between had gradients that were not finite
    assert handle.method.settled(handle)


def shrunk(**settings):
    """Sites of ranks 4, 4, 0 and 0."""
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "adalora", rank=2, start_rank=4, **SCHEDULE, **settings)
    for branch, kept in zip(handle.adapter.branches.values(), (range(4), range(4), (), ()), strict=True):
        branch.keep(torch.tensor(kept, dtype=torch.long), torch.optim.SGD(handle.trained().values()))
    perturb(handle.trained().values(), 1)
    return host, handle


def test_sites_of_any_rank_are_saved_loaded_merged_copied_and_verified(tmp_path):
    host, handle = shrunk()
    with torch.no_grad():
        before = host.forward().clone()
        handle.save(tmp_path / "adapter")
        other = HOSTS["timm_vit"]()
        loaded = load_adapter(other.model, tmp_path / "adapter")
        assert torch.equal(other.forward(), before) and loaded.state().keys() == handle.state().keys()
        assert torch.equal(host.forward(copy.deepcopy(host.model)), before)
        handle.merge()
        torch.testing.assert_close(host.forward(), before, rtol=1e-5, atol=1e-5)
        handle.unmerge()
        assert torch.equal(host.forward(), before)
    found = verify(handle)
    assert found.ok and sum(row["state"] == "exempt: it holds nothing" for row in found.rows) == 6
    ranks = read_adapter(tmp_path / "adapter").extra["ranks"]
    assert list(ranks.values()) == [4, 4, 0, 0] and list(ranks) == list(handle.adapter.branches)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_of_before_takes_its_shapes_back(method):
    """As the choice among rates does, and a refit."""
    handle, _ = train(method, **METHODS[method])
    fresh = attach(HOSTS["timm_vit"]().model, method, head="head", **METHODS[method])
    handle.load_state(fresh.state())
    state, expected = handle.state(), fresh.state()
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)
    plan = Plan(epochs=3, lr=1e-2, batch_size=8)
    fit(handle.model, Classify(), Pictures(32), None, plan, handle=handle)
    assert handle.method.settled(handle)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_does_not_fit_changes_nothing(method):
    handle, _ = train(method, **METHODS[method])
    fresh = attach(HOSTS["timm_vit"]().model, method, head="head", **METHODS[method]).state()
    before = {n: t.clone() for n, t in handle.state().items()}
    name = next(n for n in fresh if "down" in n)
    for wrong in ({**fresh, name: torch.zeros(4, 33)}, {n: t for n, t in fresh.items() if n != name}):
        with pytest.raises(ValueError, match="adapter state"):
            handle.load_state(wrong)
        after = handle.state()
        assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def test_the_report_shows_which_sites_got_rank():
    _, handle = shrunk()
    (section,) = handle.method.sections(handle)
    assert section["figure"].startswith("data:image/svg+xml") and section["text"].startswith("8 triples at 4 sites")


@pytest.mark.parametrize("family", ["timm_eva", "hf_ast", "timm_swin"])
def test_adalora_keeps_its_promises(family):
    contract(HOSTS[family], "adalora")


class Stop(Exception):
    pass


@pytest.mark.parametrize("epoch", [1, 3, 4])  # before, amid and after allocation
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_ends_as_the_unbroken_one(tmp_path, method, epoch, monkeypatch):
    """Bit for bit: weights, ranks, scores; the stop comes as an exception after a checkpoint."""
    unbroken, found = train(method, tmp_path / "unbroken", **METHODS[method])

    def stop(row):
        if row["epoch"] == epoch:
            raise Stop

    torch.manual_seed(0)
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, method, head="head", **METHODS[method])
    plan = Plan(epochs=5, lr=1e-2, batch_size=8, seed=3)
    with pytest.raises(Stop):
        fit(host.model, Classify(), Pictures(32), Pictures(16, 1), plan, tmp_path / "stopped", handle, on_epoch=stop)
    torch.manual_seed(1)  # a new process has other random numbers
    again, resumed = train(method, tmp_path / "stopped", **METHODS[method])
    state, expected = again.state(), unbroken.state()
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)
    assert (resumed.best_epoch, resumed.steps) == (found.best_epoch, found.steps)
    assert [row["val"] for row in resumed.history] == [row["val"] for row in found.history]


@pytest.mark.parametrize("method", METHODS)
def test_only_an_epoch_within_the_budget_is_kept(method):
    handle, found = train(method, **METHODS[method])
    assert found.best_epoch >= 3  # the last allocation is at step 12 of 20
    assert handle.method.settled(handle)
    ranks = [branch.rank for branch in handle.adapter.branches.values()]
    assert sum(ranks) == METHODS[method]["rank"] * len(ranks)
    trained = handle.parameters_count()["trained_without_head"]
    assert trained == sum(ranks) * (32 + 32 + 1)


@pytest.mark.parametrize("method", METHODS)
def test_patience_waits_for_allocation(method):
    torch.manual_seed(0)
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, method, head="head", **METHODS[method])
    plan = Plan(epochs=5, lr=1e-2, batch_size=8, patience=1)
    found = fit(host.model, Classify(), Pictures(32), Pictures(16, 1), plan, handle=handle)
    assert handle.method.settled(handle) and len(found.history) >= 3


def test_an_average_of_weights_is_refused():
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "adalora", head="head")
    with pytest.raises(UsageError, match="ema averages tensors of one shape, adalora changes them"):
        fit(host.model, Classify(), Pictures(32), None, Plan(ema=0.9), handle=handle)


def test_a_loop_of_one_s_own_must_say_how_long_it_is():
    handle = attach(HOSTS["timm_vit"]().model, "adalora")
    with pytest.raises(UsageError, match="train with fit, or set total_steps"):
        steps(handle, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_rank": 33}, "start_rank is 33, above 32: blocks.0.attn.qkv has no more"),  # more than the layer has
        ({"rank": 13}, "start_rank is 12, it must be at least the rank of the end, 13"),
        ({"rank": 0}, "rank is 0, it must be at least 1"),
        ({"interval": 0}, "interval is 0"),
        ({"warmup": 0.6}, "warmup is 0.6, it must be below 1 - final, 0.5"),
        ({"final": 1.0}, "final is 1.0"),
        ({"smoothing": (0.85, 1.0)}, "smoothing is"),
        ({"orthogonality": -1.0}, "orthogonality is -1.0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"sites": "attn"}, "adalora needs weights, site 'attn' is a module"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["timm_vit"]().model, "adalora", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_the_commands_reports_where_the_rank_went(tmp_path, method, capsys):
    """With a choice among rates and a refit, which start anew from the fresh state."""
    import json

    from PIL import Image

    from adaptsuite.cli import main

    for i in range(24):
        folder = tmp_path / "data" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 + 200 * (i % 2), 10 * i, 90)).save(folder / f"{i}.png")
    line = f"vision train --backbone embedded:vision-tiny --image-size 48 --epochs 8 --method {method}".split()
    line += ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--set=plan.batch_size=4"]
    line += ["--set=lr_grid=1e-3,5e-3", "--set=refit=true", *(f"--set={k}={v}" for k, v in METHODS[method].items())]
    assert main(line) == 0, capsys.readouterr().err
    record = read_adapter(tmp_path / "run" / "adapter")
    ranks = record.extra["ranks"]
    assert sum(ranks.values()) == METHODS[method]["rank"] * len(ranks)
    extra = json.loads((tmp_path / "run" / "run.json").read_text())["extra"]
    assert "Where the rank went" in [section["title"] for section in extra]
    assert "Where the rank went" in (tmp_path / "run" / "report.html").read_text()
