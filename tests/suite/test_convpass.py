"""Convpass against its formula in plain float64 loops, on grids of any shape behind any number of prefix tokens."""

import math

import pytest
import torch
import torch.nn.functional as F

from adaptsuite.bank import Context
from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS

D, R = 3, 2
ACTIVATIONS = {
    "gelu": lambda h: 0.5 * h * (1 + math.erf(h / math.sqrt(2))),
    "quick_gelu": lambda h: h / (1 + math.exp(-1.702 * h)),
}


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module


def branch_of(prefix=0, **settings):
    site = Site("mlp", "mlp", 0, D, D, prefix_tokens=prefix)
    return randomise(resolve("convpass", bottleneck=R, **settings).build(site)).double().eval().requires_grad_(False)


def by_hand(branch, tokens, grid, prefix, activation):
    """A of one sample's tokens (P + h w, D), as nested lists."""
    (h, w), g = grid, ACTIVATIONS[activation]
    kernel = branch.conv.kernel_size[0]
    down, conv, up = ((m.weight.tolist(), m.bias.tolist()) for m in (branch.down, branch.conv, branch.up))
    z = [[g(down[1][r] + sum(down[0][r][d] * t[d] for d in range(D))) for r in range(R)] for t in tokens.tolist()]
    out = []
    for index in range(prefix + h * w):
        row, column = divmod(index - prefix, w)
        hidden = []
        for o in range(R):
            total = conv[1][o]
            for i in range(R):
                for a in range(kernel):
                    for b in range(kernel):
                        y, x = row + a - kernel // 2, column + b - kernel // 2
                        if index < prefix:  # an image of one pixel
                            value = z[index][i] if a == b == kernel // 2 else 0.0
                        else:
                            value = z[prefix + y * w + x][i] if 0 <= y < h and 0 <= x < w else 0.0
                        total += conv[0][o][i][a][b] * value
            hidden.append(g(total))
        out.append([up[1][d] + sum(up[0][d][r] * hidden[r] for r in range(R)) for d in range(D)])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("prefix", "grid", "kernel"), [(1, (4, 4), 3), (0, (2, 5), 3), (5, (3, 2), 5), (2, (1, 4), 1)])
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_convpass_equals_its_formula(prefix, grid, kernel, activation, placement):
    branch = branch_of(prefix, kernel=kernel, activation=activation, placement=placement, scale=0.1)
    x, y = torch.randn(2, 2, prefix + grid[0] * grid[1], D, dtype=torch.float64)
    source = x if placement == "parallel" else y
    expected = y + 0.1 * torch.stack([by_hand(branch, t, grid, prefix, activation) for t in source])
    torch.testing.assert_close(branch(x, y, Context(grid=grid)), expected, rtol=1e-12, atol=1e-12)


def test_a_host_that_keeps_the_grid_gets_the_same():
    branch = branch_of()
    x, y = torch.randn(2, 2, 6, D, dtype=torch.float64)
    flat = branch(x, y, Context(grid=(2, 3)))
    kept = branch(x.view(2, 2, 3, D), y.view(2, 2, 3, D), None)
    torch.testing.assert_close(kept.flatten(1, 2), flat, rtol=1e-12, atol=1e-12)


def test_convpass_gradient_is_right():
    branch = branch_of(1).requires_grad_(True)
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: branch(x, x, Context(grid=(2, 2))), (x,))


def test_the_convolution_starts_as_the_identity_and_the_host_as_it_was():
    branch = resolve("convpass", kernel=5).build(Site("mlp", "mlp", 0, 16, 16))
    z = torch.randn(2, 8, 6, 7)
    assert torch.equal(branch.conv(z), z) and not branch.up.weight.any() and not branch.up.bias.any()
    xavier = resolve("convpass", start="xavier")
    assert not xavier.identity_at_start
    branch = xavier.build(Site("mlp", "mlp", 0, 512, 512))
    assert branch.up.weight.detach().var() == pytest.approx(2 / 520, rel=0.1)
    assert branch.conv.weight.detach().var() == pytest.approx(2 / (9 * 16), rel=0.2)


