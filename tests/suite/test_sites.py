"""Sites by role: every family is checked by running it, not by trusting names."""

import copy
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from adaptsuite.sites import IN_ORDER, ROLES, component_info, example_input, find_sites, roles
from adaptsuite.testing import HOSTS, NNEncoder

ATTENTION = {"attn.q", "attn.k", "attn.v", "attn.qkv", "attn.out", "attn"}
# family: blocks, width of the first block's tokens, prefix tokens per component, attn.qkv sites per block
FAMILIES = {
    "timm_vit": (2, 32, [1], 1), "timm_vit_reg": (2, 32, [4], 1), "timm_siglip": (2, 32, [0], 1),
    "timm_eva": (2, 32, [1], 1), "timm_eva_split": (2, 32, [1], 3), "timm_beit": (2, 32, [1], 1),
    "timm_swin": (3, 16, [0], 1), "timm_swinv2": (3, 16, [0], 1), "hf_ast": (2, 32, [2], 3), "hf_vit": (2, 32, [1], 3),
    "hf_clip": (4, 32, [0, 1], 3), "hf_bert": (2, 32, [0], 3), "hf_roberta": (2, 32, [0], 3),
    "hf_gpt2": (2, 32, [0], 1), "hf_wav2vec2": (2, 32, [0], 3), "open_clip": (4, 32, [1, 0], 1),
    "monai_vit": (2, 32, [1], 1), "monai_swin_unetr": (5, 12, [0], 1), "torchaudio_wav2vec2": (2, 32, [0], 3),
    "hf_wavlm": (2, 32, [0], 3), "hf_whisper": (2, 32, [0], 3), "hf_clap": (3, 16, [0], 3),
    "nn_encoder": (2, 16, [0], 1), "conformer": (2, 16, [0], 1),
}  # fmt: skip
POST_NORM = {"hf_bert", "hf_roberta", "hf_wavlm", "torchaudio_wav2vec2"}
RES_POST = {"timm_swinv2"}
WINDOWED = {"timm_swin", "timm_swinv2", "monai_swin_unetr", "hf_clap"}


@pytest.fixture(scope="module", params=HOSTS)
def tiny(request):
    return HOSTS[request.param]()


def relatives():
    """More models of transformers and torch, as (model, kwargs)."""
    import transformers as hf

    body = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    image, words = dict(image_size=32, patch_size=8), dict(vocab_size=99, pad_token_id=0)
    sound = dict(conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8)
    sound |= dict(num_conv_pos_embedding_groups=2)
    pair = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
    pair |= dict(encoder_ffn_dim=64, decoder_ffn_dim=64, **words)
    swin = dict(image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4)
    t5 = dict(d_model=32, num_layers=2, num_heads=2, d_ff=64, d_kv=16, **words)
    yield hf.DeiTModel(hf.DeiTConfig(**body, **image))
    yield hf.BeitModel(hf.BeitConfig(**body, **image))
    yield hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**body, **image))
    yield hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**body, **image, num_register_tokens=2))
    yield hf.VideoMAEModel(hf.VideoMAEConfig(**body, **image, num_frames=2))
    yield hf.SwinModel(hf.SwinConfig(**swin))
    yield hf.Swinv2Model(hf.Swinv2Config(**swin))
    yield hf.SiglipModel(hf.SiglipConfig(text_config=dict(**body, vocab_size=99), vision_config=dict(**body, **image)))
    yield hf.HubertModel(hf.HubertConfig(**body, **sound))
    yield hf.WavLMModel(hf.WavLMConfig(**body, **sound))
    yield hf.Wav2Vec2ConformerModel(hf.Wav2Vec2ConformerConfig(**body, **sound))
    yield hf.WhisperModel(hf.WhisperConfig(**pair, max_source_positions=20))
    yield hf.BartModel(hf.BartConfig(**pair))
    yield hf.MBartModel(hf.MBartConfig(**pair))
    yield hf.T5Model(hf.T5Config(**t5))
    yield hf.T5EncoderModel(hf.T5Config(**t5, feed_forward_proj="gated-gelu"))
    yield hf.DistilBertModel(hf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **words))
    yield hf.MPNetModel(hf.MPNetConfig(**body, **words))
    yield hf.AlbertModel(hf.AlbertConfig(**body, **words, embedding_size=16))
    yield hf.ModernBertModel(hf.ModernBertConfig(**body, **words))
    yield hf.LlamaModel(hf.LlamaConfig(**body, **words, num_key_value_heads=1))
    yield hf.Phi3Model(hf.Phi3Config(**body, **words, num_key_value_heads=1))
    yield hf.Gemma2Model(hf.Gemma2Config(**body, **words, num_key_value_heads=1, head_dim=16))
    yield hf.OPTModel(
        hf.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, **words,
                     word_embed_proj_dim=32)
    )  # fmt: skip
    yield nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)


