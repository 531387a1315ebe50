"""Each method against its formula written again in plain loops, its closed count, and the settings it refuses."""

import math

import pytest
import torch

from adaptsuite.bottleneck import BottleneckBranch
from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.lora import LoraBranch
from adaptsuite.method import Method, method_class, methods, register, resolve
from adaptsuite.selective import BitFit
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


ACTIVATIONS = {
    "gelu": lambda h: 0.5 * h * (1 + math.erf(h / math.sqrt(2))),
    "quick_gelu": lambda h: h / (1 + math.exp(-1.702 * h)),
    "relu": lambda h: max(h, 0.0),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [0.1, "learned", "channel"])
def test_a_bottleneck_s_activation_and_scale_are_those_of_its_formula(activation, scale):
    branch = randomise(BottleneckBranch(4, 3, 5, activation, scale).double()).requires_grad_(False)
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    factors = [scale] * 5 if scale == 0.1 else branch.scale.expand(5).tolist()
    for b in range(2):
        hidden = [branch.down.bias[r] + sum(branch.down.weight[r, i] * x[b, i] for i in range(4)) for r in range(3)]
        hidden = [ACTIVATIONS[activation](float(h)) for h in hidden]
        for o in range(5):
            up = float(branch.up.bias[o]) + sum(float(branch.up.weight[o, r]) * hidden[r] for r in range(3))
            found = float(branch(x, y, None)[b, o])
            assert found == pytest.approx(float(y[b, o]) + factors[o] * up, rel=1e-12, abs=1e-12)


def test_a_bottleneck_drops_hidden_features_in_training_only():
    branch = randomise(BottleneckBranch(4, 64, 4, dropout=0.5))
    x, y = torch.randn(2, 3, 4), torch.zeros(2, 3, 4)
    whole = branch.eval()(x, y, None)
    assert torch.equal(branch(x, y, None), whole)
    branch.train()
    dropped = torch.stack([branch(x, y, None) for _ in range(2000)])
    assert not torch.equal(dropped[0], dropped[1])
    torch.testing.assert_close(dropped.mean(0), whole, rtol=0.1, atol=0.5)


def test_starts_of_a_bottleneck():
    """zero: only `up`; xavier: uniform with variance 2 / (D + R); houlsby: within two deviations of .01."""
    torch.manual_seed(0)
    zero, xavier, houlsby = (BottleneckBranch(300, 200, 300, start=start) for start in ("zero", "xavier", "houlsby"))
    assert not zero.up.weight.any() and not zero.up.bias.any() and zero.down.weight.std() > 0.01
    for layer in (xavier.down, xavier.up):
        assert layer.weight.detach().var() == pytest.approx(2 / 500, rel=0.05) and not layer.bias.any()
    for layer in (houlsby.down, houlsby.up):
        assert layer.weight.abs().max() <= 0.02 and layer.weight.detach().std() == pytest.approx(0.0088, rel=0.05)
    assert resolve("bottleneck").identity_at_start and resolve("adaptformer").identity_at_start
    assert not resolve("bottleneck", start="xavier").identity_at_start and not resolve("adapter_plus").identity_at_start
    assert resolve("adapter_plus", start="zero").identity_at_start


def test_adapter_plus_stands_behind_the_skip_of_the_mlp():
    """x_out = z + s * A(z), z what the whole block gives."""
    host, twin = HOSTS["timm_vit"](), HOSTS["timm_vit"]().model
    randomise(attach(host.model, "adapter_plus", bottleneck=2).adapter)
    branches = list(host.model.adapter_bank.adapters["default"].branches.values())
    with torch.no_grad():
        x = twin._pos_embed(twin.patch_embed(*host.args))
        for block, branch in zip(twin.blocks, branches, strict=True):
            z = block(x)
            x = z + branch.scale * branch.up(torch.nn.functional.gelu(branch.down(z)))
        expected = twin.forward_head(twin.norm(x))
        torch.testing.assert_close(host.forward(), expected, rtol=1e-4, atol=1e-4)


def test_adaptformer_reads_what_the_mlp_reads():
    """x_out = MLP(LN(x')) + s * up(relu(down(LN(x')))) + x', as in the paper and not as in its code."""
    host = HOSTS["timm_vit"]()
    adapter = randomise(attach(host.model, "adaptformer", bottleneck=2).adapter)
    block, branch = host.model.blocks[0], next(iter(adapter.branches.values()))
    seen = []
    block.norm2.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    block.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        host.forward()
        (x, normed), out = seen
        plain = block.mlp.fc2(block.mlp.act(block.mlp.fc1(normed)))
        expected = plain + 0.1 * branch.up(branch.down(normed).relu()) + x
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


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
    ("parallel_adapter", "hf_vit"): lambda d, m, blocks: 2 * (2 * 8 * d + d + 8) * blocks,
    ("adaptformer", "hf_vit"): lambda d, m, blocks: (2 * 64 * d + d + 64) * blocks,
    ("adapter_plus", "hf_vit"): lambda d, m, blocks: (2 * 8 * d + d + 8 + d) * blocks,
    ("vpt", "hf_vit"): lambda d, m, blocks: 50 * d * blocks,
}


PUBLISHED = [  # on ViT-B/16
    ("parallel_adapter", {}, 313_536),
    ("convpass", {}, 327_552),
    ("adapter_plus", {}, 165_984),
    ("adaptformer", {}, 1_189_632),
    ("ssf", {}, 205_824),
    ("kadaptation", {}, 50_176),
    ("fact", {}, 61_440),
    ("vpt", {"tokens": 100}, 921_600),
    ("bitfit", {"sites": (*BitFit.sites, "patch_embed?")}, 102_912),
    ("film", {}, 38_400),
]


@pytest.fixture(scope="module")
def vit_base():
    import timm

    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=0)


@pytest.mark.parametrize(("method", "settings", "expected"), PUBLISHED)
def test_published_counts_are_met(vit_base, method, settings, expected):
    handle = attach(vit_base, method, **settings)
    assert handle.parameters_count()["trained"] == expected
    handle.detach()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("parallel_adapter", {}),
        ("adaptformer", {}),
        ("adapter_plus", {}),
        ("convpass", {}),
        ("vpt", {"tokens": 4}),
        ("ssf", {}),
        ("kadaptation", {"factor": 8}),
        ("subspace", {}),
        ("fact", {}),
    ],
)
def test_thirty_steps_lower_the_loss(method, settings):
    host = HOSTS["timm_vit"]()
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    handle = attach(host.model, method, **settings)

    def loss():
        return torch.nn.functional.cross_entropy(host.model(images), labels)

    groups = [{"params": g["params"], "lr": 0.01 * g["lr_scale"]} for g in handle.trainable()]
    optimizer, start = torch.optim.Adam(groups), float(loss())
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss()) < 0.8 * start


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
        ("bottleneck", {"activation": "tanh"}, "activation is 'tanh', it must be gelu, quick_gelu or relu"),
        ("bottleneck", {"start": "ones"}, "zero, xavier or houlsby"),
        ("bottleneck", {"scale": 0.0}, "a number but 0, learned or channel"),
        ("bottleneck", {"scale": "wide"}, "a number but 0, learned or channel"),
        ("adaptformer", {"dropout": 1.0}, "dropout is 1.0, it must be in"),
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
