"""Image encoders beside text models, each pretrained without the other: pairs by name, and those that ship with us."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaptsuite.backbones import shipped
from adaptsuite.features import num_prefix, see, width
from adaptsuite.probe import meta_copy
from adaptsuite.vl.tokenizer import SpellingTokenizer, WordTokenizer


def unit(image: Tensor) -> Tensor:
    """uint8 pictures as values in [0, 1]; others as they are."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


class Sighted(nn.Module):
    """An image encoder (as adaptsuite.features.see reads it) with its normalisation, and the tokenizer of a text model
    beside it. front_end: of adaptsuite.front_end.FrontEnd, with size, mean and std at least."""

    def __init__(self, image_encoder: nn.Module, tokenizer: Any, front_end: dict):
        super().__init__()
        self.image_encoder, self.tokenizer = image_encoder, tokenizer
        fixed = {k: tuple(v) if isinstance(v, list) else v for k, v in front_end.items()}  # JSON has lists
        self.adaptsuite_front_end = image_encoder.adaptsuite_front_end = fixed

    @property
    def image_dim(self) -> int:
        """D of what `encode_image` gives."""
        return width(self.image_encoder)

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """Height and width in pixels; None where the encoder does not tell."""
        holders = (getattr(self.image_encoder, "patch_embed", None), getattr(self.image_encoder, "config", None))
        found = next((p for h in (*holders, self.image_encoder) if (p := getattr(h, "patch_size", None))), None)
        return (found, found) if isinstance(found, int) else found and tuple(found)

    def num_patches(self, size: Sequence[int]) -> int:
        """That `encode_image` gives of pictures of this height and width, by a forward without values."""
        image = torch.empty(1, 3, *size, device="meta")
        return see(meta_copy(self.image_encoder).eval(), image).patches.shape[1]

    def normalised(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) as the image encoder takes it, of uint8 pictures or of values in [0, 1]."""
        mean, std = (torch.tensor(self.adaptsuite_front_end[k], device=image.device) for k in ("mean", "std"))
        return (unit(image) - mean[:, None, None]) / std[:, None, None]

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 1 + patches, D): what sums the picture up, then patches by row. image: as `normalised` takes.

        The first is CLS; without one the encoder's own pooling, where it is as wide as patches are, or their mean.
        """
        seen = see(self.image_encoder, self.normalised(image), own=not num_prefix(self.image_encoder))
        one = seen.prefix[:, :1]
        if not one.shape[1]:
            fits = seen.own is not None and seen.own.shape[-1] == seen.patches.shape[-1]
            one = (seen.own if fits else seen.patches.mean(1)).unsqueeze(1)
        return torch.cat([one, seen.patches], 1)


class EncoderPair(Sighted):
    """An image encoder and a text encoder (transformers BertModel) that know nothing of each other: binding words to
    the image is left to what is put on top of them."""

    parts = "an image and a text encoder"

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module, tokenizer: WordTokenizer, front_end: dict):
        super().__init__(image_encoder, tokenizer, front_end)
        self.text_encoder = text_encoder

    @property
    def word_dim(self) -> int:
        """D of embedded words."""
        return self.text_encoder.get_input_embeddings().embedding_dim

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T, D) of padded rows, as the tokenizer gives them."""
        return self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(image), self.encode_text(input_ids, attention_mask)


class DecoderPair(Sighted):
    """An image encoder and a causal language model (transformers, such as GPT2LMHeadModel) that know nothing of each
    other. The tokenizer has `begin` and `end`, the numbers between which texts stand."""

    parts = "an image encoder and a causal language model"

    def __init__(self, image_encoder: nn.Module, language_model: nn.Module, tokenizer: Any, front_end: dict):
        super().__init__(image_encoder, tokenizer, front_end)
        self.language_model = language_model

    @property
    def word_dim(self) -> int:
        return self.language_model.get_input_embeddings().embedding_dim

    def forward(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(image), self.language_model(input_ids=input_ids, attention_mask=attention_mask).logits


def embedded(name: str, random_weights: bool = False) -> EncoderPair | DecoderPair:
    """The pair that ships as `name`, in the precision that its file stores. random_weights: fresh ones instead.

    Raises UsageError for another name.
    """
    from safetensors.torch import load

    data, record = shipped("vl", name)
    if "decoder" in record:
        image = embedded(record["image"]["embedded"], random_weights)
        model = causal_model(record)
        if not random_weights:
            model.half().transformer.load_state_dict(load(data))  # the head is its embedding
        tokenizer = SpellingTokenizer.of(record["tokenizer"])
        return DecoderPair(image.image_encoder, model, tokenizer, image.adaptsuite_front_end)
    pair = encoder_pair(record)
    if not random_weights:
        state = load(data)
        pair.to(next(iter(state.values())).dtype).load_state_dict(state)
    return pair


def encoder_pair(record: dict[str, Any]) -> EncoderPair:
    """With fresh weights. record: {"image": VisionTransformer's arguments, "text": BertConfig's, "tokenizer",
    "front_end": {"size", "mean", "std"}}. Pictures of any size in whole patches fit, positions are interpolated."""
    from timm.models.vision_transformer import VisionTransformer
    from transformers import BertConfig, BertModel

    tokenizer = WordTokenizer.of(record["tokenizer"])
    image = VisionTransformer(num_classes=0, dynamic_img_size=True, **record["image"])
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.max_length, **record["text"])
    return EncoderPair(image, BertModel(config, add_pooling_layer=False), tokenizer, record["front_end"])


def causal_model(record: dict[str, Any]) -> nn.Module:
    """With fresh weights. record: {"decoder": GPT2Config's arguments, "tokenizer": SpellingTokenizer's}."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = SpellingTokenizer.of(record["tokenizer"])
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    numbers = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **dropout, **numbers, **record["decoder"]))
