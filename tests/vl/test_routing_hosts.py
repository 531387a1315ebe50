"""Routed adapters on models that know nothing of images: the contract, and parity under what a model is run with."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptsuite import attach, find_sites, get_handle
from adaptsuite.errors import UsageError
from adaptsuite.packed import attend
from adaptsuite.testing import HOSTS, TinyHost
from adaptsuite.verify import contract
from adaptsuite.vl.context import Conditioned

LORA = {"rank": 4, "alpha": 4.0}
METHODS = [("vl.routed_lora", LORA), ("vl.routed_bottleneck", {"bottleneck": 4})]


def stir(handle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)
    return handle


def images(*shape, seed=5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conditioned(family, width):
    """The family's host with three image tokens for each sample as one more argument."""

    def make():
        host = HOSTS[family]()
        kwargs = {**host.kwargs, "features": images(2, 3, width)}
        return TinyHost(host.name, Conditioned(host.model).eval(), host.args, kwargs, host.read)

    return make


# ---- the contract

QUICK = ("hf_bert", "hf_gpt2", "open_clip")
# these read the weight of q and v by a function of their own, where no branch can stand that depends on the sample
CLOSED = {"timm_eva", "timm_beit", "timm_swinv2", "hf_wavlm"}


def cases():
    for family in HOSTS:
        for method, settings in METHODS:
            quick = family in QUICK
            yield pytest.param(
                family, method, settings, marks=() if quick else pytest.mark.slow, id=f"{family}-{method}"
            )


@pytest.mark.parametrize(("family", "method", "settings"), list(cases()))
def test_routed_methods_keep_their_promises(family, method, settings):
    width = 24
    build = conditioned(family, width)
    settings = {**settings, "context_dim": width}
    if method == "vl.routed_lora" and family in CLOSED:
        with pytest.raises(UsageError, match="without calling"):
            contract(build, method, **settings)
        return
    assert all(contract(build, method, **settings).values())


VARIANTS = [
    {"routing": "add"},
    {"routing": "mul", "dropout": 0.1},
    {"routing": "gate", "reading": "attended"},
    {"routing": "xvv", "reading": "tokens"},
    {"routing": "xvv_relu", "reading": "tokens"},
    {"routing": "routing_xt"},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: s["routing"])
@pytest.mark.parametrize(("method", "more"), METHODS)
def test_settings_keep_the_promises_too(method, more, settings):
    contract(conditioned("hf_bert", 32), method, **more, **settings)


# ---- generation


def gpt2(method="vl.routed_lora", **settings):
    host = HOSTS["hf_gpt2"]()
    more = LORA if method == "vl.routed_lora" else {"bottleneck": 4}
    return stir(attach(host.model, method, **{**more, **settings})), host


def generate(handle, ids, v, **options):
    with handle.using(features=v), torch.no_grad():
        return handle.model.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=98, eos_token_id=None, **options
        )


