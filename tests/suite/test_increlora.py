"""IncreLoRA: its change and score in plain float64 loops, growth one triple at a time, the traps of the release."""

import copy

import pytest
import torch

from adaptsuite.artifact import load_adapter
from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.increlora import START
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS
from adaptsuite.verify import contract, perturb, verify

SCHEDULE = {"total_steps": 20, "warmup": 0.1, "final": 0.3}


def branch_of(dim=5, dim_out=4, rank=1):
    method = resolve("increlora", rank=3, alpha=6.0)
    torch.manual_seed(0)
    branch = method.build(Site("attn.q", "q", 0, dim, dim_out, "weight")).double()
    for _ in range(rank - 1):
        branch.grow()
    perturb(branch.parameters(), 1)
    return branch


def change_by_hand(branch):
    """alpha / R * sum of the triples; the reserve, behind them, has no part in it."""
    r = len(branch.sigma)
    up, down = [p[:, 0].tolist() for p in branch.up], [p[0].tolist() for p in branch.down]
    sigma = [float(p.detach()) for p in branch.sigma]
    rows = range(len(up[0]))
    change = [[6 / r * sum(up[k][o] * sigma[k] * v for k, v in zip(range(r), vs, strict=True))
               for vs in zip(*down[:r], strict=True)] for o in rows]  # fmt: skip
    return torch.tensor(change, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3])
def test_increlora_equals_its_triples(rank):
    branch = branch_of(rank=rank)
    assert (branch.rank, len(branch.down), len(branch.up)) == (rank, rank + 1, rank + 1)
    x, y = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    change = change_by_hand(branch)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            torch.testing.assert_close(branch.delta(), change, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(branch(x, y, None), y + x @ change.T, rtol=1e-12, atol=1e-12)


def test_the_reserve_learns_as_a_triple_of_a_small_sigma_and_does_not_act():
    branch = branch_of()
    x, read = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    (branch(x, torch.zeros(6, 4, dtype=torch.float64), None) * read).sum().backward()
    up, down = branch.up[1].detach().requires_grad_(), branch.down[1].detach().requires_grad_()
    ((x @ (6 * START * up @ down).T) * read).sum().backward()
    torch.testing.assert_close(branch.up[1].grad, up.grad, rtol=1e-10, atol=0)
    torch.testing.assert_close(branch.down[1].grad, down.grad, rtol=1e-10, atol=0)


def test_increlora_gradient_is_right():
    branch = branch_of(rank=2)
    branch.stop()
    x, y = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, *_: branch(x, y, None), (x, *branch.parameters()))


def test_the_score_is_of_the_whole_change_and_of_all_micro_batches_together():
    """Trap: the release keeps the last backward of a step alone."""
    branch = branch_of(rank=2).train()
    mean = spread = 0.0
    for step in range(3):
        drawn = torch.Generator().manual_seed(step)
        gradient, change = torch.zeros(4, 5, dtype=torch.float64), change_by_hand(branch)
        for _ in range(2):
            x = torch.randn(6, 5, generator=drawn, dtype=torch.float64)
            read = torch.randn(6, 4, generator=drawn, dtype=torch.float64)
            (branch(x, torch.zeros(6, 4, dtype=torch.float64), None) * read).sum().backward()
            for row, out in zip(x.tolist(), read.tolist(), strict=True):
                gradient += torch.tensor([[o * v for v in row] for o in out], dtype=torch.float64)
        value = sum(abs(c * g) for c, g in zip(change.flatten().tolist(), gradient.flatten().tolist(), strict=True))
        value = value / 20**0.5
        mean = 0.85 * mean + 0.15 * value
        spread = 0.7 * spread + 0.3 * abs(value - mean)
        branch.look((0.85, 0.7))
        perturb(branch.parameters(), step)
    assert float(branch.importance()) == pytest.approx(mean * spread, rel=1e-10)


