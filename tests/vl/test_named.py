"""Any image encoder beside any text model, by name, from folders in the hub's layout that are built here."""

import json
import shutil

import pytest
import torch

from adaptsuite.errors import ResourceError, UsageError
from adaptsuite.vl import load_pair
from adaptsuite.vl.backbones import DecoderPair, EncoderPair
from adaptsuite.vl.named import halves


def open_clip_files(path):
    """(config, weights) of a tiny CLIP."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
        "text_cfg": {"context_length": 7, "vocab_size": 99, "width": 32, "heads": 2, "layers": 2},
    }
    (path / "clip.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file(CLIP(**config).state_dict(), path / "clip.safetensors")
    return f"open_clip:{path / 'clip.json'}@{path / 'clip.safetensors'}"


def test_a_name_has_two_halves():
    assert halves("pair:timm:vit?img_size=32,32@a+b.pt+hf:some/model") == (
        "timm:vit?img_size=32,32@a+b.pt",
        "hf:some/model",
    )
    for name in ("pair:timm:vit", "timm:vit+hf:bert", "pair:timm:vit+bert", "pair:timm:a+hf:b+hf:c"):
        with pytest.raises(UsageError, match="pair:IMAGE\\+TEXT is expected"):
            halves(name)


@pytest.mark.parametrize("image, dim", [("vit", 48), ("clip", 32), ("siglip", 32), ("open_clip", 32), ("vl-tiny", 64)])
def test_image_halves_give_one_token_that_sums_up_and_patches_by_row(image, dim, folder, tmp_path):
    name = {"open_clip": lambda: open_clip_files(tmp_path), "vl-tiny": lambda: "embedded:vl-tiny"}
    name = name.get(image, lambda: f"hf:{folder(image)}")()
    pair = load_pair(f"pair:{name}+hf:{folder('bert')}")
    picture = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        v = pair.encode_image(picture)
    assert v.shape == (2, 17, dim) and pair.image_dim == dim and pair.num_patches((32, 32)) == 16
    assert pair.patch_size == (8, 8) and pair.adaptsuite_front_end["size"] == (32, 32)
    if image in ("vit", "clip", "siglip"):
        encoder = pair.image_encoder
        mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
        seen = (picture / 255 - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            tokens = encoder(pixel_values=seen).last_hidden_state
        torch.testing.assert_close(v[:, 1:], tokens[:, -16:])
        torch.testing.assert_close(v[:, 0], tokens[:, 0] if image != "siglip" else tokens.mean(1))


def test_the_size_of_pictures_may_be_another(folder):
    pair = load_pair(f"pair:timm:vit_tiny_patch16_224+hf:{folder('bert')}", random_weights=True, size=32)
    assert pair.num_patches((32, 32)) == 4 and pair.image_encoder.adaptsuite_source.resized
    with pytest.raises(UsageError, match="image size 40 x 40"):
        load_pair(f"pair:timm:vit_tiny_patch16_224+hf:{folder('bert')}", random_weights=True, size=40)


@pytest.mark.parametrize(
    "kind, longest", [("bert", 40), ("roberta", 40), ("distilbert", 512), ("t5", 512), ("bart", 512)]
)
def test_text_halves_read_what_their_own_folder_writes(kind, longest, folder):
    pair = load_pair(f"pair:embedded:vl-tiny+hf:{folder(kind)}")
    assert isinstance(pair, EncoderPair) and pair.word_dim == 32 and pair.tokenizer.max_length == longest
    text = pair.tokenizer(["what color is the top left ?", "red"])
    assert text["input_ids"][1].tolist() == [0, 10, 2] + [1] * 6 and text["attention_mask"].sum(1).tolist() == [9, 3]
    with torch.no_grad():
        found = pair.encode_text(**text)
        alone = pair.encode_text(**pair.tokenizer(["red"]))
    assert found.shape == (2, 9, 32)
    torch.testing.assert_close(found[1, :3], alone[0], rtol=1e-4, atol=1e-5)


def test_a_causal_half_writes(folder):
    pair = load_pair(f"pair:embedded:vl-tiny+hf:{folder('gpt2')}", causal=True)
    assert isinstance(pair, DecoderPair) and (pair.tokenizer.begin, pair.tokenizer.end) == (0, 2)
    assert pair.tokenizer.decode([0, 10, 2]) == "red" and pair.word_dim == 32
    text = pair.tokenizer(["red circle"])
    assert pair(torch.zeros(1, 3, 32, 32), **text)[1].shape == (1, 4, 20)


def test_a_longer_text_is_cut_and_counted(folder):
    from dataclasses import replace

    short = replace(load_pair(f"pair:embedded:vl-tiny+hf:{folder('bert')}").tokenizer, max_length=4)
    assert short(["red green red"])["input_ids"].shape == (1, 4) and short.cut("red green red") == 1


def test_halves_that_do_not_fit_are_refused_in_a_line(folder, tmp_path):
    with pytest.raises(UsageError, match="ViTModel, which does not read embedded words"):
        load_pair(f"pair:embedded:vl-tiny+hf:{folder('vit')}")
    copy_without(folder("bert"), tmp_path / "bare", "tokenizer")
    with pytest.raises(ResourceError, match="its tokenizer cannot be had"):
        load_pair(f"pair:embedded:vl-tiny+hf:{tmp_path / 'bare'}")
    with pytest.raises(UsageError, match="auto=pipeline"):
        load_pair(f"pair:embedded:vl-tiny+hf:{folder('bert')}?auto=pipeline")


def copy_without(folder, to, prefix):
    to.mkdir()
    for path in folder.iterdir():
        if not path.name.startswith(prefix):
            shutil.copy(path, to)


def test_code_of_a_folder_is_never_run(folder, tmp_path):
    shutil.copytree(folder("bert"), tmp_path / "bert")
    sentinel = tmp_path / "ran"
    (tmp_path / "bert" / "own.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Own: ...\n")
    config = tmp_path / "bert" / "tokenizer_config.json"
    said = json.loads(config.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    config.write_text(json.dumps(said))
    load_pair(f"pair:embedded:vl-tiny+hf:{tmp_path / 'bert'}")
    assert not sentinel.exists()
