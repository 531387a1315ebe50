"""Scores of answers, captions and retrieval, with intervals over resampled images.

Answers are compared after `normalise_answer`, the rules of the VQA evaluation (Antol et al. 2015, arXiv:1505.00468, and
visualqa.org/evaluation). Captions are compared by `caption_words`: lower-cased words without punctuation, in place of
the Penn Treebank tokenizer of the COCO evaluation, which needs Java; on captions without brackets, quotes, hyphens and
clitics the two give the same words.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from adaptsuite.errors import DataError
from adaptsuite.metrics import band, resample

Interval = dict[str, Any]  # {"value": float, "ci": [low, high] or None}

# answers ------------------------------------------------------------------------------------------------------------

NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
           "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # not the apostrophe of possessives, nor the colon of times
# An apostrophe that is missing is put back, where leaving it out gives no other word (its, were, shed, well, ill).
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't "
        "he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't "
        "must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've "
        "somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd "
        "something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're "
        "they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've "
        "who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
        "y'all'd've you'd you'd've you'll you're you've"
    ).split()
    for i, letter in enumerate(word)
    if letter == "'"
}


def normalise_answer(text: str) -> str:
    """Lower case; number words as digits; no articles; no punctuation but apostrophes, colons and decimal points.

    A sign between letters becomes a blank, one beside a blank vanishes, and all vanish where a comma parts digits:
    "one-way" -> "one way" -> "1 way", "yes!" -> "yes", "1,000" -> "1000".
    """
    text = text.replace("\n", " ").replace("\t", " ").replace("’", "'").strip()
    thousands, original = re.search(r"\d,\d", text) is not None, text
    for sign in PUNCTUATION:
        beside_blank = f"{sign} " in original or f" {sign}" in original
        text = text.replace(sign, "" if thousands or beside_blank else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Agreement with annotators in [0, 1]. DataError where there is none.

    Ten or more: mean over each one left out of min(agreeing others / 3, 1), as the official evaluation has it, but
    leaving out by position (it drops every equal record). Fewer: min(agreeing / 3, 1), where three are there; with one
    or two, a third of an agreement would be the most that a right answer gets, so all of them agreeing is 1.
    """
    return answer_scores(references).get(normalise_answer(answer), 0.0)


def answer_scores(references: Sequence[str]) -> dict[str, float]:
    """Soft accuracy of each answer that an annotator gave, by its normalised text: the targets of training."""
    total = len(references)
    if not total:
        raise DataError("a question has no reference answer")
    counts = Counter(map(normalise_answer, references))
    if total < 10:
        return {text: min(n / min(3, total), 1.0) for text, n in counts.items()}
    return {
        text: (n * min((n - 1) / 3, 1.0) + (total - n) * min(n / 3, 1.0))
        / total  # the one left out is of the n, or not
        for text, n in counts.items()
    }


def vqa_scores(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[Hashable] | None = None,
    kinds: Sequence[str] | None = None,
) -> dict[str, Interval]:
    """`accuracy`, the mean soft accuracy, and `accuracy:KIND` for each kind (closed, open; yes/no, number)."""
    rows = np.array([soft_accuracy(a, r) for a, r in zip(answers, references, strict=True)])
    return _by_kind("accuracy", rows, groups, kinds)


YES_NO = {"yes": "yes", "no": "no", "true": "yes", "false": "no", "y": "yes", "n": "no", "t": "yes", "f": "no"}


def yes_no(text: str) -> str | None:
    """yes or no, of yes, no, true, false and their first letters; None for anything else."""
    return YES_NO.get(normalise_answer(text))


def yes_no_scores(
    answers: Sequence[str], truth: Sequence[str], groups: Sequence[Hashable] | None = None
) -> dict[str, Interval]:
    """`accuracy`, and `said_yes`, the share of answers that are yes. An answer that is neither is wrong.

    Raises DataError for a truth that is neither.
    """
    for i, text in enumerate(truth):
        if yes_no(text) is None:
            raise DataError(f"answer {i} is {text!r}, yes or no is expected")
    said, right = [yes_no(a) for a in answers], [yes_no(t) for t in truth]
    hits = np.array([a == t for a, t in zip(said, right, strict=True)], dtype=float)
    yes = np.array([a == "yes" for a in said], dtype=float)
    return {"accuracy": mean_interval(hits, groups), "said_yes": mean_interval(yes, groups)}


