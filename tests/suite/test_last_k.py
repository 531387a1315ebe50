"""Adapters in the last k blocks: nothing below them is differentiated, and that is what the budget says."""

import json

import pytest
import torch
from typer.testing import CliRunner

from adaptsuite import attach, budget
from adaptsuite.bank import tensors_in
from adaptsuite.errors import UsageError
from adaptsuite.method import method_class, methods
from adaptsuite.sites import find_sites
from adaptsuite.testing import HOSTS

SETTINGS = {
    "kadaptation": {"factor": 4},
    "subspace": {"dims": 64},
    **{f"vision.ila{more}": {"locations": (2,)} for more in ("", "_plus", "_plus_plus")},
}
BLOCKWISE = [n for n in methods() if method_class(n)().roles and not method_class(n).needs_features and n != "vl.rpo"]
INSERTS = ("prompt", "vpt")  # trained tokens are in the first adapted block's input itself


def vit(depth=4):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(32, 8, embed_dim=32, depth=depth, num_heads=2, num_classes=5)


def needing_gradients(model, run):
    """(component, number) of the blocks whose input needs a gradient in a forward."""
    found = set()

    def look(site):
        def hook(module, args, kwargs):
            if any(t.requires_grad for t in tensors_in((args, kwargs))):
                found.add((site.component, site.block))

        return hook

    for site in find_sites(model, "block"):
        model.get_submodule(site.path).register_forward_pre_hook(look(site), with_kwargs=True)
    out = run()
    assert out.requires_grad
    return found


@pytest.mark.parametrize("method", BLOCKWISE)
def test_every_block_wise_method_leaves_no_graph_below_its_first_block(method):
    model = vit()
    handle = attach(model, method, last_k=2, **SETTINGS.get(method, {}))
    assert {s.block for s in handle.sites} <= {2, 3, None} and any(s.block == 2 for s in handle.sites)
    found = needing_gradients(model.train(), lambda: model(torch.randn(2, 3, 32, 32)))
    assert found == {("", block) for block in ((2, 3) if method in INSERTS else (3,))}


@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_in_every_family_backward_ends_behind_the_frozen_blocks(family, method):
    host = HOSTS[family]()
    handle = attach(host.model, method, sample=(host.args, host.kwargs), last_k=1)
    first = {}
    for site in handle.sites:
        if site.block is not None:
            first[site.component] = min(site.block, first.get(site.component, site.block))
    found = needing_gradients(host.model.train(), host.forward)
    assert not any(block <= first[component] for component, block in found if component in first)


def test_frozen_blocks_cost_a_forward_and_no_activations():
    """LoRA on qkv: F below, 2 F_lin + 3 F_att + 3 F_adapters from the first adapted block on, exactly."""
    tokens, dim, depth, rank = 17, 32, 4, 8
    linear, attention, adapter = tokens * 12 * dim**2, 2 * tokens**2 * dim, 4 * tokens * rank * dim
    embed, head = 16 * 192 * dim, 5 * dim
    activations = []
    for k in range(1, depth + 1):
        passed = k * (2 * linear + 3 * attention + 3 * adapter)
        passed -= tokens * dim * (3 * dim + rank)  # qkv and down of the first one: their input needs no gradient
        expected = (depth - k) * (linear + attention) + passed + embed + 2 * head
        found = budget(vit(), "lora", sites="attn.qkv", rank=rank, last_k=k)
        assert found.training_flops == 2 * expected * found.batch
        activations.append(found.activation_bytes)
    steps = [b - a for a, b in zip(activations, activations[1:], strict=False)]
    assert len(set(steps)) == 1 and steps[0] > activations[0] / 2, "every further block keeps as much as the last"


def test_methods_without_blocks_refuse_it():
    for method in ("linear", "full"):
        with pytest.raises(UsageError, match="no sites in blocks"):
            attach(vit(), method, last_k=1)


def test_the_budget_command_shows_every_k():
    from adaptsuite.cli import app

    base = [
        "vision",
        "budget",
        "--backbone",
        "timm:vit_tiny_patch16_224?depth=3",
        "--random-weights",
        "--method",
        "lora",
    ]
    result = CliRunner().invoke(app, [*base, "--last-k", "all", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["last_k"]
    assert [r["last_k"] for r in rows] == [1, 2, 3]
    for name in ("training_flops", "activation_bytes"):
        assert rows[0][name] < rows[1][name] < rows[2][name]
    one = CliRunner().invoke(app, [*base, "--last-k", "2", "--json"])
    assert json.loads(one.stdout)["training_flops"] == rows[1]["training_flops"]
