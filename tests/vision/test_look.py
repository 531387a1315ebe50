"""Attention as it is, rollout as it is defined, Grad-CAM where the evidence is; and a model that is left as it was."""

import copy
import math

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adaptsuite import attach
from adaptsuite.errors import UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.image_heads import LayersHead
from adaptsuite.image_task import HeadSettings, ImageModel
from adaptsuite.testing import HOSTS
from adaptsuite.vision.grid import feature_map, watched
from adaptsuite.vision.look import attention_maps, grad_cam, own_tokens, reader, rollout, spread, still

SIZE = (32, 48)


def vit(depth=3, **more):
    torch.manual_seed(0)
    shape = dict(img_size=SIZE, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=0)
    return sharpened(VisionTransformer(**shape, **more))


def eva(**more):
    torch.manual_seed(0)
    shape = dict(img_size=SIZE, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=0)
    return sharpened(Eva(**shape, use_rot_pos_emb=True, **more))


def sharpened(model):
    """Attention that is far from even."""
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(30)
    return model.eval()


def task(backbone, classes=4, **head):
    torch.manual_seed(1)
    return ImageModel(backbone, FrontEnd(size=SIZE), classes, HeadSettings(**head)).eval()


def adapted(model, method, **settings):
    return attach(model, method, sample=torch.rand(1, 3, *SIZE), **settings)


# ---- attention


@pytest.mark.parametrize("fused", [True, False])
def test_the_maps_are_the_softmax_of_queries_and_keys(fused):
    model, image, expected = vit(qk_norm=True, reg_tokens=2).double(), torch.rand(2, 3, *SIZE).double(), []
    for block in model.blocks:
        block.attn.fused_attn = fused

        def hook(attn, args):
            q, k, _ = attn.qkv(args[0]).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            expected.append((attn.q_norm(q) @ attn.k_norm(k).mT / math.sqrt(8)).softmax(-1))

        block.attn.register_forward_pre_hook(hook)
    with torch.no_grad():
        plain = model(image)
        expected.clear()
        with attention_maps(model) as maps:
            seen = model(image)
    torch.testing.assert_close(seen, plain, rtol=1e-12, atol=1e-12)
    assert len(maps) == 3 and maps[0].shape == (2, 2, 99, 99)
    for found, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("family", ["timm_eva", "timm_eva_split", "timm_beit", "timm_siglip", "hf_vit"])
def test_rows_sum_to_one_and_the_output_stays_in_every_family(family):
    host = HOSTS[family]()
    with torch.no_grad():
        before = host.forward()
        with attention_maps(host.model) as maps:
            after = host.forward()
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert len(maps) == 2
    for attention in maps:
        assert attention.shape[-1] == attention.shape[-2]
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


def test_windows_and_networks_without_blocks_are_refused_in_one_line():
    host = HOSTS["timm_swin"]()
    with pytest.raises(UsageError, match="SwinTransformerBlock attends within windows"), attention_maps(host.model):
        host.forward()
    with pytest.raises(UsageError, match="ResNet has no transformer blocks"):
        rollout(timm.create_model("test_resnet").eval(), torch.rand(1, 3, 64, 64))


def test_keys_of_prefixes_and_prompts_are_left_out_of_the_rollout():
    image = torch.rand(2, 3, *SIZE)
    for method, settings, longer in (
        ("prefix", {"tokens": 5}, (97, 102)),
        ("vpt", {"tokens": 5}, (102, 102)),
        ("prompt", {"tokens": 5, "deep": False}, (102, 102)),
    ):
        model = vit()
        attach(model, method, **settings)
        with attention_maps(model) as maps, torch.no_grad():
            model(image)
        assert [a.shape[2:] for a in maps] == [longer] * 3
        own = own_tokens(maps[0], 97, 1)
        first = maps[0][:, :, [0, *range(longer[0] - 96, longer[0])]]
        first = first[..., [longer[1] - longer[0] if method == "prefix" else 0, *range(longer[1] - 96, longer[1])]]
        torch.testing.assert_close(own, first / first.sum(-1, keepdim=True))
        found = rollout(model, image)
        assert found.maps.shape == (2, 8, 12) and bool((found.maps.sum((1, 2)) < 1).all())
    with pytest.raises(UsageError, match="attention of 4 x 4 tokens, at least 5"):
        own_tokens(torch.ones(1, 1, 4, 4), 5, 1)


