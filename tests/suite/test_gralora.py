"""GraLoRA against its blocks in plain float64 loops, and against peft's class."""

import pytest
import torch

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS
from adaptsuite.verify import contract, perturb


def branch_of(dim=6, dim_out=4, **settings):
    method = resolve("gralora", **{"rank": 4, "granularity": 2, "alpha": 3.0, **settings})
    branch = method.build(Site("attn.q", "q", 0, dim, dim_out, "weight")).double()
    perturb(branch.parameters(), 1)
    return branch.requires_grad_(False)


def change_by_hand(branch, dim, dim_out):
    """Entry (o, d) of block (j, i): sum over that block's R / k ranks of up_j and down_i, and the plain pair's sum."""
    k, down, up = branch.k, branch.down.tolist(), branch.up.tolist()
    part, change = len(down[0]) // k, torch.zeros(dim_out, dim, dtype=torch.float64)
    for row in range(dim_out):
        for column in range(dim):
            (j, o), (i, d) = divmod(row, dim_out // k), divmod(column, dim // k)
            total = sum(up[j][o][i * part + r] * down[i][j * part + r][d] for r in range(part))
            if branch.hybrid_up is not None:
                plain = zip(branch.hybrid_up[row], branch.hybrid_down[:, column], strict=True)
                total += sum(float(b) * float(a) for b, a in plain)
            change[row, column] = branch.scale * total
    return change


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 3 / 4), ({"hybrid_rank": 2}, 3 / 6), ({"granularity": 1}, 3 / 4), ({"rank": 2}, 3 / 2)],
)
def test_gralora_equals_its_blocks(settings, scale):
    branch = branch_of(**settings)
    change = change_by_hand(branch, 6, 4)
    assert branch.scale == scale
    torch.testing.assert_close(branch.delta(), change, rtol=1e-12, atol=1e-12)
    x, y = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(branch(x, y, None), y + x @ change.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(branch(x[:, 0], y[:, 0], None), y[:, 0] + x[:, 0] @ change.T, rtol=1e-12, atol=1e-12)


def test_gralora_gradient_is_right():
    branch = branch_of(hybrid_rank=1).requires_grad_(True)
    x, y = torch.randn(2, 6, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, *_: branch(x, y, None), (x, *branch.parameters()))


@pytest.mark.parametrize(("k", "hybrid"), [(1, 0), (2, 0), (4, 0), (2, 3)])
def test_the_change_has_k_times_the_rank_for_the_values_of_lora(k, hybrid):
    branch = branch_of(24, 24, rank=4, granularity=k, hybrid_rank=hybrid)
    assert torch.linalg.matrix_rank(branch.delta()) == 4 * k + hybrid
    assert sum(p.numel() for p in branch.parameters()) == (4 + hybrid) * (24 + 24)


def test_trained_values_follow_the_closed_count():
    """(rank + hybrid rank) (D + D_out) for each of the two sites of the two blocks, whatever the granularity."""
    for k in (1, 2, 4):
        handle = attach(HOSTS["timm_vit"]().model, "gralora", rank=4, granularity=k, hybrid_rank=2)
        assert handle.parameters_count()["trained"] == 2 * 2 * (4 + 2) * (32 + 32)


@pytest.mark.parametrize("hybrid", [0, 3])
def test_gralora_equals_peft_s_class_in_count_and_output(hybrid):
    peft = pytest.importorskip("peft")
    ours, theirs = HOSTS["hf_vit"](), HOSTS["hf_vit"]()
    handle = attach(ours.model, "gralora", rank=4, granularity=2, hybrid_rank=hybrid, alpha=5.0)
    perturb(handle.trained().values(), 1)
    targets = sorted({s.path.rpartition(".")[2] for s in handle.sites})
    config = peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=hybrid, alpha=5, target_modules=targets)
    model = peft.get_peft_model(theirs.model, config).eval()
    assert model.get_nb_trainable_parameters()[0] == handle.parameters_count()["trained"]
    for key, branch in handle.adapter.branches.items():
        layer = theirs.model.get_submodule(handle.adapter.sites[key].path)
        with torch.no_grad():
            layer.gralora_A["default"].copy_(branch.down.transpose(1, 2))
            layer.gralora_B["default"].copy_(branch.up.transpose(1, 2))
            if hybrid:
                layer.gralora_A_general["default"].weight.copy_(branch.hybrid_down)
                layer.gralora_B_general["default"].weight.copy_(branch.hybrid_up)
        torch.testing.assert_close(branch.delta(), layer.get_delta_weight("default"), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward(), theirs.forward(model.base_model.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("timm_eva", {"hybrid_rank": 2}),  # weights that are read without a call
        ("hf_gpt2", {"sites": ("attn.q", "attn.v", "mlp.out")}),
        ("timm_swin", {"granularity": 4, "dropout": 0.1}),
    ],
)
def test_gralora_keeps_its_promises(family, settings):
    contract(HOSTS[family], "gralora", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 3}, "rank is 3, it must be a whole multiple of granularity, 2"),
        ({"rank": 0}, "rank is 0"),
        ({"granularity": 0}, "granularity is 0, it must be at least 1"),
        ({"granularity": 3, "rank": 3}, "granularity 3 does not divide blocks.0.attn.qkv, 32 to 32"),
        ({"rank": 34}, "rank 34 is above 32, all blocks.0.attn.qkv has"),
        ({"hybrid_rank": 33}, "rank 33 is above 32"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"sites": "mlp"}, "gralora needs weights, site 'mlp' is a module"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["timm_vit"]().model, "gralora", **settings)
