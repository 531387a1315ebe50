"""Each method against its formula written again in plain loops, its closed count, and the settings it refuses."""

import math

import pytest
import torch

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.lora import LoraBranch
from adaptsuite.method import Method, method_class, methods, register, resolve
from adaptsuite.sites import Site, find_sites
from adaptsuite.testing import HOSTS

SITE = Site("mlp", "mlp", 0, 4, 4)


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_equals_equation_3(rslora):
    method = resolve("lora", rank=2, alpha=6.0, rslora=rslora)
    branch = randomise(LoraBranch(4, 5, 2, method.scale).double())
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    scale = 6.0 / math.sqrt(2) if rslora else 6.0 / 2
    expected = y.clone()
    for b in range(2):
        for t in range(3):
            for o in range(5):
                for r in range(2):
                    hidden = sum(branch.down[r, i] * x[b, t, i] for i in range(4))
                    expected[b, t, o] += scale * branch.up[o, r] * hidden
    torch.testing.assert_close(branch(x, y, None), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y + x @ branch.delta().T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("residual", [False, True])
def test_bottleneck_equals_its_table(placement, residual):
    branch = randomise(resolve("bottleneck", bottleneck=3, placement=placement, residual=residual).build(SITE).double())
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    source = x if placement == "parallel" else y
    expected = torch.zeros_like(y)
    for b in range(2):
        for t in range(3):
            hidden = []
            for r in range(3):
                h = branch.down.bias[r] + sum(branch.down.weight[r, i] * source[b, t, i] for i in range(4))
                hidden.append(0.5 * h * (1 + math.erf(h.item() / math.sqrt(2))))
            for o in range(4):
                adapted = branch.up.bias[o] + sum(branch.up.weight[o, r] * hidden[r] for r in range(3))
                expected[b, t, o] = adapted + (source[b, t, o] if residual else 0) + (y[b, t, o] if source is x else 0)
    torch.testing.assert_close(branch(x, y, None), expected, rtol=1e-12, atol=1e-12)


def test_lora_gradient_is_right():
    branch = randomise(LoraBranch(4, 4, 2, 0.5).double())
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: branch(x, x, None), (x,))


def test_reference_bug_03_a_new_bottleneck_is_not_a_dead_point():
    """The PETL-AST code starts both projections at zero: only a bias ever moved there."""
    host = HOSTS["hf_ast"]()
    handle = attach(host.model, "bottleneck", bottleneck=4)
    optimizer = torch.optim.SGD(handle.trained().values(), lr=0.1)
    start = {k: v.clone() for k, v in handle.trained().items()}
    for _ in range(2):
        optimizer.zero_grad()
        out = host.forward()
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        optimizer.step()
    for name, p in handle.trained().items():
        assert not torch.equal(p, start[name]), name


COUNTS = {  # closed forms; D: width, L: blocks, M: hidden features of the MLP
    ("lora", "hf_ast"): lambda d, m, blocks: 2 * 2 * 8 * d * blocks,
    ("bottleneck", "hf_ast"): lambda d, m, blocks: (2 * d * 64 + d + 64) * blocks,
    ("bitfit", "hf_ast"): lambda d, m, blocks: (4 * d + m + d + 2 * d) * blocks + d,
    ("film", "hf_ast"): lambda d, m, blocks: 4 * d * blocks + 2 * d,
}


@pytest.mark.parametrize(("method", "host"), COUNTS)
def test_trained_values_follow_the_closed_count(method, host):
    model = HOSTS[host]().model
    c = model.config
    handle = attach(model, method)
    expected = COUNTS[method, host](c.hidden_size, c.intermediate_size, c.num_hidden_layers)
    assert handle.parameters_count()["trained"] == expected


def test_full_trains_every_value_of_the_backbone():
    model = HOSTS["timm_vit"]().model
    expected = sum(p.numel() for p in model.parameters())
    counts = attach(model, "full").parameters_count()
    assert counts["trained"] == counts["total"] == expected


def test_total_counts_a_trained_copy_and_its_original_once():
    model = HOSTS["timm_vit"]().model
    base = sum(p.numel() for p in model.parameters())
    assert attach(model, "film").parameters_count()["total"] == base


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("lora", {"rank": 0}, "rank is 0"),
        ("lora", {"alpha": -1e30}, "alpha is -1e"),
        ("lora", {"alpha": float("nan")}, "alpha is nan"),
        ("lora", {"dropout": 1.0}, "dropout is 1.0"),
        ("lora", {"rnak": 4}, "did you mean rank?"),
        ("bottleneck", {"placement": "beside"}, "parallel or sequential"),
        ("bottleneck", {"bottleneck": 0}, "at least 1"),
        ("bottelneck", {}, "did you mean bottleneck"),
        ("audoi.soft_moa", {}, "did you mean audio"),
        ("audio.sotf_moa", {}, "did you mean audio.soft_moa"),
    ],
)
def test_what_cannot_be_is_a_usage_error(method, settings, message):
    with pytest.raises(UsageError, match="(?i)" + message.replace(".", r"\.").replace("?", r"\?")):
        resolve(method, **settings)


def test_every_shipped_method_is_found_by_its_address():
    shipped = {"lora", "bottleneck", "linear", "bitfit", "film", "full", "audio.soft_moa", "audio.dense_moa"}
    assert shipped <= set(methods())
    assert method_class("audio.soft_moa").__module__ == "adaptsuite.audio.soft_moa"


def test_two_classes_cannot_share_a_name():
    from dataclasses import dataclass

    with pytest.raises(ValueError, match="registered by"):

        @register("lora")
        @dataclass(frozen=True)
        class Other(Method):
            pass


def test_lora_on_parts_of_a_fused_weight_touches_these_parts_only():
    host = HOSTS["timm_vit"]()
    dim = find_sites(host.model, "attn.q")[0].dim
    handle = attach(host.model, "lora", sites=("attn.q", "attn.v"))
    randomise(handle.adapter)
    qkv = host.model.blocks[0].attn.qkv
    x = torch.randn(1, 3, dim)
    with handle.disabled():
        plain = qkv(x)
    changed = (qkv(x) - plain).abs().amax((0, 1))
    assert (changed[:dim] > 0).all() and (changed[2 * dim :] > 0).all()
    assert (changed[dim : 2 * dim] == 0).all()
