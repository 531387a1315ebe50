"""Several adapters in one batch: each row comes out as it does alone with its adapter."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from adaptsuite import attach, get_handle, load_adapter
from adaptsuite.errors import UsageError
from adaptsuite.host import place
from adaptsuite.lean import make_lean
from adaptsuite.testing import HOSTS
from adaptsuite.verify import _perturb

LORA = [("lora", {"rank": 2, "alpha": 3.0}), ("lora", {"rank": 3, "sites": ("attn.qkv", "attn.out", "mlp.in")})]
BOTTLENECK = [("bottleneck", {"bottleneck": 4}), ("bottleneck", {"bottleneck": 6, "start": "xavier"})]
SOFT_MOA = [("audio.soft_moa", {"experts": 3}), ("audio.soft_moa", {"experts": 2, "slots": 2})]
BITFIT, FILM, SSF = [("bitfit", {})] * 2, [("film", {})] * 2, [("ssf", {})] * 2
MIXED = [LORA[0], LORA[1], BOTTLENECK[0], SSF[0], BITFIT[0], FILM[0], SOFT_MOA[0]]
SHARED = [("kadaptation", {"factor": 4}), ("fact", {"rank": 2}), ("subspace", {"dims": 16})]
KINDS = {"lora": LORA, "bottleneck": BOTTLENECK, "soft_moa": SOFT_MOA, "bitfit": BITFIT, "film": FILM, "ssf": SSF}
QUICK = ("timm_vit", "timm_swin", "timm_eva", "hf_ast", "open_clip", "nn_encoder")  # called, windows, read, packed


def tiny(family: str):
    host = HOSTS[family]()
    if family == "conformer":  # its masks are as long as the longest of a batch
        host.args = (host.args[0], torch.tensor([6, 6]))
    return host


def adapted(host, specs) -> list:
    handles = []
    for i, (method, settings) in enumerate(specs):
        handles.append(attach(host.model, method, f"a{i}", sample=(host.args, host.kwargs), **settings))
        _perturb(handles[-1], seed=i + 1)
    return handles


def outputs(host, pick: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
    """Of these rows of the host's input."""
    args, kwargs = tree_map(lambda t: t[pick] if isinstance(t, torch.Tensor) else t, (host.args, host.kwargs))
    return host.read((host.model if model is None else model)(*args, **kwargs))


def alone(host, handle, index: list[int], pick: torch.Tensor) -> list[torch.Tensor]:
    """The output of every row by itself, with the adapter of its number."""
    found = []
    for row, i in enumerate(index):
        handle.activate(*([] if i < 0 else [f"a{i}"]))
        with handle.disabled() if i < 0 else torch.enable_grad():
            found.append(outputs(host, pick[row : row + 1]))
    return found


def compare(family: str, specs) -> None:
    host = tiny(family)
    handle = adapted(host, specs)[0]
    index = [0, 1, -1, *range(len(specs)), 0]
    pick = torch.arange(len(index)) % 2
    with torch.no_grad():
        apart = alone(host, handle, index, pick)
        handle.activate(per_sample=torch.tensor(index))
        together = outputs(host, pick)
    rows = len(together) // len(index)
    assert not torch.allclose(apart[0], apart[2], rtol=1e-4, atol=1e-4), "the adapter must do something"
    for own, mixed in zip(apart, together.split(rows), strict=True):
        torch.testing.assert_close(mixed, own, rtol=0, atol=1e-5 * float(own.detach().abs().max()))


@pytest.mark.parametrize("family", QUICK)
@pytest.mark.parametrize("specs", [LORA, BITFIT, MIXED], ids=["lora", "bitfit", "mixed"])
def test_each_row_comes_out_as_alone_with_its_adapter(family, specs):
    compare(family, specs)


@pytest.mark.parametrize("spec", SHARED, ids=[method for method, _ in SHARED])
def test_so_it_does_with_factors_that_sites_share(spec):
    compare("timm_vit", [spec, spec])


