"""MixPHM: its equations in plain loops, one expert a step, one mean of weights, and its regulariser."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adaptsuite import attach
from adaptsuite.compacter import phm
from adaptsuite.errors import UsageError
from adaptsuite.testing import HOSTS
from adaptsuite.verify import contract
from adaptsuite.vl.mixphm import LAMBDA, alignment, redundancy

SMALL = {"n": 2, "rank": 3, "bottleneck": 4}


def stir(handle, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * 0.3)
    return handle


def on_bert(**settings):
    host = HOSTS["hf_bert"]()
    torch.manual_seed(0)
    return stir(attach(host.model, "vl.mixphm", **{**SMALL, **settings})), host


def layers(handle):
    return [b for b in handle.adapter.branches.values() if hasattr(b, "up_left")]


def kronecker_sum(rule, left, right):
    """sum_i A_i kron (S_i T_i), one value at a time."""
    n, p, q = len(rule), left.shape[1], right.shape[2]
    h = torch.zeros(n * p, n * q, dtype=rule.dtype)
    for i in range(n):
        for a in range(n):
            for b in range(n):
                for c in range(p):
                    for d in range(q):
                        st = sum(left[i, c, r] * right[i, r, d] for r in range(left.shape[2]))
                        h[a * p + c, b * q + d] += rule[i, a, b] * st
    return h


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def one_expert(branch, x, expert):
    """y + up_e(gelu(down y)), by loops."""
    rule = branch.shared.a.detach().double()
    p = {k: v.detach().double() for k, v in branch.named_parameters()}
    down = kronecker_sum(rule, p["down_left"], p["down_right"])
    up = kronecker_sum(rule, p["up_left"][expert], p["up_right"][expert])
    h = torch.nn.functional.gelu(x.double() @ down + p["down_bias"])
    return x.double() + h @ up + p["up_bias"][expert]


def test_training_takes_one_expert_and_evaluation_the_mean_of_the_weights():
    """up is linear in its weights, so the mean of the weights gives the mean of the experts' outputs."""
    handle, _ = on_bert(dropout=0.0)
    branch, y = layers(handle)[0], torch.randn(2, 3, 32)
    experts = torch.stack([one_expert(branch, y, e) for e in range(4)])
    seen = set()
    branch.train()
    for seed in range(20):
        torch.manual_seed(seed)
        out = branch(y, y, None).double()
        gaps = (experts - out).abs().amax((1, 2, 3))
        assert gaps.min() < 1e-4
        seen.add(int(gaps.argmin()))
    assert seen == {0, 1, 2, 3}
    branch.eval()
    with torch.no_grad():
        torch.testing.assert_close(branch(y, y, None).double(), experts.mean(0), rtol=1e-4, atol=1e-5)


def test_each_layer_draws_its_own_expert_and_a_seed_says_which():
    handle, host = on_bert(dropout=0.0)
    handle.model.train()

    def drawn_outputs(seed):
        torch.manual_seed(seed)
        return [p.grad is not None and p.grad.abs().flatten(1).amax(1).argmax().item() for p in gradients(handle, host)]

    draws = [drawn_outputs(seed) for seed in range(8)]
    assert draws == [drawn_outputs(seed) for seed in range(8)]
    assert any(a != b for a, b in draws), "all layers draw together"


def gradients(handle, host, through=lambda model, kwargs: model(**kwargs).last_hidden_state):
    """up_bias of both layers, with their gradients."""
    for p in handle.trained().values():
        p.grad = None
    out = through(handle.model, host.kwargs)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [branch.up_bias for branch in layers(handle)]


def test_an_expert_that_was_not_drawn_has_a_gradient_of_zero():
    """DistributedDataParallel waits for every parameter's; in the release the others have none."""
    handle, host = on_bert()
    handle.model.train()
    for bias in gradients(handle, host):
        moved = bias.grad.abs().amax(1) > 0
        assert moved.sum() == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_draw_the_expert_of_the_forward_again(reentrant):
    off = {"redundancy": 0.0, "alignment": 0.0}
    plain, host = on_bert(**off)
    again, _ = on_bert(**off)
    again.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for handle in (plain, again):
        handle.model.train()
        torch.manual_seed(3)
        gradients(handle, host)
    for name, p in plain.trained().items():
        torch.testing.assert_close(again.trained()[name].grad, p.grad, rtol=1e-5, atol=1e-6)


