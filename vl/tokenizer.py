"""Words to numbers for small text models: a fixed vocabulary, and a way for every other word.

For models that read, other words fall into hash buckets: two are told apart unless they share one (feature hashing,
Weinberger et al. 2009, arXiv:0902.2206, without its signs). For models that write, they are spelled, so that what was
written can be read. A whole tokenizer is a few JSON values that travel with the weights.
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


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """{"input_ids", "attention_mask"} (B, T) int64 of rows of numbers, zeros behind the shorter ones.

    The mask alone says what is padding: 0 may be a word like any other.
    """
    length = max(map(len, rows), default=0)
    ids = torch.tensor([[*row, *[PAD] * (length - len(row))] for row in rows], dtype=torch.long)
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids.reshape(len(rows), length), "attention_mask": mask.long()}


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
        return padded([self.encode(text) for text in texts])

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


@dataclass(frozen=True)
class SpellingTokenizer:
    """[CLS] text [SEP] as numbers: special ones, then known words, then the 256 bytes, of which other words are made.

    A spelled word starts with the byte of a blank, as its UTF-8 behind a blank does.
    """

    known: tuple[str, ...]
    max_length: int = 128  # tokens, [CLS] and [SEP] among them; what is longer is cut behind

    begin, end = CLS, SEP

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: len(SPECIAL) + i for i, word in enumerate(self.known)}

    @property
    def first_byte(self) -> int:
        """The number of byte 0."""
        return len(SPECIAL) + len(self.known)

    def __len__(self) -> int:
        return self.first_byte + 256

    def numbers(self, text: str) -> list[int]:
        """Of all words of a text, without [CLS] and [SEP]."""
        found = []
        for word in words(text):
            number = self._index.get(word)
            found += [self.first_byte + b for b in f" {word}".encode()] if number is None else [number]
        return found

    def encode(self, text: str) -> list[int]:
        return [CLS, *self.numbers(text)[: self.max_length - 2], SEP]

    def cut(self, text: str) -> int:
        """How many tokens of a text are beyond max_length."""
        return max(0, len(self.numbers(text)) + 2 - self.max_length)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{"input_ids", "attention_mask"}, (B, T) int64 each, padded behind to the longest text."""
        return padded([self.encode(text) for text in texts])

    def decode(self, numbers: Sequence[int]) -> str:
        """The text up to [SEP]; special tokens are left out, bytes that are no UTF-8 become a sign for that."""
        found = bytearray()
        for number in map(int, numbers):
            if number == SEP:
                break
            if number >= self.first_byte:
                found.append(number - self.first_byte)
            elif number >= len(SPECIAL):
                found += f" {self.known[number - len(SPECIAL)]}".encode()
        return found.decode("utf-8", "replace").strip()

    def record(self) -> dict[str, Any]:
        """JSON values that `SpellingTokenizer.of` takes."""
        return {**asdict(self), "known": list(self.known)}

    @classmethod
    def of(cls, record: dict[str, Any]) -> "SpellingTokenizer":
        return cls(**{**record, "known": tuple(record["known"])})
