"""Is what the budget says before training what training then takes?"""

import random

import numpy as np
import pytest
import torch
from torch import nn

from adaptsuite import attach, budget
from adaptsuite.bank import tensors_in
from adaptsuite.budget import describe
from adaptsuite.errors import UsageError
from adaptsuite.testing import HOSTS

FAMILIES = {
    "timm_vit": ("linear", "lora", "bottleneck", "bitfit", "full"),
    "timm_eva": ("lora",),  # shadow sites
    "timm_swin": ("lora",),
    "hf_ast": ("lora", "full"),
    "hf_clip": ("bottleneck",),
    "hf_bert": ("bitfit", "full"),  # dropout
    "open_clip": ("lora",),
    "monai_vit": ("bottleneck",),
    "torchaudio_wav2vec2": ("bitfit",),
    "nn_encoder": ("full",),
}
CASES = [pytest.param(f, m, id=f"{f}-{m}") for f, ms in FAMILIES.items() for m in ms]
CASES += [pytest.param("monai_swin_unetr", "lora", marks=pytest.mark.slow)]


def measured(model, args=(), kwargs=None):
    """Bytes that autograd saves in one real step, each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ends = [t for t in tensors_in(model(*args, **(kwargs or {}))) if t.requires_grad]
    torch.autograd.backward(ends, [torch.ones_like(t) for t in ends])
    return sum(s.nbytes() for s in found.values())


def vit(side=64, dim=64, depth=4, heads=2, patch=8):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(side, patch, embed_dim=dim, depth=depth, num_heads=heads, num_classes=10)


def ast(frames=500, **settings):
    from transformers import ASTConfig, ASTForAudioClassification

    with torch.device("meta"):
        return ASTForAudioClassification(ASTConfig(max_length=frames, num_labels=50, **settings))


# ---- activations


@pytest.mark.parametrize(("family", "method"), CASES)
def test_predicted_activation_bytes_are_those_of_a_real_step(family, method):
    host = HOSTS[family]()
    found = budget(host.model, method, (host.args, host.kwargs))
    attach(host.model, method, sample=(host.args, host.kwargs))
    host.model.train()
    assert found.notes == ()
    assert found.activation_bytes == pytest.approx(measured(host.model, host.args, host.kwargs), rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "autocast", "checkpointing"),
    [(torch.float32, False, True), (torch.float32, True, False), (torch.bfloat16, True, True)],
)
def test_prediction_holds_in_half_precision_and_under_checkpointing(dtype, autocast, checkpointing):
    model, x = vit(depth=3).to(dtype), torch.randn(2, 3, 64, 64, dtype=dtype)
    model.set_grad_checkpointing(checkpointing)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = budget(model, "lora", x)
        attach(model, "lora")
        assert found.activation_bytes == measured(model.train(), (x,))
    assert (found.activation_bytes < found.peak_bytes / 2) == checkpointing


def test_peak_is_what_the_allocator_sees():
    model, x = vit(), torch.randn(4, 3, 64, 64)
    found = budget(model, "lora", x)
    attach(model, "lora")
    with torch.profiler.profile(profile_memory=True) as profile:
        model.train()(x).sum().backward()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert found.peak_bytes == pytest.approx(peak, rel=0.1)


def test_mask_of_ones_costs_what_it_costs_in_a_real_step():
    host = HOSTS["hf_bert"]()
    for mask in (torch.ones(2, 7, dtype=torch.long), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])):
        inputs = host.kwargs | {"attention_mask": mask}
        found = budget(host.model, "lora", inputs)
        handle = attach(host.model, "lora")
        assert found.activation_bytes == measured(host.model.train(), (), inputs)
        handle.detach()


def test_masked_assignment_and_layerdrop_need_no_real_step():
    """wav2vec2 in training masks spans of its features and leaves layers out: the budget is of all layers."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    shape = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, conv_dim=(16, 16))
    conv = dict(conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    model = Wav2Vec2Model(Wav2Vec2Config(**shape, **conv, layerdrop=0.9, mask_time_length=2))
    x = torch.randn(2, 800)
    found = budget(model, "full", x)
    assert found.notes == ()
    assert found.training_flops <= 6 * found.macs  # grouped convolutions too
    model.config.layerdrop = 0.0
    attach(model, "full")
    assert found.activation_bytes == pytest.approx(measured(model.train(), (x,)), rel=0.01)


# ---- arithmetic


def test_macs_of_vit_b_are_the_closed_formula():
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    found = budget(model, None, torch.empty(2, 3, 224, 224))
    tokens, dim, depth = 197, 768, 12
    blocks = depth * (tokens * 12 * dim**2 + 2 * tokens**2 * dim)
    assert blocks + 196 * dim * dim + dim * 1000 == 17_563_828_224
    assert found.macs_per_item == pytest.approx(17_563_828_224, rel=0.01)
    assert (found.batch, found.macs) == (2, 2 * found.macs_per_item)
    assert found.params == {"trained": 86_567_656, "trained_without_head": 85_798_656, "total": 86_567_656}


def test_ast_base_at_1024_frames_needs_no_values_at_all():
    found = budget(ast(1024), "bottleneck", sites=("attn", "mlp"), bottleneck=8, train_norms=True)
    tokens, dim = 1214, 768
    blocks = 12 * (tokens * 12 * dim**2 + 2 * tokens**2 * dim) + 1212 * 256 * dim
    adapters = 24 * tokens * 2 * 8 * dim
    assert found.macs_per_item == pytest.approx(blocks + adapters + 50 * dim, rel=0.01)
    assert found.params["trained_without_head"] == 351_936


def test_training_flops_follow_the_formula_of_frozen_blocks():
    """2F in linear layers of blocks that the gradient passes, 3F in attention products, 1F below."""
    tokens, dim, depth, rank = 197, 192, 6, 8
    with torch.device("meta"):
        model = vit(224, dim, depth, heads=3, patch=16)
    linear, attention, adapter = tokens * 12 * dim**2, 2 * tokens**2 * dim, tokens * rank * 4 * dim
    embed, head = 196 * 768 * dim, 10 * dim
    full = 3 * depth * (linear + attention) + 2 * embed + 3 * head
    assert budget(model, "full").training_flops == pytest.approx(2 * full, rel=1e-3)
    for k in (6, 3):
        passed = k * (2 * linear + 3 * attention + 3 * adapter)
        passed -= tokens * dim * (3 * dim + rank)  # the first one's input needs no gradient
        lora = embed + (depth - k) * (linear + attention) + passed + 2 * head
        found = budget(model, "lora", sites="attn.qkv", rank=rank, last_k=k)
        assert found.training_flops == pytest.approx(2 * lora, rel=1e-3)


def test_weights_that_adapters_rewrite_in_every_forward_are_counted():
    host = HOSTS["timm_eva"]()
    plain, found = budget(host.model, None, host.args), budget(host.model, "lora", host.args, sites="attn.q", rank=4)
    handle = attach(host.model, "lora", sites="attn.q", rank=4)
    assert len(handle.shadow_sites) == 2
    assert found.macs - plain.macs == sum(s.dim * 4 * s.dim_out for s in handle.shadow_sites)


# ---- parameters and files


def test_parameters_on_ast_base_are_those_of_the_papers():
    model, found = ast(), {}
    for method, settings in {
        "linear": {}, "bitfit": {},
        **{f"lora {r}": {"rank": r} for r in (6, 8, 12)},
        **{f"bottleneck {r}": {"bottleneck": r} for r in (6, 8, 12)},
        **{f"bottleneck {r} houlsby": {"bottleneck": r, "sites": ("attn", "mlp")} for r in (6, 8, 12)},
    }.items():  # fmt: skip
        handle = attach(model, method.split()[0], train_norms=True, **settings)
        found[method] = handle.parameters_count()["trained_without_head"]
        handle.detach()
    assert found == {
        "linear": 1_536, "bitfit": 102_144, "lora 6": 222_720, "lora 8": 296_448, "lora 12": 443_904,
        "bottleneck 6": 139_848, "bottleneck 8": 176_736, "bottleneck 12": 250_512,
        "bottleneck 6 houlsby": 278_160, "bottleneck 8 houlsby": 351_936, "bottleneck 12 houlsby": 499_488,
    }  # fmt: skip


@pytest.mark.parametrize(("frames", "count"), [(500, 85_708_032), (1024, 86_187_264)])
def test_full_fine_tuning_of_ast_base_trains_everything_but_the_head(frames, count):
    model = ast(frames)
    trained = attach(model, "full", head="classifier").parameters_count()
    assert trained["trained_without_head"] == count
    assert (
        trained["trained"]
        == trained["total"]
        == sum(p.numel() for n, p in model.named_parameters() if not n.startswith("adapter_bank."))
    )


@pytest.mark.parametrize("method", ["linear", "lora", "bitfit", "full"])
def test_adapter_bytes_are_the_size_of_the_saved_file(method, tmp_path):
    host = HOSTS["timm_vit"]()
    found = budget(host.model, method, host.args, head="head", train_norms=True)
    folder = attach(host.model, method, head="head", train_norms=True).save(tmp_path / "adapter")
    assert found.adapter_bytes == (folder / "adapter.safetensors").stat().st_size


def test_tied_weights_are_stored_once(tmp_path):
    host = HOSTS["hf_gpt2"]()
    found = budget(host.model, "full", host.kwargs)
    folder = attach(host.model, "full").save(tmp_path / "adapter")
    assert found.adapter_bytes == pytest.approx((folder / "adapter.safetensors").stat().st_size, rel=0.01)


def test_optimizer_bytes_are_those_of_adamw_after_a_step():
    host = HOSTS["timm_vit"]()
    found = budget(host.model, "lora", host.args)
    params = [p for group in attach(host.model, "lora").trainable() for p in group["params"]]
    optimizer = torch.optim.AdamW(params)
    host.forward().sum().backward()
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values()]
    assert found.optimizer_bytes == sum(t.numel() * t.element_size() for t in held)


