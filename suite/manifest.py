"""Tables of samples: which file has which label, which rows may train, and which may not be seen before the end.

A table is a CSV file with the columns `path,label` (and `split`, `group`, `fold`, `mask` or any others), or a folder
of classes. Everything that could make a result wrong without a word stops here as a DataError.
"""

import csv
import difflib
import hashlib
import io
import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING

from adaptsuite.atomic import write_file
from adaptsuite.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    import numpy as np

LABELLED = ("multiclass", "multilabel")  # tasks whose classes are the labels
TASKS = (*LABELLED, "segmentation", "free")
PARTS = ("train", "val", "test")
VAL_SHARE = 0.15


@dataclass(frozen=True)
class Row:
    """One sample."""

    path: Path  # absolute, links resolved
    rel: str  # as the table has it: relative to the manifest's folder
    labels: tuple[str, ...]  # one for multiclass, any number for multilabel (background has none), none or one else
    line: int = 0  # in the table, the header is line 1; 0 in a folder of classes
    extra: Mapping[str, str] = field(default_factory=dict)  # every other column, as text
    files: Mapping[str, Path] = field(default_factory=dict)  # columns that name further files, where not empty

    @property
    def label(self) -> str:
        return ";".join(self.labels)

    @property
    def group(self) -> str:
        """Rows of one group may not be parted; without a `group` cell a file is its own group."""
        return self.extra.get("group") or self.rel


@dataclass(frozen=True)
class Manifest:
    """The rows, and what holds for all of them."""

    rows: tuple[Row, ...]
    classes: tuple[str, ...]  # sorted: a row's target is the position here; segmentation: of mask values 1, 2, ...
    root: Path
    source: Path  # the CSV, or the folder of classes
    task: str = "multiclass"
    columns: tuple[str, ...] = ("path", "label")
    notes: tuple[str, ...] = ()  # what was left out while reading
    skipped: tuple[Mapping[str, str], ...] = ()  # {"path", "row", "reason"} of rows whose files cannot be used

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """sha256 over the cells, the same wherever the folder lies and however the CSV was quoted."""
        cells = [[row.rel, sorted(row.labels), sorted(row.extra.items())] for row in self.rows]
        return hashlib.sha256(json.dumps(cells, separators=(",", ":")).encode()).hexdigest()

    def where(self, row: Row) -> str:
        return f"{self.source.name} line {row.line}" if row.line else f"{self.source.name}/{row.rel}"

    def subset(self, indices: Iterable[int]) -> "Manifest":
        """These rows in this order, with the classes of the whole."""
        return replace(self, rows=tuple(self.rows[i] for i in indices))

    def without(self, bad: Mapping[int, str]) -> "Manifest":
        """The table without the rows of these numbers, which are listed with their reasons in `skipped`."""
        if not bad:
            return self
        if len(bad) == len(self):
            first = self.rows[min(bad)]
            raise DataError(
                f"{self.source.name}: none of its {len(self)} files can be used; {first.rel}: {bad[min(bad)]}"
            )
        kept = self.subset(i for i in range(len(self)) if i not in bad)
        skipped = ({"path": self.rows[i].rel, "row": self.where(self.rows[i]), "reason": why} for i, why in bad.items())
        note = f"{len(bad)} of {len(self)} rows were left out: their files cannot be used"
        classes = _classes(kept.rows, self.task) if self.task in LABELLED else self.classes
        return replace(kept, classes=classes, notes=(*self.notes, note), skipped=(*self.skipped, *skipped))

    def column(self, name: str) -> list[str]:
        """One cell a row. Raises UsageError for a column that is not there."""
        if name not in self.columns:
            raise UsageError(f"{self.source.name} has no column {name!r}; {nearest(name, self.columns)}")
        own = {"path": lambda row: row.rel, "label": lambda row: row.label}
        return [own[name](row) if name in own else row.extra.get(name, "") for row in self.rows]

    def targets(self, classes: Sequence[str] | None = None) -> "np.ndarray":
        """(N,) int64 positions in `classes`, or (N, K) float32 zeros and ones for multilabel.

        classes: another label map, that of an adapter for instance; DataError for a label that it lacks.
        """
        import numpy as np

        if self.task not in LABELLED:
            raise UsageError(f"task {self.task!r}: no classes, so no targets")
        classes = self.classes if classes is None else classes
        index = {name: i for i, name in enumerate(classes)}
        for row in self.rows:
            for label in row.labels:
                if label not in index:
                    raise DataError(f"{self.where(row)}: label {label!r} is unknown; {_nearest(label, classes)}")
        if self.task == "multiclass":
            return np.array([index[row.label] for row in self.rows], dtype=np.int64)
        hot = np.zeros((len(self), len(classes)), dtype=np.float32)
        for i, row in enumerate(self.rows):
            hot[i, [index[label] for label in row.labels]] = 1
        return hot

    def groups(self) -> "np.ndarray":
        """(N,) int64, equal for rows of one group."""
        import numpy as np

        codes: dict[str, int] = {}
        return np.array([codes.setdefault(row.group, len(codes)) for row in self.rows], dtype=np.int64)