@pytest.mark.parametrize("family", ["timm_vit", "timm_vit_reg", "timm_siglip", "hf_vit", "timm_beit"])
def test_trained_values_follow_the_closed_count(family):
    handle = attach(HOSTS[family]().model, "convpass", bottleneck=4)
    assert handle.parameters_count()["trained"] == 2 * 2 * (2 * 4 * 32 + 4 + 32 + 9 * 16 + 4)


def sites_seen(host, images, path):
    """(x, y before the adapter, y after it) of a module of the host in one forward."""
    seen, module = [], host.model.get_submodule(path)
    first = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)), prepend=True)
    last = module.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        host.model(images)
    first.remove(), last.remove()
    return *seen[0], seen[1]


def vit_of_any_size(registers, cls):
    from timm.models.vision_transformer import VisionTransformer

    host, shape = HOSTS["timm_vit"](), dict(embed_dim=32, depth=2, num_heads=2, num_classes=5)
    pool = dict(class_token=cls, reg_tokens=registers, global_pool="token" if cls else "avg")
    host.model = VisionTransformer(32, 8, **shape, **pool, dynamic_img_size=True).eval()
    return host


@pytest.mark.parametrize(("registers", "cls"), [(0, True), (3, True), (0, False)])
def test_the_grid_of_each_forward_is_used(registers, cls):
    """Images of any shape, one after the other, with registers and without CLS."""
    host = vit_of_any_size(registers, cls)
    handle = attach(host.model, "convpass", bottleneck=4)
    randomise(handle.adapter)
    branch, prefix = handle.adapter.branches["blocks/1/mlp"], cls + registers
    for height, width in ((4, 6), (5, 3), (4, 4)):
        x, y, found = sites_seen(host, torch.randn(2, 3, 8 * height, 8 * width), "blocks.1.mlp")
        z = F.gelu(branch.down(x))
        image = branch.conv(z[:, prefix:].transpose(1, 2).reshape(2, 4, height, width)).flatten(2).transpose(1, 2)
        alone = branch.conv(z[:, :prefix].flatten(0, 1)[..., None, None]).view(2, prefix, 4)  # 1 x 1 images
        expected = y + branch.up(F.gelu(torch.cat([alone, image], 1)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_swin_s_mlp_sees_the_grid_of_its_stage():
    host = HOSTS["timm_swin"]()
    handle = attach(host.model, "convpass", sites="mlp", bottleneck=4)
    randomise(handle.adapter)
    for path, grid in (("layers.0.blocks.1.mlp", (16, 16)), ("layers.1.blocks.0.mlp", (8, 8))):
        branch = handle.adapter.branches[path.replace(".", "/")]
        x, y, found = sites_seen(host, *host.args, path)
        z = F.gelu(branch.down(x)).transpose(1, 2).unflatten(2, grid)
        expected = y + branch.up(F.gelu(branch.conv(z).flatten(2).transpose(1, 2)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["timm_vit", "timm_swin"])
def test_checkpointing_changes_no_gradient(family):
    """Blocks run again in backward, when another forward has put another grid into the context."""
    host = vit_of_any_size(3, True) if family == "timm_vit" else HOSTS[family]()
    handle = attach(host.model.train(), "convpass", sites="mlp", bottleneck=4)
    randomise(handle.adapter)
    other = host.args[0][..., :16] if family == "timm_vit" else host.args[0]

    def gradients():
        handle.adapter.zero_grad()
        loss = host.forward().square().sum()
        with torch.no_grad():
            host.model(other)
        loss.backward()
        return {n: p.grad.clone() for n, p in handle.trained().items()}

    plain = gradients()
    host.model.set_grad_checkpointing(True)
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name])


def test_windows_are_refused_with_what_to_do():
    host = HOSTS["timm_swin"]()
    with pytest.raises(UsageError, match="attends within windows .then take sites=mlp."):
        attach(host.model, "convpass")
    assert not hasattr(host.model, "adapter_bank")


def test_hosts_without_a_grid_are_refused():
    with pytest.raises(UsageError, match="no grid: a host with a grid of two sides is needed"):
        attach(HOSTS["hf_bert"]().model, "convpass")


@pytest.mark.parametrize("kernel", [0, 4, -3])
def test_a_kernel_without_a_middle_is_refused(kernel):
    with pytest.raises(UsageError, match=f"kernel is {kernel}, it must be an odd number"):
        resolve("convpass", kernel=kernel)
