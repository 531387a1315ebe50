import json

import pytest
import torch
import torch.nn.functional as F

from adaptsuite.backbones import load_backbone
from adaptsuite.errors import ResourceError, UsageError
from adaptsuite.vl.two_tower import HfSiglip, OpenClip, Unaligned, cosines, load_towers

TEXTS = ["a photo of a cat.", "a much longer text about two dogs and a bird"]
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 24, "width": 16, "heads": 2, "layers": 1},
}


def open_clip(folder, custom=False, **text):
    path = folder / "tiny.json"
    config = {**OPEN_CLIP, "custom_text": custom, "text_cfg": {**OPEN_CLIP["text_cfg"], **text}}
    path.write_text(json.dumps(config))
    return f"open_clip:{path}"


def hf(folder, kind):
    """A folder in the hub's layout, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel

    words = ["[PAD]", "[UNK]", *{w: 0 for t in TEXTS for w in t.replace(".", "").split()}, "[BEGIN]", "[END]"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[BEGIN]", len(words) - 2), ("[END]", len(words) - 1)]
    raw.post_processor = processors.TemplateProcessing(single="[BEGIN] $A [END]", special_tokens=ends)
    tokens = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[BEGIN]", "eos_token": "[END]"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **tokens).save_pretrained(folder)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    text = dict(**shape, vocab_size=len(words), max_position_embeddings=16, eos_token_id=len(words) - 1)
    vision = dict(**shape, image_size=32, patch_size=16)
    torch.manual_seed(0)
    if kind == "clip":
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    else:
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    how = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 2, "do_center_crop": kind == "clip"}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))
    return f"hf:{folder}"


@pytest.mark.parametrize("custom", [False, True])
def test_open_clip_towers_say_what_the_model_says(tmp_path, custom):
    """Texts are cut to the longest, which a causal tower does not see; pictures are as its own transform gives them."""
    from open_clip.transform import PreprocessCfg

    name = open_clip(tmp_path, custom)
    towers, model = load_towers(name, random_weights=True), load_backbone(name, random_weights=True)
    image, text = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), towers.tokenizer(TEXTS)
    assert isinstance(towers, OpenClip) and text["input_ids"].shape[1] < 24
    mean, std = (torch.tensor(v)[:, None, None] for v in (PreprocessCfg.mean, PreprocessCfg.std))
    with torch.no_grad():
        seen = model.encode_image((image / 255 - mean) / std)
        read = model.encode_text(towers.tokenizer.tokenize(TEXTS, context_length=24))
        torch.testing.assert_close(towers.see(image)[:, 0], seen)
        torch.testing.assert_close(towers.read(**text)[:, 0], read)
        expected = F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
        torch.testing.assert_close(cosines(towers.see(image), towers.read(**text)), expected)
        torch.testing.assert_close(towers.see(image / 255), towers.see(image))
    assert towers.scale.item() == pytest.approx(1 / 0.07, rel=1e-4)


def test_open_clip_without_a_causal_mask_reads_the_whole_length(tmp_path):
    name = open_clip(tmp_path, no_causal_mask=True, pool_type="last")
    towers, model = load_towers(name, random_weights=True), load_backbone(name, random_weights=True)
    text = towers.tokenizer(TEXTS)
    assert text["input_ids"].shape == (2, 24)
    with torch.no_grad():
        torch.testing.assert_close(towers.read(**text)[:, 0], model.encode_text(text["input_ids"]))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_towers_say_what_the_model_says(tmp_path, kind):
    from transformers import AutoModel, AutoTokenizer

    name = hf(tmp_path, kind)
    towers, model = load_towers(name), AutoModel.from_pretrained(tmp_path).eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    text = AutoTokenizer.from_pretrained(tmp_path)(
        TEXTS, padding="longest" if kind == "clip" else "max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        mask = {"attention_mask": text["attention_mask"]} if kind == "clip" else {}
        out = model(input_ids=text["input_ids"], pixel_values=(image / 255 - 0.4) / 0.3, **mask)
        said = towers.scale * cosines(towers.see(image), towers.read(**towers.tokenizer(TEXTS))) + towers.bias
    torch.testing.assert_close(said, out.logits_per_image)
    assert isinstance(towers, HfSiglip) == (kind == "siglip")
    assert towers.front_end.fit == ("crop" if kind == "clip" else "squash")
    assert towers.front_end.interpolation == "bilinear" and towers.front_end.size == (32, 32)


def test_the_embedded_pair_is_not_aligned():
    towers = load_towers("embedded:vl-tiny", random_weights=True)
    text = towers.tokenizer(["red circle", "a red circle and a blue square"])
    with torch.no_grad():
        seen, read = towers.see(torch.rand(2, 3, 32, 32)), towers.read(**text)
        alone = towers.read(**towers.tokenizer(["red circle"]))
    assert isinstance(towers, Unaligned) and not towers.aligned
    assert (seen.shape[2], read.shape[2]) == towers.widths
    torch.testing.assert_close(read[:1], alone, rtol=1e-4, atol=1e-4)  # padding is not averaged


def test_prompts_are_read_of_custom_text_towers_and_refused_where_none_can_be(tmp_path):
    from adaptsuite.host import attach
    from adaptsuite.vl.few_shot import FewShotModel

    for options, said in (({}, ""), ({"no_causal_mask": True, "pool_type": "last"}, "reads its last token")):
        towers = load_towers(open_clip(tmp_path, custom=True, **options), random_weights=True)
        model = FewShotModel(towers, ["cat", "dog"], 2, "a {}", "few_shot")
        if said:
            with pytest.raises(UsageError, match=said):
                attach(model, "vl.rpo", sample=(torch.rand(1, 3, 32, 32),))
            continue
        attach(model, "vl.rpo", sample=(torch.rand(1, 3, 32, 32),), tokens=3)
        with torch.no_grad():
            assert towers.see(torch.rand(1, 3, 32, 32)).shape == (1, 3, 16)
            assert towers.read(**towers.tokenizer(TEXTS)).shape == (2, 3, 16)


def test_towers_with_other_numbers_of_vectors_are_not_compared():
    with pytest.raises(UsageError, match="3 vectors a picture beside 1 a text"):
        cosines(torch.rand(2, 3, 4), torch.rand(2, 1, 4))


def test_cut_counts_what_does_not_fit(tmp_path):
    towers = load_towers(open_clip(tmp_path), random_weights=True)
    assert towers.tokenizer.cut("cat") == 0 and towers.tokenizer.cut("cat " * 30) == 8
    assert towers.tokenizer(["cat " * 30])["attention_mask"].sum() == 24


def test_other_models_and_missing_files_are_one_line(tmp_path):
    with pytest.raises(UsageError, match="two towers that can be compared are needed"):
        load_towers("timm:vit_tiny_patch16_224", random_weights=True)
    name = hf(tmp_path, "clip")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ResourceError, match="preprocessor_config.json cannot be had"):
        load_towers(name)
    small = tmp_path / "small"
    small.mkdir()
    with pytest.raises(UsageError, match="99 token embeddings for a tokenizer of 49408 tokens"):
        load_towers(open_clip(small, vocab_size=99), random_weights=True)
