"""Attach, switch, merge, detach: what a user sees of a host."""

import copy

import pytest
import torch
from torch import nn

from adaptsuite import attach, find_sites, get_handle, verify
from adaptsuite.bank import BANK, base_state
from adaptsuite.errors import UsageError
from adaptsuite.testing import HOSTS


def stir(handle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


class Headed(nn.Module):
    """A task model around a backbone, as pipelines build them; the head has batch statistics."""

    def __init__(self, host):
        super().__init__()
        self.backbone = host.model
        width = host.forward().shape[-1]
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 3))
        self.read = host.read

    def forward(self, *args, **kwargs):
        out = self.read(self.backbone(*args, **kwargs))
        return self.head(out.flatten(1, -2).mean(1) if out.ndim > 2 else out)


@pytest.fixture
def host():
    return HOSTS["timm_vit"]()


def test_two_adapters_are_switched_stacked_and_disabled(host):
    plain = host.forward()
    a = attach(host.model, "lora", "a")
    stir(a)
    only_a = host.forward()
    b = attach(host.model, "bottleneck", "b")
    stir(b)
    only_b = host.forward()
    a.activate("a", "b")
    both = host.forward()
    a.activate()
    assert torch.equal(host.forward(), only_a)
    assert not torch.allclose(both, only_a) and not torch.allclose(both, only_b)
    with a.disabled():
        torch.testing.assert_close(host.forward(), plain)
    assert torch.equal(host.forward(), only_a)


def test_inactive_adapters_are_frozen(host):
    a, b = attach(host.model, "lora", "a"), attach(host.model, "lora", "b")
    assert not any(p.requires_grad for p in a.trained().values())
    assert all(p.requires_grad for p in b.trained().values())


def test_detach_of_one_leaves_the_other(host):
    a, b = attach(host.model, "lora", "a"), attach(host.model, "lora", "b")
    stir(a)
    a.activate()
    expected = host.forward()
    b.detach()
    assert torch.equal(host.forward(), expected)
    a.detach()
    assert not hasattr(host.model, BANK) and "train" not in vars(host.model)


def test_full_refuses_company(host):
    attach(host.model, "lora", "a")
    with pytest.raises(UsageError, match="cannot share"):
        attach(host.model, "full", "b")


def test_disabled_full_is_the_backbone_again(host):
    plain = host.forward()
    handle = attach(host.model, "full")
    stir(handle)
    trained = host.forward()
    with handle.disabled():
        torch.testing.assert_close(host.forward(), plain)
    assert torch.equal(host.forward(), trained)


def test_the_head_is_trained_saved_and_counted_apart():
    tiny = HOSTS["timm_vit"]()
    model = Headed(tiny).eval()
    handle = attach(model, "linear", sample=(tiny.args, tiny.kwargs), head="head", train_norms=True)
    counts = handle.parameters_count()
    width = model.head[0].num_features
    assert counts["trained"] - counts["trained_without_head"] == 2 * width + 3 * width + 3
    assert counts["trained_without_head"] == 2 * tiny.model.num_features  # the final norm
    assert {g["name"] for g in handle.trainable()} == {"norm", "head"}
    model.train()
    before = handle.state()["moved.head/0/running_mean"].clone()
    model(*tiny.args)
    assert not torch.equal(handle.state()["moved.head/0/running_mean"], before), "statistics of the head must move"
    assert not model.head[0].running_mean.any(), "the base's own statistics must not"
    model.eval()
    assert verify(handle, (tiny.args, tiny.kwargs)).ok


def test_linear_without_a_head_says_so():
    with pytest.raises(LookupError, match="head"):
        attach(HOSTS["hf_bert"]().model, "linear")


def test_last_k_adapts_the_last_blocks_only(host):
    depth = 1 + max(s.block for s in find_sites(host.model, "attn.q"))
    handle = attach(host.model, "lora", last_k=1)
    assert {s.block for s in handle.sites} == {depth - 1}
    with pytest.raises(UsageError, match="last_k"):
        attach(HOSTS["timm_vit"]().model, "lora", last_k=depth + 1)