def test_the_mean_is_made_once_and_costs_a_forward_nothing():
    """In the release every forward of an evaluation copies an expert and averages anew."""
    handle, host = on_bert()
    branch, tokens = layers(handle)[0], host.kwargs["input_ids"].numel()

    def flops():
        y = torch.randn(2, tokens // 2, 32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            branch(y, y, None)
        return counter.get_total_flops()

    branch.eval()
    first, second = flops(), flops()
    assert second == 2 * 2 * tokens * 32 * 4 < first  # two products of tokens with a matrix of 32 x 4
    kept = branch.mean()
    with torch.no_grad():
        assert branch.mean()[1] is branch.mean()[1]
        branch.up_right.add_(1.0)
        assert not torch.equal(branch.mean()[1], kept[1])
        torch.testing.assert_close(branch.mean()[1], branch.averaged()[1])


def test_the_mean_is_that_of_the_weights_and_not_of_their_factors():
    handle, _ = on_bert()
    branch = layers(handle)[0]
    factors = phm(branch.shared.a, branch.up_left.mean(0), branch.up_right.mean(0))
    weights = torch.stack([phm(branch.shared.a, branch.up_left[e], branch.up_right[e]) for e in range(4)]).mean(0)
    assert not torch.allclose(factors, weights, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(branch.mean()[1], weights.detach(), rtol=1e-5, atol=1e-6)


def test_what_was_kept_follows_every_change():
    """Another precision, loaded values, and values written past autograd between two trainings."""
    handle, host = on_bert(dropout=0.0)
    model = handle.model.eval()

    def said():
        with torch.no_grad():
            return model(**host.kwargs).last_hidden_state

    before = said()
    with torch.inference_mode():
        model(**host.kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said()
    assert torch.equal(said(), before)
    state = {k: v.clone() for k, v in handle.state().items()}
    handle.load_state({k: v + 0.1 if v.is_floating_point() else v for k, v in state.items()})
    assert not torch.allclose(said(), before)
    handle.load_state(state)
    assert torch.equal(said(), before)
    assert said().dtype == torch.float32 and model.double() and said().dtype == torch.float64
    torch.testing.assert_close(said().float(), before, rtol=1e-4, atol=1e-5)


def test_a_branch_with_frozen_parameters_serves_gradients_after_inference_mode():
    handle, host = on_bert()
    model = handle.model.eval().requires_grad_(False)
    with torch.inference_mode():
        model(**host.kwargs)
    x = model.get_input_embeddings()(host.kwargs["input_ids"]).requires_grad_(True)
    model(inputs_embeds=x).last_hidden_state.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("width, hidden", [(768, 64), (32, 4), (60, 4)])
def test_parameters_are_the_closed_formula(width, hidden):
    """n^3 once; r (D + H) + H down, E (r (H + D) + D) up."""
    from transformers import BertConfig, BertModel

    shape = dict(hidden_size=width, num_attention_heads=2, intermediate_size=16, num_hidden_layers=3, vocab_size=9)
    handle = attach(BertModel(BertConfig(**shape)), "vl.mixphm")
    layer = 8 * (width + hidden) + hidden + 4 * (8 * (hidden + width) + width)
    assert handle.parameters_count()["trained"] == 4**3 + 3 * layer
    if width == 768:
        assert 24 * layer + 64 == 874_048  # 0.87 M on the 24 feed-forwards of T5-base


@pytest.mark.parametrize("family", ["hf_bert", "hf_gpt2", "timm_vit"])
def test_it_keeps_its_promises(family):
    assert all(contract(HOSTS[family], "vl.mixphm", **SMALL).values())


def test_encoder_and_decoder_have_summaries_of_their_own():
    """As in VL-T5: adapters behind all feed-forwards, and terms that are means of each stack's."""
    from transformers import T5Config, T5Model

    torch.manual_seed(0)
    shape = dict(d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=2, vocab_size=20, dropout_rate=0.0)
    ids = {"input_ids": torch.randint(3, 20, (2, 5)), "decoder_input_ids": torch.randint(3, 20, (2, 4))}
    handle = stir(attach(T5Model(T5Config(**shape)), "vl.mixphm", sample=ids, dropout=0.0, **SMALL))
    assert [site.component for site in handle.sites if site.role == "mlp"] == ["encoder"] * 2 + ["decoder"] * 2
    handle.model.train()
    handle.model(**ids)
    terms, adapter = {}, handle.adapter
    ends = {s.component: adapter.branches[k].seen for k, s in adapter.sites.items() if s.role == "block"}
    for key, site in adapter.sites.items():
        if site.role == "mlp":
            up, residual, _ = adapter.branches[key].seen
            sample = torch.arange(2).repeat_interleave(up.shape[1])
            term = 0.2 * redundancy(up.flatten(0, 1), residual.flatten(0, 1), 2)
            term = term + 0.04 * alignment(up.flatten(0, 1), ends[site.component], sample)
            terms.setdefault(site.component, []).append(term)
    expected = (torch.stack(terms["encoder"]).mean() + torch.stack(terms["decoder"]).mean()) / 2
    torch.testing.assert_close(handle.regulariser(), expected)


# ---- the regulariser


def test_redundancy_is_the_sum_over_pairs_of_features():
    torch.manual_seed(0)
    up, residual = drawn(5, 3), drawn(5, 3)
    total = 0.0
    for i in range(3):
        for j in range(3):
            c = sum(up[m, i] / up[m].norm() * residual[m, j] / residual[m].norm() for m in range(5))
            total += 0.0 if i == j else float(c) ** 2
    assert float(redundancy(up, residual, 2)) == pytest.approx(LAMBDA * total / 2)


def test_alignment_is_the_jensen_shannon_bound():
    torch.manual_seed(0)
    up, summary, sample = drawn(5, 3), drawn(3, 3), [0, 0, 1, 2, 2]
    own = other = 0.0
    for m in range(5):
        for b in range(3):
            s = float(up[m] @ summary[b])
            if b == sample[m]:
                own += math.log(2) - math.log(1 + math.exp(-s))
            else:
                other += math.log(1 + math.exp(-s)) + s - math.log(2)
    found = float(alignment(up, summary, torch.tensor(sample)))
    assert found == pytest.approx(other / (5 * 2) - own / 5)


def test_a_batch_of_one_has_a_finite_alignment():
    """The release divides by the number of other samples."""
    assert alignment(drawn(4, 3), drawn(1, 3), torch.zeros(4, dtype=torch.long)).isfinite()


def test_the_regulariser_is_the_mean_over_layers_of_what_they_said():
    handle, host = on_bert(dropout=0.0, redundancy=0.3, alignment=0.7)
    captured, model = {}, handle.model.train()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    for key, site in ((k, handle.adapter.sites[k]) for k in handle.adapter.branches):
        if site.role == "mlp":
            model.get_submodule(site.path).register_forward_hook(
                lambda module, args, out, key=key: captured.setdefault(key, out)  # behind the adapter
            )
    with handle.using(token_mask=mask):
        torch.manual_seed(1)
        last = model(**host.kwargs).last_hidden_state
    summary = torch.stack([last[0].mean(0), last[1, :4].mean(0)])
    sample = torch.tensor([0] * 7 + [1] * 4)
    wanted = []
    for key, branch in handle.adapter.branches.items():
        if not hasattr(branch, "up_left"):
            continue
        up, residual, _ = branch.seen
        torch.testing.assert_close(captured[key], up + residual)
        up, residual = up[mask], residual[mask]
        wanted.append(0.3 * redundancy(up, residual, 2) + 0.7 * alignment(up, summary, sample))
    torch.testing.assert_close(handle.regulariser(), torch.stack(wanted).mean())
    assert handle.regulariser() is None, "the terms of a step were given twice"


def test_the_regulariser_trains_and_evaluation_has_none():
    handle, host = on_bert(dropout=0.0)
    handle.model.train()
    handle.model(**host.kwargs)
    handle.regulariser().backward()
    assert all(float(b.up_right.grad.abs().max()) > 0 for b in layers(handle))
    handle.model.eval()
    handle.model(**host.kwargs)
    assert handle.regulariser() is None


def test_checkpoints_without_reentry_have_the_regulariser_of_a_plain_forward():
    plain, host = on_bert()
    again, _ = on_bert()
    again.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for handle in (plain, again):
        handle.model.train()
        torch.manual_seed(3)
        out = handle.model(**host.kwargs).last_hidden_state
        (out.square().mean() + handle.regulariser()).backward()
    for name, p in plain.trained().items():
        torch.testing.assert_close(again.trained()[name].grad, p.grad, rtol=1e-5, atol=1e-6)


def test_reentrant_checkpoints_are_refused_by_the_regulariser_in_a_line():
    handle, host = on_bert()
    handle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    handle.model.train()
    handle.model(**host.kwargs)
    with pytest.raises(UsageError, match="use_reentrant=False, or redundancy=0"):
        handle.regulariser()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n": 3}, "n is 3, which does not divide 32 features"),
        ({"experts": 0}, "experts is 0"),
        ({"redundancy": -1.0}, "redundancy is -1.0"),
        ({"sites": ("block",)}, "places inside blocks"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["hf_bert"]().model, "vl.mixphm", **settings)


def test_it_learns_with_its_regulariser():
    handle, host = on_bert(dropout=0.0)
    head, target = nn.Linear(32, 2), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW([*handle.trained().values(), *head.parameters()], lr=1e-2)
    losses = []
    handle.model.train()
    for step in range(30):
        torch.manual_seed(step)
        logits = head(handle.model(**host.kwargs).last_hidden_state.mean(1))
        loss = torch.nn.functional.cross_entropy(logits, target)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + handle.regulariser()).backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
