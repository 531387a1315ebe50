"""SparseAdapter: scores against float64 loops and differences, what is kept, trained and stored, with any method."""

import copy
import pickle

import pytest
import torch

import adaptsuite.sparse_adapter as sparse
from adaptsuite.artifact import load_adapter, read_adapter
from adaptsuite.budget import budget
from adaptsuite.compose import compose
from adaptsuite.errors import UsageError
from adaptsuite.host import attach
from adaptsuite.method import method_class, methods, resolve
from adaptsuite.plan import Plan
from adaptsuite.sparse_matrices import is_masked, matrices, packed, take_mask, unpacked, whole
from adaptsuite.testing import HOSTS, Classify
from adaptsuite.trainer import fit
from adaptsuite.verify import contract, perturb, verify


class Pictures(torch.utils.data.Dataset):
    """Noise with a brighter patch, whose place is the label."""

    def __init__(self, num, seed=0):
        drawn = torch.Generator().manual_seed(seed)
        self.images = torch.randn(num, 3, 32, 32, generator=drawn)
        self.labels = torch.arange(num) % 4
        for image, label in zip(self.images, self.labels, strict=True):
            image[:, 8 * label : 8 * label + 8] += 1.0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


PLAN = Plan(epochs=2, lr=1e-2, batch_size=8, seed=3)


def train(method="sparse:lora", out=None, plan=PLAN, **settings):
    torch.manual_seed(0)
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, method, head="head", **settings)
    return handle, fit(host.model, Classify(), Pictures(32), Pictures(16, 1), plan, out, handle)


def perturbed(method="sparse:lora", family="timm_vit", seed=1, **settings):
    torch.manual_seed(0)
    host = HOSTS[family]()
    handle = attach(host.model, method, sample=(host.args, host.kwargs), **{"score": "random", **settings})
    perturb(handle.trained().values(), seed)
    return host, handle


def output(host, model=None):
    with torch.no_grad():
        return host.forward(model)


# ---- scores, in float64


def toy():
    """Two LoRA sites of a float64 host off their start, and the losses of two batches."""
    torch.manual_seed(0)
    host = HOSTS["nn_encoder"]()
    handle = attach(host.model, "sparse:lora", sample=(host.args, {}), rank=2, sites=("mlp.in",))
    host.model.double()
    perturb(handle.trained().values(), 1)
    x, y = torch.randn(2, 3, 6, 4).double(), torch.randint(5, (2, 3))
    losses = [lambda i=i: torch.nn.functional.cross_entropy(host.model(x[i]), y[i]) for i in range(2)]
    return handle, losses


def entries(handle):
    """Some entries of every matrix: (number of the matrix, its values, place)."""
    for number, place in enumerate(matrices(handle.adapter)):
        for index in (0, 7, 20):
            yield number, whole(place).data.view(-1), index


