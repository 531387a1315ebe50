"""Conformer and convpass adapters, and conformer experts of mixtures, against their formulas in plain float64 loops."""

import math

import pytest
import torch

from adaptsuite.audio.conv_adapter import Conformers
from adaptsuite.audio.soft_moa import DenseMoaBranch, SoftMoaBranch
from adaptsuite.bank import Context
from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.sites import Site
from adaptsuite.testing import HOSTS

B, T, D, R, N = 2, 5, 4, 2, 3
SITE = Site("mlp", "mlp", 0, D, D)


def randomise(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in (*module.named_parameters(), *module.named_buffers()):
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(noise.abs() + 0.5 if "running_var" in name else noise)
    return module.double().eval()


def tokens(seed=1):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def convolved(sequence, kernel, weight_of):
    """out[t][o] = sum_{i, j} w(o, i, j) in[t + j - (kernel - 1) // 2][i], zeros beyond the ends."""
    out = []
    for t in range(len(sequence)):
        row = []
        for o in range(R):
            total = 0.0
            for j in range(kernel):
                at = t + j - (kernel - 1) // 2
                if 0 <= at < len(sequence):
                    total += sum(weight_of(o, i, j) * sequence[at][i] for i in range(R))
            row.append(total)
        out.append(row)
    return out


def conformer(c, n, sequence, kernel, real=None):
    """Expert n of Conformers on a list of tokens: LN, GLU, depthwise convolution, batch norm, SiLU, up."""
    gated = []
    for t, x in enumerate(sequence):
        mean = sum(x) / D
        std = math.sqrt(sum((v - mean) ** 2 for v in x) / D + 1e-5)
        z = [float(c.gain[n, d]) * (x[d] - mean) / std + float(c.shift[n, d]) for d in range(D)]
        wide = [float(c.down_bias[n, r]) + sum(float(c.down[n, r, d]) * z[d] for d in range(D)) for r in range(2 * R)]
        keep = 1.0 if real is None or real[t] else 0.0
        gated.append([keep * wide[r] * sigmoid(wide[R + r]) for r in range(R)])
    conv, norm, out = c.depthwise, c.norm, []
    taps = convolved(gated, kernel, lambda o, i, j: float(conv.weight[n * R + o, 0, j]) if i == o else 0.0)
    for row in taps:
        hidden = []
        for r in range(R):
            at = n * R + r
            v = row[r] + float(conv.bias[at]) - float(norm.running_mean[at])
            v = v / math.sqrt(float(norm.running_var[at]) + norm.eps) * float(norm.weight[at]) + float(norm.bias[at])
            hidden.append(v * sigmoid(v))
        out.append([float(c.up_bias[n, d]) + sum(float(c.up[n, d, r]) * hidden[r] for r in range(R)) for d in range(D)])
    return out


@pytest.mark.parametrize("kernel", [1, 3, 4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_conformer_adapter_equals_its_formula(kernel, masked):
    branch = randomise(resolve("audio.conformer", bottleneck=R, kernel=kernel).build(SITE))
    x, y = tokens(), tokens(2)
    mask = torch.tensor([[True] * T, [True] * 3 + [False] * 2]) if masked else None
    expected = torch.stack(
        [double(conformer(branch.conformer, 0, x[b].tolist(), kernel, mask[b] if masked else None)) for b in range(B)]
    )
    torch.testing.assert_close(branch(x, y, Context(mask)) - y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_convpass_adapter_equals_its_formula(placement):
    branch = randomise(resolve("audio.convpass", bottleneck=R, placement=placement).build(SITE))
    x, y = tokens(), tokens(2)
    source = x if placement == "parallel" else y

    def quick_gelu(v):
        return v * sigmoid(1.702 * v)

    for b in range(B):
        hidden = [
            [
                quick_gelu(float(branch.down.bias[r] + sum(branch.down.weight[r, d] * v[d] for d in range(D))))
                for r in range(R)
            ]
            for v in source[b]
        ]
        rows = convolved(hidden, 3, lambda o, i, j: float(branch.conv.weight[o, i, j]))
        for t, row in enumerate(rows):
            h = [quick_gelu(row[r] + float(branch.conv.bias[r])) for r in range(R)]
            for d in range(D):
                up = float(branch.up.bias[d]) + sum(float(branch.up.weight[d, r]) * h[r] for r in range(R))
                expected = up + float(y[b, t, d])  # sequential adds what it replaces, parallel what it stands beside
                assert float(branch(x, y, None)[b, t, d]) == pytest.approx(expected, abs=1e-9)


def gradients(method):
    branch = randomise(resolve(method, bottleneck=R).build(SITE))
    branch(tokens(), tokens(2), None).square().sum().backward()
    return {name: float(p.grad.abs().max()) for name, p in branch.named_parameters()}


def test_reference_bug_04_the_convpass_s_convolution_is_used():
    """In the reference its output is dropped: it never learns."""
    found = gradients("audio.convpass")
    assert min(found["conv.weight"], found["conv.bias"]) > 1e-3


def test_reference_bug_05_the_conformer_s_norm_is_used():
    """In the reference its output is dropped: 18,432 dead values are counted as trained."""
    found = gradients("audio.conformer")
    assert min(found["conformer.gain"], found["conformer.shift"]) > 1e-3


def test_dense_mixture_of_conformers_equals_its_loop():
    branch = randomise(DenseMoaBranch(Conformers(N, D, R, D, 3)))
    x, y = tokens(), tokens(2)
    gate = branch.gate(x).softmax(-1)
    expected = y.clone()
    for b in range(B):
        for n in range(N):
            expected[b] += gate[b, :, n : n + 1] * double(conformer(branch.experts, n, x[b].tolist(), 3))
    torch.testing.assert_close(branch(x, y, None), expected, rtol=1e-9, atol=1e-9)


def test_soft_mixture_of_conformers_convolves_over_an_expert_s_own_slots():
    slots = 3
    branch = randomise(SoftMoaBranch(Conformers(N, D, R, D, 3), slots))
    x, y = tokens(), tokens(2)
    _, dispatch, combine = branch.router(x)
    s = torch.einsum("bts,btd->bsd", dispatch, x)
    for b in range(B):
        answers = [conformer(branch.experts, n, s[b, n * slots : (n + 1) * slots].tolist(), 3) for n in range(N)]
        expected = y[b] + combine[b] @ double(answers).flatten(0, 1)
        torch.testing.assert_close(branch(x, y, None)[b], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [  # closed counts of one module: audio.md section 5 holds them on AST-base
        ("audio.conformer", {"kernel": 31}, lambda d, r, k: 2 * d + 2 * r * d + 2 * r + r * k + r + 2 * r + r * d + d),
        ("audio.convpass", {"kernel": 3}, lambda d, r, k: r * d + r + r * r * k + r + r * d + d),
    ],
)
def test_counts_follow_the_closed_forms(method, settings, expected):
    model = HOSTS["hf_ast"]().model
    d, blocks = model.config.hidden_size, model.config.num_hidden_layers
    handle = attach(model, method, bottleneck=8, **settings)
    assert handle.parameters_count()["trained"] == blocks * expected(d, 8, settings["kernel"])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="kernel is 0"):
        resolve("audio.conformer", kernel=0)
    with pytest.raises(UsageError, match="expert is 'convpass'"):
        resolve("audio.soft_moa", expert="convpass")
