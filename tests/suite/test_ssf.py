"""SSF against equations 3 and 4: scaled and shifted features, and the weights that give them."""

import pytest
import torch

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.sites import Site, find_sites
from adaptsuite.ssf import SsfBranch
from adaptsuite.testing import HOSTS


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (name.endswith("gain")))
    return module


def test_ssf_equals_equation_3():
    branch = randomise(SsfBranch(4, True, "identity")).double().requires_grad_(False)
    y = torch.randn(2, 3, 4, dtype=torch.float64)
    found = branch(None, y, None)
    for b in range(2):
        for t in range(3):
            for d in range(4):
                expected = float(branch.gain[d]) * float(y[b, t, d]) + float(branch.shift[d])
                assert float(found[b, t, d]) == pytest.approx(expected, rel=1e-14)


def test_the_host_computes_scaled_and_shifted_features_everywhere():
    """A twin whose modules are scaled and shifted by hooks of our own, the patch embedding before its flattening."""
    host, twin = HOSTS["timm_vit_reg"](), HOSTS["timm_vit_reg"]()
    adapter = randomise(attach(host.model, "ssf").adapter)
    assert len(adapter.branches) == 2 * (4 + 4) + 2  # four linear layers and norms a block; the patches, the last norm
    for key, branch in adapter.branches.items():
        module, path = twin.model.get_submodule(key.replace("/", ".")), key

        def change(m, args, out, branch=branch, path=path):
            shape = (-1, 1, 1) if path.startswith("patch_embed") else (-1,)
            return out * branch.gain.view(shape) + branch.shift.view(shape)

        module.register_forward_hook(change)
    with torch.no_grad():
        torch.testing.assert_close(host.forward(), twin.forward(), rtol=1e-4, atol=1e-5)


def test_merged_weights_are_those_of_equation_4():
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "ssf")
    randomise(handle.adapter)
    modules = {p: host.model.get_submodule(p) for p in ("blocks.1.mlp.fc1", "blocks.1.norm2", "patch_embed.proj")}
    before = {path: (m.weight.clone(), m.bias.clone()) for path, m in modules.items()}
    handle.merge()
    for path, (weight, bias) in before.items():
        branch = handle.adapter.branches[path.replace(".", "/")]
        for row in range(len(bias)):
            gain, shift = branch.gain[row], branch.shift[row]
            torch.testing.assert_close(modules[path].weight[row], gain * weight[row])
            torch.testing.assert_close(modules[path].bias[row], gain * bias[row] + shift)


def test_places_without_a_bias_have_no_shift():
    """EVA reads its fused qkv with biases of q and v that are parameters of their own."""
    model = HOSTS["timm_eva"]().model
    handle = attach(model, "ssf")
    shifts = {key: branch.shift is not None for key, branch in handle.adapter.branches.items()}
    assert not shifts["blocks/0/attn/qkv"] and shifts["blocks/0/attn/proj"]
    features = sum(s.dim_out * (1 + (s.bias is not None)) for s in handle.sites)
    assert handle.parameters_count()["trained"] == features


@pytest.mark.parametrize("family", ["timm_vit", "timm_siglip", "hf_vit"])
def test_trained_values_follow_the_closed_count(family):
    """Two for each feature of: qkv 3 D, out D, in M, out D, two norms, the final norm, the patch embedding."""
    model = HOSTS[family]().model
    hidden = find_sites(model, "mlp.in")[0].dim_out
    expected = 2 * (2 * (3 * 32 + 32 + hidden + 32 + 2 * 32) + 2 * 32)
    assert attach(model, "ssf").parameters_count()["trained"] == expected


def test_a_host_without_patches_needs_no_patch_embedding():
    handle = attach(HOSTS["hf_bert"]().model, "ssf")
    assert {s.role for s in handle.sites} == {"attn.qkv", "attn.out", "mlp.in", "mlp.out", "norm"}


def test_the_authors_start_is_random_around_the_identity():
    torch.manual_seed(0)
    branch = resolve("ssf", start="normal").build(Site("mlp.in", "fc1", 0, 8, 20_000, "weight", "bias"))
    for values, mean in ((branch.gain.detach(), 1), (branch.shift.detach(), 0)):
        assert values.mean() == pytest.approx(mean, abs=1e-3) and values.std() == pytest.approx(0.02, rel=0.05)
    assert not resolve("ssf", start="normal").identity_at_start and resolve("ssf").identity_at_start


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"start": "zeros"}, "identity or normal"), ({"sites": "mlp"}, "'mlp' is neither"), ({"sites": "nrom?"}, "nrom")],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises((UsageError, LookupError), match=message):
        attach(HOSTS["timm_vit"]().model, "ssf", **settings)