# ---- the call


@pytest.mark.parametrize("method", ["lora", "full", "linear"])
def test_the_model_and_the_random_state_are_left_as_they_were(method):
    host = HOSTS["timm_vit"]()
    model = host.model.train()
    model.blocks[0].eval()
    model.norm.requires_grad_(False)

    def look():
        return [
            *((n, p.requires_grad, p.grad, id(p)) for n, p in model.named_parameters()),
            *((n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()),
            sorted(vars(model)), random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        ]  # fmt: skip

    before, values = look(), {k: v.clone() for k, v in model.state_dict().items()}
    budget(model, method, host.args)
    assert look() == before
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


def test_an_adapted_model_costs_what_was_said_before():
    host = HOSTS["timm_vit"]()
    before = budget(host.model, "lora", host.args, head="head")
    attach(host.model, "lora", head="head")
    assert budget(host.model, None, host.args) == before


def test_two_active_adapters_are_counted_together():
    host = HOSTS["timm_vit"]()
    one = attach(host.model, "lora", "one").parameters_count()
    handle = attach(host.model, "bottleneck", "two")
    two = handle.parameters_count()
    handle.activate("one", "two")
    found = budget(host.model, None, host.args)
    assert found.method == "lora + bottleneck"
    assert found.params["trained"] == one["trained"] + two["trained"]
    assert found.params["total"] == two["total"] + one["trained"]


class Gated(nn.Module):
    """Decides by the value of a feature."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.relu() if x.mean() < 1e9 else x)


def test_a_model_that_decides_by_values_is_counted_in_a_real_step():
    model, x = Gated(), torch.randn(5, 8)
    found = budget(model, None, x)
    assert found.notes[0].startswith("counted in a real step on a copy of the model, without values it fails:")
    assert found.macs == 5 * (64 + 32)
    assert found.activation_bytes == measured(model, (x,))
    assert all(p.grad is not None for p in model.parameters()), "measured, not budget, has left these"


def test_loss_of_the_model_or_of_the_caller_is_part_of_the_step():
    host = HOSTS["hf_gpt2"]()
    plain = budget(host.model, "lora", host.kwargs)
    labelled = budget(host.model, "lora", host.kwargs | {"labels": host.kwargs["input_ids"]})
    given = budget(host.model, "lora", host.kwargs, loss=lambda out: out.logits.float().exp().sum())
    logits = host.model(**host.kwargs).logits.numel() * 4
    assert labelled.activation_bytes > plain.activation_bytes
    assert given.activation_bytes == plain.activation_bytes + logits


def test_settings_without_a_method_are_an_error():
    with pytest.raises(UsageError, match="rank without a method"):
        budget(HOSTS["timm_vit"]().model, rank=4)


def test_unknown_site_is_an_error_of_one_line():
    with pytest.raises(LookupError, match="'cross' is not in timm.VisionTransformer; it has: attn.q"):
        budget(HOSTS["timm_vit"]().model, "lora", sites="cross")


def test_description_says_the_parameters_first_and_is_aligned():
    lines = describe(budget(ast(100, num_hidden_layers=2), "lora", head="classifier", train_norms=True))
    assert [line.split()[0] for line in lines] == ["backbone", "adapter", "forward", "step", "memory", "file"]
    assert all(line[9] == " " and line[10] != " " for line in lines)
    assert lines[1] == "adapter   lora  90,674 trained (0.62 %), 50,688 without the head"
