"""KAdaptation against its sum of Kronecker products in plain float64 loops, and the bugs of its release."""

import pytest
import torch
import torch.nn.functional as F

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.kadaptation import easiest_blocks
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return module


def branch_of(dim=6, dim_out=4, bias="bias", **settings):
    site = Site("attn.q", "q", 0, dim, dim_out, "weight", bias)
    method = resolve("kadaptation", factor=2, **settings)
    shared = randomise(method.shared([site])).double().requires_grad_(False)
    return randomise(method.build(site, shared), 1).double().requires_grad_(False)


def change_by_hand(branch):
    """scale * sum_i (s_i t_i^T) kron (u_i v_i^T), entry by entry."""
    s, t = branch.shared.s[branch.key].tolist(), branch.shared.t[branch.key].tolist()
    u, v = branch.u.tolist(), branch.v.tolist()
    rows, columns, n = len(u[0]), len(v[0]), len(u)
    change = [[0.0] * (n * columns) for _ in range(n * rows)]
    for i in range(n):
        for a in range(n):
            for c in range(n):
                for k in range(rows):
                    for p in range(columns):
                        change[a * rows + k][c * columns + p] += branch.scale * s[i][a] * t[i][c] * u[i][k] * v[i][p]
    return torch.tensor(change, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 160.0])
def test_kadaptation_equals_its_sum_of_kronecker_products(scale):
    branch = branch_of(scale=scale)
    x, y = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    change = change_by_hand(branch)
    torch.testing.assert_close(branch.delta(), change, rtol=1e-12, atol=1e-12)
    expected = y.clone()
    for b in range(2):
        for token in range(3):
            for o in range(4):
                moved = sum(float(change[o, i]) * float(x[b, token, i]) for i in range(6))
                expected[b, token, o] += moved + float(branch.row_shift()[o])
    torch.testing.assert_close(branch(x, y, None), expected, rtol=1e-12, atol=1e-12)


def test_the_change_is_torch_s_own_kronecker_product():
    branch = branch_of()
    s, t = branch.shared.s[branch.key], branch.shared.t[branch.key]
    terms = [torch.kron(torch.outer(s[i], t[i]), torch.outer(branch.u[i], branch.v[i])) for i in range(2)]
    torch.testing.assert_close(branch.delta(), sum(terms), rtol=1e-12, atol=1e-12)


def test_kadaptation_gradient_is_right():
    branch = branch_of().requires_grad_(True)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, dtype=torch.float64)
    factors = (branch.u, branch.v, branch.shared.s[branch.key], branch.shared.t[branch.key])
    assert torch.autograd.gradcheck(lambda x, *_: branch(x, y, None), (x, *factors))


def test_dropout_acts_on_the_values_of_the_change():
    branch = branch_of(dropout=0.5)
    x, y = torch.eye(6, dtype=torch.float64), torch.zeros(6, 4, dtype=torch.float64)
    whole = branch.delta().T
    torch.testing.assert_close(branch.eval()(x, y, None), whole + branch.row_shift(), rtol=1e-12, atol=1e-12)
    dropped = branch.train()(x, y, None) - branch.row_shift()
    kept = dropped.abs() > 1e-9
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], rtol=1e-9, atol=1e-9)
    assert 0 < int(kept.sum()) < kept.numel()


def test_slow_factors_are_shared_by_all_blocks_and_separate_for_q_and_v():
    handle = attach(HOSTS["timm_vit"]().model, "kadaptation", factor=8)
    shapes = {name: tuple(p.shape) for name, p in handle.trained().items()}
    slow = {f"shared.{side}./attn/{role}": (8, 8) for side in "st" for role in "qv"}
    shifts = {f"shared.shift./{block}:32": (32,) for block in (0, 1)}
    sites = [f"branches.blocks/{block}/attn/qkv:{role}" for block in (0, 1) for role in "qv"]
    assert shapes == slow | shifts | {f"{site}.{side}": (8, 4) for site in sites for side in "uv"}


def test_components_do_not_share():
    handle = attach(HOSTS["hf_clip"]().model, "kadaptation", factor=8)
    slow = [name for name in handle.trained() if name.startswith("shared.s.")]
    assert len(slow) == 4 and sum("vision_model" in name for name in slow) == 2
    assert {row["component"]: row["trained"] for row in handle.report() if row["trained"]} == {
        "text_model": handle.parameters_count()["trained"] // 2,
        "vision_model": handle.parameters_count()["trained"] // 2,
    }


@pytest.mark.parametrize(("family", "with_bias"), [("timm_vit", True), ("hf_vit", True), ("timm_eva", False)])
def test_trained_values_follow_the_closed_count(family, with_bias):
    """Slow: two roles, n^2 each side; fast: 2 D for each site; a shift of D for each block, where a bias holds it."""
    n, d, blocks = 4, 32, 2
    handle = attach(HOSTS[family]().model, "kadaptation", factor=n)
    expected = 2 * 2 * n * n + 2 * blocks * 2 * d + (blocks * d if with_bias else 0)
    assert handle.parameters_count()["trained"] == expected