def test_what_would_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr("adaptsuite.vision.look.MOST_BYTES", 4 * 2 * 97 * 97 - 1)
    with pytest.raises(UsageError, match="the attention of 97 tokens takes"):
        rollout(vit(), torch.rand(1, 3, *SIZE))


# ---- rollout


def loops(maps, kernels, prefix, grid):
    """Abnar and Zuidema's matrices, entry by entry; kernels: block -> k x k kernel behind it."""
    h, w = grid
    total = torch.eye(prefix + h * w, dtype=torch.float64)
    for block, attention in enumerate(maps):
        heads, size, _ = attention.shape
        step = torch.zeros(size, size, dtype=torch.float64)
        for i in range(size):
            for j in range(size):
                step[i, j] = (sum(float(attention[a, i, j]) for a in range(heads)) / heads + (i == j)) / 2
            step[i] /= step[i].sum()
        total = step @ total
        if block in kernels:
            kernel = kernels[block]
            new = torch.zeros(prefix + (h - 2) * (w - 2), size, dtype=torch.float64)
            for i in range(prefix):
                new[i, i] = 1
            for y in range(h - 2):
                for x in range(w - 2):
                    for i in range(3):
                        for j in range(3):
                            place = prefix + (y + i) * w + x + j
                            new[prefix + y * (w - 2) + x, place] = abs(kernel[i, j]) / kernel.abs().sum()
            total, h, w = new @ total, h - 2, w - 2
    return total


@pytest.mark.parametrize(
    ("build", "more", "prefix", "reads"),
    [
        (vit, {}, 1, "cls"),
        (vit, {"reg_tokens": 3}, 4, "cls"),
        (vit, {"class_token": False, "global_pool": "avg"}, 0, "mean"),
        (vit, {"global_pool": "avg"}, 1, "mean"),
        (eva, {"global_pool": "token"}, 1, "cls"),
    ],
)
@pytest.mark.parametrize("joined", [True, False])
def test_rollout_equals_its_definition_in_loops(build, more, prefix, reads, joined):
    model, image, kernels = build(**more).double(), torch.rand(1, 3, *SIZE).double(), {}
    if joined:
        handle = attach(model, "vision.ila")
        for block in (0, 1):
            weight = handle.adapter.branches[f"blocks/{block}"].residual.weight
            nn.init.normal_(weight)
            kernels[block] = weight.detach().abs().mean((0, 1))
    model.double()
    with attention_maps(model) as maps, torch.no_grad():
        model(image)
    total = loops([a[0] for a in maps], kernels, prefix, (8, 12))
    torch.testing.assert_close(total.sum(1), torch.ones(len(total), dtype=torch.float64))
    assert total.shape == ((prefix + 32 if joined else prefix + 96), prefix + 96)
    read = total[0] if reads == "cls" else total[prefix:].mean(0)
    found = rollout(model, image)
    torch.testing.assert_close(found.maps[0].flatten(), read[prefix:], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.entropy[0, -1], spread(read[None, prefix:])[0], rtol=1e-5, atol=1e-6)


