"""Routing functions against their formulas in plain float64 loops, their counts, what they refuse, and the known bugs
of the authors' code."""

import copy
import math

import pytest
import torch

from adaptsuite import attach, get_handle, load_adapter, verify
from adaptsuite.errors import UsageError
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS
from adaptsuite.vl import routing
from adaptsuite.vl.context import Conditioned, aligned, present

B, T, N, R, D, OUT = 2, 3, 4, 3, 5, 4
BY_ONE = ("add", "mul", "mul_expand", "gate", "routing_xt")
BY_TOKENS = ("xvv", "xvv_relu")
SITE = Site("attn.q", "q", 0, D, OUT, "weight")
BLOCK = Site("mlp", "mlp", 0, D, D)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stir(handle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.1)


def by_loops(name, h, g, mask=None):
    """R(h, g) of one sample, entry by entry: h (T, R), g (N, R); N is 1 but for xvv."""
    out = torch.zeros_like(h)
    for t in range(len(h)):
        for r in range(h.shape[1]):
            if name == "add":
                out[t, r] = h[t, r] + g[0, r]
            elif name == "mul":
                out[t, r] = h[t, r] * g[0, r]
            elif name == "gate":
                out[t, r] = h[t, r] + h[t, r] * g[0, r]
            elif name == "mul_expand":
                out[t, r] = sum(h[t, i] * g[0, r] for i in range(h.shape[1]))  # h M, M's rows are all g
            elif name == "xvv":
                for n in range(len(g)):
                    out[t, r] += sum(h[t, i] * g[n, i] for i in range(h.shape[1])) * g[n, r] / len(g)
            elif name == "xvv_relu":
                for n in range(len(g)):
                    match = sum(max(h[t, i], 0) * max(g[n, i], 0) for i in range(h.shape[1]))
                    out[t, r] += match * g[n, r] / len(g)
            elif name == "routing_xt":
                for s in range(len(h)):
                    if mask is None or mask[s]:
                        out[t, r] += sum(h[t, i] * h[s, i] for i in range(h.shape[1])) * g[0, r]
    return out