@pytest.mark.parametrize(("method", "settings"), METHODS)
@pytest.mark.parametrize("reading", ["pooled", "attended", "tokens"])
def test_with_a_cache_the_words_are_those_without(method, settings, reading):
    routing = "xvv" if reading == "tokens" else "mul_expand"
    handle, host = gpt2(method, routing=routing, reading=reading)
    ids, v = host.kwargs["input_ids"], images(2, 3, 32) * 3
    with_cache, without = (generate(handle, ids, v, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, generate(handle, ids, v.flip(0), use_cache=True)), "the image does not act"
    with handle.using(features=v), torch.no_grad():
        full = handle.model(input_ids=ids).logits
        first = handle.model(input_ids=ids[:, :4], use_cache=True)
        rest = handle.model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_of_a_batch_are_those_of_each_sample_alone(use_cache):
    handle, host = gpt2()
    ids, v = host.kwargs["input_ids"], images(2, 32) * 3
    together = generate(handle, ids, v, num_beams=3, use_cache=use_cache)
    for i in range(2):
        alone = generate(handle, ids[i : i + 1], v[i : i + 1], num_beams=3, use_cache=use_cache)
        assert torch.equal(together[i], alone[0])
    assert not torch.equal(together[:, 7:], generate(handle, ids, v.flip(0), num_beams=3)[:, 7:])


def encoder_decoder(name):
    torch.manual_seed(0)
    if name == "bart":
        from transformers import BartConfig, BartForConditionalGeneration

        layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SHAPE.items()}
        ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None)
        model = BartForConditionalGeneration(
            BartConfig(d_model=32, vocab_size=99, max_position_embeddings=32, **layers, **ids)
        )
    else:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=99, decoder_start_token_id=0
        )
        model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02 if p.ndim < 2 else 0.1)
    ids = torch.randint(4, 90, (2, 6))
    return model.eval(), {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


SHAPE = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_cross_attention_is_routed_and_beams_agree(name):
    model, inputs = encoder_decoder(name)
    sites = ("attn.q", "attn.v", "cross.q", "cross.v")
    handle = stir(attach(model, "vl.routed_lora", sites=sites, **LORA))
    assert len(handle.adapter.branches) == 4 * 2 + 2 * 2
    ids, v = inputs["input_ids"], images(2, 32) * 3
    together = generate(handle, ids, v, num_beams=3)
    for i in range(2):
        alone = generate(handle, ids[i : i + 1], v[i : i + 1], num_beams=3)
        assert torch.equal(together[i], alone[0])
    assert torch.equal(generate(handle, ids, v), generate(handle, ids, v, use_cache=False))


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("vl.routed_lora", {**LORA, "sites": ("cross.q", "cross.v")}),
     ("vl.routed_bottleneck", {"bottleneck": 4, "sites": ("cross",)})],
)  # fmt: skip
def test_cross_attention_keeps_the_contract(name, method, settings):
    def build():
        model, inputs = encoder_decoder(name)
        kwargs = {**inputs, "features": images(2, 3, 32)}
        return TinyHost(name, Conditioned(model).eval(), (), kwargs, lambda out: out.logits)

    contract(build, method, **settings)


# ---- checkpointing


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, *args, **kwargs):
        return checkpoint(lambda *a: self.inner(*a, **kwargs), *args, use_reentrant=self.reentrant)


def gradients(reentrant, between, family="hf_bert"):
    """Of two forwards with two images before one backward; reentrant None: without checkpointing."""
    host = HOSTS[family]()
    torch.manual_seed(0)
    handle = stir(attach(host.model, "vl.routed_lora", context_dim=20, **LORA))
    model = handle.model.train()
    if reentrant is not None:
        for site in find_sites(model, "block"):
            module, forward = model.get_submodule(site.path), model.get_submodule(site.path).forward
            run = lambda *a, f=forward, **k: checkpoint(lambda *b: f(*b, **k), *a, use_reentrant=reentrant)  # noqa: E731
            module.forward = run
        model.gradient_checkpointing = True  # what opens the gradient of frozen embeddings
    losses = []
    for seed in (0, 1):
        with handle.using(features=images(2, 3, 20, seed=seed)):
            losses.append((host.forward() ** 2).sum())
    with handle.using(features=between) if isinstance(between, torch.Tensor) else handle.using():
        if isinstance(between, str):  # as a GPU's backward does
            thread = threading.Thread(target=sum(losses).backward)
            thread.start()
            thread.join()
        else:
            sum(losses).backward()
    assert not handle.bank.recalled
    return {k: p.grad for k, p in handle.trained().items()}


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("between", [None, images(2, 20, seed=9), "thread"], ids=["cleared", "replaced", "thread"])
def test_checkpointed_gradients_are_the_plain_ones(reentrant, between):
    """Also when the context is cleared or replaced before backward runs, in this thread or in another."""
    expected, found = gradients(None, None), gradients(reentrant, between)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["hf_bert", "hf_gpt2"])
