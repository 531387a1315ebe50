"""A compiled host: one graph, nothing compiled anew for another context or index, the numbers of eager mode."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from adaptsuite import attach, compiled
from adaptsuite.compiled import compile_host, uncompile
from adaptsuite.errors import UsageError
from adaptsuite.testing import HOSTS
from adaptsuite.trainer import Plan, fit


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A backend that generates no code: the graph is what is looked at."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def stirred(family, method, name="default", **settings):
    host = HOSTS[family]() if isinstance(family, str) else family
    handle = attach(host.model, method, name, sample=(host.args, host.kwargs), **settings)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn_like(p), alpha=0.1)
    return host, handle


def test_another_context_compiles_nothing_anew():
    host, handle = stirred("timm_vit", "audio.soft_moa")
    tokens, outputs = 17, []
    masks = [torch.arange(tokens).expand(2, tokens) < n for n in (9, 12, 17)]
    expected = []
    for mask in masks:
        with handle.using(token_mask=mask):
            expected.append(host.forward().detach())
    handle.compile()
    for mask in masks:
        with handle.using(token_mask=mask):
            outputs.append(host.forward().detach())
        assert graphs() == 1
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[2])


def test_another_index_of_rows_compiles_nothing_anew():
    host, _ = stirred("timm_vit", "lora", "a")
    _, handle = stirred(host, "lora", "b")
    expected = {}
    picks = [torch.tensor(p) for p in ([0, 1], [1, 1], [1, 0])]
    with torch.no_grad():
        for pick in picks:
            handle.activate("a", "b", per_sample=pick)
            expected[tuple(pick.tolist())] = host.forward()
        compile_host(host.model)
        for pick in picks:
            handle.activate("a", "b", per_sample=pick)
            torch.testing.assert_close(host.forward(), expected[tuple(pick.tolist())], rtol=1e-4, atol=1e-5)
            assert graphs() == 1


def saved_by(host):
    """(bytes that a forward saves for backward, its output)."""
    own, storages = {p.untyped_storage().data_ptr() for p in host.model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.append(t.untyped_storage()) or t, lambda t: t):
        out = host.forward()
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values()), out


def test_a_lean_graph_keeps_less_and_gives_the_same_gradients(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager_decomp_partition")  # with inductor's partitioner
    host, handle = stirred("timm_vit", "lora", sites=("attn.qkv", "attn.out", "mlp.in", "mlp.out"))
    saved, grads = [], []
    for lean in (False, True):
        torch._dynamo.reset()
        compile_host(host.model, lean=lean)
        host.forward()  # compiles
        size, out = saved_by(host)
        saved.append(size)
        grads.append(torch.autograd.grad(out.square().sum(), list(handle.trained().values())))
    uncompile(host.model)
    expected = torch.autograd.grad(host.forward().square().sum(), list(handle.trained().values()))
    assert saved[1] < 0.75 * saved[0]
    for found in grads:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- the plan


class Data:
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"x": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), "label": torch.tensor(i % 2)}


class Task:
    monitor = "accuracy"

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["label"])

    def predict(self, model, batch):
        return model(batch["x"]).softmax(1)

    def score(self, outputs, targets):
        return {"accuracy": (outputs.argmax(1) == targets).mean()}


def trained(**plan):
    host, handle = stirred("timm_vit", "bottleneck", train_norms=True)
    fit(host.model, Task(), Data(), None, Plan(epochs=1, batch_size=4, device="cpu", **plan), handle=handle)
    assert host.model._compiled_call_impl is None
    return handle.state()


@pytest.mark.parametrize("lean", [False, True])
def test_a_plan_with_compile_trains_one_graph_to_the_same_weights(lean):
    torch.manual_seed(0)
    expected = trained()
    assert graphs() == 0
    torch.manual_seed(0)
    found = trained(compile=True, lean=lean)
    assert graphs() == 1
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_a_lean_plan_trains_to_the_same_weights(monkeypatch):
    from adaptsuite import lean, trainer

    torch.manual_seed(0)
    expected = trained()
    entered = []
    monkeypatch.setattr(trainer, "lean", lambda: entered.append(1) or lean())
    torch.manual_seed(0)
    found = trained(lean=True)
    assert len(entered) == 2 and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_model_without_a_single_graph_is_refused_in_one_line():
    class Branching(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            y = self.inner(x)
            return y if y.sum() > 0 else -y

    host = HOSTS["timm_vit"]()
    model = Branching(copy.deepcopy(host.model))
    handle = attach(model, "lora", sample=host.args)
    with pytest.raises(UsageError, match="does not compile as one graph.*compile=false") as caught:
        fit(model, Task(), Data(), None, Plan(epochs=1, batch_size=4, device="cpu", compile=True), handle=handle)
    assert "\n" not in str(caught.value)