def choice_hits(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(N,) credit of multiple choice: 1 where the right choice alone scores highest, 1/m where m tie at the top.

    scores: (N, C), -inf for places without a choice. targets: (N,) positions. Credit for ties is what drawing among
    them would bring; taking the first would reward a constant score wherever truth stands first.
    """
    scores, targets = np.asarray(scores, dtype=float), np.asarray(targets)
    if np.isnan(scores).any():
        raise ValueError(f"scores of row {int(np.flatnonzero(np.isnan(scores).any(1))[0])} hold NaN")
    top = scores == scores.max(1, keepdims=True)
    own = scores[np.arange(len(scores)), targets]
    if np.isinf(own).any():
        raise ValueError(f"row {int(np.flatnonzero(np.isinf(own))[0])}: the right choice has no finite score")
    return top[np.arange(len(scores)), targets] / top.sum(1)


def choice_scores(
    scores: np.ndarray, targets: np.ndarray, groups: Sequence[Hashable] | None = None
) -> dict[str, Interval]:
    return {"accuracy": mean_interval(choice_hits(scores, targets), groups)}


# captions -----------------------------------------------------------------------------------------------------------


def caption_words(text: str) -> list[str]:
    """Lower-cased words; inner apostrophes, hyphens and decimal points stay."""
    return re.findall(r"\w+(?:['’.-]\w+)*", text.lower())


def ngrams(words: Sequence[str], most: int = 4) -> list[Counter]:
    """Counts of the 1- to `most`-grams."""
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, most + 1)]


def bleu_counts(caption: str, references: Sequence[str], most: int = 4) -> tuple[list[int], list[int], int, int]:
    """(clipped matches of each length, n-grams of each length, words, words of the reference closest in length)."""
    words, others = caption_words(caption), [caption_words(r) for r in references]
    own, theirs = ngrams(words, most), [ngrams(o, most) for o in others]
    highest = [Counter() for _ in range(most)]
    for tables in theirs:
        for table, found in zip(highest, tables, strict=True):
            table |= found
    matches = [(mine & high).total() for mine, high in zip(own, highest, strict=True)]
    closest = min((abs(len(o) - len(words)), len(o)) for o in others)[1]
    return matches, [table.total() for table in own], len(words), closest


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]], most: int = 4) -> np.ndarray:
    """(most,) BLEU-1 to BLEU-4 of a corpus (Papineni et al. 2002, section 2.3), without smoothing.

    Length penalty against the closest reference length. 0 where no n-gram of a length is matched.
    """
    return _bleu_of(_bleu_table(captions, references, most), np.ones((1, len(captions))))[0]


def _bleu_table(captions, references, most: int) -> np.ndarray:
    """(N, 2 * most + 2)"""
    rows = [bleu_counts(c, r, most) for c, r in zip(captions, references, strict=True)]
    return np.array([[*matches, *totals, *lengths] for matches, totals, *lengths in rows], dtype=float)


def _bleu_of(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(r, most) of weights (r, N): counts add up over the corpus before anything is divided."""
    most = table.shape[1] // 2 - 1
    sums = weights @ table
    matches, totals, length, closest = sums[:, :most], sums[:, most:-2], sums[:, -2:-1], sums[:, -1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(totals > 0, matches / totals, 0.0)
        geometric = np.exp(np.cumsum(np.log(precision), 1) / np.arange(1, most + 1))
        penalty = np.where(length > 0, np.exp(np.minimum(0, 1 - closest / length)), 0.0)
    return geometric * penalty


def cider_d(
    captions: Sequence[str], references: Sequence[Sequence[str]], most: int = 4, sigma: float = 6.0
) -> np.ndarray:
    """(N,) CIDEr-D of each caption (Vedantam et al. 2015, arXiv:1411.5726, section 7.1); the corpus has the mean.

    Cosines of tf-idf vectors with counts clipped to the reference's, times exp(-(length difference)^2 / (2 sigma^2)),
    averaged over lengths of n-grams and references, times 10. Document frequencies are those of these references, so
    values of different test sets are not comparable, and one image alone scores 0. As in the authors' code, counts are
    not divided by the length, and lengths are numbers of bigrams.
    """
    theirs = [[ngrams(caption_words(r), most) for r in rs] for rs in references]
    document = Counter(gram for tables in theirs for gram in {g for t in tables for table in t for g in table})
    total = np.log(len(references))

    def weighed(tables: Sequence[Counter]) -> list[dict]:
        return [{g: n * (total - np.log(max(1, document[g]))) for g, n in table.items()} for table in tables]

    def cosine(own: dict, other: dict) -> float:
        norm = np.sqrt(sum(v * v for v in own.values()) * sum(v * v for v in other.values()))
        return sum(min(v, other[g]) * other[g] for g, v in own.items() if g in other) / norm if norm else 0.0

    scores = []
    for caption, tables in zip(captions, theirs, strict=True):
        own, values = ngrams(caption_words(caption), most), []
        mine = weighed(own)
        for other in tables:
            off = own[1].total() - other[1].total()
            near = np.exp(-(off**2) / (2 * sigma**2))
            values.append(near * np.mean([cosine(a, b) for a, b in zip(mine, weighed(other), strict=True)]))
        scores.append(10 * np.mean(values))
    return np.array(scores)


def caption_scores(
    captions: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[Hashable] | None = None
) -> dict[str, Interval]:
    """`bleu1` to `bleu4` and `cider_d`. Intervals of the last hold document frequencies as they are in all images."""
    for i, own in enumerate(references):
        if not own or not all(caption_words(text) for text in own):
            raise DataError(f"image {i}: a reference caption is missing or has no word")
    table = _bleu_table(captions, references, 4)
    value, draws = resample(lambda w: _bleu_of(table, w), len(table), groups)
    ends = band(draws) if len(draws) else None
    found = {f"bleu{n + 1}": _interval(value[n], None if ends is None else ends[:, n]) for n in range(4)}
    return {**found, "cider_d": mean_interval(cider_d(captions, references), groups)}


# retrieval ----------------------------------------------------------------------------------------------------------

RECALLS = (1, 5, 10)


def retrieval_ranks(similarity: np.ndarray, image_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks from 0: of each image's best own caption among all captions (I,), of each caption's image among all (C,).

    similarity: (I, C). image_of: (C,) the image of each caption; an image may have many. An equal score of something
    foreign counts as higher: where all are alike, nothing was retrieved. ValueError for what is not finite and for an
    image without caption.
    """
    similarity, image_of = np.asarray(similarity, dtype=float), np.asarray(image_of)
    images, captions = similarity.shape
    if image_of.shape != (captions,) or not np.isin(image_of, np.arange(images)).all():
        raise ValueError(f"image_of has shape {image_of.shape} for {captions} captions of images 0 to {images - 1}")
    if not np.isfinite(similarity).all():
        raise ValueError("similarities are not finite")
    own = image_of[None] == np.arange(images)[:, None]  # (I, C)
    if not own.any(1).all():
        raise ValueError(f"image {int(np.flatnonzero(~own.any(1))[0])} has no caption")
    best = np.where(own, similarity, -np.inf).max(1, keepdims=True)
    to_text = ((similarity >= best) & ~own).sum(1)
    right = similarity[image_of, np.arange(captions)]
    to_image = ((similarity >= right[None]) & ~own).sum(0)
    return to_text, to_image


def retrieval_scores(
    similarity: np.ndarray, image_of: np.ndarray, groups: Sequence[Hashable] | None = None
) -> dict[str, Interval]:
    """`image_to_text_r1`, `_r5`, `_r10` and `text_to_image_r1` ... Queries are resampled by image, the gallery stays.

    groups: (I,) of the images; none: each its own.
    """
    to_text, to_image = retrieval_ranks(similarity, image_of)
    groups = np.arange(len(to_text)) if groups is None else np.asarray(groups)
    found = {}
    for name, ranks, of in (("image_to_text", to_text, groups), ("text_to_image", to_image, groups[image_of])):
        for k in RECALLS:
            found[f"{name}_r{k}"] = mean_interval((ranks < k).astype(float), of)
    return found


def chance_recall(k: int, size: int, own: int = 1) -> float:
    """Recall at k of a blind order: that one of `own` right ones is among the first k of `size`."""
    return 1 - math.comb(size - own, k) / math.comb(size, k) if k < size else 1.0


def harmonic_mean(base: float, new: float) -> float:
    """2 b n / (b + n) of the accuracies on base and new classes, 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


# intervals ----------------------------------------------------------------------------------------------------------


def mean_interval(rows: np.ndarray, groups: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """Mean of (N,) values with a 95 % bootstrap interval over whole groups; its `ci` is None with one group."""
    rows = np.asarray(rows, dtype=float)
    if not len(rows):
        raise DataError("there is nothing to score")
    value, draws = resample(lambda w: w @ rows / w.sum(1), len(rows), groups, seed=seed)
    return _interval(value, band(draws) if len(draws) else None)


def _by_kind(name: str, rows: np.ndarray, groups, kinds) -> dict[str, Interval]:
    found = {name: mean_interval(rows, groups)}
    for kind in sorted(set(kinds)) if kinds is not None else ():
        own = np.flatnonzero([k == kind for k in kinds])
        found[f"{name}:{kind}"] = mean_interval(rows[own], None if groups is None else [groups[i] for i in own])
    return found


def _interval(value: float, ends: np.ndarray | None) -> Interval:
    return {"value": float(value), "ci": None if ends is None else [float(end) for end in ends]}
