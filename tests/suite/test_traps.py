"""The traps of hosting adapters, one test each: what went wrong silently elsewhere is held here."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptsuite import attach, get_handle
from adaptsuite.bank import Context, base_state
from adaptsuite.errors import UsageError
from adaptsuite.testing import HOSTS


def stir(handle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def gradients(handle, host):
    for p in handle.trained().values():
        p.grad = None
    out = host.forward(handle.model)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {k: p.grad.clone() for k, p in handle.trained().items() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for k in expected:
        torch.testing.assert_close(found[k], expected[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["timm_vit", "timm_swin"])
@pytest.mark.parametrize("method", ["lora", "film", "audio.soft_moa"])
def test_reentrant_checkpointing_with_a_frozen_input_trains(family, method, monkeypatch):
    host = HOSTS[family]()
    handle = attach(host.model, method)
    stir(handle)
    handle.model.train()
    expected = gradients(handle, host)
    import timm.models._manipulate as manipulate

    monkeypatch.setattr(manipulate, "use_reentrant_ckpt", lambda: True, raising=False)
    host.model.set_grad_checkpointing(True)
    assert_same(gradients(handle, host), expected)


@pytest.mark.parametrize("family", ["timm_eva", "hf_ast", "hf_gpt2", "hf_bert"])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit"])
def test_checkpointing_gives_the_same_gradients(family, method):
    host = HOSTS[family]()
    handle = attach(host.model, method)
    stir(handle)
    handle.model.train()
    expected = gradients(handle, host)
    enable = getattr(host.model, "gradient_checkpointing_enable", None)
    enable() if enable else host.model.set_grad_checkpointing(True)
    handle.model.train()
    calls = []
    block = host.model.get_submodule(handle.sites[0].path)
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(handle, host)
    assert len(calls) >= (2 if handle.bank.is_called(handle.sites[0].path) else 0), "nothing was recomputed"
    assert_same(found, expected)


def test_attaching_after_compile_is_seen():
    host = HOSTS["timm_vit"]()
    model = host.model.requires_grad_(False)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(*host.args).clone()
        handle = attach(model, "lora")
        stir(handle)
        adapted = compiled(*host.args).clone()
        assert not torch.allclose(adapted, plain)
        handle.detach()
        torch.testing.assert_close(compiled(*host.args), plain)


@pytest.mark.parametrize("family", ["timm_vit", "timm_eva"])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "film", "audio.soft_moa"])
def test_an_adapted_model_compiles_as_one_graph(family, method):
    host = HOSTS[family]()
    handle = attach(host.model, method)
    stir(handle)
    torch._dynamo.reset()
    compiled = torch.compile(host.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*host.args), host.forward(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_padding_mask_in_eval_does_not_pass_adapters_by(method):
    """nn.TransformerEncoder turns to nested tensors in eval with a padding mask, and reads weights past every hook."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 3:] = True
    sites = {"sites": ("attn.q", "attn.v", "mlp.in")} if method == "lora" else {}
    handle = attach(model, method, sample=(x,), **sites)
    stir(handle)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
    slow = model(x, src_key_padding_mask=mask)
    with handle.disabled(), torch.no_grad():
        plain = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fast[~mask], slow[~mask], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fast[~mask], plain[~mask])
    handle.detach()
    assert model.use_nested_tensor


def test_a_plain_checkpoint_loads_strictly_on_an_adapted_host():
    host, other = HOSTS["timm_vit"](), HOSTS["timm_vit"]()
    plain = {k: v + 1 for k, v in other.model.state_dict().items()}
    attach(host.model, "lora")
    host.model.load_state_dict(plain)
    assert all(torch.equal(v, plain[k]) for k, v in base_state(host.model).items())
    del plain["patch_embed.proj.weight"]
    with pytest.raises(RuntimeError, match="patch_embed"):
        host.model.load_state_dict(plain)


def test_saving_the_base_of_a_transformers_host_leaks_no_adapter(tmp_path):
    from safetensors.torch import load_file

    host = HOSTS["hf_ast"]()
    host.model.save_pretrained(tmp_path / "plain")
    attach(host.model, "lora")
    host.model.save_pretrained(tmp_path / "adapted", state_dict=base_state(host.model))
    plain, adapted = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "adapted"))
    assert adapted.keys() == plain.keys() and all(torch.equal(v, plain[k]) for k, v in adapted.items())


