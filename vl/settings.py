"""Sections of a recipe that the tasks of images and text share, and each task's own part of them."""

from dataclasses import dataclass
from typing import Literal, get_args

from adaptsuite.errors import UsageError, nearest
from adaptsuite.front_end import Fit, Interpolation

Tokens = Literal["cls", "patches", "all"]
Prefix = Literal["plain", "linear", "mapper", "none"]


@dataclass(frozen=True)
class PairFrontEnd:
    """Section `front_end` of a recipe; None means the backbone's own."""

    size: tuple[int, ...] | int | None = None  # pixels, in whole patches: one number, or height,width
    fit: Fit | None = None  # of encoders that are paired here, squash: a crop could cut off what is asked for
    interpolation: Interpolation | None = None
    tokens: Tokens = "cls"  # of the image encoder's output, what adapters and prefix are given

    def __post_init__(self) -> None:
        if isinstance(self.size, tuple) and len(self.size) != 2:
            raise UsageError(f"front_end.size={self.size}: one number, or height,width is expected")


@dataclass(frozen=True)
class PrefixSettings:
    """How V stands before the words; it trains beside the adapters."""

    # plain: V as it is; linear: a projection of each token of V; mapper: VisualMapper. None: plain, or linear where V
    # is not as wide as words
    prefix: Prefix | None = None
    mapper_tokens: int = 32
    mapper_width: int = 256
    mapper_layers: int = 4

    def __post_init__(self) -> None:
        if self.prefix is not None:
            self._one_of("prefix", get_args(Prefix))
        self._from_one("mapper_tokens", "mapper_width", "mapper_layers")

    def _one_of(self, name: str, kinds: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in kinds:
            raise UsageError(f"head.{name}={value!r} is unknown; {nearest(value, kinds)}")

    def _from_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise UsageError(f"head.{name}={getattr(self, name)}: a whole number from 1 is expected")


@dataclass(frozen=True)
class AnswerSettings(PrefixSettings):
    """Of vqa: also which loss the answers have."""

    loss: Literal["bce", "ce"] = "bce"  # of soft scores, each answer alone; ce: of their shares, one answer is right
    # of models that write about pictures, which have no head of answers: where picture and question stand
    prompt: str = "<image>\nQuestion: {} Answer:"

    def __post_init__(self) -> None:
        super().__post_init__()  # of HeadSettings the next task's
        self._one_of("loss", ("bce", "ce"))


@dataclass(frozen=True)
class CaptionSettings(PrefixSettings):
    """Of caption: also how captions are written."""

    beams: int = 5  # 1: greedy
    words: int = 50  # at most, as the tokenizer counts

    def __post_init__(self) -> None:
        super().__post_init__()
        self._from_one("beams", "words")


@dataclass(frozen=True)
class DualSettings:
    """Of retrieval: what makes embeddings of two encoders that know nothing of each other."""

    width: int = 128  # of the space that both are projected into; aligned towers have one of their own

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UsageError(f"head.width={self.width}: a whole number from 1 is expected")


@dataclass(frozen=True)
class FewShotSettings:
    """Of few_shot and base_to_new: what class names are said in."""

    template: str = "a photo of a {}."  # several by |: their embeddings are averaged

    def __post_init__(self) -> None:
        if any(part.count("{}") != 1 for part in self.template.split("|")):
            raise UsageError(f"head.template={self.template!r}: each part holds {{}} once, where the name goes")


@dataclass(frozen=True)
class HeadSettings(AnswerSettings, CaptionSettings, DualSettings, FewShotSettings):
    """Section `head` of a recipe: the settings of all tasks."""
