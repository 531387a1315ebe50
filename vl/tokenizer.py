"""Words to numbers for small text encoders: a fixed vocabulary, and hash buckets for every other word.

No word is lost: two unknown words are told apart unless they share a bucket (feature hashing, Weinberger et al. 2009,
arXiv:0902.2206, without its signs). The whole tokenizer is a few JSON values that travel with the weights.
"""

import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
PAD, CLS, SEP, MASK = range(len(SPECIAL))
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")


def words(text: str) -> list[str]:
    """Lower-cased words, with inner apostrophes, and single signs: "It's red?" -> it's, red, ?."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


@dataclass(frozen=True)
class WordTokenizer:
    """[CLS] words [SEP] as numbers: special ones, then known words, then buckets of the CRC-32 of unknown words."""

    known: tuple[str, ...]
    buckets: int = 1024
    max_length: int = 64  # tokens, [CLS] and [SEP] among them; what is longer is cut behind

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: len(SPECIAL) + i for i, word in enumerate(self.known)}

    @property
    def num_known(self) -> int:
        """Special tokens and known words: the numbers below the buckets."""
        return len(SPECIAL) + len(self.known)

    def __len__(self) -> int:
        return self.num_known + self.buckets

    def number(self, word: str) -> int:
        """Of a word as `words` gives it."""
        found = self._index.get(word)
        return self.num_known + zlib.crc32(word.encode()) % self.buckets if found is None else found

    def encode(self, text: str) -> list[int]:
        return [CLS, *(self.number(word) for word in words(text)[: self.max_length - 2]), SEP]

    def cut(self, text: str) -> int:
        """How many words of a text are beyond max_length."""
        return max(0, len(words(text)) + 2 - self.max_length)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, (B, T) int64 each, padded behind to the longest text."""
        rows = [self.encode(text) for text in texts]
        length = max(map(len, rows), default=0)
        ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows]).reshape(len(rows), length)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    def decode(self, numbers: Sequence[int]) -> str:
        """Words with blanks between; <n> stands for an unknown word of bucket n, special tokens are left out."""
        names = (*SPECIAL, *self.known)
        shown = [names[i] if i < self.num_known else f"<{i - self.num_known}>" for i in map(int, numbers)]
        return " ".join(word for word in shown if word not in SPECIAL)

    def record(self) -> dict[str, Any]:
        """JSON values that `WordTokenizer.of` takes."""
        return {**asdict(self), "known": list(self.known)}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "WordTokenizer":
        return cls(**{**record, "known": tuple(record["known"])})