@pytest.mark.slow
@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("kind", [*KINDS, "mixed", "conformer", "dense_moa"])
def test_so_it_does_on_every_family(family, kind):
    audio = {"conformer": [("audio.conformer", {})] * 2, "dense_moa": [("audio.dense_moa", {})] * 2}
    compare(family, {**KINDS, **audio, "mixed": MIXED}[kind])


def test_grids_of_image_tokens_reach_the_rows():
    compare("timm_vit", [("convpass", {}), ("convpass", {"bottleneck": 5})])


def test_an_embedded_backbone_with_heads_of_different_classes():
    from adaptsuite.recipe import Recipe
    from adaptsuite.vision.pipeline import DOMAIN

    model = DOMAIN.model(Recipe(domain="vision", backbone="embedded:vision-tiny", seeds=(0,)), list("abcd"))
    sample = DOMAIN.sample(model)
    images = torch.rand(3, *sample[0].shape[1:], generator=torch.Generator().manual_seed(0))
    kinds = {"four": "lora", "four_too": "bitfit"}
    handles = [attach(model, kind, name, sample, head="head") for name, kind in kinds.items()]
    for i, handle in enumerate(handles):
        _perturb(handle, seed=i)
    smaller = {k: v[:2] if k.startswith("tensors.head/") else v for k, v in handles[0].state().items()}
    lora = handles[0]
    place(model, lora.method, lora.sites, dict(lora.adapter.kinds), ("head",), "two", sample, smaller)
    with torch.no_grad():
        apart = []
        for name, image in zip(("four", "two", "four_too"), images, strict=True):
            handles[0].activate(name)
            apart.append(model(image[None])[0])
        handles[0].activate(per_sample=["four", "two", "four_too"])
        together = model(images)
    assert [len(own) for own in apart] == [4, 2, 4] and together.shape == (3, 4)
    assert together[1, 2:].eq(float("-inf")).all(), "classes that a row's head does not have"
    for own, mixed in zip(apart, together, strict=True):
        torch.testing.assert_close(mixed[: len(own)], own, rtol=1e-5, atol=1e-5)


# ---- gradients


@pytest.mark.parametrize(("specs", "lean"), [(LORA, False), (MIXED, False), (MIXED, True)])
def test_gradients_reach_each_adapter_from_its_rows_alone(specs, lean):
    host = tiny("timm_vit")
    handles = adapted(host, specs)
    index = [0, -1, *range(len(specs))]
    pick = torch.arange(len(index)) % 2
    expected = {i: [torch.zeros_like(p) for p in h.trained().values()] for i, h in enumerate(handles)}
    for row, i in enumerate(index):
        if i >= 0:
            handles[0].activate(f"a{i}")
            loss = outputs(host, pick[row : row + 1]).square().sum()
            grads = torch.autograd.grad(loss, list(handles[i].trained().values()), allow_unused=True)
            expected[i] = [e if g is None else e + g for e, g in zip(expected[i], grads, strict=True)]
    if lean:
        make_lean(handles[0].bank)
    handles[0].activate(per_sample=torch.tensor(index))
    outputs(host, pick).square().sum().backward()
    for i, handle in enumerate(handles):
        for (name, p), grad in zip(handle.trained().items(), expected[i], strict=True):
            own = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(own, grad, rtol=1e-4, atol=1e-5, msg=f"a{i} {name}")
    assert all(p.grad is None for n, p in host.model.named_parameters() if "adapter_bank" not in n)