@pytest.mark.parametrize("name", [*BY_ONE, *BY_TOKENS])
def test_each_function_equals_its_formula(name):
    h, g = drawn(B, T, R), drawn(B, N if name in BY_TOKENS else 1, R, seed=1)
    reading = "tokens" if name in BY_TOKENS else "pooled"
    found = routing.route(name, reading, h, g, torch.ones(B, g.shape[1], 1, dtype=torch.float64))
    expected = torch.stack([by_loops(name, h[b], g[b]) for b in range(B)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_routing_xt_leaves_padded_tokens_out():
    h, g, mask = drawn(B, T, R), drawn(B, 1, R, seed=1), torch.tensor([[True, True, False], [True, False, False]])
    found = routing.route("routing_xt", "pooled", h, g, torch.ones(B, 1, 1, dtype=torch.float64), mask)
    expected = torch.stack([by_loops("routing_xt", h[b], g[b], mask[b]) for b in range(B)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["add", "mul", "mul_expand", "gate"])
def test_attended_gives_every_text_token_its_own_mean_of_the_image(name):
    h, g = drawn(B, T, R), drawn(B, N, R, seed=1)
    found = routing.route(name, "attended", h, g, torch.ones(B, N, 1, dtype=torch.float64))
    for b in range(B):
        for t in range(T):
            weights = [math.exp(sum(h[b, t, i] * g[b, n, i] for i in range(R)) / math.sqrt(R)) for n in range(N)]
            mean = sum(w * g[b, n] for n, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(found[b, t], by_loops(name, h[b, t : t + 1], mean[None])[0])


@pytest.mark.parametrize("name", [*BY_ONE, *BY_TOKENS])
def test_routed_lora_equals_its_equation(name):
    """y + (alpha / r) B R(A x, A V), with the same A for both."""
    reading = "tokens" if name in BY_TOKENS else "pooled"
    method = resolve("vl.routed_lora", rank=R, alpha=6.0, routing=name, reading=reading)
    branch = method.build(SITE).double()
    with torch.no_grad():
        branch.down.copy_(drawn(R, D, seed=2))
        branch.up.copy_(drawn(OUT, R, seed=3))
    x, y, v = drawn(B, T, D), drawn(B, T, OUT, seed=1), drawn(B, N, D, seed=4)
    found = branch(x, y, routing_context(v))
    for b in range(B):
        h = torch.stack([branch.down @ x[b, t] for t in range(T)])
        g = torch.stack([branch.down @ v[b, n] for n in range(N)])
        z = by_loops(name, h, g if reading == "tokens" else g.mean(0, keepdim=True))
        for t in range(T):
            torch.testing.assert_close(found[b, t], y[b, t] + 6.0 / R * branch.up @ z[t], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("name", [*BY_ONE, *BY_TOKENS])
def test_routed_bottleneck_equals_its_equation(name, placement):
    """up(gelu(R(down x, down V))), both with down's bias."""
    reading = "tokens" if name in BY_TOKENS else "pooled"
    method = resolve("vl.routed_bottleneck", bottleneck=R, routing=name, reading=reading, placement=placement)
    branch = method.build(BLOCK).double()
    with torch.no_grad():
        for seed, p in enumerate(branch.parameters()):
            p.copy_(drawn(*p.shape, seed=seed + 5))
    x, y, v = drawn(B, T, D), drawn(B, T, D, seed=1), drawn(B, N, D, seed=4)
    found = branch(x, y, routing_context(v))
    source = x if placement == "parallel" else y
    for b in range(B):
        h = torch.stack([branch.down.weight @ source[b, t] + branch.down.bias for t in range(T)])
        g = torch.stack([branch.down.weight @ v[b, n] + branch.down.bias for n in range(N)])
        z = by_loops(name, h, g if reading == "tokens" else g.mean(0, keepdim=True))
        z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
        for t in range(T):
            expected = y[b, t] + branch.up.weight @ z[t] + branch.up.bias
            torch.testing.assert_close(found[b, t], expected, rtol=1e-11, atol=1e-11)


def routing_context(v, mask=None):
    from adaptsuite.bank import Context

    return Context(features=v, token_mask=mask)


@pytest.mark.parametrize("name", [*BY_ONE, *BY_TOKENS])
def test_gradients_are_right(name):
    h, g = drawn(1, 2, 3).requires_grad_(), drawn(1, 2 if name in BY_TOKENS else 1, 3, seed=1).requires_grad_()
    real = torch.ones(1, g.shape[1], 1, dtype=torch.float64)
    reading = "tokens" if name in BY_TOKENS else "pooled"
    assert torch.autograd.gradcheck(lambda h, g: routing.route(name, reading, h, g, real), (h, g))


@pytest.mark.parametrize("name", BY_TOKENS)
def test_xvv_is_invariant_to_the_order_of_the_image_tokens(name):
    h, g, real = drawn(B, T, R), drawn(B, N, R, seed=1), torch.ones(B, N, 1, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    a, b = (routing.route(name, "tokens", h, v, real) for v in (g, g[:, order]))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a, routing.route(name, "tokens", h, g[:, :3], real[:, :3]))


@pytest.mark.parametrize("name", BY_TOKENS)
def test_xvv_does_not_grow_with_the_number_of_image_tokens(name):
    h, g = drawn(B, T, R), drawn(B, N, R, seed=1)
    once, thrice = (
        routing.route(name, "tokens", h, v, torch.ones(B, v.shape[1], 1, dtype=torch.float64))
        for v in (g, g.repeat(1, 3, 1))
    )
    torch.testing.assert_close(once, thrice, rtol=1e-12, atol=1e-12)


# ---- rows without an image


@pytest.mark.parametrize("name", [*BY_ONE, *BY_TOKENS])
@pytest.mark.parametrize("method", ["vl.routed_lora", "vl.routed_bottleneck"])
def test_a_row_without_an_image_gets_no_image(name, method):
    reading = "tokens" if name in BY_TOKENS else "pooled"
    settings = {"rank": R, "alpha": 1.0} if method == "vl.routed_lora" else {"bottleneck": R}
    branch = (
        resolve(method, routing=name, reading=reading, **settings)
        .build(Site("attn.q", "q", 0, D, D, "weight"))
        .double()
    )
    for seed, p in enumerate(branch.parameters()):
        p.data = drawn(*p.shape, seed=seed + 5)
    x, y, v = drawn(B, T, D), drawn(B, T, D, seed=1), drawn(B, N, D, seed=4)
    v[1] = 0
    both, alone = branch(x, y, routing_context(v)), branch(x[:1], y[:1], routing_context(v[:1]))
    torch.testing.assert_close(both[:1], alone)
    if name in ("add", "gate"):  # plain
        down = branch.down if method == "vl.routed_lora" else branch.down.weight
        h = x[1] @ down.T if method == "vl.routed_lora" else branch.down(y[1])
        plain = h @ branch.up.T / R if method == "vl.routed_lora" else branch.up(torch.nn.functional.gelu(h))
        torch.testing.assert_close(both[1], y[1] + plain)
    elif method == "vl.routed_lora":
        assert torch.equal(both[1], y[1])


def test_rows_of_zeros_fill_up_images_with_fewer_tokens():
    h, g = drawn(B, T, R), drawn(B, N, R, seed=1)
    long = torch.cat([g, torch.zeros(B, 2, R, dtype=torch.float64)], 1)
    for name, reading in (("xvv", "tokens"), ("xvv_relu", "tokens"), ("mul", "attended"), ("mul_expand", "pooled")):
        short, padded = (routing.route(name, reading, h, v, present(v)) for v in (g, long))
        torch.testing.assert_close(short, padded, rtol=1e-12, atol=1e-12)


# ---- counts


def num_trained(method, **settings):
    host = HOSTS["hf_bert"]()
    return attach(host.model, method, **settings).parameters_count()["trained"]


def test_every_function_trains_as_many_values_as_plain_lora():
    plain = num_trained("lora", rank=8)
    assert plain == 2 * 2 * 8 * (32 + 32)  # blocks, query and value
    for name in (*BY_ONE, *BY_TOKENS):
        reading = "tokens" if name in BY_TOKENS else "pooled"
        assert num_trained("vl.routed_lora", rank=8, routing=name, reading=reading) == plain


def test_a_bottleneck_has_the_count_of_a_plain_one():
    routed, plain = (
        num_trained(method, bottleneck=4, sites=("attn", "mlp")) for method in ("vl.routed_bottleneck", "bottleneck")
    )
    assert routed == plain == 2 * 2 * (4 * 32 + 4 + 4 * 32 + 32)


def test_a_v_proj_is_there_only_where_widths_differ_and_is_counted_once():
    plain = num_trained("lora", rank=8)
    assert num_trained("vl.routed_lora", rank=8, context_dim=32) == plain
    assert num_trained("vl.routed_lora", rank=8, context_dim=20) == plain + 20 * 32
    four = num_trained("vl.routed_lora", rank=8, context_dim=20, sites=("attn.q", "mlp.in", "mlp.out"))
    assert four == 2 * 8 * (64 + 96 + 96) + 20 * (32 + 64)


def test_a_v_proj_stands_between_the_image_and_down():
    host = HOSTS["hf_bert"]()
    v = torch.randn(2, 20)
    handle = attach(host.model, "vl.routed_lora", rank=4, alpha=4.0, context_dim=20)
    stir(handle)
    weight = handle.trained()["shared.v_proj.32"].detach()
    twin = HOSTS["hf_bert"]()
    other = attach(twin.model, "vl.routed_lora", rank=4, alpha=4.0)
    other.load_state({k: t for k, t in handle.state().items() if "v_proj" not in k})
    with handle.using(features=v):
        found = host.forward()
    with other.using(features=v @ weight.T):
        torch.testing.assert_close(found, twin.forward(), rtol=1e-5, atol=1e-6)


# ---- fused projections


def test_q_and_v_of_a_fused_projection_keep_pairs_of_their_own():
    """What the image does to q must not depend on the pair of v: each has its own `down`, and its rows alone."""
    host = HOSTS["hf_gpt2"]()
    handle = attach(host.model, "vl.routed_lora", rank=4, alpha=4.0)
    assert {s.rows for s in handle.sites} == {(0, 32), (64, 96)} and len(handle.adapter.branches) == 4
    stir(handle)
    seen = []
    host.model.get_submodule("transformer.h.0.attn.c_attn").register_forward_hook(lambda m, a, out: seen.append(out))
    v = torch.randn(2, 32)
    with handle.using(features=v), torch.no_grad():
        host.forward()
        q = next(b for k, b in handle.adapter.branches.items() if k == "transformer/h/0/attn/c_attn:q")
        q.up.zero_()
        host.forward()
    with handle.disabled():
        host.forward()
    with_both, without_q, plain = (out.split(32, -1) for out in seen)
    assert torch.equal(without_q[0], plain[0]) and not torch.allclose(with_both[0], plain[0])
    assert torch.equal(with_both[1], plain[1])  # keys are left alone
    assert torch.equal(with_both[2], without_q[2])


@pytest.mark.parametrize("family", ["hf_gpt2", "open_clip", "timm_vit"])
def test_one_pair_for_a_fused_q_k_v_is_refused(family):
    with pytest.raises(UsageError, match="would mix them"):
        attach(HOSTS[family]().model, "vl.routed_lora", sites="attn.qkv")


# ---- merging


def test_merge_is_refused_with_the_reason_for_all_but_add():
    for name in (*BY_ONE[1:], *BY_TOKENS):
        handle = attach(
            HOSTS["hf_bert"]().model,
            "vl.routed_lora",
            routing=name,
            reading="tokens" if name in BY_TOKENS else "pooled",
        )
        with pytest.raises(UsageError, match=f"routing '{name}' makes another weight for every image"):
            handle.merge()
    with pytest.raises(UsageError, match="nonlinearity"):
        attach(HOSTS["hf_bert"]().model, "vl.routed_bottleneck", routing="add").merge()


@pytest.mark.parametrize("family", ["hf_bert", "hf_gpt2", "open_clip"])
def test_add_merges_and_keeps_the_bias_of_each_sample(family):
    host = HOSTS[family]()
    handle = attach(host.model, "vl.routed_lora", routing="add", rank=4, alpha=8.0)
    stir(handle)
    images = torch.randn(2, 2, 32)
    outputs = []
    for v in images:
        with handle.using(features=v), torch.no_grad():
            outputs.append(host.forward())
    handle.merge()
    for v, expected in zip(images, outputs, strict=True):
        with handle.using(features=v), torch.no_grad():
            torch.testing.assert_close(host.forward(), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*outputs)
    with pytest.raises(UsageError, match="keeps a bias of each sample"):
        handle.bake()
    handle.unmerge()
    with handle.using(features=images[0]), torch.no_grad():
        assert torch.equal(host.forward(), outputs[0])


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routing": "mull"}, "routing is 'mull'"),
        ({"routing": "mul", "reading": "tokens"}, "takes reading=pooled or attended"),
        ({"routing": "xvv"}, "takes reading=tokens"),
        ({"routing": "routing_xt", "reading": "attended"}, "takes reading=pooled"),
        ({"context_dim": 0}, "context_dim is 0"),
        ({"reading": "mean"}, "reading is 'mean'"),
    ],
)
@pytest.mark.parametrize("method", ["vl.routed_lora", "vl.routed_bottleneck"])
def test_settings_that_cannot_be_are_refused(method, settings, message):
    with pytest.raises(UsageError, match=message):
        resolve(method, **settings)


def test_routing_over_all_tokens_is_refused_in_a_causal_model():
    with pytest.raises(UsageError, match="shows every token all later ones"):
        attach(HOSTS["hf_gpt2"]().model, "vl.routed_lora", routing="routing_xt")
    attach(HOSTS["hf_bert"]().model, "vl.routed_lora", routing="routing_xt")


def test_features_that_do_not_fit_are_named():
    x = torch.zeros(4, 3, 8)
    with pytest.raises(UsageError, match="3 images do not fit a batch of 4"):
        aligned(torch.zeros(3, 8), x)
    with pytest.raises(UsageError, match="have 4 dimensions"):
        aligned(torch.zeros(4, 1, 1, 8), x)
    host = HOSTS["hf_bert"]()
    handle = attach(host.model, "vl.routed_lora")
    with handle.using(features=torch.randn(2, 20)), pytest.raises(UsageError, match="set context_dim=20"):
        host.forward()


def test_peft_does_not_take_a_routed_adapter_for_a_plain_one(tmp_path):
    from adaptsuite import to_peft

    with pytest.raises(UsageError):
        to_peft(attach(HOSTS["hf_bert"]().model, "vl.routed_lora"), tmp_path / "peft")


# ---- saving


@pytest.mark.parametrize("settings", [{}, {"context_dim": 20}, {"routing": "xvv", "reading": "tokens"}])
@pytest.mark.parametrize("method", ["vl.routed_lora", "vl.routed_bottleneck"])
def test_a_saved_adapter_comes_back_bit_for_bit(method, settings, tmp_path):
    host, twin = HOSTS["hf_roberta"](), HOSTS["hf_roberta"]()
    v = torch.randn(2, 3, settings.get("context_dim", 32))
    handle = attach(host.model, method, head="classifier", **settings)
    stir(handle)
    other = load_adapter(twin.model, handle.save(tmp_path / "adapter"))
    with handle.using(features=v), other.using(features=v), torch.no_grad():
        assert torch.equal(host.forward(), twin.forward())
    assert other.method == handle.method and other.state().keys() == handle.state().keys()


# ---- bugs of the authors' code, one test each


def test_reference_bug_transpose_is_a_transpose_and_not_a_reshape():
    """g.reshape(B, R, N) in place of g^T scrambles tokens and features for N > 1."""
    h, g = drawn(1, 1, 2), drawn(1, 3, 2, seed=1)
    found = routing.xvv(h, g, torch.ones(1, 3, 1, dtype=torch.float64))
    right, wrong = h @ g.transpose(1, 2) @ g / 3, h @ g.reshape(1, 2, 3) @ g / 3
    torch.testing.assert_close(found, right)
    assert not torch.allclose(found, wrong)


def test_reference_bug_routing_is_on_unless_it_is_said_and_an_image_is_demanded():
    """The shipped scripts never turn routing on, so that no image acts and nobody notices."""
    host = HOSTS["hf_bert"]()
    handle = attach(host.model, "vl.routed_lora", rank=4)
    assert handle.method.routing == "mul_expand"
    stir(handle)
    with pytest.raises(UsageError, match="routing needs an image"):
        host.forward()
    outputs = []
    for seed in (0, 1):
        with handle.using(features=drawn(2, 32, seed=seed).float()), torch.no_grad():
            outputs.append(host.forward())
    assert not torch.allclose(*outputs), "the image does not act"


def test_reference_bug_neither_layer_norms_nor_biases_of_q_and_v_train():
    handle = attach(HOSTS["hf_roberta"]().model, "vl.routed_lora")
    assert {name.rpartition(".")[2] for name in handle.trained()} == {"down", "up"}
    flags = {n for n, p in handle.model.named_parameters() if p.requires_grad and "adapter_bank" not in n}
    assert not flags


@pytest.mark.parametrize("name", [*BY_ONE, *BY_TOKENS])
def test_reference_bug_an_adapter_on_roberta_starts_as_the_backbone_and_has_a_skip(name):
    host, plain = HOSTS["hf_roberta"](), HOSTS["hf_roberta"]()
    reading = "tokens" if name in BY_TOKENS else "pooled"
    handle = attach(host.model, "vl.routed_bottleneck", routing=name, reading=reading)
    assert handle.method.with_residual
    with handle.using(features=torch.randn(2, 3, 32)), torch.no_grad():
        assert torch.equal(host.forward(), plain.forward())
    found = verify(handle, lambda m: with_image(m, host))
    assert found.ok, found.problems


def with_image(model, host):
    with get_handle(model).using(features=drawn(2, 3, 32, seed=3).float()):
        return host.forward(model)


def test_reference_bug_the_first_word_of_a_caption_is_trained():
    """The position that must emit the first word gets a loss: that of the last token of the prefix. Their labels begin
    one later."""
    host = HOSTS["hf_gpt2"]()
    handle = attach(host.model, "vl.routed_lora", rank=4)
    stir(handle)
    ids = host.kwargs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, 1] = ids[:, 1]  # the first word alone, behind the start token
    with handle.using(features=torch.randn(2, 32)):
        loss = host.model(input_ids=ids, labels=labels).loss
        logits = host.model(input_ids=ids).logits
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[:, 0], ids[:, 1]))
    loss.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in handle.trained().values())