def test_transformers_own_checkpointing_gives_the_plain_gradients(family, reentrant):
    found = []
    for checkpointed in (False, True):
        host = HOSTS[family]()
        model = Conditioned(host.model)
        v, calls = images(2, 3, 32), []
        torch.manual_seed(0)
        handle = stir(attach(model, "vl.routed_lora", sample=host.kwargs | {"features": v}, **LORA))
        if checkpointed:
            host.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            inside = model.get_submodule(find_sites(model, "attn.out")[0].path)
            inside.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.train()
        host.read(model(**host.kwargs, features=v)).square().sum().backward()
        assert not checkpointed or len(calls) == 2, "nothing was recomputed"
        found.append({k: p.grad for k, p in handle.trained().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


# ---- compile and export


@pytest.mark.parametrize("family", ["hf_bert", "hf_gpt2", "open_clip"])
@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_compiled_is_eager_and_sees_every_new_image(family, method, settings):
    host = HOSTS[family]()
    handle = stir(attach(host.model, method, **settings))
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(
        host.model, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=family == "open_clip"
    )
    outputs, first = [], 0
    for seed in range(3):
        with handle.using(features=images(2, 3, 32, seed=seed)), torch.no_grad():
            outputs.append(host.forward(compiled).clone())
            torch.testing.assert_close(outputs[-1], host.forward(), rtol=1e-5, atol=1e-5)
        first = len(graphs) if seed == 0 else first
    assert len(graphs) == first, "a new image compiles anew"
    assert not torch.allclose(outputs[0], outputs[1])


@pytest.mark.parametrize("family", ["timm_vit", "nn_encoder"])
def test_conditioned_compiles_as_one_graph(family):
    host = HOSTS[family]()
    width = find_sites(host.model, "attn.v")[0].dim
    model = Conditioned(host.model).eval()
    handle = attach(model, "vl.routed_lora", sample=(host.args, {"features": images(2, width)}), **LORA)
    stir(handle)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in range(2):
        v = images(2, 3, width, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*host.args, features=v), model(*host.args, features=v))
    assert handle.bank.traced is None


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("family", ["timm_vit", "nn_encoder"])
def test_exported_is_eager_with_the_image_as_an_input(family, strict):
    host = HOSTS[family]()
    width = find_sites(host.model, "attn.v")[0].dim
    model = Conditioned(host.model).eval()
    kwargs = {"features": images(2, 3, width)}
    stir(attach(model, "vl.routed_lora", sample=(host.args, kwargs), **LORA))
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {"args": ({0: batch},), "features": {0: batch}, "kwargs": {}, "token_mask": None}
    shapes = {k: v for k, v in shapes.items() if k in ("args", "features")}
    program = torch.export.export(model, host.args, kwargs, dynamic_shapes=shapes, strict=strict)
    x, v = host.args[0].repeat(3, *[1] * (host.args[0].ndim - 1)), images(6, 3, width, seed=8)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x, features=v), model(x, features=v), rtol=1e-5, atol=1e-5)


def test_a_text_model_is_exported_with_the_image_as_an_input():
    host = HOSTS["hf_roberta"]()
    model = Conditioned(host.model).eval()
    kwargs = {**host.kwargs, "features": images(2, 3, 32)}
    stir(attach(model, "vl.routed_lora", sample=kwargs, **LORA))
    program = torch.export.export(model, (), kwargs)
    other = {**kwargs, "features": images(2, 3, 32, seed=8)}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**other).logits, model(**other).logits, rtol=1e-5, atol=1e-5)


# ---- threads


@pytest.mark.parametrize("family", ["hf_bert", "hf_gpt2", "open_clip"])
@pytest.mark.parametrize(("method", "settings"), [*METHODS, ("lora", {"sites": ("attn.q", "mlp.in")})])
def test_two_threads_with_different_images_do_not_see_each_others(family, method, settings):
    host = HOSTS[family]()
    handle = stir(attach(host.model, method, **settings))
    expected, wrong = {}, []
    for seed in (0, 1):
        with handle.using(features=images(2, 32, seed=seed)), torch.no_grad():
            expected[seed] = host.forward()
    start = threading.Barrier(2)

    def run(seed):
        with handle.using(features=images(2, 32, seed=seed)), torch.no_grad():
            start.wait()
            for _ in range(30):
                if not torch.allclose(host.forward(), expected[seed], rtol=1e-5, atol=1e-6):
                    wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert handle.bank.context.features is None


