"""Layer-wise learning rates against BEiT's rule in closed form: decay ** (L + 1 - id)."""

import re

import pytest
import torch
from torch import nn

from adaptsuite import attach
from adaptsuite.depth import layer_factor
from adaptsuite.errors import UsageError
from adaptsuite.testing import HOSTS
from adaptsuite.trainer import Plan, fit

DECAY = 0.5  # powers of it are exact
LAST = ("norm", "fc_norm", "head", "pooler", "attn_pool")  # behind the last block


def by_rule(path: str, depth: int) -> float:
    """The factor of a tensor of a plain ViT or BERT, from its name alone."""
    block = re.search(r"(?:blocks|layer|h)\.(\d+)\.", path)
    layer = int(block[1]) + 1 if block else depth + 1 if path.split(".")[0] in LAST else 0
    return DECAY ** (depth + 1 - layer)


def factors(handle, decay=DECAY) -> dict[str, float]:
    """Name of a trained tensor, its place as the model spells it -> factor."""
    groups = handle.trainable(decay)
    return {name.replace("/", "."): g["lr_scale"] for g in groups for name in g["names"]}


@pytest.mark.parametrize("family", ["timm_vit", "timm_vit_reg", "timm_siglip", "timm_beit", "hf_bert"])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "bitfit", "film", "prefix", "full"])
def test_factors_of_every_method_equal_the_rule(family, method):
    tiny = HOSTS[family]()
    handle = attach(tiny.model, method, sample=(tiny.args, tiny.kwargs), train_norms=True)
    found = factors(handle)
    assert set(found) == {name.replace("/", ".") for name in handle.trained()}
    for name, factor in found.items():
        path = name.partition(".")[2]
        assert factor == by_rule(path, 2), name
    assert len(set(found.values())) == {"full": 4}.get(method, 3 if any("norm." in n for n in found) else 2)


def test_the_rule_has_every_layer_of_a_deeper_host():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=5, num_heads=2, num_classes=3)
    factor = layer_factor(model, 0.7)
    for name, _ in model.named_parameters():
        block = re.match(r"blocks\.(\d+)", name)
        layer = int(block[1]) + 1 if block else 6 if name.split(".")[0] in LAST else 0
        assert factor(name) == pytest.approx(0.7 ** (6 - layer)), name
    assert factor("blocks.4") == 0.7 and factor("patch_embed") == pytest.approx(0.7**6) and factor("head") == 1


def test_prompts_of_each_block_have_its_factor():
    handle = attach(HOSTS["timm_vit"]().model, "prompt")
    assert factors(handle) == {"shared.tables.blocks.0": DECAY**2, "shared.tables.blocks.1": DECAY}


def test_each_tower_has_its_own_depth_and_projections_stand_at_the_end():
    factor = layer_factor(HOSTS["open_clip"]().model, DECAY)
    assert factor("token_embedding.weight") == factor("positional_embedding") == factor("visual.conv1.weight") == 1 / 8
    assert factor("transformer.resblocks.0.ln_1.weight") == factor("visual.transformer.resblocks.0.ln_1.bias") == 1 / 4
    for name in ("visual.proj", "text_projection", "logit_scale", "ln_final.weight", "visual.ln_post.weight"):
        assert factor(name) == 1


def test_merging_between_blocks_counts_with_the_block_before():
    factor = layer_factor(HOSTS["timm_swin"]().model, DECAY)
    assert [factor(f"layers.{path}") for path in ("0.blocks.0", "0.blocks.1", "1.downsample", "1.blocks.0")] == [
        DECAY**3,
        DECAY**2,
        DECAY**2,
        DECAY,
    ]


def test_a_head_outside_the_backbone_keeps_its_rate_and_its_own_scale():
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = HOSTS["hf_vit"]().model.vit, nn.Linear(32, 3)
            self.head.lr_scale = {"weight": 0.1}

        def forward(self, pixel_values):
            return self.head(self.backbone(pixel_values).last_hidden_state[:, 0])

    handle = attach(Task().eval(), "lora", sample=torch.randn(1, 3, 32, 32), head="head", train_norms=True)
    found = factors(handle)
    assert found["tensors.head.weight"] == 0.1 and found["tensors.head.bias"] == 1
    assert found["tensors.backbone.layernorm.weight"] == 1
    assert {f for name, f in found.items() if "layers.0" in name} == {DECAY**2}


def test_own_scale_and_depth_multiply():
    model = HOSTS["timm_vit"]().model
    model.blocks[0].norm1.lr_scale = {"bias": 3.0}
    found = factors(attach(model, "film"))
    assert found["tensors.blocks.0.norm1.bias"] == 3 * DECAY**2
    assert found["tensors.blocks.0.norm1.weight"] == DECAY**2


def test_without_decay_groups_are_those_of_kinds():
    handle = attach(HOSTS["timm_vit"]().model, "lora", train_norms=True)
    assert [(g["name"], g["lr_scale"]) for g in handle.trainable()] == [("adapter", 1.0), ("norm", 1.0)]
    torch.optim.AdamW(handle.trainable(0.7))  # a user's own loop takes them as they are


class Images:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.full((3, 32, 32), index / 8), "label": index % 2}


class Task:
    monitor = "accuracy"

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["label"])


@pytest.mark.parametrize("plain", [False, True])
def test_training_moves_a_layer_by_its_share(plain):
    """One step of plain SGD is rate x gradient, so shares can be read off the tensors."""
    moved = {}
    for decay in (1.0, DECAY):
        model = HOSTS["timm_vit"]().model
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        plan = Plan(1, 0.1, layer_decay=decay, optimizer="sgd", momentum=0, weight_decay=0, warmup=0, device="cpu")
        fit(model, Task(), Images(), None, plan, handle=None if plain else attach(model, "full"))
        moved[decay] = {n: (p.detach() - before[n]).norm() for n, p in model.named_parameters() if n in before}
    for name, whole in moved[1.0].items():
        torch.testing.assert_close(moved[DECAY][name], whole * by_rule(name, 2), rtol=1e-3, atol=1e-6)


def test_a_model_without_blocks_is_refused_and_trains_without_decay():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    with pytest.raises(UsageError, match="layer_decay=0.5 needs blocks, so that a layer has a depth: .*Sequential"):
        fit(model, Task(), Images(), None, Plan(1, layer_decay=0.5, device="cpu"))
    fit(model, Task(), Images(), None, Plan(1, device="cpu"))
