"""Random subspaces: isometry, seeds, and the local intrinsic dimension of a toy where one block matters."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adaptsuite.artifact import load_adapter, save_adapter
from adaptsuite.errors import AdapterError, UsageError
from adaptsuite.host import attach
from adaptsuite.method import resolve
from adaptsuite.plan import Plan
from adaptsuite.sites import Site
from adaptsuite.subspace import Projection, SubspaceBranch, local_intrinsic_dimension
from adaptsuite.testing import HOSTS

SITES = [Site("mlp.in", "a", 0, 4, 6, "weight"), Site("mlp.out", "b", 0, 6, 4, "weight")]


def branches_of(dims, seed=0, sites=SITES):
    shared = Projection(sites, dims, seed).double()
    branches = [SubspaceBranch(site, shared) for site in sites]
    with torch.no_grad():
        shared.theta.copy_(torch.randn(dims, generator=torch.Generator().manual_seed(7)))
    return shared, branches


def changes(branches):
    return torch.cat([b.delta().flatten() for b in branches])


@pytest.mark.parametrize("dims", [1, 2, 5, 7, 48])
def test_the_projection_is_an_isometry(dims):
    shared, branches = branches_of(dims)
    rows = [torch.autograd.grad(c, shared.theta, retain_graph=True)[0] for c in changes(branches)]
    jacobian = torch.stack(rows)  # P (N, d)
    torch.testing.assert_close(jacobian.T @ jacobian, torch.eye(dims, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert (jacobian != 0).sum(1).tolist() == [1] * 48  # each weight follows one value
    moved = (jacobian != 0).sum(0)
    assert int(moved.max() - moved.min()) <= 1


def test_the_change_equals_its_formula():
    shared, branches = branches_of(5)
    places = torch.cat([b.places for b in branches]).tolist()
    counts = [sum(place // 2 == value for place in places) for value in range(5)]
    theta = shared.theta.tolist()
    expected = [(-1) ** (place % 2) * theta[place // 2] / math.sqrt(counts[place // 2]) for place in places]
    torch.testing.assert_close(changes(branches), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert branches[0].delta().shape == (6, 4) and branches[1].delta().shape == (4, 6)


def test_the_seed_decides():
    same, other = (changes(branches_of(5, seed)[1]) for seed in (0, 1))
    assert torch.equal(same, changes(branches_of(5, 0)[1])) and not torch.equal(same, other)
    assert branches_of(5, 0)[0].checksum != branches_of(5, 1)[0].checksum


def test_only_the_vector_and_a_checksum_are_stored():
    handle = attach(HOSTS["timm_vit"]().model, "subspace", dims=7)
    assert {name: v.numel() for name, v in handle.state().items()} == {"shared.theta": 7, "shared.checksum": 1}
    assert handle.parameters_count()["trained"] == 7


def test_other_random_draws_are_refused_on_loading(tmp_path, monkeypatch):
    handle = attach(HOSTS["timm_vit"]().model, "subspace", dims=7)
    save_adapter(handle, tmp_path / "adapter")
    load_adapter(HOSTS["timm_vit"]().model, tmp_path / "adapter")
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **options: randperm(n, **options).flip(0))  # another torch, say
    with pytest.raises(AdapterError, match="cannot be drawn again from the seed"):
        load_adapter(HOSTS["timm_vit"]().model, tmp_path / "adapter")


def test_a_step_is_as_long_as_one_of_all_weights():
    """Adam's first step moves each value by its rate: then each weight moves by the plan's."""
    handle = attach(HOSTS["timm_vit"]().model, "subspace", dims=64, sites=("mlp.in",))
    (group,) = handle.trainable()
    assert group["lr_scale"] == pytest.approx(math.sqrt(2 * 32 * 128 / 64))
    with torch.no_grad():
        handle.adapter.shared.theta.fill_(group["lr_scale"])
    change = next(iter(handle.adapter.branches.values())).delta()
    torch.testing.assert_close(change.abs(), torch.ones(128, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": 0}, "dims is 0, it must be at least 1"),
        ({"dims": 3000, "sites": ("attn.out",)}, "dims is 3000, it must be at most 2048, the number of weights"),
        ({"sites": "mlp"}, "subspace moves weights, site 'mlp' is a module"),
        ({"blocks": (2,)}, "blocks is .2,., it must be among 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        attach(HOSTS["timm_vit"]().model, "subspace", **settings)


# ---- local intrinsic dimension


class Images:
    """Noise that a teacher has labelled."""

    def __init__(self, teacher, num, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(num, 3, 16, 16, generator=generator)
        with torch.no_grad():
            self.outputs = teacher(self.images)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.outputs[index]}


class Imitate:
    """Regression on the teacher's logits; the score is the share of their variance that is explained."""

    monitor = "r2"

    def loss(self, model, batch):
        return F.mse_loss(model(batch["image"]), batch["label"])

    def predict(self, model, batch):
        return model(batch["image"])

    def score(self, outputs, targets):
        return {"r2": float(1 - ((outputs - targets) ** 2).mean() / np.var(targets))}