# ---- packed attention


class Split(nn.Module):
    """nn.MultiheadAttention with its projections as modules of their own."""

    def __init__(self, packed):
        super().__init__()
        self.heads = packed.num_heads
        weights, biases = packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            setattr(self, f"{name}_proj", layer)
        self.out_proj = packed.out_proj

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(16), nn.LayerNorm(16), attn
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        y = self.norm1(x)
        y = self.attn(y) if isinstance(self.attn, Split) else self.attn(y, y, y, need_weights=False)[0]
        x = x + y
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.blocks = nn.ModuleList([Block(attn)])

    def forward(self, x):
        return self.blocks[0](x)


@pytest.mark.parametrize("routing", ["add", "mul", "mul_expand", "gate", "xvv"])
def test_packed_attention_is_the_split_one(routing):
    torch.manual_seed(0)
    packed = Encoder(nn.MultiheadAttention(16, 2, batch_first=True))
    split = Encoder(Split(packed.blocks[0].attn))
    split.load_state_dict({k: v for k, v in packed.state_dict().items() if "in_proj" not in k}, strict=False)
    x, v = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    handles = []
    for model in (packed.eval(), split.eval()):
        reading = "tokens" if routing == "xvv" else "pooled"
        sites = ("attn.q", "attn.v", "attn.out")
        handle = attach(model, "vl.routed_lora", sample=x, routing=routing, reading=reading, sites=sites, **LORA)
        handles.append(stir(handle))
    state, names = handles[0].state(), {"q_proj": "attn:q", "v_proj": "attn:v", "out_proj": "out_proj"}
    for name, p in handles[1].state().items():
        part = next(part for part in names if part in name)
        p.copy_(next(q for k, q in state.items() if names[part] in k and k.endswith(name.rpartition(".")[2])))
    outputs = []
    for handle in handles:
        with handle.using(features=v):
            outputs.append(handle.model(x))
            outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    with handles[0].disabled():
        assert not torch.allclose(packed(x), outputs[0])
    assert not handles[0].shadow_sites
    handles[0].detach()
    assert "forward" not in vars(packed.blocks[0].attn)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [{}, {"kdim": 10, "vdim": 12}, {"bias": False}], ids=["packed", "apart", "no bias"])
def test_attention_step_by_step_is_torch_s_own(batch_first, shape):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, batch_first=batch_first, **shape).double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    q, k, v = (
        torch.randn(3, n, w).double() for n, w in ((5, 16), (7, shape.get("kdim", 16)), (7, shape.get("vdim", 16)))
    )
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.zeros(3, 7, dtype=torch.float64)
    padding[0, 5:] = -torch.inf
    masks = (
        None,
        torch.ones(5, 7, dtype=torch.bool).triu(3),
        torch.randn(12, 5, 7).double(),
        torch.randn(5, 7).double(),
    )
    for key_padding_mask in (None, padding, padding != 0):
        for attn_mask in masks:
            if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
                continue  # torch warns of these
            for need_weights in (True, False):
                options = dict(key_padding_mask=key_padding_mask, attn_mask=attn_mask, need_weights=need_weights)
                expected = module(q, k, v, **options)
                found = attend(module, lambda part, x, y: y, q, k, v, **options)
                torch.testing.assert_close(found, expected)


def test_open_clip_s_q_and_v_are_chosen_apart():
    """peft adapts the whole attention only; a branch at `out_proj` alone, or a hook on it, is dead."""
    host = HOSTS["open_clip"]()
    handle = attach(host.model, "vl.routed_lora", sites=("text:attn.q",), **LORA)
    assert {s.component for s in handle.sites} == {"text"} and not handle.shadow_sites
    stir(handle)
    with handle.using(features=images(2, 32)), torch.no_grad():
        adapted = host.forward()
    with handle.disabled(), torch.no_grad():
        plain = host.forward()
    image, text = slice(0, 16), slice(16, None)
    assert torch.equal(adapted[:, image], plain[:, image]) and not torch.allclose(adapted[:, text], plain[:, text])
    assert get_handle(host.model).method.sites == ("text:attn.q",)
