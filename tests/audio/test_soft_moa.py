"""Mixtures of adapters against their equations in plain loops, and one test per known bug of the reference code."""

import math

import pytest
import torch

from adaptsuite.audio.soft_moa import DenseMoaBranch, Experts, SoftMoaBranch
from adaptsuite.bank import Context
from adaptsuite.host import attach
from adaptsuite.testing import HOSTS

B, T, D, N, R = 2, 5, 4, 3, 2


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module.double()


def tokens(seed=1):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gelu(v):
    return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))


def expert(branch, n, token):
    e = branch.experts
    hidden = [gelu(float(e.down_bias[n, r] + sum(e.down[n, r, d] * token[d] for d in range(D)))) for r in range(R)]
    return [float(e.up_bias[n, d]) + sum(float(e.up[n, d, r]) * hidden[r] for r in range(R)) for d in range(D)]


def softmax(values):
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def soft_moa(branch, x, slots, mask):
    """L = X Phi; D: softmax of L over tokens; C: softmax over all slots; S = D^T X; Y_n = A_n(S_n); out = C Y."""
    out = torch.zeros_like(x)
    phi = branch.phi.detach()
    for b in range(B):
        norm = [float(x[b, t].norm()) for t in range(T)]
        logits = [[[0.0] * slots for _ in range(N)] for _ in range(T)]
        for t in range(T):
            for n in range(N):
                for p in range(slots):
                    value = sum(float(x[b, t, d] * phi[d, n, p]) for d in range(D))
                    if branch.logit_scale is not None:
                        value *= float(branch.logit_scale) / (norm[t] * float(phi[:, n, p].norm()))
                    logits[t][n][p] = value
        real = [t for t in range(T) if mask is None or mask[b, t]]
        answers = {}
        for n in range(N):
            for p in range(slots):
                dispatch = softmax([logits[t][n][p] for t in real])
                slot = [sum(w * float(x[b, t, d]) for w, t in zip(dispatch, real, strict=True)) for d in range(D)]
                answers[n, p] = expert(branch, n, torch.tensor(slot, dtype=torch.float64))
        for t in range(T):
            combine = softmax([logits[t][n][p] for n in range(N) for p in range(slots)])
            for weight, key in zip(combine, [(n, p) for n in range(N) for p in range(slots)], strict=True):
                out[b, t] += weight * torch.tensor(answers[key], dtype=torch.float64)
    return out


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_soft_moa_equals_its_equations(slots, normalise, masked):
    branch, x = randomise(SoftMoaBranch(Experts(D, N, R), slots, normalise, "parallel")), tokens()
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]]) if masked else None
    found = branch(x, torch.zeros_like(x), Context(token_mask=mask))
    torch.testing.assert_close(found, soft_moa(branch, x, slots, mask), rtol=1e-6, atol=1e-6)  # router in float32


def test_dense_moa_equals_its_equation():
    branch, x = randomise(DenseMoaBranch(Experts(D, N, R), "parallel")), tokens()
    expected = torch.zeros_like(x)
    for b in range(B):
        for t in range(T):
            row = branch.gate.weight.detach() @ x[b, t] + branch.gate.bias.detach()
            for n, weight in enumerate(softmax(row.tolist())):
                expected[b, t] += weight * torch.tensor(expert(branch, n, x[b, t]), dtype=torch.float64)
    torch.testing.assert_close(branch(x, torch.zeros_like(x), Context()), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [SoftMoaBranch, DenseMoaBranch])
def test_sequential_reads_the_output(kind):
    branch = randomise(kind(Experts(D, N, R), placement="sequential"))
    parallel = randomise(kind(Experts(D, N, R)))
    x, y = tokens(1), tokens(2)
    torch.testing.assert_close(branch(x, y, Context()), parallel(y, y, Context()))
    assert not torch.allclose(branch(x, y, Context()), parallel(x, y, Context()))


def test_closed_counts_per_layer():
    soft, dense = SoftMoaBranch(Experts(D, N, R), 2, False, "parallel"), DenseMoaBranch(Experts(D, N, R), "parallel")
    assert sum(p.numel() for p in soft.parameters()) == N * (2 * D * R + D + R) + D * N * 2
    assert sum(p.numel() for p in dense.parameters()) == N * (2 * D * R + D + R) + N * (D + 1)


def test_order_of_tokens_only_permutes_the_output():
    branch, x = randomise(SoftMoaBranch(Experts(D, N, R), 1, False, "parallel")), tokens()
    order = torch.tensor([3, 1, 4, 0, 2])
    out = branch(x, torch.zeros_like(x), Context())
    torch.testing.assert_close(branch(x[:, order], torch.zeros_like(x), Context()), out[:, order], rtol=1e-6, atol=1e-6)


