"""Tables of images and text: questions with answers, or captions, as JSON lines or CSV.

A table becomes the core's Manifest, so that splits, groups, leak checks and digests are the ones of every domain. Rows
of one image are one group unless a column `group` says otherwise: no image is in two parts. `text_of`, `answers_of`,
`choices_of` and `image_of` read a row. Rows without an image are allowed among questions, and are counted.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptsuite.errors import DataError, UsageError, nearest
from adaptsuite.front_end import FrontEnd
from adaptsuite.images import inspect, resized
from adaptsuite.manifest import Manifest, Row, inside, read_table
from adaptsuite.memory import Memory
from adaptsuite.vl.scores import answer_scores, normalise_answer
from adaptsuite.vl.tokenizer import WordTokenizer

IMAGE = ("image", "path")  # columns of either name, the first that is there
TEXTS = {"vqa": ("question", "sentence"), "caption": ("caption", "captions")}
ANSWERS = ("answers", "answer", "label")
MOST_CHARACTERS = 10_000  # of a question, caption or answer
PARTED = "|"  # several answers, captions or choices in one cell of a CSV


def text_of(row: Row) -> str:
    """The question, statement or caption."""
    return row.extra["text"]


def answers_of(row: Row) -> tuple[str, ...]:
    """As the annotators wrote them; empty where none is given."""
    return tuple(json.loads(row.extra["answers"]))


def choices_of(row: Row) -> tuple[str, ...]:
    """Of multiple choice; empty elsewhere."""
    return tuple(json.loads(row.extra["choices"]))


def image_of(row: Row) -> Path | None:
    return row.files.get("image")


def image_free(manifest: Manifest) -> int:
    """How many rows have no image."""
    return sum(image_of(row) is None for row in manifest.rows)


# reading ------------------------------------------------------------------------------------------------------------


def load_table(path: str | Path, task: str = "vqa", need_answers: bool = True) -> Manifest:
    """A .jsonl, a .csv, or the manifest.csv or only .jsonl of a folder, as a Manifest of task `free`.

    vqa: {image, question, answers}; also `sentence`, `answer` or `label`, records {"answer": ...} of the VQA data sets,
    and `choices`. Image may be absent, null or empty. caption: {image, caption} or {image, captions}; a row a caption.
    In a CSV several answers, captions or choices are parted by |. Any other column is kept as text.
    Raises DataError that names file and line. need_answers: False for questions to be answered.
    """
    if task not in TEXTS:
        raise UsageError(f"task {task!r} is unknown; {nearest(task, TEXTS)}")
    table = _table_of(Path(path))
    records = _json_lines(table) if table.suffix.lower() in (".jsonl", ".ndjson") else _csv_lines(table)
    root, rows, seen = table.parent.resolve(), [], {}
    for line, record in records:
        where = f"{table.name} line {line}"
        for row in _rows(record, root, where, line, task, need_answers):
            key = (row.rel if row.files else "", tuple(sorted(row.extra.items())))
            if key in seen:
                raise DataError(f"{where}: duplicate of line {seen[key]}, {_short(text_of(row))}")
            seen[key] = line
            rows.append(row)
    if not rows:
        raise DataError(f"{table.name} has no rows")
    names = dict.fromkeys(name for row in rows for name in row.extra)
    found = Manifest(tuple(rows), (), root, table, "free", ("path", *names))
    number = image_free(found)
    return replace(found, notes=(f"{number} of {len(found)} rows have no image",)) if number else found


def _table_of(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path} does not exist: a .jsonl or .csv of images and text is expected")
        return path
    if (path / "manifest.csv").is_file():
        return path / "manifest.csv"
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        what = ", ".join(p.name for p in found) or "none"
        raise DataError(f"{path}: a manifest.csv or exactly one .jsonl is expected in a folder, found {what}")
    return found[0]


def _json_lines(table: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"key {twice[0]!r} is there twice")
        return dict(pairs)

    try:
        raw = table.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{table}: {error.strerror}") from None
    for line, content in enumerate(raw.split(b"\n"), 1):
        if not content.strip():
            continue
        try:
            record = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
        except UnicodeDecodeError as error:
            byte = content[error.start]
            raise DataError(f"{table.name} line {line}: not UTF-8 (byte {byte:#04x}); save it as UTF-8") from None
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(f"{table.name} line {line}: not JSON ({reason}); one object a line is expected") from None
        if not isinstance(record, dict):
            raise DataError(f"{table.name} line {line}: {type(record).__name__} where an object is expected")
        yield line, record


def _csv_lines(table: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    for line, cells in read_table(table)[1]:
        several = {name: cells[name].split(PARTED) for name in ("answers", "captions", "choices") if cells.get(name)}
        yield line, {**cells, **several}


def _rows(record: dict[str, Any], root: Path, where: str, line: int, task: str, need_answers: bool) -> Iterable[Row]:
    """The rows of one line, checked."""
    image, text = (_first(record, names) for names in (IMAGE, TEXTS[task]))
    if text is None:
        wanted = " or ".join(map(repr, TEXTS[task]))
        raise DataError(f"{where}: {wanted} is missing, it has {', '.join(map(repr, record)) or 'nothing'}")
    answered = task == "vqa" and (name := _first(record, ANSWERS))
    answers = checked_texts(record[name], where, name) if answered and (need_answers or record[name]) else ()
    if task == "vqa" and need_answers and not answers:
        raise DataError(f"{where}: 'answers' is missing, it has {', '.join(map(repr, record))}")
    choices = checked_texts(record["choices"], where, "choices") if record.get("choices") else ()
    known = set(map(normalise_answer, choices))
    for answer in answers if choices else ():
        if normalise_answer(answer) not in known:
            raise DataError(f"{where}: answer {_short(answer)} is not among its choices {', '.join(choices)}")
    own = {image, text, name if answered else None, "choices", "label", "path"}
    extra = {key: _cell(value, where, key) for key, value in record.items() if key not in own}
    extra |= {"answers": json.dumps(answers), "choices": json.dumps(choices)}
    files, path, rel = {}, root, f"line {line}"
    cell = record.get(image) if image else None
    if cell is not None and not isinstance(cell, str):
        raise DataError(f"{where}: {image!r} is {type(cell).__name__}, the path of a file is expected")
    if cell:
        path, rel = inside(root, cell, where, image)
        files = {"image": path}
    elif task == "caption":
        raise DataError(f"{where}: 'image' is empty; a caption without its image cannot be used")
    several = isinstance(record[text], list)
    if several and task == "vqa":
        raise DataError(f"{where}: {text!r} is a list, one text is expected")
    for content in checked_texts(record[text], where, text):
        yield Row(path, rel, (), line, {**extra, "text": content}, files)


def _first(record: dict[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in record), None)


def checked_texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    """One text, a list of them, or a list of {"answer": text}; each with a letter or digit, and not too long."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise DataError(f"{where}: {name!r} is empty")
    values = [v.get("answer") if isinstance(v, dict) else v for v in values]
    for text in values:
        if not isinstance(text, str):
            raise DataError(f"{where}: {name!r} holds {type(text).__name__}, text is expected")
        if len(text) > MOST_CHARACTERS:
            raise DataError(f"{where}: {name!r} has {len(text):,} characters, at most {MOST_CHARACTERS:,} are read")
        if "\0" in text:
            raise DataError(f"{where}: {name!r} holds a zero byte")
        if not text.strip():
            raise DataError(f"{where}: {name!r} is empty")
        if not any(map(str.isalnum, text)):
            raise DataError(f"{where}: {name!r} has no word: {_short(text)}")
    return tuple(text.strip() for text in values)


