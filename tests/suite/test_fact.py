"""FacT against V C U^T in plain float64 loops: whole parts, cut parts, one pair of factors for each width."""

import pytest
import torch

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS
from adaptsuite.verify import verify

R = 2


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module


def branch_of(role, dim, dim_out, **settings):
    site, method = Site(role, "w", 0, dim, dim_out, "weight"), resolve("fact", rank=R, scale=0.5, **settings)
    shared = randomise(method.shared([site])).double().requires_grad_(False)
    return randomise(method.build(site, shared), 1).double().requires_grad_(False)


def change_by_hand(branch, dim, dim_out):
    """Part (j, i) is scale * V C_ji U^T; entry by entry, and none beyond the weight."""
    u, v = branch.shared.u[branch.key].tolist(), branch.shared.v[branch.key].tolist()
    core, width = branch.core.tolist(), len(u)
    change = torch.zeros(dim_out, dim, dtype=torch.float64)
    for row in range(dim_out):
        for column in range(dim):
            (j, o), (i, d) = divmod(row, width), divmod(column, width)
            terms = (v[o][a] * core[j * R + a][i * R + b] * u[d][b] for a in range(R) for b in range(R))
            change[row, column] = 0.5 * sum(terms)
    return change


@pytest.mark.parametrize(
    ("role", "dim", "dim_out"),
    [
        ("attn.q", 3, 3),
        ("attn.qkv", 3, 9),
        ("attn.out", 3, 3),
        ("mlp.in", 3, 12),  # four parts above one another
        ("mlp.out", 12, 3),  # four beside one another
        ("mlp.in", 3, 8),  # two and two thirds
        ("mlp.out", 8, 3),
    ],
)
def test_fact_equals_its_formula(role, dim, dim_out):
    branch = branch_of(role, dim, dim_out)
    change = change_by_hand(branch, dim, dim_out)
    torch.testing.assert_close(branch.delta(), change, rtol=1e-12, atol=1e-12)
    x, y = torch.randn(2, 3, dim, dtype=torch.float64), torch.randn(2, 3, dim_out, dtype=torch.float64)
    torch.testing.assert_close(branch(x, y, None), y + x @ change.T, rtol=1e-12, atol=1e-12)
    assert tuple(branch.core.shape) == (-(-dim_out // 3) * R, -(-dim // 3) * R)


def test_fact_gradient_is_right():
    branch = branch_of("mlp.out", 8, 3).requires_grad_(True)
    x, y = torch.randn(2, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, dtype=torch.float64)
    factors = (branch.core, branch.shared.u[branch.key], branch.shared.v[branch.key])
    assert torch.autograd.gradcheck(lambda x, *_: branch(x, y, None), (x, *factors))


def test_fact_drops_in_training_only():
    branch = branch_of("attn.q", 3, 3, dropout=0.5)
    x, y = torch.randn(64, 3, dtype=torch.float64), torch.zeros(64, 3, dtype=torch.float64)
    whole = branch.eval()(x, y, None)
    torch.testing.assert_close(whole, x @ branch.delta().T, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(branch.train()(x, y, None), whole)


def count(handle):
    return handle.parameters_count()["trained"]


def test_trained_values_follow_the_closed_count():
    """2 D R, and for each of the L blocks 12 R^2 where the MLP is four times as wide: (3 + 1 + 4 + 4)."""
    d, r, blocks = 32, 4, 2
    assert count(attach(HOSTS["timm_vit"]().model, "fact", rank=r)) == 2 * d * r + 12 * blocks * r * r
    separate = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.in", "mlp.out")
    assert count(attach(HOSTS["timm_vit"]().model, "fact", rank=r, sites=separate)) == 2 * d * r + 12 * blocks * r * r
    assert count(attach(HOSTS["hf_vit"]().model, "fact", rank=r)) == 2 * d * r + (4 + 2 + 2) * blocks * r * r


def test_a_gated_mlp_of_no_whole_ratio_gets_a_core_for_each_part_begun():
    """EVA's SwiGLU, two layers of 85 features that read 32 and one of 32 that reads 85: two parts and 21 / 32."""
    from timm.models.eva import Eva

    model = Eva(32, 8, embed_dim=32, depth=1, num_heads=2, mlp_ratio=8 / 3, swiglu_mlp=True, scale_mlp=True)
    handle = attach(model, "fact", rank=4, sites=("mlp.in", "mlp.out"))
    shapes = {key: tuple(branch.core.shape) for key, branch in handle.adapter.branches.items()}
    gated = {f"blocks/0/mlp/{name}": (3 * 4, 4) for name in ("fc1_g", "fc1_x")}
    assert shapes == gated | {"blocks/0/mlp/fc2": (4, 3 * 4)}
    randomise(handle.adapter)
    assert verify(handle).ok


def test_each_width_has_its_own_pair():
    handle = attach(HOSTS["timm_swin"]().model, "fact", rank=4)
    shapes = {n: tuple(p.shape) for n, p in handle.trained().items() if n.startswith("shared")}
    assert shapes == {f"shared.{side}./{width}": (width, 4) for side in "uv" for width in (16, 32)}


def test_only_v_is_zero_at_the_start():
    handle = attach(HOSTS["timm_vit"]().model, "fact")
    zero = [name for name, p in handle.trained().items() if not p.any()]
    assert zero == ["shared.v./32"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank is 0, it must be at least 1"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"sites": "mlp"}, "fact needs weights, site 'mlp' is a module"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["timm_vit"]().model, "fact", **settings)