def test_snip_is_the_change_of_the_loss_with_the_mask():
    handle, losses = toy()
    scores = sparse.snip(handle.method, handle.adapter, losses)
    for number, values, index in entries(handle):
        kept, sides = values[index].item(), []
        for m in (1 + 1e-5, 1 - 1e-5):  # of a mask that was 1
            values[index] = m * kept
            sides.append(float(sum(loss().detach() for loss in losses)))
        values[index] = kept
        assert scores[number].view(-1)[index].item() == pytest.approx(
            abs(sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-11
        )


def test_grasp_is_the_weight_times_the_change_of_the_gradient_along_itself():
    handle, losses = toy()
    scores = sparse.grasp(handle.method, handle.adapter, losses)
    places = [whole(place) for place in matrices(handle.adapter)]

    def gradient():
        total = sum(loss() for loss in losses)
        return [g.detach() for g in torch.autograd.grad(total, places)]

    start, g = [w.detach().clone() for w in places], gradient()
    sides = []
    for step in (1e-5, -1e-5):  # H g by differences
        for w, own, along in zip(places, start, g, strict=True):
            w.data = own + step * along
        sides.append(gradient())
    for number, w in enumerate(start):
        curved = (sides[0][number] - sides[1][number]) / 2e-5
        torch.testing.assert_close(scores[number].detach(), w * curved, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rounds", [1, 3])
def test_synflow_of_lora_equals_loops(monkeypatch, rounds):
    monkeypatch.setattr(sparse, "ROUNDS", rounds)
    handle, _ = toy()
    before = [p.detach().clone() for p in handle.adapter.parameters()]
    scores = sparse.synflow(handle.method, handle.adapter, ())
    pairs = [(b.down.detach().abs(), b.up.detach().abs()) for b in handle.adapter.branches.values()]
    for turn in range(1, rounds + 1):
        expected = []
        for down, up in pairs:
            own = [[torch.zeros_like(t) for t in (down, up)] for _ in range(1)][0]
            for o in range(up.shape[0]):
                for r in range(up.shape[1]):
                    for d in range(down.shape[1]):
                        path = float(up[o, r] * down[r, d]) * 8 / 2  # alpha / rank
                        own[0][r, d] += path
                        own[1][o, r] += path
            expected += own
        flat = torch.cat([t.flatten() for t in expected])
        left = torch.zeros_like(flat)
        left[flat.argsort(descending=True, stable=True)[: round(0.6 ** (turn / rounds) * len(flat))]] = 1
        cut = left.split([t.numel() for t in expected])
        pairs = [(d * cut[2 * i].view_as(d), u * cut[2 * i + 1].view_as(u)) for i, (d, u) in enumerate(pairs)]
    for found, by_hand in zip(scores, expected, strict=True):
        torch.testing.assert_close(found.view_as(by_hand), by_hand, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(a, b) for a, b in zip(before, handle.adapter.parameters(), strict=True))


def test_synflow_needs_branches_that_run_by_themselves():
    with pytest.raises(UsageError, match="synflow runs each branch by itself, which .* does not do: take snip"):
        train("sparse:convpass", score="synflow", score_after=1)


def test_magnitude_keeps_the_largest_of_all_matrices_together():
    handle, _ = toy()
    values = torch.cat([whole(place).detach().flatten() for place in matrices(handle.adapter)])
    handle.method.cut(handle.adapter, sparse.magnitude(handle.method, handle.adapter, ()))
    left = torch.cat([whole(place).detach().flatten() for place in matrices(handle.adapter)])
    threshold = sorted(values.abs().tolist(), reverse=True)[round(0.6 * len(values)) - 1]
    assert torch.equal(left, torch.where(values.abs() >= threshold, values, 0))


@pytest.mark.parametrize(
    ("score", "unseen"),
    [("snip", {"down", "up"}), ("grasp", {"up"}), ("synflow", {"down", "up"}), ("magnitude", {"up"})],
)
def test_a_zero_up_hides_one_side_or_both(score, unseen):
    """The authors score at the start: a LoRA pair would lose all of `up` there, and with it whatever it can say."""
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "sparse:lora")
    loss = lambda: host.forward().square().mean()  # noqa: E731
    at_start = sparse.SCORES[score](handle.method, handle.adapter, [loss])
    names = [name for _, name in matrices(handle.adapter)]
    assert {name for name, s in zip(names, at_start, strict=True) if not s.count_nonzero()} == unseen
    with pytest.raises(UsageError, match=f"4 of 8 matrices are zero after 0 warm-up steps.* by {score}: raise score_a"):
        train(score=score, score_after=0, density=0.3)


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow", "magnitude"])
def test_after_a_few_steps_both_sides_are_kept(score):
    handle, _ = train(score=score, score_after=3)
    kept = {name: 0 for _, name in matrices(handle.adapter)}
    for module, name in matrices(handle.adapter):
        kept[name] += module._parameters[name].numel()
    assert sum(kept.values()) == round(0.6 * 2048) and min(kept.values()) > 100


# ---- what is kept


@pytest.mark.parametrize("density", [0.01, 0.25, 0.6, 1.0])
def test_density_is_the_share_that_is_kept(density):
    """The authors' flag `sparsity` is this share too; a reader of the name would cut what is to stay."""
    for method, vectors in (("sparse:lora", 0), ("sparse_adapter", 2 * (64 + 32))):
        host, handle = perturbed(method, density=density)
        total = 2 * 2 * (2 if "lora" in method else 8) * 32 * 8
        nonzero = sum(int(whole(place).count_nonzero()) for place in matrices(handle.adapter))
        assert nonzero == round(density * total)
        assert handle.parameters_count()["trained"] == round(density * total) + vectors
        assert handle.method.record(handle)["mask"] == {"kept": round(density * total), "of": total}


def test_large_sparse_has_the_matrices_values_of_the_dense_bottleneck():
    host = HOSTS["timm_vit"]()
    _, handle = perturbed("large_sparse")
    dense = attach(host.model, "bottleneck")
    count = lambda h: sum(p.numel() for p in h.trained().values() if p.ndim == 2)  # noqa: E731
    assert handle.method.bottleneck == 4 * dense.method.bottleneck and count(handle) == count(dense)


@pytest.mark.parametrize("settings", [{"density": 1e-5}, {"density": 0.0}, {"density": 1.2}, {"score_after": -1}])
def test_a_mask_that_cannot_be_is_refused(settings):
    said = "keeps none of 2,048 values" if settings.get("density") == 1e-5 else f"{next(iter(settings))} is"
    with pytest.raises(UsageError, match=said) as caught:
        attach(HOSTS["timm_vit"]().model, "sparse:lora", **settings)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match="score is 'snap', it must be snip"):
        resolve("sparse:lora", score="snap")