def first(value):
    return value[0] if isinstance(value, tuple | list) else value


class Watch:
    """Records, for the modules of a model, the first argument, all arguments and the output of the last call."""

    def __init__(self, model: nn.Module):
        self.model, self.args, self.out, self.hooks = model, {}, {}, []

    def __enter__(self):
        for path, module in self.model.named_modules():
            self.hooks += [module.register_forward_hook(self.hook(path), with_kwargs=True)]
        return self

    def hook(self, path):
        def record(module, args, kwargs, output):
            self.args[path] = args or tuple(kwargs.get(name) for name in ("hidden_states", "query", "x"))
            self.out[path] = first(output)

        return record

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def x(self, site):
        """The site's input as the contract says: the carrier's argument, or the first tensor argument."""
        if site.carrier:
            return self.args[site.carrier[0]][site.carrier[1]]
        return next(arg for arg in self.args[site.path] if isinstance(arg, torch.Tensor))


def check_inputs(model, run, windowed=False) -> int:
    """Every site whose norm is named gets exactly what that norm gave out; returns how many were checked."""
    with Watch(model) as watch:
        run()
    checked = 0
    for site in find_sites(model, list(roles(model))):
        if site.norm is None or site.path not in watch.args:  # a weight read but not called
            continue
        x, normed = watch.x(site), watch.out[site.norm]
        if windowed and site.role.startswith("attn"):  # cut into windows and padded in between
            assert abs(x.sum() - normed.sum()) < 1e-3
        else:  # Swin flattens (B, H, W, D) before its MLP
            assert x.data_ptr() == normed.data_ptr() or torch.equal(x.flatten(0, -2), normed.flatten(0, -2)), site
        assert x.shape[-1] == site.dim
        checked += 1
    return checked


def weight_of(model, site) -> torch.Tensor:
    """The part of the weight that a site is, (dim_out, dim), sharing storage with the model."""
    weight = model.get_submodule(site.path).get_parameter(site.weight)
    weight = weight.t() if site.layout == "conv1d" else weight.flatten(1)
    return weight[slice(*site.rows)] if site.rows else weight


def bias_of(model, site) -> torch.Tensor | None:
    if site.bias is None:
        return None
    bias = model.get_submodule(site.path).get_parameter(site.bias)
    return bias[slice(*site.rows)] if site.rows else bias


@contextmanager
def restored(model: nn.Module):
    """Puts every weight back at the end."""
    kept = copy.deepcopy(model.state_dict())
    yield
    model.load_state_dict(kept)


# ---- every family ----


def test_every_family_in_the_table_is_built():
    assert set(FAMILIES) == set(HOSTS)


def test_roles_and_counts_are_the_family_s(tiny):
    num_blocks, dim, prefixes, qkv = FAMILIES[tiny.name]
    counts, mlps = roles(tiny.model), 2 if tiny.name == "conformer" else 1
    for role in ("attn.q", "attn.k", "attn.v", "attn.out", "attn", "block"):
        assert counts[role] == num_blocks
    assert counts["attn.qkv"] == num_blocks * qkv
    assert counts["mlp"] == counts["mlp.out"] == num_blocks * mlps
    assert counts["norm"] >= 2 * num_blocks
    assert find_sites(tiny.model, "block")[0].dim == dim
    components = component_info(tiny.model)
    assert [part.num_prefix_tokens for part in components] == prefixes
    assert sum(part.num_blocks for part in components) == num_blocks
    assert {site.component for site in find_sites(tiny.model, list(counts))} == {part.prefix for part in components}


