"""Any image encoder beside any text model, by name: pair:IMAGE+TEXT, each half as adaptsuite.backbones has it.

IMAGE: timm, transformers (also the image tower of CLIP and SigLIP), open_clip, or the half of an embedded pair.
TEXT: an encoder of transformers (BERT, RoBERTa, DistilBERT, the encoder of T5 and BART) or, for captions, a causal
language model; with the tokenizer of its folder.
"""

import inspect
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from adaptsuite.backbones import SOURCES, load_backbone
from adaptsuite.errors import UsageError
from adaptsuite.front_end import load
from adaptsuite.vl.backbones import DecoderPair, EncoderPair, Sighted
from adaptsuite.vl.hub import LONGEST, HubTokenizer, WritingTokenizer, hub_tokenizer

PAIR = "pair:"


def halves(name: str) -> tuple[str, str]:
    """("timm:vit_base_patch16_224", "hf:roberta") of "pair:timm:vit_base_patch16_224+hf:roberta".

    Raises UsageError where there are not two.
    """
    found = re.split(rf"\+(?=(?:{'|'.join(SOURCES)}):)", name.removeprefix(PAIR))
    if not name.startswith(PAIR) or len(found) != 2:
        raise UsageError(f"backbone {name!r}: pair:IMAGE+TEXT is expected, as pair:timm:vit_base_patch16_224+hf:FOLDER")
    return found[0], found[1]


def load_pair(
    name: str,
    *,
    causal: bool = False,
    random_weights: bool = False,
    seed: int = 0,
    size: int | Sequence[int] | None = None,
) -> Sighted:
    """The two halves of a name, or an embedded pair; frozen parts in eval mode, each bound to its own source.

    causal: the text model writes (DecoderPair).  size: of the pictures, None: the image encoder's own.
    Raises UsageError for halves that cannot be read, ResourceError where weights or a tokenizer cannot be had.
    """
    options = {"random_weights": random_weights, "seed": seed}
    if not name.startswith(PAIR):
        return load_backbone(name, **options)
    image, text = halves(name)
    encoder, front = load(image, size=size, **options)
    kind = DecoderPair if causal else EncoderPair
    model, tokenizer = (_writer if causal else _reader)(text, options)
    front = replace(front, fit="squash", ratio=1.0)  # a crop could cut off what is asked for
    return kind(encoder, model, tokenizer, asdict(front)).eval()


def _reader(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """(text encoder, its tokenizer)."""
    known: list[Any] = []

    def part(model: nn.Module) -> nn.Module:
        if isinstance(model, EncoderPair):
            known.append(model.tokenizer)
            return model.text_encoder
        encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        model = model.get_encoder() if encodes else model
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            raise UsageError(f"{name} is {type(model).__name__}, which does not read embedded words as text models do")
        if getattr(model, "pooler", None) is not None:  # nobody reads it, and many folders have no weights for it
            model.pooler = None
        return model

    model = load_backbone(name, part=part, **options)
    return model, known[0] if known else _tokenizer(name, model)


def _writer(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """(causal language model, its tokenizer)."""
    model = load_backbone(name, auto="AutoModelForCausalLM", **options)
    return model, _tokenizer(name, model, WritingTokenizer)


def _tokenizer(name: str, model: nn.Module, kind: type[HubTokenizer] = HubTokenizer) -> HubTokenizer:
    found, rows = hub_tokenizer(name, _positions(model), kind), model.get_input_embeddings().num_embeddings
    if len(found) > rows:
        raise UsageError(f"{name}: its tokenizer has {len(found)} tokens and the model embeds {rows}")
    return found


def _positions(model: nn.Module) -> int:
    """The longest input in tokens; those of RoBERTa start behind its padding."""
    tables = (m for n, m in model.named_modules() if n.endswith("position_embeddings") and isinstance(m, nn.Embedding))
    config, table = model.config, next(tables, None)
    if table is not None and table.padding_idx is not None:
        return table.num_embeddings - table.padding_idx - 1
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or LONGEST