def test_padding_changes_nothing_for_real_tokens():
    branch, x = randomise(SoftMoaBranch(Experts(D, N, R), 1, False, "parallel")), tokens()
    longer = torch.cat([x, 100 * torch.ones(B, 3, D, dtype=x.dtype)], 1)
    mask = torch.arange(T + 3).expand(B, -1) < T
    padded = branch(longer, torch.zeros_like(longer), Context(token_mask=mask))
    torch.testing.assert_close(padded[:, :T], branch(x, torch.zeros_like(x), Context()), rtol=1e-6, atol=1e-6)


# bugs of the reference


def test_reference_bug_06_normalisation_touches_the_logits_only():
    """The reference dispatches unit-norm tokens, so that its output ignores the input's scale: here doubling X leaves
    both softmaxes as they are and doubles the slots."""
    branch, x = randomise(SoftMoaBranch(Experts(D, N, R), 1, True, "parallel")), tokens()
    _, dispatch, combine = branch.router(x)
    _, dispatch2, combine2 = branch.router(2 * x)
    torch.testing.assert_close(dispatch, dispatch2)
    torch.testing.assert_close(combine, combine2)
    zero = torch.zeros_like(x)
    assert not torch.allclose(branch(x, zero, Context()), branch(2 * x, zero, Context()))


def test_reference_bug_07_phi_is_normalised_over_the_features():
    """The reference normalises over the experts: here the length of an expert's own slot vector does not count."""
    branch, x = randomise(SoftMoaBranch(Experts(D, N, R), 1, True, "parallel")), tokens()
    _, dispatch, _ = branch.router(x)
    with torch.no_grad():
        branch.phi *= torch.tensor([1.0, 5.0, 0.2])[None, :, None]
    torch.testing.assert_close(branch.router(x)[1], dispatch)


def test_reference_bug_02_the_mixture_is_added_once():
    """The reference's default site adds it after the attention and again after the MLP."""
    host = HOSTS["hf_ast"]()
    handle = attach(host.model, "audio.soft_moa")
    calls = []
    for branch in handle.adapter.branches.values():
        branch.register_forward_hook(lambda *_: calls.append(1))
    host.forward()
    assert len(calls) == host.model.config.num_hidden_layers


def test_fused_dense_equals_its_loop_in_float32():
    torch.manual_seed(0)
    branch, x = DenseMoaBranch(Experts(64, 7, 6), "parallel"), torch.randn(2, 50, 64)
    with torch.no_grad():
        for p in branch.parameters():
            p.normal_(std=0.1)
    e, gate = branch.experts, branch.router(x)
    loop = sum(
        gate[..., n, None] * (torch.nn.functional.gelu(x @ e.down[n].T + e.down_bias[n]) @ e.up[n].T + e.up_bias[n])
        for n in range(7)
    )
    torch.testing.assert_close(branch(x, torch.zeros_like(x), Context()), loop, rtol=0, atol=3e-6)


def test_diagnostics_see_a_router_that_does_nothing():
    torch.manual_seed(0)
    branch, x = SoftMoaBranch(Experts(D, N, R), 1, False, "parallel"), torch.randn(2, 40, D)
    with torch.no_grad():
        branch.phi.zero_()
    idle = branch.diagnostics(x)
    assert idle["dispatch_entropy"] == pytest.approx(1) and idle["logit_std"] == 0 and idle["slot_norm"] < 0.5
    assert idle["load"] == pytest.approx([1 / N] * N)
    with torch.no_grad():
        branch.phi.normal_(std=20)
    busy = branch.diagnostics(x)
    assert busy["dispatch_entropy"] < 0.5 and busy["slot_norm"] > 1
    mask = torch.arange(40).expand(2, -1) < 10
    assert branch.diagnostics(x, mask)["dispatch_entropy"] <= 1 + 1e-6


@pytest.mark.parametrize("kind", ["soft", "dense"])
def test_gradients_are_right(kind):
    soft = kind == "soft"
    branch = randomise(
        SoftMoaBranch(Experts(D, N, R), 1, False, "parallel") if soft else DenseMoaBranch(Experts(D, N, R), "parallel")
    )

    def router(x, mask=None):  # as the branch's own, but in float64, where finite differences mean something
        logits = x @ branch.phi.flatten(1) if soft else branch.gate(x)
        return (logits, logits.softmax(1), logits.softmax(-1)) if soft else logits.softmax(-1)

    branch.router = router
    x = tokens().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: branch(x, torch.zeros_like(x), Context()), (x,))
