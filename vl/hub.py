"""Tokenizers of transformers' folders, in the form that this domain's texts take; code of a folder is never run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from adaptsuite.backbones import parse_options
from adaptsuite.errors import ResourceError, UsageError
from adaptsuite.vl.tokenizer import padded

LONGEST = 512  # tokens of a text, whatever the model would take


@dataclass(frozen=True)
class HubTokenizer:
    """A folder's own tokenizer. Texts are padded behind to the longest one; what is longer than max_length is cut."""

    padding: ClassVar[str] = "longest"

    inner: Any  # transformers' tokenizer
    source: str  # a name as backbones have it
    max_length: int  # tokens, special ones among them

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def begin(self) -> int:
        """The number that a written text starts with; of GPT-2 it is that of the end."""
        return next(i for i in (self.inner.bos_token_id, self.inner.cls_token_id, self.end) if i is not None)

    @property
    def end(self) -> int:
        found = next((i for i in (self.inner.eos_token_id, self.inner.sep_token_id) if i is not None), None)
        if found is None:
            raise UsageError(f"{self.source}: its tokenizer has no token for the end of a text")
        return found

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, (B, T) int64 each."""
        found = self.inner(
            list(texts), padding=self.padding, truncation=True, max_length=self.max_length, return_tensors="pt",
            return_attention_mask=True,
        )  # fmt: skip
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def cut(self, text: str) -> int:
        """How many tokens of a text are beyond max_length."""
        return max(0, len(self.inner(text)["input_ids"]) - self.max_length)

    def decode(self, numbers: Sequence[int]) -> str:
        return self.inner.decode([int(n) for n in numbers], skip_special_tokens=True)

    def record(self) -> dict[str, Any]:
        """What an adapter keeps: a digest of the words and their numbers, by which another tokenizer is noticed."""
        words = sorted(self.inner.get_vocab().items())
        digest = hashlib.sha256("\n".join(f"{word}\0{number}" for word, number in words).encode()).hexdigest()
        return {"source": self.source, "kind": type(self.inner).__name__, "tokens": len(self), "sha256": digest}


class FullTokenizer(HubTokenizer):
    """The same with every text padded to max_length, as SigLIP was trained."""

    padding = "max_length"


class WritingTokenizer(HubTokenizer):
    """The same for a model that writes: each text stands between `begin` and `end`, which such tokenizers leave out."""

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        rows = [self._numbers(text)[: self.max_length - 2] for text in texts]
        return padded([[self.begin, *row, self.end] for row in rows])

    def cut(self, text: str) -> int:
        return max(0, len(self._numbers(text)) + 2 - self.max_length)

    def decode(self, numbers: Sequence[int]) -> str:
        """The text up to `end`; a `begin` before it is left out."""
        found = [int(n) for n in numbers]
        found = found[1:] if found[:1] == [self.begin] else found
        found = found[: found.index(self.end)] if self.end in found else found
        return self.inner.decode(found, skip_special_tokens=True).strip()

    def _numbers(self, text: str) -> list[int]:
        return self.inner(text, add_special_tokens=False, verbose=False)["input_ids"]


def hub_tokenizer(name: str, max_length: int = LONGEST, kind: type[HubTokenizer] = HubTokenizer) -> HubTokenizer:
    """Of a hf: or file: backbone. Raises ResourceError where it has none."""
    from transformers import AutoTokenizer

    folder = Path(parse_options(name.partition(":")[2])[0])
    try:
        inner = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ResourceError(f"{name}: its tokenizer cannot be had ({reason})") from error
    files = inner.vocab_files_names.values()
    if folder.is_dir() and not any((folder / file).is_file() for file in files):  # transformers makes one up
        raise ResourceError(f"{name}: its tokenizer cannot be had: the folder has none of {', '.join(files)}")
    inner.padding_side = inner.truncation_side = "right"
    if inner.pad_token is None:  # masked, so any number will do
        inner.pad_token = inner.eos_token or inner.unk_token
    return kind(inner, name, min(max_length, inner.model_max_length, LONGEST))