SMALL = {"kadaptation": {"factor": 4}, "vision.ila": {"locations": (0,)}, "vision.ila_plus": {"locations": (0,)}}
SMALL["vision.ila_plus_plus"] = {"locations": (0,)}
NOT = {
    **dict.fromkeys(("adalora", "increlora"), "changes its tensors while it trains"),
    **dict.fromkeys(("large_sparse", "sparse_adapter"), "is masked already"),
    **dict.fromkeys(("bitfit", "film", "linear", "ssf", "subspace", "audio.prototypes"), "has no matrices of its own"),
    "full": "changes the backbone itself",
    "vl.rpo": "one image tower and one text tower",
}


@pytest.mark.parametrize("inner", methods())
def test_any_method_takes_a_mask_or_says_why_not(inner, tmp_path):
    kind = method_class(inner)
    if inner not in NOT and kind.needs_features:
        pytest.skip("its forward needs the features of another modality: tests/vl")
    family = "hf_ast" if inner.startswith("audio.") else "timm_vit"
    if inner in NOT or kind.reshapes is not False:
        with pytest.raises(UsageError, match=NOT.get(inner, "cannot be|no matrices")):
            perturbed(f"sparse:{inner}", family)
        return
    host, handle = perturbed(f"sparse:{inner}", family, density=0.3, **SMALL.get(inner, {}))
    total = sum(whole(place).numel() for place in matrices(handle.adapter))
    assert sum(m._parameters[n].numel() for m, n in matrices(handle.adapter)) == round(0.3 * total)
    handle.save(tmp_path / "a")
    other = load_adapter(HOSTS[family]().model, tmp_path / "a", sample=(host.args, host.kwargs))
    assert torch.equal(output(host, other.model), output(host))
    assert output(HOSTS[family]()).shape == output(host).shape
    assert not torch.equal(output(HOSTS[family]()), output(host))


def test_peft_s_tuners_keep_their_tensors():
    with pytest.raises(UsageError, match="peft:LOKR keeps its tensors as peft does"):
        resolve("sparse:peft:LOKR")


QUICK = ("timm_eva", "hf_ast", "hf_bert")


@pytest.mark.parametrize("method", ["sparse:lora", "sparse_adapter"])
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in HOSTS])
def test_masked_methods_keep_their_promises(family, method):
    facts = contract(HOSTS[family], method, score="random")
    assert facts["starts_equal"] == "ok" and facts["copies"] == "ok"


@pytest.mark.parametrize(
    ("family", "method"), [("timm_vit", "sparse:convpass"), ("timm_vit", "sparse:vpt"), ("hf_ast", "sparse:compacter")]
)
def test_other_methods_keep_their_promises_under_a_mask(family, method):
    contract(HOSTS[family], method, score="random")