def test_the_entropy_of_a_share_is_one_when_even_and_nothing_on_one_token():
    torch.testing.assert_close(spread(torch.tensor([[0.2, 0.2, 0.2], [0.0, 0.5, 0.0]])), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(
    ("head", "weights"),
    [
        ({"pool": "cls"}, [1, 0, 0, 0, 0]),
        ({"pool": "mean"}, [0, 0, 1 / 3, 1 / 3, 1 / 3]),
        ({"pool": "cls+mean"}, [1 / 2, 0, 1 / 6, 1 / 6, 1 / 6]),
        ({"pool": "own"}, [1, 0, 0, 0, 0]),
        ({"kind": "ifa"}, [1, 0, 0, 0, 0]),
    ],
)
def test_rollout_starts_from_what_the_head_reads(head, weights):
    model = task(vit(reg_tokens=1), **head)
    torch.testing.assert_close(reader(model, 2, 5), torch.tensor(weights).float())
    assert rollout(model, torch.rand(2, 3, *SIZE)).maps.shape == (2, 8, 12)


# ---- Grad-CAM


class Quadrant(nn.Module):
    """A task model whose class k is how bright quadrant k is: by a transformer's tokens, or by a map."""

    def __init__(self, tokens: bool):
        super().__init__()
        self.tokens = tokens
        self.backbone = vit(depth=2, class_token=False, global_pool="avg") if tokens else nn.Conv2d(3, 16, 4, 4)
        if tokens:
            with torch.no_grad():  # patches carry their brightness through blocks that add nothing
                self.backbone.patch_embed.proj.weight.fill_(1 / 48)
                self.backbone.patch_embed.proj.bias.zero_()
                self.backbone.pos_embed.zero_()
                for block in self.backbone.blocks:
                    nn.init.zeros_(block.attn.proj.weight)
                    nn.init.zeros_(block.mlp.fc2.weight)
            self.backbone.norm = self.backbone.fc_norm = nn.Identity()
        else:
            nn.init.constant_(self.backbone.weight, 1 / 48)

    def forward(self, image):
        tokens = self.backbone.forward_features(image) if self.tokens else self.backbone(image).flatten(2).mT
        grid = tokens.mean(-1).unflatten(1, (8, 12))
        halves = [half.mean((1, 2)) for rows in grid.chunk(2, 1) for half in rows.chunk(2, 2)]
        return torch.stack(halves, 1)


@pytest.mark.parametrize("tokens", [True, False])
def test_the_quadrant_that_a_class_depends_on_lights_up(tokens):
    model, image = Quadrant(tokens).eval(), torch.zeros(4, 3, *SIZE)
    for k, (y, x) in enumerate([(0, 0), (0, 24), (16, 0), (16, 24)]):
        image[k, :, y : y + 16, x : x + 24] = 1
    maps, place = grad_cam(model, image, torch.arange(4))
    assert place.grid == (8, 12) and place.extent == (0, 48, 32, 0) and not maps.requires_grad
    for k, found in enumerate(maps):
        halves = torch.stack([h.sum() for rows in found.chunk(2, 0) for h in rows.chunk(2, 1)])
        assert float(halves[k] / halves.sum()) > 0.999


@pytest.mark.parametrize(
    "head", [{"pool": "cls"}, {"pool": "mean"}, {"pool": "cls+mean+std"}, {}, {"kind": "ifa"}], ids=str
)
def test_grad_cam_equals_its_equations_on_the_tokens_that_enter_the_last_block(head):
    model, image, classes = task(vit(reg_tokens=2), **head), torch.rand(2, 3, *SIZE), torch.tensor([1, 3])
    adapted(model, "vision.ila")
    kept = []
    hook = model.backbone.blocks[-1].register_forward_pre_hook(
        lambda m, args: kept.append(args[0]) or args[0].retain_grad()
    )
    image_ = image.clone().requires_grad_()
    model(image_)[[0, 1], classes].sum().backward()
    hook.remove()
    found, place = grad_cam(model, image, classes)
    tokens, gradient = kept[0].detach()[:, 3:], kept[0].grad[:, 3:]
    expected = torch.zeros(2, 32)
    for b in range(2):
        weight = [sum(gradient[b, n, d] for n in range(32)) / 32 for d in range(16)]  # eq. 1
        for n in range(32):
            expected[b, n] = max(0, sum(weight[d] * tokens[b, n, d] for d in range(16)))  # eq. 2
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-3, atol=1e-7)
    assert float(found.max()) > 0 and place.extent == (8, 40, 24, 8)


@pytest.mark.parametrize("method", ["vpt", "prompt", "prefix", "lora"])
def test_grad_cam_keeps_to_the_patches_beside_other_adapters(method):
    model = task(vit(), pool="cls")
    adapted(model, method, **({"deep": False} if method == "prompt" else {}))
    found, place = grad_cam(model, torch.rand(1, 3, *SIZE), torch.tensor([0]))
    assert found.shape == (1, 8, 12) and place.grid == (8, 12)


