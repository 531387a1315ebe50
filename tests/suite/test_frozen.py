"""A forward that starts at the cut says and learns exactly what a whole one does, or the cut is refused."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from adaptsuite import attach
from adaptsuite.frozen import NoPrefix, find_cut, first_trained
from adaptsuite.testing import HOSTS

REFUSED = {  # last_k=1
    "hf_wavlm": "more of the frozen part",  # position bias of the first block
    "monai_swin_unetr": "more of the frozen part",  # the decoder reads every stage
    "nn_encoder": "does not get one row a sample",  # (T, B, D)
}
FAST = ("timm_vit", "timm_swin", "timm_eva", "hf_ast", "hf_roberta", "hf_wavlm", "nn_encoder")


def batches_of(host):
    """Two and three samples of the host's own inputs, the float ones moved."""
    torch.manual_seed(1)

    def rows(value, first, last):
        if not isinstance(value, torch.Tensor):
            return value
        some = torch.cat([value, value.flip(0)])[first:last]
        return some + 0.1 * torch.randn_like(some) if value.is_floating_point() else some

    inputs = (host.args, host.kwargs)
    return [tree_map(lambda v: rows(v, 0, 2), inputs), tree_map(lambda v: rows(v, 1, 4), inputs)]


def says(host):
    return lambda model, batch: host.read(model(*batch[0], **batch[1]))


def learnt(host, method, **settings):
    handle = attach(host.model, method, sample=(host.args, host.kwargs), **settings)
    batches = batches_of(host)
    with torch.no_grad():
        cut = find_cut(handle, says(host), batches[0])
        return handle, batches, cut, cut.learn(says(host), batches)


def names():
    slow = pytest.mark.slow
    return [name if name in FAST else pytest.param(name, marks=slow) for name in HOSTS if name != "conformer"]


@pytest.mark.parametrize("name", names())
def test_last_blocks_learn_the_same_from_the_cut_and_the_others_are_not_run(name):
    host = HOSTS[name]()
    if name in REFUSED:
        with pytest.raises(NoPrefix, match=REFUSED[name]):
            learnt(host, "lora", last_k=1)
        return
    handle, batches, cut, entered = learnt(host, "lora", last_k=1)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn_like(p), alpha=0.1)
    parameters, calls = list(handle.trained().values()), []
    for name, module in host.model.named_modules():
        if name in cut.ended:
            for inner in module.children():
                inner.register_forward_hook(lambda *_: calls.append(1))
    for batch, x in zip(batches, entered, strict=True):
        whole = says(host)(host.model, batch)
        expected = torch.autograd.grad(whole.float().square().mean(), parameters)
        assert calls
        calls.clear()
        with cut.entering(x):
            found = says(host)(host.model, batch)
        gradients = torch.autograd.grad(found.float().square().mean(), parameters)
        assert torch.equal(found, whole) and not calls
        assert all(map(torch.equal, gradients, expected))
    assert torch.equal(says(host)(host.model, batches[0]), says(host)(host.model, batches[0]))  # it is whole again


@pytest.mark.parametrize("name", ["timm_vit", "timm_siglip", "hf_ast", "hf_vit"])
def test_a_head_is_given_any_number_of_samples(name):
    host = HOSTS[name]()
    _, batches, cut, entered = learnt(host, "linear")
    with torch.no_grad(), cut.entering(torch.cat([*entered, *entered])):
        many = says(host)(host.model, tree_map(lambda v: torch.cat([v] * 5), batches[0]))
    whole = torch.cat([says(host)(host.model, batch) for batch in batches])
    torch.testing.assert_close(many, torch.cat([whole, whole]))


def test_nothing_can_be_kept_where_the_first_block_or_everything_trains():
    for method, settings in (("lora", {}), ("bitfit", {"sites": ("attn.qkv",)}), ("vpt", {"tokens": 2})):
        with pytest.raises(NoPrefix, match="no block lies before|as a whole"):
            learnt(HOSTS["timm_vit"](), method, **settings)
    with pytest.raises(NoPrefix, match="everything trains"):
        learnt(HOSTS["timm_vit"](), "full")


def test_another_adapter_that_acts_is_no_part_of_the_base():
    host = HOSTS["timm_vit"]()
    attach(host.model, "lora", "a", last_k=1)
    b = attach(host.model, "linear", "b")
    b.activate("a", "b")
    with pytest.raises(NoPrefix, match="act, not 'b' alone"):
        first_trained(b)


def test_checkpointing_is_refused():
    host = HOSTS["timm_vit"]()
    host.model.set_grad_checkpointing()
    with pytest.raises(NoPrefix, match="checkpointing"):
        learnt(host, "linear")


class Skips(nn.Module):
    """A head that reads the last block, and outside of it a part of the first."""

    def __init__(self, share):
        super().__init__()
        self.vit, self.head, self.share = HOSTS["timm_vit"]().model, nn.Linear(32, 3), share
        self.seen = []
        self.vit.blocks[0].register_forward_hook(lambda _, __, out: self.seen.append(out))

    def forward(self, image):
        self.seen.clear()
        x = self.vit.forward_features(image)[:, 0]
        return self.head(x) + self.share * self.seen[0][:, 0, :3]


def test_a_path_around_the_cut_is_seen():
    batches = [torch.randn(n, 3, 32, 32) for n in (2, 3)]
    handle = attach(Skips(1e-3), "linear", head="head", sample=batches[0])
    with torch.no_grad():
        cut = find_cut(handle, nn.Module.__call__, batches[0])
        with pytest.raises(NoPrefix, match="reaches the output"):
            cut.learn(nn.Module.__call__, batches)


def test_a_host_is_left_as_it_was_when_a_forward_fails_at_the_cut():
    host = HOSTS["timm_vit"]()
    _, batches, cut, entered = learnt(host, "linear")
    hooks = len(host.model.head._forward_pre_hooks)
    with pytest.raises(RuntimeError), cut.entering(entered[0][:, :3]):
        says(host)(host.model, batches[0])
    assert not any("forward" in module.__dict__ for module in host.model.modules())
    assert len(host.model.head._forward_pre_hooks) == hooks