# ---- training


@pytest.mark.parametrize("score", ["snip", "random"])
def test_the_mask_is_fixed_and_the_start_is_the_backbone(score, monkeypatch):
    torch.manual_seed(0)
    host, seen = HOSTS["timm_vit"](), []
    plain = output(host)
    handle = attach(host.model, "sparse:lora", head="head", score=score, score_after=2)
    start = {id(m): whole((m, "down")).detach().clone() for m, n in matrices(handle.adapter) if n == "down"}
    begin = type(handle.method).begin

    def begun(self, optimizer, handle, loss):
        begin(self, optimizer, handle, loss)
        for module, name in matrices(handle.adapter):
            now = whole((module, name)).detach()
            seen.append(now != 0 if name == "down" else None)
            if name == "down":
                assert torch.equal(now, torch.where(seen[-1], start[id(module)], 0))
        with torch.no_grad():
            host.model.eval()
            assert torch.equal(host.forward(), plain)  # the head too is where it was
            host.model.train()
        assert not optimizer.state and all(p.grad is None for p in handle.trained().values())

    monkeypatch.setattr(type(handle.method), "begin", begun)
    fit(host.model, Classify(), Pictures(32), None, PLAN, handle=handle)
    assert bool(seen) == (score == "snip")
    for (module, name), mask in zip(matrices(handle.adapter), seen, strict=False):
        if mask is not None:
            assert torch.equal(whole((module, name)) != 0, mask)
    assert handle.method.settled(handle) and verify(handle).ok


def test_only_what_is_kept_decays_trains_and_is_remembered():
    _, handle = perturbed(density=0.3)
    groups = handle.trainable()
    assert all(p.ndim == 2 for g in groups for p in g["params"])  # matrices decay, vectors do not
    assert sum(p.numel() for g in groups for p in g["params"]) == round(0.3 * 2048)


class Stop(Exception):
    pass


def test_a_run_that_was_stopped_ends_as_the_unbroken_one(tmp_path):
    unbroken, _ = train(out=tmp_path / "unbroken", score_after=2)

    def stop(row):
        raise Stop

    torch.manual_seed(0)
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "sparse:lora", head="head", score_after=2)
    with pytest.raises(Stop):
        parts = Pictures(32), Pictures(16, 1)
        fit(host.model, Classify(), *parts, PLAN, tmp_path / "stopped", handle, on_epoch=stop)
    again, _ = train(out=tmp_path / "stopped", score_after=2)
    state, expected = again.state(), unbroken.state()
    assert state.keys() == expected.keys() and all(torch.equal(state[n], expected[n]) for n in state)


def test_a_state_without_masks_makes_the_matrices_whole_again():
    """What a second learning rate of a grid starts from."""
    host = HOSTS["timm_vit"]()
    handle = attach(host.model, "sparse:lora")
    fresh = {n: t.clone() for n, t in handle.state().items()}
    handle.method.cut(handle.adapter, [torch.rand(whole(p).shape) for p in matrices(handle.adapter)])
    sparse_state = {n: t.clone() for n, t in handle.state().items()}
    handle.load_state(fresh)
    assert not any(map(is_masked, matrices(handle.adapter))) and handle.parameters_count()["trained"] == 2048
    assert all(torch.equal(t, fresh[n]) for n, t in handle.state().items())
    with pytest.raises(ValueError, match="missing"):
        handle.load_state({n: t for n, t in sparse_state.items() if not n.endswith("up")})
    assert all(torch.equal(t, fresh[n]) for n, t in handle.state().items())
    handle.load_state(sparse_state)
    assert all(torch.equal(t, sparse_state[n]) for n, t in handle.state().items())


# ---- files, merging, sums, batches