# reading ------------------------------------------------------------------------------------------------------------


def load_manifest(
    path: str | Path,
    task: str = "multiclass",
    columns: Sequence[str] = (),
    files: Sequence[str] = (),
    suffixes: Sequence[str] = (),
    folders: bool = False,
    classes: Sequence[str] = (),
) -> Manifest:
    """Read a CSV, the `manifest.csv` of a folder, or a folder of classes (`dog/…/1.WAV`, also below train, val, test).

    task: `multiclass` (one label), `multilabel` (`a;b`; rows of one file are joined), `segmentation` (any label or
    none, one row a file), `free` (text, volumes: as that, any number of rows a file). columns: further ones that must
    be there. files: columns whose cells name files, as `mask`; a cell may be empty. suffixes: which files of a folder
    of classes count, in any case; none: all. classes: what the values 1, 2, ... of masks are called.
    folders: `path` may also name a folder, which then is one sample (a DICOM series).
    """
    path = Path(path)
    if task not in TASKS:
        raise UsageError(f"task {task!r} is unknown; {nearest(task, TASKS)}")
    if path.is_dir() and not (path / "manifest.csv").is_file():
        return _read_folder(path, task, suffixes, (*columns, *files))
    table = path / "manifest.csv" if path.is_dir() else path
    if not table.is_file():
        raise DataError(f"{path} does not exist: a CSV with path,label or a folder of classes is expected")
    header, cells = read_table(table)
    for name in ("path", *(("label",) if task in LABELLED else ()), *columns, *files):
        if name not in header:
            raise DataError(f"{table.name} has no column {name!r}, {_header_problem(name, header)}")
    root = table.parent.resolve()
    rows = [_row(root, f"{table.name} line {line}", line, values, task, files, folders) for line, values in cells]
    rows = _without_repeats(table, rows, task)
    if not rows:
        raise DataError(f"{table.name} has a header and no rows")
    classes = _classes(rows, task) if task in LABELLED else tuple(classes)
    return Manifest(tuple(rows), classes, root, table, task, tuple(header))


def _header_problem(name: str, header: Sequence[str]) -> str:
    """What a header is without a column, and what to do about it."""
    if parted := next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None):
        return f"its cells are parted by {parted!r}: save it with commas"
    close = difflib.get_close_matches(name, header, n=1, cutoff=0.5)
    what = {"path": "that names each row's file", "label": "that says what each row is"}.get(name, "meant by it")
    which = f"{close[0]!r}" if close else f"the column {what}"
    return f"its header is {', '.join(map(repr, header))}: rename {which} to {name!r}"