def test_blocks_and_last_k_restrict_it():
    model = HOSTS["timm_vit"]().model
    for settings, expected in (({"blocks": (1,)}, {1}), ({"blocks": [0, 1], "last_k": 1}, {1}), ({}, {0, 1})):
        handle = attach(model, "kadaptation", factor=8, **settings)
        assert {s.block for s in handle.sites} == expected
        assert len([n for n in handle.trained() if n.startswith("shared.shift")]) == len(expected)
        handle.detach()
    with pytest.raises(UsageError, match=r"blocks is \(1, 2\), it must be among 0 to 1"):
        attach(model, "kadaptation", factor=8, blocks=(1, 2))


def test_shared_factors_follow_the_precision_of_the_host():
    host = HOSTS["timm_vit"]()
    handle = attach(host.model.double(), "kadaptation", factor=8)
    assert {p.dtype for p in handle.trained().values()} == {torch.float64}
    assert host.model(host.args[0].double()).isfinite().all()
    handle = attach(HOSTS["timm_vit"]().model.bfloat16(), "kadaptation", factor=8)
    assert {p.dtype for p in handle.trained().values()} == {torch.float32}


def test_dropout_is_refused_where_no_module_is_called():
    with pytest.raises(UsageError, match="set 0"):
        attach(HOSTS["timm_eva"]().model, "kadaptation", factor=8, dropout=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 5}, "factor is 5, its sites are 32 wide; factors that divide them: 1, 2, 4, 8, 16, 32"),
        ({"factor": 0}, "factor is 0, it must be at least 1"),
        ({"scale": 0.0}, "scale is 0.0, it must be a number but 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"sites": "attn"}, "needs weights, site 'attn' is a module"),
        ({"select": 0}, "select is 0, it must be at least 1"),
        ({"select": 1, "blocks": (0,)}, "it must be none where blocks are named"),
        ({"select": 1}, "select leaves the blocks to the data: call prepare first"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["timm_vit"]().model, "kadaptation", **settings)


def test_the_easiest_blocks_have_the_smallest_dimension_and_then_the_largest_gain():
    rows = [(None, 0.1), (64, 0.3), (8, 0.2), (64, 0.4), (None, 0.0)]
    table = [{"blocks": (i,), "dimension": d, "start": 0.5, "full": 0.5 + g} for i, (d, g) in enumerate(rows)]
    assert easiest_blocks(table, 1) == (2,)
    assert easiest_blocks(table, 2) == (2, 3)
    assert easiest_blocks(table, 4) == (0, 1, 2, 3)


# ---- what the release does and the paper does not


def test_reference_bug_the_change_of_q_is_scaled_as_q_is():
    """There q's change is added after q was divided by sqrt(d_h): no weight could give that. Ours is one."""
    host, twin = HOSTS["open_clip"](), HOSTS["open_clip"]()
    handle = attach(host.model, "kadaptation", factor=4)
    randomise(handle.adapter)
    for key, branch in handle.adapter.branches.items():
        site = handle.adapter.sites[key]
        target, (start, stop) = twin.model.get_submodule(site.path), site.rows
        with torch.no_grad():
            target.in_proj_weight[start:stop] += change_by_hand(branch).float()
            target.in_proj_bias[start:stop] += branch.row_shift()
    with torch.no_grad():
        torch.testing.assert_close(host.forward(), twin.forward(), rtol=1e-4, atol=1e-5)


def test_reference_bug_tokens_keep_their_places():
    """There a reshape mixes tokens and heads: what one token reads turns up in another's head."""
    host = HOSTS["timm_vit"]()
    randomise(attach(host.model, "kadaptation", factor=8).adapter)
    qkv, x = host.model.blocks[0].attn.qkv, torch.randn(1, 6, 32)
    other = x.clone()
    other[:, 2] += 1
    with torch.no_grad():
        moved = (qkv(other) - qkv(x)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, True, False, False, False]


def test_reference_bug_a_new_adapter_is_not_a_dead_point():
    """There both fast factors start at zero: every gradient of a Kronecker product is zero for ever."""
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "kadaptation", factor=8)
    optimizer = torch.optim.SGD(handle.trained().values(), lr=0.1)
    start = {k: v.clone() for k, v in handle.trained().items()}
    for _ in range(2):
        optimizer.zero_grad()
        out = host.forward()
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        optimizer.step()
    for name, p in handle.trained().items():
        assert not torch.equal(p, start[name]), name


def test_reference_bug_v_uses_its_own_fast_factors():
    """There v's change is made of v's slow and q's fast factors: v's own are trained, counted and never read."""
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "kadaptation", factor=8)
    randomise(handle.adapter)
    branches = handle.adapter.branches
    q, v = branches["blocks/0/attn/qkv:q"], branches["blocks/0/attn/qkv:v"]
    before = q.delta().detach(), v.delta().detach()
    with torch.no_grad():
        v.u.mul_(2)
    torch.testing.assert_close(v.delta(), 2 * before[1])
    assert torch.equal(q.delta(), before[0])
    x = torch.randn(1, 3, 32)
    F.linear(x, v.delta()).sum().backward()
    assert v.v.grad.abs().max() > 0 and q.v.grad is None