def test_merging_into_a_tied_weight_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = HOSTS["hf_gpt2"]().model
            attention = self.inner.get_submodule("h.0.attn") if hasattr(self.inner, "h") else None
            attention = attention or self.inner.get_submodule("transformer.h.0.attn")
            self.twin = nn.Module()
            self.twin.weight = attention.c_attn.weight

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    tiny = HOSTS["hf_gpt2"]()
    model = Tied()
    handle = attach(model, "lora", sample=(tiny.args, tiny.kwargs), sites="attn.q")
    with pytest.raises(UsageError, match="tied"):
        handle.merge()


def test_frozen_parts_stay_in_eval_under_train():
    from transformers import ASTConfig, ASTModel

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_length=32,
        num_mel_bins=32,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.5,
    )
    model = ASTModel(config)
    handle = attach(model, "lora")
    stir(handle)
    x = torch.randn(2, 32, 32)
    model.train()
    first = model(x).last_hidden_state
    assert torch.equal(model(x).last_hidden_state, first), "dropout of the frozen base is on"
    assert all(b.training for b in handle.adapter.branches.values())
    model.eval()
    assert torch.equal(model(x).last_hidden_state, first)
    handle.detach()
    model.train()
    assert not torch.equal(model(x).last_hidden_state, model(x).last_hidden_state)


def test_a_wrapper_reaches_the_frozen_train_mode():
    host = HOSTS["timm_vit"]()
    attach(host.model, "lora")
    nn.Sequential(host.model).train()
    assert not host.model.blocks[0].training


def test_dropout_of_lora_is_refused_where_a_weight_is_read_without_a_call():
    with pytest.raises(UsageError, match="without calling"):
        attach(HOSTS["timm_eva"]().model, "lora", dropout=0.1)


def test_a_bottleneck_on_a_weight_that_is_never_called_is_refused():
    with pytest.raises(UsageError, match="without calling"):
        attach(HOSTS["open_clip"]().model, "bottleneck", sites=("attn.out",))


def test_parameters_of_a_shadowed_host_are_untouched_by_an_exception():
    host = HOSTS["timm_eva"]()
    handle = attach(host.model, "lora")
    stir(handle)
    block = host.model.blocks[0].attn
    hook = host.model.blocks[0].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    inner = block.proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        host.forward()
    assert "weight" not in vars(block.qkv) and "weight" in block.qkv._parameters
    hook.remove()
    inner.remove()


def test_context_of_a_forward_is_there_in_its_backward():
    """Two forwards before one backward: recomputation must see each forward's own context."""

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    from adaptsuite.bank import get_bank

    block = HOSTS["timm_vit"]().model.blocks[0]
    dim = block.norm1.weight.shape[0]
    layer_input = torch.randn(2, 6, dim)
    masks = [torch.arange(6).expand(2, 6) < n for n in (3, 5)]

    def run(wrap):
        model = wrap(copy.deepcopy(block))
        torch.manual_seed(0)
        handle = attach(model, "audio.soft_moa", sample=layer_input)
        stir(handle)
        total = 0.0
        for mask in masks:
            with handle.using(token_mask=mask):
                total = total + (model(layer_input) ** 2).sum()
        assert get_bank(model).context.token_mask is None
        total.backward()
        assert get_bank(model).context.token_mask is None, "the context of a backward must not outlive it"
        return [p.grad for p in handle.trained().values()]

    class Plain(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    for a, b in zip(run(Checkpointed), run(Plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_context_is_replaced_never_changed():
    with pytest.raises(AttributeError):
        Context().token_mask = torch.ones(1)


@pytest.mark.slow
def test_two_processes_train_with_an_inactive_adapter(tmp_path):
    """DDP raises for parameters without a gradient: activate() must freeze the inactive adapter."""
    script = tmp_path / "two.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from adaptsuite import attach, get_handle\n"
        "from adaptsuite.testing import HOSTS\n"
        "dist.init_process_group('gloo')\n"
        "host = HOSTS['timm_vit']()\n"
        "attach(host.model, 'lora', 'a'); b = attach(host.model, 'lora', 'b')\n"
        "model = torch.nn.parallel.DistributedDataParallel(host.model)\n"
        "optimizer = torch.optim.SGD(b.trained().values(), lr=.1)\n"
        "for _ in range(2):\n"
        "    optimizer.zero_grad(); host.forward(model).square().sum().backward(); optimizer.step()\n"
        "print('rank', dist.get_rank(), 'ok')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.stdout.count("ok") == 2, done.stderr[-2000:]


def test_handles_survive_being_found_by_name():
    host = HOSTS["timm_vit"]()
    attach(host.model, "lora", "bird")
    assert get_handle(host.model, "bird").method.name == "lora"
