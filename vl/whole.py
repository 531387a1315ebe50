"""Models that were made to write about pictures (LLaVA, BLIP-2), as answerers: an answer's score is its likelihood.

transformers' image-text-to-text models by hf:FOLDER, with the folder's tokenizer. A prompt holds the picture's tokens
and the question; an answer is what stands behind it, up to the end of text. Training raises the likelihood of the
row's own answer (teacher forcing); answering compares all that can be given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptsuite.backbones import load_backbone, parse_backbone, parse_options
from adaptsuite.errors import UsageError
from adaptsuite.front_end import FrontEnd, own_front_end
from adaptsuite.vl.backbones import unit
from adaptsuite.vl.context import with_context
from adaptsuite.vl.hub import HubTokenizer, hub_tokenizer
from adaptsuite.vl.paired import AnswerTask, given
from adaptsuite.vl.settings import AnswerSettings

IMAGE = "<image>"  # where the picture's tokens stand in a prompt


@cache  # every hook of a command asks
def is_whole(name: str) -> bool:
    """Whether a backbone's name is that of an image-text-to-text model of transformers."""
    if name.partition(":")[0] not in ("hf", "file"):
        return False
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(parse_options(parse_backbone(name)[1])[0], trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # loading says why
        return False
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


@dataclass(frozen=True)
class Prompts:
    """Questions as prompts {"input_ids", "attention_mask"} (B, T), padded in front: answers follow at once."""

    inner: HubTokenizer
    template: str
    image: tuple[int, ...]  # the picture's tokens
    max_length: int  # of a question alone

    def __len__(self) -> int:
        return len(self.inner)

    def encode(self, text: str) -> list[int]:
        ids = self.inner.inner(text, truncation=True, max_length=self.max_length, add_special_tokens=False)["input_ids"]
        cut = self.inner.inner.decode(ids) if self.cut(text) else text
        before, after = self.template.split(IMAGE)
        # a prompt's own start, if the tokenizer has one, stands before the picture too
        start = self.inner.inner(before.format(cut) if before else "")["input_ids"]
        start = start[:-1] if start and start[-1] == self.inner.end else start
        return [*start, *self.image, *self.inner.inner(after.format(cut), add_special_tokens=False)["input_ids"]]

    def cut(self, text: str) -> int:
        """How many tokens of a question are beyond max_length."""
        return max(0, len(self.inner.inner(text, add_special_tokens=False)["input_ids"]) - self.max_length)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        rows = [self.encode(text) for text in texts]
        length, pad = max(map(len, rows), default=0), self.inner.inner.pad_token_id or 0
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows]).reshape(len(rows), length)
        real = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]).reshape(len(rows), length)
        return {"input_ids": ids, "attention_mask": real}

    def record(self) -> dict[str, Any]:
        return {**self.inner.record(), "template": self.template, "image_tokens": len(self.image)}


