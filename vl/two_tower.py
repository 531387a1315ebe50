"""Models of two towers whose embeddings are compared (CLIP, SigLIP): by name, with the model's own tokenizer and eyes.

`open_clip:` and `hf:` models embed a picture or a text as (B, K, E): one row, or as many as there are read-only
prompts (`vl.rpo`) behind the tokens of a tower; pairs of rows are compared, and the mean of the cosines is the score.
The embedded pair, whose encoders know nothing of each other, gives features that projections of one's own must align.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.backbones import load_backbone, parse_backbone, parse_options
from adaptsuite.errors import ResourceError, UsageError
from adaptsuite.front_end import FrontEnd, image_tower, own_front_end, preprocessor
from adaptsuite.vl.backbones import EncoderPair, unit
from adaptsuite.vl.hub import FullTokenizer, HubTokenizer, hub_tokenizer
from adaptsuite.vl.rpo import end_of_text


class TwoTower(nn.Module):
    """Pictures (B, 3, H, W), uint8 or in [0, 1], and texts as `tokenizer` gives them, as vectors of one space."""

    aligned = True  # whether the two were trained to be compared
    image_part: str  # the image tower's name among the components of `model`

    def __init__(self, model: nn.Module, tokenizer: Callable[[Sequence[str]], dict[str, Tensor]], front_end: FrontEnd):
        super().__init__()
        self.model, self.tokenizer, self.front_end = model, tokenizer, front_end
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(front_end, name)).view(-1, 1, 1), persistent=False)

    def normalised(self, image: Tensor) -> Tensor:
        return (unit(image) - self.mean) / self.std

    def see(self, image: Tensor) -> Tensor:
        """(B, K, E), not normalised; as `read` gives texts."""
        raise NotImplementedError

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by."""
        return self.model.logit_scale.exp()

    @property
    def bias(self) -> Tensor | float:
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else bias


def cosines(image: Tensor, text: Tensor) -> Tensor:
    """(B, C): the mean over the K pairs of cosines of image (B, K, E) and text (C, K, E).

    Raises UsageError where one tower has read-only prompts to be read, and the other has none.
    """
    if image.shape[1] != text.shape[1]:
        raise UsageError(
            f"{image.shape[1]} vectors a picture beside {text.shape[1]} a text: vl.rpo needs the transformers of CLIP "
            "itself in both towers"
        )
    return torch.einsum("bke,cke->bc", F.normalize(image, dim=-1), F.normalize(text, dim=-1)) / image.shape[1]


class OpenClip(TwoTower):
    """open_clip's CLIP or CustomTextCLIP; prompts are read of its own transformers, timm towers have none."""

    image_part = "visual"

    def see(self, image: Tensor) -> Tensor:
        tower, image = self.model.visual, self.normalised(image)
        if not hasattr(tower, "_embeds"):
            return self.model.encode_image(image).unsqueeze(1)
        x = tower._embeds(image)
        own = x.shape[1]
        x = tower.transformer(x)
        if x.shape[1] == own:
            found = tower._pool(x)[0].unsqueeze(1)
        elif tower.attn_pool is None:
            found = tower.ln_post(x[:, own:])
        else:
            raise UsageError("read-only prompts need an image tower that reads its CLS token, not attention pooling")
        return found if tower.proj is None else found @ tower.proj

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tower = text_tower(self.model)
        if not _causal(tower):
            return self.model.encode_text(input_ids).unsqueeze(1)
        rows, length = input_ids.shape
        x = tower.token_embedding(input_ids) + tower.positional_embedding[:length]
        hidden = x.new_zeros(rows, 1, length).masked_fill(attention_mask[:, None] == 0, float("-inf"))
        mask = (tower.attn_mask[:length, :length] + hidden).repeat_interleave(
            tower.transformer.resblocks[0].attn.num_heads, 0
        )
        x = tower.ln_final(tower.transformer(x, attn_mask=mask))
        # the last real token is the end of text, whichever number it has
        last = attention_mask.sum(1) - 1
        found = x[torch.arange(rows, device=x.device), last].unsqueeze(1) if x.shape[1] == length else x[:, length:]
        projection = tower.text_projection
        return found if projection is None else projection(found) if callable(projection) else found @ projection


def text_tower(model: nn.Module) -> nn.Module:
    """open_clip keeps the parts of CLIP's text tower on the root."""
    return model if hasattr(model, "token_embedding") else model.text


def _causal(tower: nn.Module) -> bool:
    """Whether it is CLIP's own text transformer, read at the end of the text, where padding behind says nothing."""
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    return pool in ("argmax", "eos") and tower.attn_mask is not None and getattr(tower, "cls_emb", None) is None


class HfClip(TwoTower):
    """transformers' CLIPModel."""

    image_part = "vision_model"

    def see(self, image: Tensor) -> Tensor:
        tower = self.model.vision_model
        out, own = tower(pixel_values=self.normalised(image)), tower.embeddings.num_positions
        tokens = out.last_hidden_state
        more = tokens.shape[1] > own
        found = tower.post_layernorm(tokens[:, own:]) if more else out.pooler_output.unsqueeze(1)
        return self.model.visual_projection(found)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out = self.model.text_model(input_ids=input_ids, attention_mask=attention_mask)
        tokens, own = out.last_hidden_state, input_ids.shape[1]
        found = tokens[:, own:] if tokens.shape[1] > own else out.pooler_output.unsqueeze(1)
        return self.model.text_projection(found)