def _cell(value: Any, where: str, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True)
    return "" if value is None else json.dumps(value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


# answers as classes -------------------------------------------------------------------------------------------------


def answer_set(rows: Iterable[Row], least: int = 1, most: int = 3129) -> tuple[str, ...]:
    """Normalised answers of these rows, the most frequent first; ties by name. least: how often one must occur.

    Take it of training rows alone: an answer seen only in test is not to be known.
    """
    counts = Counter(text for row in rows for text in map(normalise_answer, answers_of(row)))
    found = sorted((text for text, n in counts.items() if n >= least), key=lambda text: (-counts[text], text))
    if not found:
        raise DataError(f"no answer occurs {least} times or more")
    return tuple(found[:most])


def labelled(manifest: Manifest, answers: Sequence[str] | None = None) -> Manifest:
    """The table as a multiclass one: a row's label is its most frequent normalised answer.

    answers: the label set; None: what the table has. Raises DataError for an answer that is not in it.
    """
    known = None if answers is None else set(answers)
    rows = []
    for row in manifest.rows:
        given = Counter(map(normalise_answer, answers_of(row)))
        if not given:
            raise DataError(f"{manifest.where(row)}: 'answers' is missing")
        label = given.most_common(1)[0][0]
        if known is not None and label not in known:
            raise DataError(
                f"{manifest.where(row)}: answer {_short(label)} is not in the label set; {_near(label, known)}"
            )
        rows.append(replace(row, labels=(label,)))
    classes = tuple(sorted({row.label for row in rows}) if answers is None else answers)
    return replace(manifest, rows=tuple(rows), classes=classes, task="multiclass", columns=("label", *manifest.columns))


def _near(word: str, choices: Iterable[str]) -> str:
    text = nearest(word, choices)
    return text if len(text) <= 300 else text[:300] + " …"


def soft_targets(manifest: Manifest, answers: Sequence[str]) -> np.ndarray:
    """(N, A) float32 soft accuracy that each known answer would get: the targets of a binary cross-entropy.

    A row none of whose answers is known is all zero: nothing that can be answered is right for it.
    """
    index = {text: i for i, text in enumerate(answers)}
    targets = np.zeros((len(manifest), len(answers)), dtype=np.float32)
    for i, row in enumerate(manifest.rows):
        for text, score in answer_scores(answers_of(row)).items():
            if text in index:
                targets[i, index[text]] = score
    return targets


def captions_by_image(manifest: Manifest) -> tuple[list[Path], list[list[str]]]:
    """Images in the order of their first row, and the captions of each."""
    found: dict[Path, list[str]] = {}
    for row in manifest.rows:
        found.setdefault(row.path, []).append(text_of(row))
    return list(found), list(found.values())


# data sets ----------------------------------------------------------------------------------------------------------


def load_nlvr(folder: str | Path) -> Manifest:
    """NLVR (Suhr et al. 2017): statements about a picture, `true` or `false`; up to four statements made together, and
    all orders of a picture's boxes, are one group."""
    return labelled(load_table(folder), ("false", "true"))


def load_vqa_rad(folder: str | Path, kind: str = "all") -> Manifest:
    """VQA-RAD (Lau et al. 2018): questions about radiographs, of task `free`; an image is a group.

    kind: closed (mostly yes or no), open, or all. Column `kind` holds it in small letters. The split is the one of the
    column `split`, which keeps images apart; all images of the official test part are in the official training part.
    """
    if kind not in ("all", "closed", "open"):
        raise UsageError(f"kind {kind!r} is unknown; {nearest(kind, ('all', 'closed', 'open'))}")
    found = load_table(folder)
    if "answer_type" not in found.columns:
        raise DataError(f"{found.source.name} has no column 'answer_type', so it is not VQA-RAD's")
    rows = []
    for row in found.rows:
        own = row.extra["answer_type"].strip().lower()
        if own not in ("closed", "open"):
            raise DataError(f"{found.where(row)}: answer_type {own!r} is neither CLOSED nor OPEN")
        if kind in ("all", own):
            rows.append(replace(row, extra={**row.extra, "kind": own}))
    return replace(found, rows=tuple(rows), columns=(*found.columns, "kind"))


# rows to tensors ----------------------------------------------------------------------------------------------------


class ImageTexts:
    """Map-style dataset: {"image": (3, h, w) uint8 before the crop, "has_image", "input_ids", "attention_mask", "item"}
    and "target" where there are targets. A row without an image has a black one. Texts are padded to the longest."""

    def __init__(
        self,
        rows: Sequence[Row],
        front_end: FrontEnd,
        tokenizer: WordTokenizer,
        targets: np.ndarray | None = None,
        memory: Memory | None = None,
    ):
        self.rows, self.front_end = list(rows), front_end
        self.text = tokenizer([text_of(row) for row in self.rows])
        self.cut = sum(tokenizer.cut(text_of(row)) > 0 for row in self.rows)  # texts longer than the tokenizer keeps
        self.targets = None if targets is None else torch.as_tensor(targets)
        self._memory = Memory() if memory is None else memory

    @property
    def item_targets(self) -> np.ndarray | None:
        return None if self.targets is None else self.targets.numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, path: Path | None) -> Tensor:
        if path is None:
            return torch.zeros(3, *self.front_end.resized, dtype=torch.uint8)
        key = (path, self.front_end.resized, self.front_end.fit, self.front_end.interpolation)
        if key not in self._memory:
            found = resized(path, self.front_end)
            self._memory.keep(key, found)
            return found
        return self._memory[key]

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = image_of(self.rows[index])
        item = {"image": self.image(path), "has_image": path is not None, "item": index}
        item |= {name: values[index] for name, values in self.text.items()}
        return item if self.targets is None else item | {"target": self.targets[index]}


def survey(manifest: Manifest, skip_bad: bool = False) -> dict[int, str]:
    """Row numbers whose image cannot be read, with the reason; each file is looked at once.

    Raises DataError at the first one unless they are to be skipped: `manifest.without(...)` takes what is returned.
    """
    reasons: dict[Path, str] = {}
    for path in dict.fromkeys(path for row in manifest.rows if (path := image_of(row))):
        try:
            inspect(path)
        except DataError as error:
            reasons[path] = str(error)
    bad = {i: reasons[path] for i, row in enumerate(manifest.rows) if (path := image_of(row)) in reasons}
    if bad and not skip_bad:
        first = min(bad)
        raise DataError(f"{manifest.where(manifest.rows[first])}: {bad[first]}")
    return bad
