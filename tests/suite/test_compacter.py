"""Compacter against its sum of Kronecker products in plain float64 loops, and the paper's counts on T5-base."""

import math

import pytest
import torch

from adaptsuite.compacter import phm
from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS
from adaptsuite.verify import contract, perturb


def branch_of(dim=8, hidden=4, n=2, **settings):
    method = resolve("compacter", bottleneck=hidden, n=n, start="glorot", slow_std=1.0, **settings)
    site = Site("mlp", "m", 0, dim, dim)
    shared = method.shared([site]).double().requires_grad_(False)
    branch = method.build(site, shared).double()
    perturb(branch.parameters(), 1)
    return branch.requires_grad_(False)


def product_by_hand(a, s, t):
    """sum_i A_i kron (s_i t_i^T), entry by entry."""
    a, s, t = a.tolist(), s.tolist(), t.tolist()
    n, rows, columns = len(a), len(s[0]), len(t[0][0])
    h = torch.zeros(n * rows, n * columns, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            for k in range(n):
                for p in range(rows):
                    for q in range(columns):
                        h[j * rows + p, k * columns + q] += a[i][j][k] * s[i][p][0] * t[i][0][q]
    return h


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_compacter_equals_its_formula(placement):
    branch = branch_of(placement=placement)
    a = branch.shared.a
    down, up = product_by_hand(a, branch.down_s, branch.down_t), product_by_hand(a, branch.up_s, branch.up_t)
    x, y = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    expected = y.clone()
    for b in range(2):
        for token in range(3):
            source = (y if placement == "sequential" else x)[b, token].tolist()
            hidden = [
                gelu(float(branch.down_bias[h]) + sum(source[d] * float(down[d, h]) for d in range(8)))
                for h in range(4)
            ]
            for o in range(8):
                expected[b, token, o] += float(branch.up_bias[o]) + sum(hidden[h] * float(up[h, o]) for h in range(4))
    torch.testing.assert_close(branch(x, y, None), expected, rtol=1e-10, atol=1e-12)


def test_the_product_is_torch_s_own_kronecker_product_with_leading_dimensions_and_any_rank():
    a, left, right = torch.randn(3, 3, 3), torch.randn(5, 3, 4, 2), torch.randn(5, 3, 2, 6)
    expected = [sum(torch.kron(a[i], left[e, i] @ right[e, i]) for i in range(3)) for e in range(5)]
    torch.testing.assert_close(phm(a, left, right), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_compacter_gradient_is_right():
    branch = branch_of().requires_grad_(True)
    branch.shared.requires_grad_(True)
    x, y = torch.randn(2, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    factors = (*branch.parameters(), *branch.shared.parameters())
    assert torch.autograd.gradcheck(lambda y, *_: branch(x, y, None), (y, *factors))


def test_one_set_of_slow_factors_serves_all_layers_and_both_ways():
    handle = attach(HOSTS["timm_vit"]().model, "compacter", all_norms=False)
    assert [n for n in handle.trained() if n.startswith("shared")] == ["shared.a"]
    assert {id(b.shared) for b in handle.adapter.branches.values()} == {id(handle.adapter.shared)}
    assert len(handle.adapter.branches) == 4


def adapter_values(dim, hidden, n):
    """Fast factors: n (D / n + H / n) each way; and the biases. Nothing else belongs to one adapter."""
    return 2 * (dim + hidden) + hidden + dim


@pytest.mark.parametrize(("method", "sites"), [("compacter", 4), ("compacter_plus_plus", 2)])
def test_trained_values_follow_the_closed_count(method, sites):
    """With n^3 slow values; the norms are five, of 32 weights and 32 biases."""
    settings = {"bottleneck": 8, "n": 4}
    bare = attach(HOSTS["timm_vit"]().model, method, all_norms=False, **settings)
    assert bare.parameters_count()["trained"] == sites * adapter_values(32, 8, 4) + 4**3
    norms = attach(HOSTS["timm_vit"]().model, method, **settings).parameters_count()["trained"]
    assert norms == bare.parameters_count()["trained"] + 5 * 2 * 32


@pytest.mark.parametrize(
    ("method", "adapters", "share"), [("compacter", 48, 0.073), ("compacter_plus_plus", 24, 0.047)]
)
def test_the_paper_s_share_of_t5_base_is_met(method, adapters, share):
    """24 blocks; 12 with two norms, 12 with three, and a final one for each half; 24 hidden features, n 4."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32128)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
        handle = attach(model, method, sample={"input_ids": torch.zeros(1, 4, dtype=torch.long),
                                               "decoder_input_ids": torch.zeros(1, 4, dtype=torch.long)})  # fmt: skip
    count = handle.parameters_count()["trained"]
    assert count == adapters * adapter_values(768, 24, 4) + 4**3 + (12 * 2 + 12 * 3 + 2) * 768
    assert round(100 * count / 222_903_552, 3) == share


@pytest.mark.parametrize("method", ["compacter", "compacter_plus_plus"])
@pytest.mark.parametrize("family", ["timm_eva", "hf_bert", "hf_ast"])
def test_compacter_keeps_its_promises(family, method):
    contract(HOSTS[family], method, start="glorot", slow_std=0.1)


def test_only_the_last_factor_of_the_way_up_is_zero_at_the_start():
    handle = attach(HOSTS["timm_vit"]().model, "compacter", all_norms=False)
    zero = {n.rpartition(".")[2] for n, p in handle.trained().items() if not p.any()}
    assert zero == {"up_t", "down_bias", "up_bias"} and handle.method.identity_at_start


def test_trap_glorot_everywhere_as_in_the_release_is_no_identity_and_does_not_promise_it():
    host, plain = HOSTS["timm_vit"](), HOSTS["timm_vit"]().forward()
    handle = attach(host.model, "compacter", start="glorot", slow_std=1.0)
    assert not handle.method.identity_at_start
    with torch.no_grad():
        assert (host.forward() - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 5}, "n is 5, which does not divide 32 features"),  # trap: both widths divide by n
        ({"bottleneck": 6}, "n is 4, which does not divide 6 features"),
        ({"bottleneck": 0}, "0 hidden features"),
        ({"n": 0}, "n is 0, it must be at least 1"),
        ({"slow_std": 0.0}, "slow_std is 0.0, it must be a number above 0"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"start": "ones"}, "start is 'ones'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["timm_vit"]().model, "compacter", **settings)
