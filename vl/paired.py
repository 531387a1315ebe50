"""A frozen image encoder and a frozen text encoder as one model that answers questions about pictures.

What the image encoder gives at last, V, reaches the text in two ways: adapters of the text encoder read it from their
context (`adaptsuite.vl.context`), and it may stand before the words as a visual prefix. The answer is a class: an MLP
reads the mean over the words (arXiv:2403.09377, section 4.1 has 3129 answers). The image encoder runs once a picture:
V can be given in its place.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.errors import UsageError
from adaptsuite.front_end import FrontEnd
from adaptsuite.vl.backbones import EncoderPair, Sighted
from adaptsuite.vl.context import present, with_context
from adaptsuite.vl.settings import AnswerSettings, PrefixSettings, Tokens


class VisualMapper(nn.Module):
    """V (B, N, D_v) -> `tokens` vectors (B, tokens, D) of the text model's input.

    MAPL (Manas et al. 2022, arXiv:2210.07179, section 3): all tokens are narrowed, learned ones are set behind them,
    pre-norm blocks mix both, and what became of the learned ones is widened.
    """

    def __init__(
        self, dim_in: int, dim_out: int, tokens: int = 32, width: int = 256, layers: int = 4, heads: int = 8,
        hidden: int = 512,
    ):  # fmt: skip
        super().__init__()
        from timm.models.vision_transformer import Block

        if width % heads:
            raise UsageError(f"head.mapper_width={width}: a multiple of its {heads} heads is expected")
        self.narrow, self.widen = nn.Linear(dim_in, width), nn.Linear(width, dim_out)
        self.learned = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.mix = nn.ModuleList([Block(width, heads, mlp_ratio=hidden / width, qkv_bias=True) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)

    def forward(self, v: Tensor) -> Tensor:
        x = torch.cat([self.narrow(v), self.learned.expand(len(v), -1, -1)], 1)  # (B, N + tokens, width)
        for block in self.mix:
            x = block(x)
        return self.widen(self.norm(x[:, v.shape[1] :]))


class VisualPrefix(nn.Module):
    """What makes tokens before the words of V; it trains beside the adapters."""

    def __init__(self, dim_in: int, dim: int, settings: PrefixSettings):
        super().__init__()
        self.kind, self.dim = settings.prefix, dim
        if self.kind == "plain" and dim_in != dim:
            raise UsageError(
                f"head.prefix=plain: the image has {dim_in} features and words have {dim}; take linear, mapper or none"
            )
        if self.kind == "linear":  # of one pooled token: Embedding-to-Prefix
            self.mapper = nn.Linear(dim_in, dim)
        elif self.kind == "mapper":
            size = settings.mapper_tokens, settings.mapper_width, settings.mapper_layers
            self.mapper = VisualMapper(dim_in, dim, *size)

    def prefix(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, D), and (B, P) where a token is to be read: none of a row without an image."""
        real = present(v)[..., 0]
        if self.kind == "none":
            return v.new_zeros(len(v), 0, self.dim), real[:, :0]
        if self.kind == "plain":
            return v, real
        tokens = self.mapper(v)
        return tokens, real if self.kind == "linear" else real.amax(1, keepdim=True).expand(tokens.shape[:2])


class AnswerHead(VisualPrefix):
    """d -> 2d -> LayerNorm -> GELU -> K, behind a visual prefix; all of it trains beside the adapters."""

    def __init__(self, dim_in: int, dim: int, num_answers: int, settings: AnswerSettings):
        super().__init__(dim_in, dim, settings)
        self.answer = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.GELU(), nn.Linear(2 * dim, num_answers)
        )
        # each answer starts as likely as one of K: from 1/2 each, the first epochs of bce would only unlearn that
        nn.init.constant_(self.answer[-1].bias, -math.log(max(num_answers - 1, 1)))

    def forward(self, pooled: Tensor) -> Tensor:
        return self.answer(pooled)