class HfSiglip(TwoTower):
    """transformers' SiglipModel, which pools by itself."""

    image_part = "vision_model"

    def see(self, image: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=self.normalised(image)).pooler_output.unsqueeze(1)

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.text_model(input_ids=input_ids).pooler_output.unsqueeze(1)  # trained on padding, unmasked


class Unaligned(TwoTower):
    """An EncoderPair: CLS of the picture, the mean of the words; of widths of their own, in spaces of their own."""

    aligned, image_part = False, "image_encoder"

    def __init__(self, pair: EncoderPair):
        super().__init__(pair, pair.tokenizer, FrontEnd(**{**pair.adaptsuite_front_end, "fit": "squash"}))

    def see(self, image: Tensor) -> Tensor:
        return self.model.encode_image(image)[:, :1]  # it normalises by itself

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask[..., None].float()
        return ((self.model.encode_text(input_ids, attention_mask) * real).sum(1) / real.sum(1)).unsqueeze(1)

    @property
    def widths(self) -> tuple[int, int]:
        return self.model.image_dim, self.model.text_encoder.get_input_embeddings().embedding_dim


# by name ------------------------------------------------------------------------------------------------------------


def load_towers(name: str, *, random_weights: bool = False, seed: int = 0) -> TwoTower:
    """`open_clip:...`, `hf:...` of CLIP or SigLIP, or an embedded pair; frozen, in eval mode.

    Raises UsageError for a model of another kind, ResourceError where its tokenizer cannot be had.
    """
    model = load_backbone(name, random_weights=random_weights, seed=seed)
    source, rest = parse_backbone(name)
    if isinstance(model, EncoderPair):
        return Unaligned(model).eval()
    if source == "open_clip":
        front = FrontEnd(**image_tower(model).adaptsuite_front_end)
        return OpenClip(model, open_clip_tokenizer(rest, model), front).eval()
    kind = getattr(getattr(model, "config", None), "model_type", "")
    if kind in ("clip", "siglip", "siglip2") and hasattr(model, "logit_scale"):
        if not preprocessor(name):
            raise ResourceError(f"{name}: its preprocessor_config.json cannot be had")
        towers, tokens = (HfClip, HubTokenizer) if kind == "clip" else (HfSiglip, FullTokenizer)
        tokenizer = hub_tokenizer(name, model.config.text_config.max_position_embeddings, tokens)
        return towers(model, tokenizer, own_front_end(model)).eval()
    raise UsageError(
        f"{name} is {type(model).__name__}: two towers that can be compared are needed, as open_clip:MODEL/TAG, "
        "hf:FOLDER of CLIP or SigLIP, or embedded:vl-tiny"
    )


class ClipTokens:
    """open_clip's tokenizer as {"input_ids", "attention_mask"}; of a causal tower cut to the longest text."""

    def __init__(self, tokenize: Callable, context_length: int, trims: bool, end: int):
        self.tokenize, self.max_length, self.trims, self.end = tokenize, context_length, trims, end

    def cut(self, text: str) -> int:
        """How many tokens of a text are beyond what the tower reads."""
        ids = self.tokenize([text], context_length=4 * self.max_length)[0]
        return max(0, int((ids != 0).sum()) - self.max_length)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        ids = self.tokenize(list(texts), context_length=self.max_length)
        if not self.trims:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        last = (ids == self.end).int().argmax(1)
        length = int(last.max()) + 1
        return {
            "input_ids": ids[:, :length],
            "attention_mask": (torch.arange(length) <= last[:, None]).long(),
        }


def open_clip_tokenizer(rest: str, model: nn.Module) -> ClipTokens:
    """rest: what a backbone's name says behind open_clip:"""
    import open_clip

    name, tower = parse_options(rest)[0], text_tower(model)
    length = getattr(model, "context_length", None) or tower.context_length
    if name.endswith(".json"):
        config = json.loads(Path(name).read_text(encoding="utf-8"))
        given = config.get("model_cfg", config)["text_cfg"].get("hf_tokenizer_name")
        tokenize = open_clip.HFTokenizer(given, length) if given else open_clip.SimpleTokenizer(context_length=length)
    else:
        try:
            tokenize = open_clip.get_tokenizer(name.partition("/")[0])
        except OSError as error:
            raise ResourceError(f"open_clip:{name}: its tokenizer cannot be had ({_line(error)})") from error
    size = tower.token_embedding.num_embeddings if hasattr(tower, "token_embedding") else None
    known = getattr(tokenize, "vocab_size", None)
    if size is not None and known is not None and known > size:
        raise UsageError(f"open_clip:{name}: {size} token embeddings for a tokenizer of {known} tokens")
    trims = hasattr(tower, "token_embedding") and _causal(tower)
    return ClipTokens(tokenize, length, trims, end_of_text(tower, size) if trims else -1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