def test_keys_are_unique_and_hold_no_dot(tiny):
    sites = {role: find_sites(tiny.model, role) for role in roles(tiny.model)}
    places: dict[str, tuple] = {}
    for site in (site for found in sites.values() for site in found):
        place = (site.path, site.weight, site.rows, site.carrier)
        assert "." not in site.key
        assert places.setdefault(site.key, place) == place
    for found in sites.values():
        assert len({site.key for site in found}) == len(found)


def test_shapes_and_biases_are_those_of_the_weights(tiny):
    for site in find_sites(tiny.model, list(roles(tiny.model))):
        if site.weight is None:
            assert isinstance(tiny.model.get_submodule(site.path), nn.Module) and site.dim == site.dim_out
            continue
        assert weight_of(tiny.model, site).shape == (site.dim_out, site.dim)
        bias = bias_of(tiny.model, site)
        assert bias is None or bias.shape == (site.dim_out,)


def test_qkv_is_the_union_of_its_parts(tiny):
    parts = [weight_of(tiny.model, site) for role in ("q", "k", "v") for site in find_sites(tiny.model, f"attn.{role}")]
    whole = [weight_of(tiny.model, site) for site in find_sites(tiny.model, "attn.qkv")]
    assert sum(part.numel() for part in parts) == sum(part.numel() for part in whole)
    torch.testing.assert_close(sum(p.double().sum() for p in parts), sum(p.double().sum() for p in whole))


@torch.no_grad()
def test_larger_queries_and_smaller_keys_leave_the_output_alone(tiny):
    """(2 q)(k / 2) = q k: true only if exactly those rows are q and k."""
    if tiny.name in ("timm_vit_reg", "timm_swinv2"):
        pytest.skip("queries and keys are normalised")
    model, before = tiny.model, tiny.forward()

    def scale(role, factor):
        for site in find_sites(model, role):
            for tensor in filter(torch.is_tensor, (weight_of(model, site), bias_of(model, site))):
                tensor.mul_(factor)

    with restored(model):
        scale("attn.q", 2.0)
        scale("attn.k", 0.5)
        for name, parameter in model.named_parameters():
            if name.endswith("attn.q_bias"):  # kept apart from the weight: EVA, BEiT
                parameter.mul_(2.0)
        torch.testing.assert_close(tiny.forward(), before, atol=1e-5, rtol=1e-4)
        scale("attn.q", 2.0)  # queries alone: not the same any more
        assert (tiny.forward() - before).abs().max() > 1e-4


@torch.no_grad()
def test_without_values_every_token_gets_the_same_attention_output(tiny):
    with restored(tiny.model), Watch(tiny.model) as watch:
        for site in find_sites(tiny.model, "attn.v"):
            weight_of(tiny.model, site).mul_(0.0)
        tiny.forward()
    for site in find_sites(tiny.model, "attn"):
        y = watch.out[site.path].flatten(0, -2)
        torch.testing.assert_close(y, y[:1].expand_as(y), atol=1e-6, rtol=0)


def test_sites_see_what_the_norm_beside_them_gave(tiny):
    checked = check_inputs(tiny.model, tiny.forward, tiny.name in WINDOWED)
    assert (checked > 0) != (tiny.name in RES_POST)


@pytest.mark.parametrize("name", ["hf_bert", "hf_roberta", "torchaudio_wav2vec2"])
def test_post_norm_sites_see_the_block_s_input_and_the_first_norm_s_output(name):
    tiny = HOSTS[name]()
    with Watch(tiny.model) as watch:
        tiny.forward()
    for attn, mlp, block in zip(*(find_sites(tiny.model, role) for role in ("attn", "mlp", "block")), strict=True):
        norm = next(s for s in find_sites(tiny.model, "norm") if s.path.startswith(f"{block.path}."))
        assert torch.equal(watch.x(attn), first(watch.args[block.path]))
        assert torch.equal(watch.x(mlp), watch.out[norm.path])