class WholeModel(nn.Module):
    """Pictures (B, 3, H, W), uint8 or in [0, 1], and prompts (B, T), -> log-likelihoods of the answers (B, K).

    A row without an image has the mean colour of the front end in its place.
    """

    data_task = "vqa"
    whole = True  # adaptsuite.vl.whole_vqa serves it
    linear_head = None  # answers are said by the language model's own head
    seen_key = None  # what the model's image tower gives is not kept
    tokens = "all"

    def __init__(self, model: nn.Module, name: str, answers: Sequence[str], settings: AnswerSettings, front: FrontEnd):
        super().__init__()
        self.model, self.front_end, self.settings = model, front, settings
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(getattr(front, key)).view(-1, 1, 1), persistent=False)
        words, token = hub_tokenizer(name), getattr(model.config, "image_token_id", None)
        if token is None:
            raise UsageError(f"{name}: {type(model).__name__} does not tell the number of its image token")
        if settings.prompt.count(IMAGE) != 1 or settings.prompt.count("{}") != 1:
            raise UsageError(f"head.prompt={settings.prompt!r}: {IMAGE} and {{}} are needed, each once")
        self.tokenizer = Prompts(words, settings.prompt, (token,) * self._num_image_tokens(), words.max_length)
        end = [words.end]
        ids = [words.inner(f" {answer}", add_special_tokens=False)["input_ids"] + end for answer in answers]
        length = max(map(len, ids))
        self.answers = torch.tensor([row + end * (length - len(row)) for row in ids])  # (K, L), on the CPU
        self.lengths = [len(row) for row in ids]

    @torch.no_grad()
    def _num_image_tokens(self) -> int:
        """By a forward of the image tower alone; counted anew by each model, which knows how it pools."""
        try:
            seen = self.model.get_image_features(pixel_values=self.see(torch.zeros(1, 3, *self.front_end.size)))
        except (AttributeError, TypeError, ValueError, RuntimeError) as e:
            kind, reason = type(self.model).__name__, " ".join(str(e).split())[:150]
            raise UsageError(f"{kind} takes pictures in a form of its own, which is not made here ({reason})") from e
        return len(seen.pooler_output[0])

    def see(self, image: Tensor, has_image: Tensor | None = None) -> Tensor:
        """(B, 3, H, W), normalised: what stands for V."""
        image = image.to(self.mean.device)
        seen = (unit(image) - self.mean) / self.std
        return seen if has_image is None else seen * has_image.to(seen)[:, None, None, None]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image: Tensor | None = None,
        features: Tensor | None = None,
        has_image: Tensor | None = None,
        answer: Tensor | None = None,
    ) -> Tensor:
        """features: `see` of a picture.  answer: (B,) the number of one for each row, whose likelihoods (B,) are
        given alone."""
        pixels = self.see(image, has_image) if features is None else features
        if answer is not None:
            return self._likelihood(input_ids, attention_mask, pixels, answer)
        rows = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        found = [self._likelihood(input_ids, attention_mask, pixels, k * rows) for k in range(len(self.lengths))]
        return torch.stack(found, 1)

    def _likelihood(self, input_ids: Tensor, attention_mask: Tensor, pixels: Tensor, answer: Tensor) -> Tensor:
        """(B,) log p(answer | picture, question), the end of text among the answer."""
        said = self.answers.to(answer.device)[answer]  # (B, L)
        count = torch.tensor(self.lengths, device=answer.device)[answer]
        real = torch.arange(said.shape[1], device=said.device) < count[:, None]
        ids, mask = torch.cat([input_ids, said], 1), torch.cat([attention_mask, real.to(attention_mask.dtype)], 1)
        context = {"features": None, "token_mask": mask.bool()}
        out = with_context(
            self, self.model, input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False, context=context
        )
        logits = out.logits[:, input_ids.shape[1] - 1 : -1].float()  # the word before says the word
        each = F.log_softmax(logits, -1).gather(-1, said.unsqueeze(-1)).squeeze(-1)
        return (each * real).sum(1)


class WholeTask(AnswerTask):
    """The likelihood of each row's best answer is raised; a row none of whose answers is known says nothing."""

    def loss(self, model: WholeModel, batch: dict[str, Tensor]) -> Tensor:
        score, answer = batch["target"].max(1)
        said = model(**given(batch), answer=answer)
        return -(said * score).sum() / score.sum().clamp(min=1e-6)


def load_whole(
    name: str,
    answers: Sequence[str],
    settings: AnswerSettings | None = None,
    *,
    random_weights: bool = False,
    seed: int = 0,
    front_end: dict[str, Any] | None = None,
) -> WholeModel:
    """The model of a folder with these answers. front_end: changes to its own. Raises UsageError for what it cannot."""
    model = load_backbone(name, auto="AutoModelForImageTextToText", random_weights=random_weights, seed=seed)
    own = own_front_end(model)
    front = replace(own, **{"fit": "squash", "ratio": 1.0, **(front_end or {})})
    if front.size != own.size:
        raise UsageError(f"front_end.size={front.size}: {type(model).__name__} takes pictures of {own.size} pixels")
    return WholeModel(model, name, answers, settings or AnswerSettings(), front).eval()