@pytest.mark.parametrize("specs", [LORA, BOTTLENECK, BITFIT], ids=["lora", "bottleneck", "bitfit"])
def test_a_checkpointed_block_is_recomputed_with_the_index_of_its_own_forward(specs):
    host = tiny("timm_vit")
    handles = adapted(host, specs)
    host.model.set_grad_checkpointing(True)
    host.model.train()
    gradients = []
    for between in (False, True):
        handles[0].activate(per_sample=torch.tensor([0, 0]))
        loss = outputs(host, torch.tensor([0, 1])).square().sum()
        if between:
            handles[0].activate(per_sample=torch.tensor([1, 1]))
            outputs(host, torch.tensor([0, 1]))
        host.model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in handles[0].trained().values()])
        assert all(p.grad is None or not p.grad.any() for p in handles[1].trained().values())
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_batch_statistics_are_refused_in_training():
    host = tiny("hf_ast")
    handles = adapted(host, [("audio.conformer", {})] * 2)
    handles[0].activate(per_sample=torch.tensor([0, 1]))
    host.forward()
    host.model.train()
    with pytest.raises(UsageError, match="batch statistics of one adapter.*train them one by one"):
        host.forward()


# ---- stacks


@pytest.fixture
def stacks(monkeypatch):
    """How many stacks were made."""
    from adaptsuite.stacks import Stack

    made, original = [], Stack._stacked
    monkeypatch.setattr(Stack, "_stacked", lambda self: made.append(1) or original(self))
    return made


def test_adapters_are_stacked_once_and_again_when_one_of_them_changes(stacks, tmp_path):
    host = tiny("timm_vit")
    handles = adapted(host, LORA)
    with torch.no_grad():
        handles[0].activate(per_sample=torch.tensor([0, 1]))
        first, made = host.forward(), len(stacks)
        handles[0].activate(per_sample=["a1", None])
        host.forward()
        assert len(stacks) == made, "a new index must stack nothing"
        _perturb(handles[0], seed=7)
        handles[0].activate(per_sample=torch.tensor([0, 1]))
        second = host.forward()
        assert not torch.allclose(first[0], second[0]) and torch.equal(first[1], second[1])
        handles[0].load_state({k: v * 0 for k, v in handles[0].state().items()})
        third = host.forward()  # without activate
        with handles[0].disabled():
            torch.testing.assert_close(third[0], host.forward()[0])
        torch.testing.assert_close(host.forward(), third)  # the rows are back
        handles[1].save(tmp_path / "one")
        handles[1].detach()
        handles[1] = load_adapter(host.model, tmp_path / "one", "later")
        handles[0].activate(per_sample=["a0", "later"])
        torch.testing.assert_close(host.forward()[1], first[1])


def test_an_optimiser_step_shows_in_the_next_forward_without_gradients():
    host = tiny("timm_vit")
    handles = adapted(host, LORA)
    handles[0].activate(per_sample=torch.tensor([0, 1]))
    optimizer = torch.optim.SGD(handles[1].trained().values(), lr=0.5)
    with torch.no_grad():
        before = host.forward()
    host.forward().square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = host.forward()
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])