def test_trap_the_regulariser_looks_between_triples():
    """The release adds up each single vector's gap to length one: equal triples would be free."""
    handle = attach(HOSTS["timm_vit"]().model.double(), "increlora", rank=2, orthogonality=0.1)
    expected = []
    for branch in handle.adapter.branches.values():
        with torch.no_grad():
            for vectors in (branch.down, branch.up):
                vectors[1].copy_(vectors[0])
                vectors[0].div_(vectors[0].norm())
                vectors[1].div_(vectors[1].norm())
                expected.append((1 + 1) ** 0.5)  # two unit vectors that are one: two entries of 1 beside the diagonal
    assert float(handle.regulariser()) == pytest.approx(0.1 * sum(expected) / len(expected), rel=1e-9)


def steps(handle, count, first=0, optimizer=None):
    """A loop of one's own that takes up new tensors by a group of their own."""
    model, generator = handle.model.train(), torch.Generator().manual_seed(first)
    optimizer = optimizer or torch.optim.AdamW(handle.trained().values(), lr=1e-2)
    for step in range(first, first + count):
        optimizer.zero_grad()
        out = model(torch.randn(2, 3, 32, 32, generator=generator))
        (out - torch.linspace(-1, 1, out.numel()).view_as(out)).square().mean().backward()
        optimizer.step()
        handle.method.on_step(step, optimizer, handle)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if new := [p for p in handle.trained().values() if id(p) not in known]:
            optimizer.add_param_group({"params": new})
    return optimizer


def ranks(handle):
    return [branch.rank for branch in handle.adapter.branches.values()]


def test_sites_grow_at_equal_intervals_to_the_budget_and_the_reserves_go():
    """Two sites at once from 4 to 12 triples: four rounds in the 12 steps from 2 to 14."""
    handle = attach(HOSTS["timm_vit"]().model, "increlora", rank=3, top=2, **SCHEDULE)
    optimizer, totals = None, []
    for step in range(20):
        optimizer = steps(handle, 1, step, optimizer)
        totals.append(sum(ranks(handle)))
    assert totals == [4] * 5 + [6] * 3 + [8] * 3 + [10] * 3 + [12] * 6
    assert handle.parameters_count()["trained"] == 12 * (32 + 32 + 1)
    assert not any(branch.growing or branch.scores for branch in handle.adapter.branches.values())


def test_growth_may_start_from_more_than_one_triple():
    handle = attach(HOSTS["timm_vit"]().model, "increlora", rank=3, start_rank=2, top=2, **SCHEDULE)
    assert ranks(handle) == [2] * 4
    steps(handle, 9)
    assert sum(ranks(handle)) == 10
    steps(handle, 6, 9)
    assert sum(ranks(handle)) == 12 and handle.method.settled(handle)


@pytest.mark.parametrize(("method", "start"), [("adalora", 12), ("increlora", 1)])
def test_what_looks_at_no_data_counts_the_triples_of_the_end(method, start):
    method = resolve(method, rank=5)
    assert method.start_rank == start
    handle = attach(HOSTS["timm_vit"]().model, method.without_data())
    assert handle.parameters_count()["trained"] == 4 * 5 * (32 + 32 + 1)


def test_the_most_important_sites_grow():
    handle = attach(HOSTS["timm_vit"]().model, "increlora", rank=3, top=2, **SCHEDULE)
    optimizer = steps(handle, 5)
    branches = list(handle.adapter.branches.values())
    for branch, value in zip(branches, (1.0, 4.0, 2.0, 3.0), strict=True):
        branch.scores["change"].mean.fill_(value)
        branch.scores["change"].spread.fill_(1.0)
    handle.method.on_step(5, optimizer, handle)
    assert ranks(handle) == [1, 2, 1, 2]