@torch.no_grad()
def test_without_its_attention_and_mlp_a_pre_norm_block_passes_its_input_on(tiny):
    """So `attn` and `mlp` are the whole branches, and their y stands before the residual."""
    if tiny.name in ("conformer", "timm_swinv2"):
        pytest.skip("these blocks do more than attention and MLP")
    model = tiny.model
    hooks = [
        model.get_submodule(site.path).register_forward_hook(
            lambda module, args, output: (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0
        )
        for site in find_sites(model, ["attn", "mlp"])
    ]
    with Watch(model) as watch:
        tiny.forward()
    for hook in hooks:
        hook.remove()
    for site in find_sites(model, "block"):
        expected, block = first(watch.args[site.path]), model.get_submodule(site.path)
        if tiny.name in POST_NORM:
            norms = [part for _, part in block.named_modules() if isinstance(part, nn.LayerNorm)]
            expected = norms[1](norms[0](expected))
        torch.testing.assert_close(watch.out[site.path], expected, atol=1e-6, rtol=0)


def test_batch_first_tells_where_the_batch_is(tiny):
    with Watch(tiny.model) as watch:
        tiny.forward()
    for site in find_sites(tiny.model, ["attn", "mlp", "block"]):
        batch = watch.x(site).shape[0 if site.batch_first else 1]
        assert batch == 2 or (tiny.name in WINDOWED and batch % 2 == 0), site
    assert {s.batch_first for s in find_sites(tiny.model, "block")} == {tiny.name not in ("nn_encoder", "conformer")}


def test_example_input_runs_through_the_model(tiny):
    if tiny.name == "nn_encoder":
        with pytest.raises(LookupError, match="pass sample="):
            example_input(tiny.model)
        return
    args, kwargs = example_input(tiny.model)
    with torch.no_grad():
        assert tiny.read(tiny.model(*args, **kwargs)).shape[0] == 1


def test_every_block_takes_part_in_the_host_s_output(tiny):
    tiny.model.zero_grad()
    tiny.forward().square().sum().backward()
    for site in find_sites(tiny.model, ["attn.q", "attn.v", "mlp.in", "mlp.out"]):
        assert model_grad(tiny.model, site).abs().max() > 0, site.path
    tiny.model.zero_grad()


def model_grad(model, site):
    return model.get_submodule(site.path).get_parameter(site.weight).grad


def test_a_wrong_role_is_an_error_that_lists_the_roles(tiny):
    with pytest.raises(LookupError, match=r"site 'atn' is not in .*; it has: attn\.q, .*block"):
        find_sites(tiny.model, "atn")


def test_a_backbone_inside_a_task_model_keeps_its_sites(tiny):
    task = nn.Module()
    task.add_module("backbone", tiny.model)
    task.add_module("adapter_bank", nn.ModuleDict({"copy": HOSTS["timm_vit"]().model}))  # never searched
    assert roles(task) == roles(tiny.model)
    for inner, outer in zip(find_sites(tiny.model, "attn.q"), find_sites(task, "attn.q"), strict=True):
        assert outer.path == f"backbone.{inner.path}"
        assert outer.component == f"backbone.{inner.component}".rstrip(".")


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm_vit", "hf_vit", "hf_gpt2", "open_clip", "monai_vit", "nn_encoder"])
def test_parts_recompute_the_attention_by_its_formula(name):
    """out(softmax(q k^T / sqrt(d)) v) with the found parts is the module's output."""
    tiny = HOSTS[name]()
    model = tiny.model
    with Watch(model) as watch:
        tiny.forward()
    for site in find_sites(model, "attn"):
        if site.component == "text":
            continue  # masked

        def project(role, x, site=site):
            (part,) = (s for s in find_sites(model, role) if (s.component, s.block) == (site.component, site.block))
            bias = bias_of(model, part)
            return x @ weight_of(model, part).t() + (0 if bias is None else bias)

        x = watch.x(site) if site.batch_first else watch.x(site).transpose(0, 1)
        q, k, v = (
            project(f"attn.{role}", x).unflatten(-1, (2, -1)).transpose(1, 2) for role in "qkv"
        )  # (B, heads, T, d)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if name == "hf_gpt2":
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        y = project("attn.out", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(y if site.batch_first else y.transpose(0, 1), watch.out[site.path])


# ---- single facts ----


def test_the_text_tower_of_open_clip_is_a_component_of_its_own():
    model = HOSTS["open_clip"]().model
    assert {c.prefix: c.final_norm for c in component_info(model)} == {"visual": "visual.ln_post", "text": "ln_final"}
    assert [(s.component, s.block) for s in find_sites(model, "block")] == [
        ("visual", 0), ("visual", 1), ("text", 0), ("text", 1)
    ]  # fmt: skip
    site = find_sites(model, "attn.k")[0]
    assert (site.path, site.weight, site.bias, site.rows) == (
        "visual.transformer.resblocks.0.attn", "in_proj_weight", "in_proj_bias", (32, 64)
    )  # fmt: skip
    assert site.key == "visual/transformer/resblocks/0/attn:k"


def test_bert_sites_are_carried_by_the_module_that_adds_the_residual():
    attn, mlp = find_sites(HOSTS["hf_bert"]().model, ["attn", "mlp"])[::2]
    layer = "encoder.layer.0"
    assert (attn.path, attn.carrier) == (f"{layer}.attention.output.dense", (f"{layer}.attention.output", 1))
    assert (mlp.path, mlp.carrier) == (f"{layer}.output.dense", (f"{layer}.output", 1))
    assert (attn.norm, mlp.norm) == ("embeddings.LayerNorm", f"{layer}.attention.output.LayerNorm")


@pytest.mark.parametrize(
    ("name", "final_norm", "head", "head_site"),
    [
        ("timm_vit", "norm", "head", "head"),
        ("timm_eva", "fc_norm", "head", "head"),
        ("timm_swin", "norm", "head", "head.fc"),
        ("hf_ast", "audio_spectrogram_transformer.layernorm", "classifier", "classifier.dense"),
        ("hf_roberta", None, "classifier", "classifier.out_proj"),
        ("hf_gpt2", "transformer.ln_f", "lm_head", "lm_head"),
        ("hf_wav2vec2", "encoder.layer_norm", None, None),
        ("torchaudio_wav2vec2", None, None, None),
        ("monai_vit", "norm", "classification_head", "classification_head.0"),
        ("monai_swin_unetr", None, "out", "out.conv.conv"),
        ("nn_encoder", "encoder.norm", "head", "head"),
    ],
)
def test_final_norm_and_head_are_found(name, final_norm, head, head_site):
    model = HOSTS[name]().model
    (info,) = component_info(model)
    assert (info.final_norm, info.head) == (final_norm, head)
    if head:
        assert [site.path for site in find_sites(model, "head")] == [head_site]


def test_patch_embedding_is_a_convolution_read_flat():
    (site,) = find_sites(HOSTS["monai_vit"]().model, "patch_embed")
    assert (site.path, site.layout, site.dim, site.dim_out) == ("patch_embedding.patch_embeddings", "conv", 512, 32)


def test_an_unused_norm_of_monai_is_not_a_site():
    assert not [s for s in find_sites(HOSTS["monai_vit"]().model, "norm") if "cross" in s.path]


def test_grouped_queries_keep_their_own_widths():
    from transformers import LlamaConfig, LlamaModel, Phi3Config, Phi3Model

    body = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, intermediate_size=64)
    for model in (
        LlamaModel(LlamaConfig(**body, vocab_size=99)),
        Phi3Model(Phi3Config(**body, vocab_size=99, pad_token_id=0)),
    ):
        assert [site.dim_out for site in find_sites(model, ["attn.q", "attn.k", "attn.v"])] == [32, 8, 8]
    assert find_sites(model, "attn.v")[0].rows == (40, 48)  # Phi-3 keeps one fused weight


def test_interleaved_fused_weights_refuse_their_parts():
    from transformers import GPTNeoXConfig, GPTNeoXModel

    body = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    model = GPTNeoXModel(GPTNeoXConfig(**body))
    with pytest.raises(LookupError, match="GPTNeoXAttention.*order of q, k and v is not known; take 'attn.qkv'"):
        find_sites(model, "attn.q")
    assert find_sites(model, "attn.qkv")[0].dim_out == 96
    assert "attn.q" not in roles(model) and roles(model)["attn.out"] == 1


def test_a_model_that_is_half_understood_is_refused():
    from timm.models.hiera import Hiera

    model = Hiera(img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1))
    with pytest.raises(LookupError, match=r"blocks\.1 \(HieraBlock\) .* networks of such blocks are not covered"):
        find_sites(model, "attn")