def test_no_gradient_flows_below_the_first_adapted_block(host):
    seen = []
    attach(host.model, "lora", last_k=1)
    host.model.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out.requires_grad))
    host.forward()
    assert seen == [False]


def test_verify_finds_a_dead_adapter():
    class Blocked(nn.Module):
        """An encoder under no_grad, as published code runs it."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            with torch.no_grad():
                return self.inner(*args)

    tiny = HOSTS["timm_vit"]()
    handle = attach(Blocked(tiny.model), "lora", sample=tiny.args)
    found = verify(handle, tiny.args)
    assert not found.ok and "no gradient at all" in found.problems[0]


def test_verify_finds_a_site_off_the_path_to_the_output():
    class HalfRead(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner.patch_embed(x) + 0 * self.inner(x).sum()

    tiny = HOSTS["timm_vit"]()
    found = verify(attach(HalfRead(tiny.model), "lora", sample=tiny.args), tiny.args)
    assert not found.ok


def test_verify_leaves_everything_as_it_was(host):
    handle = attach(host.model, "bottleneck")
    stir(handle)
    state, before = {k: v.clone() for k, v in host.model.state_dict().items()}, host.forward()
    assert verify(handle, host.args).ok
    assert all(torch.equal(v, state[k]) for k, v in host.model.state_dict().items())
    assert torch.equal(host.forward(), before)
    assert all(p.grad is None for p in host.model.parameters())


def test_merged_model_runs_without_a_branch_and_bake_leaves_no_trace(host):
    handle = attach(host.model, "lora", sites=("attn.q", "attn.v", "mlp.in"))
    stir(handle)
    expected = host.forward()
    keys = base_state(host.model).keys()
    model = handle.bake()
    torch.testing.assert_close(host.forward(model), expected, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fifty_merge_cycles_do_not_drift_in_half_precision():
    """Subtracting instead of keeping a copy drifts by 1e-2 in bfloat16."""
    host = HOSTS["timm_vit"]()
    handle = attach(host.model.to(torch.bfloat16), "lora")
    stir(handle)
    before = {k: v.clone() for k, v in base_state(host.model).items()}
    for _ in range(50):
        handle.merge()
        handle.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in base_state(host.model).items())


def test_report_counts_every_value_once_per_component():
    tiny = HOSTS["hf_clip"]()
    handle = attach(tiny.model, "lora", sample=(tiny.args, tiny.kwargs))
    rows = handle.report()
    counts = handle.parameters_count()
    assert sum(r["trained"] for r in rows) == counts["trained"]
    assert sum(r["trained"] + r["frozen"] for r in rows) == counts["total"]
    assert len([r for r in rows if r["trained"]]) == 2  # both towers


def test_state_loads_strictly(host):
    handle = attach(host.model, "lora")
    state = handle.state()
    name = next(iter(state))
    with pytest.raises(ValueError, match="missing"):
        handle.load_state({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="unexpected"):
        handle.load_state({**state, "other": state[name]})
    with pytest.raises(ValueError, match="expected"):
        handle.load_state({**state, name: state[name][:1]})


def test_a_copy_has_its_own_handle(host):
    handle = attach(host.model, "lora")
    twin = get_handle(copy.deepcopy(host.model))
    stir(twin)
    assert not any(torch.equal(a, b) for a, b in zip(handle.trained().values(), twin.trained().values(), strict=True))
    with pytest.raises(LookupError, match="default"):
        get_handle(host.model, "defualt")


@pytest.mark.parametrize("name", ["", "a.b", "a b"])
def test_an_adapter_name_must_be_an_identifier(host, name):
    with pytest.raises(UsageError, match="not an identifier"):
        attach(host.model, "lora", name)


def test_a_failed_attach_leaves_no_trace(host):
    with pytest.raises(LookupError):
        attach(host.model, "lora", sites=("attn.nowhere",))
    with pytest.raises(UsageError):
        attach(host.model, "lora", sites=("block",))
    assert not hasattr(host.model, BANK)
    assert all(p.requires_grad for p in host.model.parameters())
    assert not any(m._forward_hooks for m in host.model.modules())