@pytest.fixture(scope="module")
def toy():
    """Three blocks, of which only the middle one gives anything to the residual stream; the task is to give the logits
    of a teacher whose values (attn.v) are others there."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    shape = dict(embed_dim=16, depth=3, num_heads=2, num_classes=4, init_values=1.0)
    model = VisionTransformer(16, 8, **shape).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02 if p.ndim < 2 else 0.2)
        for block in (model.blocks[0], model.blocks[2]):
            block.ls1.gamma.zero_(), block.ls2.gamma.zero_()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[32:].add_(torch.randn(16, 16), alpha=0.5)  # v
    train, val = Images(model, 64, 1), Images(model, 64, 2)
    model.load_state_dict(state)
    return model, train, val


PLAN = Plan(epochs=15, lr=0.02, batch_size=32, weight_decay=0.0, warmup=0.0, device="cpu")


def test_the_block_that_matters_is_measured_and_the_others_have_no_dimension(toy):
    model, train, val = toy
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rows = local_intrinsic_dimension(
        model, Imitate(), train, val, PLAN, sites=("attn.q", "attn.v"), dims=(2, 128, 512), head=()
    )
    assert [row["part"] for row in rows] == ["block 0", "block 1", "block 2"]
    assert [row["weights"] for row in rows] == [2 * 16 * 16] * 3
    for row in (rows[0], rows[2]):
        assert row["dimension"] is None and row["scores"] == {} and row["full"] == pytest.approx(row["start"], abs=1e-4)
    middle = rows[1]
    assert middle["full"] > middle["start"] + 0.1 and middle["dimension"] in (128, 512)
    assert middle["scores"][2] < middle["start"] + 0.9 * (middle["full"] - middle["start"])
    assert not hasattr(model, "adapter_bank")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_parts_can_be_roles_and_the_head_is_trained_beside(toy):
    model, train, val = toy
    plan = Plan(epochs=1, lr=0.01, batch_size=64, device="cpu")
    rows = local_intrinsic_dimension(
        model, Imitate(), train, val, plan, sites=("attn.v", "mlp.in"), dims=(4,), by="role", share=0.0, least=0.0
    )
    assert [(row["part"], row["blocks"], row["weights"]) for row in rows] == [
        ("attn.v", None, 3 * 16 * 16),
        ("mlp.in", None, 3 * 16 * 64),
    ]
    untrained = local_intrinsic_dimension(model, Imitate(), train, val, plan, sites=("attn.v",), dims=(), head=())
    assert rows[0]["start"] > untrained[0]["start"]  # the head alone has learnt something


def test_kadaptation_selects_the_block_that_matters(toy):
    model, train, val = toy
    method = resolve("kadaptation", factor=4, select=1, select_epochs=15)
    found = method.prepare(model, Imitate(), train, val, PLAN)
    assert found == resolve("kadaptation", factor=4, blocks=(1,), select_epochs=15)
    assert resolve("kadaptation").prepare(model, Imitate(), train, val, PLAN) == resolve("kadaptation")
    assert {s.block for s in attach(model, found).sites} == {1}
    with pytest.raises(UsageError, match="select is 4, it must be at most 3"):
        resolve("kadaptation", factor=4, select=4, select_epochs=1).prepare(model, Imitate(), train, val, PLAN)


def test_the_task_shows_how_the_model_is_called(toy):
    """A model of no known library, which `attach` alone would ask a sample for."""

    class Wrapped(torch.nn.Module):
        def forward(self, images):
            return self.backbone(images)

    model, train, val = toy
    wrapped = Wrapped()
    wrapped.backbone = model
    plan = Plan(epochs=1, lr=0.01, batch_size=64, device="cpu")
    (row,) = local_intrinsic_dimension(wrapped, Imitate(), train, val, plan, sites=("attn.v",), dims=(), by="role")
    assert row["weights"] == 3 * 16 * 16
    with pytest.raises(LookupError, match="pass sample="):
        attach(wrapped, "lora")


def test_validation_rows_are_needed(toy):
    model, train, _ = toy
    with pytest.raises(UsageError, match="give validation rows"):
        local_intrinsic_dimension(model, Imitate(), train, None, PLAN)