def test_every_class_named_as_in_order_exists():
    """A moved class would silently lose its q, k and v."""
    import importlib

    missing = []
    for name in IN_ORDER - {"timm.models.vision_transformer.Attention"}:  # where older releases keep it
        module, _, kind = name.rpartition(".")
        try:
            getattr(importlib.import_module(module), kind)
        except (ImportError, AttributeError):
            missing.append(name)
    assert not missing


def test_multihead_attention_with_other_key_widths_keeps_three_weights():
    class Block(nn.TransformerEncoderLayer):
        def __init__(self):
            super().__init__(16, 2, 32, norm_first=True)
            self.self_attn = nn.MultiheadAttention(16, 2, kdim=8, vdim=4)

    sites = find_sites(nn.Sequential(Block()), ["attn.q", "attn.k", "attn.v"])
    assert [(s.weight, s.dim, s.bias, s.rows) for s in sites] == [
        ("q_proj_weight", 16, None, None), ("k_proj_weight", 8, None, None), ("v_proj_weight", 4, None, None)
    ]  # fmt: skip
    assert len({site.key for site in sites}) == 3


def test_a_shared_block_is_one_place():
    block = nn.TransformerEncoderLayer(16, 2, 32)
    assert roles(nn.ModuleList([block, block]))["block"] == 1