def test_a_transformers_backbone_is_looked_at_too():
    from transformers import ViTConfig, ViTModel

    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, num_channels=3)
    torch.manual_seed(0)
    model = task(ViTModel(ViTConfig(**shape, image_size=SIZE, patch_size=4), add_pooling_layer=False).eval())
    image = torch.rand(2, 3, *SIZE)
    adapted(model, "vision.ila")
    assert rollout(model, image).maps.shape == (2, 8, 12)
    found, place = grad_cam(model, image, torch.tensor([0, 1]))
    assert place.extent == (8, 40, 24, 8) and bool((found.amax((1, 2)) > 0).all())
    assert feature_map(model, image)[0].shape == (2, 32, 4, 8)


def test_grad_cam_of_networks_without_tokens_is_on_their_last_map():
    network = timm.create_model("test_resnet", num_classes=0).eval()
    model = task(network, pool="own")
    found, place = grad_cam(model, torch.rand(2, 3, 64, 96), torch.tensor([0, 1]))
    assert found.shape[1:] == place.grid == network.forward_features(torch.rand(1, 3, 64, 96)).shape[2:]
    swin = task(HOSTS["timm_swin"]().model)
    swin.backbone.reset_classifier(0)
    found, place = grad_cam(swin, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    assert found.shape[1:] == place.grid == (8, 8)
    hiera = timm.create_model("hiera_tiny_224", num_classes=2).eval()
    with pytest.raises(UsageError, match="Hiera ends in tokens on no grid"):
        grad_cam(hiera, torch.rand(1, 3, 224, 224), torch.tensor([0]))


# ---- nothing is left behind


def state(model):
    """All that must not change: weights, modes, flags, hooks, gradients, grids."""
    hooks = [
        len(getattr(m, kind)) for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks", "_buffers")
    ]
    flags = [(m.training, m.__dict__.get("fused_attn"), m.__dict__.get("grad_checkpointing")) for m in model.modules()]
    learns = [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    bank = getattr(model, "adapter_bank", None)
    return hooks, flags, learns, bank and bank.context, {k: v.clone() for k, v in model.state_dict().items()}


def same(one, other):
    return one[:-1] == other[:-1] and all(torch.equal(one[-1][k], v) for k, v in other[-1].items())


@pytest.mark.parametrize("method", ["vision.ila_plus_plus", "vpt", "lora", "full"])
def test_looking_changes_neither_the_model_nor_its_training(method):
    def trained(looks: bool):
        model, generator = task(vit(), pool="cls+mean"), torch.Generator().manual_seed(0)
        handle = adapted(model, method, head="head")
        model.backbone.set_grad_checkpointing(True)
        model.backbone.blocks[1].attn.fused_attn = False
        model.train()
        optimizer = torch.optim.AdamW([p for group in handle.trainable() for p in group["params"]], 1e-2)
        image = torch.rand(4, 3, *SIZE, generator=generator)
        for step in range(3):
            if looks:
                before = state(model)
                rollout(model, image)
                grad_cam(model, image, torch.tensor([0, 1, 2, 3]))
                with handle.disabled() if method == "full" else still(model), attention_maps(model):
                    model(image)
                assert same(state(model), before)
            torch.manual_seed(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(image), torch.tensor([0, 1, 2, 3])).backward()
            optimizer.step()
        return {k: v.clone() for k, v in model.state_dict().items()}

    plain, looked = trained(False), trained(True)
    assert plain.keys() == looked.keys() and all(torch.equal(plain[k], v) for k, v in looked.items())


def test_a_model_whose_forward_fails_is_left_as_it_was():
    model = task(vit(), pool="cls")
    adapted(model, "vision.ila")
    before = state(model)
    for look in (lambda x: rollout(model, x), lambda x: grad_cam(model, x, torch.tensor([0]))):
        with pytest.raises((RuntimeError, AssertionError)):
            look(torch.rand(1, 3, 20, 20))
        assert same(state(model), before) and torch.is_grad_enabled()
    with pytest.raises(KeyError), attention_maps(model):
        raise KeyError
    assert same(state(model), before)


def test_a_copy_of_a_host_is_looked_at_like_the_host():
    model, image = task(vit(), pool="cls"), torch.rand(1, 3, *SIZE)
    adapted(model, "vision.ila")
    twin = copy.deepcopy(model)
    assert torch.equal(rollout(twin, image).maps, rollout(model, image).maps)
    with watched(twin, SIZE) as tokens, torch.no_grad():
        twin(image)
    assert tokens.place().grid == (4, 8) and isinstance(task(vit(), kind="ifa").head, LayersHead)
