"""Published adapters that never trained are refused by name, with the reason and the way out."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.liveness import CUT, FAST_PATH, UNCALLED, UNREAD, verify_module
from adaptsuite.sites import find_sites
from adaptsuite.testing import HOSTS
from adaptsuite.verify import verify

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Classifier(nn.Module):
    """An encoder under a linear head, with or without gradients through the encoder."""

    def __init__(self, encoder, width, cut=False):
        super().__init__()
        self.encoder, self.head, self.cut = encoder, nn.Linear(width, 2), cut

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.cut):
            features = self.encoder(x)
        return self.head(features)


def clip_tower():
    return HOSTS["open_clip"]().model.visual


def in_peft(model, *targets, **settings):
    return get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, lora_dropout=0.1, target_modules=list(targets), **settings)
    )


def test_lora_on_out_proj_as_a_module_is_dead_and_named():
    found = verify_module(in_peft(clip_tower(), "c_fc", "c_proj", "out_proj"), IMAGE)
    dead = [r["name"] for r in found.rows if r["state"] == "dead"]
    assert len(dead) == 4 and all("attn.out_proj.lora_" in name for name in dead)
    (problem,) = found.problems
    count, total = 2 * 2 * (32 + 32), 2 * 2 * (32 + 32) + 2 * 2 * 2 * (32 + 128)
    assert problem.startswith(f"{count} of {total:,} trained values are dead") and problem.endswith(UNCALLED)
    assert found.changes_output, "the rest acts"


def test_the_way_out_that_is_named_lives():
    handle = attach(clip_tower(), "lora", sample=IMAGE, sites=("mlp.in", "mlp.out", "attn.out"))
    assert verify(handle, IMAGE, fresh=True).problems == [] and len(handle.shadow_sites) == 2


def test_an_encoder_under_no_grad_is_named():
    found = verify_module(Classifier(in_peft(clip_tower(), "c_fc", "c_proj"), 16, cut=True), IMAGE)
    assert {r["name"].partition(".")[0] for r in found.rows if r["state"] == "alive"} == {"head"}
    (problem,) = found.problems
    assert problem.endswith(CUT) and found.changes_output
    assert verify_module(Classifier(in_peft(clip_tower(), "c_fc", "c_proj"), 16), IMAGE).problems == []


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_an_own_adapter_under_no_grad_is_named_beside_a_living_head(method):
    model = Classifier(HOSTS["timm_vit"]().model, 5, cut=True)
    handle = attach(model, method, sample=IMAGE, head="head")
    (problem,) = verify(handle, IMAGE).problems
    assert "gets no gradient at all" in problem and "under no_grad" in problem


def test_the_fast_path_passes_wrapped_layers_by_and_is_named():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    tokens = torch.randn(2, 5, 16)
    found = verify_module(in_peft(encoder, "linear1", "linear2"), tokens)
    (problem,) = found.problems
    assert not found.changes_output and problem.endswith(FAST_PATH)
    handle = attach(encoder.eval(), "lora", sample=tokens, sites=("mlp.in", "mlp.out"))
    assert verify(handle, tokens, fresh=True).problems == []


def test_what_the_forward_does_not_read_is_named():
    model = Classifier(nn.Linear(4, 4), 4)
    model.unused = nn.Linear(2, 2)
    found = verify_module(model, torch.randn(2, 4))
    (problem,) = found.problems
    assert problem == f"6 of 36 trained values are dead (unused.weight ...): {UNREAD}"


def test_a_look_leaves_the_model_as_it_was():
    model = Classifier(in_peft(clip_tower(), "c_fc", "out_proj"), 16).train()
    model.head.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verify_module(model, IMAGE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.encoder.training and not model.head.training
    assert all(p.grad is None for p in model.parameters())
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates and set(rates) <= {0.1, 0.0} and 0.1 in rates


def test_a_frozen_model_is_refused():
    with pytest.raises(UsageError, match="nothing in this Linear requires a gradient"):
        verify_module(nn.Linear(2, 2).requires_grad_(False), torch.randn(1, 2))


@pytest.mark.parametrize(
    ("family", "name", "roles"),
    [
        ("timm_vit", "proj", "attn.out and patch_embed"),
        ("open_clip", "out_proj", "attn.out"),
        ("monai_swin_unetr", "linear1", "mlp.in"),
    ],
)
def test_a_suffix_is_no_role_and_is_answered_with_the_roles(family, name, roles):
    with pytest.raises(LookupError, match=f"modules named '{name}' are {roles} here"):
        find_sites(HOSTS[family]().model, name)


def test_pointwise_are_the_weights_outside_blocks_that_have_no_role():
    paths = {s.path for s in find_sites(HOSTS["monai_swin_unetr"]().model, "pointwise")}
    assert "swinViT.layers1.0.downsample.reduction" in paths
    assert any(p.startswith("encoder") and p.endswith("conv3.conv") for p in paths)
    assert not any(".blocks." in p or p.startswith(("out.", "swinViT.patch_embed")) for p in paths)
