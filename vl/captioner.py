"""A frozen image encoder and a frozen causal language model as one model that writes captions of pictures.

What the image encoder gives at last, V, reaches the words as in `adaptsuite.vl.paired`: adapters read it from their
context, and it may stand before the words as a visual prefix; a linear prefix of one pooled vector is Embedding-to-
Prefix (Huber et al. 2025, arXiv:2505.17051). The loss is that of the next word, for every word of the caption and for
its end; routing functions on such a pair are of arXiv:2403.09377.
"""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptsuite.bank import BANK
from adaptsuite.vl.backbones import DecoderPair
from adaptsuite.vl.context import with_context
from adaptsuite.vl.paired import PrefixedModel, VisualPrefix, given
from adaptsuite.vl.settings import CaptionSettings


class CaptionModel(PrefixedModel):
    """Pictures (B, 3, H, W) or their V (B, N, D), and captions (B, T) that begin with `begin`, -> logits (B, T, W).

    The logits at a word are those of the word behind it: at `begin`, of the first word.
    """

    data_task = "caption"

    def __init__(self, pair: DecoderPair, settings: CaptionSettings | None = None, *more, **options):
        super().__init__(pair, settings or CaptionSettings(), *more, **options)
        self.head = VisualPrefix(pair.image_dim, pair.word_dim, self.settings)

    def inputs(self, v: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """What the language model reads: words alone are embedded here, positions are added once, inside of it."""
        words = self.pair.language_model.get_input_embeddings()(input_ids)
        tokens, mask = self.prefixed(v, words, attention_mask)
        places = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts: what is masked takes no place
        return {"inputs_embeds": tokens, "attention_mask": mask, "position_ids": places}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor | None = None,
        features: Tensor | None = None,
        has_image: Tensor | None = None,
    ) -> Tensor:
        v = self.see(image, has_image) if features is None else features
        inputs = self.inputs(v, input_ids, attention_mask)
        context = {"features": v, "token_mask": inputs["attention_mask"].bool()}
        out = with_context(self, self.pair.language_model, context=context, use_cache=False, **inputs)
        return out.logits[:, -input_ids.shape[1] :]

    @torch.no_grad()
    def generate(
        self,
        image: Tensor | None = None,
        features: Tensor | None = None,
        has_image: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """(B, words) numbers of the most likely words by beam search, `end` behind them; the picture is seen once.

        options: of transformers' generate(); settings.beams and settings.words are its defaults.
        """
        v = self.see(image, has_image) if features is None else features
        begin, end = self.tokenizer.begin, self.tokenizer.end
        first = torch.full((len(v), 1), begin, device=v.device)
        inputs = self.inputs(v, first, torch.ones_like(first))
        most = min(self.settings.words, self.tokenizer.max_length - 1)
        options = {"num_beams": self.settings.beams, "max_new_tokens": most, "do_sample": False, **options}
        bank = getattr(self, BANK, None)
        # generate() refuses what it does not know: V is around it, and counts for each beam (context.aligned)
        with nullcontext() if bank is None else bank.using(features=v):
            said = self.pair.language_model.generate(
                inputs_embeds=inputs["inputs_embeds"],
                attention_mask=inputs["attention_mask"],
                eos_token_id=end,
                pad_token_id=end,
                **options,
            )
        return F.pad(said, (0, options["max_new_tokens"] - said.shape[1]), value=end)


def next_token_losses(logits: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T - 1) cross-entropy of each number behind the first, 0 where it is padding.

    logits (B, T, W) at a number are those of the one behind it: the first number is never to be told, and the second, a
    caption's first word, is. The mask says what padding is, whatever its number.
    """
    found = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
    return found * attention_mask[:, 1:]


class CaptionTask:
    """Captions as sequences: each caption's mean cross-entropy of the next word, averaged over captions."""

    target, monitor = "input_ids", "log_loss"

    def loss(self, model: CaptionModel, batch: dict[str, Tensor]) -> Tensor:
        found, mask = self._losses(model, batch)[0], batch["attention_mask"][:, 1:]
        return (found.sum(1) / mask.sum(1)).mean()

    def predict(self, model: CaptionModel, batch: dict[str, Tensor]) -> Tensor:
        """(B, 3): summed loss, how many words are the most likely ones behind the true ones, how many words."""
        losses, logits = self._losses(model, batch)
        mask = batch["attention_mask"][:, 1:]
        hits = (logits[:, :-1].argmax(2) == batch["input_ids"][:, 1:]) * mask
        return torch.stack([losses.sum(1), hits.sum(1), mask.sum(1)], 1)

    def score(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """log_loss and accuracy of the next word, over all words."""
        loss, hits, words = outputs.sum(0)
        return {"log_loss": float(loss / words), "next_word": float(hits / words)}

    def _losses(self, model: CaptionModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = model(**given(batch))
        return next_token_losses(logits, batch["input_ids"], batch["attention_mask"]), logits


class Writing:
    """A task whose outputs are the numbers of generated words (B, words)."""

    target = "item"

    def predict(self, model: CaptionModel, batch: dict[str, Tensor]) -> Tensor:
        return model.generate(**given(batch, ("image", "features", "has_image")))
