"""Parts of vision-language models: what they are called, which of them train, how fast, and the table of it."""

import pytest
import torch

from adaptsuite import attach, find_sites, load_adapter
from adaptsuite.errors import UsageError
from adaptsuite.testing import HOSTS
from adaptsuite.vl.hosts import adapt, describe, find_parts, parts, table

TOWER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VISION = dict(**TOWER, image_size=32, patch_size=8)
LORA = {"rank": 4, "alpha": 4.0}


def drawn(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02 if p.ndim < 2 else 0.1)
    return model.eval()


def llava():
    """(model, inputs): 16 image tokens of id 90 in front of the text."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(**TOWER, num_key_value_heads=2, vocab_size=99)
    vision = CLIPVisionConfig(**VISION)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=90, vision_feature_layer=-1)
    ids = torch.cat([torch.full((2, 16), 90), torch.randint(4, 80, (2, 5))], 1)
    return drawn(LlavaForConditionalGeneration(config)), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32)}


def blip2():
    """(model, inputs): four queries as image tokens of id 90."""
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        OPTConfig,
    )

    torch.manual_seed(0)
    text = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32, vocab_size=99,
        max_position_embeddings=64,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=Blip2QFormerConfig(**TOWER, encoder_hidden_size=32, vocab_size=99).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=90,
    )
    ids = torch.cat([torch.full((2, 4), 90), torch.randint(4, 80, (2, 5))], 1)
    model = drawn(Blip2ForConditionalGeneration(config))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32)}


def siglip():
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    config = SiglipConfig(
        text_config=dict(**TOWER, vocab_size=99, max_position_embeddings=16, projection_size=32), vision_config=VISION
    )
    return drawn(SiglipModel(config)), {
        "input_ids": torch.randint(4, 80, (2, 8)),
        "pixel_values": torch.randn(2, 3, 32, 32),
    }


def stir(handle):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in handle.trained().values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return handle


def kinds(model):
    return {part.name: (part.kind, part.component) for part in parts(model)}


def test_the_parts_of_llava_and_blip_2_are_towers_and_what_joins_them():
    assert kinds(llava()[0]) == {
        "model.vision_tower": ("vision", True),
        "model.language_model": ("language", True),
        "model.multi_modal_projector": ("bridge", False),
        "lm_head": ("bridge", False),
    }
    assert kinds(blip2()[0]) == {
        "vision_model": ("vision", True),
        "qformer.encoder": ("bridge", True),
        "language_model.model.decoder": ("language", True),
        "query_tokens": ("bridge", False),
        "qformer.layernorm": ("bridge", False),
        "language_projection": ("bridge", False),
        "language_model.lm_head": ("bridge", False),
    }


def test_two_tower_models_have_a_vision_and_a_language_part():
    assert kinds(siglip()[0]) == {
        "text_model": ("language", True),
        "vision_model": ("vision", True),
        "logit_scale": ("bridge", False),
        "logit_bias": ("bridge", False),
    }
    assert {part.name: part.kind for part in parts(HOSTS["open_clip"]().model)} == {
        "visual": "vision",
        "text": "language",
    }
    clip = kinds(HOSTS["hf_clip"]().model)
    assert clip["vision_model"] == ("vision", True) and clip["text_model"] == ("language", True)


@pytest.mark.parametrize("build", [llava, blip2, siglip])
def test_parts_hold_every_parameter_once(build):
    model = build()[0]
    for name, _ in model.named_parameters():
        assert len([part for part in parts(model) if part.holds(name)]) == 1, name


def test_a_part_is_found_by_path_or_by_a_word_of_it_and_others_are_refused():
    model = llava()[0]
    assert [p.name for p in find_parts(model, "vision_tower")] == ["model.vision_tower"]
    assert [p.name for p in find_parts(model, "multi_modal_projector")] == ["model.multi_modal_projector"]
    assert len(find_parts(model, "model")) == 3
    for build in (llava, blip2):
        roles = {name: [p.name for p in find_parts(build()[0], name)] for name in ("vision", "language", "projector")}
        assert all(len(names) == 1 for names in roles.values()), roles
        assert "vision" in roles["vision"][0] and "language_model" in roles["language"][0]
        assert roles["projector"][0].endswith(("multi_modal_projector", "language_projection"))
    with pytest.raises(UsageError, match="part 'vison_tower' is not in the model; did you mean model.vision_tower"):
        find_parts(model, "vison_tower")
    with pytest.raises(LookupError, match="component 'q_proj' is not in the model; it has: model.vision_tower"):
        find_sites(model, "q_proj:attn.q")


@pytest.mark.parametrize("build", [llava, blip2])
def test_a_role_in_a_component_is_that_component_s_alone(build):
    model = build()[0]
    everywhere = {site.path for site in find_sites(model, "attn.q")}
    language = {site.path for site in find_sites(model, "language_model:attn.q")}
    assert len(language) == 2 and language < everywhere
    assert all(path.startswith(("model.language_model", "language_model")) for path in language)
    with pytest.raises(LookupError, match="'cls' is not in language_model; it has: attn.q"):
        find_sites(model, "language_model:cls")
    assert find_sites(model, "language_model:cls?") == []


def test_q_and_v_of_blip_2_s_vision_tower_are_cut_out_of_its_fused_weight():
    """The rows are those that its attention takes as queries and values."""
    model, inputs = blip2()
    sites = find_sites(model, ["vision_model:attn.q", "vision_model:attn.v"])
    assert {site.rows for site in sites} == {(0, 32), (64, 96)}
    attention = model.vision_model.encoder.layers[0].self_attn
    x = torch.randn(1, 5, 32)
    fused = attention.qkv(x)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in fused.split(32, -1))
    z = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x)[0], attention.projection(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [llava, blip2])
def test_what_is_not_named_stays_frozen_and_the_table_says_so_before_training(build):
    model, inputs = build()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    projector = "multi_modal_projector" if build is llava else "language_projection"
    choice = {"language_model": "adapt", projector: "full", "vision": "freeze"}
    if build is llava:
        choice = {**choice, "vision_tower": "freeze"}
    choice.pop("vision")
    if build is blip2:  # its head is a part of the path language_model too
        with pytest.raises(UsageError, match="'language_model.lm_head' has no blocks to adapt"):
            adapt(model, "lora", choice, sample=inputs, **LORA)
        choice["decoder"] = choice.pop("language_model")
    handle = adapt(model, "lora", choice, {projector: 0.1}, sample=inputs, **LORA)
    rows = {row["part"]: row for row in table(handle)}
    language = next(name for name in rows if rows[name]["kind"] == "language")
    bridge = next(name for name in rows if name.endswith(projector))
    assert rows[language]["trained"] == 2 * 2 * 4 * 64 and rows[language]["rate"] == 1
    count = sum(p.numel() for n, p in model.named_parameters() if n.startswith(bridge + "."))
    assert rows[bridge]["trained"] == count and rows[bridge]["rate"] == 0.1 and rows[bridge]["frozen"] == 0
    assert rows[bridge]["bytes"] == 4 * count
    assert not any(row["trained"] for name, row in rows.items() if name not in (language, bridge))
    assert sum(row["trained"] for row in rows.values()) == handle.parameters_count()["trained"]
    assert sum(row["trained"] + row["frozen"] for row in rows.values()) == handle.parameters_count()["total"]
    lines = describe(table(handle))
    assert len(lines) == len(rows) and any("rate x 0.1" in line and bridge in line for line in lines)

    groups = handle.trainable()
    assert {(g["name"], g["lr_scale"]) for g in groups} == {("adapter", 1.0), ("head", 0.1)}
    optimizer = torch.optim.SGD([{"params": g["params"], "lr": 0.1 * g["lr_scale"]} for g in groups])
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
    handle.detach()
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())


def test_lora_and_a_trained_projector_are_saved_together_and_merge_leaves_other_towers_bit_equal(tmp_path):
    model, inputs = llava()
    tower = {k: v.clone() for k, v in model.model.vision_tower.state_dict().items()}
    choice = {"language_model": "adapt", "multi_modal_projector": "full"}
    handle = stir(adapt(model, "lora", choice, sample=inputs, **LORA))
    twin = llava()[0]
    load_adapter(twin, handle.save(tmp_path / "adapter"), sample=inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(twin(**inputs).logits, expected)
        handle.merge()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(v, tower[k]) for k, v in model.model.vision_tower.state_dict().items())


@pytest.mark.parametrize("build", [llava, blip2, siglip])
@pytest.mark.parametrize(("method", "more"), [("vl.routed_lora", LORA), ("vl.routed_bottleneck", {"bottleneck": 4})])
def test_routing_in_one_part_leaves_the_others_alone(build, method, more):
    model, inputs = build()
    language = next(part.name for part in parts(model) if part.kind == "language")
    handle = stir(adapt(model, method, {language: "adapt"}, sample=inputs, **more))
    assert {site.component for site in handle.sites} == {language}
    outputs = []
    for seed in (0, 1):
        v = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
        with handle.using(features=v), torch.no_grad():
            outputs.append(model(**inputs))
    if build is siglip:
        assert torch.equal(outputs[0].image_embeds, outputs[1].image_embeds)
        assert not torch.allclose(outputs[0].text_embeds, outputs[1].text_embeds)
    else:
        assert not torch.allclose(outputs[0].logits, outputs[1].logits)


def test_the_q_former_is_adapted_at_its_cross_attention():
    model, inputs = blip2()
    choice, sites = {"qformer.encoder": "adapt"}, ("cross.q", "cross.v")
    handle = adapt(model, "vl.routed_lora", choice, sample=inputs, sites=sites, **LORA)
    assert len(handle.sites) == 2 and all("crossattention" in site.path for site in handle.sites)
    stir(handle)
    with handle.using(features=torch.randn(2, 32)):
        model(**inputs).logits.square().mean().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in handle.trained().values())


@pytest.mark.parametrize("family", ["hf_bert", "hf_roberta", "hf_gpt2", "hf_vit", "timm_vit"])
def test_a_host_of_one_tower_has_a_table_too(family):
    model = HOSTS[family]().model
    handle = attach(model, "lora", **LORA)
    rows = table(handle)
    assert sum(row["trained"] for row in rows) == handle.parameters_count()["trained"]
    assert sum(row["trained"] + row["frozen"] for row in rows) == handle.parameters_count()["total"]
    assert rows[0]["kind"] == ("vision" if "vit" in family else "language")


def test_a_shared_v_proj_has_a_row_of_its_own():
    handle = attach(HOSTS["hf_roberta"]().model, "vl.routed_lora", context_dim=20, **LORA)
    rows = {row["part"]: row for row in table(handle)}
    assert rows["shared"]["trained"] == 20 * 32 and rows["roberta"]["trained"] == 2 * 2 * 4 * 64


@pytest.mark.parametrize(
    ("choice", "rates", "message"),
    [
        ({"langage": "adapt"}, None, "part 'langage' is not in the model"),
        ({"language_model": "tune"}, None, "'tune' is none of freeze, adapt and full"),
        ({"multi_modal_projector": "adapt"}, None, "has no blocks to adapt"),
        ({"multi_modal_projector": "full"}, None, "no part is adapted: name one of model.vision_tower"),
        ({"language_model": "adapt"}, {"vision_tower": 0.0}, "it must be above 0; or freeze it"),
        ({"language_model": "adapt"}, {"tower": 0.1}, "part 'tower' is not in the model"),
    ],
)
def test_choices_that_cannot_be_are_refused_and_leave_no_trace(choice, rates, message):
    model, inputs = llava()
    with pytest.raises(UsageError, match=message):
        adapt(model, "lora", choice, rates, sample=inputs)
    assert not hasattr(model, "adapter_bank")


def test_a_bare_parameter_is_not_trained_by_itself():
    model, inputs = blip2()
    with pytest.raises(UsageError, match="'query_tokens' is no module of its own"):
        adapt(model, "lora", {"vision_model": "adapt", "query_tokens": "full"}, sample=inputs)
