"""Folders in the hub's layout, of tiny models with random weights."""

import json

import pytest
import torch

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VISION = dict(**SHAPE, image_size=32, patch_size=8)
WORDS = "what color is the top left red green shape circle ? . photo of".split()


def tokenizer_folder(folder, pad=1):
    """A fast tokenizer of whole words with <s> and </s> around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def text_model(kind):
    import transformers as t

    if kind == "bert":
        return t.BertModel(t.BertConfig(**SHAPE, vocab_size=20, max_position_embeddings=40))
    if kind == "roberta":
        return t.RobertaModel(t.RobertaConfig(**SHAPE, vocab_size=20, max_position_embeddings=42, pad_token_id=1))
    if kind == "distilbert":
        return t.DistilBertModel(t.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=20))
    if kind == "t5":
        return t.T5Model(t.T5Config(d_model=32, d_kv=16, num_heads=2, d_ff=64, num_layers=2, vocab_size=20))
    if kind == "bart":
        heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
        return t.BartModel(t.BartConfig(d_model=32, encoder_layers=2, decoder_layers=2, **heads, vocab_size=20))
    ends = dict(bos_token_id=0, eos_token_id=2)
    return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=20, n_positions=40, **ends))


def whole_model(kind):
    import transformers as t

    if kind == "llava":
        text, vision = t.LlamaConfig(**SHAPE, num_key_value_heads=2, vocab_size=20), t.CLIPVisionConfig(**VISION)
        config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=19, vision_feature_layer=-1)
        return t.LlavaForConditionalGeneration(config)
    text = t.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32, vocab_size=20,
        max_position_embeddings=64,
    )  # fmt: skip
    config = t.Blip2Config(
        vision_config=t.Blip2VisionConfig(**VISION).to_dict(),
        qformer_config=t.Blip2QFormerConfig(**SHAPE, encoder_hidden_size=32, vocab_size=20).to_dict(),
        text_config=text.to_dict(), num_query_tokens=4, image_token_index=19,
    )  # fmt: skip
    return t.Blip2ForConditionalGeneration(config)


def image_model(kind):
    import transformers as t

    if kind == "vit":
        return t.ViTModel(
            t.ViTConfig(**{**VISION, "hidden_size": 48, "num_attention_heads": 2}), add_pooling_layer=False
        )
    text = dict(**SHAPE, vocab_size=20, max_position_embeddings=16, bos_token_id=0, eos_token_id=2)
    if kind == "clip":
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
    return t.SiglipModel(t.SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=VISION))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(kind): a tiny model's in the hub's layout, made once."""
    made = {}

    def build(kind):
        if kind in made:
            return made[kind]
        path = made[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        if kind in ("vit", "clip", "siglip"):
            image_model(kind).save_pretrained(path)
            said = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 2, "do_center_crop": True}
            (path / "preprocessor_config.json").write_text(json.dumps(said))
            tokenizer_folder(path)
        else:
            model = whole_model(kind) if kind in ("llava", "blip2") else text_model(kind)
            with torch.no_grad():
                for p in model.parameters():  # queries of a fresh BLIP-2 are zero
                    p.add_(torch.randn_like(p), alpha=0.02 if p.ndim < 2 else 0.1)
            model.save_pretrained(path)
            tokenizer_folder(path)
        return path

    return build