class PrefixedModel(nn.Module):
    """A pair of which the text model reads V as tokens before its words.

    tokens: what of the image encoder's output is V: its CLS token, its patches, or both.
    image_trains: adapters are on the image encoder as well; otherwise V carries no gradient, which reentrant
    checkpoints of the text model need.
    """

    data_task: str  # the value of data.task that it serves
    linear_head = None  # no head ends in a linear layer alone

    def __init__(
        self,
        pair: Sighted,
        settings: PrefixSettings,
        tokens: Tokens = "cls",
        front_end: FrontEnd | None = None,
        image_trains: bool = False,
    ):
        super().__init__()
        if settings.prefix is None:
            settings = replace(settings, prefix="plain" if pair.image_dim == pair.word_dim else "linear")
        self.pair, self.tokens, self.settings, self.image_trains = pair, tokens, settings, image_trains
        self.context_dim = pair.image_dim  # of V: methods that route it project it where their sites are not as wide
        self.front_end = front_end or FrontEnd(**pair.adaptsuite_front_end)
        room = pair.tokenizer.max_length - self.num_prefix()
        if room < 3:
            raise UsageError(f"a prefix of {self.num_prefix()} tokens leaves no room for words in {room}: take fewer")
        self.tokenizer = replace(pair.tokenizer, max_length=room)

    def num_prefix(self) -> int:
        """Tokens before the words."""
        if self.settings.prefix == "mapper":
            return self.settings.mapper_tokens
        if self.settings.prefix == "none" or self.tokens == "cls":
            return int(self.settings.prefix != "none")
        return self.pair.num_patches(self.front_end.size) + (self.tokens == "all")

    def see(self, image: Tensor, has_image: Tensor | None = None) -> Tensor:
        """V (B, N, D) of uint8 pictures or of values in [0, 1]; rows of zeros where has_image (B,) is False."""
        with nullcontext() if self.image_trains else torch.no_grad():
            found = self.pair.encode_image(image)
        v = {"cls": found[:, :1], "patches": found[:, 1:], "all": found}[self.tokens]
        return v if has_image is None else v * has_image.to(v.dtype)[:, None, None]

    def prefixed(self, v: Tensor, words: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P + T, D) of V and of embedded words (B, T, D), and the mask of both."""
        prefix, read = self.head.prefix(v)
        mask = torch.cat([read.to(attention_mask.dtype), attention_mask], 1)
        return torch.cat([prefix.to(words.dtype), words], 1), mask


class PairedModel(PrefixedModel):
    """Pictures (B, 3, H, W) or their V (B, N, D), and questions (B, T), -> logits (B, K)."""

    data_task = "vqa"

    def __init__(self, pair: EncoderPair, num_answers: int, settings: AnswerSettings | None = None, *more, **options):
        super().__init__(pair, settings or AnswerSettings(), *more, **options)
        self.head = AnswerHead(pair.image_dim, pair.word_dim, num_answers, self.settings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor | None = None,
        features: Tensor | None = None,
        has_image: Tensor | None = None,
        embedding: bool = False,
    ) -> Tensor:
        """embedding: what the head reads (B, D) instead of logits."""
        v = self.see(image, has_image) if features is None else features
        # words alone are embedded here: position, type and norm are added once, inside the text encoder
        words = self.pair.text_encoder.get_input_embeddings()(input_ids)
        tokens, mask = self.prefixed(v, words, attention_mask)
        context = {"features": v, "token_mask": mask.bool()}
        out = with_context(self, self.pair.text_encoder, inputs_embeds=tokens, attention_mask=mask, context=context)
        real = attention_mask.unsqueeze(-1).to(words.dtype)
        # over words, not CLS: it was pretrained to sum nothing up
        pooled = (out.last_hidden_state[:, -words.shape[1] :] * real).sum(1) / real.sum(1)
        return pooled if embedding else self.head(pooled)


READ = ("input_ids", "attention_mask", "image", "features", "has_image")


def given(batch: dict[str, Tensor], names: Sequence[str] = READ) -> dict[str, Tensor]:
    """Of a batch what a model is called with: pictures or what was seen of them, and words."""
    return {name: batch[name] for name in names if name in batch}


class AnswerTask:
    """Answers as classes with soft scores: binary cross-entropy of each answer, summed over answers."""

    target, monitor = "target", "accuracy"

    def __init__(self, loss: str = "bce"):
        self.kind = loss

    def loss(self, model: PairedModel, batch: dict[str, Tensor]) -> Tensor:
        logits, target = self.predict(model, batch), batch["target"]
        if self.kind == "bce":  # summed over the answers (Teney et al. 2018, arXiv:1708.02711, eq. 5)
            return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(logits)
        total = target.sum(1, keepdim=True)  # a row none of whose answers is known says nothing here
        return -(F.log_softmax(logits, 1) * target / total.clamp(min=1e-6)).sum(1).mean()

    def predict(self, model: PairedModel, batch: dict[str, Tensor], **options) -> Tensor:
        return model(**given(batch), **options)

    def embed(self, model: PairedModel, batch: dict[str, Tensor]) -> Tensor:
        return self.predict(model, batch, embedding=True)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Mean soft accuracy of the answer with the highest score."""
        return {"accuracy": float(targets[np.arange(len(targets)), outputs.argmax(1)].mean())}