@pytest.mark.parametrize(
    "specs",
    [[LORA[0], LORA[1], ("linear", {"head": "head"})], pytest.param(MIXED[2:], marks=pytest.mark.slow)],
    ids=["lora", "mixed"],
)
def test_a_new_index_does_not_compile_anything_again(specs):
    host = tiny("timm_vit")
    handles = adapted(host, specs)
    pick = torch.tensor([0, 1, 0])
    compiled = torch.compile(host.model, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for index in ([0, 1, 2], [2, 1, -1], [0, 0, 0]):
            handles[0].activate(per_sample=torch.tensor(index))
            torch.testing.assert_close(outputs(host, pick, compiled), outputs(host, pick))
        _perturb(handles[2], seed=9)
        handles[0].activate(per_sample=torch.tensor([2, 2, 2]))
        torch.testing.assert_close(outputs(host, pick, compiled), outputs(host, pick))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_a_host_is_copied_and_pickled_with_its_rows():
    host = tiny("open_clip")
    handles = adapted(host, MIXED)
    with torch.no_grad():
        handles[0].activate(per_sample=torch.tensor([1, 4]))
        expected = host.forward()
        twin = copy.deepcopy(host.model)
        _perturb(handles[1], seed=11)
        assert not torch.allclose(host.forward(), expected)
        torch.testing.assert_close(outputs(host, torch.arange(2), twin), expected)
        file = io.BytesIO()
        torch.save(twin, file)
        again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        torch.testing.assert_close(outputs(host, torch.arange(2), again), expected)
        get_handle(again, "a0").activate()
    handles[0].activate()
    assert "forward" not in {k for m in host.model.modules() for k in vars(m)}, "nothing stands in any more"


# ---- refusals


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        ("prompt", {"tokens": 2}, "changes what a whole block gets"),
        ("prefix", {"tokens": 2}, "changes what a whole block gets"),
        ("vision.ila", {"locations": (0,)}, "joins tokens"),
        ("full", {}, "changes the backbone itself"),
    ],
)
def test_what_rows_cannot_have_of_their_own_is_refused_with_the_reason(method, settings, reason):
    host = tiny("timm_vit")
    handle = attach(host.model, method, "one", **settings)
    if method != "full":
        attach(host.model, "lora", "two")
    handle.activate()
    expected = host.forward()
    with pytest.raises(UsageError, match=f"'one' cannot be one of several in a batch: method '{method}' {reason}"):
        handle.activate(per_sample=torch.tensor([0, 0]))
    assert torch.equal(host.forward(), expected), "a refusal changes nothing"


def test_indices_that_cannot_be_are_refused():
    host = tiny("timm_vit")
    handle = adapted(host, LORA)[0]
    for rows, match in (
        (torch.tensor([0, 2]), "-1 to 1 are expected"),
        (torch.tensor([-2, 0]), "-1 to 1 are expected"),
        (torch.tensor([0.0, 1.0]), "whole numbers"),
        (torch.tensor([[0, 1]]), "whole numbers"),
        (torch.tensor([], dtype=torch.long), "whole numbers"),
    ):
        with pytest.raises(UsageError, match=match):
            handle.activate(per_sample=rows)
    with pytest.raises(LookupError, match="no adapter 'a7' among those of the rows; did you mean"):
        handle.activate(per_sample=["a0", "a7"])
    handle.activate(per_sample=torch.tensor([0]))
    with pytest.raises(UsageError, match="per_sample has 1 rows, the batch has 2"):
        host.forward()


def test_rows_must_be_named_anew_after_an_adapter_has_gone():
    host = tiny("timm_vit")
    handles = adapted(host, [*LORA, BOTTLENECK[0]])
    handles[0].activate(per_sample=torch.tensor([1, 1]))
    handles[0].detach()
    with pytest.raises(UsageError, match="other adapters are active than when the rows were named"):
        host.forward()
    handles[1].activate(per_sample=["a1", "a2"])
    host.forward()
    assert host.model.adapter_bank.by_row.names == ["a1", "a2"]


def test_another_thread_must_name_its_own_rows():
    host = tiny("timm_vit")
    handle = adapted(host, LORA)[0]
    with torch.no_grad():
        handle.activate(per_sample=torch.tensor([1, 1]))
        expected, found = host.forward(), []

        def other():
            try:
                host.forward()
            except UsageError as e:
                found.append(str(e))
            handle.activate(per_sample=torch.tensor([0, 0]))
            host.forward()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert "in the thread that runs them" in found[0]
        assert torch.equal(host.forward(), expected), "the rows of one thread are not another's"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_in_other_precisions(dtype):
    host = tiny("timm_vit")
    host.model, host.args = host.model.to(dtype), (host.args[0].to(dtype),)
    handle = adapted(host, [LORA[0], LORA[1], BOTTLENECK[0]])[0]
    pick, index = torch.tensor([0, 1, 0]), [0, 1, 2]
    with torch.no_grad():
        apart = torch.cat(alone(host, handle, index, pick))
        handle.activate(per_sample=torch.tensor(index))
        together = outputs(host, pick)
    assert together.dtype == dtype
    exact = {torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(together, apart, rtol=exact, atol=exact)