def test_growth_does_not_move_the_output_and_a_new_triple_starts_from_its_reserve():
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "increlora", rank=3, **SCHEDULE)
    optimizer = steps(handle, 4)
    branch = next(iter(handle.adapter.branches.values()))
    branch.sigma[0].data.fill_(3.0)
    vectors, before, state = branch.up[1], branch.delta().detach(), dict(optimizer.state[branch.up[1]])
    branch.grow()
    assert branch.up[1] is vectors and optimizer.state[vectors]["exp_avg"] is state["exp_avg"]
    assert float(branch.sigma[1]) == pytest.approx(START) and branch.rank == 2 and branch.growing
    torch.testing.assert_close(branch.delta().detach(), before, rtol=1e-4, atol=1e-6)
    assert before.abs().max() > 1e-3


def test_trap_equal_scores_do_not_overrun_the_budget():
    """The release grows all sites at or above a threshold, and none of its tests for the end is met any more."""
    handle = attach(HOSTS["timm_vit"]().model, "increlora", rank=2, top=3, **SCHEDULE)
    optimizer = torch.optim.AdamW(handle.trained().values())
    handle.method.on_step(8, optimizer, handle)  # nothing was seen: all scores are zero
    assert ranks(handle) == [2, 2, 2, 1]
    handle.method.on_step(14, optimizer, handle)
    assert ranks(handle) == [3, 2, 2, 1] and handle.method.settled(handle)


def test_a_full_site_leaves_its_share_to_others_and_skipped_rounds_are_made_up_for():
    handle = attach(HOSTS["timm_vit"]().model, "increlora", rank=20, top=4, **{**SCHEDULE, "total_steps": 100})
    optimizer = torch.optim.AdamW(handle.trained().values())
    branches = list(handle.adapter.branches.values())
    while branches[0].rank < 32:
        branches[0].grow()
    handle.method.on_step(80, optimizer, handle)
    assert sum(ranks(handle)) == 80 and ranks(handle)[0] == 32


def test_a_growing_adapter_is_saved_loaded_merged_copied_and_verified(tmp_path):
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "increlora", rank=3, top=1, **SCHEDULE)
    steps(handle, 5)
    host.model.eval()
    assert sorted(ranks(handle)) == [1, 1, 1, 2]
    with torch.no_grad():
        before = host.forward().clone()
        handle.save(tmp_path / "adapter")
        other = HOSTS["timm_vit"]()
        assert load_adapter(other.model, tmp_path / "adapter").state().keys() == handle.state().keys()
        assert torch.equal(other.forward(), before)
        assert torch.equal(host.forward(copy.deepcopy(host.model)), before)
        handle.merge()
        torch.testing.assert_close(host.forward(), before, rtol=1e-5, atol=1e-5)
        handle.unmerge()
    assert verify(handle).ok


def test_new_triples_are_drawn_from_the_adapter_s_own_seed():
    first, second = (attach(HOSTS["timm_vit"]().model, "increlora") for _ in range(2))
    second.load_state(first.state())
    for handle, noise in ((first, 1), (second, 2)):
        torch.manual_seed(noise)
        for branch in handle.adapter.branches.values():
            branch.grow()
            branch.grow()
    state, other = first.state(), second.state()
    assert state.keys() == other.keys() and all(torch.equal(state[n], other[n]) for n in state)
    drawn = [branch.down[2].flatten() for branch in first.adapter.branches.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("family", ["timm_eva", "hf_ast", "timm_swin"])
def test_increlora_keeps_its_promises(family):
    contract(HOSTS[family], "increlora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 33}, "rank is 33, above 32: blocks.0.attn.qkv has no more"),  # more than the layer has
        ({"top": 0}, "top is 0, it must be at least 1"),
        ({"start_rank": 9}, "start_rank is 9, it must be from 1 to the rank of the end, 8"),
        ({"rank": 0}, "rank is 0"),
        ({"sites": "mlp"}, "increlora needs weights, site 'mlp' is a module"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["timm_vit"]().model, "increlora", **settings)


def test_growth_that_cannot_end_in_time_is_refused_at_the_first_step():
    handle = attach(HOSTS["timm_vit"]().model, "increlora", rank=8, top=2, **SCHEDULE)
    with pytest.raises(UsageError, match=r"14 rounds of growth do not fit into 12 steps: raise top \(2\)"):
        steps(handle, 3)
