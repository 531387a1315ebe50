"""Prompts and prefixes: what tokens meet in a block, under masks, rotary positions and causality."""

import math

import pytest
import torch
import torch.nn.functional as F

from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.prefix import Prefixed
from adaptsuite.testing import HOSTS


@pytest.fixture
def ast():
    return HOSTS["hf_ast"]()


def by_hand(host, tables, deep, replace_dist=False):
    """AST's forward with prompts put in and taken out in plain sight."""
    model = host.model.audio_spectrogram_transformer
    h = model.embeddings(host.kwargs["input_values"])
    after = 2 if replace_dist else 1
    prompts = None
    for i, layer in enumerate(model.layers):
        own = tables[i if deep else 0].expand(len(h), -1, -1)
        if deep or prompts is None:
            rest = h[:, after:] if deep or prompts is None else h
            long = torch.cat([h[:, :1], own, rest], 1)
        long = layer(long)
        prompts = long[:, 1 : 1 + own.shape[1]]
        if deep or i == len(model.layers) - 1:
            dist = [prompts.mean(1, keepdim=True)] if replace_dist else []
            h = torch.cat([long[:, :1], *dist, long[:, 1 + own.shape[1] :]], 1)
    tokens = model.layernorm(h)
    return host.model.classifier((tokens[:, 0] + tokens[:, 1]) / 2)


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("replace_dist", [False, True])
def test_prompts_stand_behind_cls_and_leave_where_they_end(ast, deep, replace_dist):
    twin = HOSTS["hf_ast"]()
    handle = attach(ast.model, "prompt", tokens=3, deep=deep, replace_dist=replace_dist)
    tables = [p.detach() for p in handle.adapter.shared.tables.values()]
    assert len(tables) == (2 if deep else 1)
    with torch.no_grad():
        torch.testing.assert_close(ast.forward(), by_hand(twin, tables, deep, replace_dist), rtol=1e-5, atol=1e-6)


def test_deep_prompts_start_anew_in_every_block(ast):
    """Blocks of a deep-prompted host give as many tokens as they got."""
    shapes = []
    handle = attach(ast.model, "prompt", tokens=4)
    for layer in handle.model.audio_spectrogram_transformer.layers:
        layer.register_forward_hook(lambda m, a, out: shapes.append(out.shape[1]))
    ast.forward()
    patches = ast.model.audio_spectrogram_transformer.embeddings.position_embeddings.shape[1]
    assert shapes == [patches, patches]


def test_vpt_is_a_prompt_with_its_authors_settings():
    """Own prompts for each block, of which a tenth of the values is dropped, for each sample anew, in training."""
    host, twin = HOSTS["timm_vit"](), HOSTS["timm_vit"]()
    torch.manual_seed(0)
    handle = attach(host.model, "vpt", tokens=40)
    assert [tuple(t.shape) for t in handle.adapter.shared.tables.values()] == [(40, 32)] * 2
    seen = []
    host.model.blocks[1].norm1.register_forward_hook(lambda m, args, out: seen.append(args[0][:, 1:41]))
    table = handle.adapter.shared.tables["blocks/1"].detach()
    for training in (False, True):
        host.model.train(training)
        host.forward()
    assert torch.equal(seen[0], table.expand(2, -1, -1))
    kept = seen[1] != 0
    torch.testing.assert_close(seen[1][kept], (table / 0.9).expand(2, -1, -1)[kept])
    assert 0.05 < 1 - float(kept.float().mean()) < 0.15 and not torch.equal(kept[0], kept[1])
    attach(twin.model, "prompt", tokens=40).load_state(handle.state())
    host.model.eval()
    with torch.no_grad():
        assert torch.equal(host.forward(), twin.forward())


def test_vpt_shallow_has_one_set_of_prompts():
    handle = attach(HOSTS["timm_vit"]().model, "vpt", tokens=3, deep=False, dropout=0.0)
    assert handle.parameters_count()["trained"] == 3 * 32