def test_reference_bug_the_token_of_id_0_is_trained():
    """Their loss ignores id 0, which is a word of GPT-2."""
    host = HOSTS["hf_gpt2"]()
    handle = attach(host.model, "vl.routed_lora", rank=4)
    ids = host.kwargs["input_ids"].clone()
    ids[:, 3] = 0
    labels = torch.full_like(ids, -100)
    labels[:, 3] = 0
    with handle.using(features=torch.randn(2, 32)), torch.no_grad():
        assert float(host.model(input_ids=ids, labels=labels).loss) > 0


def test_reference_bug_the_embedding_stage_runs_once():
    host = HOSTS["hf_roberta"]()
    handle = attach(host.model, "vl.routed_lora")
    calls = []
    host.model.roberta.embeddings.register_forward_hook(lambda *_: calls.append(1))
    with handle.using(features=torch.randn(2, 32)):
        host.forward()
    assert calls == [1]


def test_a_copy_reads_its_own_context():
    host = HOSTS["hf_bert"]()
    handle = attach(Conditioned(host.model), "vl.routed_lora", sample=host.kwargs | {"features": torch.randn(2, 32)})
    stir(handle)
    a, b = torch.randn(2, 2, 32)
    with handle.using(features=a):
        twin = copy.deepcopy(handle.model)
    other = get_handle(twin)
    with other.using(features=b):
        assert handle.bank.context.features is None and torch.equal(other.bank.context.features, b)