def test_beside_a_post_norm_site_is_the_norm_that_its_input_passed_last():
    model, layers = NNEncoder(norm_first=False), "encoder.layers"
    assert [s.norm for s in find_sites(model, "attn")] == [None, f"{layers}.0.norm2"]
    assert [s.norm for s in find_sites(model, "mlp")] == [f"{layers}.0.norm1", f"{layers}.1.norm1"]


def test_behind_cross_attention_no_norm_is_beside():
    import transformers as hf

    body = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    model = hf.BartModel(hf.BartConfig(**body, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99))
    assert [s.norm for s in find_sites(model, "mlp")] == ["encoder.layers.0.self_attn_layer_norm", None]


def test_a_model_without_blocks_says_so():
    with pytest.raises(LookupError, match="torch.Linear; it has: no block of a known layout"):
        find_sites(nn.Linear(2, 2), "attn")


def test_swin_unetr_in_three_dimensions_gets_the_smallest_cube_it_can_take():
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).eval()
    args, _ = example_input(model)
    assert args[0].shape == (1, 1, 64, 32, 32)
    with torch.no_grad():
        assert model(*args).shape == (1, 2, 64, 32, 32)


@torch.no_grad()
def test_relatives_come_for_free():
    """Every relative runs its example input, its pre-norm sites see their norm's output, its parts add up."""
    torch.manual_seed(0)
    for model in relatives():
        model = model.eval()
        args, kwargs = example_input(model)
        counts, name = roles(model), type(model).__name__
        assert ATTENTION | {"mlp.in", "mlp.out", "mlp", "block", "norm"} <= set(counts), name
        assert set(counts) <= set(ROLES)
        checked = check_inputs(model, lambda m=model, a=args, k=kwargs: m(*a, **k), "Swin" in name)
        assert (checked > 0) != name.startswith("Swinv2"), name  # x + norm(attn(x))