@pytest.mark.parametrize("density", [0.01, 0.25, 0.6])
def test_the_file_holds_values_and_places_and_the_budget_says_so(tmp_path, density):
    host, handle = perturbed("sparse_adapter", density=density)
    folder, size = handle.save(tmp_path / "a"), 2 * 2 * 64 * 32
    stored = (folder / "adapter.safetensors").stat().st_size
    said = budget(HOSTS["timm_vit"]().model, "sparse_adapter", score="random", density=density)
    names = read_adapter(folder).tensors
    places = sum(t.numel() * t.element_size() for n, t in names.items() if n.endswith("_at"))
    assert places == (size / 8 if density > 1 / 32 else 4 * round(density * size))
    payload = 4 * (round(density * size) + 2 * (64 + 32)) + places
    assert sum(t.numel() * t.element_size() for t in names.values()) == payload
    assert abs(stored - payload) < 1300 and abs(said.adapter_bytes - stored) <= 16  # digits of offsets in the header
    assert read_adapter(folder).extra["mask"] == {"kept": round(density * size), "of": size}


def test_places_are_indices_or_bits_whichever_is_less():
    for size, kept in ((1000, 10), (1000, 31), (1000, 32), (1001, 500), (7, 7), (7, 0)):
        mask = torch.zeros(size, dtype=torch.bool)
        mask[torch.randperm(size)[:kept]] = True
        stored = packed(mask)
        assert stored.dtype == (torch.int32 if 4 * kept < size / 8 else torch.uint8)
        assert torch.equal(unpacked(stored, size), mask)


def test_a_masked_adapter_merges_into_the_weight_of_its_zeros_too():
    host, handle = perturbed("sparse:lora", density=0.3)
    before = output(host)
    for branch in handle.adapter.branches.values():
        torch.testing.assert_close(branch.delta(), branch.up @ branch.down * branch.scale)
    handle.merge()
    torch.testing.assert_close(output(host), before, rtol=1e-5, atol=1e-5)
    handle.unmerge()
    assert torch.equal(output(host), before)


@pytest.mark.parametrize(("method", "inner"), [("sparse:lora", "lora"), ("sparse_adapter", "bottleneck")])
def test_masked_adapters_are_summed_as_what_they_are_under_the_mask(tmp_path, method, inner):
    changes = []
    for name, seed in (("a", 1), ("b", 2)):
        host, handle = perturbed(method, seed=seed)
        handle.save(tmp_path / name)
        changes.append(handle)
    found = compose("0.5*a - 2*b", {"a": tmp_path / "a", "b": tmp_path / "b"})
    assert found.method.name == inner and not any(n.endswith("_at") for n in found.tensors)
    summed = load_adapter(HOSTS["timm_vit"]().model, found)
    for key, branch in summed.adapter.branches.items():
        a, b = (handle.adapter.branches[key] for handle in changes)
        if inner == "lora":
            torch.testing.assert_close(branch.delta(), 0.5 * a.delta() - 2 * b.delta(), rtol=1e-5, atol=1e-6)
        else:
            x = torch.randn(3, 32)
            torch.testing.assert_close(branch.adapt(x, None), 0.5 * a.adapt(x, None) - 2 * b.adapt(x, None))


@pytest.mark.parametrize("method", ["sparse:lora", "sparse_adapter"])
def test_rows_of_a_batch_may_have_masked_adapters_of_their_own(method):
    host, handle = perturbed(method)
    other = attach(host.model, method, name="other", score="random")
    perturb(other.trained().values(), 2)
    alone = []
    for name in ("default", "other"):
        handle.activate(name)
        alone.append(output(host))
    handle.activate("default", "other", per_sample=torch.tensor([1, 0]))
    mixed = output(host)
    torch.testing.assert_close(mixed, torch.stack([alone[1][0], alone[0][1]]), rtol=1e-5, atol=1e-5)


def test_settings_and_modules_are_copied_and_pickled():
    method = resolve("sparse:audio.soft_moa", density=0.3)
    assert pickle.loads(pickle.dumps(method)) == method == copy.deepcopy(method)
    layer = torch.nn.Linear(5, 3)
    take_mask(layer, "weight", torch.arange(15) % 2 == 0)
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin.weight, layer.weight) and int(twin.weight.count_nonzero()) == 8
    assert isinstance(twin, torch.nn.Linear) and torch.equal(layer(torch.eye(5)), twin(torch.eye(5)))