def padded(host):
    """A batch whose second row is half padding, and that row alone."""
    ids = host.kwargs["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] // 2 :] = 0
    both = host.model(input_ids=ids, attention_mask=mask).last_hidden_state
    half = ids.shape[1] // 2
    alone = host.model(input_ids=ids[1:, :half]).last_hidden_state
    return both[1:, :half], alone


@pytest.mark.parametrize(("method", "settings"), [("prompt", {}), ("prompt", {"deep": False}), ("prefix", {})])
def test_padding_stays_unseen(method, settings):
    host = HOSTS["hf_bert"]()
    handle = attach(host.model, method, tokens=3, **settings)
    with torch.no_grad():
        for p in handle.trained().values():
            p.normal_()
        found, alone = padded(host)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
        with handle.disabled():
            plain, _ = padded(host)
    assert (plain - found).abs().max() > 1e-3


@pytest.mark.parametrize(("method", "settings"), [("prompt", {}), ("prompt", {"deep": False}), ("prefix", {})])
@pytest.mark.parametrize("family", ["hf_gpt2", "hf_clip"])
def test_what_comes_later_stays_unseen_by_causal_models(family, method, settings):
    host = HOSTS[family]()
    model = host.model if family == "hf_gpt2" else host.model.text_model
    sample = {"input_ids": torch.arange(1, 9)[None].repeat(2, 1)}
    handle = attach(model, method, tokens=3, sample=sample, **settings)
    with torch.no_grad():
        for p in handle.trained().values():
            p.normal_()
        ids = sample["input_ids"]
        other = ids.clone()
        other[:, -1] = 42
        a, b = (model(input_ids=i, output_hidden_states=True).hidden_states[-1][:, :-1] for i in (ids, other))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_prefix_attention_equals_its_formula_in_plain_loops():
    """softmax(q [P_k; K]^T / sqrt(d)) [P_v; V] of each head and token, in float64."""
    torch.manual_seed(0)
    heads, width, length, more = 2, 3, 4, 2
    q, k, v = (torch.randn(1, heads, length, width, dtype=torch.float64) for _ in range(3))
    pk, pv = (torch.randn(more, heads * width, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, True, True, False]])  # the last key is padding; a prefix never is
    with Prefixed(pk, pv):
        found = F.scaled_dot_product_attention(q, k, v, mask)
    for h in range(heads):
        keys = [pk[i, h * width : (h + 1) * width] for i in range(more)] + [k[0, h, t] for t in range(length - 1)]
        values = [pv[i, h * width : (h + 1) * width] for i in range(more)] + [v[0, h, t] for t in range(length - 1)]
        for t in range(length):
            logits = [float((q[0, h, t] * key).sum()) / math.sqrt(width) for key in keys]
            weights = [math.exp(x) for x in logits]
            expected = sum(w / sum(weights) * x for w, x in zip(weights, values, strict=True))
            torch.testing.assert_close(found[0, h, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_prefix_in_multihead_attention_equals_torch_s_own_extra_key(masked):
    """nn.MultiheadAttention(add_bias_kv=True) appends one learned key and value: a prefix of one token."""
    torch.manual_seed(0)
    own = torch.nn.MultiheadAttention(8, 2, add_bias_kv=True).eval()
    plain = torch.nn.MultiheadAttention(8, 2).eval()
    plain.load_state_dict({n: p for n, p in own.state_dict().items() if n not in ("bias_k", "bias_v")})
    x = torch.randn(5, 3, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if masked else None
    causal = torch.ones(5, 5).triu(1).bool() if masked else None
    options = {"key_padding_mask": padding, "attn_mask": causal}
    mode = Prefixed(own.bias_k[0], own.bias_v[0])
    with mode:
        found, _ = plain(x, x, x, **options)
    torch.testing.assert_close(found, own(x, x, x, **options)[0], rtol=1e-5, atol=1e-6)
    assert mode.calls == 1


def test_a_prefix_leaves_no_trace_when_a_forward_fails(ast):
    attach(ast.model, "prefix", tokens=2)
    before = ast.forward()

    def fail(module, args):
        raise RuntimeError("in the middle of a block")

    hook = ast.model.audio_spectrogram_transformer.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        ast.forward()
    hook.remove()
    q = torch.randn(1, 2, 4, 8)
    assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert torch.equal(ast.forward(), before)


def test_rotary_attention_does_not_turn_prompts():
    """A prompt in a rotary host is a prefix token: moving it among the prompts changes nothing."""
    host = HOSTS["timm_eva"]()
    handle = attach(host.model, "prompt", sample=(host.args, host.kwargs), tokens=3)
    with torch.no_grad():
        before = host.forward()
        for p in handle.trained().values():
            p.copy_(p.flip(0))
        torch.testing.assert_close(host.forward(), before, rtol=1e-5, atol=1e-5)
    assert all(b.attn.num_prefix_tokens == host.model.num_prefix_tokens for b in host.model.blocks)


def test_eager_attention_is_refused_with_what_to_do():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    config._attn_implementation = "eager"
    model = ViTModel(config)
    with pytest.raises(UsageError, match="attn_implementation='sdpa'"):
        attach(model, "prefix")
    assert not hasattr(model, "adapter_bank")  # as it was


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("prompt", {"tokens": 0}, "tokens is 0"),
        ("prompt", {"sites": "attn"}, "prompts enter whole blocks"),
        ("prefix", {"sites": "attn"}, "whole blocks"),
        ("vpt", {"tokens": 0}, "vpt: tokens is 0, it must be at least 1"),
        ("vpt", {"dropout": 1.0}, "vpt: dropout is 1.0"),
        ("vpt", {"sites": "attn"}, "vpt: prompts enter whole blocks"),
        ("prompt", {"replace_dist": True}, "needs a DIST token"),
    ],
)
def test_settings_that_cannot_be_are_refused(method, settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["timm_vit"]().model, method, **settings)