def read_table(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """The header, and the cells with the line on which each row starts."""
    try:
        raw = table.read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{table}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{table.name} line {line}: not UTF-8 (byte {raw[error.start]:#04x}); a CSV saved as UTF-8 is expected"
        ) from None
    reader, header, rows, line = csv.reader(io.StringIO(text, newline=""), strict=True), [], [], 1
    try:
        for cells in reader:
            here, line = line, reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    twice = next(name for name, count in Counter(header).items() if count > 1)
                    raise DataError(f"{table.name} line {here}: column {twice!r} is there twice")
            elif len(cells) != len(header):
                raise DataError(f"{table.name} line {here}: {len(cells)} cells, the header has {len(header)}")
            else:
                rows.append((here, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"{table.name} line {line}: {error}") from None
    if not header:
        raise DataError(f"{table.name} is empty: a header with path,label is expected")
    return header, rows


def _row(
    root: Path, where: str, line: int, values: dict[str, str], task: str, files: Sequence[str], folders: bool
) -> Row:
    path, rel = inside(root, values["path"], where, "path", folders)
    extra = {name: cell for name, cell in values.items() if name not in ("path", "label")}
    further = {name: inside(root, values[name], where, name)[0] for name in files if values[name]}
    return Row(path, rel, _labels(values.get("label", ""), task, where), line, extra, further)


def inside(root: Path, cell: str, where: str, column: str, folders: bool = False) -> tuple[Path, str]:
    """The file that a cell names, if it is a file below `root` (itself without links) also after following links."""
    if not cell.strip():
        raise DataError(f"{where}: {column!r} is empty")
    if "\0" in cell:
        raise DataError(f"{where}: {column!r} holds a zero byte")
    if cell.startswith(("/", "\\")) or PureWindowsPath(cell).drive:
        raise DataError(f"{where}: {cell!r} is absolute; paths are relative to the manifest's folder")
    real = os.path.realpath(root / cell)
    if os.path.commonpath([real, root]) != str(root):
        raise DataError(f"{where}: {cell!r} leads outside the manifest's folder")
    if not (os.path.isfile(real) or folders and os.path.isdir(real)):
        what = "is a folder, not a file" if os.path.isdir(real) else "does not exist"
        raise DataError(f"{where}: {cell!r} {what}")
    return Path(real), Path(os.path.normpath(cell)).as_posix()


def _labels(cell: str, task: str, where: str) -> tuple[str, ...]:
    if task not in LABELLED:
        return (cell,) if cell else ()
    if task == "multilabel" and not cell.strip():
        return ()
    if task == "multiclass" and ";" in cell:
        raise DataError(f"{where}: label {cell!r} holds several labels; that needs task=multilabel")
    labels = tuple(cell.split(";")) if task == "multilabel" else (cell,)
    for label in labels:
        if not label.strip():
            raise DataError(
                f"{where}: 'label' is empty" if len(labels) == 1 else f"{where}: {cell!r} has an empty label"
            )
        if label != label.strip():
            raise DataError(f"{where}: label {label!r} has spaces around it")
    if len(set(labels)) < len(labels):
        raise DataError(f"{where}: {cell!r} names a label twice")
    return labels


def _without_repeats(table: Path, rows: list[Row], task: str) -> list[Row]:
    """Rows with every sample once: repeats are errors, apart from the rows of one file that multilabel joins."""
    kept: dict[object, Row] = {}
    for row in rows:
        key = (row.path, row.labels, tuple(row.extra.items())) if task == "free" else row.path
        first = kept.setdefault(key, row)
        if first is row:
            continue
        where = f"{table.name} line {row.line}"
        repeated = set(first.labels) & set(row.labels) or not (first.labels and row.labels)
        if task not in LABELLED or repeated:
            raise DataError(f"{where}: duplicate of line {first.line}, {row.rel!r} {row.label!r}")
        if task == "multiclass":
            raise DataError(
                f"{where}: {row.rel!r} is {row.label!r} here and {first.label!r} in line {first.line}; "
                "one of them is wrong, or the task is multilabel"
            )
        if first.extra != row.extra:
            name = next(name for name in row.extra if row.extra[name] != first.extra[name])
            raise DataError(f"{where}: {row.rel!r} has another {name!r} than in line {first.line}")
        kept[key] = replace(first, labels=first.labels + row.labels)
    return list(kept.values())


def _read_folder(root: Path, task: str, suffixes: Sequence[str], columns: Sequence[str]) -> Manifest:
    """Classes are the folders of `root`, or those of its folders train, val and test, which then are the split."""
    if columns:
        raise DataError(f"{root} has no manifest.csv, and a folder of classes has no column {columns[0]!r}")
    given, root = root, root.resolve()
    tops = [folder.name for folder in _visible(root) if folder.is_dir()]
    parts = tops if "train" in tops and set(tops) <= set(PARTS) else [""]
    wanted, rows, left_out = tuple(s.lower() for s in suffixes), [], 0
    for part in parts:
        for folder in _visible(root / part):
            if not folder.is_dir():
                left_out += 1
                continue
            found = [file for file in _walk(folder) if not wanted or file.name.lower().endswith(wanted)]
            left_out += sum(1 for _ in _walk(folder)) - len(found)
            if not found:
                held = sorted({file.suffix.lower() for file in _walk(folder) if file.suffix})
                missing = f"no file{' ending in ' + ' '.join(wanted) if wanted else ''}"
                raise DataError(
                    f"{given / folder.relative_to(root)} holds {missing}{', but ' + ' '.join(held) if held else ''}: "
                    "take it out of the folder of classes, or list the files in a manifest.csv"
                )
            for file in found:
                cell = file.relative_to(root).as_posix()
                path, rel = inside(root, cell, root.name, "path")
                rows.append(Row(path, rel, _labels(folder.name, task, cell), extra={"split": part} if part else {}))
    if not rows:
        loose = f": its {left_out} files need a folder for each class" if left_out else ""
        raise DataError(f"{given} holds neither manifest.csv nor folders of classes with files in them{loose}")
    columns = ("path", "label", "split") if parts != [""] else ("path", "label")
    notes = (f"{left_out} files of {root.name} were left out: no class, or another suffix",) if left_out else ()
    return Manifest(tuple(rows), _classes(rows, task), root, root, task, columns, notes)


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _walk(folder: Path) -> Iterable[Path]:
    for entry in _visible(folder):
        if not entry.is_dir():
            yield entry
        elif entry.is_symlink():
            raise DataError(f"{entry} is a link to a folder; a folder of classes may hold links to files only")
        else:
            yield from _walk(entry)


def _classes(rows: Iterable[Row], task: str) -> tuple[str, ...]:
    return () if task not in LABELLED else tuple(sorted({label for row in rows for label in row.labels}))


def _nearest(word: str, choices: Iterable[str]) -> str:
    text = nearest(word, set(choices))
    return text if len(text) <= 300 else text[:300] + " …"


def write_csv(
    path: str | Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] = (), delimiter: str = ","
) -> None:
    """Write rows as a CSV that a spreadsheet shows and does not run: text starting with = + - @ gets a quote before it.

    Columns are `columns`, which stand even over no rows, then the keys in the order of their first appearance; a key
    that a row lacks is an empty cell.
    """
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n", delimiter=delimiter)
    writer.writerow([_harmless(name) for name in names])
    writer.writerows([_harmless(row.get(name, "")) for name in names] for row in rows)
    write_file(path, text.getvalue())


def _harmless(cell: object) -> object:
    if not isinstance(cell, str) or not cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return "" if cell is None else cell
    try:
        float(cell)
        return cell
    except ValueError:
        return "'" + cell


# splitting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Fold:
    """Row numbers of one run: (n,) int64 each, without overlap; `val` and `test` may be empty."""

    name: str
    train: "np.ndarray"
    val: "np.ndarray"
    test: "np.ndarray"
    notes: tuple[str, ...] = ()  # what the reader of the result should know

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of train, val and test."""
        return {part: len(getattr(self, part)) for part in PARTS}

    def __str__(self) -> str:
        return f"{self.name}: " + ", ".join(f"{size} {part}" for part, size in self.sizes.items())


def split(
    manifest: Manifest,
    test: str | None = None,
    val: str | None = None,
    cv: str | None = None,
    seed: int = 0,
    shots: int | None = None,
) -> list[Fold]:
    """One fold, or one for every value of the column `cv`.

    test: COLUMN=VALUE[,VALUE], the rows held back to the end. val: the same, or `none`; without it the rows with
    split=val, else a seeded, stratified 15 % of the groups that are not test. With none of test, val and cv the column
    `split` decides; a table without one has a test part drawn like that of val. shots: keep only so many training rows
    a class (`few_shot`), drawn after `val` was taken away.
    A group in two of train, val and test is a DataError.
    """
    import numpy as np

    if test and cv:
        raise UsageError("--test and --cv exclude each other: under --cv every value is the test part once")
    require_trainable(manifest)
    folds = []
    for name, held_out in _test_parts(manifest, test, val, cv, seed):
        rest = ~held_out
        if not rest.any():
            raise DataError(f"{name}: every row is a test row, none is left to train on")
        chosen = _val_part(manifest, rest, val, seed, name)
        train = np.flatnonzero(rest & ~chosen)
        if shots is not None:
            train = few_shot(manifest, train, shots, seed)
        fold = Fold(name, train, np.flatnonzero(chosen), np.flatnonzero(held_out))
        _check_fold(manifest, fold)
        notes = _absent_from_training(manifest, fold)
        if name == DRAWN:
            rows, what = len(fold.test), "whole groups" if "group" in manifest.columns else "each file its own group"
            notes += (
                f"the table has no column 'split': {rows} rows ({what}) were drawn by seed {seed} and are held back as "
                "test; say otherwise with --test COLUMN=VALUE or --cv COLUMN",
            )
        if test and "split" in manifest.columns:
            official = sum(manifest.rows[i].extra["split"] == "test" for i in train)
            notes += (f"{official} rows with split=test train, since --test names others",) if official else ()
        folds.append(replace(fold, notes=notes))
    return folds


DRAWN = "drawn"  # the fold of a table that says nothing of a split


def _test_parts(manifest: Manifest, test: str | None, val: str | None, cv: str | None, seed: int):
    """(name, mask of the test rows) for every fold."""
    import numpy as np

    if cv in ("label", "path"):
        raise UsageError(f"--cv {cv}: what is tested must have been trained; name a column of folds or groups")
    if cv:
        cells = manifest.column(cv)
        for row, cell in zip(manifest.rows, cells, strict=True):
            if not cell:
                raise DataError(f"{manifest.where(row)}: {cv!r} is empty, so --cv {cv} has no fold for it")
        values = sorted(set(cells), key=lambda v: (0, int(v), v) if v.isdecimal() else (1, 0, v))
        if len(values) < 2:
            raise DataError(f"--cv {cv}: the column holds {values[0]!r} only, two values or more are needed")
        return [(f"{cv}={value}", np.array([cell == value for cell in cells])) for value in values]
    if test:
        return [(f"test {test}", matching(manifest, "--test", test))]
    if "split" not in manifest.columns:
        everything = np.ones(len(manifest), dtype=bool)
        return [("all", ~everything)] if val else [(DRAWN, _draw(manifest, everything, seed, "the table"))]
    cells = np.array(manifest.column("split"))
    if not val:
        for row, cell in zip(manifest.rows, cells, strict=True):
            if cell not in PARTS:
                raise DataError(
                    f"{manifest.where(row)}: split {str(cell)!r} is none of train, val, test; "
                    "correct it, or choose rows with --test COLUMN=VALUE or --cv COLUMN"
                )
    return [("split", cells == "test")]


def matching(manifest: Manifest, option: str, spec: str) -> "np.ndarray":
    """Mask of the rows whose column has one of the values."""
    import numpy as np

    column, _, values = spec.partition("=")
    if not column or not values:
        raise UsageError(f"{option} {spec!r} is not of the form COLUMN=VALUE[,VALUE]")
    cells = manifest.column(column)
    wanted = {values} if values in cells else set(values.split(","))
    for value in sorted(wanted - set(cells)):
        raise UsageError(f"{option} {spec}: no row has {column}={value}; {_nearest(value, cells)}")
    return np.array([cell in wanted for cell in cells])


def _val_part(manifest: Manifest, rest: "np.ndarray", val: str | None, seed: int, name: str) -> "np.ndarray":
    import numpy as np

    if val == "none":
        return np.zeros_like(rest)
    if val:
        chosen = matching(manifest, "--val", val) & rest
        if not chosen.any():
            raise DataError(f"{name}: all rows of --val {val} are test rows")
        return chosen
    if "split" in manifest.columns:
        chosen = np.array([cell == "val" for cell in manifest.column("split")]) & rest
        if chosen.any():
            return chosen
    require_no_leak(manifest, np.where(rest, "train", "test"), name)  # said of train and test, not of the draw
    return _draw(manifest, rest, seed, name)


def _draw(manifest: Manifest, rest: "np.ndarray", seed: int, name: str) -> "np.ndarray":
    """About 15 % of `rest` in whole groups, of the seven draws the one that keeps most classes in both parts."""
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    rows = np.flatnonzero(rest)
    groups = manifest.groups()[rows]
    strata, members = _strata(manifest, rows)
    count = min(round(1 / VAL_SHARE), len(set(groups.tolist())), members)
    if count < 2:
        raise DataError(
            f"{name}: the rows left to train on are too few groups for a validation part; "
            "name one with --val COLUMN=VALUE, or go without by --val none"
        )
    # a group of one row needs no search for the best place, which is slow on long tables
    kind = StratifiedKFold if len(set(groups.tolist())) == len(rows) else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer members than draws: weighed below
        draws = [held for _, held in kind(count, shuffle=True, random_state=seed).split(rows, strata, groups)]

    def loss(held):
        inside = np.isin(np.arange(len(rows)), held)
        missing = len(set(strata[inside].tolist()) - set(strata[~inside].tolist()))
        return missing, -len(set(strata[inside].tolist())), abs(len(held) / len(rows) - VAL_SHARE)

    chosen = np.zeros_like(rest)
    chosen[rows[min((held for held in draws if 0 < len(held) < len(rows)), key=loss)]] = True
    return chosen


def _strata(manifest: Manifest, rows: "np.ndarray") -> tuple["np.ndarray", int]:
    """What a draw keeps in proportion, the rarest label of each row, and the size of the largest stratum."""
    import numpy as np

    counts = Counter(label for i in rows for label in manifest.rows[i].labels)
    free = manifest.task not in (*LABELLED, "segmentation")
    own = [() if free else manifest.rows[i].labels or tuple(manifest.rows[i].files) for i in rows]
    labels = [min(names, key=lambda name: (counts[name], name), default="") for names in own]
    return np.array(labels), max(Counter(labels).values())


def require_trainable(manifest: Manifest) -> None:
    """Raises DataError for a table that nothing can be learned from: one class, or a class with one example."""
    if manifest.task not in LABELLED:
        return
    seen: dict[str, list[Row]] = defaultdict(list)
    for row in manifest.rows:
        for label in row.labels:
            seen[label].append(row)
    if len({row.labels for row in manifest.rows}) < 2:
        raise DataError(
            f"{manifest.source.name}: every row is {manifest.rows[0].label!r}, two classes are needed: two labels, or "
            "two folders"
        )
    for label, rows in seen.items():
        if len(rows) == 1:
            raise DataError(
                f"{manifest.where(rows[0])}: label {label!r} has this one example, two or more are needed; "
                f"{_nearest(label, set(seen) - {label})}"
            )


def leaks(manifest: Manifest, parts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups whose rows are in several parts, with those parts. parts: one name a row, empty for a row not in use."""
    seen: dict[str, set[str]] = defaultdict(set)
    for row, part in zip(manifest.rows, parts, strict=True):
        if part:
            seen[row.group].add(part)
    order = {name: i for i, name in enumerate(PARTS)}
    return {
        group: tuple(sorted(names, key=lambda n: (order.get(n, 3), n)))
        for group, names in seen.items()
        if len(names) > 1
    }


def require_no_leak(manifest: Manifest, parts: Sequence[str], name: str) -> None:
    """Raises DataError naming up to five groups that are in two parts."""
    found = leaks(manifest, parts)
    if found:
        shown = [f"{group!r} in {' and '.join(where)}" for group, where in list(found.items())[:5]]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise DataError(
            f"{manifest.source.name} ({name}): a group may not be in two parts: {', '.join(shown)}{more}; "
            "choose parts that keep groups whole, such as --cv group"
        )


def _check_fold(manifest: Manifest, fold: Fold) -> None:
    parts = [""] * len(manifest)
    for part in PARTS:
        for i in getattr(fold, part):
            parts[i] = part
    require_no_leak(manifest, parts, fold.name)
    if not len(fold.train):
        raise DataError(f"{fold.name}: no row is left to train on")
    kinds = {manifest.rows[i].labels for i in fold.train}
    if manifest.task in LABELLED and len(kinds) < 2:
        raise DataError(
            f"{fold.name}: all {len(fold.train)} training rows are {';'.join(*kinds)!r}, two classes are needed"
        )


def _absent_from_training(manifest: Manifest, fold: Fold) -> tuple[str, ...]:
    if manifest.task not in LABELLED:
        return ()
    known = {label for i in fold.train for label in manifest.rows[i].labels}
    held = Counter(label for i in (*fold.val, *fold.test) for label in manifest.rows[i].labels)
    return tuple(
        f"class {label!r} has no training row: its {held[label]} held-back rows cannot be right"
        for label in manifest.classes
        if label not in known and held[label]
    )


def few_shot(manifest: Manifest, indices: Iterable[int], shots: int, seed: int) -> "np.ndarray":
    """`shots` rows a class drawn from `indices`, sorted; a smaller draw with the same seed is part of a larger one.

    multilabel: the rarest class draws first and a row serves all its classes, so draws need not be nested.
    """
    import numpy as np

    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise UsageError(f"shots={shots!r} is not a whole number above 0")
    if manifest.task == "free" or not any(row.labels for row in manifest.rows):
        raise UsageError(f"task {manifest.task!r}: there are no labels to draw shots of")
    order = np.random.default_rng(seed).permutation(np.asarray(list(indices), dtype=np.int64)).tolist()
    members: dict[str, list[int]] = defaultdict(list)
    for i in order:
        for name in manifest.rows[i].labels:
            members[name].append(i)
    chosen: set[int] = set()
    for name, rows in sorted(members.items(), key=lambda item: (len(item[1]), item[0])):
        if len(rows) < shots:
            raise DataError(f"class {name!r} has {len(rows)} training rows, {shots} shots were asked for")
        missing = max(0, shots - len(chosen.intersection(rows)))
        chosen.update([i for i in rows if i not in chosen][:missing])
    return np.array(sorted(chosen), dtype=np.int64)
